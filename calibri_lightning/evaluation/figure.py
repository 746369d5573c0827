"""What all plots share: colours, heading, frame, and saving without a display.

Figures are built on the Agg canvas directly, never through pyplot, so nothing is left in global state.
Blue and orange are told apart with any colour blindness (Okabe and Ito 2008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER, GRID = "#22262b", "#8a929b", "#ffffff", "#e8ebee"
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


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))
