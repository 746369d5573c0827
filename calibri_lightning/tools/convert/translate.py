"""An official vector becomes a calibration, and a calibration an official vector; what that loses is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import nn

from calibri_lightning.adapters.files import AdapterRecord
from calibri_lightning.calibration import (
    CalibrationFile,
    Granularity,
    Layout,
    ObtainedBy,
    build_layout,
    find_sites,
    fingerprint,
    layout_for,
)
from calibri_lightning.calibration.official_record import OfficialRecord, UnusedScale
from calibri_lightning.calibration.sites import DEFAULT_OPTIONS
from calibri_lightning.errors import UserError
from calibri_lightning.tools.convert import notes
from calibri_lightning.tools.convert.official import OfficialCheckpoint
from calibri_lightning.tools.convert.orders import Kind, Order, dead_sites, granularity_of, kind_of, order_of

STRATEGY = "CMA-ES of the official Calibri code"
"""What a converted calibration says of how it was obtained."""
_GUIDANCE = 7.0
"""Start of the guided pairs there, hard-coded for SD3.5 and Qwen-Image."""
_STATISTICS = ("step", "train_best", "train_mean", "val", "sigma", "timestamp")
"""What a checkpoint says beside its vector, and an `OfficialRecord` keeps."""


@dataclass(frozen=True)
class ToCalibration:
    """A calibration made from an official checkpoint."""

    file: CalibrationFile
    notes: tuple[str, ...]
    """What the user should know, a sentence or two each."""


@dataclass(frozen=True)
class ToOfficial:
    """An official checkpoint made from a calibration."""

    checkpoint: OfficialCheckpoint
    notes: tuple[str, ...]
    """What the user should know, a sentence or two each."""


def from_official(
    checkpoint: OfficialCheckpoint,
    transformer: nn.Module,
    name: str,
    granularity: Granularity | None = None,
    adapter: AdapterRecord | None = None,
) -> ToCalibration:
    """Makes a calibration from an official checkpoint.

    Scales without an effect in the official code become 1; they, and those of sites that reach no output, are kept in
    `CalibrationFile.official`, so that `to_official` gives back the same vector.

    Args:
        checkpoint: The checkpoint. It does not know its model.
        transformer: The model that it is of; it may live on the meta device.
        name: Folder or Hub id of the model.
        granularity: As the checkpoint's shapes must say, too; None to take theirs.
        adapter: The LoRA that was merged into the model while the vector was searched; the checkpoint does not know it.

    Returns:
        The calibration, and what is inert in it.

    Raises:
        UserError: If the checkpoint is of another model or granularity, its length is not what its shapes say, or it
            has members that the official code did not run.
    """
    kind, found = kind_of(transformer), granularity_of(checkpoint.shapes)
    if granularity not in (None, found):
        raise UserError(
            f"--granularity {granularity} was given, and the shapes of the checkpoint are those of granularity "
            f"{found}. Leave --granularity out, or use {found}."
        )
    order = order_of(transformer, found, _num_members(kind, checkpoint))
    _check_shapes(checkpoint, order, type(transformer).__name__)
    given = dict(zip(order.names, checkpoint.solution, strict=True))
    _check_weights(kind, given, order)
    sites = find_sites(transformer)
    dead = dead_sites(kind, sites)
    live = tuple(site for site in sites if site.name not in dead)
    layout = build_layout(live, found, order.num_members if kind == "flux" else "cfg", _GUIDANCE)
    inert = _inert_there(kind, order)
    unused = tuple(UnusedScale(n, given[n]) for n in order.names if n in inert or n not in layout.names)
    file = CalibrationFile(
        layout.names,
        tuple(1.0 if n in inert else given[n] for n in layout.names),
        found,
        layout.members,
        "raw",
        fingerprint(transformer, name),
        ObtainedBy(STRATEGY, validation_score=checkpoint.val, package_version=version("calibri-lightning")),
        adapter=adapter,
        official=OfficialRecord(model=name, unused=unused, **_statistics(checkpoint)),
    )
    unknown = (*(key for key in checkpoint.shapes if key not in order.shapes), *checkpoint.unknown)
    outside = tuple(name for name in order.names if not _is_within_bounds(name, given[name]))
    return ToCalibration(file, notes.of_calibration(file, kind, unknown, outside))


def _is_within_bounds(name: str, value: float) -> bool:
    """Whether the official search can have found it: scales from -1 to 2, weights from -10 to 10."""
    return -10.0 <= value <= 10.0 if name.endswith("/weight") else -1.0 <= value <= 2.0


def to_official(file: CalibrationFile, transformer: nn.Module) -> ToOfficial:
    """Makes an official checkpoint from a calibration.

    Args:
        file: The calibration.
        transformer: The model that it was made for; it may live on the meta device.

    Returns:
        The checkpoint, and what the official code does not know of the calibration. A calibration that came from an
        official checkpoint gives back its vector, bit for bit.

    Raises:
        UserError: If it is of another model, or has members or sites that the official code has not.
    """
    kind, layout = kind_of(transformer), layout_for(file, transformer)
    _check_expressible(kind, layout)
    order = order_of(transformer, file.granularity if kind == "flux" else "gate", len(layout.members))
    used = _scales(file, layout, order, transformer)
    kept = {scale.name: scale.value for scale in file.official.unused} if file.official else {}
    solution = [kept.get(name, value) if value == 1.0 else value for name, value in used.items()]
    said = {"val": file.obtained_by.validation_score} if file.official is None else _statistics(file.official)
    checkpoint = OfficialCheckpoint((*solution, *layout.member_weights(file.values)), order.shapes, **said)
    acting = sum(used[name] != 1.0 for name in _inert_there(kind, order))
    return ToOfficial(checkpoint, notes.of_official(file, kind, acting))


def _scales(file: CalibrationFile, layout: Layout, order: Order, transformer: nn.Module) -> dict[str, float]:
    """Scales by official name, in the official order; 1 at the sites that a run left out as dead."""
    # SD3 and Qwen-Image have scales for gates alone there, which take over those that they share here.
    gates = {site.name: layout.scale_name(site) for site in find_sites(transformer)} if order.kind != "flux" else {}
    values = dict(zip(file.names, file.values, strict=True))
    found = {}
    for name in order.names[: -order.num_members]:
        member, _, scale = name.partition("/")
        found[name] = values.get(f"{member}/{gates.get(scale, scale)}", 1.0)
    return found


def _statistics(source: OfficialCheckpoint | OfficialRecord) -> dict[str, Any]:
    return {name: getattr(source, name) for name in _STATISTICS}


def _num_members(kind: Kind, checkpoint: OfficialCheckpoint) -> int:
    count = checkpoint.shapes.get("n_models", 0)
    if count < 1 or (kind != "flux" and count != 2):
        rule = "at least one, all of which see the prompt" if kind == "flux" else "two, prompt and negative prompt"
        raise UserError(
            f"shapes['n_models'] is {checkpoint.shapes.get('n_models')!r}. Official checkpoints of this model have "
            f"{rule}. The file is of another model, or of another version of the official code."
        )
    return count


def _check_shapes(checkpoint: OfficialCheckpoint, order: Order, model: str) -> None:
    """Compares what is said with what the model has; of counts that the order does not know, a note is made."""
    if order.kind == "qwen" and "blocks" in checkpoint.shapes:
        raise UserError(
            "The checkpoint's shapes have 'blocks', which the official code for Qwen-Image wrote before its members "
            "were a guided pair: both saw the prompt there. As a pair it would draw other pictures, so it is not "
            "converted. Use a checkpoint of the present official code."
        )
    for key, expected in order.shapes.items():
        found: Any = checkpoint.shapes.get(key)
        if found != expected and key != "total":
            raise UserError(
                f"shapes[{key!r}] is {found if found is not None else 'absent'}, and this {model} has {expected} with "
                f"granularity {order.granularity}. The checkpoint is of another model, size or version of the official "
                f"code: its shapes are {_listed(checkpoint.shapes)}. Give the --model that it was searched on."
            )
    total, length = checkpoint.shapes.get("total"), len(checkpoint.solution)
    if not total == length == order.shapes["total"]:
        raise UserError(
            f"The solution has {length} numbers and shapes['total'] says {total}; its other shapes make "
            f"{order.shapes['total']}, {order.num_members} weights included. The file was cut or edited: use the "
            "original."
        )


def _listed(shapes: Mapping[str, int]) -> str:
    return ", ".join(f"{str(name)[:40]} {count}" for name, count in list(shapes.items())[:12])


def _check_weights(kind: Kind, given: Mapping[str, float], order: Order) -> None:
    if kind != "flux" and all(given[name] == 0 for name in order.names[-order.num_members :]):
        raise UserError(
            "All members' weights are 0. The official code then runs the plain model, without any scale; a calibration "
            "with these weights would draw nothing. Give the checkpoint of another generation."
        )


def _inert_there(kind: Kind, order: Order) -> frozenset[str]:
    """Scales that the official code does not apply: its hook on Qwen-Image's MLPs waits for a tuple in vain."""
    return frozenset(name for name in order.names if kind == "qwen" and ".mlp." in name)


def _check_expressible(kind: Kind, layout: Layout) -> None:
    seen = [member.prompt for member in layout.members]
    if layout.site_options != DEFAULT_OPTIONS:
        raise UserError(
            "This calibration scales the attention and MLP halves of fused blocks apart (split_fused). The official "
            "code has one scale for both. It cannot be converted."
        )
    if kind == "flux" and set(seen) != {"prompt"}:
        raise UserError(
            f"This calibration has members that see {', '.join(seen)}. In the official code all members of FLUX see "
            "the prompt. It cannot be converted."
        )
    if kind != "flux" and not layout.is_cfg:
        raise UserError(
            f"This calibration has {len(seen)} member(s) that see {', '.join(seen)}. In the official code SD3 and "
            "Qwen-Image have two, prompt and negative prompt. It cannot be converted."
        )
