"""The families of native backbones on tiny pipelines, and how their stock pipelines are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from calibri_lightning.backbones import FLUX1, FLUX2, Krea2, Lumina2, QwenImage, ZImage
from calibri_lightning.backbones.native import Native

# Of different length, so that a batch pads the shorter one.
PROMPTS = ["a red circle", "two green squares below a blue triangle", "q"]
NEGATIVES = ["", "blurry", "a red circle beside a green one"]
SEEDS = [3, 2**62 + 5, 4]


@dataclass(frozen=True)
class Case:
    """A family, and how its stock pipeline is called."""

    backbone: type[Native]
    build: Callable[..., DiffusionPipeline]
    multiple: int
    size: tuple[int, int]
    largest: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, float] = field(default_factory=dict)
    guidance: str = ""
    """Argument of the stock call that turns classifier-free guidance on; none where the model has none."""
    takes_negative: bool = True
    latents: Callable[[Native, Tensor], Tensor] = lambda backbone, x: x
    """From the backbone's latents to those that the stock call returns."""

    def pipe(self) -> DiffusionPipeline:
        return tiny.fresh(self.build, **self.options)

    def make(self) -> Native:
        return self.backbone.of(self.pipe(), *self.size)

    def stock(self, output_type: str, guidance: float | None = None, rows: slice = slice(None)) -> Tensor:
        """The stock call on an untouched pipeline."""
        return self.call(self.pipe(), output_type, guidance, rows)

    def call(
        self,
        pipe: DiffusionPipeline,
        output_type: str = "latent",
        guidance: float | None = None,
        rows: slice = slice(None),
        num_steps: int = 3,
    ) -> Tensor:
        """The stock call, which draws the noise itself."""
        arguments: dict[str, Any] = dict(self.unguided)
        if guidance is not None:
            arguments[self.guidance] = guidance
            if self.takes_negative:
                arguments["negative_prompt"] = NEGATIVES[rows]
        return pipe(
            prompt=PROMPTS[rows],
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=num_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[rows]],
            output_type=output_type,
            **arguments,
        ).images


def unpacked_by_the_pipeline(backbone: Native, x: Tensor) -> Tensor:
    """FLUX.1, Qwen-Image: the stock pipeline packs with its own code."""
    pipe, (height, width) = backbone.pipeline, x.shape[-2:]
    return pipe._pack_latents(x, len(x), x.shape[1], height, width)


def decoded_statistics(backbone: Native, x: Tensor) -> Tensor:
    """FLUX.2-klein returns latents as its autoencoder takes them."""
    vae = backbone.pipeline.vae
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return backbone.pipeline._unpatchify_latents(x * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1))


CASES = {
    "flux1-dev": Case(FLUX1, tiny.flux1, 4, (8, 12), guidance="true_cfg_scale", latents=unpacked_by_the_pipeline),
    "flux1-schnell": Case(
        FLUX1, tiny.flux1, 4, (8, 4), options={"guidance_embeds": False}, latents=unpacked_by_the_pipeline
    ),
    "flux2-dev": Case(FLUX2, tiny.flux2_dev, 4, (8, 12), latents=lambda _, x: x.flatten(2).transpose(1, 2)),
    "flux2-klein": Case(
        FLUX2,
        tiny.flux2_klein,
        4,
        (8, 12),
        unguided={"guidance_scale": 1.0},
        guidance="guidance_scale",
        takes_negative=False,
        latents=decoded_statistics,
    ),
    "qwen-image": Case(
        QwenImage,
        tiny.qwen_image,
        4,
        (8, 12),
        unguided={"true_cfg_scale": 1.0},
        guidance="true_cfg_scale",
        latents=unpacked_by_the_pipeline,
    ),
    "z-image": Case(ZImage, tiny.z_image, 4, (8, 12), 64, unguided={"guidance_scale": 0.0}, guidance="guidance_scale"),
    "lumina2": Case(
        Lumina2, tiny.lumina2, 16, (32, 48), 256, unguided={"guidance_scale": 1.0}, guidance="guidance_scale"
    ),
    "krea2": Case(
        Krea2,
        tiny.krea2,
        4,
        (8, 12),
        unguided={"guidance_scale": 0.0},
        guidance="guidance_scale",
        latents=unpacked_by_the_pipeline,
    ),
    "krea2-turbo": Case(
        Krea2,
        tiny.krea2,
        4,
        (8, 8),
        options={"distilled": True},
        unguided={"guidance_scale": 0.0},
        latents=unpacked_by_the_pipeline,
    ),
}
