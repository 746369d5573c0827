"""Trains the embedded `shapes` pipeline from nothing: `python -m calibri_lightning.shapes.train --out FOLDER`.

Two stages, both resumable and logged to `FOLDER/train.csv`: the autoencoder learns flat pictures, then the transformer
and both text encoders learn, together, to predict velocities v = noise − data of its latents (rectified flow, SD3 paper
eq. 13-14, logit-normal times eq. 19). Sigma is 1 at noise and 0 at data. The result is an ordinary diffusers folder.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibri_lightning.atomic import replacing
from calibri_lightning.backbones import repeated_tokens
from calibri_lightning.shapes.pictures import Pictures, draw_pictures
from calibri_lightning.shapes.pipeline import PipelineConfig, build_pipeline
from calibri_lightning.shapes.stage import Stage, TrainConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

TIME_MEAN, TIME_SPREAD = 0.6, 1.2
"""Mean and spread of the logit-normal times: more noise than the paper's (0, 1), where layout is decided."""
NUM_NULL_TOKENS = 256
"""Zero text tokens that the stock pipeline appends in place of the silent third encoder; one token stands for all of
them here, exactly (see `backbones.repeated_tokens`), so that training takes a third of the time."""
NULL_TOKENS_START, NULL_TOKENS_END = 0.15, 0.45
"""Shares of the steps between which their number grows, on a log scale, from 1 to `NUM_NULL_TOKENS`. With all of them
from the start, 84 % of the attention rests on nothing, its gradients vanish, and captions are never bound to places."""


def train_autoencoder(vae: AutoencoderKL, pictures: Pictures, config: TrainConfig) -> None:
    """Trains the autoencoder in place: absolute and squared error, and a light KL that keeps latents near N(0, 1).

    Args:
        vae: The autoencoder.
        pictures: Training pictures.
        config: Settings.
    """
    vae.train().to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(pictures.pixels)

    def loss(generator: torch.Generator, progress: float) -> Tensor:
        picked = torch.randint(len(pixels), (config.vae_batch_size,), generator=generator)
        x = to_vae_range(pixels[picked], config.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.abs().mean() + 2 * error.square().mean() + 1e-5 * posterior.kl().mean()

    Stage("autoencoder", nn.ModuleList([vae]), config, config.vae_lr, config.vae_steps).run(loss)
    vae.eval()


def prepare_latents(vae: AutoencoderKL, size: int, config: TrainConfig) -> tuple[Tensor, tuple[str, ...]]:
    """Draws the pictures, trains the autoencoder and encodes them; what a run before this one did is kept.

    Args:
        vae: The autoencoder; afterwards it is trained and whitens.
        size: Height and width of the pictures, pixels.
        config: Settings.

    Returns:
        Latents as of `encode_pictures`, and their captions.
    """
    path = config.out / "latents.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] == [config.num_pictures, config.seed, config.vae_steps]:
            vae.load_state_dict(state["vae"])
            vae.register_to_config(**state["whitening"])
            return state["latents"], tuple(state["captions"])
    pictures = draw_pictures(config.num_pictures, size, config.seed)
    train_autoencoder(vae, pictures, config)
    latents = encode_pictures(vae, pictures, config.device)
    state = {
        "settings": [config.num_pictures, config.seed, config.vae_steps],
        "vae": vae.state_dict(),
        "whitening": {name: float(vae.config[name]) for name in ("shift_factor", "scaling_factor")},
        "latents": latents,
        "captions": list(pictures.captions),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)
    return latents, pictures.captions


def num_null_tokens(progress: float) -> float:
    """How many null tokens the single one stands for; not always a whole number.

    Args:
        progress: Share of the steps that are done.

    Returns:
        1 at first, `NUM_NULL_TOKENS` at the end.
    """
    grown = (progress - NULL_TOKENS_START) / (NULL_TOKENS_END - NULL_TOKENS_START)
    return float(NUM_NULL_TOKENS ** min(max(grown, 0.0), 1.0))


def to_vae_range(pixels: Tensor, device: str) -> Tensor:
    """Turns uint8 pictures [B, H, W, 3] into float32 [B, 3, H, W] in -1..1, channels last in memory.

    Args:
        pixels: The pictures.
        device: Torch device.

    Returns:
        The autoencoder's input.
    """
    return pixels.to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures, device: str) -> Tensor:
    """Encodes all pictures and sets the autoencoder's `shift_factor` and `scaling_factor` to whiten them.

    Args:
        vae: The trained autoencoder; its config is changed.
        pictures: The pictures.
        device: Torch device.

    Returns:
        float32 latents [N, C, h, w] on the CPU, mean 0 and standard deviation 1 overall.
    """
    chunks = torch.from_numpy(pictures.pixels).split(256)
    latents = torch.cat([vae.encode(to_vae_range(chunk, device)).latent_dist.mean.cpu() for chunk in chunks])
    shift, scale = float(latents.mean()), 1 / float(latents.std())
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return latents.sub_(shift).mul_(scale).contiguous()


def train_transformer(
    pipe: StableDiffusion3Pipeline, latents: Tensor, captions: tuple[str, ...], config: TrainConfig
) -> None:
    """Trains transformer and text encoders in place on the rectified-flow loss.

    Args:
        pipe: The pipeline.
        latents: Whitened latents [N, C, h, w].
        captions: Their captions.
        config: Settings.
    """
    modules = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    # The silent T5 adds zeros; without it the pipeline adds the same zeros, and does not warn of its single token.
    silent = {"text_encoder_3": pipe.text_encoder_3, "tokenizer_3": pipe.tokenizer_3}
    pipe.register_modules(**dict.fromkeys(silent))
    repeated_tokens.install(pipe.transformer)
    if config.compile:
        for block in pipe.transformer.transformer_blocks:
            block.compile()  # in place: the names in checkpoints stay
    num_image_tokens = latents[0, 0].numel() // pipe.transformer.config.patch_size**2
    num_text_tokens = pipe.tokenizer_max_length + 1
    device = torch.device(config.device)

    def loss(generator: torch.Generator, progress: float) -> Tensor:
        picked = torch.randint(len(latents), (config.batch_size,), generator=generator)
        dropped = torch.rand(config.batch_size, generator=generator) < config.caption_dropout
        texts = ["" if drop else captions[index] for index, drop in zip(picked.tolist(), dropped.tolist(), strict=True)]
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, device=config.device, max_sequence_length=1
        )
        data = latents[picked]
        noise = torch.randn(data.shape, generator=generator)
        # Logit-normal times (eq. 19), stratified over the batch, which lowers the variance of the mean.
        uniform = (
            torch.arange(config.batch_size) + torch.rand(config.batch_size, generator=generator)
        ) / config.batch_size
        normal = TIME_MEAN + TIME_SPREAD * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
        sigma = normal.sigmoid().view(-1, 1, 1, 1)
        x = ((1 - sigma) * data + sigma * noise).to(config.device)  # eq. 13
        bias = repeated_tokens.key_bias(num_image_tokens, num_text_tokens, num_null_tokens(progress), device)
        velocity = pipe.transformer(
            x,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=1000 * sigma.flatten().to(x),
            joint_attention_kwargs={"key_bias": bias},
            return_dict=False,
        )[0]
        return functional.mse_loss(velocity, (noise - data).to(x))  # eq. 14

    Stage("transformer", modules, config, config.lr, config.steps).run(loss)
    modules.eval()
    pipe.register_modules(**silent)


def train(config: TrainConfig, sizes: PipelineConfig | None = None) -> Path:
    """Trains, or resumes, both stages and saves the pipeline, its two large parts in half precision.

    Args:
        config: Settings.
        sizes: Sizes of the pipeline, the shipped ones by default; its time shift comes from `config`.

    Returns:
        The folder of the finished pipeline.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    sizes = replace(sizes or PipelineConfig(), shift=config.shift)
    pipe = build_pipeline(sizes, config.seed).to(config.device)
    latents, captions = prepare_latents(pipe.vae, sizes.image_size, config)
    train_transformer(pipe, latents, captions, config)
    folder = config.out / "pipeline"
    # Only what diffusers loads, which it does in float32: transformers 5 loads the encoders as they are stored, and
    # plain `from_pretrained` would put half-precision encoders before a float32 transformer.
    pipe.to("cpu")
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder)
    return folder


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(TrainConfig):
        if field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
            continue
        kind = {"Path": Path, "int": int, "float": float, "str": str}[str(field.type)]
        required = field.name == "out"
        parser.add_argument(
            f"--{field.name}", type=kind, required=required, default=None if required else field.default
        )
    print(train(TrainConfig(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
