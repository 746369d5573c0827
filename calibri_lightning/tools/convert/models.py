"""The models of official checkpoints, without their weights: built from configurations, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibri_lightning.adapters.full import TRANSFORMER, transformer_class
from calibri_lightning.backbones.loading import first_line
from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.calibration import ModelFingerprint, fingerprint
from calibri_lightning.errors import UserError


@dataclass(frozen=True)
class Model:
    """A transformer without weights."""

    name: str
    """Hub id or folder, as the user said; what a calibration calls it."""
    transformer: nn.Module
    """On the meta device."""


@dataclass(frozen=True)
class _Released:
    hub_id: str
    recipe: str
    """In `RANDOM_MODELS`, which have the released sizes."""


_RELEASED: Mapping[str, _Released] = {
    "flux1-dev": _Released("black-forest-labs/FLUX.1-dev", "flux.1-dev"),
    "sd3-medium": _Released("stabilityai/stable-diffusion-3-medium-diffusers", "sd3-medium"),
    "sd3.5-medium": _Released("stabilityai/stable-diffusion-3.5-medium", "sd3.5-medium"),
    "sd3.5-large": _Released("stabilityai/stable-diffusion-3.5-large", "sd3.5-large"),
    "qwen-image": _Released("Qwen/Qwen-Image", "qwen-image"),
}
NAMES = tuple(_RELEASED)
"""Models that `--model` knows by name."""


def find_model(given: str) -> Model:
    """Finds a model; reads a configuration at most, and downloads nothing.

    Args:
        given: One of `NAMES`, with or without dots; the Hub id of one; or the folder of a pipeline or transformer.

    Returns:
        The model.

    Raises:
        UserError: If it is none of these, or its configuration is damaged.
    """
    if Path(given).is_dir():
        return _from_folder(Path(given))
    for name, released in _RELEASED.items():
        if given == released.hub_id or given.lower().replace(".", "") == name.replace(".", ""):
            return _build(released)
    raise UserError(
        f"--model is {given!r}. It must be one of {', '.join(NAMES)}, or a local folder of a diffusers pipeline or "
        "transformer, of which config.json alone is read."
    )


def model_of(made_for: ModelFingerprint) -> Model:
    """Finds the released model that a calibration was made for.

    Args:
        made_for: What the calibration says.

    Returns:
        The model.

    Raises:
        UserError: If it is none of the released ones.
    """
    for released in _RELEASED.values():
        if RANDOM_MODELS[released.recipe].transformer == made_for.transformer_class:
            model = _build(released)
            if fingerprint(model.transformer).sites_hash == made_for.sites_hash:
                return model
    raise UserError(
        f"This calibration was made for {made_for.name or 'a model'} ({made_for.transformer_class}), which is of the "
        f"size of none of {', '.join(NAMES)}. Give its folder as --model."
    )


def _build(released: _Released) -> Model:
    import diffusers

    recipe = RANDOM_MODELS[released.recipe]
    with torch.device("meta"):
        transformer: nn.Module = getattr(diffusers, recipe.transformer)(**recipe.config, **recipe.blocks)
    return Model(released.hub_id, transformer)


def _from_folder(folder: Path) -> Model:
    import diffusers

    inside = next((path for path in (folder / TRANSFORMER, folder) if transformer_class(path) is not None), None)
    cls: Any = None if inside is None else getattr(diffusers, transformer_class(inside) or "", None)
    if inside is None or not hasattr(cls, "load_config"):
        raise UserError(
            f"--model {folder} holds no transformer of diffusers: neither {TRANSFORMER}/config.json nor config.json "
            f"names one of its classes. Give such a folder, or one of {', '.join(NAMES)}."
        )
    try:
        with torch.device("meta"):
            transformer: nn.Module = cls.from_config(cls.load_config(str(inside)))
    # A configuration that its class refuses surfaces as many classes.
    except Exception as error:
        raise UserError(
            f"The transformer of --model {folder} could not be built from its config.json ({first_line(error)}). "
            "Download the folder again."
        ) from error
    return Model(str(folder), transformer)
