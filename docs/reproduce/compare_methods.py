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

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.figure import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PAPER,
    apart,
    heading,
    quiet,
    save,
)
from calibri_lightning.evaluation.files import from_json
from calibri_lightning.evaluation.summary import Summary
from calibri_lightning.evaluation.text import format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
Row = Mapping[str, str]

CURRENT, AVERAGES = ("mean", "policy"), ("tail", "ema")
"""What strategies call where they are, and the moving average of that."""
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart with any colour blindness (Okabe and Ito 2008)."""
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
class Curve:
    """Validation scores of one kind over what training had cost by then."""

    images: Floats
    """Training pictures."""
    forwards: Floats
    """Forwards of one row in training; a backward counts as one more."""
    scores: Floats


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    label: str
    folder: Path
    current: Curve
    """Where the run was: the search's mean, or the policy; from its start on."""
    average: Curve
    """The moving average of that."""
    images: float
    """Training pictures of the whole run."""
    forwards: float
    """Training forwards of the whole run."""
    summary: Summary | None
    """Its test; None if it was not tested."""

    @property
    def start(self) -> float:
        """Validation score of what the run started from."""
        return float(self.current.scores[0])


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


def read_run(label: str, folder: Path) -> Run:
    """Reads metrics.csv and summary.json of a run.

    Args:
        label: What to call it.
        folder: Its folder, which holds both.

    Returns:
        The run.

    Raises:
        UserError: If there are no metrics, or no validation of the start.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{label}: {path} does not exist. Give the folder of a run, such as runs/name/version_0.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row.get("train/images")]
    starts = [float(row["val/start"]) for row in rows if row.get("val/start")]
    if not trained or not starts:
        raise UserError(f"{label}: {path} has no training step or no val/start. The run needs data.val, and to go on.")
    images, forwards = training_costs(label, trained)
    done = np.cumsum([bool(row.get("train/images")) for row in rows])
    costs = [np.concatenate([[0.0], column]) for column in (images, forwards)]

    def curve(names: Sequence[str], first: Sequence[float]) -> Curve:
        # A validation belongs to the training step that was logged last before it.
        found = [(done[i], float(row[f"val/{n}"])) for i, row in enumerate(rows) for n in names if row.get(f"val/{n}")]
        steps = [0] * len(first) + [int(step) for step, _ in found]
        scores = np.array([*first, *(score for _, score in found)])
        return Curve(costs[0][steps], costs[1][steps], scores)

    summary = folder / "summary.json"
    return Run(
        label,
        folder,
        curve(CURRENT, starts[:1]),
        curve(AVERAGES, ()),
        float(images[-1]),
        float(forwards[-1]),
        from_json(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    )


def training_costs(label: str, rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """Takes validation out of a run's budget.

    `train/images` counts training pictures alone. `budget/*` counts those of validations, too, in the first step that
    is logged after them: there the forwards are taken to be as many a training picture as in the nearest other step.

    Args:
        label: Name of the run.
        rows: The metrics of each training step.

    Returns:
        Training pictures and training forwards up to the end of each step.

    Raises:
        UserError: If every step follows a validation.
    """
    trained, spent, forwards = (
        np.diff([float(row[name]) for row in rows], prepend=0.0)
        for name in ("train/images", "budget/images", "budget/forwards")
    )
    # Numbers are logged in float32.
    clean = np.flatnonzero((trained > 0) & (np.abs(spent - trained) <= 1e-6 * np.cumsum(spent) + 0.5))
    if not len(clean):
        raise UserError(
            f"{label}: every step follows a validation, so that what training alone cost in forwards is unknown. "
            "Validate less often (trainer.val_check_interval)."
        )
    per_image = forwards[clean] / trained[clean]
    nearest = np.abs(np.arange(len(rows))[:, None] - clean).argmin(axis=1)
    return np.cumsum(trained), np.cumsum(trained * per_image[nearest])


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
                    *(run.label, str(run.folder), condition.name, condition.num_forwards_per_image, reward),
                    *(mean.mean, mean.low, mean.high, gain.mean, gain.low, gain.high),
                    *(vendi.mean, vendi.low, vendi.high),
                    diversity.pixel_distance.mean if diversity is not None else math.nan,
                    *(run.images, run.forwards),
                    *(summary.budget.images, summary.budget.forwards, summary.budget.device_seconds),
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


def over_seeds(curves: Sequence[Curve]) -> list[Curve]:
    """Averages runs that were validated at the same cost; others stay apart.

    Args:
        curves: One or more.

    Returns:
        Their mean, or all of them.
    """
    first = curves[0]
    if any(not np.array_equal(first.images, curve.images) for curve in curves):
        return list(curves)
    forwards, scores = (np.mean([getattr(curve, name) for curve in curves], axis=0) for name in ("forwards", "scores"))
    return [Curve(first.images, forwards, scores)]


def _frame(axes: Axes, longest: float) -> None:
    quiet(axes)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.03 * longest)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


def short(count: float) -> str:
    """Writes a count for an axis.

    Args:
        count: At least 0.

    Returns:
        Such as 500, 2.5k or 1M.
    """
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


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
        runs = parse_runs(options.runs)
        bases = [run.start for run in runs if run.label == (options.base or runs[0].label)]
        if not bases:
            raise UserError(f"--base is {options.base!r}; it must be one of the labels {[run.label for run in runs]}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(options.out.with_suffix(".png"), runs, sum(bases) / len(bases), options.title)
    rows = tests(runs)
    write_csv(options.out.with_suffix(".csv"), rows)
    print(render(rows))
    for run in (run for run in runs if run.summary is None):
        print(f"{run.label}: not tested, for {run.folder} has no summary.json")
    for run in (run for run in runs if all(abs(run.start - base) > SAME for base in bases)):
        known = ", ".join(f"{base:.4f}" for base in bases)
        print(f"{run.label}: starts from {run.start:.4f} on its validation prompts, and the base from {known}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
