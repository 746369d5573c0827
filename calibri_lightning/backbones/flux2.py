"""FLUX.2: dev (guidance-distilled) and klein (base, or distilled to few steps)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.distilled import Distilled
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

    from calibri_lightning.calibration.scales import MemberSpec, WeightMode


class FLUX2(Distilled):
    """Adapter of `Flux2Pipeline` (dev) and `Flux2KleinPipeline`; pictures from text, without reference images."""

    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    stock_guidance = 4.0
    pipeline: Flux2Pipeline | Flux2KleinPipeline
    transformer: Flux2Transformer2DModel

    def check_members(self, members: MemberSpec, weight_mode: WeightMode) -> None:
        """Refuses a negative prompt where the model was distilled to do without one.

        Args:
            members: What the configuration says of the members.
            weight_mode: What is learned about their weights.

        Raises:
            UserError: If members is cfg and the model is distilled.
        """
        distilled = self.pipeline.config.get("is_distilled", True)
        if members == "cfg" and distilled:
            raise UserError(
                "members is cfg, but this FLUX.2 model was distilled to do without a negative prompt, and the stock "
                "pipeline has no pass for one. Use members: single or a number of members (FLUX.2-dev has "
                "embedded_guidance), or the klein base model."
            )

    def latent_shape(self) -> tuple[int, ...]:
        """A latent pixel holds 2 x 2 of the autoencoder's: this model's latents are patched once and for all."""
        height, width = (size // self.size_multiple for size in self.image_size)
        return self.latent_channels, height, width

    def shift(self, num_steps: int) -> float:
        """FLUX.2's own fit of mu to picture size and number of steps.

        Args:
            num_steps: Number of steps.

        Returns:
            mu.
        """
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(self.num_image_tokens, num_steps))

    def encode_text(self, text: str) -> Conditioning:
        """Runs the language model on one text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "prompt" [1, 512, D]: three layers side by side, padded (the model attends to the padding).
        """
        prompt, _ = self.pipeline.encode_prompt([text], device=self.text_device)
        return Conditioning({"prompt": prompt.to(self.dtype)})

    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text.

        Args:
            num_tokens: Text tokens; 512 by default.

        Returns:
            Shape of each tensor, without the dimension that counts prompts.
        """
        return {"prompt": (num_tokens or 512, self.transformer.config.joint_attention_dim)}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; FLUX.2 takes the time in 0..1 and predicts noise - data.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        prompt = conditioning.tensors["prompt"]
        output = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=self.timesteps(sigma) / 1000,
            guidance=self.guidance(x),
            encoder_hidden_states=prompt,
            txt_ids=self.constant("text_ids", lambda: self.pipeline._prepare_text_ids(prompt[:1])),
            img_ids=self.constant("image_ids", lambda: self.pipeline._prepare_latent_ids(x[:1])),
            return_dict=False,
        )
        return output[0].float().transpose(1, 2).reshape(x.shape)

    def pictures(self, x: Tensor) -> Tensor:
        """Undoes the autoencoder's batch normalisation of latents [B, C, h, w], and decodes them."""
        vae = self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(x)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(x)
        latents = self.pipeline._unpatchify_latents(x * std + mean)
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
