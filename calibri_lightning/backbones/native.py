"""What all native backbones share: a pipeline of diffusers, loaded, checked and frozen.

A family adds its conventions alone: how a text becomes embeddings, how the transformer is called, which noise
levels it is sampled at, and how latents become pictures. Latents are pictures [B, C, h, w] throughout, drawn as the
stock pipeline draws them from a generator of the same seed; a family whose transformer takes a sequence packs them
for the forward.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.base import Backbone
from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.loading import BACKBONE_OF, DType, freeze, load_pipeline
from calibri_lightning.backbones.memory import MemoryOptions
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.schedule import dynamic_shift, even_sigmas, shifted_sigmas

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

PIXELS_PER_DECODE = 2**22
"""Pixels that the autoencoder decodes at once: 16 pictures of 512 x 512."""
TYPICAL_TOKENS = 128
"""Text tokens that are taken for a prompt whose length is not known, in families that do not pad."""
_PROBE_TOKENS = 2
"""Text tokens of a probe, where the family lets their number vary."""


class Native(Backbone):
    """A backbone that samples by itself what the pipelines of one family sample."""

    pipelines: ClassVar[tuple[str, ...]]
    """Pipeline classes of diffusers that the backbone takes apart."""
    text_components: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """The pipeline's components that only encode texts."""
    transformer: ModelMixin

    def __init_subclass__(cls) -> None:
        """Notes whose backbone this is, so that error messages can name it."""
        super().__init_subclass__()
        BACKBONE_OF.update(dict.fromkeys(cls.__dict__.get("pipelines", ()), cls.__name__))

    def __init__(
        self,
        pretrained: str,
        dtype: DType = "bfloat16",
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008 - read, never changed; jsonargparse wants it
    ) -> None:
        """Loads a pipeline.

        Args:
            pretrained: A diffusers folder, or a Hub id "owner/name".
            dtype: Type of weights and activations.
            revision: Branch, tag or commit of a Hub repository.
            height: Height of the pictures, pixels; by default the model's own.
            width: Width of the pictures, pixels; by default the model's own.
            memory: Where text encoders and embeddings are kept, and how the autoencoder and attention run.

        Raises:
            UserError: If the model cannot be loaded, cannot make pictures of that size, or cannot keep to `memory`.
        """
        pipe = load_pipeline(self.pipelines, pretrained, dtype, revision, memory.quantization)
        self._adopt(pipe, height, width)
        self.use_memory(memory)
        self.name = pretrained

    @classmethod
    def of(cls, pipe: DiffusionPipeline, height: int | None = None, width: int | None = None) -> Self:
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
        backbone._adopt(pipe, height, width)
        return backbone

    def _adopt(self, pipe: DiffusionPipeline, height: int | None, width: int | None) -> None:
        """Takes over a frozen pipeline; a family that needs more than that extends it."""
        Backbone.__init__(self)
        self._check_scheduler(pipe)
        self._constants: dict[tuple[str, torch.device], Tensor] = {}
        self.name = str(pipe.config.get("_name_or_path") or "")
        self.pipeline, self.transformer, self.dtype = pipe, pipe.transformer, pipe.transformer.dtype
        native = self.default_size
        self.image_size = (native if height is None else height, native if width is None else width)
        self._check_size()

    def _check_scheduler(self, pipe: DiffusionPipeline) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = pipe.scheduler
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        if not flow or scheduler.config.stochastic_sampling or scheduler.config.invert_sigmas:
            raise UserError(
                f"The model's scheduler is {type(scheduler).__name__}; {type(self).__name__} is sampled with a "
                "deterministic FlowMatchEulerDiscreteScheduler. Replace the model's scheduler folder by the original "
                "one."
            )

    def _check_size(self) -> None:
        multiple = self.size_multiple
        # No limit: larger than any picture that fits into memory.
        largest = self.largest_size or multiple * 2**16
        span = f"from {multiple} to {largest} pixels" if self.largest_size else f"from {multiple} pixels up"
        for name, size in zip(("height", "width"), self.image_size, strict=True):
            if size < multiple or size % multiple or size > largest:
                nearest = min(max(round(size / multiple), 1) * multiple, largest)
                raise UserError(
                    f"{name} is {size}; this model makes pictures whose sides are multiples of {multiple}, {span}. "
                    f"Set {name} to {nearest}."
                )

    @property
    def default_size(self) -> int:
        """Height and width of the stock pipeline's pictures where none is given, pixels."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of, pixels: the side of a transformer's token."""
        return int(self.pipeline.vae_scale_factor * 2)

    @property
    def largest_size(self) -> int | None:
        """Largest height or width for which the transformer has positions, pixels; None where they are computed."""
        return None

    @property
    def num_image_tokens(self) -> int:
        """Length of the image sequence that the transformer sees."""
        return (self.image_size[0] // self.size_multiple) * (self.image_size[1] // self.size_multiple)

    @property
    def tokens_per_row(self) -> int:
        """Length of the sequence that the transformer sees, text included."""
        return self.num_image_tokens + self.text_shapes()["prompt"][0]

    @property
    def latent_channels(self) -> int:
        """Channels of one latent."""
        return int(self.transformer.config.in_channels)

    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        factor = self.pipeline.vae_scale_factor
        return self.latent_channels, self.image_size[0] // factor, self.image_size[1] // factor

    def modules(self) -> nn.ModuleList:
        """All networks of the pipeline: frozen, in evaluation mode."""
        parts = self.pipeline.components.values()
        return nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])

    def text_encoders(self) -> nn.ModuleList:
        """The networks that only `encode` uses."""
        encoders = (getattr(self.pipeline, name) for name in self.text_components)
        return nn.ModuleList([encoder for encoder in encoders if encoder is not None])

    def drop_text_encoders(self) -> None:
        """Removes the text encoders from the pipeline, and so from memory."""
        for name in self.text_components:
            setattr(self.pipeline, name, None)

    def schedule(self, num_steps: int) -> Tensor:
        """Evenly spaced noise levels, shifted by the pipeline's own scheduler.

        Args:
            num_steps: Number of steps.

        Returns:
            float32 [num_steps + 1] on the CPU, ending in 0.
        """
        return shifted_sigmas(self.pipeline.scheduler, even_sigmas(num_steps), self.shift(num_steps))

    def shift(self, num_steps: int) -> float:
        """The resolution-dependent shift mu of the schedule.

        Args:
            num_steps: Number of steps.

        Returns:
            mu.
        """
        return dynamic_shift(self.pipeline.scheduler, self.num_image_tokens)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """The scheduler's time of noise levels, float and untruncated; dividing it again need not give sigma's bits.

        Args:
            sigma: Noise levels [B].

        Returns:
            Times [B] in 0..1000, for the usual number of training steps.
        """
        return sigma * self.pipeline.scheduler.config.num_train_timesteps

    def decode(self, x: Tensor) -> Tensor:
        """Decodes latents, a bounded number of pixels at a time.

        Args:
            x: Latents [B, C, h, w].

        Returns:
            float32 [B, 3, H, W] in 0..1.
        """
        rows = max(1, PIXELS_PER_DECODE // (self.image_size[0] * self.image_size[1]))
        with torch.no_grad():
            images = torch.cat([self.pictures(part).float() for part in x.split(rows)])
        return (images / 2 + 0.5).clamp(0, 1)

    @abstractmethod
    def pictures(self, x: Tensor) -> Tensor:
        """Runs the autoencoder.

        Args:
            x: Latents [B, C, h, w].

        Returns:
            Pictures [B, 3, H, W] in -1..1, up to overshoot.
        """

    @abstractmethod
    def text_shapes(self, num_tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode_text` makes of one text, without running it.

        Args:
            num_tokens: Text tokens, where the transformer takes any number of them; by default as many as `encode_text`
                makes, or of a text of middling length where that depends on the text.

        Returns:
            Shape of each tensor of the conditioning, without the dimension that counts prompts; of "mask" where the
            family has one.
        """

    def example(self, num_tokens: int | None = None) -> Conditioning:
        """A conditioning of one row as `encode_text` makes it, of noise: for probes and estimates of memory.

        Args:
            num_tokens: As for `text_shapes`.

        Returns:
            The conditioning, on the transformer's device; always the same.
        """
        generator = torch.Generator().manual_seed(0)
        shapes = self.text_shapes(num_tokens)
        tensors = {
            name: torch.randn((1, *shape), generator=generator).to(self.device, self.dtype)
            for name, shape in shapes.items()
            if name != "mask"
        }
        return Conditioning.of_text(tensors["prompt"]) if "mask" in shapes else Conditioning(tensors)

    @torch.no_grad()
    def probe_forward(self, num_rows: int) -> Tensor:
        """Runs the transformer on a picture of four tokens and a text of a few, of noise.

        Which sites reach the output depends on the network alone. On so small a picture a model of 12 billion
        parameters is probed about as fast as it is loaded, on a CPU and without its text encoders.

        Args:
            num_rows: Rows of the batch, all with the same text.

        Returns:
            The output [num_rows, ...].
        """
        small = copy.copy(self)
        small._constants = {}
        sides = (min(2 * self.size_multiple, side) for side in self.image_size)
        small.image_size = (next(sides), next(sides))
        noise = small.noise(range(num_rows))
        sigma = self.schedule(2)[1].to(noise).expand(num_rows)
        return small.velocity(noise, sigma, self.example(_PROBE_TOKENS).take([0] * num_rows))

    def constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that every forward needs, made once a device: a copy to the device in each step would wait for it.

        Args:
            name: Its name.
            make: Makes it, on any device.

        Returns:
            It, on the transformer's device.
        """
        key = (name, self.device)
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]


def decode_kl(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Decodes with a stock `AutoencoderKL`.

    Args:
        vae: The autoencoder, with its scale and shift of latents.
        x: Latents [B, C, h, w].

    Returns:
        Pictures [B, 3, H, W] in -1..1, up to overshoot.
    """
    latents = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
