"""The verdict in sentences: which run wins, by how much, at which cost, and what it lost on the way."""

from __future__ import annotations

import math

from calibri_lightning.evaluation.text import format_interval, meets
from calibri_lightning.tools.compare.comparison import Comparison, Pair
from calibri_lightning.tools.compare.contenders import Contender


def winner(comparison: Comparison) -> Contender:
    """The contender with the highest mean of the deciding reward at the headline's number of steps.

    Args:
        comparison: All numbers.

    Returns:
        A run or the base; the earlier one where means are equal, so the base before any run.
    """

    def mean(contender: Contender) -> float:
        value = comparison.row(contender.label, comparison.headline_steps).means[comparison.reward].mean
        return -math.inf if math.isnan(value) else value

    return max(comparison.contenders, key=mean)


def verdict(comparison: Comparison) -> tuple[str, ...]:
    """Says who wins, in plain sentences, the most important first.

    Args:
        comparison: All numbers.

    Returns:
        One to about ten sentences.
    """
    best, steps, reward = winner(comparison), comparison.headline_steps, comparison.reward
    mean = format_interval(comparison.row(best.label, steps).means[reward])
    if best.is_base:
        first = f"No run beats the base at {steps} steps: its mean {reward} of {mean} is the highest."
    else:
        first = f"{best.label} has the highest {reward} at {steps} steps: {mean}{_close(comparison, best)}."
    sentences = [first]
    for run in sorted(comparison.runs, key=lambda run: run is not best):
        sentences += [_sentence(comparison, pair) for pair in _pairs(comparison, run.label)]
    sentences += [_sentence(comparison, pair) for pair in _against_others(comparison, best)]
    return (*sentences, *losses(comparison))


def _close(comparison: Comparison, best: Contender) -> str:
    """The runs whose difference from the winner may be chance."""
    close = [
        pair.other if pair.contender == best.label else pair.contender
        for pair in _against_others(comparison, best)
        if not pair.difference.excludes(0.0)
    ]
    if not close:
        return ""
    names = close[0] if len(close) == 1 else f"{', '.join(close[:-1])} and {close[-1]}"
    return f"; {names} {'is' if len(close) == 1 else 'are'} not clearly behind"


def _pairs(comparison: Comparison, label: str) -> list[Pair]:
    found = [
        comparison.pair(label, comparison.headline_steps, against, comparison.reward)
        for against in ("equal NFE", "full NFE")
    ]
    return [pair for pair in found if pair is not None]


def _against_others(comparison: Comparison, best: Contender) -> list[Pair]:
    """The winner and each other run; the one that is listed later comes first in the sentence."""
    steps, reward = comparison.headline_steps, comparison.reward
    pairs = [
        comparison.pair(best.label, steps, "each other", reward, run.label)
        or comparison.pair(run.label, steps, "each other", reward, best.label)
        for run in comparison.runs
        if not best.is_base and run is not best
    ]
    return [pair for pair in pairs if pair is not None]


def _sentence(comparison: Comparison, pair: Pair) -> str:
    first, other = (f"{pair.contender} at {pair.num_steps} steps", f"{pair.other} at {pair.other_steps} steps")
    difference = pair.difference
    if math.isnan(difference.low):
        return f"Too few prompts ({difference.count}) to compare {first} with {other}."
    ratio = comparison.row(pair.other, pair.other_steps).nfe / comparison.row(pair.contender, pair.num_steps).nfe
    verb, cost = meets(difference, ratio)
    return (
        f"{first} {verb} {other}{cost}: {pair.reward} {format_interval(difference, signed=True)}, "
        f"{pair.wins.mean:.0%} of {pair.wins.count} pairs won."
    )


def losses(comparison: Comparison) -> list[str]:
    """Says where a run gained what decides and lost another reward, or diversity: the mark of reward hacking.

    Args:
        comparison: All numbers.

    Returns:
        A sentence for each such run.
    """
    sentences, steps = [], comparison.headline_steps
    for run in comparison.runs:
        gain = comparison.pair(run.label, steps, "equal NFE", comparison.reward)
        if gain is None or not gain.difference.low > 0:
            continue
        lost = [comparison.pair(run.label, steps, "equal NFE", name) for name in comparison.rewards[1:]]
        fallen = [
            f"{pair.reward} {format_interval(pair.difference, signed=True)}"
            for pair in lost
            if pair is not None and pair.difference.high < 0
        ]
        spread = next(
            (
                p.differences.vendi
                for p in comparison.diversity_pairs
                if (p.contender, p.num_steps) == (run.label, steps)
            ),
            None,
        )
        if spread is not None and round(spread.high, 2) < 0:
            fallen.append(f"diversity (Vendi score) {format_interval(spread, signed=True, places=2)}")
        if fallen:
            sentences.append(f"{run.label} lost on the way: {', '.join(fallen)}. Look at the pictures.")
    return sentences
