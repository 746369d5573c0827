"""A run folded into an ordinary diffusers folder: the base model's, with other numbers in its transformer."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibri_lightning.adapters.full import load_transformer
from calibri_lightning.adapters.loading import load_adapter
from calibri_lightning.calibration.conventions import convention_of
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.fold import fold_member
from calibri_lightning.calibration.restore import check_adapter, layout_for
from calibri_lightning.calibration.scales import Layout
from calibri_lightning.calibration.weights import check_weights
from calibri_lightning.errors import UserError
from calibri_lightning.tools.export.base import TRANSFORMER, BaseModel, load_transformer_of
from calibri_lightning.tools.export.copying import copy_public
from calibri_lightning.tools.finished import FinishedRun

_LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5", "*.onnx*", "*.py")
"""Pickles, code and weights for other programs."""
_HOOKS = "export with --form calibration: hooks give the same pictures"


def check_foldable_run(run: FinishedRun) -> None:
    """Checks what can be known without the model.

    Args:
        run: The run.

    Raises:
        UserError: If its answer does not fit into one set of weights.
    """
    count = len(run.calibration.members)
    if count > 1:
        raise UserError(
            f"The run {run.folder} has {count} members, each with scales of its own, and one set of weights holds one "
            f"member's. Leave --form out, or {_HOOKS}."
        )
    if run.settings.quantization is not None:
        raise UserError(
            f"The run {run.folder} was made on a model quantised to {run.settings.quantization}: its scales were found "
            "for those rounded weights, and folded into whole ones they would be others again when quantised. Either "
            f"{_HOOKS}, or calibrate without memory.quantization."
        )


def write_folded(folder: Path, run: FinishedRun, base: BaseModel) -> None:
    """Writes the model of a run, its answer in its weights.

    Everything but the transformer's numbers is the base model's, byte for byte but for paths of this machine.

    Args:
        folder: Where to; it exists and is empty.
        run: The run.
        base: Its model.

    Raises:
        UserError: If the run is of another model, or cannot be folded into it; nothing is written then.
        OSError: If the folder cannot be written.
    """
    transformer = load_transformer_of(base, run.settings.dtype)
    fold_run(transformer, run, base)
    _copy_all_but_transformer(base, folder)
    transformer.save_pretrained(folder / TRANSFORMER, safe_serialization=True)
    # The same architecture says the same: what saving adds or reorders tells nobody anything.
    copy_public(base.folder / TRANSFORMER / "config.json", folder / TRANSFORMER / "config.json")


def fold_run(transformer: Any, run: FinishedRun, base: BaseModel) -> None:
    """Brings all that a run found into the weights of its transformer.

    Args:
        transformer: The transformer of the base model, untouched.
        run: The run, of one member.
        base: The base model.

    Raises:
        UserError: If the run is of another model, or cannot be folded into it.
    """
    file = run.calibration
    layout = layout_for(file, transformer)
    if run.transformer is not None:
        load_transformer(transformer, run.transformer)
    if run.merged is not None:
        load_adapter(transformer, run.merged, merge=True)
    if run.adapter is not None:
        load_adapter(transformer, run.adapter)
    check_weights(file.weights, transformer, run.folder)
    check_adapter(file, transformer)
    scales = layout.rows(torch.tensor([file.values], dtype=torch.float64)).scales[0, 0]
    # A scale of 1 needs no weights that could carry it, as where an adapter alone was trained.
    moved = [i for i, scale in enumerate(scales.tolist()) if scale != 1.0]
    sites = [layout.sites[i] for i in moved]
    weight, last = _weight(layout, file, base, transformer)
    try:
        fold_member(transformer, sites, scales[moved], weight, last, merges_lora=run.adapter is not None)
    except UserError as error:
        raise UserError(f"The run {run.folder} cannot be folded. {error} Here, that is to {_HOOKS}.") from error


def _weight(
    layout: Layout, file: CalibrationFile, base: BaseModel, transformer: nn.Module
) -> tuple[float, tuple[str, ...]]:
    """The weight of the member, and the layers that take it."""
    (weight,) = layout.member_weights(file.values)
    if weight == 1.0:
        return weight, ()
    convention = convention_of(base.pipeline)
    if convention is None:
        raise UserError(
            f"The run's one member has the weight {weight:g}, and which layer of {base.pipeline.__name__} makes the "
            "velocity is not known. Draw with `predict`, or calibrate with weight_mode: fixed."
        )
    return weight, convention.last_layers(transformer)


def _copy_all_but_transformer(base: BaseModel, folder: Path) -> None:
    copy_public(base.folder / "model_index.json", folder / "model_index.json")
    for terms in base.terms:
        copy_public(terms, folder / terms.name)
    for name, (library, _) in base.index.items():
        if library is not None and name != TRANSFORMER:
            _copy_component(base.folder / name, folder / name)


def _copy_component(source: Path, to: Path) -> None:
    """As `shutil.copytree`, which would copy the rights of folders, too: those of a cache may be read-only."""
    to.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy_component(path, to / path.name)
        elif not any(fnmatch(path.name, pattern) for pattern in _LEFT_OUT):
            copy_public(path, to / path.name)
