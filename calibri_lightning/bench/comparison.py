"""The loops side by side: times, memory, and what they make of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibri_lightning.bench.loops import Job
from calibri_lightning.bench.measure import Memory, Spread, Timing, interleave, memory_of
from calibri_lightning.bench.precision import Setting
from calibri_lightning.bench.roofline import Roof
from calibri_lightning.bench.workbench import Workbench


@dataclass(frozen=True)
class LoopRun:
    """One loop on the job, as measured."""

    name: str
    setting: Setting
    timing: Timing
    memory: Memory | None
    """None where it cannot be known."""


@dataclass(frozen=True)
class LoopResult:
    """What a loop's measurements mean."""

    name: str
    timing: Timing
    memory: Memory | None
    images_per_second: float
    """Scored pictures a second, at the median time."""
    forwards_per_second: float
    """Transformer forwards a second, counted in rows."""
    speedup: Spread
    """How many times as fast as the straightforward loop."""
    peak_share: float
    """Arithmetic of its forwards, over its whole time, over the measured matmul peak of its precision."""


def run_loops(bench: Workbench, job: Job) -> tuple[LoopRun, ...]:
    """Times the straightforward loop in the first setting and the batched one in each, and watches their memory.

    Args:
        bench: Models.
        job: The work.

    Returns:
        The runs, the straightforward one first.
    """
    settings, device = bench.options.settings, bench.options.device
    loops = {f"straightforward, {settings[0].name}": (settings[0], bench.straightforward(settings[0]))}
    loops |= {f"batched, {setting.name}": (setting, bench.batched(setting)) for setting in settings}
    variants = {name: (lambda loop=loop: loop(job)) for name, (_, loop) in loops.items()}
    timings = interleave(variants, bench.options.repeats, device)
    # Memory in a pass of its own: watching it, the first pass of a loop would be slower.
    return tuple(
        LoopRun(name, setting, timings[name], memory_of(variants[name], device)) for name, (setting, _) in loops.items()
    )


def compare(runs: Sequence[LoopRun], num_images: int, num_forwards: int, roof: Roof) -> tuple[LoopResult, ...]:
    """Puts measurements into relation.

    Args:
        runs: The runs, the straightforward one first.
        num_images: Pictures of a run.
        num_forwards: Transformer forwards of a run, in rows.
        roof: Cost of a forward, and peaks.

    Returns:
        A result for each.
    """
    return tuple(
        LoopResult(
            name=run.name,
            timing=run.timing,
            memory=run.memory,
            images_per_second=num_images / run.timing.median,
            forwards_per_second=num_forwards / run.timing.median,
            speedup=run.timing.speedup_over(runs[0].timing),
            peak_share=roof.share(num_forwards / run.timing.median, run.setting.products),
        )
        for run in runs
    )
