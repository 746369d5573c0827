"""A comparison as plain text, as CSV and as strict JSON; NaN is written as nothing and as null."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.evaluation.text import format_difference, format_interval
from calibri_lightning.tools.compare.comparison import Comparison, Row
from calibri_lightning.tools.compare.contenders import Contender
from calibri_lightning.tools.compare.verdict import verdict

FORMAT = "calibri_lightning.comparison"
FORMAT_VERSION = 1
_GAP = "   "


def render_table(comparison: Comparison, width: int = 100) -> str:
    """Lays a comparison out for a terminal: the verdict, the headline's rows in each reward, and the costs.

    Args:
        comparison: All numbers.
        width: Characters of a line of the verdict.

    Returns:
        Lines of plain text without a final newline.
    """
    steps = comparison.headline_steps
    lines = [comparison.title, ""]
    lines += [line for sentence in verdict(comparison) for line in textwrap.wrap(sentence, width)]
    for reward in comparison.rewards:
        lines += [
            "",
            f"{reward} at {steps} steps [{comparison.level:.0%} intervals], {comparison.num_pictures} pictures",
        ]
        head: tuple[str, ...] = ("", "NFE", "mean", "over equal NFE", "wins", "over full NFE", "wins")
        rows = [comparison.row(c.label, steps) for c in comparison.contenders]
        lines += _align([head, *(_reward_cells(comparison, row, reward) for row in rows)])
    lines += ["", f"mean {comparison.reward} over sampling steps"]
    head = ("", *(str(count) for count in comparison.num_steps))
    lines += _align([head, *(_sweep_cells(comparison, c) for c in comparison.contenders)])
    lines += ["", "diversity and cost"]
    head = ("", "Vendi score", "pixel distance", "trained", "images", "forwards", "device s")
    lines += _align([head, *(_cost_cells(comparison, c) for c in comparison.contenders)])
    lines += ["", "* the interval excludes 0 (of wins: 50%); wins are shares of pairs, ties count half"]
    if any(c.stacked_on for c in comparison.contenders):
        lines += ["costs are those of a run and of all that it was stacked on; >= where a part of that is unknown"]
    lines += [line for note in comparison.notes for line in textwrap.wrap(note, width)]
    return "\n".join(line.rstrip() for line in lines)


def _reward_cells(comparison: Comparison, row: Row, reward: str) -> tuple[str, ...]:
    equal = comparison.pair(row.contender, row.num_steps, "equal NFE", reward)
    full = comparison.pair(row.contender, row.num_steps, "full NFE", reward)
    return (
        *(row.contender, str(row.nfe), format_interval(row.means[reward])),
        "" if equal is None else format_difference(equal.difference),
        "" if equal is None else share(equal.wins),
        "" if full is None else format_difference(full.difference),
        "" if full is None else share(full.wins),
    )


def _sweep_cells(comparison: Comparison, contender: Contender) -> tuple[str, ...]:
    rows = [comparison.row(contender.label, count) for count in comparison.num_steps]
    return (contender.label, *(format_interval(row.means[comparison.reward]) for row in rows))


def _cost_cells(comparison: Comparison, contender: Contender) -> tuple[str, ...]:
    spread = comparison.row(contender.label, comparison.headline_steps).diversity
    return (
        contender.label,
        "" if spread is None else format_interval(spread.vendi, places=2),
        "" if spread is None else format_interval(spread.pixel_distance, places=3),
        f"{contender.num_trained:,}",
        *costs(contender),
    )


def costs(contender: Contender) -> tuple[str, str, str]:
    """Writes what a contender cost, with all that it was stacked on.

    Args:
        contender: The base or a run.

    Returns:
        Images, forwards and device-seconds; with ">= " where a part is unknown, and empty where all is.
    """
    budget = contender.whole_budget
    if budget is None:
        return "", "", ""
    least = "" if contender.is_budget_whole else ">= "
    return f"{least}{budget.images:,}", f"{least}{budget.forwards:,}", f"{least}{budget.device_seconds:,.0f}"


def share(wins: Interval) -> str:
    """Writes a share of wins.

    Args:
        wins: The share and its interval, 0 to 1.

    Returns:
        Such as "62% [55, 69] *", or "n/a"; the star says that the interval excludes one half.
    """
    if math.isnan(wins.mean):
        return "n/a"
    star = " *" if wins.excludes(0.5) else ""
    return f"{wins.mean:.0%} [{100 * wins.low:.0f}, {100 * wins.high:.0f}]{star}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * max(len(line.rstrip()) for line in lines), *lines[1:]]


def to_csv(comparison: Comparison) -> str:
    """Writes a line for each contender, number of steps and reward.

    Args:
        comparison: All numbers.

    Returns:
        CSV text with a header.
    """
    contenders = {c.label: c for c in comparison.contenders}
    lines = [
        _csv_line(comparison, contenders[row.contender], row, name) for row in comparison.rows for name in row.means
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _csv_line(comparison: Comparison, contender: Contender, row: Row, reward: str) -> Mapping[str, Any]:
    spread, own, whole = row.diversity, contender.budget, contender.whole_budget
    line: dict[str, Any] = {
        "contender": contender.label,
        "method": contender.method,
        "steps": row.num_steps,
        "nfe": row.nfe,
        "reward": reward,
        **_columns("mean", row.means[reward]),
    }
    for against, name in (("equal NFE", "equal_nfe"), ("full NFE", "full_nfe")):
        pair = comparison.pair(row.contender, row.num_steps, against, reward)  # type: ignore[arg-type]
        line |= _columns(f"over_{name}", None if pair is None else pair.difference)
        line |= _columns(f"wins_{name}", None if pair is None else pair.wins)
    line |= _columns("vendi", None if spread is None else spread.vendi)
    line |= _columns("pixel_distance", None if spread is None else spread.pixel_distance)
    return line | {
        "trained": contender.num_trained,
        "stacked_on": contender.stacked_on,
        **_budget("own", own),
        # Less than the whole is not the whole: then only the run's own cost is written.
        **_budget("whole", whole if contender.is_budget_whole else None),
        "folder": contender.folder,
    }


def _budget(name: str, budget: Budget | None) -> Mapping[str, float | str]:
    values = ("", "", "") if budget is None else (budget.images, budget.forwards, budget.device_seconds)
    return dict(zip((f"{name}_images", f"{name}_forwards", f"{name}_device_seconds"), values, strict=True))


def _columns(name: str, interval: Interval | None) -> Mapping[str, float | str]:
    values = ("", "", "") if interval is None else (interval.mean, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(_or_empty, values), strict=True))


def _or_empty(value: float | str) -> float | str:
    return "" if isinstance(value, float) and math.isnan(value) else value


def to_json(comparison: Comparison) -> str:
    """Writes a comparison as strict JSON, without the pictures.

    Args:
        comparison: All numbers.

    Returns:
        Indented JSON text, ending in a newline.
    """
    plain = {name: value for name, value in asdict(comparison).items() if name != "gallery"}
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "verdict": verdict(comparison), **plain}
    return json.dumps(_strict(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
