"""How time and memory of a generation grow with the number of candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calibri_lightning.bench.measure import Memory, Timing, interleave, memory_of
from calibri_lightning.bench.precision import Setting
from calibri_lightning.bench.workbench import Workbench


@dataclass(frozen=True)
class GrowthPoint:
    """A generation of one size."""

    popsize: int
    timing: Timing
    memory: Memory | None


def measure_growth(
    bench: Workbench, setting: Setting, popsizes: Sequence[int], repeats: int
) -> tuple[GrowthPoint, ...]:
    """Times generations of several sizes, interleaved, and then watches the memory of each.

    Args:
        bench: Models and work.
        setting: How the loop computes.
        popsizes: Numbers of candidates, rising.
        repeats: Repetitions.

    Returns:
        A point for each size.
    """
    loop = bench.batched(setting)

    def generation(popsize: int) -> Callable[[], object]:
        job = bench.job(popsize)
        return lambda: loop(job)

    variants = {str(popsize): generation(popsize) for popsize in popsizes}
    timings = interleave(variants, repeats, bench.options.device)
    return tuple(
        GrowthPoint(popsize, timings[str(popsize)], memory_of(variants[str(popsize)], bench.options.device))
        for popsize in popsizes
    )
