"""The roof under which transformers live: arithmetic of a forward, and how fast the machine multiplies matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibri_lightning.backbones import Backbone, Conditioning
from calibri_lightning.backbones.loading import DType
from calibri_lightning.bench.measure import now

SIZES = (512, 1024, 2048, 4096, 8192)
"""Rows and columns of the matrices: a GPU reaches its peak at the largest, a processor with two cores at the first."""
LONG = 0.02
"""Seconds of a product above which larger ones are not tried."""


@dataclass(frozen=True)
class Roof:
    """What a model costs and what the machine can do."""

    flops_per_row: float
    """FLOP of one row of a forward."""
    matmul_peaks: Mapping[DType, float]
    """Measured FLOP/s of matrix products, by type."""

    def share(self, rows_per_second: float, dtype: DType) -> float:
        """How much of the peak a rate of forwards makes use of.

        Args:
            rows_per_second: Rows of forwards.
            dtype: Type in which matrices are multiplied.

        Returns:
            Achieved FLOP/s over the peak.
        """
        return rows_per_second * self.flops_per_row / self.matmul_peaks[dtype]


def measure_peaks(device: torch.device, dtypes: Iterable[DType]) -> dict[DType, float]:
    """Measures the peaks of several types.

    Args:
        device: Where.
        dtypes: The types; they may repeat.

    Returns:
        FLOP/s by type.
    """
    return {dtype: matmul_peak(device, getattr(torch, dtype), SIZES) for dtype in dict.fromkeys(dtypes)}


@torch.no_grad()
def flops_per_row(backbone: Backbone, rows: int = 2, text: Conditioning | None = None) -> float:
    """Counts the arithmetic of one row of a forward: multiplications and additions of matrix products.

    Products of matrices, convolutions and attention count; norms, activations and gates, a hundredth of it, do not.

    Args:
        backbone: The model, not compiled.
        rows: Rows of the counted forward.
        text: What each row sees, one row of it; "a red circle" by default, which a model without numbers cannot encode.

    Returns:
        FLOP.
    """
    x = backbone.noise(range(rows))
    seen = backbone.encode(["a red circle"] * rows) if text is None else text.take([0] * rows)
    sigma = backbone.schedule(2)[1].to(x).expand(rows)
    # The counter knows matrix products; the CPU's fused attention hides its own.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone.velocity(x, sigma, seen)
    return counter.get_total_flops() / rows


def matmul_peak(device: torch.device, dtype: torch.dtype, sizes: Sequence[int], repeats: int = 8) -> float:
    """Measures the machine's best rate of multiplying square matrices.

    Args:
        device: Where.
        dtype: Of the matrices.
        sizes: Rows and columns to try, rising; none above one whose product takes long.
        repeats: Products of each size; the fastest of all counts.

    Returns:
        FLOP/s, at 2 size^3 a product.
    """
    best = 0.0
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        out, seconds = torch.empty_like(a), []
        for _ in range(repeats + 1):
            started = now(device)
            torch.mm(a, b, out=out)
            seconds.append(now(device) - started)
        # The first product also loads the kernel.
        best = max(best, 2 * size**3 / min(seconds[1:]))
        if min(seconds) > LONG:
            break
    return best
