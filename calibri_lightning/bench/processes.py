"""Real processes of one thread each that share a generation over gloo, as the ranks of a run do."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import distributed, multiprocessing

from calibri_lightning.arrays import Floats
from calibri_lightning.bench.measure import Spread, Timing
from calibri_lightning.bench.workbench import Workbench
from calibri_lightning.calibration import attach
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.grid import UnitResult

if TYPE_CHECKING:
    from calibri_lightning.bench.options import Options

QUIET = 0.97
"""Share of its time in which a process must have a core to count as undisturbed."""


@dataclass(frozen=True)
class _Pass:
    """One rank's part of one generation."""

    world_size: int
    rank: int
    seconds: float
    """From the start that all ranks wait for to the end, which they reach together."""
    busy_seconds: float
    """Until its own units were done."""
    cpu_seconds: float
    """Of these, those in which it had a core."""
    num_pictures: int
    rewards: str
    """Digest of the rewards of all pictures."""


@dataclass(frozen=True)
class Processes:
    """A number of processes, as measured."""

    world_size: int
    timing: Timing
    images_per_second: float
    """At the median time."""
    speedup: Spread
    """Over the fewest processes, inside each repetition."""
    idle_share: Spread
    """Share of the time of all processes in which they waited for the slowest."""
    core_shares: tuple[float, ...]
    """Of each repetition, share of its busy time in which a process had a core, of the one with the least: 1 where
    nothing else runs and there are cores enough."""
    num_quiet: int
    """Repetitions in which every process of this number and of the fewest had a core all the time."""
    quiet_speedup: Spread | None
    """The speed-up in these; None where there are none."""
    cpu_speedup: Spread
    """By the CPU time of the process that took the most: the speed-up with a free core for each, waiting apart."""
    loads: tuple[int, ...]
    """Pictures of each."""


def available_cores() -> int:
    """Counts the cores that this process may use.

    Returns:
        Their number.
    """
    return len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1


def balance(world_sizes: Sequence[int]) -> int:
    """The `balance_over` that suits all of these numbers of processes, so that all of them draw the same units.

    Args:
        world_sizes: The numbers.

    Returns:
        Their least common multiple.
    """
    return lcm(*world_sizes)


def measure_processes(options: Options, world_sizes: Sequence[int]) -> tuple[Processes, ...]:
    """Times one and the same generation on several numbers of processes, which take turns.

    Args:
        options: Model and work.
        world_sizes: Numbers of processes, rising.

    Returns:
        A result for each.

    Raises:
        UserError: If a process ends early, or the rewards depend on the number of processes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            # Fresh processes: a fork would share the threads of torch, which is not safe.
            arguments = (max(world_sizes), folder, replace(options, threads=1), tuple(world_sizes))
            multiprocessing.start_processes(_work, arguments, nprocs=max(world_sizes), start_method="spawn")
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"A process of the benchmark ended early ({reason}). Try fewer --processes.") from error
        passes = [
            _Pass(**one) for path in sorted(folder.glob("rank*.json")) for one in json.loads(path.read_text("utf-8"))
        ]
    return _summarised(passes, world_sizes, options.popsize * options.bucket)


def _summarised(passes: Sequence[_Pass], world_sizes: Sequence[int], num_images: int) -> tuple[Processes, ...]:
    if len({one.rewards for one in passes}) != 1:
        raise UserError("The rewards depend on the number of processes, which they must not. Report this as a bug.")
    timings, idle, cores, cpu, loads = {}, {}, {}, {}, {}
    for world_size in world_sizes:
        by_rank = [[one for one in passes if (one.world_size, one.rank) == (world_size, r)] for r in range(world_size)]
        timings[world_size] = Timing(tuple(one.seconds for one in by_rank[0]))
        busy = np.array([[one.busy_seconds for one in rank] for rank in by_rank])
        idle[world_size] = Spread.of((1 - busy.mean(axis=0) / busy.max(axis=0)).tolist())
        used = np.array([[one.cpu_seconds for one in rank] for rank in by_rank])
        cores[world_size], cpu[world_size] = (used / busy).min(axis=0), used.max(axis=0)
        loads[world_size] = tuple(rank[0].num_pictures for rank in by_rank)
    fewest, found = world_sizes[0], []
    for w in world_sizes:
        quiet = np.flatnonzero(np.minimum(cores[fewest], cores[w]) >= QUIET)
        ratios = np.array(timings[fewest].seconds)[quiet] / np.array(timings[w].seconds)[quiet]
        found.append(
            Processes(
                world_size=w,
                timing=timings[w],
                images_per_second=num_images / timings[w].median,
                speedup=timings[w].speedup_over(timings[fewest]),
                idle_share=idle[w],
                core_shares=tuple(cores[w].tolist()),
                num_quiet=len(quiet),
                quiet_speedup=Spread.of(ratios.tolist()) if len(quiet) else None,
                cpu_speedup=Spread.of((cpu[fewest] / cpu[w]).tolist()),
                loads=loads[w],
            )
        )
    return tuple(found)


def _work(rank: int, count: int, folder: Path, options: Options, world_sizes: tuple[int, ...]) -> None:
    """What a process does: its part of every generation, and nothing while fewer processes take their turn."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    groups = {world_size: distributed.new_group(list(range(world_size))) for world_size in world_sizes}
    evaluator, workbench = _evaluator(options, balance(world_sizes))
    passes: list[_Pass] = []
    # Once uncounted; and each round begins with another number, lest one always follow the same neighbour.
    for number in range(1 + options.repeats):
        first = number % len(world_sizes)
        for world_size in world_sizes[first:] + world_sizes[:first]:
            distributed.barrier()
            if rank < world_size:
                made = _timed(evaluator, workbench, rank, world_size, groups[world_size])
                passes += [made] if number else []
    (folder / f"rank{rank}.json").write_text(json.dumps([asdict(one) for one in passes]), "utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _evaluator(options: Options, balance_over: int) -> tuple[Evaluator, Workbench]:
    workbench = Workbench(options)
    backbone, layout = workbench.plain(options.settings[0]), workbench.layout
    attachment = attach(backbone.transformer, layout.sites)
    # Scoring in a second thread would give one process the work of two.
    made = Evaluator(backbone, attachment, layout, workbench.rewards, options.rows, False, balance_over)
    return made, workbench


def _timed(
    evaluator: Evaluator, bench: Workbench, rank: int, world_size: int, group: distributed.ProcessGroup
) -> _Pass:
    job, units = bench.job(bench.options.popsize), list[UnitResult]()
    done: tuple[float, float] | None = None

    def gather(packed: Floats) -> list[Floats]:
        nonlocal done
        done = time.perf_counter(), time.process_time()
        parts = [torch.empty(len(packed), dtype=torch.float64) for _ in range(world_size)]
        distributed.all_gather(parts, torch.from_numpy(packed), group=group)
        return [cast("Floats", part.numpy()) for part in parts]

    distributed.barrier(group=group)
    started, cpu_started = time.perf_counter(), time.process_time()
    answer = evaluator.evaluate(
        job.thetas, job.prompts, job.seeds, job.num_steps, None, rank, world_size, gather, units.append
    )
    ended = time.perf_counter(), time.process_time()
    # One process alone has nobody to tell.
    busy_until, cpu_until = done or ended
    return _Pass(
        world_size,
        rank,
        seconds=ended[0] - started,
        busy_seconds=busy_until - started,
        cpu_seconds=cpu_until - cpu_started,
        num_pictures=sum(len(unit.cells) for unit in units),
        rewards=hashlib.sha256(answer.rewards.tobytes()).hexdigest(),
    )
