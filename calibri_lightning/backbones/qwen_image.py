"""Qwen-Image: prompts of any length, guidance that keeps the prompt's length of velocity, a video autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.native import TYPICAL_TOKENS, Native
from calibri_lightning.backbones.packing import pack, unpack
from calibri_lightning.sampling.guidance import rescaled

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

_MAX_TOKENS = 512
"""Text tokens at which the stock pipeline's call cuts a prompt."""


class QwenImage(Native):
    """Adapter of `QwenImagePipeline`.

    The guidance of `members: cfg` is the stock pipeline's true_cfg_scale; the guided velocity is scaled back to the
    length of the prompt's, token by token (see `sampling.guidance`).
    """

    pipelines = ("QwenImagePipeline",)
    guides_by_first_member = True
    pipeline: QwenImagePipeline
    transformer: QwenImageTransformer2DModel

    @property
    def latent_channels(self) -> int:
        """A token of the transformer holds four latent pixels."""
        return int(self.transformer.config.in_channels // 4)

    def encode_text(self, text: str) -> Conditioning:
        """Runs the language model on one text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "prompt" [1, T, D], without padding.
        """
        prompt, _ = self.pipeline.encode_prompt([text], device=self.text_device, max_sequence_length=_MAX_TOKENS)
        return Conditioning.of_text(prompt.to(self.dtype))

    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text.

        Args:
            num_tokens: Text tokens.

        Returns:
            Shape of each tensor, without the dimension that counts prompts.
        """
        tokens = num_tokens or TYPICAL_TOKENS
        return {"prompt": (tokens, self.transformer.config.joint_attention_dim), "mask": (tokens,)}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; Qwen-Image takes the time in 0..1 and predicts noise - data.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        height, width = (size // self.size_multiple for size in self.image_size)
        output = self.transformer(
            hidden_states=pack(x).to(self.dtype),
            timestep=self.timesteps(sigma) / 1000,
            encoder_hidden_states=conditioning.tensors["prompt"],
            encoder_hidden_states_mask=conditioning.mask,
            img_shapes=[[(1, height, width)]] * len(x),
            return_dict=False,
        )
        return unpack(output[0].float(), *x.shape[-2:])

    def guide(self, velocities: Tensor, weights: Tensor) -> Tensor:
        """Guides, then gives each token the length that it has in the first member's velocity.

        Args:
            velocities: [B, M, C, h, w].
            weights: omega [B, M], float32.

        Returns:
            [B, C, h, w].
        """
        return unpack(rescaled(pack(velocities), weights), *velocities.shape[-2:])

    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder on latents [B, C, h, w]."""
        return decode_qwen(self.pipeline.vae, x)


def decode_qwen(vae: AutoencoderKLQwenImage, x: Tensor) -> Tensor:
    """Decodes with Qwen-Image's autoencoder, which takes pictures as videos of one frame.

    Args:
        vae: The autoencoder, with mean and standard deviation of each latent channel.
        x: Latents [B, C, h, w].

    Returns:
        Pictures [B, 3, H, W] in -1..1, up to overshoot.
    """
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(x.device, vae.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = x[:, :, None].to(vae.dtype) * std + mean
    return vae.decode(latents, return_dict=False)[0][:, :, 0]
