"""Builds the `shapes` pipeline: Stable Diffusion 3 in miniature, every part of the real class.

Two CLIP text encoders, an `SD3Transformer2DModel` whose first blocks have dual attention and whose last block is
`context_pre_only` (as in SD3.5-medium), an `AutoencoderKL` and a flow-matching Euler scheduler. The third (T5) encoder
is silent: its last normalisation multiplies by zero, so that it adds the zeros which the stock pipeline adds for a T5
that was left out. It is there because plain `from_pretrained` insists on all parts (diffusers 0.42). The tokenizers
are BPEs trained on the caption grammar: "triangle" is one token, and other text still tokenises, letter by letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from calibri_lightning.shapes.captions import VOCABULARY

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer


@dataclass(frozen=True)
class PipelineConfig:
    """Sizes of a `shapes` pipeline."""

    image_size: int = 48
    """Height and width of a picture, pixels; a multiple of 8."""
    num_layers: int = 8
    """Transformer blocks."""
    num_heads: int = 3
    """Attention heads, each 32 wide; the transformer's width is 32 times this."""
    dual_attention_layers: tuple[int, ...] = (0, 1, 2, 3)
    """Blocks with a second, image-only attention."""
    latent_channels: int = 8
    """Channels of the autoencoder's latents (spatial factor 4)."""
    vae_channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the autoencoder's three resolutions."""
    text_width: int = 64
    """Width of each text encoder."""
    text_layers: tuple[int, int] = (3, 2)
    """Layers of the two text encoders."""
    max_tokens: int = 12
    """Tokens a caption is padded to, begin and end marks included."""
    shift: float = 1.0
    """Time shift of the flow-matching schedule (SD3 paper, eq. 23)."""


TINY = PipelineConfig(
    image_size=16,
    num_layers=3,
    num_heads=1,
    dual_attention_layers=(0,),
    vae_channels=(8, 8, 8),
    text_width=16,
    text_layers=(2, 2),
)
"""A pipeline that builds and samples in well under a second, for tests."""


def build_pipeline(config: PipelineConfig, seed: int = 0) -> StableDiffusion3Pipeline:
    """Builds an untrained pipeline, deterministically and without touching the global random state.

    Args:
        config: The sizes.
        seed: Seed of the weights.

    Returns:
        A stock `StableDiffusion3Pipeline` in float32 and evaluation mode.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=config.vae_channels,
            layers_per_block=1,
            latent_channels=config.latent_channels,
            norm_num_groups=min(8, *config.vae_channels),
            sample_size=config.image_size,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        tokenizer = build_tokenizer(config.max_tokens)
        encoders = [_text_encoder(config, tokenizer, layers) for layers in config.text_layers]
        transformer = SD3Transformer2DModel(
            sample_size=config.image_size // 4,
            patch_size=2,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            num_layers=config.num_layers,
            attention_head_dim=32,
            num_attention_heads=config.num_heads,
            joint_attention_dim=2 * config.text_width,
            caption_projection_dim=32 * config.num_heads,
            pooled_projection_dim=2 * config.text_width,
            pos_embed_max_size=config.image_size // 8,
            dual_attention_layers=config.dual_attention_layers,
            qk_norm="rms_norm",
        )
        silent_encoder, silent_tokenizer = _silent_t5(2 * config.text_width)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=build_tokenizer(config.max_tokens),
        text_encoder_3=silent_encoder,
        tokenizer_3=silent_tokenizer,
    )
    # Constructed encoders start in train mode; a pipeline is for inference.
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tokenizer(max_tokens: int) -> CLIPTokenizer:
    """Builds a CLIP tokenizer for which each word of the caption grammar is one token.

    Args:
        max_tokens: Padded length, begin and end marks included.

    Returns:
        The tokenizer; text outside the grammar is split into letters.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = bpe_merges(VOCABULARY)
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def bpe_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Finds byte-pair merges after which each word is one token (Sennrich et al. 2016, algorithm 1).

    The `tokenizers` trainer breaks ties in hash order, which differs from process to process: a resumed training would
    scramble the token ids. Here ties go to the alphabetically first pair.

    Args:
        words: The words, each counted once.

    Returns:
        The merges, in order.
    """
    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(part) > 1 for part in parts.values()):
        counts = Counter(pair for part in parts.values() for pair in pairwise(part))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        parts = {word: _merge(part, best) for word, part in parts.items()}
    return merges


def _merge(part: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(part):
        width = 2 if tuple(part[position : position + 2]) == pair else 1
        merged.append("".join(part[position : position + width]))
        position += width
    return merged


def _silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    sizes = {"d_model": width, "d_ff": 8, "d_kv": 8, "num_layers": 1, "num_heads": 1}
    encoder = T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes))
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)


def _text_encoder(config: PipelineConfig, tokenizer: CLIPTokenizer, num_layers: int) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=2 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=num_layers,
            num_attention_heads=config.text_width // 16,
            max_position_embeddings=config.max_tokens,
            # The real ids: the default eos of 2 would select transformers' legacy pooling.
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
