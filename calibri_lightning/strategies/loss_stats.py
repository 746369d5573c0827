"""Statistics of a loss that add up over micro-batches and processes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

_BY_MAXIMUM = "_max"


@dataclass(frozen=True)
class SummedStats:
    """Sums and counts of one micro-batch, each a float32 scalar that stays on its device.

    Of two batches, a field whose name ends in `_max` is the larger one (they are never negative), every other one the
    sum.
    """

    count: Tensor
    """Samples that count: those of the mask."""
    loss_sum: Tensor
    """The loss, summed over them; without gradient."""
    policy_sum: Tensor
    """The term that rewards act on, alone."""
    kl_sum: Tensor
    """The distance from the reference, without its weight."""

    def as_metrics(self) -> dict[str, float]:
        """Means, shares and maxima by name; this waits for the device.

        Returns:
            Metrics; means are NaN where no sample counts.
        """
        return {
            "loss": self.mean(self.loss_sum),
            "policy_loss": self.mean(self.policy_sum),
            "kl": self.mean(self.kl_sum),
        }

    def __add__(self, other: Self) -> Self:
        sums, maxima = self.packed()
        other_sums, other_maxima = other.packed()
        return self.unpacked(sums + other_sums, torch.maximum(maxima, other_maxima))

    def packed(self) -> tuple[Tensor, Tensor]:
        """Packs the fields, to be reduced over processes in two calls.

        Returns:
            Two vectors: what is to be summed, and what the maximum is to be taken of.
        """
        sums = [getattr(self, field.name) for field in fields(self) if not field.name.endswith(_BY_MAXIMUM)]
        maxima = [getattr(self, field.name) for field in fields(self) if field.name.endswith(_BY_MAXIMUM)]
        return torch.stack(sums), torch.stack(maxima) if maxima else sums[0].new_zeros(0)

    @classmethod
    def unpacked(cls, sums: Tensor, maxima: Tensor) -> Self:
        """Undoes `packed`.

        Args:
            sums: The first vector.
            maxima: The second vector.

        Returns:
            The statistics.
        """
        names = [field.name for field in fields(cls)]
        added = [name for name in names if not name.endswith(_BY_MAXIMUM)]
        largest = [name for name in names if name.endswith(_BY_MAXIMUM)]
        return cls(**dict(zip(added, sums, strict=True)), **dict(zip(largest, maxima, strict=True)))

    def mean(self, total: Tensor) -> float:
        """Divides a sum by the number of samples; this waits for the device.

        Args:
            total: One of the fields that are sums.

        Returns:
            The mean; NaN where no sample counts.
        """
        return float(total / self.count)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sums the samples that count.

    Args:
        values: [B].
        mask: bool [B].

    Returns:
        The sum as a scalar. What stands outside the mask, NaN too, enters neither it nor its gradient by `values`;
        what `values` were computed from may still get NaN gradients (0 x NaN) if it is NaN itself.
    """
    return torch.where(mask, values, 0.0).sum()


def sample_mean(values: Tensor) -> Tensor:
    """Averages over all dimensions but the batch.

    `mean(dim=())`, as in a published implementation, reduces the batch too.

    Args:
        values: [B, ...].

    Returns:
        [B].
    """
    return values.flatten(1).mean(1)


def check_samples(count: int, *each: Tensor) -> None:
    """Refuses tensors that are not one number a sample: [B, 1] against [B] would silently become [B, B].

    Args:
        count: B.
        *each: Tensors that should be scalars or [B].

    Raises:
        ValueError: If one is neither.
    """
    shapes = [tuple(tensor.shape) for tensor in each]
    if any(shape not in ((), (count,)) for shape in shapes):
        raise ValueError(f"One number a sample is meant, [{count}] or a scalar, but shapes are {shapes}.")
