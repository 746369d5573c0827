"""A finished run, read and checked: what it found, what it needs, what its test said. No weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calibri_lightning.adapters.files import ADAPTER, read_adapter
from calibri_lightning.adapters.full import TRANSFORMER, transformer_class
from calibri_lightning.adapters.loading import adapter_folder
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.files import CALIBRATION, read_calibration
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.files import from_json
from calibri_lightning.evaluation.summary import Budget, Summary

CONFIG = "config.yaml"
SUMMARY = "summary.json"
_FIX = "Let the fit end, or go on with it (fit --ckpt_path), and come back then."


@dataclass(frozen=True)
class Settings:
    """What a run's config.yaml says, as far as others want to know it."""

    name: str
    backbone: str
    """Import path of its class."""
    pretrained: str
    dtype: str
    revision: str | None
    embedded_guidance: float | None
    """Guidance that a guidance-distilled model was told; None for its pipeline's own."""
    size: tuple[int, int] | None
    """Height and width of its pictures, pixels; None for the model's own."""
    quantization: str | None
    strategy: str
    strategy_options: Mapping[str, Any]
    rewards: Mapping[str, float]
    """Weights of the rewards by name; options, which may hold addresses and keys, are left out."""
    num_steps: int
    precision: str
    """trainer.precision."""
    prompts: Mapping[str, str]
    """Sources of the prompts by part: train, val, test."""
    model: Mapping[str, Any]
    """All that it says under model."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left, found complete."""

    folder: Path
    settings: Settings
    calibration: CalibrationFile
    summary: Summary | None
    """Its test; None if it was not tested."""
    transformer: Path | None
    """The folder with all weights of the transformer, where they are not those of the base model."""
    merged: Path | None
    """The folder of an adapter that was merged into the weights before the run."""
    adapter: Path | None
    """The folder of the adapter on top of all."""

    @property
    def budget(self) -> Budget | None:
        """What the run cost; None where it was not tested by its own fit."""
        # A test alone knows no cost.
        return self.summary.budget if self.summary is not None and self.summary.budget.images else None


def read_finished(folder: Path) -> FinishedRun:
    """Reads a run and checks that all is there that its calibration.json speaks of.

    Args:
        folder: The run's folder.

    Returns:
        The run.

    Raises:
        UserError: If it is no run, is half-written, or lacks something.
    """
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):  # too long for a name, or no name at all
        is_folder = False
    if not is_folder:
        raise UserError(f"The run {folder} is not a folder. Give the folder of a run, such as runs/name/version_0.")
    for name, why in ((CONFIG, "which names its model"), (CALIBRATION, "which it writes at each validation")):
        if not (folder / name).is_file():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{name}"))
            hint = f"Its folders {', '.join(inside[:3])} have one: give one of these." if inside else _FIX
            raise UserError(f"The run {folder} has no {name}, {why}. {hint}")
    file = read_calibration(folder / CALIBRATION)
    settings = _read_settings(folder / CONFIG)
    weights = _find_transformer(folder, file), _find_merged(file), _find_adapter(folder, file)
    return FinishedRun(folder, settings, file, _read_summary(folder / SUMMARY, file), *weights)


def _read_settings(path: Path) -> Settings:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model, data = config["model"], config["data"]
        backbone, strategy = model["backbone"], model["strategy"]
        given = backbone.get("init_args") or {}
        height, width = given.get("height"), given.get("width")
        return Settings(
            name=str(config.get("name") or path.parent.parent.name),
            backbone=str(backbone["class_path"]),
            pretrained=str(given["pretrained"]),
            dtype=str(given.get("dtype") or "float32"),
            revision=None if given.get("revision") is None else str(given["revision"]),
            embedded_guidance=None if given.get("embedded_guidance") is None else float(given["embedded_guidance"]),
            size=None if height is None or width is None else (int(height), int(width)),
            quantization=(given.get("memory") or {}).get("quantization"),
            strategy=str(strategy["class_path"]).rpartition(".")[2],
            strategy_options=dict(strategy.get("init_args") or {}),
            rewards={name: _weight(entry) for name, entry in model["rewards"].items()},
            num_steps=int(model["num_steps"]),
            precision=str((config.get("trainer") or {}).get("precision") or "32-true"),
            prompts={part: str(data[part]) for part in ("train", "val", "test") if data.get(part)},
            model=model,
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not the configuration of a fit ({type(error).__name__}: {' '.join(str(error).split())}). It "
            "was cut short or edited: restore the file that the fit wrote."
        ) from error


def _weight(entry: Any) -> float:
    given = entry.get("weight") if isinstance(entry, Mapping) else entry
    return 1.0 if given is None else float(given)


def _read_summary(path: Path, file: CalibrationFile) -> Summary | None:
    if not path.is_file():
        return None
    try:
        summary = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Run `test` again, or remove the file.") from error
    # Older versions wrote none.
    if summary.calibration_sha256 not in ("", file.sha256):
        raise UserError(
            f"{path} holds the numbers of another calibration than the {CALIBRATION} beside it: the fit went on after "
            "its test, or a file was copied in. Run `test` again, or remove the file."
        )
    return summary


def _find_transformer(folder: Path, file: CalibrationFile) -> Path | None:
    record = file.weights
    if record is None or not record.transformer:
        return None
    found = folder / TRANSFORMER if record.transformer == TRANSFORMER else Path(record.transformer)
    if transformer_class(found) is None:
        raise UserError(
            f"The run {folder} has trained weights, which its {CALIBRATION} expects in {found}, and there is no model "
            f"of diffusers. Copy that folder back. {_FIX}"
        )
    return found


def _find_merged(file: CalibrationFile) -> Path | None:
    record = file.adapter
    # All weights of a run hold what was merged before it.
    merged = file.weights.merged if file.weights is not None else (record.source if record and record.merged else "")
    return adapter_folder(merged) if merged else None


def _find_adapter(folder: Path, file: CalibrationFile) -> Path | None:
    there, record = folder / ADAPTER, file.adapter
    if record is None or record.merged:
        if there.is_dir():
            raise UserError(
                f"The run {folder} has {ADAPTER}/, of which its {CALIBRATION} says nothing: files of two runs were "
                "mixed, or it was stopped while it wrote. Take out what does not belong to it. " + _FIX
            )
        return None
    if not there.is_dir():
        raise UserError(
            f"The run {folder} has no {ADAPTER}/, and its {CALIBRATION} was found on one. Copy it back. {_FIX}"
        )
    if read_adapter(there).digest != record.sha256:
        raise UserError(
            f"The run {folder} has another {ADAPTER}/ than the one that its {CALIBRATION} was found on: files of two "
            f"runs were mixed, or it was stopped while it wrote. {_FIX}"
        )
    return there
