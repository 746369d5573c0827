"""Tiny untrained pipelines of many families, built from nothing: every part of the real class, no file, no network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

TEXT_WIDTH = 16
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Takes messages as text, and as lists of parts."""


@cache
def _pristine(build: Callable[..., DiffusionPipeline], options: tuple[tuple[str, Any], ...]) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build(**dict(options))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh(build: Callable[..., DiffusionPipeline], **options: Any) -> DiffusionPipeline:
    """An untouched copy of a pipeline, always with the same weights."""
    return copy.deepcopy(_pristine(build, tuple(sorted(options.items()))))


def scheduler(dynamic: bool = True) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)


def byte_tokenizer() -> Any:
    """A Qwen tokenizer to which each byte is a token."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.chat_template = CHAT
    return tokenizer


def clip(max_tokens: int = 12) -> tuple[Any, Any]:
    """A CLIP tokenizer to which each letter is a token, and its encoder."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_tokens)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=10.0,
    )
    return tokenizer, CLIPTextModel(config)


def t5(umt5: bool = False) -> tuple[Any, Any]:
    """A T5 tokenizer to which each letter is a token, and its encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz!,")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "initializer_factor": 10.0}
    if umt5:
        return tokenizer, UMT5EncoderModel(UMT5Config(vocab_size=len(pieces), **sizes))
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes))


def _language_sizes(num_layers: int) -> dict[str, Any]:
    """Sizes that the configurations of most language models share."""
    return {
        "vocab_size": 257,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": 256,
    }


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name not in names}


def kl_autoencoder(num_levels: int = 2) -> Any:
    """An autoencoder of 4 latent channels and spatial factor 2 ** (num_levels - 1)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=(8,) * num_levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.7,
        shift_factor=0.2,
    )


def qwen_autoencoder() -> Any:
    """Qwen-Image's autoencoder, 4 latent channels and spatial factor 2."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 2.0, 1.0],
    )


def flux1(guidance_embeds: bool = True) -> DiffusionPipeline:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(), t5()
    return FluxPipeline(scheduler(), kl_autoencoder(), encoder, tokenizer, encoder_2, tokenizer_2, transformer)


def qwen_image() -> DiffusionPipeline:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**_without(_language_sizes(2), "head_dim"), "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": TEXT_WIDTH}
    ids = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=scheduler(),
        vae=qwen_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        ),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )


def _flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {"scheduler": scheduler(), "vae": vae, "transformer": transformer, "tokenizer": byte_tokenizer()}


def flux2_dev() -> DiffusionPipeline:
    """With a text tokenizer in the place of Pixtral's processor, whose pictures no test needs."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Mistral3Config(text_config=MistralConfig(**_language_sizes(30)), vision_config=vision)
    return Flux2Pipeline(text_encoder=Mistral3ForConditionalGeneration(config), **_flux2_parts(True))


def flux2_klein(distilled: bool = False) -> DiffusionPipeline:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(Qwen3Config(**_language_sizes(27)))
    return Flux2KleinPipeline(text_encoder=encoder, is_distilled=distilled, **_flux2_parts(False))


def z_image() -> DiffusionPipeline:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    encoder = Qwen3Model(Qwen3Config(**_language_sizes(2)))
    return ZImagePipeline(scheduler(), kl_autoencoder(), encoder, byte_tokenizer(), transformer)


def lumina2() -> DiffusionPipeline:
    """Its pipeline takes the autoencoder's spatial factor for granted, which is 8."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzAPSY<>-.!,"))
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate([*specials, *letters])}, merges=[])
    sizes = _without(_language_sizes(3), "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), query_pre_attn_scalar=8, **sizes))
    transformer = Lumina2Transformer2DModel(
        sample_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    )
    return Lumina2Pipeline(transformer, scheduler(), kl_autoencoder(4), encoder, tokenizer)


def krea2(distilled: bool = False) -> DiffusionPipeline:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    text = {**_without(_language_sizes(2), "bos_token_id", "eos_token_id"), "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
    }
    ids = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(
        scheduler=scheduler(),
        vae=qwen_autoencoder(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
        is_distilled=distilled,
    )


def wan() -> DiffusionPipeline:
    """Text to video, spatial and temporal factor 2."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    tokenizer, encoder = t5(umt5=True)
    return WanPipeline(tokenizer, encoder, vae, scheduler(dynamic=False), transformer)


def ltx() -> DiffusionPipeline:
    """Text to video; prompt and negative prompt are rows of one forward."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=TEXT_WIDTH,
    )
    tokenizer, encoder = t5()
    return LTXPipeline(scheduler(), vae, encoder, tokenizer, transformer)
