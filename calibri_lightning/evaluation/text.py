"""A summary as plain text: an aligned table for any terminal or log file, and a verdict in sentences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.diversity import PIXELS
from calibri_lightning.evaluation.summary import AGAINST, Comparison, Condition, DiversityComparison, Summary

_GAP = "   "
_Row = tuple[str, list[str]]


def decimals(width: float) -> int:
    """Decimal places, 0 to 6, that cut the width of an interval into 20 to 200 steps; 3 without a width."""
    return min(max(1 - math.floor(math.log10(width / 2)), 0), 6) if 0 < width < math.inf else 3


def format_interval(interval: Interval, signed: bool = False, places: int | None = None) -> str:
    """An interval as "0.571 [0.550, 0.592]".

    Args:
        interval: What to write.
        signed: Write a plus before positive numbers, for differences.
        places: Decimal places; None takes them from the width of the interval.

    Returns:
        The text; "n/a" where there is no number.
    """
    if math.isnan(interval.mean):
        return "n/a"
    width = interval.high - interval.low
    sign, digits = "+" if signed else "", decimals(width) if places is None else places
    # An end that is not 0 does not look like it, or a star beside it would contradict the number.
    ends = [end for end in (interval.low, interval.high) if interval.excludes(0.0) and abs(end) > 1e-6]
    while any(round(end, digits) == 0 for end in ends):
        digits += 1
    mean = f"{interval.mean:{sign}.{digits}f}"
    if math.isnan(width):
        return f"{mean} [n/a]"
    return f"{mean} [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def format_difference(interval: Interval, places: int | None = None) -> str:
    """A difference as "+0.021 [+0.013, +0.029] *"; the star says that the interval excludes 0.

    Args:
        interval: What to write.
        places: Decimal places; None takes them from the width of the interval.

    Returns:
        The text.
    """
    return format_interval(interval, signed=True, places=places) + (" *" if interval.excludes(0.0) else "")


def meets(difference: Interval, ratio: float) -> tuple[str, str]:
    """Words for how one condition does against another.

    Args:
        difference: The one minus the other.
        ratio: Cost of the other over that of the one.

    Returns:
        The verb, and what to say of the cost after the other's name.
    """
    verb = "shows no clear difference from"
    if difference.excludes(0.0):
        verb = "beats" if difference.mean > 0 else "is worse than"
    return verb, " at equal cost" if ratio == 1 else f", which costs {ratio:.3g} times as much"


def verdict(summary: Summary) -> str:
    """Say in a sentence for each comparison whether calibration helped, by how much and at which cost.

    Args:
        summary: What a run found.

    Returns:
        Sentences on the optimised reward: "beats", "is worse than" or "shows no clear difference from" the
        base.
    """
    return (
        " ".join(_sentences(summary))
        or f"Nothing to compare: only {' and '.join(c.name for c in summary.conditions)} to go by."
    )


def _sentences(summary: Summary) -> list[str]:
    conditions = {condition.name: condition for condition in summary.conditions}
    compared = [comparison for against in AGAINST for comparison in summary.compared(against)]
    sentences = [_sentence(c, conditions[c.calibrated], conditions[c.base], summary.level) for c in compared]
    return sentences + _diversity_sentences(summary) + _alarms(summary)


def _sentence(comparison: Comparison, calibrated: Condition, base: Condition, level: float) -> str:
    difference = comparison.difference
    if math.isnan(difference.low):
        return f"Too few prompts ({difference.count}) to compare {comparison.calibrated} with {comparison.base}."
    verb, cost = meets(difference, base.num_forwards_per_image / calibrated.num_forwards_per_image)
    numbers = f"{comparison.reward} {format_interval(difference, signed=True)}"
    source = f"({difference.count} pairs, {level:.0%} interval)"
    return f"{_capital(comparison.calibrated)} {verb} {comparison.base}{cost}: {numbers} {source}."


def _diversity_sentences(summary: Summary) -> list[str]:
    """Whether the calibrated samples of a prompt are more or less alike than those of the base that costs as much."""
    sentences = []
    for comparison in (c for c in summary.diversity_comparisons if c.against == "equal NFE"):
        vendi = comparison.differences.vendi
        if math.isnan(vendi.low):
            continue
        verb = "shows no clear difference in diversity from"
        if vendi.excludes(0.0):
            verb = f"draws {'more' if vendi.mean > 0 else 'less'} diverse samples of a prompt than"
        sentences.append(
            f"{_capital(comparison.calibrated)} {verb} {comparison.base}: Vendi score "
            f"{format_interval(vendi, signed=True, places=2)} ({vendi.count} prompts, {summary.level:.0%} interval)."
        )
    return sentences


def _alarms(summary: Summary) -> list[str]:
    """Says where a reward was gained at the cost of what played no part in it: the mark of reward hacking."""
    sentences = []
    for gain in (c for c in summary.compared("equal NFE") if c.difference.low > 0):
        lost = {name: c for name in summary.watched for c in summary.compared("equal NFE", name)}
        fallen = [
            f"{name} {format_interval(c.difference, signed=True)}"
            for name, c in lost.items()
            if c.calibrated == gain.calibrated and c.difference.high < 0
        ]
        spread = [
            f"diversity (Vendi score) {format_interval(c.differences.vendi, signed=True, places=2)}"
            for c in summary.diversity_comparisons
            if (c.calibrated, c.against) == (gain.calibrated, gain.against) and c.differences.vendi.high < 0
        ]
        if fallen or spread:
            sentences.append(
                f"Reward hacking? {_capital(gain.calibrated)} gained what was optimised and lost "
                f"{', '.join(fallen + spread)} against {gain.base}: look at the pictures."
            )
    return sentences


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def render_table(summary: Summary, width: int = 100) -> str:
    """Draw the summary for a terminal.

    Args:
        summary: What a run found.
        width: Characters a line; rewards that do not fit beside each other go into a further table.

    Returns:
        Lines of plain text without a final newline: means of each condition, paired differences, the verdict,
        the budget and where the calibration is.
    """
    rewards = list(summary.conditions[0].rewards)
    rewards.sort(key=lambda name: name != summary.reward)  # the optimised one first, the others as given
    titles = [f"{name} (optimised)" if name == summary.reward else name for name in rewards]
    means, differences = _means_block(summary, rewards), _differences_block(summary, rewards)
    heads = (
        f"mean reward [{summary.level:.0%} interval]",
        f"{_answer(summary)} minus base, paired [{summary.level:.0%} interval]",
    )
    blocks = [*_block(heads, titles, means, differences, width), *_diversity_block(summary, width)]
    footnote = ["* the interval excludes 0; win / tie / loss are shares of pairs"] if differences else []
    space = [""] if differences or summary.diversity else []
    sentences = [line for s in (_sentences(summary) or [verdict(summary)]) for line in textwrap.wrap(s, width)]
    return "\n".join(line.rstrip() for line in (*blocks, *footnote, *space, *sentences, *_closing(summary)))


def _answer(summary: Summary) -> str:
    """What the answer is called: calibrated or trained."""
    names = [c.name for c in summary.conditions if c.role == "calibrated"]
    return names[0].split(" @ ")[0] if names else "calibrated"


def _block(
    heads: tuple[str, str], titles: Sequence[str], means: Sequence[_Row], differences: Sequence[_Row], width: int
) -> list[str]:
    """Means above and differences below, under their heads; columns that do not fit go into a further block."""
    columns = [[title, *(row[1][i] for row in (*means, *differences))] for i, title in enumerate(titles)]
    labels = ["", *(row[0] for row in (*means, *differences))]
    lines = []
    for group in _fit(columns, width - max(map(len, labels)) - len(_GAP)):
        rows = _align([labels, *group])
        rule = "-" * max(map(len, rows))
        top, middle = rows[: 1 + len(means)], rows[1 + len(means) :]
        lines += [heads[0], *top[:1], rule, *top[1:], *(["", heads[1], rule, *middle] if middle else []), ""]
    return lines


def _means_block(summary: Summary, rewards: Sequence[str]) -> list[_Row]:
    """A row for each condition: its name and NFE, then its mean of each reward, to the digits it needs."""
    places = {name: max(_places(means[name]) for means in summary.means) for name in rewards}
    return [
        (label, [format_interval(means[name], places=places[name]) for name in rewards])
        for label, means in zip(_labels(summary), summary.means, strict=True)
    ]


def _labels(summary: Summary) -> list[str]:
    """Name and NFE of each condition."""
    names = max(len(c.name) for c in summary.conditions)
    costs = max(len(str(c.num_forwards_per_image)) for c in summary.conditions)
    return [f"{c.name:<{names}}  {c.num_forwards_per_image:>{costs}} NFE" for c in summary.conditions]


def _differences_block(summary: Summary, rewards: Sequence[str]) -> list[_Row]:
    """Two rows for each compared pair of conditions: differences, then shares of wins, ties and losses."""
    rows: list[_Row] = []
    for first in (comparison for against in AGAINST for comparison in summary.compared(against)):
        pair = (first.calibrated, first.base, first.against)
        found = {c.reward: c for c in summary.comparisons if (c.calibrated, c.base, c.against) == pair}
        rows.append((_rivals(summary, first), [format_difference(found[name].difference) for name in rewards]))
        rows.append(("  win / tie / loss", [_shares(found[name]) for name in rewards]))
    return rows


def _rivals(summary: Summary, comparison: Comparison | DiversityComparison) -> str:
    """What is compared with what."""
    several = len({c.calibrated for c in summary.comparisons}) > 1
    label = f"{comparison.calibrated} - {comparison.base}" if several else f"against {comparison.base}"
    # The names of the start and of the weights alone say already what they are.
    return label if comparison.against in ("start", "weights alone") else f"{label}  ({comparison.against})"


def _diversity_block(summary: Summary, width: int) -> list[str]:
    """Diversity of each condition, then paired differences; nothing where it was not measured."""
    measured = next((c.diversity for c in summary.conditions if summary.diversity), None)
    if measured is None:
        return []
    means = [
        (label, [format_interval(d.vendi, places=2), format_interval(d.pixel_distance, places=3)])
        for label, d in zip(_labels(summary), summary.diversity, strict=True)
    ]
    ordered = sorted(summary.diversity_comparisons, key=lambda c: AGAINST.index(c.against))
    differences = [
        (
            _rivals(summary, c),
            [format_difference(c.differences.vendi, 2), format_difference(c.differences.pixel_distance, 3)],
        )
        for c in ordered
    ]
    heads = (
        f"diversity of {measured.samples} samples of a prompt, {measured.prompts} prompts "
        f"[{summary.level:.0%} interval]",
        f"{_answer(summary)} minus base, paired [{summary.level:.0%} interval]",
    )
    titles = [f"Vendi score (1 to {measured.samples})", "pixel distance"]
    by = "their pixels" if measured.features == PIXELS else f"what the reward {measured.features} sees in them"
    meaning = f"Vendi score: how many different pictures {measured.samples} samples amount to, by {by}"
    return [*_block(heads, titles, means, differences, width), *textwrap.wrap(meaning, width)]


def _places(interval: Interval) -> int:
    return decimals(interval.high - interval.low)


def _shares(comparison: Comparison) -> str:
    wins = comparison.wins
    if not wins.count:
        return "n/a"
    return " / ".join(f"{share / wins.count:.0%}" for share in (wins.wins, wins.ties, wins.losses))


def _fit(columns: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Cut the columns into groups that fit beside each other; a group has at least one."""
    groups: list[list[list[str]]] = []
    room = 0
    for column in columns:
        need = max(map(len, column)) + len(_GAP)
        if not groups or room < need:
            groups.append([])
            room = width + len(_GAP)
        groups[-1].append(column)
        room -= need
    return groups


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return [_GAP.join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _closing(summary: Summary) -> list[str]:
    budget = summary.budget
    dropped = max(i.dropped for means in summary.means for i in means.values())
    cost = (
        f"Cost of the run: {budget.images:,} images, {budget.forwards:,} forwards, "
        f"{budget.device_seconds:,.0f} device-seconds."
    )
    return [
        *([f"Up to {dropped} pictures of a condition had no finite reward and are left out."] if dropped else []),
        "",
        # Only the run that made a calibration knows its cost.
        *([cost] if budget.images else []),
        f"Calibration: {summary.calibration}",
    ]
