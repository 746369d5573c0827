"""Models whose blocks have one branch a stream and no fused blocks."""

from __future__ import annotations

from typing import Any

import torch

from site_models.base import AXES, BATCH, HEADS, Draw, Tiny, last_text, model

DOUBLE: dict[str, Any] = {"num_layers": 2, **HEADS}


@model()
def sd3(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "num_layers": 3,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    batched = {
        "hidden_states": d(4, 8, 8),
        "encoder_hidden_states": d(5, 12),
        "pooled_projections": d(10),
        "timestep": d.time(1000),
    }
    return d.tiny("SD3Transformer2DModel", config, batched)


def _qwen_image(d: Draw, shapes: list[tuple[int, int, int]], **more: Any) -> Tiny:
    channels = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": AXES}
    batched = {
        "hidden_states": d(6, 16),
        "encoder_hidden_states": d(5, 12),
        "encoder_hidden_states_mask": torch.ones(BATCH, 5, dtype=torch.bool),
        "timestep": d.time(),
        "img_shapes": [shapes] * BATCH,
    }
    return d.tiny("QwenImageTransformer2DModel", {**DOUBLE, **channels, **more}, batched)


@model(dead=last_text())
def qwen_image(d: Draw) -> Tiny:
    return _qwen_image(d, [(1, 2, 3)])


@model(dead=last_text())
def qwen_image_edit(d: Draw) -> Tiny:
    return _qwen_image(d, [(1, 2, 2), (1, 1, 2)], zero_cond_t=True)


@model()
def auraflow(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 16,
    }
    batched = {"hidden_states": d(4, 8, 8), "encoder_hidden_states": d(5, 12), "timestep": d.time()}
    return d.tiny("AuraFlowTransformer2DModel", config, batched)


def _sizes() -> dict[str, Any]:
    size = torch.tensor([[8.0, 8.0]]).repeat(BATCH, 1)
    return {"original_size": size, "target_size": size, "crop_coords": 0 * size}


def _cogview(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d(4, 8, 8), "encoder_hidden_states": d(5, 12), "timestep": d.time(1000)}


COGVIEW: dict[str, Any] = {
    **DOUBLE,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 12,
    "time_embed_dim": 16,
    "condition_dim": 4,
}


@model(dead=last_text())
def cogview3_plus(d: Draw) -> Tiny:
    config = {**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8}
    return d.tiny("CogView3PlusTransformer2DModel", config, {**_cogview(d), **_sizes()})


@model(dead=last_text())
def cogview4(d: Draw) -> Tiny:
    config = {**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (16, 16)}
    return d.tiny("CogView4Transformer2DModel", config, {**_cogview(d), **_sizes()})


@model(dead=last_text())
def glm_image(d: Draw) -> Tiny:
    sizes = _sizes()
    del sizes["original_size"]
    prior = {"prior_token_id": d.integers(16, 16), "prior_token_drop": torch.zeros(BATCH, dtype=torch.bool)}
    config = {**COGVIEW, "prior_vq_quantizer_codebook_size": 16}
    return d.tiny("GlmImageTransformer2DModel", config, {**_cogview(d), **sizes, **prior})


# Its routed experts run under no_grad in eval mode, which cuts gradients.
@model(gradients=False)
def hidream(d: Draw) -> Tiny:
    config = {
        **DOUBLE,
        "num_single_layers": 2,
        "patch_size": 2,
        "in_channels": 4,
        "caption_channels": [12, 10],
        "text_emb_dim": 6,
        "axes_dims_rope": AXES,
        "max_resolution": (8, 8),
        "llama_layers": [0, 1, 1, 0],
    }
    batched = {
        "hidden_states": d(4, 4, 4),
        "timesteps": d.time(1000),
        "encoder_hidden_states_t5": d(4, 12),
        "encoder_hidden_states_llama3": (d(5, 10), d(5, 10)),
        "pooled_embeds": d(6),
    }
    return d.tiny("HiDreamImageTransformer2DModel", config, batched)


JOYIMAGE: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": 12,
    "num_layers": 2,
    "rope_dim_list": AXES,
}


@model(dead=last_text("double_blocks.1"))
def joyimage(d: Draw) -> Tiny:
    batched = {"hidden_states": d(4, 1, 4, 4), "encoder_hidden_states": d(5, 12), "timestep": d.time(1000)}
    return d.tiny("JoyImageEditTransformer3DModel", JOYIMAGE, batched)


@model(dead=last_text("double_blocks.1"))
def joyimage_plus(d: Draw) -> Tiny:
    batched = {
        "hidden_states": d(6, 4, 1, 2, 2),
        "encoder_hidden_states": d(5, 12),
        "encoder_hidden_states_mask": torch.ones(BATCH, 5),
        "timestep": d.time(1000),
        "shape_list": [[(1, 2, 3)]] * BATCH,
    }
    return d.tiny("JoyImageEditPlusTransformer3DModel", JOYIMAGE, batched)


@model()
def nucleus(d: Draw) -> Tiny:
    config = {
        "num_attention_heads": 6,  # below a width of 48 the MLP would have none
        "attention_head_dim": 8,
        "num_layers": 3,
        "in_channels": 16,
        "out_channels": 4,
        "joint_attention_dim": 12,
        "axes_dims_rope": AXES,
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 2,
        "moe_intermediate_dim": 16,
        "capacity_factors": 1.0,
    }
    batched = {"hidden_states": d(6, 16), "encoder_hidden_states": d(5, 12), "timestep": d.time()}
    return d.tiny("NucleusMoEImageTransformer2DModel", config, batched, img_shapes=[(1, 2, 3)])
