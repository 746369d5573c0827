"""What a run shows and proves: intervals, the summary, plots, grids of pictures and the progress line."""

from __future__ import annotations

from calibri_lightning.evaluation.bootstrap import Interval, WinRate, mean_interval, paired_interval, win_rate
from calibri_lightning.evaluation.convergence import Convergence, plot_convergence
from calibri_lightning.evaluation.diversity import (
    Diversity,
    measure_diversity,
    pixel_distance,
    rbf,
    thumbnails,
    vendi_score,
)
from calibri_lightning.evaluation.files import from_json, to_json, write_summary
from calibri_lightning.evaluation.grids import Panel, draw_grid, save_grid
from calibri_lightning.evaluation.plots import plot_scales
from calibri_lightning.evaluation.progress import GenerationStats, format_duration, format_progress
from calibri_lightning.evaluation.summary import (
    Budget,
    Comparison,
    Condition,
    DiversityComparison,
    DiversityIntervals,
    Role,
    Summary,
    summarise,
)
from calibri_lightning.evaluation.text import format_interval, render_table, verdict

__all__ = [
    "Budget",
    "Comparison",
    "Condition",
    "Convergence",
    "Diversity",
    "DiversityComparison",
    "DiversityIntervals",
    "GenerationStats",
    "Interval",
    "Panel",
    "Role",
    "Summary",
    "WinRate",
    "draw_grid",
    "format_duration",
    "format_interval",
    "format_progress",
    "from_json",
    "mean_interval",
    "measure_diversity",
    "paired_interval",
    "pixel_distance",
    "plot_convergence",
    "plot_scales",
    "rbf",
    "render_table",
    "save_grid",
    "summarise",
    "thumbnails",
    "to_json",
    "vendi_score",
    "verdict",
    "win_rate",
    "write_summary",
]
