"""A mean of what is finite, with a count of what is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class FiniteMean(Metric):
    """Sums columns of numbers over batches and ranks; numbers that are not finite are counted, not summed.

    Attributes:
        total: Sum of the finite numbers of each column, float64.
        count: How many they are.
        failed: How many were not finite.
        identity: A number of what is measured.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor
    failed: Tensor
    identity: Tensor

    def __init__(self, columns: int, identity: int = 0, **kwargs: Any) -> None:
        """Starts at nothing.

        Args:
            columns: Number of columns.
            identity: A number of what is measured. torchmetrics takes metrics of a collection for one as soon as their
                states are equal, as those of two rewards can be after the first batch; this state keeps them apart.
            **kwargs: Settings of every metric of torchmetrics.
        """
        super().__init__(**kwargs)
        # float64: a float32 sum of 1e5 scores depends on how they were spread over ranks, in the fourth digit or so.
        self.add_state("total", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(columns, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("failed", torch.zeros(columns, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("identity", torch.tensor(identity), dist_reduce_fx="max")

    def add_rows(self, values: Tensor) -> None:
        """Adds numbers.

        Args:
            values: [B, columns].
        """
        values = values.detach().to(self.total.device, torch.float64)
        finite = values.isfinite()
        self.total += torch.where(finite, values, 0).sum(dim=0)
        self.count += finite.sum(dim=0)
        self.failed += (~finite).sum(dim=0)

    def means(self) -> Tensor:
        """Gives the means.

        Returns:
            float32 [columns]; NaN for a column without a finite number.
        """
        return torch.where(self.count > 0, self.total / self.count, torch.nan).float()
