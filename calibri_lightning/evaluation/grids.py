"""Before/after grids: the same prompts and noises, base beside calibrated, as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont
    from torch import Tensor

Upscale = Literal["lanczos", "nearest"]

_INK, _FAINT, _PAPER, _BETTER = "#22262b", "#7a828b", "#ffffff", "#b34700"
_MARGIN, _PAIR_GAP, _IMAGE_GAP, _ROW_GAP, _LINE_GAP = 24, 28, 6, 20, 4
_MAX_LINES = 3


@dataclass(frozen=True, eq=False)
class Panel:
    """The pictures of one condition.

    Attributes:
        title: Heading, e.g. "base @ 8 steps".
        images: Tensor or array [B, 3, H, W], float in 0..1 or uint8; the same prompts and noises in every
            panel.
        scores: float[B] rewards written under the pictures, the best of a prompt in bold; None for no marks.
    """

    title: str
    images: Tensor | NDArray[np.generic]
    scores: Sequence[float] | None = None


def save_grid(
    path: str | Path,
    panels: Sequence[Panel],
    captions: Sequence[str],
    columns: int = 2,
    side: int = 144,
    upscale: Upscale = "lanczos",
    title: str = "",
) -> None:
    """Write pictures of several conditions side by side, prompt by prompt, with the prompts below them.

    Args:
        path: The PNG to write.
        panels: The conditions from left to right, e.g. base and calibrated; a single one makes a contact
            sheet.
        captions: The prompt of each picture.
        columns: Prompts in one row of the grid.
        side: Length in pixels of the longer side that a picture is drawn with.
        upscale: How smaller pictures grow: `lanczos` smooth, `nearest` with every pixel visible.
        title: Heading of the whole grid.

    Raises:
        ValueError: If there are no pictures, or panels, captions and scores differ in number.
    """
    draw_grid(panels, captions, columns, side, upscale, title).save(path, format="PNG", optimize=True)


def draw_grid(
    panels: Sequence[Panel],
    captions: Sequence[str],
    columns: int = 2,
    side: int = 144,
    upscale: Upscale = "lanczos",
    title: str = "",
) -> Image.Image:
    """Draw what `save_grid` writes, e.g. for a logger.

    Args:
        panels: The conditions from left to right.
        captions: The prompt of each picture.
        columns: Prompts in one row of the grid.
        side: Length in pixels of the longer side of a picture.
        upscale: How smaller pictures grow.
        title: Heading of the whole grid.

    Returns:
        An RGB picture.

    Raises:
        ValueError: If there are no pictures, or panels, captions and scores differ in number.
    """
    from PIL import Image, ImageDraw

    pictures = [_pictures(panel, len(captions), side, upscale) for panel in panels]
    if not captions or not pictures:
        raise ValueError(f"{len(panels)} panels and {len(captions)} captions; a grid needs at least one of each")
    layout = _Layout.of(panels, captions, pictures[0][0].size, min(columns, len(captions)), title)
    canvas = Image.new("RGB", layout.size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font(17, bold=True))
    for index in range(len(captions)):
        _draw_prompt(canvas, pen, layout, index, panels, pictures)
    return canvas


@dataclass(frozen=True)
class _Layout:
    """Where everything goes, in pixels."""

    size: tuple[int, int]
    cell: tuple[int, int]  # one picture
    block_width: int  # the pictures of one prompt
    columns: int
    row_tops: tuple[int, ...]
    panel_titles: tuple[tuple[str, ...], ...]  # panel titles, wrapped
    heading: int  # height of the panel titles above the first row
    lines: tuple[tuple[str, ...], ...]  # captions, wrapped

    @classmethod
    def of(
        cls, panels: Sequence[Panel], captions: Sequence[str], cell: tuple[int, int], columns: int, title: str
    ) -> _Layout:
        width = len(panels) * cell[0] + (len(panels) - 1) * _IMAGE_GAP
        lines = tuple(_wrap(caption, width, _font(13)) for caption in captions)
        titles = tuple(_wrap(panel.title, cell[0], _font(12, bold=True)) for panel in panels)
        heading = max(map(len, titles)) * (12 + _LINE_GAP) + 6 if any(titles) else 0
        y = _MARGIN + (17 + 16 if title else 0)
        y += heading
        marks = 13 + _LINE_GAP + 4 if any(panel.scores is not None for panel in panels) else 0
        tops = []
        for start in range(0, len(captions), columns):
            tops.append(y)
            deepest = max(map(len, lines[start : start + columns]))
            y += cell[1] + marks + 6 + deepest * (13 + _LINE_GAP) + _ROW_GAP
        total = 2 * _MARGIN + columns * width + (columns - 1) * _PAIR_GAP
        return cls((total, y - _ROW_GAP + _MARGIN), cell, width, columns, tuple(tops), titles, heading, lines)


def _draw_prompt(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    layout: _Layout,
    index: int,
    panels: Sequence[Panel],
    pictures: Sequence[Sequence[Image.Image]],
) -> None:
    row, column = divmod(index, layout.columns)
    left, top = _MARGIN + column * (layout.block_width + _PAIR_GAP), layout.row_tops[row]
    scores = [math.nan if p.scores is None else float(p.scores[index]) for p in panels]
    best = max((s for s in scores if not math.isnan(s)), default=math.nan)
    marked = any(panel.scores is not None for panel in panels)
    for i, (score, lines) in enumerate(zip(scores, layout.panel_titles, strict=True)):
        x = left + i * (layout.cell[0] + _IMAGE_GAP)
        if row == 0:
            _write(pen, lines, x, top - layout.heading, 12, _FAINT, bold=True)
        canvas.paste(pictures[i][index], (x, top))
        pen.rectangle((x, top, x + layout.cell[0] - 1, top + layout.cell[1] - 1), outline="#d5d9dd")
        if panels[i].scores is not None:
            won = score == best and scores.count(best) < len([s for s in scores if not math.isnan(s)])
            text = "n/a" if math.isnan(score) else f"{score:.2f}"
            pen.text((x, top + layout.cell[1] + 4), text, fill=_BETTER if won else _FAINT, font=_font(13, bold=won))
    below = top + layout.cell[1] + 6 + (13 + _LINE_GAP + 4 if marked else 0)
    _write(pen, layout.lines[index], left, below, 13, _INK)


def _write(
    pen: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, size: int, colour: str, bold: bool = False
) -> None:
    for i, line in enumerate(lines):
        pen.text((x, y + i * (size + _LINE_GAP)), line, fill=colour, font=_font(size, bold))


def _pictures(panel: Panel, count: int, side: int, upscale: Upscale) -> list[Image.Image]:
    """PIL pictures of a panel, all resized so that the longer side is `side`."""
    from PIL import Image

    pixels = to_uint8(panel.images)
    scores = count if panel.scores is None else len(panel.scores)
    if len(pixels) != count or scores != count:
        raise ValueError(f"panel {panel.title!r} has {len(pixels)} images and {scores} scores for {count} captions")
    height, width = pixels.shape[1:3]
    factor = side / max(height, width)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    grow = factor > 1 and upscale == "nearest"
    resample = Image.Resampling.NEAREST if grow else Image.Resampling.LANCZOS
    return [Image.fromarray(picture).resize(size, resample) for picture in pixels]


def to_uint8(images: Tensor | NDArray[np.generic]) -> NDArray[np.uint8]:
    """Pixels for PIL.

    Args:
        images: [B, 3, H, W], uint8, or float in 0..1 (values outside are clipped, NaN becomes black).

    Returns:
        uint8[B, H, W, 3].

    Raises:
        ValueError: If the shape is another.
    """
    array = np.asarray(images if isinstance(images, np.ndarray) else images.detach().cpu().float().numpy())
    if array.ndim != 4 or array.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(array.shape)}; give [B, 3, H, W]")
    whole = array.dtype == np.uint8 if isinstance(images, np.ndarray) else not images.is_floating_point()
    if not whole:
        array = np.rint(np.clip(np.nan_to_num(array.astype(np.float64)), 0.0, 1.0) * 255)
    return np.ascontiguousarray(array.astype(np.uint8).transpose(0, 2, 3, 1))


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> tuple[str, ...]:
    """Break at spaces into at most three lines; too wide words are cut, lost text becomes an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        candidate = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        while word:
            fitting = next((n for n in range(len(word), 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines.append(word[:fitting])
            word = word[fitting:]
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], last.rstrip() + "…"]
    return tuple(lines)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib's wheel: the same everywhere, with far more letters than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
