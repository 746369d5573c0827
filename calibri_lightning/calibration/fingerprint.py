"""Tells whether two transformers are the same model as far as a calibration is concerned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from calibri_lightning.calibration.sites import find_sites, unwrap

# What makes two checkpoints of one class interchangeable. A fixed list, because the defaults that diffusers
# adds to a config from release to release must not turn an old file away; sizes of pictures do not matter
# either.
_ARCHITECTURE = (
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "joint_attention_dim",
    "caption_projection_dim",
    "pooled_projection_dim",
    "dual_attention_layers",
    "qk_norm",
    "guidance_embeds",
)


_SAMPLED = 32
"""Values of each parameter that `weights_digest` looks at."""


@dataclass(frozen=True)
class ModelFingerprint:
    """The model that a calibration belongs to."""

    transformer_class: str
    num_parameters: int
    """Parameters of the transformer, LoRA not counted."""
    sites_hash: str
    """sha256 over class, site names and sizes of the architecture."""
    name: str
    """Folder or hub id that the model came from; for people, not compared."""


def fingerprint(transformer: nn.Module, name: str = "") -> ModelFingerprint:
    """Describes a transformer well enough to tell whether a calibration fits it.

    Args:
        transformer: The transformer.
        name: Folder or hub id that it came from.

    Returns:
        The fingerprint.

    Raises:
        UserError: If the transformer has no known sites.
    """
    sites = [site.name for site in find_sites(transformer)]
    transformer = unwrap(transformer)
    config = dict(getattr(transformer, "config", {}))
    sizes = {key: config[key] for key in _ARCHITECTURE if key in config}
    described = json.dumps([type(transformer).__name__, sites, sizes], sort_keys=True)
    num_parameters = sum(p.numel() for key, p in transformer.named_parameters() if ".lora_" not in key)
    return ModelFingerprint(
        type(transformer).__name__, num_parameters, hashlib.sha256(described.encode()).hexdigest(), name
    )


def weights_digest(transformer: nn.Module) -> str:
    """Tells fine-tunes of one model apart, at no more than a moment's cost: a few values of each frozen parameter.

    Args:
        transformer: The transformer.

    Returns:
        16 hexadecimal digits of a sha256.
    """
    frozen = [(name, p.detach()) for name, p in unwrap(transformer).named_parameters() if not p.requires_grad]
    # One transfer from the device, not one a parameter.
    sampled = torch.cat([p.flatten()[:: max(1, p.numel() // _SAMPLED)][:_SAMPLED].float() for _, p in frozen])
    names = "\n".join(name for name, _ in frozen)
    return hashlib.sha256(names.encode() + sampled.cpu().numpy().tobytes()).hexdigest()[:16]
