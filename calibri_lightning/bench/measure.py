"""Measures variants of one job, interleaved: on a noisy machine ratios inside one run hold, absolute times do not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_HIGH_WATER = Path("/proc/self/status")
_RESET_HIGH_WATER = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """The measurements of one variant."""

    seconds: tuple[float, ...]
    """Wall-clock seconds of each repetition."""
    peak_bytes: int | None
    """Most memory in use during a repetition: of the device, or of the process on a CPU; None where unknown."""

    @property
    def median(self) -> float:
        """Median of the seconds."""
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def speedup_over(self, other: Timing) -> float:
        """Median over the repetitions of the other variant's time divided by this one's.

        Args:
            other: A variant of the same interleaved run.

        Returns:
            The ratio; above 1 where this variant is faster.
        """
        return Timing(tuple(b / a for a, b in zip(self.seconds, other.seconds, strict=True)), None).median


def interleave(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, Timing]:
    """Times variants in turn, A B C A B C, so that a slow spell of the machine meets all of them.

    Args:
        variants: What to time, by name.
        repeats: Repetitions of each.
        device: Where they run; it is synchronised before each reading of the clock.
        warm_up: Whether to run each once beforehand, which compiles, allocates and fills caches.

    Returns:
        A timing each, in the same order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[int | None]] = {name: [] for name in variants}
    if warm_up:
        for run in variants.values():
            run()
    for _ in range(repeats):
        for name, run in variants.items():
            _reset_peak(device)
            started = _now(device)
            run()
            seconds[name].append(_now(device) - started)
            peaks[name].append(_peak(device))
    known = {name: [peak for peak in found if peak is not None] for name, found in peaks.items()}
    return {name: Timing(tuple(seconds[name]), max(known[name], default=None)) for name in variants}


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> float:
    """Measures the machine's best rate of multiplying square matrices, the roof of every transformer.

    Args:
        device: Where.
        dtype: Of the matrices.
        size: Rows and columns.
        repeats: The best of so many counts.

    Returns:
        FLOP/s, 2 size^3 a product.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(repeats + 1):
        started = _now(device)
        torch.mm(a, b, out=out)
        times.append(_now(device) - started)
    return 2 * size**3 / min(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET_HIGH_WATER.exists():
        _RESET_HIGH_WATER.write_text("5")  # Linux: forgets the largest resident size so far


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _HIGH_WATER.exists():
        return None
    line = next(line for line in _HIGH_WATER.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
