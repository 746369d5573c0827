"""What a run starts from: what an earlier run, or another program, left behind, in any combination.

init_from: runs/first                                  # all that the run left
init_from: [runs/first/calibration.json, owner/a-lora] # scales of the one, LoRA of the other
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calibri_lightning.adapters.files import ADAPTER, CONFIG, WEIGHTS
from calibri_lightning.adapters.full import TRANSFORMER, transformer_class
from calibri_lightning.adapters.loading import HUB_ID, find_adapter
from calibri_lightning.calibration.files import CALIBRATION
from calibri_lightning.errors import UserError

Kind = Literal["calibration", "adapter", "transformer"]

_PARTS = f"a {CALIBRATION}, an {ADAPTER}/ with {CONFIG}, or a {TRANSFORMER}/ with config.json"


@dataclass(frozen=True)
class Start:
    """What a run starts from. All weights come first, then the adapter on top of them, then the scales."""

    calibration: Path | None = None
    """A calibration.json."""
    adapter: str | None = None
    """An adapter's folder, or its Hub id; for `load_adapter`."""
    transformer: Path | None = None
    """A folder with all weights of a transformer; for `load_transformer`."""


def parse_start(init_from: str | Sequence[str] | None) -> Start:
    """Finds out what each part of `init_from` is; reads no weights.

    Args:
        init_from: One, or several of: a calibration.json; a folder of an adapter in peft's format; a folder of a
            transformer in diffusers' format; the folder of a run, which may hold all of them; the Hub id "owner/name"
            of an adapter, where no such folder is here. None, or an empty list, is nothing.

    Returns:
        At most one of each kind.

    Raises:
        UserError: If one is none of these, or two are of one kind.
    """
    sources = [init_from] if isinstance(init_from, str) else list(init_from or [])
    found: dict[Kind, str] = {}
    given: dict[Kind, str] = {}
    for source in sources:
        for kind, what in _kinds(source):
            if kind in found:
                raise UserError(
                    f"init_from has two of one kind ({kind}): {given[kind]} and {source}. A run starts from one of "
                    "each kind: name the files themselves instead of folders that hold more than one, or leave one out."
                )
            found[kind], given[kind] = what, source
    calibration, transformer = found.get("calibration"), found.get("transformer")
    return Start(
        calibration=None if calibration is None else Path(calibration),
        adapter=found.get("adapter"),
        transformer=None if transformer is None else Path(transformer),
    )


def _kinds(source: str) -> list[tuple[Kind, str]]:
    path = Path(source)
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        return list(_folder(path))
    if HUB_ID.fullmatch(source) and path.suffix not in (".json", ".ckpt", ".safetensors", ".pt", ".bin"):
        return [("adapter", source)]
    raise UserError(
        f"init_from {source!r} is neither a file nor a folder here, nor a Hub id 'owner/name'. Give {_PARTS}, "
        "or a folder that holds them; paths are relative to the folder that the command runs in."
    )


def _file(path: Path) -> tuple[Kind, str]:
    if path.suffix == ".ckpt":
        raise UserError(
            f"init_from {path} is a checkpoint. To go on with that run, give it to --ckpt_path; to start a new one "
            f"from its result, give the run's folder, which holds {_PARTS}."
        )
    if path.name in (CONFIG, WEIGHTS) or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise UserError(
            f"init_from {path} is one file of several. Give its folder: {path.parent or Path('.')} (an adapter in "
            "peft's format or a transformer in diffusers'; pickles are never opened)."
        )
    if path.suffix != ".json":
        raise UserError(f"init_from {path} is no {CALIBRATION}. Give {_PARTS}, or a folder that holds them.")
    return "calibration", str(path)


def _folder(path: Path) -> Iterator[tuple[Kind, str]]:
    if (path / "model_index.json").is_file():
        raise UserError(
            f"init_from {path} is a whole pipeline. That is the model of a run: give it to model.backbone as "
            "pretrained."
        )
    adapter = find_adapter(path)
    transformer = next((p for p in (path, path / TRANSFORMER) if transformer_class(p) is not None), None)
    calibration = path / CALIBRATION
    if adapter is None and transformer is None and not calibration.is_file():
        inside = [child.name for child in sorted(path.iterdir()) if child.is_dir() and _holds_any(child)]
        hint = f" Its folders {', '.join(inside[:3])} do: give one of these." if inside else ""
        bare = _adapter_without_config(path)
        why = f" {bare} lacks {CONFIG}, without which its alpha is unknown." if bare is not None else ""
        raise UserError(
            f"init_from {path} holds none of what a run can start from: {_PARTS}.{hint}{why} A run writes them at its "
            "validations."
        )
    if calibration.is_file():
        yield "calibration", str(calibration)
    if adapter is not None:
        yield "adapter", str(adapter)
    if transformer is not None:
        yield "transformer", str(transformer)


def _adapter_without_config(path: Path) -> Path | None:
    return next((p for p in (path, path / ADAPTER) if any(p.glob("adapter_model.*"))), None)


def _holds_any(path: Path) -> bool:
    held = (path / CALIBRATION).is_file() or find_adapter(path) is not None
    return held or transformer_class(path / TRANSFORMER) is not None
