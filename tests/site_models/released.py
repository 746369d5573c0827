"""Full sizes: the released models, and class defaults where no released configuration was at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from calibri_lightning.calibration import Granularity, SiteOptions, build_layout, find_sites

Counts = tuple[int, int, int]
"""Scales with granularity block, layer and gate."""
GRANULARITIES: tuple[Granularity, ...] = ("block", "layer", "gate")


@dataclass(frozen=True)
class FullSize:
    """A full-size model and how many scales it has."""

    name: str
    model: str
    """Class in diffusers."""
    counts: Counts
    config: dict[str, Any] = field(default_factory=dict)
    billions: float | None = None
    """Parameters of the released transformer, in 10^9: they tell it from one of my making."""
    optional: Counts | None = None
    """Counts with every option that the model has a use for."""

    def build(self) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            transformer: nn.Module = getattr(diffusers, self.model)(**self.config)
        return transformer


def count(transformer: nn.Module, options: SiteOptions) -> Counts:
    sites = find_sites(transformer, options)
    block, layer, gate = (len(build_layout(sites, g, "single").scale_names) for g in GRANULARITIES)
    return block, layer, gate


def _sd3(layers: int, dual: int = 0, **more: Any) -> dict[str, Any]:
    width = {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": 64 * layers}
    return {**width, "dual_attention_layers": tuple(range(dual)), **more}


def _flux2(double: int, single: int, heads: int, text: int) -> dict[str, Any]:
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "guidance_embeds": False,
    }


HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": list(range(48)),
}
COGVIEW4 = {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}
COGVIDEOX_5B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
WAN_SMALL = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
PIXART = {"caption_channels": 4096, "sample_size": 128, "use_additional_conditions": False}
HUNYUAN_DIT = {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637}
OMNIGEN = {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}
FRESH_SD35 = {"qk_norm": "rms_norm", "pos_embed_max_size": 384}

FULL_SIZES = (
    FullSize("SD3-medium", "SD3Transformer2DModel", (24, 48, 94), _sd3(24), 2.03),
    FullSize("SD3.5-medium", "SD3Transformer2DModel", (24, 61, 107), _sd3(24, 13, **FRESH_SD35), 2.24),
    FullSize("SD3.5-large", "SD3Transformer2DModel", (38, 76, 150), _sd3(38, **FRESH_SD35), 8.06),
    FullSize("FLUX.1-dev", "FluxTransformer2DModel", (57, 76, 114), {"guidance_embeds": True}, 11.9, (57, 114, 152)),
    FullSize("FLUX.2-dev", "Flux2Transformer2DModel", (56, 64, 80), {}, 32.2, (56, 112, 128)),
    FullSize("FLUX.2-klein-4B", "Flux2Transformer2DModel", (25, 30, 40), _flux2(5, 20, 24, 7680), 3.9, (25, 50, 60)),
    FullSize("FLUX.2-klein-9B", "Flux2Transformer2DModel", (32, 40, 56), _flux2(8, 24, 32, 12288), 9.1, (32, 64, 80)),
    FullSize("FLUX.3 (class default)", "Flux3Transformer2DModel", (43, 86, 86)),
    FullSize("Chroma", "ChromaTransformer2DModel", (57, 76, 114), {}, 8.9, (57, 114, 152)),
    FullSize("Bria 3 (class default)", "BriaTransformer2DModel", (57, 76, 114), optional=(57, 114, 152)),
    FullSize("FIBO (class default)", "BriaFiboTransformer2DModel", (57, 76, 114), optional=(57, 114, 152)),
    FullSize("LongCat-Image (class default)", "LongCatImageTransformer2DModel", (57, 76, 114), optional=(57, 114, 152)),
    FullSize("Ovis-Image (class default)", "OvisImageTransformer2DModel", (33, 39, 51), optional=(33, 66, 78)),
    FullSize("HunyuanImage-2.1", "HunyuanImageTransformer2DModel", (62, 84, 124), {}, 17.4, (62, 124, 164)),
    FullSize("HunyuanVideo", "HunyuanVideoTransformer3DModel", (62, 84, 124), {}, 12.8, (62, 124, 164)),
    FullSize("HunyuanVideo-1.5", "HunyuanVideo15Transformer3DModel", (56, 112, 220), {}, 8.3),
    FullSize("Qwen-Image", "QwenImageTransformer2DModel", (60, 120, 240), {}, 20.4),
    FullSize("Qwen-Image-2.1 (class default)", "QwenImage21Transformer2DModel", (32, 64, 64)),
    FullSize("Z-Image", "ZImageTransformer2DModel", (34, 68, 68), {}, 6.15),
    FullSize("Ideogram 4 (class default)", "Ideogram4Transformer2DModel", (34, 68, 68)),
    FullSize("FIBO 2 (class default)", "BriaFibo2Transformer2DModel", (46, 97, 97)),
    FullSize("Lumina-Image-2.0", "Lumina2Transformer2DModel", (30, 60, 60), {"cap_feat_dim": 2304}, 2.61),
    FullSize("Lumina-Next-SFT", "LuminaNextDiT2DModel", (24, 48, 48), {"num_layers": 24, "num_kv_heads": 8}),
    FullSize("HiDream-I1", "HiDreamImageTransformer2DModel", (48, 96, 128), HIDREAM, 17.1),
    FullSize("CogView3-Plus-3B", "CogView3PlusTransformer2DModel", (30, 60, 120), {}, 2.85),
    FullSize("CogView4-6B", "CogView4Transformer2DModel", (28, 56, 112), COGVIEW4, 6.37),
    FullSize("GLM-Image (class default)", "GlmImageTransformer2DModel", (30, 60, 120)),
    FullSize("CogVideoX-5B", "CogVideoXTransformer3DModel", (42, 84, 168), COGVIDEOX_5B, 5.57),
    FullSize("ConsisID (class default)", "ConsisIDTransformer3DModel", (30, 60, 120)),
    FullSize("Mochi-1", "MochiTransformer3DModel", (48, 96, 190), {}, 10.03),
    FullSize("Sana-1.6B", "SanaTransformer2DModel", (20, 40, 40), {}, 1.6, (20, 60, 60)),
    FullSize("SANA-Video (class default)", "SanaVideoTransformer3DModel", (20, 40, 40), optional=(20, 60, 60)),
    FullSize("PixArt-Sigma", "PixArtTransformer2DModel", (28, 56, 56), PIXART, 0.61, (28, 84, 84)),
    FullSize("DiT-XL-2", "DiTTransformer2DModel", (28, 56, 56)),
    FullSize("LTX-Video-2B", "LTXVideoTransformer3DModel", (28, 56, 56), {}, 1.92, (28, 84, 84)),
    FullSize("Wan2.1-14B", "WanTransformer3DModel", (40, 80, 80), {}, 14.3, (40, 120, 120)),
    FullSize("Wan2.1-1.3B", "WanTransformer3DModel", (30, 60, 60), WAN_SMALL, 1.42, (30, 90, 90)),
    FullSize("SkyReels-V2 (class default)", "SkyReelsV2Transformer3DModel", (32, 64, 64), optional=(32, 96, 96)),
    FullSize("Krea 2 (class default)", "Krea2Transformer2DModel", (28, 56, 56)),
    FullSize("ERNIE-Image (class default)", "ErnieImageTransformer2DModel", (24, 48, 48)),
    FullSize("AuraFlow", "AuraFlowTransformer2DModel", (36, 72, 80), {}, 6.85),
    FullSize("Kandinsky 5 (class default)", "Kandinsky5Transformer3DModel", (34, 100, 100)),
    FullSize("PRX (class default)", "PRXTransformer2DModel", (16, 32, 32)),
    FullSize("JoyImage-Edit (class default)", "JoyImageEditTransformer3DModel", (20, 40, 80)),
    FullSize("JoyImage-Edit-Plus (class default)", "JoyImageEditPlusTransformer3DModel", (20, 40, 80)),
    FullSize("Nucleus-Image (class default)", "NucleusMoEImageTransformer2DModel", (24, 48, 48)),
    FullSize("HunyuanDiT-v1.2", "HunyuanDiT2DModel", (40, 120, 120), HUNYUAN_DIT, 1.5),
    FullSize("OmniGen-v1", "OmniGenTransformer2DModel", (32, 64, 64), OMNIGEN, 3.8),
)
