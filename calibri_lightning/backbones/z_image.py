"""Z-Image: reversed time, velocities of the opposite sign, lists in place of batches, c + g (c - u)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.native import TYPICAL_TOKENS, Native, decode_kl
from calibri_lightning.sampling.schedule import check_steps, shifted_sigmas

if TYPE_CHECKING:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel


class ZImage(Native):
    """Adapter of `ZImagePipeline` with the default settings of its call: no truncation, no cap on lengths."""

    pipelines = ("ZImagePipeline",)
    pipeline: ZImagePipeline
    transformer: ZImageTransformer2DModel

    @property
    def default_size(self) -> int:
        """What the stock pipeline's call makes where no size is given."""
        return 1024

    @property
    def largest_size(self) -> int:
        """The rotary positions are tables; the first axis counts text, the others rows and columns of tokens."""
        return int(self.size_multiple * min(self.transformer.config.axes_lens[1:]))

    def plain_guidance(self, guidance_scale: float) -> float:
        """Z-Image guides by c + g (c - u), which is plain guidance of 1 + g.

        Args:
            guidance_scale: g of the stock pipeline; 0 is no guidance.

        Returns:
            g of u + g (c - u).
        """
        return 1.0 + guidance_scale

    def schedule(self, num_steps: int) -> Tensor:
        """Evenly spaced noise levels, as this pipeline computes them (in float32), shifted by its scheduler.

        Args:
            num_steps: Number of steps.

        Returns:
            float32 [num_steps + 1] on the CPU, ending in 0.
        """
        check_steps(num_steps)
        sigmas = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        return shifted_sigmas(self.pipeline.scheduler, sigmas, self.shift(num_steps))

    def encode_text(self, text: str) -> Conditioning:
        """Runs the language model on one text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "prompt" [1, T, D], without padding.
        """
        (prompt,), _ = self.pipeline.encode_prompt([text], self.text_device, do_classifier_free_guidance=False)
        return Conditioning.of_text(prompt[None].to(self.dtype))

    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text.

        Args:
            num_tokens: Text tokens.

        Returns:
            Shape of each tensor, without the dimension that counts prompts.
        """
        tokens = num_tokens or TYPICAL_TOKENS
        return {"prompt": (tokens, self.transformer.config.cap_feat_dim), "mask": (tokens,)}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; Z-Image counts time from noise (0) to data (1) and predicts data - noise.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        assert conditioning.lengths is not None
        output = self.transformer(
            list(x.to(self.dtype)[:, :, None].unbind()),
            (1000 - self.timesteps(sigma)) / 1000,
            [row[:n] for row, n in zip(conditioning.tensors["prompt"], conditioning.lengths, strict=True)],
            return_dict=False,
        )
        return -torch.stack(output[0])[:, :, 0].float()

    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder on latents [B, C, h, w]."""
        return decode_kl(self.pipeline.vae, x)
