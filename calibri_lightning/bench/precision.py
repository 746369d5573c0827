"""How a loop computes: the type of weights and of products, and whether its blocks are compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from calibri_lightning.backbones.loading import DType

Precision = Literal["float32", "autocast", "bfloat16"]
"""float32; weights in float32 and products in bfloat16 (`trainer.precision: bf16-mixed`); all in bfloat16 (the
backbone's `dtype: bfloat16`)."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Setting:
    """One way to run the evaluation loop."""

    precision: Precision
    compiled: bool = False
    """Whether the transformer's blocks are compiled (`model.compile: true`)."""

    @property
    def name(self) -> str:
        """How the report calls it."""
        return f"{self.precision}, compiled" if self.compiled else self.precision

    @property
    def weights(self) -> DType:
        """Type of the weights."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"

    @property
    def products(self) -> DType:
        """Type in which matrices are multiplied."""
        return "float32" if self.precision == "float32" else "bfloat16"

    def active(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the loop runs.

        Args:
            device: Where it runs.

        Returns:
            Autocast, switched on or off.
        """
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "autocast")
