"""Compares finished runs: validation reward over what training cost, and the test results side by side.

    python docs/reproduce/compare_methods.py "CMA-ES=runs/cma/version_0" "Flow-GRPO=runs/grpo/version_0" --out compare

Each argument is LABEL=FOLDER of a run; runs of one label (seeds) share a colour. Writes OUT.png and, from the runs'
tests, OUT.csv, and prints the latter as a table. Costs are those of training: `budget/*` of a run's metrics counts
validation, too, which follows from how often a run validates and not from its method, so it is taken out.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.figure import (
    DPI,
    FAINT,
    GRID,
    INK,
    PAPER,
    apart,
    heading,
    quiet,
    save,
)
from calibri_lightning.evaluation.summary import Summary
from calibri_lightning.evaluation.text import format_interval
from calibri_lightning.tools.compare.history import Run, over_seeds, read_run
from calibri_lightning.tools.compare.plots import COLOURS, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURRENT_STYLE: Mapping[str, Any] = {
    "linewidth": 1.8,
    "markersize": 4,
    "markeredgewidth": 0,
    "clip_on": False,
    "zorder": 3,
}
WIDTH, HEIGHT = 8.0, 4.0
LEFT, RIGHT, BOTTOM, TALL, WIDE = 0.075, 0.475, 0.125, 0.7, 0.36
"""Of the axes, as shares of the figure."""
SAME = 1e-4
"""Validation scores that differ by less are of one model: the last bits follow from how rows were batched."""
LABEL_CHARACTERS = 22
"""What fits beside the right panel."""


@dataclass(frozen=True)
class TestRow:
    """One condition of one run's test, in one reward."""

    run: str
    folder: str
    condition: str
    nfe: int
    reward: str
    mean: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    vendi: float
    vendi_low: float
    vendi_high: float
    pixel_distance: float
    train_images: float
    train_forwards: float
    budget_images: int
    budget_forwards: int
    device_seconds: float


def tests(runs: Sequence[Run]) -> list[TestRow]:
    """Lists the test results of all runs that were tested.

    Args:
        runs: The runs.

    Returns:
        A row for each run, condition and reward; gains are over the base of equal NFE, NaN for the base itself.
    """
    return [row for run in runs if run.summary is not None for row in _tests(run, run.summary)]


def _tests(run: Run, summary: Summary) -> list[TestRow]:
    none = Interval(math.nan, math.nan, math.nan, 0)
    rows = []
    for number, (condition, means) in enumerate(zip(summary.conditions, summary.means, strict=True)):
        diversity = summary.diversity[number] if summary.diversity else None
        vendi = diversity.vendi if diversity is not None else none
        for reward, mean in means.items():
            compared = summary.compared("equal NFE", reward)
            gain = next((c.difference for c in compared if c.calibrated == condition.name), none)
            rows.append(
                TestRow(
                    run=run.label,
                    folder=str(run.folder),
                    condition=condition.name,
                    nfe=condition.num_forwards_per_image,
                    reward=reward,
                    mean=mean.mean,
                    low=mean.low,
                    high=mean.high,
                    gain=gain.mean,
                    gain_low=gain.low,
                    gain_high=gain.high,
                    vendi=vendi.mean,
                    vendi_low=vendi.low,
                    vendi_high=vendi.high,
                    pixel_distance=diversity.pixel_distance.mean if diversity is not None else math.nan,
                    train_images=run.images,
                    train_forwards=run.forwards,
                    budget_images=summary.budget.images,
                    budget_forwards=summary.budget.forwards,
                    device_seconds=summary.budget.device_seconds,
                )
            )
    return rows


def write_csv(path: Path, rows: Sequence[TestRow]) -> None:
    """Writes the test results; what is unknown stays empty.

    Args:
        path: The file.
        rows: The results.
    """
    names = [field.name for field in fields(TestRow)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = [getattr(row, name) for name in names]
            writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in values])


def render(rows: Sequence[TestRow]) -> str:
    """Lays the test results out for a terminal.

    Args:
        rows: The results.

    Returns:
        A line for each run, condition and reward.
    """
    head = ("run", "condition", "NFE", "reward", "mean [95%]", "over the base [95%]", "Vendi [95%]")
    cells = [(*head, "training images", "training forwards", "device s")]
    for row in rows:
        mean, gain, vendi = (
            Interval(value, low, high, 0)
            for value, low, high in (
                (row.mean, row.low, row.high),
                (row.gain, row.gain_low, row.gain_high),
                (row.vendi, row.vendi_low, row.vendi_high),
            )
        )
        cells.append(
            (
                *(row.run, row.condition, str(row.nfe), row.reward, format_interval(mean)),
                "" if math.isnan(gain.mean) else format_interval(gain, signed=True),
                "" if math.isnan(vendi.mean) else format_interval(vendi, places=2),
                *(f"{row.train_images:,.0f}", f"{row.train_forwards:,.0f}", f"{row.device_seconds:,.0f}"),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def draw(path: Path, runs: Sequence[Run], base: float, title: str) -> None:
    """Draws validation reward over training images and over training forwards, as a PNG of 1200 pixels' width.

    Args:
        path: The PNG to write.
        runs: The runs.
        base: Validation score of the base.
        title: Heading.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=PAPER)
    reward = next((run.summary.reward for run in runs if run.summary is not None), "reward")
    labels = list(dict.fromkeys(run.label for run in runs))
    seeds = ", mean over seeds" if len(labels) < len(runs) else ""
    subtitle = f"{reward} on held-out prompts · thick: where the run is{seeds} · thin: its moving average"
    heading(figure, title, subtitle, WIDTH, HEIGHT)
    images = figure.add_axes((LEFT, BOTTOM, WIDE, TALL))
    forwards = figure.add_axes((RIGHT, BOTTOM, WIDE, TALL), sharey=images)
    colours = dict(zip(labels, COLOURS, strict=False))
    for axes, cost in ((images, "images"), (forwards, "forwards")):
        axes.axhline(base, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for label, colour in colours.items():
            own = [run for run in runs if run.label == label]
            for curve in over_seeds([run.average for run in own]):
                axes.plot(getattr(curve, cost), curve.scores, color=colour, lw=0.9, alpha=0.75)
            for curve in over_seeds([run.current for run in own]):
                axes.plot(getattr(curve, cost), curve.scores, "-o", color=colour, **CURRENT_STYLE)
        _frame(axes, max(float(getattr(run, cost)) for run in runs))
    images.set_xlabel("training images, without validation", size=7.5, color=INK)
    forwards.set_xlabel("training forwards and backwards, without validation", size=7.5, color=INK)
    images.margins(y=0.1)
    forwards.tick_params(labelleft=False)
    _label(forwards, runs, colours, base)
    save(figure, path)


def _frame(axes: Axes, longest: float) -> None:
    quiet(axes)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.03 * longest)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _label(axes: Axes, runs: Sequence[Run], colours: Mapping[str, str], base: float) -> None:
    """Names at the right, at the heights where the lines end."""
    low, high = axes.get_ylim()
    ends = [(base, "base", FAINT)]
    for label, colour in colours.items():
        last = [float(run.current.scores[-1]) for run in runs if run.label == label]
        ends.append((sum(last) / len(last), textwrap.fill(label, LABEL_CHARACTERS), colour))
    for y, name, colour in apart(ends, 0.065 * (high - low)):
        place = (y - low) / (high - low)
        axes.text(1.03, place, name, transform=axes.transAxes, size=8, color=colour, va="center")


def parse_runs(arguments: Sequence[str]) -> list[Run]:
    """Reads the runs that a command names.

    Args:
        arguments: LABEL=FOLDER each.

    Returns:
        The runs.

    Raises:
        UserError: If one is not of that form, or there are more labels than colours.
    """
    pairs = [argument.partition("=") for argument in arguments]
    for argument, (label, _, folder) in zip(arguments, pairs, strict=True):
        if not (label and folder):
            raise UserError(f"{argument!r} is not of the form LABEL=FOLDER, such as CMA-ES=runs/cma/version_0.")
    labels = {label for label, _, _ in pairs}
    if len(labels) > len(COLOURS):
        raise UserError(f"{len(labels)} labels are given, and {len(COLOURS)} colours can be told apart. Draw fewer.")
    return [read_run(label, Path(folder)) for label, _, folder in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the runs, draws the figure, writes and prints the table.

    Args:
        arguments: The command line's by default.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--base", metavar="LABEL", help="the runs that start from the base (default: the first's)")
    parser.add_argument("--title", default="Reward over the cost of training")
    parser.add_argument("--out", type=Path, default=Path("compare_methods"), help="files to write, without ending")
    options = parser.parse_args(arguments)
    try:
        if not options.out.parent.is_dir():
            raise UserError(f"--out is {options.out}; the folder {options.out.parent} does not exist. Make it first.")
        runs = parse_runs(options.runs)
        bases = [run.start for run in runs if run.label == (options.base or runs[0].label)]
        if not bases:
            raise UserError(f"--base is {options.base!r}; it must be one of the labels {[run.label for run in runs]}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(Path(f"{options.out}.png"), runs, sum(bases) / len(bases), options.title)
    rows = tests(runs)
    write_csv(Path(f"{options.out}.csv"), rows)
    print(render(rows))
    for run in (run for run in runs if run.summary is None):
        print(f"{run.label}: not tested, for {run.folder} has no summary.json")
    for run in (run for run in runs if all(abs(run.start - base) > SAME for base in bases)):
        known = ", ".join(f"{base:.4f}" for base in bases)
        print(f"{run.label}: starts from {run.start:.4f} on its validation prompts, and the base from {known}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
