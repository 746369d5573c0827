"""Krea 2: a stack of language-model layers for each text token, c + g (c - u), Qwen-Image's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.native import TYPICAL_TOKENS, Native
from calibri_lightning.backbones.packing import pack, unpack
from calibri_lightning.backbones.qwen_image import decode_qwen
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, Krea2Pipeline, Krea2Transformer2DModel

_DISTILLED_SHIFT = 1.15
"""mu of the few-step model, whatever the picture's size."""


class Krea2(Native):
    """Adapter of `Krea2Pipeline`, base and distilled."""

    pipelines = ("Krea2Pipeline",)
    pipeline: Krea2Pipeline
    transformer: Krea2Transformer2DModel

    def _adopt(self, pipe: DiffusionPipeline, height: int | None, width: int | None) -> None:
        if pipe.patch_size != 2:
            raise UserError(
                f"The model's patch_size is {pipe.patch_size}; this backbone packs latents by 2 x 2, as the published "
                "models do. Use Stock, which leaves packing to the pipeline."
            )
        super()._adopt(pipe, height, width)

    @property
    def default_size(self) -> int:
        """What the stock pipeline's call makes where no size is given."""
        return 1024

    @property
    def latent_channels(self) -> int:
        """A token of the transformer holds four latent pixels."""
        return int(self.transformer.config.in_channels // 4)

    def plain_guidance(self, guidance_scale: float) -> float:
        """Krea 2 guides by c + g (c - u), which is plain guidance of 1 + g.

        Args:
            guidance_scale: g of the stock pipeline; 0 is no guidance.

        Returns:
            g of u + g (c - u).
        """
        return 1.0 + guidance_scale

    def shift(self, num_steps: int) -> float:
        """Constant for the distilled model, else from the picture's size.

        Args:
            num_steps: Number of steps.

        Returns:
            mu.
        """
        return _DISTILLED_SHIFT if self.pipeline.config.is_distilled else super().shift(num_steps)

    def encode_text(self, text: str) -> Conditioning:
        """Runs the language model on one text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "prompt" [1, T, L, D]: L layers a token, without the padding that the stock pipeline puts before the end
            of its template. No text token has a position, and padding is masked, so nothing changes; 512 tokens a
            prompt would fill the memory.
        """
        prompt, mask = self.pipeline.encode_prompt([text], device=self.text_device)
        return Conditioning.of_text(prompt[:, mask[0]].to(self.dtype))

    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text.

        Args:
            num_tokens: Text tokens.

        Returns:
            Shape of each tensor, without the dimension that counts prompts.
        """
        tokens, config = num_tokens or TYPICAL_TOKENS, self.transformer.config
        return {"prompt": (tokens, config.num_text_layers, config.text_hidden_dim), "mask": (tokens,)}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; Krea 2 takes the time in 0..1 and predicts noise - data.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        prompt = conditioning.tensors["prompt"]
        height, width = (size // self.size_multiple for size in self.image_size)
        output = self.transformer(
            hidden_states=pack(x).to(self.dtype),
            encoder_hidden_states=prompt,
            timestep=self.timesteps(sigma) / self.pipeline.scheduler.config.num_train_timesteps,
            position_ids=self.pipeline.prepare_position_ids(prompt.shape[1], height, width, x.device),
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )
        return unpack(output[0].float(), *x.shape[-2:])

    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder on latents [B, C, h, w]."""
        return decode_qwen(self.pipeline.vae, x)
