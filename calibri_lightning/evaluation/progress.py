"""The progress line of a run, as text: where it is, how good it is, how long it still takes.

Printing it is the business of `strategies.progress`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_DROPPABLE = ("rate", "pace", "images", "best")  # what a narrow terminal loses, the least important first


@dataclass(frozen=True)
class GenerationStats:
    """What a strategy tells about its last generation.

    Attributes:
        generation: Number of finished generations, from 1.
        total: Planned generations; None when only images or time bound the run.
        mean: Mean reward of the generation's candidates.
        best: Reward of its best candidate.
        pace: How fast the run moves: a search's step size, a gradient strategy's clipped share.
        images: Images generated and scored since the start of the run.
        images_per_second: Over the last generation.
        eta_seconds: Seconds to the end of the run; None when unknown.
        reward_name: Name of the reward.
        pace_name: What the pace is; sigma is written as σ.
        step_name: What the strategy calls a training step.
    """

    generation: int
    total: int | None
    mean: float
    best: float
    pace: float
    images: int
    images_per_second: float
    eta_seconds: float | None
    reward_name: str
    pace_name: str = "sigma"
    step_name: str = "generation"


def format_progress(stats: GenerationStats, width: int | None = None, ascii_only: bool = False) -> str:
    """Write the progress line.

    Args:
        stats: The last generation.
        width: Most characters the line may have; parts that do not fit are left out, the least important
            first (images a second, pace, images, best), and what is left is cut. None for no limit.
        ascii_only: Write "sigma" and "|" for terminals that cannot show the signs.

    Returns:
        One line, such as "generation 12/200 · shapes mean 0.612 best 0.701 · σ 0.148 · ... · ETA 2:31".
    """
    line = _line(stats, _DROPPABLE[:0], ascii_only)
    for dropped in range(1, len(_DROPPABLE) + 1):
        if width is None or len(line) <= width:
            break
        line = _line(stats, _DROPPABLE[:dropped], ascii_only)
    return line[:width]


def format_duration(seconds: float) -> str:
    """A duration as "2:31", "1:02:31" or "3d 01:02:31".

    Args:
        seconds: At least 0; rounded to whole seconds.

    Returns:
        The text; "n/a" if `seconds` is not finite.
    """
    if not math.isfinite(seconds):
        return "n/a"
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _line(stats: GenerationStats, dropped: Sequence[str], ascii_only: bool) -> str:
    total = "" if stats.total is None else f"/{stats.total}"
    rate = f"{stats.images_per_second:.3g}" if stats.images_per_second < 100 else f"{stats.images_per_second:,.0f}"
    best = "" if "best" in dropped else f" best {_score(stats.best)}"
    parts = {
        "generation": f"{stats.step_name} {stats.generation:>{max(len(total) - 1, 0)}}{total}",
        "score": f"{stats.reward_name} mean {_score(stats.mean)}{best}",
        "pace": f"{'σ' if stats.pace_name == 'sigma' and not ascii_only else stats.pace_name} {_score(stats.pace)}",
        "images": f"{stats.images:,} images",
        "rate": f"{rate} images/s",
    }
    if stats.eta_seconds is not None:
        parts["eta"] = f"ETA {format_duration(stats.eta_seconds)}"
    return (" | " if ascii_only else " · ").join(text for name, text in parts.items() if name not in dropped)


def _score(value: float) -> str:
    """Three decimals for rewards around 1, fewer for large ones, powers of ten for very small steps."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.3f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 4 - len(str(int(abs(value)))))}f}"
