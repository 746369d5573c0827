"""The ranking at the top of the report: everyone at the verdict's number of steps, the best first, on one axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibri_lightning.evaluation.text import format_interval
from calibri_lightning.tools.compare.comparison import Comparison, Row
from calibri_lightning.tools.compare.page.tables import Cell, difference_cell, wins_cell

_ROOM = 0.04
"""Share of the axis that is left free at either end."""


@dataclass(frozen=True)
class Place:
    """A contender in the ranking; positions are percent of the axis."""

    label: str
    mean: str
    low: float
    high: float
    middle: float | None
    """None where there is no number."""
    base: float | None
    """Where the base's mean lies."""
    gain: Cell
    """Over the base of equal NFE; empty for the base, and where none was drawn."""
    wins: Cell
    vendi: Cell
    is_base: bool


def ranking(comparison: Comparison) -> list[Place]:
    """Ranks all contenders by the deciding reward.

    Args:
        comparison: All numbers.

    Returns:
        The best first; those without a number last.
    """
    steps, reward = comparison.headline_steps, comparison.reward
    rows = [comparison.row(contender.label, steps) for contender in comparison.contenders]
    ends = [end for row in rows for end in _ends(row, reward) if not math.isnan(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = _ROOM * (high - low) or 1.0
    low, high = low - room, high + room

    def at(value: float) -> float | None:
        return None if math.isnan(value) else 100 * (value - low) / (high - low)

    base = at(rows[0].means[reward].mean)
    # The earlier first where means are equal, as in the verdict.
    rows.sort(key=lambda row: math.inf if math.isnan(row.means[reward].mean) else -row.means[reward].mean)
    return [_place(comparison, row, [at(end) for end in _ends(row, reward)], base) for row in rows]


def _ends(row: Row, reward: str) -> tuple[float, float, float]:
    """Mean, and the ends of its interval, which are the mean where there is none."""
    interval = row.means[reward]
    low, high = (interval.mean if math.isnan(end) else end for end in (interval.low, interval.high))
    return interval.mean, low, high


def _place(comparison: Comparison, row: Row, ends: list[float | None], base: float | None) -> Place:
    pair = comparison.pair(row.contender, row.num_steps, "equal NFE", comparison.reward)
    spread = next((p.differences.vendi for p in comparison.diversity_pairs if p.contender == row.contender), None)
    vendi = Cell("", math.nan)
    if row.diversity is not None:
        value = row.diversity.vendi.mean
        vendi = Cell("n/a" if math.isnan(value) else f"{value:.2f}", value, difference_cell(spread).mark)
    middle, low, high = ends
    return Place(
        label=row.contender,
        mean=format_interval(row.means[comparison.reward]),
        low=low or 0.0,
        high=high or 0.0,
        middle=middle,
        base=base,
        gain=difference_cell(None if pair is None else pair.difference),
        wins=Cell("", math.nan) if pair is None else wins_cell(pair.wins),
        vendi=vendi,
        is_base=row.contender == comparison.base.label,
    )
