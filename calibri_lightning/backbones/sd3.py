"""Stable Diffusion 3 and 3.5, and the embedded `shapes` model, which is of the same class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibri_lightning.backbones import repeated_tokens
from calibri_lightning.backbones.base import Backbone, Conditioning
from calibri_lightning.backbones.loading import DType, freeze, load_pipeline
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.schedule import flow_sigmas

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

_T5_TOKENS = 256
"""Tokens to which the stock pipeline pads the T5 prompt; zeros if there is no T5 encoder."""
_PIXELS_PER_DECODE = 2**22
"""Pixels that the autoencoder decodes at once: 16 pictures of 512 x 512."""


class SD3(Backbone):
    """Adapter of `StableDiffusion3Pipeline`.

    Latents equal those of the stock pipeline's call up to float32 rounding. Between steps they stay in
    float32, where the stock pipeline in bfloat16 rounds them.
    """

    pipeline: StableDiffusion3Pipeline
    transformer: SD3Transformer2DModel

    def __init__(
        self,
        pretrained: str = "shapes",
        dtype: DType = "float32",
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Loads a pipeline.

        Args:
            pretrained: "shapes" (the embedded model), a diffusers folder, or a Hub id "owner/name".
            dtype: Type of weights and activations.
            revision: Branch, tag or commit of a Hub repository.
            height: Height of the pictures, pixels; by default the model's own.
            width: Width of the pictures, pixels; by default the model's own.

        Raises:
            UserError: If the model cannot be loaded, or cannot make pictures of that size.
        """
        from diffusers import StableDiffusion3Pipeline

        self._wrap(load_pipeline(StableDiffusion3Pipeline, pretrained, dtype, revision), height, width)
        self.name = pretrained

    @classmethod
    def of(cls, pipe: StableDiffusion3Pipeline, height: int | None = None, width: int | None = None) -> SD3:
        """Wraps a pipeline that is loaded already; it is frozen in place.

        Args:
            pipe: The pipeline.
            height: Height of the pictures, pixels; by default the model's own.
            width: Width of the pictures, pixels; by default the model's own.

        Returns:
            The backbone.

        Raises:
            UserError: If the model cannot make pictures of that size.
        """
        backbone = cls.__new__(cls)
        freeze(pipe)
        backbone._wrap(pipe, height, width)
        return backbone

    def _wrap(self, pipe: StableDiffusion3Pipeline, height: int | None, width: int | None) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        super().__init__()
        scheduler = pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
            raise UserError(
                f"The model's scheduler is {type(scheduler).__name__}; SD3 is sampled with a deterministic "
                "FlowMatchEulerDiscreteScheduler. Replace the model's scheduler folder by the original one."
            )
        self.name = str(pipe.config.get("_name_or_path") or "")
        self.pipeline, self.transformer, self.dtype = pipe, pipe.transformer, pipe.transformer.dtype
        native = pipe.default_sample_size * pipe.vae_scale_factor
        self.image_size = (native if height is None else height, native if width is None else width)
        self._check_size()
        # Other processors (IP adapters, kernels of the user's choice) are left alone, at the price of speed.
        known = (JointAttnProcessor2_0, repeated_tokens.BiasedJointAttention)
        plain = all(type(p) in known for p in self.transformer.attn_processors.values())
        self._key_biases: dict[torch.device, Tensor] = {}
        self._collapse = plain and _t5_is_silent(pipe)
        if self._collapse:
            repeated_tokens.install(self.transformer)

    def _check_size(self) -> None:
        multiple = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        largest = multiple * self.transformer.config.pos_embed_max_size
        for name, size in zip(("height", "width"), self.image_size, strict=True):
            if size < multiple or size % multiple or size > largest:
                nearest = min(max(round(size / multiple), 1) * multiple, largest)
                raise UserError(
                    f"{name} is {size}; this model makes pictures whose sides are multiples of {multiple}, "
                    f"from {multiple} "
                    f"to {largest} pixels. Set {name} to {nearest}."
                )

    def modules(self) -> nn.ModuleList:
        """All networks of the pipeline: frozen, in evaluation mode."""
        parts = self.pipeline.components.values()
        return nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])

    def text_encoders(self) -> nn.ModuleList:
        """The two CLIP encoders and, if the model has it, T5."""
        pipe = self.pipeline
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        return nn.ModuleList([encoder for encoder in encoders if encoder is not None])

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
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS,
        )
        if self._collapse:
            # The T5 tokens are zeros; one of them stands for all (see repeated_tokens).
            prompt = prompt[:, : self.pipeline.tokenizer_max_length + 1]
        return Conditioning({"prompt": prompt.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def schedule(self, num_steps: int) -> Tensor:
        """The pipeline's own noise levels.

        Args:
            num_steps: Number of steps.

        Returns:
            float32 [num_steps + 1] on the CPU, ending in 0.
        """
        return flow_sigmas(self.pipeline.scheduler, num_steps, self._num_image_tokens)

    @property
    def _num_image_tokens(self) -> int:
        _, height, width = self.latent_shape()
        return (height // self.transformer.config.patch_size) * (width // self.transformer.config.patch_size)

    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        factor = self.pipeline.vae_scale_factor
        return (
            self.transformer.config.in_channels,
            self.image_size[0] // factor,
            self.image_size[1] // factor,
        )

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer; SD3 takes the time as a float in 0..1000 and predicts noise - data.

        Args:
            x: Noisy latents [B, C, h, w], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Velocities, float32, shaped as x.
        """
        prompt = conditioning.tensors["prompt"]
        output = self.transformer(
            hidden_states=x.to(self.dtype),
            # As the scheduler computes it, float and untruncated.
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=prompt,
            pooled_projections=conditioning.tensors["pooled"],
            joint_attention_kwargs={"key_bias": self._key_bias(x.device)} if self._collapse else None,
            return_dict=False,
        )
        return output[0].float()

    def _key_bias(self, device: torch.device) -> Tensor:
        """Made once a device: a copy to the device in each step would wait for it."""
        if device not in self._key_biases:
            num_text_tokens = self.pipeline.tokenizer_max_length + 1
            bias = repeated_tokens.key_bias(self._num_image_tokens, num_text_tokens, _T5_TOKENS, device)
            self._key_biases[device] = bias
        return self._key_biases[device]

    def decode(self, x: Tensor) -> Tensor:
        """Decodes latents, a bounded number of pixels at a time.

        Args:
            x: Latents [B, C, h, w].

        Returns:
            float32 [B, 3, H, W] in 0..1.
        """
        vae = self.pipeline.vae
        latents = (x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)
        height, width = self.image_size
        rows = max(1, _PIXELS_PER_DECODE // (height * width))
        with torch.no_grad():
            images = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in latents.split(rows)])
        return (images / 2 + 0.5).clamp(0, 1)


def _t5_is_silent(pipe: StableDiffusion3Pipeline) -> bool:
    """Whether all T5 tokens are zero: the encoder is absent, or its last normalisation multiplies by zero."""
    encoder = pipe.text_encoder_3
    return encoder is None or not bool(encoder.encoder.final_layer_norm.weight.any())
