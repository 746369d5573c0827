"""Models to measure on: the embedded one, and randomly initialised ones of real proportions, which need no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from calibri_lightning.backbones import SD3, Backbone
from calibri_lightning.backbones.loading import DType
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import build_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

_CLIP_WIDTHS = (768, 1280)
_T5_WIDTH = 4096
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class SD3Sizes:
    """Proportions of a released Stable Diffusion 3 transformer, heads 64 wide."""

    num_layers: int
    num_heads: int
    num_dual: int
    """The first so many blocks have dual attention."""


SIZES = {
    "sd3-medium": SD3Sizes(24, 24, 0),
    "sd3.5-medium": SD3Sizes(24, 24, 13),
    "sd3.5-large": SD3Sizes(38, 38, 0),
}
"""From the released configurations."""
MODELS = ("shapes", *SIZES)


def build(name: str, dtype: DType, device: torch.device, num_layers: int | None, resolution: int) -> Backbone:
    """Loads the embedded model, or builds one with random weights.

    Transformer and autoencoder of a random model have the real sizes, and the text its real length; the text encoders
    have real widths and two layers.

    Args:
        name: One of `MODELS`.
        dtype: Type of weights and activations.
        device: Where to build it.
        num_layers: Transformer blocks of a random model; those of the released one by default.
        resolution: Height and width of a random model's pictures, pixels; a multiple of 16.

    Returns:
        The backbone.

    Raises:
        UserError: If there is no model of that name, or the numbers do not fit.
    """
    if name == "shapes":
        if num_layers is not None:
            raise UserError(
                "--layers is for the randomly initialised models; shapes is trained as it is. Leave it out."
            )
        backbone = SD3("shapes", dtype=dtype)
        backbone.to(device)
        return backbone
    if name not in SIZES:
        raise UserError(f"--model is {name!r}; there are {', '.join(MODELS)}.")
    if resolution < 16 or resolution % 16 or (num_layers is not None and num_layers < 1):
        raise UserError(f"--resolution {resolution}, --layers {num_layers}: a multiple of 16, and at least 1.")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return _random_sd3(SIZES[name], getattr(torch, dtype), num_layers, resolution)


def _random_sd3(sizes: SD3Sizes, dtype: torch.dtype, num_layers: int | None, resolution: int) -> SD3:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    width, count = 64 * sizes.num_heads, num_layers or sizes.num_layers
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=count,
        attention_head_dim=64,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=sum(_CLIP_WIDTHS),
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(min(sizes.num_dual, count))),
        qk_norm="rms_norm",
    ).to(dtype)
    tokenizer = build_tokenizer(_CLIP_TOKENS)
    t5, t5_tokenizer = _t5()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder().to(dtype),
        text_encoder=_clip(_CLIP_WIDTHS[0], tokenizer).to(dtype),
        tokenizer=tokenizer,
        text_encoder_2=_clip(_CLIP_WIDTHS[1], tokenizer).to(dtype),
        tokenizer_2=build_tokenizer(_CLIP_TOKENS),
        text_encoder_3=t5.to(dtype),
        tokenizer_3=t5_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return SD3.of(pipe, resolution, resolution)


def _autoencoder() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def _clip(width: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            max_position_embeddings=_CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    config = T5Config(vocab_size=len(pieces), d_model=_T5_WIDTH, d_ff=64, d_kv=64, num_layers=2, num_heads=4)
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)
