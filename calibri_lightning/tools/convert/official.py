"""The checkpoint of the official Calibri trainer, `cmaes_step_*.json`: read in full or refused.

Its `cmaes_state_*.pkl` holds a pickled optimiser. A pickle is a program; none is ever run here. One that is plain data
with the same keys is read by `plain_pickle`, which imports, calls and instantiates nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibri_lightning.atomic import replacing
from calibri_lightning.calibration.document import FORMAT
from calibri_lightning.errors import UserError
from calibri_lightning.remote import plain_pickle

_MOST_BYTES = 4 << 20
"""Larger than any checkpoint: 482 numbers are 12 kB. Parsed, JSON can take a hundred times its size."""
_MOST_PICKLED_BYTES = 64 << 20
"""Larger than any optimiser's state of a model here, so that it is refused for what it is (482 numbers and their
covariance are 2 MB)."""
_MOST_SHAPE = 1_000_000
"""No model has as many scales."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What `cmaes_step_*.json` says."""

    solution: tuple[float, ...]
    """The vector, unrounded; its order depends on the model and on `shapes` (see `Order`)."""
    shapes: Mapping[str, int]
    """Counts that describe the order."""
    step: int = 0
    """Generation."""
    train_best: float | None = None
    """Reward of this vector on one bucket of training prompts."""
    train_mean: float | None = None
    """Mean reward of the generation."""
    val: float | None = None
    """Validation reward, in generations that were validated."""
    sigma: float | None = None
    """Step size of CMA-ES."""
    timestamp: float | str | None = None
    """When it was written."""
    unknown: tuple[str, ...] = ()
    """Other keys that stand there, which the official trainer does not write."""


def is_calibration(path: Path) -> bool:
    """Says whether a file is a calibration.json of this program; anything that is no JSON is not.

    Args:
        path: The file.

    Returns:
        Whether it is.

    Raises:
        UserError: If it cannot be read.
    """
    if _is_pickle(path):
        return False
    document = _parse(path)
    return isinstance(document, dict) and document.get("format") == FORMAT


def read_official(path: Path) -> OfficialCheckpoint:
    """Reads and checks an official checkpoint.

    Args:
        path: `cmaes_step_*.json`, or a pickle of plain data with the same keys.

    Returns:
        The checkpoint.

    Raises:
        UserError: If the file is missing, of another format, a pickle of more than plain data, or holds a bad value.
    """
    document = _unpickle(path) if _is_pickle(path) else _parse(path)
    if not isinstance(document, dict) or not {"solution", "shapes"} <= document.keys():
        raise UserError(
            f"{path} is neither an official Calibri checkpoint (it has no 'solution' and 'shapes') nor a "
            "calibration.json. Give a cmaes_step_*.json of the official trainer, or a calibration.json of a run."
        )
    step = document.get("step", 0)
    if isinstance(step, bool) or not isinstance(step, int):
        raise _bad(path, "step", step, "a whole number")
    timestamp = document.get("timestamp")
    return OfficialCheckpoint(
        _solution(path, document["solution"]),
        _shapes(path, document["shapes"]),
        step,
        _statistic(path, document, "train_best"),
        _statistic(path, document, "train_mean"),
        _statistic(path, document, "val"),
        _statistic(path, document, "sigma"),
        timestamp if isinstance(timestamp, str) else _statistic(path, document, "timestamp"),
        tuple(str(key) for key in document if key not in OfficialCheckpoint.__dataclass_fields__),
    )


def write_official(path: Path, checkpoint: OfficialCheckpoint) -> None:
    """Writes an official checkpoint atomically, laid out as the official trainer does.

    Args:
        path: Where to.
        checkpoint: What to write. Numbers are written with as many digits as give them back exactly.

    Raises:
        UserError: If it cannot be written.
    """
    document = {
        "step": checkpoint.step,
        "train_best": checkpoint.train_best,
        "train_mean": checkpoint.train_mean,
        "val": checkpoint.val,
        "solution": list(checkpoint.solution),
        "shapes": dict(checkpoint.shapes),
        "sigma": checkpoint.sigma,
        "timestamp": checkpoint.timestamp,
    }
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The checkpoint cannot be written to {path}: {error.strerror or error}. The folder must exist, be "
            "writable and have space. Choose another --out."
        ) from error


def _is_pickle(path: Path) -> bool:
    """By its name, or its first byte: the opcode PROTO of protocols 2 and up."""
    return path.suffix in (".pkl", ".pickle") or _read(path, 1) == b"\x80"


def _read(path: Path, most: int) -> bytes:
    """Reads the first bytes of a file; a pipe or device may have no end."""
    try:
        with path.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}. Give a cmaes_step_*.json or a calibration.json."
        ) from error


def _read_whole(path: Path, most: int) -> bytes:
    data = _read(path, most + 1)
    if len(data) > most:
        raise UserError(f"{path} has more than {most >> 20} MiB; no checkpoint is as large. Check the path.")
    return data


def _parse(path: Path) -> object:
    try:
        found: object = json.loads(_read_whole(path, _MOST_BYTES).decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters (\\ud800) cannot be written again
        return found
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({error}), so neither an official checkpoint nor a calibration.json. It is of another "
            "format, or was cut short: give the original file."
        ) from error


def _unpickle(path: Path) -> object:
    try:
        data = _read_whole(path, _MOST_PICKLED_BYTES)
        return plain_pickle.loads(data, plain_pickle.Limits(num_bytes=_MOST_PICKLED_BYTES))
    except plain_pickle.PlainPickleError as error:
        raise UserError(
            f"{path} is a pickle, that is a program, and is not run; plain data alone is read out of it. Refused: "
            f"{error}. The official state (cmaes_state_*.pkl) holds the optimiser itself: give the cmaes_step_*.json "
            "beside it, which has the solution."
        ) from error


def _solution(path: Path, given: object) -> tuple[float, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise _bad(path, "solution", given, "a list of numbers")
    for i, value in enumerate(given):
        if not _is_finite(value):
            raise _bad(path, f"solution[{i}]", value, "a finite number")
    return tuple(float(value) for value in given)


def _shapes(path: Path, given: object) -> dict[str, int]:
    if not isinstance(given, dict):
        raise _bad(path, "shapes", given, "an object of counts")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_SHAPE:
            raise _bad(path, f"shapes[{name!r}]", value, "a count")
    return dict(given)


def _statistic(path: Path, document: Mapping[str, Any], key: str) -> float | None:
    """A number for people. The official trainer writes NaN where rewards failed; that is nothing."""
    value = document.get(key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if not _is_finite(value):
        raise _bad(path, key, value, "a number or null")
    number: float = value
    return number


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _bad(path: Path, key: str, value: object, rule: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return UserError(
        f"{key} of {path} is {shown}, and must be {rule}. The file was edited or cut, or its run broke: use the "
        "original, or the checkpoint of an earlier generation."
    )
