"""Stable Diffusion 3 and 3.5, and the embedded `shapes` model, which is of the same class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from calibri_lightning.backbones import repeated_tokens
from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.loading import DType
from calibri_lightning.backbones.memory import MemoryOptions
from calibri_lightning.backbones.native import Native, decode_kl
from calibri_lightning.sampling.schedule import flow_sigmas

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

_T5_TOKENS = 256
"""Tokens to which the stock pipeline pads the T5 prompt; zeros if there is no T5 encoder."""


class SD3(Native):
    """Adapter of `StableDiffusion3Pipeline`.

    Latents equal those of the stock pipeline's call up to float32 rounding. Between steps they stay in
    float32, where the stock pipeline in bfloat16 rounds them.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    text_components = ("text_encoder", "text_encoder_2", "text_encoder_3")
    pipeline: StableDiffusion3Pipeline
    transformer: SD3Transformer2DModel

    def __init__(
        self,
        pretrained: str = "shapes",
        dtype: DType = "float32",
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008 - read, never changed; jsonargparse wants it
    ) -> None:
        """Loads a pipeline.

        Args:
            pretrained: "shapes" (the embedded model), a diffusers folder, or a Hub id "owner/name".
            dtype: Type of weights and activations.
            revision: Branch, tag or commit of a Hub repository.
            height: Height of the pictures, pixels; by default the model's own.
            width: Width of the pictures, pixels; by default the model's own.
            memory: Where text encoders and embeddings are kept, and how the autoencoder and attention run.

        Raises:
            UserError: If the model cannot be loaded, cannot make pictures of that size, or cannot keep to `memory`.
        """
        super().__init__(pretrained, dtype, revision, height, width, memory)

    def _adopt(self, pipe: StableDiffusion3Pipeline, height: int | None, width: int | None) -> None:
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        super()._adopt(pipe, height, width)
        # Other processors (IP adapters, kernels of the user's choice) are left alone, at the price of speed.
        known = (JointAttnProcessor2_0, repeated_tokens.BiasedJointAttention)
        plain = all(type(p) in known for p in self.transformer.attn_processors.values())
        self._collapse = plain and _t5_is_silent(pipe)
        if self._collapse:
            repeated_tokens.install(self.transformer)

    @property
    def size_multiple(self) -> int:
        """Pixels a token is wide."""
        return int(self.pipeline.vae_scale_factor * self.transformer.config.patch_size)

    @property
    def largest_size(self) -> int:
        """The positions are a learned table."""
        return int(self.size_multiple * self.transformer.config.pos_embed_max_size)

    def encode_text(self, text: str) -> Conditioning:
        """Runs the text encoders on one text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "prompt" [1, T, D] and "pooled" [1, P].
        """
        prompt, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            device=self.text_device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS,
        )
        if self._collapse:
            # The T5 tokens are zeros; one of them stands for all (see repeated_tokens).
            prompt = prompt[:, : self.pipeline.tokenizer_max_length + 1]
        return Conditioning({"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def schedule(self, num_steps: int) -> Tensor:
        """The scheduler's own noise levels; this pipeline leaves their choice to it.

        Args:
            num_steps: Number of steps.

        Returns:
            float32 [num_steps + 1] on the CPU, ending in 0.
        """
        return flow_sigmas(self.pipeline.scheduler, num_steps, self.num_image_tokens)

    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text.

        Args:
            num_tokens: Text tokens; without effect where silent T5 tokens run as one.

        Returns:
            Shape of each tensor, without the dimension that counts prompts.
        """
        config, clip_tokens = self.transformer.config, self.pipeline.tokenizer_max_length
        tokens = clip_tokens + 1 if self._collapse else num_tokens or clip_tokens + _T5_TOKENS
        return {"prompt": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; SD3 takes the time as a float in 0..1000 and predicts noise - data.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        output = self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=self.timesteps(sigma),
            encoder_hidden_states=conditioning.tensors["prompt"],
            pooled_projections=conditioning.tensors["pooled"],
            joint_attention_kwargs={"key_bias": self.constant("key_bias", self._key_bias)} if self._collapse else None,
            return_dict=False,
        )
        return output[0].float()

    def _key_bias(self) -> Tensor:
        num_text_tokens = self.pipeline.tokenizer_max_length + 1
        return repeated_tokens.key_bias(self.num_image_tokens, num_text_tokens, _T5_TOKENS, self.device)

    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder on latents [B, C, h, w]."""
        return decode_kl(self.pipeline.vae, x)


def _t5_is_silent(pipe: StableDiffusion3Pipeline) -> bool:
    """Whether all T5 tokens are zero: the encoder is absent, or its last normalisation multiplies by zero."""
    encoder = pipe.text_encoder_3
    return encoder is None or not bool(encoder.encoder.final_layer_norm.weight.any())
