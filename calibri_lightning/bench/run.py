"""The benchmark's command: `python -m calibri_lightning bench`."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from calibri_lightning.backbones import Backbone
from calibri_lightning.backbones.compiling import compile_blocks
from calibri_lightning.backbones.loading import DType
from calibri_lightning.bench.loops import Job, batched, flops_per_row, spearman, straightforward
from calibri_lightning.bench.measure import Timing, interleave, matmul_peak
from calibri_lightning.bench.models import MODELS, build
from calibri_lightning.bench.report import LoopResult, Report
from calibri_lightning.calibration import Layout, attach, build_layout, find_sites, fold
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.shapes.captions import prompts as shapes_prompts

SPREAD = 0.1
"""Standard deviation of the candidates around the start."""
ORDERED_CANDIDATES = 64
"""Candidates whose order under lower precision is checked."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    model: str
    dtypes: tuple[DType, ...]
    compiled: bool
    num_layers: int | None
    resolution: int
    popsize: int
    bucket: int
    num_steps: int
    rows: int
    repeats: int
    order: bool
    device: torch.device
    out: Path | None


def run(arguments: Sequence[str]) -> int:
    """Runs the benchmark and prints its report.

    Args:
        arguments: Options.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    try:
        print(Bench(_parse(arguments)).run().render())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Bench:
    """A benchmark: its models, its job, its measurements.

    Args:
        options: The command line.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, options.device
        self.rewards = RewardSet({"shapes" if options.model == "shapes" else "jpeg_compressibility": 1.0})
        self.models = {dtype: self._build(dtype) for dtype in options.dtypes}
        base = self.models[options.dtypes[0]]
        self.layout = self._layout(base)
        self.job = self._job(options.popsize)

    def run(self) -> Report:
        """Measures everything.

        Returns:
            The report.
        """
        options, base = self.options, self.models[self.options.dtypes[0]]
        cost = flops_per_row(base)
        overheads = self._overheads(base)
        loops = self._loops()
        timings = interleave(loops, options.repeats, self.device)
        peaks = {dtype: matmul_peak(self.device, getattr(torch, dtype)) for dtype in options.dtypes}
        results = tuple(self._result(name, timings, cost, peaks) for name in timings)
        fast = results[1]
        report = Report(
            machine=_machine(self.device),
            model=f"{options.model}: {sum(p.numel() for p in base.transformer.parameters()) / 1e6:,.1f} M parameters, "
            f"{len(self.layout.sites)} sites, {base.image_size[0]} x {base.image_size[1]} pixels",
            job=f"{options.popsize} candidates x {options.bucket} prompts, {options.num_steps} steps, "
            f"{len(self.layout.members)} members, {options.rows} rows a forward, {options.repeats} repetitions",
            flops_per_row=cost,
            peaks=peaks,
            loops=results,
            hooks_overhead=overheads[0],
            fold_overhead=overheads[1],
            scoring_share=self._scoring_seconds(base) * self.job.num_images / fast.timing.median,
            rank_correlation=self._order() if options.order else None,
        )
        if options.out is not None:
            report.write(options.out)
        return report

    def _build(self, dtype: DType) -> Backbone:
        options = self.options
        return build(options.model, dtype, self.device, options.num_layers, options.resolution)

    def _layout(self, backbone: Backbone) -> Layout:
        return build_layout(find_sites(backbone.transformer), "gate", "cfg", 4.0, "guidance")

    def _job(self, popsize: int) -> Job:
        known = shapes_prompts("val")
        prompts = tuple(known[i % len(known)] for i in range(self.options.bucket))
        seeds = tuple(noise_seed(0, 0, prompt.index, number) for number, prompt in enumerate(prompts))
        draw = np.random.Generator(np.random.Philox(0)).standard_normal((popsize, self.layout.num_parameters))
        thetas = np.clip(self.layout.start + SPREAD * draw, self.layout.lower, self.layout.upper)
        return Job(thetas, prompts, seeds, self.options.num_steps)

    def _loops(self) -> dict[str, Callable[[], object]]:
        """The straightforward loop in the first dtype, and the batched one in each, compiled too if asked for."""
        first = self._build(self.options.dtypes[0])
        loops: dict[str, Callable[[], object]] = {
            f"straightforward {self.options.dtypes[0]}": lambda: straightforward(
                first, self.layout, self.rewards, self.job
            )
        }
        for dtype, model in self.models.items():
            loops[f"batched {dtype}"] = self._batched(model)
            if self.options.compiled:
                compiled = self._build(dtype)
                loops[f"batched {dtype} compiled"] = self._batched(compiled)
                compile_blocks(compiled.transformer)
        return loops

    def _batched(self, model: Backbone) -> Callable[[], NDArray[np.float64]]:
        attachment = attach(model.transformer, self.layout.sites)
        return lambda: batched(model, attachment, self.layout, self.rewards, self.job, self.options.rows)

    def _result(self, name: str, timings: dict[str, Timing], cost: float, peaks: dict[str, float]) -> LoopResult:
        timing, first = timings[name], next(iter(timings.values()))
        forwards = self.job.num_forwards(self.layout) / timing.median
        return LoopResult(
            name,
            timing,
            self.job.num_images / timing.median,
            forwards,
            timing.speedup_over(first),
            forwards * cost / peaks[name.split()[1]],
        )

    @torch.no_grad()
    def _overheads(self, plain: Backbone) -> tuple[float, float]:
        """What attached and folded scales add to a forward."""
        hooked, folded = self._build(self.options.dtypes[0]), self._build(self.options.dtypes[0])
        rows = self.options.rows
        scales = 1 + SPREAD * torch.randn(len(self.layout.sites), generator=torch.Generator().manual_seed(0))
        fold(folded.transformer, self.layout.sites, scales)
        attachment = attach(hooked.transformer, self.layout.sites)
        attachment.set_rows(scales.expand(rows, -1))
        x, seen = plain.noise(range(rows)), plain.encode([""] * rows)
        sigma = plain.schedule(2)[1].to(x).expand(rows)
        models = {"plain": plain, "hooked": hooked, "folded": folded}
        variants = {name: (lambda model=model: model.velocity(x, sigma, seen)) for name, model in models.items()}
        timings = interleave(variants, 4 * self.options.repeats, self.device)
        return tuple(1 / timings[name].speedup_over(timings["plain"]) - 1 for name in ("hooked", "folded"))  # type: ignore[return-value]

    def _scoring_seconds(self, backbone: Backbone) -> float:
        """Seconds that the rewards take for one picture."""
        count = min(16, self.options.bucket)
        images = torch.rand(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0)).to(self.device)
        prompts: tuple[Prompt, ...] = self.job.prompts[:count]
        self.rewards.score(images, prompts)
        started = time.perf_counter()
        self.rewards.score(images, prompts)
        return (time.perf_counter() - started) / count

    def _order(self) -> float:
        """Rank correlation of the candidates' mean rewards in the first and the last dtype."""
        if len(self.models) < 2:
            raise UserError("--order compares precisions; give two, such as --dtypes float32 bfloat16.")
        job = self._job(ORDERED_CANDIDATES)
        means = []
        for dtype in (self.options.dtypes[0], self.options.dtypes[-1]):
            model = self._build(dtype)
            attachment = attach(model.transformer, self.layout.sites)
            means.append(batched(model, attachment, self.layout, self.rewards, job, self.options.rows).mean(axis=1))
        return spearman(*means)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="calibri_lightning bench", description=__doc__)
    add = parser.add_argument
    add("--model", default="shapes", help=f"one of {', '.join(MODELS)}; all but shapes have random weights")
    add("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="precisions of the loops")
    add("--compile", action="store_true", help="also measure with compiled blocks")
    add("--layers", type=int, help="blocks of a random model; default as released")
    add("--resolution", type=int, default=512, help="of a random model, pixels; default 512")
    add("--popsize", type=int, default=16, help="candidates; default 16")
    add("--bucket", type=int, default=16, help="prompts; default 16")
    add("--steps", type=int, default=8, help="sampling steps; default 8")
    add("--rows", type=int, default=128, help="most rows of one forward; default 128")
    add("--repeats", type=int, default=3, help="interleaved repetitions; default 3")
    add(
        "--order", action="store_true", help=f"check the order of {ORDERED_CANDIDATES} candidates in the last precision"
    )
    add("--threads", type=int, help="CPU threads; default torch's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default cuda where there is one")
    add("--out", type=Path, help="write the report as JSON")
    given = parser.parse_args(list(arguments))
    for name in ("popsize", "bucket", "steps", "repeats"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}; it must be at least 1.")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    dtypes = cast(tuple[DType, ...], tuple(dict.fromkeys(given.dtypes)))
    return Options(
        given.model,
        dtypes,
        given.compile,
        given.layers,
        given.resolution,
        given.popsize,
        given.bucket,
        given.steps,
        given.rows,
        given.repeats,
        given.order,
        torch.device(given.device),
        given.out,
    )
