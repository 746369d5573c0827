"""What the rest of the program needs of a diffusion model.

Conventions: sigma runs from 1 (noise) to 0 (data), x = (1 - sigma) data + sigma noise, and the network
predicts the velocity v = noise - data. Sign, time and packing conventions of a model family stay inside its
adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.embeddings import Embeddings
from calibri_lightning.backbones.memory import (
    MemoryOptions,
    check_attention_backend,
    set_up_vae,
    use_attention_backend,
)
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.guidance import combined

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from calibri_lightning.calibration.attach import Attachment
    from calibri_lightning.calibration.scales import Member, MemberSpec, Rows, WeightMode
    from calibri_lightning.sampling.rollout import Samples


class Backbone(ABC):
    """A frozen diffusion pipeline, taken apart into the arrows of a sampler."""

    name: str
    """What the model was loaded from: recorded in calibration files for people."""
    pipeline: DiffusionPipeline
    """The stock pipeline whose modules this backbone uses."""
    transformer: nn.Module
    """The network whose scales are calibrated."""
    image_size: tuple[int, int]
    """Height and width of a picture, pixels."""
    dtype: torch.dtype
    """Type of weights and activations; latents and velocities are float32 between forwards."""
    guides_by_first_member: ClassVar[bool] = False
    """Whether `guide` reads the first member's velocity even where its weight is 0 (see `sampling.guidance`)."""

    memory: MemoryOptions
    """Where things are kept."""

    def __init__(self) -> None:
        """Starts with an empty cache of encoded texts."""
        self._embeddings = Embeddings(self)
        self._attends_on: torch.device | None = None
        self.memory = MemoryOptions()

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def text_device(self) -> torch.device:
        """Where texts are encoded."""
        encoder = next(self.text_encoders().parameters(), None)
        return self.device if encoder is None else encoder.device

    @abstractmethod
    def modules(self) -> nn.ModuleList:
        """All networks of the pipeline: frozen, in evaluation mode."""

    def resident_modules(self) -> nn.ModuleList:
        """The networks that stay on the device: all, but for text encoders that are kept elsewhere."""
        if self.memory.text_encoders == "keep":
            return self.modules()
        encoders = {id(encoder) for encoder in self.text_encoders()}
        return nn.ModuleList([network for network in self.modules() if id(network) not in encoders])

    @abstractmethod
    def text_encoders(self) -> nn.ModuleList:
        """The networks that only `encode` uses."""

    @abstractmethod
    def encode_text(self, text: str) -> Conditioning:
        """Runs the text encoders on one text.

        Args:
            text: What `phrase` made of a prompt or negative prompt.

        Returns:
            A conditioning of one row, on the text encoders' device.
        """

    @abstractmethod
    def schedule(self, num_steps: int) -> Tensor:
        """The noise levels of a sampler.

        Args:
            num_steps: Number of steps, at least 1.

        Returns:
            float32 [num_steps + 1] on the CPU, falling and ending in 0.

        Raises:
            UserError: If num_steps is below 1.
        """

    @property
    def tokens_per_row(self) -> int | None:
        """Tokens, image and text, that the transformer sees for one row; None where it is not ours to know."""
        return None

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch dimension."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the transformer.

        Args:
            x: Noisy latents [B, ...], float32.
            sigma: Noise level of each row [B], float32.
            conditioning: B rows.

        Returns:
            Predicted velocities, float32, shaped as x.
        """

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Turns latents into pictures.

        Args:
            x: Latents [B, ...].

        Returns:
            float32 [B, 3, H, W] in 0..1; [B, F, 3, H, W], F frames each, from a video model.
        """

    def use_memory(self, options: MemoryOptions) -> None:
        """Applies a user's choices about memory; those that depend on the device wait for `prepare`.

        Args:
            options: The choices.

        Raises:
            UserError: If this model cannot do what is asked.
        """
        if options.attention_backend is not None:
            check_attention_backend(self.transformer, options.attention_backend)
        set_up_vae(self.pipeline, options)
        self.memory = options

    def check_members(self, members: MemberSpec, weight_mode: WeightMode) -> None:  # noqa: B027 - most take all
        """Refuses a calibration that this model cannot sample; called before anything is attached.

        Args:
            members: What the configuration says of the members.
            weight_mode: What is learned about their weights.

        Raises:
            UserError: If the model cannot serve them.
        """

    def plain_guidance(self, guidance_scale: float) -> float:
        """Translates the guidance scale of the stock pipeline's call.

        Args:
            guidance_scale: The number as users of the stock pipeline know it.

        Returns:
            g of u + g (c - u), with c and u the velocities of prompt and negative prompt.
        """
        return guidance_scale

    def phrase(self, text: str, negative: bool) -> str:
        """What the text encoders are to read.

        Args:
            text: A prompt or negative prompt.
            negative: Which of them it is.

        Returns:
            The text, with what the stock pipeline puts before prompts alone.
        """
        return text

    @torch.no_grad()
    def encode(self, texts: Sequence[str], negative: bool = False) -> Conditioning:
        """Encodes texts, each text once in the life of the backbone.

        Each text is encoded alone, so that its embedding depends on nothing else, whatever the number of
        ranks. The cache is on the CPU: thousands of T5 embeddings would fill a GPU.

        Args:
            texts: Prompts, or negative prompts; they may repeat.
            negative: Whether they are negative prompts.

        Returns:
            One row a text, in order, on the transformer's device.
        """
        return self._embeddings.rows([self.phrase(text, negative) for text in texts])

    def release_text_encoders(self) -> None:
        """Moves the text encoders to the CPU; `encode` brings them back when it meets a new text."""
        self.text_encoders().to("cpu")

    def drop_text_encoders(self) -> None:
        """Removes the text encoders from memory.

        Raises:
            UserError: If this backbone cannot do without them.
        """
        raise UserError(
            f"memory.text_encoders is drop, but {type(self).__name__} leaves its text encoders to the pipeline. Use "
            "keep."
        )

    def prepare(self, texts: Sequence[str], negatives: Sequence[str]) -> None:
        """Applies what waits for the device; called when the networks are where a run will use them.

        Args:
            texts: All prompts of the run; encoded now where the text encoders are to be dropped.
            negatives: All its negative prompts.

        Raises:
            UserError: If the attention back end does not work on this device.
        """
        if self.memory.attention_backend is not None and self._attends_on != self.device:
            self._attends_on = self.device
            use_attention_backend(self.transformer, self.memory.attention_backend, lambda: self.probe_forward(1))
        if self.memory.text_encoders == "drop":
            phrases = [self.phrase(text, False) for text in texts] + [self.phrase(text, True) for text in negatives]
            self._embeddings.drop_encoders(phrases)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Draws initial noise, each row from its own CPU generator: the same on any machine, in any batch.

        Args:
            seeds: One seed a row; see `calibri_lightning.sampling.noise.noise_seed`.

        Returns:
            Standard normal float32 [len(seeds), ...] on the backbone's device.
        """
        shape = (1, *self.latent_shape())
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(rows).to(self.device)

    def guide(self, velocities: Tensor, weights: Tensor) -> Tensor:
        """Combines the members' velocities; classifier-free guidance is the pair of weights (g, 1 - g).

        Args:
            velocities: [B, M, ...].
            weights: omega [B, M], float32.

        Returns:
            sum over m of omega_m v_m, shaped [B, ...].
        """
        return combined(velocities, weights)

    def sample(
        self,
        attachment: Attachment,
        rows: Rows,
        members: Sequence[Member],
        prompts: Conditioning,
        negatives: Conditioning | None,
        noise: Tensor,
        num_steps: int,
    ) -> Samples:
        """Draws pictures as latents; arguments and result are those of `sampling.rollout.sample`."""
        from calibri_lightning.sampling.rollout import sample

        return sample(self, attachment, rows, members, prompts, negatives, noise, num_steps)

    @torch.no_grad()
    def probe_forward(self, num_rows: int) -> Tensor:
        """Runs the transformer on a fixed batch, to find out which sites have an effect.

        Args:
            num_rows: Rows of the batch, all with the empty prompt.

        Returns:
            The output, a tensor of as many rows as the transformer saw.
        """
        noise = self.noise(range(num_rows))
        sigma = self.schedule(2)[1].to(noise).expand(num_rows)
        return self.velocity(noise, sigma, self.encode([""] * num_rows))

    def to(self, device: torch.device | str) -> Backbone:
        """Moves the networks that stay on the device.

        Args:
            device: Where to.

        Returns:
            Itself.
        """
        self.resident_modules().to(device)
        return self
