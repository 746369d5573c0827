"""The benchmark's command: `python -m calibri_lightning bench`."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from calibri_lightning.bench.comparison import compare, run_loops
from calibri_lightning.bench.growth import measure_growth
from calibri_lightning.bench.models import twin
from calibri_lightning.bench.options import Options, parse
from calibri_lightning.bench.order import check_order
from calibri_lightning.bench.overhead import measure_overhead
from calibri_lightning.bench.parts import measure_parts
from calibri_lightning.bench.plot import plot_growth
from calibri_lightning.bench.processes import available_cores, measure_processes
from calibri_lightning.bench.report import Report
from calibri_lightning.bench.roofline import Roof, flops_per_row, measure_peaks
from calibri_lightning.bench.scaling_options import Scaling
from calibri_lightning.bench.scaling_plot import plot_scaling
from calibri_lightning.bench.scaling_report import CUTS, ScalingReport
from calibri_lightning.bench.simulation import Work, simulate
from calibri_lightning.bench.training import measure_training
from calibri_lightning.bench.training_report import TrainingReport
from calibri_lightning.bench.workbench import Workbench
from calibri_lightning.commandline import exit_code
from calibri_lightning.errors import UserError
from calibri_lightning.quiet import hide_progress_bars


def run(arguments: Sequence[str]) -> int:
    """Runs the benchmark and prints its report.

    Args:
        arguments: Options.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    return exit_code(lambda: _bench(arguments))


def _bench(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    hide_progress_bars()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report = _measured(options, shlex.join(["calibri_lightning", "bench", *arguments]))
    if options.out is not None:
        report.write(options.out)
        if isinstance(report, Report) and report.growth:
            subtitle = f"{report.model}\n{report.machine}"
            plot_growth(options.out.with_suffix(".png"), report.growth, "A generation over its size", subtitle)
        if isinstance(report, ScalingReport):
            plot_scaling(options.out.with_suffix(".png"), report)
    print(report.render())


def _measured(options: Options, command: str) -> Report | TrainingReport | ScalingReport:
    if options.scaling is not None:
        return measure_scaling(options, options.scaling, command)
    try:
        return measure_steps(options, command) if options.train else measure(options, command)
    except torch.OutOfMemoryError as error:
        raise _memory_is_full(error) from error
    except UserError as error:
        # A strategy's own message names settings of a run, which are no options of this command.
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise _memory_is_full(error.__cause__) from error
        raise


def _memory_is_full(error: torch.OutOfMemoryError) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"The device's memory is full ({reason}). Lower --rows, --resolution or --layers.")


def measure(options: Options, command: str) -> Report:
    """Measures everything.

    Args:
        options: What to measure.
        command: For the report.

    Returns:
        The report.
    """
    bench = Workbench(options)
    first, job, device = options.settings[0], bench.job(options.popsize), options.device
    plain, dtypes = bench.plain(first), [setting.products for setting in options.settings]
    peaks = measure_peaks(device, dtypes)
    with first.active(device):
        overhead = measure_overhead(plain, bench.layout, options.rows, options.forward_repeats)
        parts = measure_parts(twin(plain), bench.layout, bench.rewards, job, options.rows, options.repeats)
    runs = run_loops(bench, job)
    # Once more, and the higher counts: a slow moment would lower the roof.
    peaks = {dtype: max(peak, peaks[dtype]) for dtype, peak in measure_peaks(device, dtypes).items()}
    roof = Roof(flops_per_row(plain), peaks)
    straightforward, batched = runs[0].timing.median, runs[1].timing.median
    return Report(
        date=_now(),
        command=command,
        machine=_describe_machine(device),
        model=_describe_model(bench),
        job=_describe_job(bench),
        roof=roof,
        loops=compare(runs, job.num_images, job.num_forwards(bench.layout), roof),
        overhead=overhead,
        forward_peak_share=roof.share(options.rows / overhead.plain_seconds, first.products),
        scoring_share=parts.score * job.num_images / batched,
        decoding_share=parts.decode * job.num_images / batched,
        encoding_share=parts.encode * options.popsize / straightforward,
        order=check_order(bench, options.settings) if options.order else (),
        growth=measure_growth(bench, first, options.popsizes, options.repeats) if options.popsizes else (),
    )


def measure_steps(options: Options, command: str) -> TrainingReport:
    """Measures training.

    Args:
        options: What to measure.
        command: For the report.

    Returns:
        The report.
    """
    bench = Workbench(options)
    steps, passes = measure_training(bench)
    job = (
        f"{options.num_groups} prompts x {options.group_size} pictures, {options.num_steps} steps, "
        f"{options.settings[0].name}, {options.rows} rows a forward at most, {options.repeats} repetitions"
    )
    return TrainingReport(
        _now(), command, _describe_machine(options.device), _describe_model(bench), job, steps, passes
    )


def measure_scaling(options: Options, scaling: Scaling, command: str) -> ScalingReport:
    """Simulates many ranks and runs few.

    Args:
        options: Model and work.
        scaling: Numbers of ranks, and what a simulated picture takes.
        command: For the report.

    Returns:
        The report.
    """
    members = 2 if options.members == "cfg" else 1
    work = Work(options.popsize, options.bucket, options.rows // members)
    # Read before anything runs: what else the machine does then.
    load = os.getloadavg()[0]
    return ScalingReport(
        date=_now(),
        command=command,
        machine=f"{_describe_machine(options.device)}, {available_cores()} core(s), load average {load:.2f} before",
        work=work,
        cost=scaling.cost,
        simulated={
            name: tuple(simulate(work, scaling.cost, ranks, over or ranks) for ranks in scaling.ranks)
            for name, over in CUTS.items()
        },
        model=f"{options.model}, {options.num_steps} steps, {members} member(s)",
        cores=available_cores(),
        processes=measure_processes(options, scaling.processes) if scaling.processes else (),
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _describe_machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} thread(s), {versions}"


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _describe_model(bench: Workbench) -> str:
    backbone = bench.plain(bench.options.settings[0])
    size = sum(parameter.numel() for parameter in backbone.transformer.parameters()) / 1e6
    height, width = backbone.image_size
    return (
        f"{bench.options.model}: {size:,.1f} M parameters, {len(bench.layout.sites)} sites, {height} x {width} pixels"
    )


def _describe_job(bench: Workbench) -> str:
    options = bench.options
    return (
        f"{options.popsize} candidates x {options.bucket} prompts, {options.num_steps} steps, "
        f"{len(bench.layout.members)} member(s), {options.rows} rows a forward, {options.repeats} repetitions"
    )
