"""Lumina 2: reversed time, velocities of the opposite sign, a system prompt, rescaled guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.native import TYPICAL_TOKENS, Native, decode_kl
from calibri_lightning.sampling.guidance import rescaled
from calibri_lightning.sampling.schedule import dynamic_shift

if TYPE_CHECKING:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel


class Lumina2(Native):
    """Adapter of `Lumina2Pipeline` with the default settings of its call.

    The guided velocity is scaled back to the length of the prompt's, row of the latent picture by row (see
    `sampling.guidance`).
    """

    pipelines = ("Lumina2Pipeline",)
    guides_by_first_member = True
    pipeline: Lumina2Pipeline
    transformer: Lumina2Transformer2DModel

    @property
    def largest_size(self) -> int:
        """The rotary positions are tables; the first axis counts text, the others rows and columns of tokens."""
        return int(self.size_multiple * min(self.transformer.config.axes_lens[1:]))

    def shift(self, num_steps: int) -> float:
        """The stock pipeline takes mu from the number of latent channels, not from the size of the picture.

        Args:
            num_steps: Number of steps.

        Returns:
            mu.
        """
        return dynamic_shift(self.pipeline.scheduler, self.latent_channels)

    def phrase(self, text: str, negative: bool) -> str:
        """Puts the system prompt before prompts; negative prompts go without.

        Args:
            text: A prompt or negative prompt.
            negative: Which of them it is.

        Returns:
            What the language model reads.
        """
        return text if negative else f"{self.pipeline.system_prompt} <Prompt Start> {text}"

    def encode_text(self, text: str) -> Conditioning:
        """Runs the language model on one text.

        Args:
            text: What `phrase` made of a prompt or negative prompt.

        Returns:
            "prompt" [1, T, D], without padding.
        """
        # `encode_prompt` would put the system prompt before negative prompts too.
        prompt, mask = self.pipeline._get_gemma_prompt_embeds([text], self.text_device)
        return Conditioning.of_text(prompt[:, mask[0].bool()].to(self.dtype))

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
        """One forward of the transformer; Lumina 2 counts time from noise (0) to data (1) and predicts data - noise.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        output = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=1 - self.timesteps(sigma) / self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditioning.tensors["prompt"],
            encoder_attention_mask=conditioning.tensors["mask"],
            return_dict=False,
        )
        return -output[0].float()

    def guide(self, velocities: Tensor, weights: Tensor) -> Tensor:
        """Guides, then gives each row of the latent picture the length that it has in the first member's velocity.

        Args:
            velocities: [B, M, C, h, w].
            weights: omega [B, M], float32.

        Returns:
            [B, C, h, w].
        """
        return rescaled(velocities, weights)

    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder on latents [B, C, h, w]."""
        return decode_kl(self.pipeline.vae, x)
