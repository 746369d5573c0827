"""What a transformer is told about its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TEXT = ("prompt", "mask")
"""Tensors [B, T, ...] whose second dimension counts text tokens, where `lengths` is given."""


@dataclass(frozen=True)
class Conditioning:
    """Named tensors whose first dimension counts prompts."""

    tensors: Mapping[str, Tensor]
    """Tensors [B, ...] under names that only the backbone interprets."""
    lengths: tuple[int, ...] | None = None
    """Number of text tokens of each prompt, for models whose prompts differ in it.

    Then "prompt" [B, T, ...] is filled up with zeros to the longest of its rows, and "mask" [B, T] is True on text.
    The numbers are kept apart from the mask so that reading them never waits for a device.
    """

    @classmethod
    def of_text(cls, prompt: Tensor) -> Conditioning:
        """Makes the conditioning of one prompt, for a model whose prompts differ in length.

        Args:
            prompt: Embeddings [1, T, ...], without padding.

        Returns:
            A conditioning of one row: "prompt" and its "mask".
        """
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        return cls({"prompt": prompt, "mask": mask}, (prompt.shape[1],))

    def __len__(self) -> int:
        """Number of prompts B."""
        return len(next(iter(self.tensors.values())))

    @property
    def mask(self) -> Tensor | None:
        """Bool [B, T], True on text; None where no row is padded, which spares attention a mask."""
        if self.lengths is None or len(set(self.lengths)) == 1:
            return None
        return self.tensors["mask"]

    def take(self, indices: Tensor | Sequence[int]) -> Conditioning:
        """Selects rows, with repetition where an index repeats; padding that no selected row needs is cut off.

        Args:
            indices: Row numbers [N]; better on the CPU, where texts differ in length.

        Returns:
            A conditioning of N rows.
        """
        device, rows = next(iter(self.tensors.values())).device, torch.as_tensor(indices, dtype=torch.long)
        # Read before they go to the device, which reading them there would wait for.
        numbers = rows.tolist() if self.lengths is not None else []
        rows = rows.to(device)
        tensors = {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        if self.lengths is None:
            return Conditioning(tensors)
        lengths = tuple(self.lengths[row] for row in numbers)
        for name in _TEXT:
            tensors[name] = tensors[name][:, : max(lengths)]
        return Conditioning(tensors, lengths)

    def to(self, device: torch.device | str) -> Conditioning:
        """Moves all tensors.

        Args:
            device: Where to.

        Returns:
            The moved conditioning.
        """
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.lengths)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins conditionings row-wise; shorter texts are padded with zeros, which the mask marks.

        Args:
            parts: At least one, all with the same names.

        Returns:
            The rows of all parts, in order.
        """
        lengths = tuple(length for part in parts if part.lengths is not None for length in part.lengths)
        longest = max(lengths, default=0)
        tensors = {
            name: torch.cat([_padded(part.tensors[name], longest if name in _TEXT else 0) for part in parts])
            for name in parts[0].tensors
        }
        return Conditioning(tensors, lengths or None)


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Appends zeros (False, for a mask) to the second dimension up to a length; 0 leaves the tensor as it is."""
    if not length or tensor.shape[1] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), length - tensor.shape[1], *tensor.shape[2:])], dim=1)
