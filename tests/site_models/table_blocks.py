"""Picture models with one stream and cross-attention, or none."""

from __future__ import annotations

from typing import Any

import torch

from site_models.base import BATCH, HEADS, Draw, Tiny, model


def _picture(d: Draw, size: int = 4) -> dict[str, Any]:
    return {"hidden_states": d(4, size, size), "encoder_hidden_states": d(5, 12), "timestep": d.time(1000)}


@model(cross_attention=True)
def sana(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 4,
    }
    return d.tiny("SanaTransformer2DModel", config, _picture(d))


@model(cross_attention=True)
def pixart(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": 8,
        "caption_channels": 12,
        "use_additional_conditions": False,
    }
    return d.tiny("PixArtTransformer2DModel", config, _picture(d, 8))


@model()
def dit(d: Draw) -> Tiny:
    config = {**HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 4, "num_embeds_ada_norm": 10}
    batched = {"hidden_states": d(4, 4, 4), "timestep": d.time(1000), "class_labels": d.integers(10)}
    return d.tiny("DiTTransformer2DModel", config, batched)


@model()
def hunyuan_dit(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 4,
        "hidden_size": 16,
        "num_layers": 4,
        "mlp_ratio": 2.0,
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
        "text_len": 5,
        "text_len_t5": 3,
        "use_style_cond_and_image_meta_size": False,
    }
    text = {
        "text_embedding_mask": torch.ones(BATCH, 5),
        "encoder_hidden_states_t5": d(3, 16),
        "text_embedding_mask_t5": torch.ones(BATCH, 3),
    }
    return d.tiny("HunyuanDiT2DModel", config, {**_picture(d), **text})


@model()
def prx(d: Draw) -> Tiny:
    config = {
        "in_channels": 4,
        "context_in_dim": 12,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [4, 4],
    }
    return d.tiny("PRXTransformer2DModel", config, {**_picture(d), "timestep": d.time()})
