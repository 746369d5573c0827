"""What all plots share: colours, heading, frame, and saving without a display.

Figures are built on the Agg canvas directly, never through pyplot, so nothing is left in global state.
Blue and orange are told apart with any colour blindness (Okabe and Ito 2008).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER, GRID = "#22262b", "#68717a", "#ffffff", "#e8ebee"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
DPI = 150


def heading(figure: Figure, title: str, subtitle: str, width: float, height: float) -> None:
    """Write title and subtitle into the upper left corner of a figure of width x height inches."""
    figure.text(0.15 / width, 1 - 0.16 / height, title, size=11, weight="bold", color=INK, va="top")
    figure.text(0.15 / width, 1 - 0.4 / height, subtitle, size=8, color=FAINT, va="top")


def quiet(axes: Axes) -> None:
    """Thin grey frame left and below, no tick marks: the data is what should be seen."""
    axes.tick_params(length=0, colors=INK, pad=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#c9ced3", linewidth=0.8)


def apart(labels: Sequence[tuple[float, str, str]], gap: float) -> list[tuple[float, str, str]]:
    """Move labels up so that none covers another; a label of two lines takes the room of two.

    Args:
        labels: Height, text and colour of each.
        gap: Height of a line.

    Returns:
        The labels from the lowest to the highest, at their new heights.
    """
    placed: list[tuple[float, str, str]] = []
    floor = -math.inf
    for y, name, colour in sorted(labels):
        half = gap * (1 + name.count("\n")) / 2
        centre = max(y, floor + half)
        placed.append((centre, name, colour))
        floor = centre + half
    return placed


@contextmanager
def sheet(path: Path, width: float, height: float, title: str, subtitle: str, note: str) -> Iterator[Figure]:
    """Gives a figure with three lines of text in its upper left corner, and saves it as a PNG once it is drawn.

    Args:
        path: The PNG.
        width: Inches.
        height: Inches.
        title: What is shown.
        subtitle: Of what.
        note: How to read it.

    Yields:
        The figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    heading(figure, title, subtitle, width, height)
    figure.text(0.15 / width, 1 - 0.57 / height, note, size=7.5, color=FAINT, va="top")
    yield figure
    save(figure, path)


def ruled(axes: Axes) -> None:
    """Quiet axes with faint horizontal lines behind the data."""
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    quiet(axes)


def name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names curves to the right of their axes, apart, each with a thin line to where the curve ends.

    Args:
        axes: The axes, with everything drawn: their limits are kept.
        ends: Height of the end, name and colour of each curve; those without a finite end are left out.
    """
    low, high = axes.get_ylim()
    finite = [end for end in ends if math.isfinite(end[0])]
    # In the order in which `apart` gives them back.
    for (y, _, _), (place, name, colour) in zip(sorted(finite), apart(finite, 0.05 * (high - low)), strict=True):
        axes.annotate(
            name,
            (1.005, y),
            xycoords=("axes fraction", "data"),
            xytext=(1.05, place),
            textcoords=("axes fraction", "data"),
            size=7.5,
            color=colour,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
    axes.set_ylim(low, high)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG; names and prompts stand there as they are, also with dollar signs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    FigureCanvasAgg(figure).print_png(str(path))
