"""The picture of the scales over the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibri_lightning.evaluation.figure import DPI, FAINT, INK, PAPER, heading, quiet, save
from calibri_lightning.evaluation.scale_grid import ScaleGrid, bands, scale_grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_DIVERGING = ("#0b4f8a", "#6aa5d3", "#efefec", "#eb9a5b", "#a34100")  # quieter than 1, 1, louder than 1
_MAX_COLUMNS = 24  # blocks in one row of the picture; deeper models go on below
_CELL_INCHES = (0.46, 0.3)


def plot_scales(
    path: str | Path,
    names: Sequence[str],
    values: Sequence[float],
    members: Sequence[str] = (),
    title: str = "Scales over the blocks",
) -> None:
    """Draw the scales as a PNG: rows are layers and streams, columns blocks, with a panel for each member.

    Args:
        path: The PNG to write.
        names: `Layout.names`.
        values: The value of each name; 1 means unchanged and is white, less is blue, more orange.
        members: What to call the members in order, e.g. ("prompt", "negative"); by default as in `names`.
        title: Heading of the picture.

    Raises:
        ValueError: If no name is a scale, or `values` has another length.
    """
    grids = scale_grids(names, values)
    if not grids:
        raise ValueError(f"none of the {len(names)} names is a scale such as 'member0/transformer_blocks.0.attn.image'")
    pieces = [(i, band) for i, grid in enumerate(grids) for band in bands(grid, _MAX_COLUMNS)]
    extent = max(0.1, *(float(np.nanmax(np.abs(grid.values - 1))) for grid in grids))
    labels = {i: members[i] if i < len(members) else grid.member for i, grid in enumerate(grids)}
    shared = [f"{name} {value:.3g}" for name, value in zip(names, values, strict=True) if "/" not in name]
    figure, all_axes, bar = _scale_canvas([band for _, band in pieces], title, " · ".join(shared))
    colours = _colours()
    previous = -1
    for axes, (i, band) in zip(all_axes, pieces, strict=True):
        name = " · ".join([labels[i], *(f"{name} {value:.3g}" for name, value in grids[i].others)])
        _draw_band(axes, band, extent, colours, name if i != previous else "")
        previous = i
    _draw_bar(bar, extent, colours)
    save(figure, path)


def _scale_canvas(pieces: Sequence[ScaleGrid], title: str, subtitle: str) -> tuple[Figure, list[Axes], Axes]:
    """A figure laid out in inches, so that cells have one size however deep the model is; and its axes."""
    from matplotlib.figure import Figure

    cell_width, cell_height = _CELL_INCHES
    left, right, top, bottom = 0.95, 0.85, 0.95 if subtitle else 0.75, 0.5
    widest = left + cell_width * max(len(p.columns) for p in pieces)
    width = max(widest + right, 4.2)
    heights = [cell_height * len(p.rows) for p in pieces]
    # Between bands of one member there is no heading, so less room.
    gaps = [0.0] + [0.5 if a.member == b.member else 0.75 for a, b in pairwise(pieces)]
    height = top + sum(heights) + sum(gaps) + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    heading(figure, title, subtitle, width, height)
    all_axes, y = [], height - top
    for piece, tall, gap in zip(pieces, heights, gaps, strict=True):
        y -= gap + tall
        box = (left / width, y / height, cell_width * len(piece.columns) / width, tall / height)
        all_axes.append(figure.add_axes(box))
    tall = min(heights[0], 1.8)
    bar = figure.add_axes(((widest + 0.2) / width, (height - top - tall) / height, 0.1 / width, tall / height))
    return figure, all_axes, bar


def _colours() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("quieter-louder", _DIVERGING).with_extremes(bad=PAPER)


def _draw_band(axes: Axes, band: ScaleGrid, extent: float, colours: Colormap, name: str) -> None:
    num_rows, num_columns = band.values.shape
    axes.pcolormesh(
        np.ma.masked_invalid(band.values),
        vmin=1 - extent,
        vmax=1 + extent,
        cmap=colours,
        edgecolors=PAPER,
        linewidth=1.2,
    )
    axes.invert_yaxis()
    for row, column in zip(*np.nonzero(~np.isnan(band.values)), strict=True):
        value = float(band.values[row, column])
        ink = PAPER if abs(value - 1) > 0.62 * extent else INK  # on the dark ends white reads better
        axes.text(column + 0.5, row + 0.52, f"{value:.2f}", size=6.8, color=ink, ha="center", va="center")
    kind, _, _ = band.columns[0].rpartition(".")
    axes.set_xticks(np.arange(num_columns) + 0.5, [block.rpartition(".")[2] for block in band.columns], size=7.5)
    axes.set_yticks(np.arange(num_rows) + 0.5, band.rows, size=8)
    axes.set_xlabel(kind.replace("_", " "), size=7.5, color=FAINT, loc="left", labelpad=2)
    axes.set_title(name, size=9, color=INK, loc="left", pad=5)
    quiet(axes)
    axes.spines[:].set_visible(False)


def _draw_bar(axes: Axes, extent: float, colours: Colormap) -> None:
    shades = np.linspace(1 - extent, 1 + extent, 256)
    axes.pcolormesh([0, 1], np.append(shades, shades[-1]), shades[:, None], cmap=colours, rasterized=True)
    axes.set_ylim(1 - extent, 1 + extent)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([1 - extent, 1, 1 + extent], [f"{1 - extent:.2f}", "1", f"{1 + extent:.2f}"], size=7.5)
    quiet(axes)
    axes.spines[:].set_visible(False)
