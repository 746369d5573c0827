"""FLUX.1: dev (guidance-distilled), schnell, and true classifier-free guidance on either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.distilled import Distilled
from calibri_lightning.backbones.native import decode_kl
from calibri_lightning.backbones.packing import pack, unpack

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel


class FLUX1(Distilled):
    """Adapter of `FluxPipeline`.

    The guidance of `members: cfg` is the stock pipeline's true_cfg_scale, on top of the embedded guidance.
    """

    pipelines = ("FluxPipeline",)
    text_components = ("text_encoder", "text_encoder_2")
    stock_guidance = 3.5
    pipeline: FluxPipeline
    transformer: FluxTransformer2DModel

    @property
    def latent_channels(self) -> int:
        """A token of the transformer holds four latent pixels."""
        return int(self.transformer.config.in_channels // 4)

    def encode_text(self, text: str) -> Conditioning:
        """Runs both text encoders on one text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "prompt" [1, 512, D] (T5, padded: the model attends to the padding) and "pooled" [1, P] (CLIP).
        """
        prompt, pooled, _ = self.pipeline.encode_prompt([text], None, device=self.text_device)
        return Conditioning({"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text.

        Args:
            num_tokens: T5 tokens; 512 by default.

        Returns:
            Shape of each tensor, without the dimension that counts prompts.
        """
        config = self.transformer.config
        return {"prompt": (num_tokens or 512, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; FLUX.1 takes the time in 0..1 and predicts noise - data.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        prompt = conditioning.tensors["prompt"]
        output = self.transformer(
            hidden_states=pack(x).to(self.dtype),
            timestep=self.timesteps(sigma) / 1000,
            guidance=self.guidance(x),
            pooled_projections=conditioning.tensors["pooled"],
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=x.device, dtype=self.dtype),
            img_ids=self.constant("image_ids", self._image_ids),
            return_dict=False,
        )
        return unpack(output[0].float(), *x.shape[-2:])

    def _image_ids(self) -> Tensor:
        height, width = (size // self.size_multiple for size in self.image_size)
        return self.pipeline._prepare_latent_image_ids(1, height, width, self.device, self.dtype)

    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder on latents [B, C, h, w]."""
        return decode_kl(self.pipeline.vae, x)
