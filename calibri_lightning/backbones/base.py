"""What the rest of the program needs of a diffusion model.

Conventions: sigma runs from 1 (noise) to 0 (data), x = (1 - sigma) data + sigma noise, and the network
predicts the velocity v = noise - data. Sign, time and packing conventions of a model family stay inside its
adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Conditioning:
    """What a transformer is told about its prompts: named tensors whose first dimension counts prompts."""

    tensors: Mapping[str, Tensor]
    """Tensors [B, ...] under names that only the backbone interprets."""

    def __len__(self) -> int:
        """Number of prompts B."""
        return len(next(iter(self.tensors.values())))

    def take(self, indices: Tensor | Sequence[int]) -> Conditioning:
        """Selects rows, with repetition where an index repeats.

        Args:
            indices: Row numbers [N]; a tensor on the conditioning's device avoids a copy.

        Returns:
            A conditioning of N rows.
        """
        device = next(iter(self.tensors.values())).device
        rows = torch.as_tensor(indices, dtype=torch.long, device=device)
        return Conditioning({name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """Moves all tensors.

        Args:
            device: Where to.

        Returns:
            The moved conditioning.
        """
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins conditionings row-wise.

        Args:
            parts: At least one, all with the same names.

        Returns:
            The rows of all parts, in order.
        """
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


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

    def __init__(self) -> None:
        """Starts with an empty cache of encoded texts."""
        self._encoded: dict[str, Conditioning] = {}

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @abstractmethod
    def modules(self) -> nn.ModuleList:
        """All networks of the pipeline: frozen, in evaluation mode."""

    @abstractmethod
    def text_encoders(self) -> nn.ModuleList:
        """The networks that only `encode` uses."""

    @abstractmethod
    def encode_text(self, text: str) -> Conditioning:
        """Runs the text encoders on one text.

        Args:
            text: A prompt or negative prompt.

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
            float32 [B, 3, H, W] in 0..1.
        """

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encodes texts, each text once in the life of the backbone.

        Each text is encoded alone, so that its embedding depends on nothing else, whatever the number of
        ranks. The cache is on the CPU: thousands of T5 embeddings would fill a GPU.

        Args:
            texts: Prompts or negative prompts; they may repeat.

        Returns:
            One row a text, in order, on the transformer's device.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if missing:
            self.text_encoders().to(self.device)
        for text in missing:
            self._encoded[text] = self.encode_text(text).to("cpu")
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = Conditioning.cat([self._encoded[text] for text in unique]).to(self.device)
        return rows if len(unique) == len(texts) else rows.take([unique[text] for text in texts])

    def release_text_encoders(self) -> None:
        """Moves the text encoders to the CPU; `encode` brings them back when it meets a new text."""
        self.text_encoders().to("cpu")

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
        return (velocities * weights.reshape(*weights.shape, *[1] * (velocities.dim() - 2))).sum(dim=1)

    def to(self, device: torch.device | str) -> Backbone:
        """Moves all networks.

        Args:
            device: Where to.

        Returns:
            Itself.
        """
        self.modules().to(device)
        return self
