"""Models to measure on: the embedded one, and random ones of real proportions, which need no download."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch

from calibri_lightning.backbones import SD3
from calibri_lightning.backbones.loading import DType
from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.random_models import (
    RandomFLUX1,
    RandomFLUX2,
    RandomKrea2,
    RandomLumina2,
    RandomModel,
    RandomQwenImage,
    RandomSD3,
    RandomZImage,
    build_random,
)

_KL: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
"""The autoencoder of FLUX.1, which SD3, Z-Image and Lumina 2 share but for the scaling of latents."""


def _sd3(num_layers: int, num_dual: int = 0, **more: Any) -> RandomModel:
    """Heads are 64 wide and as many as blocks; the first `num_dual` blocks have dual attention."""
    config = {
        "num_attention_heads": num_layers,
        "caption_projection_dim": 64 * num_layers,
        "dual_attention_layers": tuple(range(num_dual)),
        **more,
    }
    return RandomModel(
        RandomSD3,
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        config,
        {"num_layers": num_layers},
        "AutoencoderKL",
        _KL,
        {"prompt": (77 + 256, 4096), "pooled": (2048,)},
    )


def _flux2(num_double: int, num_single: int, num_heads: int, text_width: int, dev: bool = False) -> RandomModel:
    return RandomModel(
        RandomFLUX2,
        "Flux2Pipeline" if dev else "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        {"num_attention_heads": num_heads, "joint_attention_dim": text_width, "guidance_embeds": dev},
        {"num_layers": num_double, "num_single_layers": num_single},
        "AutoencoderKLFlux2",
        {},
        {"prompt": (512, text_width)},
        members="single" if dev else "cfg",
    )


_NEW_SD3: Mapping[str, Any] = {"qk_norm": "rms_norm", "pos_embed_max_size": 384}
_FLUX1_DEV = RandomModel(
    RandomFLUX1,
    "FluxPipeline",
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    {"num_layers": 19, "num_single_layers": 38},
    "AutoencoderKL",
    _KL,
    {"prompt": (512, 4096), "pooled": (768,)},
    members="single",
)
_QWEN_IMAGE = RandomModel(
    RandomQwenImage,
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    {},
    {"num_layers": 60},
    "AutoencoderKLQwenImage",
    {},
    {"prompt": (64, 3584)},
    texts_vary=True,
)
_Z_IMAGE = RandomModel(
    RandomZImage,
    "ZImagePipeline",
    "ZImageTransformer2DModel",
    {},
    {"n_layers": 30},
    "AutoencoderKL",
    _KL,
    {"prompt": (64, 2560)},
    texts_vary=True,
)
_LUMINA2 = RandomModel(
    RandomLumina2,
    "Lumina2Pipeline",
    "Lumina2Transformer2DModel",
    {"cap_feat_dim": 2304},
    {"num_layers": 26},
    "AutoencoderKL",
    _KL,
    {"prompt": (64, 2304)},
    texts_vary=True,
)
_KREA2 = RandomModel(
    RandomKrea2,
    "Krea2Pipeline",
    "Krea2Transformer2DModel",
    {},
    {"num_layers": 28},
    "AutoencoderKLQwenImage",
    {},
    {"prompt": (64, 12, 2560)},
    texts_vary=True,
)

RANDOM_MODELS: Mapping[str, RandomModel] = {
    "sd3-medium": _sd3(24),
    "sd3.5-medium": _sd3(24, 13, **_NEW_SD3),
    "sd3.5-large": _sd3(38, **_NEW_SD3),
    "flux.1-dev": _FLUX1_DEV,
    "flux.2-dev": _flux2(8, 48, 48, 15360, dev=True),
    "flux.2-klein-4b": _flux2(5, 20, 24, 7680),
    "flux.2-klein-9b": _flux2(8, 24, 32, 12288),
    "qwen-image": _QWEN_IMAGE,
    "z-image": _Z_IMAGE,
    "lumina-image-2": _LUMINA2,
    "krea-2": _KREA2,
}
"""Random models by name. `--layers` leaves refiner blocks as they are."""
MODELS = ("shapes", *RANDOM_MODELS)


def build(name: str, dtype: DType, device: torch.device, num_blocks: int | None, resolution: int) -> Native:
    """Loads the embedded model, or builds a random one.

    Args:
        name: One of `MODELS`.
        dtype: Type of weights and activations.
        device: Where to.
        num_blocks: Transformer blocks of a random model; as released by default.
        resolution: Height and width of a random model's pictures, pixels.

    Returns:
        The backbone.
    """
    if name == "shapes":
        backbone = SD3("shapes", dtype=dtype)
        backbone.to(device)
        return backbone
    return build_random(RANDOM_MODELS[name], dtype, device, num_blocks, resolution)


def members_of(name: str) -> Literal["single", "cfg"]:
    """How a model is guided.

    Args:
        name: One of `MODELS`.

    Returns:
        By a negative prompt, or not at all.
    """
    return "cfg" if name == "shapes" else RANDOM_MODELS[name].members


def twin(backbone: Native) -> Native:
    """Makes another backbone of the same weights, whose modules, and so hooks and compiled graphs, are its own.

    Args:
        backbone: The model, without hooks.

    Returns:
        Its twin; no weight is copied.
    """
    modules = backbone.modules()
    shared = {id(tensor): tensor for tensor in (*modules.parameters(), *modules.buffers())}
    made = copy.copy(backbone)
    pipeline = copy.deepcopy(backbone.pipeline, dict(shared))
    made.pipeline, made.transformer = pipeline, pipeline.transformer
    return made
