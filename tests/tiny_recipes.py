"""The benchmark's recipes of random models, with everything but the class made tiny."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.bench.random_models import RandomModel

WIDTH = 16
_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_ROPE = {**_HEADS, "axes_dims_rope": (4, 6, 6)}
_KREA = {
    "text_hidden_dim": WIDTH,
    "num_text_layers": 2,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 32,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "timestep_embed_dim": 16,
}
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8,) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.7,
    "shift_factor": 0.2,
}
_FLUX2_VAE = {key: value for key, value in _KL.items() if "quant" not in key and "factor" not in key}
_QWEN_VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 2.0, 1.0],
}

_SD3 = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 4,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
_FLUX1 = {**_ROPE, "in_channels": 16, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
_FLUX2 = {
    **_HEADS,
    "in_channels": 16,
    "joint_attention_dim": WIDTH,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
_Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": WIDTH,
    "axes_dims": [4, 6, 6],
    "axes_lens": [1024, 16, 16],
}
_LUMINA2 = {
    "sample_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (300, 16, 16),
    "cap_feat_dim": WIDTH,
}


def _tiny(
    name: str, config: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, tuple[int, ...]]
) -> RandomModel:
    model = RANDOM_MODELS[name]
    guided = {"guidance_embeds": model.config["guidance_embeds"]} if "guidance_embeds" in model.config else {}
    return replace(model, config={**config, **guided}, autoencoder_config=vae, text_shapes=text)


_TOKENS = {"prompt": (12, WIDTH)}
TINY_RECIPES = {
    "sd3.5-medium": _tiny("sd3.5-medium", _SD3, _KL, {"prompt": (12, WIDTH), "pooled": (WIDTH,)}),
    "flux.1-dev": _tiny("flux.1-dev", _FLUX1, _KL, {"prompt": (12, WIDTH), "pooled": (WIDTH,)}),
    "flux.2-dev": _tiny("flux.2-dev", _FLUX2, _FLUX2_VAE, _TOKENS),
    "flux.2-klein-4b": _tiny("flux.2-klein-4b", _FLUX2, _FLUX2_VAE, _TOKENS),
    "qwen-image": _tiny(
        "qwen-image", {**_ROPE, "in_channels": 16, "out_channels": 4, "joint_attention_dim": WIDTH}, _QWEN_VAE, _TOKENS
    ),
    "z-image": _tiny("z-image", _Z_IMAGE, _KL, _TOKENS),
    "lumina-image-2": _tiny("lumina-image-2", _LUMINA2, _KL, _TOKENS),
    "krea-2": _tiny("krea-2", {**_ROPE, **_KREA, "in_channels": 16}, _QWEN_VAE, {"prompt": (12, 2, WIDTH)}),
}
