"""The two pictures of an ablation: what removing each part costs, and the curves over the levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibri_lightning.arrays import Floats
from calibri_lightning.evaluation import figure as style
from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.scale_grid import ScaleGrid, scale_grids
from calibri_lightning.tools.ablate.results import Finding, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STRIP, _TOP, _BOTTOM, _LEFT, _RIGHT, _GAP = 0.85, 1.15, 0.5, 0.75, 0.25, 0.75
"""Inches: height of a strip; margins; room between the two columns."""
_PALE, _GREY = "#c5cbd1", "#7d868f"
_FALLS = (style.ORANGE, "#cc79a7", "#e69f00")
_RISES = (style.BLUE, style.GREEN, "#56b4e9")
"""Of the named curves at either end, the strongest first; warm and cold, told apart with any colour blindness."""


def plot_removed(path: Path, results: Results, level: float, title: str) -> None:
    """Draws, over the blocks, what one level of each part does to reward and picture, with intervals, as a PNG.

    One strip a kind of layer and stream; in all strips of a column one scale, so that heights compare.

    Args:
        path: The PNG.
        results: The results.
        level: The level; 0 for removed.
        title: What was studied.
    """
    findings = results.at(level)
    names = [f"all/{finding.point.site}" for finding in findings]
    grid = scale_grids(names, range(len(names)))[0]
    column = min(max(2.6, 0.13 * len(grid.columns)), 7.0)
    width = _LEFT + 2 * column + _GAP + _RIGHT
    height = _TOP + len(grid.rows) * _STRIP + _BOTTOM
    what = "removed (0)" if level == 0 else f"times {level:g}"
    note = "one part at a time; lines are 95 % intervals, pale bars may be no change"
    changes = [finding.differences[results.reward] for finding in findings]
    heads = (f"change of the reward ({results.reward})", "distance of the picture (RMS)")
    with style.sheet(path, width, height, f"Each part {what}", title, note) as figure:
        for side, values in enumerate((changes, [finding.distance for finding in findings])):
            for strip, row in enumerate(grid.rows):
                bottom = (height - _TOP - (strip + 1) * _STRIP) / height
                box = ((_LEFT + side * (column + _GAP)) / width, bottom, column / width, 0.8 * _STRIP / height)
                axes = figure.add_axes(box)
                _draw_strip(axes, grid, strip, values, signed=side == 0)
                axes.text(0, 1.04, row, size=7.5, color=style.FAINT, transform=axes.transAxes)
                if strip == 0:
                    axes.text(0, 1.32, heads[side], size=9, color=style.INK, transform=axes.transAxes)


def _limits(intervals: Sequence[Interval]) -> tuple[float, float]:
    ends = [e for i in intervals for e in (i.mean, i.low, i.high) if np.isfinite(e)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.08 * ((high - low) or 1.0)
    return low - room * (low < 0), high + room


def _draw_strip(axes: Axes, grid: ScaleGrid, strip: int, values: Sequence[Interval], signed: bool) -> None:
    """Bars from zero with their intervals; a change that may be none is pale."""
    for x, index in enumerate(grid.values[strip]):
        if not np.isfinite(index):
            continue
        interval = values[int(index)]
        colour = (style.ORANGE if interval.mean < 0 else style.BLUE) if signed else _GREY
        if signed and not interval.excludes(0.0):
            colour = _PALE
        axes.bar(x, interval.mean, width=0.68, color=colour, linewidth=0)
        if np.isfinite(interval.low):
            axes.plot([x, x], [interval.low, interval.high], color=style.INK, linewidth=0.8, solid_capstyle="butt")
    axes.axhline(0, color=style.FAINT, linewidth=0.8)
    axes.set_xlim(-0.7, len(grid.columns) - 0.3)
    axes.set_ylim(_limits(values))
    axes.locator_params(axis="y", nbins=4)
    style.ruled(axes)
    axes.spines["bottom"].set_visible(False)
    _label_blocks(axes, grid.columns, last=strip == len(grid.rows) - 1)


def _label_blocks(axes: Axes, columns: Sequence[str], last: bool) -> None:
    """Numbers of blocks below the last strip; where a model has two kinds, the name of each where it begins."""
    numbers = [name.rpartition(".")[2] for name in columns]
    step = max(1, -(-len(columns) // 16))
    kinds = [name.rpartition(".")[0] for name in columns]
    begins = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    for at in begins[1:]:
        axes.axvline(at - 0.5, color=style.FAINT, linewidth=0.6, linestyle=":")
    # Counted from where a kind begins, whose own numbers begin again there.
    shown = [i for i, n in enumerate(numbers) if (i - max(b for b in begins if b <= i)) % step == 0]
    axes.set_xticks(shown, [numbers[i] for i in shown] if last else [""] * len(shown), size=7)
    if last:
        below = axes.get_xaxis_transform()
        for at in begins:
            axes.text(at - 0.4, -0.42, kinds[at].replace("_", " "), size=7, color=style.FAINT, transform=below)


def plot_levels(path: Path, results: Results, title: str) -> None:
    """Draws the reward's change over the levels, a curve a part; those that matter most are named, as a PNG.

    Args:
        path: The PNG.
        results: The results.
        title: What was studied.
    """
    width, height = 7.2, 4.4
    sites = tuple(dict.fromkeys(finding.point.site for finding in results.findings[1:]))
    levels = sorted({*results.levels, 1.0})
    curves = {site: _curve(results, site, levels) for site in sites}
    named = _named(curves)
    others = len(sites) - len(named)
    note = f"warm: fall furthest; cold: rise highest; upright: 95 % intervals; grey: the other {others}"
    head = f"Change of the reward ({results.reward}) with the level of one part"
    with style.sheet(path, width, height, head, title, note) as figure:
        axes = figure.add_axes((0.09, 0.13, 0.55, 0.67))
        axes.axhline(0, color=style.FAINT, linewidth=0.8)
        axes.axvline(1, color=style.FAINT, linewidth=0.8, linestyle=":")
        for site in sites:
            if site not in named:
                axes.plot(levels, curves[site][0], color=_PALE, linewidth=0.8)
        apart = 0.012 * (levels[-1] - levels[0])  # so that intervals stand beside each other
        for number, (site, colour) in enumerate(named.items()):
            mean, low, high = curves[site]
            shifted = np.array(levels) + apart * (number - (len(named) - 1) / 2)
            axes.plot(shifted, mean, color=colour, linewidth=1.4, marker="o", markersize=3)
            axes.vlines(shifted, low, high, color=colour, linewidth=0.8)
        axes.set_xlabel("level (0 removed, 1 untouched)", size=8, color=style.INK)
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        style.ruled(axes)
        style.name_ends(axes, [(float(curves[site][0][-1]), site, colour) for site, colour in named.items()])


def _named(curves: Mapping[str, Floats]) -> dict[str, str]:
    """The parts whose curves fall furthest and rise highest, with their colours; one that does both does the larger."""
    bottom = {site: float(np.nanmin(curve[0])) for site, curve in curves.items()}
    top = {site: float(np.nanmax(curve[0])) for site, curve in curves.items()}
    falls = [site for site in sorted(bottom, key=lambda site: bottom[site]) if -bottom[site] > top[site]]
    rises = [site for site in sorted(top, key=lambda site: -top[site]) if top[site] > -bottom[site]]
    return dict(zip(falls, _FALLS, strict=False)) | dict(zip(rises, _RISES, strict=False))


def _curve(results: Results, site: str, levels: Sequence[float]) -> Floats:
    """Mean, lower and upper end at each level, [3, L]; 0 where nothing is changed."""
    own: dict[float, Finding] = {f.point.level: f for f in results.findings[1:] if f.point.site == site}
    changes = [
        own[level].differences[results.reward] if level in own else Interval(0.0, 0.0, 0.0, 0) for level in levels
    ]
    return np.array([(change.mean, change.low, change.high) for change in changes]).T
