"""The picture of time and memory over the number of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibri_lightning.bench.growth import GrowthPoint
from calibri_lightning.evaluation.figure import BLUE, DPI, FAINT, GRID, ORANGE, PAPER, heading, quiet, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 7.0, 3.4
_SECONDS, _MEMORY = (0.09, 0.14, 0.38, 0.57), (0.59, 0.14, 0.38, 0.57)
"""Left, bottom, width and height of the axes, as shares of the figure."""


def plot_growth(path: Path, points: Sequence[GrowthPoint], title: str, subtitle: str) -> None:
    """Draws seconds and peak memory of a generation over the number of candidates, as a PNG.

    Args:
        path: The PNG to write.
        points: Generations, by rising size.
        title: Heading.
        subtitle: What was measured, and where; two lines at most.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=DPI, facecolor=PAPER)
    heading(figure, title, subtitle, _WIDTH, _HEIGHT)
    sizes = [point.popsize for point in points]
    _draw(figure.add_axes(_SECONDS), sizes, [point.timing.median for point in points], BLUE, "seconds")
    known = [point.memory.peak_bytes / 2**20 for point in points if point.memory is not None]
    if len(known) == len(points):
        _draw(figure.add_axes(_MEMORY), sizes, known, ORANGE, "peak memory, MiB")
    save(figure, path)


def _draw(axes: Axes, sizes: Sequence[int], values: Sequence[float], colour: str, name: str) -> None:
    axes.plot(sizes, values, color=colour, marker="o", markersize=4, linewidth=1.5)
    axes.set_xlim(0, 1.05 * max(sizes))
    # From zero: a straight line through the origin is what linear growth looks like, a level one is none.
    axes.set_ylim(0, 1.15 * max(values))
    axes.set_xticks(sizes, [str(size) for size in sizes], size=7.5)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlabel("candidates", size=7.5, color=FAINT, loc="left", labelpad=2)
    axes.set_title(name, size=9, loc="left", pad=5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    quiet(axes)
