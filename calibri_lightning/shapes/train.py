"""Trains the embedded `shapes` pipeline from nothing: `python -m calibri_lightning.shapes.train --out FOLDER`.

Two stages, both resumable and logged to `FOLDER/train.csv`: the autoencoder learns flat pictures, then the transformer
and both text encoders learn, together, to predict velocities v = noise − data of its latents (rectified flow, SD3 paper
eq. 13-14, logit-normal times eq. 19). Sigma is 1 at noise and 0 at data. The result is an ordinary diffusers folder.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibri_lightning.backbones import repeated_tokens
from calibri_lightning.shapes.captions import Scene, split_scenes
from calibri_lightning.shapes.pipeline import PipelineConfig, build_pipeline
from calibri_lightning.shapes.render import place, render

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

NUM_NULL_TOKENS = 256
"""Zero text tokens that the stock pipeline appends in place of the absent third encoder; one token stands for all of
them here, exactly (see `backbones.repeated_tokens`), so that training takes a third of the time."""
KIND_SHARES: dict[str, float] = {"single": 0.10, "count": 0.30, "relation": 0.60}
"""Share of each kind of scene among the training pictures."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each field is a command-line flag."""

    out: Path
    """Folder of checkpoints, log and the finished pipeline."""
    num_pictures: int = 48_000
    """Pictures drawn once and reused."""
    vae_steps: int = 1_500
    """Optimiser steps of the autoencoder."""
    steps: int = 3_400
    """Optimiser steps of the transformer."""
    vae_batch_size: int = 16
    """Pictures a step of the autoencoder."""
    batch_size: int = 48
    """Pictures a step of the transformer."""
    vae_lr: float = 2e-3
    """Peak learning rate of the autoencoder (Adam)."""
    lr: float = 1.5e-3
    """Peak learning rate of transformer and text encoders (AdamW)."""
    warmup: int = 300
    """Steps of linear warm-up; afterwards the rate falls along a cosine to zero."""
    ema: float = 0.999
    """Decay of the weight average that is saved."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    shift: float = 1.0
    """Time shift of the shipped schedule."""
    save_every: int = 250
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of weights, pictures and noise."""
    device: str = "cpu"
    """Torch device."""


@dataclass(frozen=True)
class Pictures:
    """The training set: pictures and what they show."""

    pixels: np.ndarray
    """uint8 [N, size, size, 3]."""
    captions: tuple[str, ...]
    """N captions."""


def draw_pictures(count: int, size: int, seed: int) -> Pictures:
    """Draws training pictures; picture i depends on (seed, i) alone.

    Args:
        count: How many.
        size: Height and width, pixels.
        seed: Seed.

    Returns:
        The pictures.
    """
    by_kind: dict[str, list[Scene]] = {kind: [] for kind in KIND_SHARES}
    for scene in split_scenes("train"):
        by_kind[scene.kind].append(scene)
    pixels = np.empty((count, size, size, 3), np.uint8)
    captions = []
    for index in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        scenes = by_kind[str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))]
        scene = scenes[int(rng.integers(len(scenes)))]
        pixels[index] = np.rint(render(place(scene, size, rng), size) * 255)
        captions.append(scene.caption)
    return Pictures(pixels, tuple(captions))


def cosine_rate(step: int, total: int, warmup: int) -> float:
    """Learning-rate factor in 0..1: linear warm-up, then a cosine to zero.

    Args:
        step: Steps done.
        total: Steps in all.
        warmup: Steps of warm-up.

    Returns:
        The factor.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))


class Stage:
    """A resumable training stage: optimiser, weight average, log and checkpoints around one loss function."""

    def __init__(self, name: str, modules: nn.ModuleList, config: TrainConfig, lr: float, total: int) -> None:
        """Prepares a stage and resumes it where a checkpoint is found.

        Args:
            name: Names the checkpoint and the log rows.
            modules: What is trained.
            config: The run's settings.
            lr: Peak learning rate.
            total: Optimiser steps.
        """
        self.name, self.modules, self.config, self.lr, self.total = name, modules, config, lr, total
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.average = [p.detach().clone() for p in modules.parameters()]
        self.step = 0
        self.path = config.out / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=config.device)
            modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = [tensor.detach() for tensor in state["average"]], state["step"]

    def run(self, loss: Callable[[torch.Generator], Tensor]) -> None:
        """Trains to the end, then loads the average weights into the modules.

        Args:
            loss: Draws a batch with the given generator (seeded by the step, so a resumed run draws the same) and
                returns its mean loss.
        """
        started, mean = time.monotonic(), 0.0
        while self.step < self.total:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * cosine_rate(self.step, self.total, self.config.warmup)
            value = loss(torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step))
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():  # or the average would hold the graph of every step so far
                torch._foreach_lerp_(self.average, list(self.modules.parameters()), 1 - decay)
            mean += float(value.detach()) / 100
            if self.step % 100 == 0:
                self._log(mean, time.monotonic() - started)
                mean = 0.0
            if self.step % self.config.save_every == 0 or self.step == self.total:
                self._save()
        with torch.no_grad():
            for parameter, average in zip(self.modules.parameters(), self.average, strict=True):
                parameter.copy_(average)

    def _log(self, loss: float, seconds: float) -> None:
        print(f"{self.name} step {self.step}/{self.total} loss {loss:.4f} {seconds:.0f} s", flush=True)
        with (self.config.out / "train.csv").open("a", newline="") as file:
            csv.writer(file).writerow([self.name, self.step, f"{loss:.6f}", f"{seconds:.1f}"])

    def _save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)


def train_autoencoder(vae: AutoencoderKL, pictures: Pictures, config: TrainConfig) -> None:
    """Trains the autoencoder in place: absolute and squared error, and a light KL that keeps latents near N(0, 1).

    Args:
        vae: The autoencoder.
        pictures: Training pictures.
        config: Settings.
    """
    vae.train().to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(pictures.pixels)

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(pixels), (config.vae_batch_size,), generator=generator)
        x = to_vae_range(pixels[picked], config.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        return error.abs().mean() + 2 * error.square().mean() + 1e-5 * posterior.kl().mean()

    Stage("autoencoder", nn.ModuleList([vae]), config, config.vae_lr, config.vae_steps).run(loss)
    vae.eval()


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
    num_image_tokens = latents[0, 0].numel() // pipe.transformer.config.patch_size**2
    num_text_tokens = pipe.tokenizer_max_length + 1
    bias = repeated_tokens.key_bias(num_image_tokens, num_text_tokens, NUM_NULL_TOKENS, torch.device(config.device))

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(latents), (config.batch_size,), generator=generator)
        dropped = torch.rand(config.batch_size, generator=generator) < config.caption_dropout
        texts = ["" if drop else captions[index] for index, drop in zip(picked.tolist(), dropped.tolist(), strict=True)]
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, device=config.device, max_sequence_length=1
        )
        data = latents[picked]
        noise = torch.randn(data.shape, generator=generator)
        # Logit-normal times (eq. 19, m = 0, s = 1), stratified over the batch, which lowers the variance of the mean.
        uniform = (
            torch.arange(config.batch_size) + torch.rand(config.batch_size, generator=generator)
        ) / config.batch_size
        sigma = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)).sigmoid().view(-1, 1, 1, 1)
        x = ((1 - sigma) * data + sigma * noise).to(config.device)  # eq. 13
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
    pictures = draw_pictures(config.num_pictures, sizes.image_size, config.seed)
    train_autoencoder(pipe.vae, pictures, config)
    latents = encode_pictures(pipe.vae, pictures, config.device)
    train_transformer(pipe, latents, pictures.captions, config)
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
        kind = {"Path": Path, "int": int, "float": float, "str": str}[str(field.type)]
        required = field.name == "out"
        parser.add_argument(
            f"--{field.name}", type=kind, required=required, default=None if required else field.default
        )
    print(train(TrainConfig(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
