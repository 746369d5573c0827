"""Models that run picture and text as one sequence."""

from __future__ import annotations

from typing import Any

import torch

from site_models.base import AXES, BATCH, HEADS, Draw, Tiny, model


@model()
def qwen_image_21(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "num_layers": 2,
        "in_channels": 8,
        "out_channels": 8,
        "context_in_dim": 12,
        "mlp_ratio": 2,
        "axes_dims_rope": AXES,
    }
    slots = torch.tensor([[False] * 5 + [True] * 2]).repeat(BATCH, 1)  # five of text, two of 2 x 2 latent tokens
    batched = {
        "hidden_states": d(8, 8),
        "encoder_hidden_states": d(5, 12),
        "timestep": d.time(),
        "img_mask": slots,
        "img_shapes": [[(1, 2, 4)]] * BATCH,
    }
    return d.tiny("QwenImage21Transformer2DModel", config, batched)


@model()
def z_image(d: Draw) -> Tiny:
    config = {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": AXES,
        "axes_lens": (128, 32, 32),
    }
    batched = {"x": list(d(4, 1, 4, 4)), "cap_feats": list(d(5, 12)), "t": d.time()}
    return d.tiny("ZImageTransformer2DModel", config, batched)


@model()
def ideogram4(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "intermediate_size": 32,
        "adaln_dim": 8,
        "llm_features_dim": 12,
        "mrope_section": (2, 1, 1),
    }
    positions = torch.arange(11)[None, :, None].repeat(BATCH, 1, 3)
    batched = {
        "hidden_states": d(11, 4),
        "timestep": d.time(),
        "encoder_hidden_states": d(11, 12),
        "position_ids": positions,
        "segment_ids": torch.zeros(BATCH, 11),
        "indicator": torch.tensor([[3] * 5 + [2] * 6]).repeat(BATCH, 1),  # text, then picture
    }
    return d.tiny("Ideogram4Transformer2DModel", config, batched)


@model()
def fibo2(d: Draw) -> Tiny:
    config = {
        "in_channels": 4,
        "dim": 24,  # below, the MLP would have a width of 0
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 12,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 8,
        "axes_dims": (4, 4, 4),
        "axes_lens": (64, 16, 16),
    }
    batched = {"hidden_states": d(4, 4, 4), "timestep": d.time(), "encoder_hidden_states": d(2, 5, 12)}
    return d.tiny("BriaFibo2Transformer2DModel", config, batched)


LUMINA: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 8,
}


@model()
def lumina2(d: Draw) -> Tiny:
    rope = {"axes_dim_rope": AXES, "axes_lens": (64, 32, 32)}
    batched = {
        "hidden_states": d(4, 8, 8),
        "timestep": d.time(),
        "encoder_hidden_states": d(5, 12),
        "encoder_attention_mask": torch.ones(BATCH, 5, dtype=torch.bool),
    }
    config = {**LUMINA, **rope, "num_refiner_layers": 1, "cap_feat_dim": 12}
    return d.tiny("Lumina2Transformer2DModel", config, batched)


@model()
def lumina_next(d: Draw) -> Tiny:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    batched = {
        "hidden_states": d(4, 8, 8),
        "timestep": d.time(),
        "encoder_hidden_states": d(5, 12),
        "encoder_mask": torch.ones(BATCH, 5),
    }
    rope = get_2d_rotary_pos_embed_lumina(8, 16, 16)
    config = {**LUMINA, "cross_attention_dim": 12}
    return d.tiny("LuminaNextDiT2DModel", config, batched, image_rotary_emb=rope, cross_attention_kwargs={})


@model()
def krea2(d: Draw) -> Tiny:
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 12,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": AXES,
    }
    batched = {"hidden_states": d(6, 4), "encoder_hidden_states": d(5, 3, 12), "timestep": d.time()}
    return d.tiny("Krea2Transformer2DModel", config, batched, position_ids=torch.arange(11)[:, None].repeat(1, 3))


@model()
def ernie_image(d: Draw) -> Tiny:
    config = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_in_dim": 12,
        "rope_axes_dim": AXES,
    }
    batched = {
        "hidden_states": d(4, 2, 3),
        "timestep": d.time(1000),
        "text_bth": d(5, 12),
        "text_lens": torch.full((BATCH,), 5),
    }
    return d.tiny("ErnieImageTransformer2DModel", config, batched)


@model()
def omnigen(d: Draw) -> Tiny:
    config = {
        "in_channels": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 32,
        "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        "pos_embed_max_size": 8,
        "time_step_dim": 16,
    }
    batched = {
        "hidden_states": d(4, 4, 4),
        "timestep": d.time(),
        "input_ids": d.integers(32, 5),
        "attention_mask": torch.ones(BATCH, 10, 10),
        "position_ids": torch.arange(10)[None].repeat(BATCH, 1),
    }
    return d.tiny("OmniGenTransformer2DModel", config, batched, input_img_latents=[], input_image_sizes={})
