"""A calibration meets a model: whether it belongs to it, what its values mean there, where a new run starts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import nn

from calibri_lightning.adapters.files import adapter_digest
from calibri_lightning.adapters.lora import lora_layers
from calibri_lightning.arrays import Floats
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.files import CALIBRATION, read_calibration
from calibri_lightning.calibration.fingerprint import fingerprint
from calibri_lightning.calibration.scales import Layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError


def check_model(file: CalibrationFile, transformer: nn.Module) -> None:
    """Checks that a calibration belongs to a transformer.

    Args:
        file: The calibration.
        transformer: The transformer.

    Raises:
        UserError: If it was made for another class or another size of model.
    """
    made, given = file.model, fingerprint(transformer)
    if replace(made, name="") != given:
        raise UserError(
            f"This calibration was made for {made.name or 'a model'} ({made.transformer_class}, "
            f"{made.num_parameters / 1e6:.4g} M parameters) and the model given is a "
            f"{given.transformer_class} with {given.num_parameters / 1e6:.4g} M parameters, of another "
            "architecture or size. Scales belong to one architecture. Load the model that it was made for, "
            "or calibrate this one."
        )


def check_adapter(file: CalibrationFile, transformer: nn.Module) -> None:
    """Checks that a transformer has the adapter that a calibration was found on; scales alone are half of the answer.

    A merged adapter cannot be seen, so it counts as absent, unless the file tells weights apart (`check_weights`).

    Args:
        file: The calibration.
        transformer: The transformer.

    Raises:
        UserError: If it has not.
    """
    if file.adapter is None or (file.adapter.merged and file.weights is not None):
        return
    loaded = lora_layers(transformer)
    if loaded and adapter_digest(transformer) == file.adapter.sha256:
        return
    raise UserError(
        f"This calibration was found on the adapter {file.adapter.source} (sha256 {file.adapter.sha256[:12]}...), and "
        f"the model given has {'another one' if loaded else 'none'}. Give the run's folder, which holds both, or call "
        "calibri_lightning.adapters.load_adapter(pipe.transformer, ...) with that adapter first. If its weights hold "
        "the adapter already (merged), pass check_adapter=False."
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


def load_start(source: str | Path, layout: Layout, transformer: nn.Module) -> Floats:
    """Reads the parameters that a new run starts from.

    Args:
        source: A calibration.json, or a run folder that holds one.
        layout: The new run's layout.
        transformer: The new run's transformer.

    Returns:
        float64 [n].

    Raises:
        UserError: If there is no such file, or it is of another model or layout.
    """
    path = Path(source)
    file = read_calibration(path / CALIBRATION if path.is_dir() else path)
    check_model(file, transformer)
    values = dict(zip(file.names, file.values, strict=True))
    other = [f"granularity {file.granularity}"] if file.granularity != layout.granularity else []
    if file.weight_mode != layout.weight_mode:
        other.append(f"weight_mode {file.weight_mode}")
    elif file.weight_mode == "fixed" and file.members != layout.members:
        other.append("fixed weights " + ", ".join(f"{member.weight:g}" for member in file.members))
    if file.site_options != layout.site_options:
        flags = asdict(file.site_options).items()
        other.append(", ".join(f"{name} {str(value).lower()}" for name, value in flags))
    if other:
        raise UserError(
            f"init_from {source} was made with {' and '.join(other)}; this run has granularity {layout.granularity}, "
            f"weight_mode {layout.weight_mode} and weights {', '.join(f'{m.weight:g}' for m in layout.members)}. "
            "Set model.calibration as it was; or, for the adapter of that run alone, give its adapter/ folder."
        )
    if values.keys() != set(layout.names):
        odd = sorted(values.keys() ^ set(layout.names))
        raise UserError(
            f"init_from {source} has {len(values)} parameters (granularity {file.granularity}, {len(file.members)} "
            f"member(s), weight_mode {file.weight_mode}); this run has {layout.num_parameters}, and they differ, for "
            f"example, in {odd[0]}. Set model.calibration to the same granularity, members and weight_mode."
        )
    return np.array([values[name] for name in layout.names], dtype=np.float64)
