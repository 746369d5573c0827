"""Video models with blocks of their own."""

from __future__ import annotations

from typing import Any

import torch

from site_models.base import AXES, BATCH, HEADS, Draw, Tiny, last_text, model

VIDEO: dict[str, Any] = {**HEADS, "num_layers": 2, "in_channels": 4, "out_channels": 4}


def _video(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d(4, 2, 4, 4), "encoder_hidden_states": d(5, 12), "timestep": d.time(1000)}


@model(dead=last_text())
def hunyuan_video_15(d: Draw) -> Tiny:
    config = {
        **VIDEO,
        "num_refiner_layers": 1,
        "text_embed_dim": 12,
        "text_embed_2_dim": 6,
        "image_embed_dim": 7,
        "rope_axes_dim": AXES,
    }
    text = {
        "encoder_attention_mask": torch.ones(BATCH, 5),
        "encoder_hidden_states_2": d(3, 6),
        "encoder_attention_mask_2": torch.ones(BATCH, 3),
        "image_embeds": d(4, 7),
    }
    return d.tiny("HunyuanVideo15Transformer3DModel", config, {**_video(d), **text})


COGVIDEOX: dict[str, Any] = {
    **VIDEO,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}


def _cogvideox(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d(2, 4, 8, 8), "encoder_hidden_states": d(5, 12), "timestep": d.time(1000)}


@model(dead=last_text())
def cogvideox(d: Draw) -> Tiny:
    return d.tiny("CogVideoXTransformer3DModel", COGVIDEOX, _cogvideox(d))


@model(dead=last_text())
def consisid(d: Draw) -> Tiny:
    return d.tiny("ConsisIDTransformer3DModel", COGVIDEOX, _cogvideox(d))


@model()
def mochi(d: Draw) -> Tiny:
    config = {**VIDEO, "num_layers": 3, "pooled_projection_dim": 12, "text_embed_dim": 16, "time_embed_dim": 16}
    text = {"encoder_hidden_states": d(5, 16), "encoder_attention_mask": torch.ones(BATCH, 5, dtype=torch.bool)}
    return d.tiny("MochiTransformer3DModel", config, {**_video(d), **text})


WAN: dict[str, Any] = {**VIDEO, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}


@model(cross_attention=True)
def wan(d: Draw) -> Tiny:
    return d.tiny("WanTransformer3DModel", WAN, _video(d))


@model(cross_attention=True)
def skyreels_v2(d: Draw) -> Tiny:
    return d.tiny("SkyReelsV2Transformer3DModel", WAN, _video(d))


@model(cross_attention=True)
def ltx(d: Draw) -> Tiny:
    batched = {
        "hidden_states": d(8, 4),
        "encoder_hidden_states": d(5, 12),
        "timestep": d.time(1000),
        "encoder_attention_mask": torch.ones(BATCH, 5),
    }
    config = {**VIDEO, "cross_attention_dim": 16, "caption_channels": 12}
    return d.tiny("LTXVideoTransformer3DModel", config, batched, num_frames=2, height=2, width=2)


@model(cross_attention=True)
def sana_video(d: Draw) -> Tiny:
    config = {
        **VIDEO,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "rope_max_seq_len": 32,
    }
    return d.tiny("SanaVideoTransformer3DModel", config, _video(d))


# The time embedding is computed in float32 whatever the model's dtype.
@model(float32=("time_embeddings",))
def kandinsky5(d: Draw) -> Tiny:
    config = {
        "in_visual_dim": 4,
        "in_text_dim": 12,
        "in_text_dim2": 10,
        "time_dim": 8,
        "out_visual_dim": 4,
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": AXES,
    }
    batched = {
        "hidden_states": d(2, 4, 4, 4),
        "encoder_hidden_states": d(5, 12),
        "timestep": d.time(1000),
        "pooled_projections": d(10),
    }
    positions = (torch.arange(2), torch.arange(2), torch.arange(2))
    return d.tiny(
        "Kandinsky5Transformer3DModel", config, batched, visual_rope_pos=positions, text_rope_pos=torch.arange(5)
    )
