"""The picture of idle shares and seconds over the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from calibri_lightning.bench.scaling_report import CUTS, EACH, ScalingReport
from calibri_lightning.evaluation.figure import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    GRID,
    ORANGE,
    PAPER,
    apart,
    heading,
    quiet,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 8.4, 3.5
_IDLE, _SECONDS = (0.06, 0.14, 0.33, 0.55), (0.47, 0.14, 0.33, 0.55)
"""Left, bottom, width and height of the axes, as shares of the figure."""
_COLOURS = dict(zip(CUTS, (BLUE, GREEN, ORANGE), strict=True))
_NAMES = {EACH: "the number of ranks", "24": "24, the shipped files", "1": "1, full units"}
_MOST_TICKS = 6


def plot_scaling(path: Path, report: ScalingReport) -> None:
    """Draws the simulated ranks, as a PNG.

    Args:
        path: The PNG to write.
        report: What was simulated.
    """
    from matplotlib.figure import Figure

    work, cost = report.work, report.cost
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=DPI, facecolor=PAPER)
    subtitle = (
        f"Simulated: {work.popsize} candidates x {work.bucket} prompts, at most {work.pictures_per_unit} pictures "
        f"a unit,\n{cost.picture_seconds:.3g} s a picture, {cost.unit_seconds:.3g} s a unit, {cost.jitter:.0%} noise"
    )
    heading(figure, "A generation over the number of ranks, by balance_over", subtitle, _WIDTH, _HEIGHT)
    idle, seconds = figure.add_axes(_IDLE), figure.add_axes(_SECONDS)
    ranks = [point.world_size for point in report.simulated[EACH]]
    for name, points in report.simulated.items():
        for axes, values in (
            (idle, [100 * point.idle_share for point in points]),
            (seconds, [point.seconds for point in points]),
        ):
            axes.plot(ranks, values, color=_COLOURS[name], marker="o", markersize=3.5, linewidth=1.5)
    first = report.simulated[EACH][0]
    ideal = [first.seconds * first.world_size / count for count in ranks]
    seconds.plot(ranks, ideal, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    idle.set_ylim(0, 104)
    idle.set_title("idle, % of all ranks' time", size=9, loc="left", pad=5)
    seconds.set_yscale("log")
    seconds.set_title("seconds", size=9, loc="left", pad=5)
    for axes in (idle, seconds):
        _frame(axes, ranks)
    _name(seconds, [(points[-1].seconds, _NAMES[n], _COLOURS[n]) for n, points in report.simulated.items()], ideal[-1])
    save(figure, path)


def _frame(axes: Axes, ranks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    # Every other number, counted from the largest, once all would touch.
    shown = ranks[:: -(1 + (len(ranks) > _MOST_TICKS))][::-1]
    axes.set_xticks(shown, [f"{count:,}" for count in shown], size=7.5)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=7.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("ranks", size=7.5, color=FAINT, loc="left", labelpad=2)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    quiet(axes)


def _name(axes: Axes, ends: list[tuple[float, str, str]], ideal: float) -> None:
    """Names the curves at their right ends, apart."""
    low, high = (math.log10(value) for value in axes.get_ylim())
    heights = [
        ((math.log10(y) - low) / (high - low), name, colour) for y, name, colour in (*ends, (ideal, "ideal", FAINT))
    ]
    for height, name, colour in apart(heights, 0.075):
        axes.text(1.04, height, name, size=7.5, color=colour, va="center", transform=axes.transAxes)
