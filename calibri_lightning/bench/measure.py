"""Measures variants of one job, interleaved: on a noisy machine ratios inside one run hold, absolute times do not."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spread:
    """A quantity that was measured several times."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarises measurements.

        Args:
            values: At least one.

        Returns:
            Median and quartiles.
        """
        low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """The times of one variant."""

    seconds: tuple[float, ...]
    """Wall-clock seconds of each repetition."""

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return Spread.of(self.seconds).median

    def speedup_over(self, other: Timing) -> Spread:
        """How many times as fast this variant is as another one.

        Args:
            other: A variant of the same interleaved run.

        Returns:
            Spread of the ratios inside each repetition.
        """
        return Spread.of([theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)])


@dataclass(frozen=True)
class Memory:
    """Memory of a run: of the device, or of the process on a CPU."""

    before_bytes: int
    """In use when it began: weights, and whatever else is loaded."""
    peak_bytes: int
    """Most in use while it ran."""

    @property
    def working_bytes(self) -> int:
        """What the run itself needed."""
        return self.peak_bytes - self.before_bytes


def interleave(variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Times variants in turn, so that a slow spell of the machine meets all of them.

    Each round begins with another variant (A B C, B C A, ...), lest one of them always follow the same neighbour. All
    run once beforehand, uncounted: that compiles, allocates and fills caches.

    Args:
        variants: What to time, by name.
        repeats: Repetitions of each.
        device: Where they run; it is synchronised before each reading of the clock.

    Returns:
        A timing each, in the same order.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        variants[name]()
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = now(device)
            variants[name]()
            seconds[name].append(now(device) - started)
    return {name: Timing(tuple(seconds[name])) for name in names}


def now(device: torch.device) -> float:
    """Reads the clock, once the device has done what it was asked to.

    Args:
        device: What to wait for.

    Returns:
        Seconds since some moment.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_of(run: Callable[[], object], device: torch.device) -> Memory | None:
    """Runs something once, to see how much memory it takes.

    Args:
        run: What to run, warmed up.
        device: Where it runs.

    Returns:
        Allocated memory of a CUDA device; resident memory of this process on Linux; None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return Memory(before, torch.cuda.max_memory_allocated(device))
    if not sys.platform.startswith("linux") or not _reset_high_water():
        return None
    before = _resident("VmRSS")
    run()
    return Memory(before, _resident("VmHWM"))


def _reset_high_water() -> bool:
    """Hands freed memory back, and makes Linux forget the largest resident size; False where it will not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        # What an earlier run freed would otherwise count as this one's.
        trim(0)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
