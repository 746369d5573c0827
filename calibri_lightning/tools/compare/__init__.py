"""The command `compare`: several runs of one model on the same prompts and noises, as a verdict, tables and a page."""

from __future__ import annotations

from calibri_lightning.tools.compare.comparing import Setting, compare
from calibri_lightning.tools.compare.comparison import Comparison, DiversityPair, Pair, Row
from calibri_lightning.tools.compare.contenders import Contender, Course, Scales, Scored
from calibri_lightning.tools.compare.gallery import GalleryPrompt, Picture, encode
from calibri_lightning.tools.compare.page import render_page
from calibri_lightning.tools.compare.tables import render_table, to_csv, to_json
from calibri_lightning.tools.compare.verdict import verdict
from calibri_lightning.tools.compare.writing import write_report

__all__ = [
    "Comparison",
    "Contender",
    "Course",
    "DiversityPair",
    "GalleryPrompt",
    "Pair",
    "Picture",
    "Row",
    "Scales",
    "Scored",
    "Setting",
    "compare",
    "encode",
    "render_page",
    "render_table",
    "to_csv",
    "to_json",
    "verdict",
    "write_report",
]
