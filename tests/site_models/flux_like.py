"""FLUX.1 and the models with its two kinds of blocks."""

from __future__ import annotations

from typing import Any

import torch

from site_models.base import AXES, HEADS, Draw, Tiny, model

SIZES: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, **HEADS}
FLUX: dict[str, Any] = {**SIZES, "in_channels": 4, "patch_size": 1, "joint_attention_dim": 12}


def _ids(num_axes: int = 3) -> dict[str, Any]:
    img_ids = torch.zeros(6, num_axes)
    img_ids[:, 1:3] = torch.tensor([[i // 3, i % 3] for i in range(6)])
    return {"img_ids": img_ids, "txt_ids": torch.zeros(5, num_axes)}


def _tokens(d: Draw, **more: Any) -> dict[str, Any]:
    return {"hidden_states": d(6, 4), "encoder_hidden_states": d(5, 12), "timestep": d.time(), **more}


@model(split_fused=True)
def flux1(d: Draw) -> Tiny:
    config = {**FLUX, "pooled_projection_dim": 10, "axes_dims_rope": AXES}
    return d.tiny("FluxTransformer2DModel", config, _tokens(d, pooled_projections=d(10)), **_ids())


@model(split_fused=True)
def bria(d: Draw) -> Tiny:
    return d.tiny("BriaTransformer2DModel", {**FLUX, "axes_dims_rope": AXES}, _tokens(d), **_ids())


@model(split_fused=True)
def fibo(d: Draw) -> Tiny:
    layers = tuple(d(5, 6) for _ in range(4))
    config = {**FLUX, "axes_dims_rope": AXES, "text_encoder_dim": 6}
    return d.tiny("BriaFiboTransformer2DModel", config, _tokens(d, text_encoder_layers=layers), **_ids())


@model(split_fused=True)
def longcat_image(d: Draw) -> Tiny:
    return d.tiny("LongCatImageTransformer2DModel", {**FLUX, "axes_dims_rope": AXES}, _tokens(d), **_ids())


@model(split_fused=True)
def ovis_image(d: Draw) -> Tiny:
    config = {**FLUX, "out_channels": 4, "axes_dims_rope": AXES}
    return d.tiny("OvisImageTransformer2DModel", config, _tokens(d), **_ids())


@model(split_fused=True)
def chroma(d: Draw) -> Tiny:
    guide = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return d.tiny("ChromaTransformer2DModel", {**FLUX, "axes_dims_rope": AXES, **guide}, _tokens(d), **_ids())


@model(split_fused=True)
def flux2(d: Draw) -> Tiny:
    config = {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16, "guidance_embeds": False}
    return d.tiny("Flux2Transformer2DModel", config, _tokens(d), **_ids(4))


@model()
def flux3(d: Draw) -> Tiny:
    channels = {"in_channels": 4, "cond_in_channels": 4, "timestep_channels": 16, "joint_attention_dim": 12}
    batched = _tokens(d, image_cond_hidden_states=d(4, 4))
    config = {**SIZES, **channels, "axes_dims_rope": (2, 2, 2, 2)}
    return d.tiny("Flux3Transformer2DModel", config, batched, image_cond_ids=torch.ones(4, 4), **_ids(4))


@model(split_fused=True)
def hunyuan_image(d: Draw) -> Tiny:
    channels = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 12, "num_refiner_layers": 1}
    batched = {
        "hidden_states": d(4, 2, 3),
        "timestep": d.time(1000),
        "encoder_hidden_states": d(5, 12),
        "encoder_attention_mask": torch.ones(len(d.time()), 5, dtype=torch.bool),
    }
    return d.tiny("HunyuanImageTransformer2DModel", {**SIZES, **channels, "rope_axes_dim": (4, 4)}, batched)


def _hunyuan_video(d: Draw, **more: Any) -> Tiny:
    channels = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 12, "pooled_projection_dim": 10}
    batched = {
        "hidden_states": d(4, 2, 4, 4),
        "timestep": d.time(1000),
        "encoder_hidden_states": d(5, 12),
        "encoder_attention_mask": torch.ones(len(d.time()), 5, dtype=torch.bool),
        "pooled_projections": d(10),
    }
    config = {**SIZES, **channels, "num_refiner_layers": 1, "guidance_embeds": False, "rope_axes_dim": AXES, **more}
    return d.tiny("HunyuanVideoTransformer3DModel", config, batched)


@model(split_fused=True)
def hunyuan_video(d: Draw) -> Tiny:
    return _hunyuan_video(d)


@model(split_fused=True)
def hunyuan_video_i2v(d: Draw) -> Tiny:
    return _hunyuan_video(d, image_condition_type="token_replace")
