"""The report as one HTML file that loads nothing: styles, script, plots and pictures are inside it."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from calibri_lightning.tools.compare.comparison import Comparison
from calibri_lightning.tools.compare.gallery import GalleryPrompt
from calibri_lightning.tools.compare.page.ranking import ranking
from calibri_lightning.tools.compare.page.tables import tables
from calibri_lightning.tools.compare.verdict import losses, verdict, winner

if TYPE_CHECKING:
    from calibri_lightning.tools.compare.plots import Plot

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What HTML cannot hold, escaped or not (HTML standard, 13.1.4), and UTF-8 neither."""


@dataclass(frozen=True)
class Figure:
    """A plot inside the page."""

    title: str
    text: str
    uri: str
    width: int
    height: int


def render_page(comparison: Comparison, plots: Sequence[Plot] = ()) -> str:
    """Writes the report.

    Args:
        comparison: All numbers and pictures.
        plots: Plots to put in; their files must exist.

    Returns:
        HTML.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    # Prompts and labels are anyone's text: everything is escaped, and only our own files are marked as safe.
    environment = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clean"] = clean
    best = winner(comparison)
    return environment.get_template("report.html").render(
        comparison=comparison,
        sentences=verdict(comparison),
        places=ranking(comparison),
        warnings=losses(comparison),
        tables=tables(comparison),
        figures=[_figure(plot) for plot in plots],
        # Before is the base, after the best run, or the first where the base is best.
        after=(comparison.runs[0] if best.is_base else best).label,
        gallery=_gallery(comparison),
    )


def clean(text: str) -> str:
    """Replaces characters that no page can hold.

    Args:
        text: Anyone's text.

    Returns:
        The text with U+FFFD in their places.
    """
    return _CONTROL.sub("\ufffd", text)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _gallery(comparison: Comparison) -> list[tuple[GalleryPrompt, float]]:
    """Each prompt with its best score, which is marked unless all have it."""
    found = []
    for entry in comparison.gallery:
        scores = [picture.score for picture in entry.pictures if not math.isnan(picture.score)]
        found.append((entry, max(scores) if len(set(scores)) > 1 else math.nan))
    return found


def _figure(plot: Plot) -> Figure:
    from PIL import Image

    data = plot.path.read_bytes()
    with Image.open(plot.path) as image:
        width, height = image.size
    return Figure(
        plot.title, plot.text, f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}", width, height
    )
