"""The plots of a comparison: reward over NFE, reward over budget, diversity over reward, and each run's scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibri_lightning.arrays import Floats
from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.figure import BLUE, DPI, FAINT, GREEN, GRID, INK, ORANGE, PAPER, heading, quiet, save
from calibri_lightning.evaluation.plots import plot_scales
from calibri_lightning.evaluation.scale_grid import scale_grids
from calibri_lightning.tools.compare.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart with any colour blindness (Okabe and Ito 2008)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""With the colours 42 different runs."""
WIDTH, HEIGHT = 4.7, 3.4
"""Inches; small, so that letters can be read where a phone shrinks the plot to its width."""
_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 0.7, 0.2, 0.7, 0.5, 0.19
"""Margins of a plot, and the height of a line of its legend, inches."""
_COLUMNS = 2


@dataclass(frozen=True)
class Plot:
    """A PNG and what to say of it."""

    path: Path
    title: str
    text: str
    """What can be seen, for those who cannot see it."""


def draw_plots(folder: Path, comparison: Comparison) -> tuple[Plot, ...]:
    """Draws all plots for which there are numbers.

    Args:
        folder: Where to write.
        comparison: The numbers.

    Returns:
        The plots.
    """
    plots = [_over_nfe(folder / "reward_over_nfe.png", comparison)]
    if any(c.course for c in comparison.contenders):
        plots.append(_over_budget(folder / "reward_over_budget.png", comparison))
    if comparison.samples:
        plots.append(_diversity(folder / "diversity_over_reward.png", comparison))
    for number, run in enumerate(comparison.runs, start=1):
        scales = run.scales
        # Of a run that trained other weights every scale is still 1, and there is nothing to see.
        if scales is None or not scales.moved or not scale_grids(scales.names, scales.values):
            continue
        path = folder / f"scales_{number}.png"
        plot_scales(path, scales.names, scales.values, scales.members, f"Scales of {_short(run.label)}")
        text = f"Every scale of {run.label} by block and layer; 1 leaves a layer as it is."
        plots.append(Plot(path, f"Scales: {run.label}", text))
    return tuple(plots)


def _looks(comparison: Comparison) -> Mapping[str, tuple[str, str]]:
    """Colour and marker of each contender; the base is grey."""
    looks = {comparison.base.label: (FAINT, "o")}
    for number, run in enumerate(comparison.runs):
        looks[run.label] = (COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
    return looks


def _canvas(title: str, subtitle: str, num_names: int) -> tuple[Figure, Axes]:
    """A figure laid out in inches: the legend has lines of its own between heading and axes."""
    from matplotlib.figure import Figure

    names = _LINE * -(-num_names // _COLUMNS)
    height = HEIGHT + names
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    heading(figure, title, subtitle, WIDTH, height)
    wide, tall = WIDTH - _LEFT - _RIGHT, height - _TOP - names - _BOTTOM
    axes = figure.add_axes((_LEFT / WIDTH, _BOTTOM / height, wide / WIDTH, tall / height))
    quiet(axes)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _short(label: str) -> str:
    """At most 32 characters; a legend leaves out names that begin with an underscore."""
    shown = f" {label}" if label.startswith("_") else label
    return shown if len(shown) <= 32 else shown[:31] + "…"


def _over_nfe(path: Path, comparison: Comparison) -> Plot:
    reward, level = comparison.reward, f"{comparison.level:.0%}"
    title = f"{reward} over NFE"
    figure, axes = _canvas(
        title, f"mean of {comparison.num_pictures} pictures · {level} bootstrap intervals", len(comparison.contenders)
    )
    for label, (colour, marker) in _looks(comparison).items():
        rows = sorted((row for row in comparison.rows if row.contender == label), key=lambda row: row.nfe)
        means = [row.means[reward] for row in rows]
        nfe = [row.nfe for row in rows]
        axes.errorbar(
            nfe,
            [m.mean for m in means],
            yerr=np.hstack([_reach(m) for m in means]),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            label=_short(label),
        )
    axes.set_xticks(sorted({row.nfe for row in comparison.rows}))
    axes.set_xlabel("transformer forwards an image (NFE)", size=8.5, color=INK)
    _legend(axes)
    save(figure, path)
    return Plot(path, title, f"Mean {reward} of each contender over the forwards that an image takes.")


def _over_budget(path: Path, comparison: Comparison) -> Plot:
    title = "Validation reward over budget"
    figure, axes = _canvas(title, "own validation · stacked runs begin where their start ended", len(comparison.runs))
    looks = _looks(comparison)
    for run in comparison.runs:
        if run.course is not None:
            colour, marker = looks[run.label]
            axes.plot(
                run.course.images, run.course.scores, color=colour, marker=marker, ms=4, lw=1.6, label=_short(run.label)
            )
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel("training images", size=8.5, color=INK)
    _legend(axes)
    save(figure, path)
    return Plot(
        path, title, "How each run's reward on its validation prompts rose with the images generated in training."
    )


def _diversity(path: Path, comparison: Comparison) -> Plot:
    steps, reward = comparison.headline_steps, comparison.reward
    title = "Diversity over reward"
    figure, axes = _canvas(
        title, f"at {steps} steps · Vendi score of {comparison.samples} samples of a prompt", len(comparison.contenders)
    )
    for label, (colour, marker) in _looks(comparison).items():
        row = comparison.row(label, steps)
        if row.diversity is None:
            continue
        x, y = row.means[reward], row.diversity.vendi
        axes.errorbar(
            [x.mean],
            [y.mean],
            xerr=_reach(x),
            yerr=_reach(y),
            color=colour,
            marker=marker,
            markersize=7,
            elinewidth=1,
            linestyle="none",
            label=_short(label),
        )
    axes.set_xlabel(f"mean {reward}", size=8.5, color=INK)
    axes.set_ylabel("Vendi score", size=8.5, color=INK)
    _legend(axes)
    save(figure, path)
    return Plot(path, title, f"Vendi score over mean {reward}: up and to the right is better.")


def _reach(interval: Interval) -> Floats:
    """How far an interval reaches down and up, [2, 1]; BCa's ends may lie on one side of the mean."""
    reach = [[interval.mean - interval.low], [interval.high - interval.mean]]
    return np.maximum(np.array(reach, dtype=np.float64), 0.0)


def _legend(axes: Axes) -> None:
    place = (-0.02, 1.0)
    axes.legend(loc="lower left", bbox_to_anchor=place, ncols=_COLUMNS, frameon=False, fontsize=8, labelcolor=INK)


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
