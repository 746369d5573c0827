"""`calibration.json`: the file that people share. Plain JSON, written atomically, checked in full when read.

A file names each of its values, says which model they belong to and how they were obtained. It holds no time
stamp, so that an interrupted and resumed run writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from calibri_lightning.calibration.fingerprint import ModelFingerprint, fingerprint
from calibri_lightning.calibration.scales import Layout, Member, WeightMode, choose
from calibri_lightning.calibration.sites import DEFAULT_OPTIONS, Granularity, SiteOptions, find_sites
from calibri_lightning.errors import UserError

FORMAT = "calibri_lightning.calibration"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ObtainedBy:
    """How a calibration was obtained; for people, not compared."""

    strategy: str = ""
    reward: str = ""
    num_steps: int = 0
    """Sampling steps of the pictures that were scored."""
    images: int = 0
    """Training pictures judged, the same after any kill and resume."""
    seed: int = 0
    start_score: float | None = None
    """Validation score of the untouched model."""
    validation_score: float | None = None
    """Validation score of these values."""
    package_version: str = ""


@dataclass(frozen=True)
class CalibrationFile:
    """The content of a `calibration.json`."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    granularity: Granularity
    members: tuple[Member, ...]
    weight_mode: WeightMode
    model: ModelFingerprint
    obtained_by: ObtainedBy = field(default_factory=ObtainedBy)
    site_options: SiteOptions = DEFAULT_OPTIONS
    """`Layout.site_options`. The names say it too, but not where a whole block shares one scale."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If names and values do not pair up, a value is not finite, or a choice is unknown.
        """
        if len(self.names) != len(self.values) or len(set(self.names)) != len(self.names):
            raise UserError(
                f"A calibration has {len(set(self.names))} different names and {len(self.values)} values. "
                "The rule is one value a name; take the names from layout.names."
            )
        for name, value in zip(self.names, self.values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"The value of {name} is {value}. Every value of a calibration is a finite number. The "
                    "run that made it broke: use its best validated vector, or run again."
                )
        choose("granularity", self.granularity, ("block", "layer", "gate"))
        choose("weight_mode", self.weight_mode, ("fixed", "raw", "guidance"))


def check_model(file: CalibrationFile, transformer: nn.Module) -> None:
    """Checks that a calibration belongs to a transformer.

    Args:
        file: The calibration.
        transformer: The transformer.

    Raises:
        UserError: If it was made for another class or another size of model.
    """
    made, given = file.model, fingerprint(transformer)
    # Packed weights of a quantised model have another parameter count than the model has.
    packed = getattr(transformer, "hf_quantizer", None) is not None
    same_count = packed or made.num_parameters == given.num_parameters
    same_kind = (made.transformer_class, made.sites_hash) == (given.transformer_class, given.sites_hash)
    if not (same_kind and same_count):
        raise UserError(
            f"This calibration was made for {made.name or 'a model'} ({made.transformer_class}, "
            f"{made.num_parameters / 1e6:.4g} M parameters) and the model given is a "
            f"{given.transformer_class} with {given.num_parameters / 1e6:.4g} M parameters, of another "
            "architecture or size. Scales belong to one architecture. Load the model that it was made for, "
            "or calibrate this one."
        )


def layout_for(file: CalibrationFile, transformer: nn.Module) -> Layout:
    """Rebuilds the layout of a calibration on its model; sites not named in the file were dropped as dead.

    Args:
        file: The calibration.
        transformer: The transformer it is for.

    Returns:
        A layout whose names are exactly those of the file.

    Raises:
        UserError: If the calibration is of another model, or its names are not what its granularity and
            members imply.
    """
    check_model(file, transformer)
    named = set(file.names)
    every = Layout(find_sites(transformer, file.site_options), file.granularity, file.members, file.weight_mode)
    kept = tuple(site for site in every.sites if f"member0/{every.scale_name(site)}" in named)
    layout = replace(every, sites=kept or every.sites)
    if layout.names != file.names:
        odd = sorted(named.symmetric_difference(layout.names))
        what = f"it differs at {odd[0]}" if odd else "the order differs"
        raise UserError(
            f"This calibration has {len(file.names)} values, and granularity {file.granularity}, "
            f"{len(file.members)} member(s) and weight_mode {file.weight_mode} imply "
            f"{layout.num_parameters}; {what}. The file was edited or cut: use the original."
        )
    return layout


def write_calibration(path: str | Path, file: CalibrationFile) -> None:
    """Writes a calibration atomically: a reader sees the old file or the new one, whole.

    Args:
        path: Where to write.
        file: What to write.

    Raises:
        UserError: If the folder is missing or cannot be written, or the disk is full.
    """
    path = Path(path)
    text = json.dumps(_document(file), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"The calibration cannot be written to {path}: {error.strerror or error}. The folder must exist, "
            "be writable and have space. Choose another place; a calibration that was there before is "
            "untouched."
        ) from error


def read_calibration(path: str | Path) -> CalibrationFile:
    """Reads and checks a calibration.

    Args:
        path: The file.

    Returns:
        The calibration.

    Raises:
        UserError: If the file is missing, not a calibration, of another version, cut short, or holds a bad
            value.
    """
    try:
        return _parse(json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique))
    except FileNotFoundError:
        raise UserError(
            f"There is no calibration at {path}. Give the path of a calibration.json that a run wrote."
        ) from None
    except OSError as error:
        raise UserError(
            f"The calibration at {path} cannot be read: {error.strerror}. Give the path of a file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text, so not a calibration.json. Give the file that a run wrote."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. It was "
            "probably cut short or edited by hand. Copy or download it again."
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _document(file: CalibrationFile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": file.format_version,
        "model": asdict(file.model),
        "granularity": file.granularity,
        "weight_mode": file.weight_mode,
        "members": [asdict(member) for member in file.members],
        "site_options": asdict(file.site_options),
        "obtained_by": asdict(file.obtained_by),
        "values": dict(zip(file.names, map(float, file.values), strict=True)),
    }


def _parse(document: object) -> CalibrationFile:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(
            f"This is JSON, but not a calibration: its format is not {FORMAT!r}. Give the calibration.json "
            "that a run wrote."
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"The file has format_version {version!r}. This calibri_lightning reads version "
            f"{FORMAT_VERSION}. Install the version of calibri_lightning that wrote it, or convert it there."
        )
    values = {name: _number(value, name) for name, value in _get(document, "values", dict).items()}
    members = tuple(_member(member, f"members[{i}]") for i, member in enumerate(_get(document, "members", list)))
    model = _get(document, "model", dict)
    return CalibrationFile(
        names=tuple(values),
        values=tuple(values.values()),
        granularity=cast(Granularity, _get(document, "granularity", str)),
        members=members,
        weight_mode=cast(WeightMode, _get(document, "weight_mode", str)),
        model=ModelFingerprint(
            _get(model, "transformer_class", str, "model"),
            _get(model, "num_parameters", int, "model"),
            _get(model, "sites_hash", str, "model"),
            _get(model, "name", str, "model"),
        ),
        obtained_by=_obtained_by(_get(document, "obtained_by", dict)),
        site_options=_site_options(document.get("site_options", {})),
    )


def _member(document: object, where: str) -> Member:
    if not isinstance(document, dict):
        raise UserError(f'{where} is {document!r}. A member looks like {{"prompt": "prompt", "weight": 1.0}}.')
    prompt = _get(document, "prompt", str, where)
    choose(f"prompt of {where}", prompt, ("prompt", "negative"))
    return Member(cast(Any, prompt), _number(document.get("weight"), f"{where}.weight"))


def _site_options(document: object) -> SiteOptions:
    """Files from before there were options have none."""
    known = set(SiteOptions.__dataclass_fields__)
    if (
        not isinstance(document, dict)
        or not set(document) <= known
        or not all(isinstance(value, bool) for value in document.values())
    ):
        raise UserError(
            f"The site_options are {document!r}. They are true or false for each of {', '.join(sorted(known))}. The "
            "file was edited, or a later calibri_lightning wrote it: use the original, or upgrade."
        )
    return SiteOptions(**document)


def _obtained_by(document: Mapping[str, Any]) -> ObtainedBy:
    known = ObtainedBy.__dataclass_fields__
    # Later releases may tell more about a run; what this one does not know, it need not understand.
    return ObtainedBy(**{key: value for key, value in document.items() if key in known})


def _get(document: Mapping[str, Any], key: str, kind: type, where: str = "the file") -> Any:
    value = document.get(key)
    if not isinstance(value, kind):
        raise UserError(
            f"{key!r} of {where} is {value!r}, and must be a {kind.__name__}. The file was edited or cut: "
            "use the original."
        )
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"The value of {name} is {value!r}. Every value of a calibration is a finite number. The file "
            "was edited, or the run that made it broke: use the original, or run again."
        )
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{twice!r} is there twice. Each name stands once: use the original file.")
    return document


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system knows how to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
