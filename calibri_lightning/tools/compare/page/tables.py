"""The tables of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.diversity import PIXELS
from calibri_lightning.evaluation.text import format_difference, format_interval
from calibri_lightning.tools.compare.comparison import Comparison, Pair, Row
from calibri_lightning.tools.compare.contenders import Contender
from calibri_lightning.tools.compare.tables import costs, share


@dataclass(frozen=True)
class Cell:
    """A cell of a sortable table."""

    text: str
    key: float | str = ""
    """What it is sorted by; a number that is missing sorts last, as NaN."""
    mark: str = ""
    """`up` or `down` for what differs clearly."""

    @property
    def sort_key(self) -> str:
        """The key as an attribute."""
        if isinstance(self.key, str):
            return self.key or self.text
        return "" if math.isnan(self.key) else repr(self.key)

    @property
    def is_number(self) -> bool:
        """Whether it stands to the right."""
        return not isinstance(self.key, str)


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    cells: tuple[Cell, ...]
    num_steps: int = 0
    """Where lines can be shown for one number of steps at a time; 0 for lines that are always shown."""


@dataclass(frozen=True)
class Table:
    """A sortable table."""

    title: str
    note: str
    head: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def steps_column(self) -> int:
        """The column that says nothing while one number of steps is shown; -1 where there is none."""
        return self.head.index("steps") if any(line.num_steps for line in self.lines) else -1


def tables(comparison: Comparison) -> list[Table]:
    """Lays a comparison out for the page.

    Args:
        comparison: All numbers.

    Returns:
        A table for each reward, then runs against each other, diversity and costs.
    """
    found = [_reward_table(comparison, reward) for reward in comparison.rewards]
    if len(comparison.runs) > 1:
        found.append(_each_other(comparison))
    if comparison.samples:
        found.append(_diversity_table(comparison))
    return [*found, _cost_table(comparison)]


def _reward_table(comparison: Comparison, reward: str) -> Table:
    lines = []
    for row in comparison.rows:
        equal = comparison.pair(row.contender, row.num_steps, "equal NFE", reward)
        full = comparison.pair(row.contender, row.num_steps, "full NFE", reward)
        cells = (*_name_cells(row), interval_cell(row.means[reward]), *_pair_cells(equal), *_pair_cells(full))
        lines.append(Line(cells, row.num_steps))
    fullest = max((row for row in comparison.rows if row.contender == comparison.base.label), key=lambda row: row.nfe)
    note = (
        f"Means of {comparison.num_pictures} pictures with {comparison.level:.0%} bootstrap intervals. Over equal NFE: "
        "minus the base with as many transformer forwards an image; over full NFE: minus the base at "
        f"{fullest.num_steps} steps ({fullest.nfe} forwards). Differences are taken picture by picture; wins are "
        "shares of pictures in which the run scored higher, ties count half. * and colour: the interval excludes no "
        "difference."
    )
    head = ("contender", "steps", "NFE", "mean", "over equal NFE", "wins", "over full NFE", "wins at full NFE")
    decides = " (decides)" if reward == comparison.reward else ""
    return Table(f"{reward}{decides}", note, head, tuple(lines))


def _each_other(comparison: Comparison) -> Table:
    lines = tuple(
        Line(
            (
                *(Cell(pair.contender), Cell(str(pair.num_steps), float(pair.num_steps))),
                *(Cell(pair.other), Cell(pair.reward), *_pair_cells(pair)),
            ),
            pair.num_steps,
        )
        for pair in comparison.pairs
        if pair.against == "each other"
    )
    note = "At the same number of steps: the first minus the second, and how often the first was ahead."
    return Table("Runs against each other", note, ("run", "steps", "against", "reward", "difference", "wins"), lines)


def _diversity_table(comparison: Comparison) -> Table:
    against = {(p.contender, p.num_steps): p.differences for p in comparison.diversity_pairs}
    lines = []
    for row in comparison.rows:
        if row.diversity is None:
            continue
        gain = against.get((row.contender, row.num_steps))
        cells = (
            *_name_cells(row),
            *(interval_cell(row.diversity.vendi, 2), difference_cell(None if gain is None else gain.vendi, 2)),
            interval_cell(row.diversity.pixel_distance, 3),
            difference_cell(None if gain is None else gain.pixel_distance, 3),
        )
        lines.append(Line(cells))
    by = "their pixels" if comparison.features == PIXELS else f"what the reward {comparison.features} sees in them"
    note = (
        f"Vendi score: how many different pictures {comparison.samples} samples of a prompt amount to, by {by}; "
        "pixel distance: mean distance between two of them as thumbnails, 0 to 1. Differences are from the base of "
        "equal NFE, prompt by prompt."
    )
    head = ("contender", "steps", "NFE", "Vendi score", "difference", "pixel distance", "distance: difference")
    return Table("Diversity", note, head, tuple(lines))


def _cost_table(comparison: Comparison) -> Table:
    lines = tuple(Line(_cost_cells(contender)) for contender in comparison.contenders)
    head = (*("contender", "method", "trained", "members", "images", "forwards", "device s", "own images", "folder"),)
    note = (
        "Trained: numbers that the run itself moved. Members: transformer forwards of one sampling step. Images, "
        "forwards and device seconds: what the run cost, its validations included, together with all that it was "
        "stacked on; ≥ where the cost of a part is unknown. Own images: without that."
    )
    return Table("Trained parameters and budget", note, head, lines)


def _cost_cells(contender: Contender) -> tuple[Cell, ...]:
    whole, own = contender.whole_budget, contender.budget
    spent = (whole.images, whole.forwards, whole.device_seconds) if whole else (math.nan,) * 3
    texts = (text.replace(">= ", "≥ ") for text in costs(contender))
    method = contender.method or "untouched model"
    if contender.stacked_on:
        method += f" on {contender.stacked_on}"
    return (
        *(Cell(contender.label), Cell(method)),
        *(_count(contender.num_trained), _count(contender.num_members)),
        *(Cell(text, float(value)) for text, value in zip(texts, spent, strict=True)),
        *(_count(own.images if own else math.nan), Cell(contender.folder or "–")),
    )


def _name_cells(row: Row) -> tuple[Cell, ...]:
    return (Cell(row.contender), Cell(str(row.num_steps), float(row.num_steps)), Cell(str(row.nfe), float(row.nfe)))


def _pair_cells(pair: Pair | None) -> tuple[Cell, Cell]:
    if pair is None:
        return Cell("", math.nan), Cell("", math.nan)
    return difference_cell(pair.difference), wins_cell(pair.wins)


def _count(value: float) -> Cell:
    return Cell("" if math.isnan(value) else f"{value:,.0f}", float(value))


def interval_cell(interval: Interval, places: int | None = None) -> Cell:
    """Writes a mean.

    Args:
        interval: Its mean and interval.
        places: Decimal places; None takes them from the width.

    Returns:
        The cell.
    """
    return Cell(format_interval(interval, places=places), interval.mean)


def difference_cell(interval: Interval | None, places: int | None = None) -> Cell:
    """Writes a difference, marked where it excludes 0.

    Args:
        interval: Its mean and interval; None where nothing was compared.
        places: Decimal places; None takes them from the width.

    Returns:
        The cell.
    """
    if interval is None:
        return Cell("", math.nan)
    return Cell(format_difference(interval, places), interval.mean, _mark(interval, 0.0))


def wins_cell(wins: Interval) -> Cell:
    """Writes a share of wins, marked where it excludes one half.

    Args:
        wins: The share and its interval.

    Returns:
        The cell.
    """
    return Cell(share(wins), wins.mean, _mark(wins, 0.5))


def _mark(interval: Interval, value: float) -> str:
    return ("up" if interval.mean > value else "down") if interval.excludes(value) else ""
