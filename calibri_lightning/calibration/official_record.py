"""What a calibration that came from an official Calibri checkpoint keeps of it, so that it can go back unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibri_lightning.errors import UserError


@dataclass(frozen=True)
class UnusedScale:
    """A scale that stood in the official vector and has no effect there, or none anywhere."""

    name: str
    """As in `Layout.names`: "member0/transformer_blocks.3.mlp.image"."""
    value: float
    """What stood there."""


@dataclass(frozen=True)
class OfficialRecord:
    """The parts of an official checkpoint that are no scales and weights in use."""

    model: str
    """The model that the user said it is of; the checkpoint itself does not know."""
    step: int
    train_best: float | None
    train_mean: float | None
    val: float | None
    sigma: float | None
    timestamp: float | str | None
    unused: tuple[UnusedScale, ...] = ()


def to_document(record: OfficialRecord) -> dict[str, Any]:
    """Lays a record out for JSON.

    Args:
        record: The record.

    Returns:
        Plain values. `from_document` gives the record back.
    """
    document = {name: getattr(record, name) for name in OfficialRecord.__dataclass_fields__}
    return {**document, "unused": {scale.name: scale.value for scale in record.unused}}


def from_document(document: object) -> OfficialRecord:
    """Reads and checks a record.

    Args:
        document: What `to_document` made.

    Returns:
        The record.

    Raises:
        UserError: If it is anything else.
    """
    if not isinstance(document, dict):
        raise _edited("official", document)
    unused = document.get("unused")
    if not isinstance(unused, dict):
        raise _edited("official.unused", unused)
    model, step, timestamp = (document.get(key) for key in ("model", "step", "timestamp"))
    if not isinstance(model, str):
        raise _edited("official.model", model)
    if isinstance(step, bool) or not isinstance(step, int):
        raise _edited("official.step", step)
    if not isinstance(timestamp, str):
        timestamp = _number(document, "timestamp")
    best, mean, val, sigma = (_number(document, key) for key in ("train_best", "train_mean", "val", "sigma"))
    scales = tuple(_scale(unused, name) for name in unused)
    return OfficialRecord(model, step, best, mean, val, sigma, timestamp, scales)


def _scale(document: Mapping[str, Any], name: str) -> UnusedScale:
    value = _number(document, name)
    if value is None:
        raise _edited(f"{name} of official", value)
    return UnusedScale(name, float(value))


def _number(document: Mapping[str, Any], key: str) -> float | None:
    value = document.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _edited(f"{key} of official", value)
    return value


def _edited(what: str, value: object) -> UserError:
    return UserError(
        f"{what} is {value!r}, which `convert` does not write. The file was edited or cut: use the original, or "
        "convert the official checkpoint again."
    )
