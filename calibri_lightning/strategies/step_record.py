"""What one training step of a policy showed: statistics of the loss, gradient norms, forwards; added up over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from calibri_lightning.strategies.loss_stats import SummedStats


class StepRecord:
    """Collects what a step shows, unit by unit; nothing waits for the device before `metrics`.

    Args:
        kind: The statistics of the loss.
    """

    def __init__(self, kind: type[SummedStats]) -> None:
        self._kind = kind
        self._stats: SummedStats | None = None
        self.num_forwards = 0
        """Forwards of one row on this rank; a forward with its backward counts 2."""
        self.grad_norms: list[float] = []
        """Norm of the gradient in each optimiser step."""
        self.skipped = 0
        """Optimiser steps that were not taken, for their gradient was not finite."""
        self.failure: UserError | None = None
        """What a backward pass found wrong: raised when all are done, for other ranks may depend on this one's."""

    def add(self, stats: SummedStats, num_forwards: int) -> None:
        """Adds what a batch showed.

        Args:
            stats: Statistics of its loss.
            num_forwards: What it cost.
        """
        self._stats = stats if self._stats is None else self._stats + stats
        self.num_forwards += num_forwards

    def over_ranks(self, gather: Callable[[Floats], Sequence[Floats]]) -> tuple[dict[str, float], int]:
        """Adds up the ranks; called on all of them.

        Args:
            gather: Gives each rank's vector to every rank.

        Returns:
            Metrics by name and the forwards of all ranks.
        """
        zero = torch.zeros(())
        stats = self._kind(**{field.name: zero for field in fields(self._kind)}) if self._stats is None else self._stats
        sums, maxima = (part.double().cpu().numpy() for part in stats.packed())
        parts = gather(np.concatenate([[self.num_forwards], sums, maxima]))
        total = np.sum([part[: 1 + len(sums)] for part in parts], axis=0)
        largest = np.max([part[1 + len(sums) :] for part in parts], axis=0)
        whole = self._kind.unpacked(torch.from_numpy(total[1:]), torch.from_numpy(largest))
        return whole.as_metrics(), int(total[0])
