"""Computes a comparison: who meets whom, and with which result.

Each scored contender is compared with the base that costs the same (equal NFE), with the most expensive base (full NFE)
and, at its own number of steps, with every contender listed before it (each other).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.bootstrap import mean_interval, paired_interval
from calibri_lightning.evaluation.summary import DiversityIntervals
from calibri_lightning.tools.compare.comparison import LEVEL, Against, Comparison, DiversityPair, Pair, Row
from calibri_lightning.tools.compare.contenders import Contender, Scored
from calibri_lightning.tools.compare.gallery import GalleryPrompt
from calibri_lightning.tools.compare.wins import win_interval


@dataclass(frozen=True)
class Setting:
    """What a comparison is of."""

    title: str
    model: str
    command: str
    prompts: tuple[str, ...]
    headline_steps: int
    reward: str
    """The reward that decides."""
    clusters: tuple[int, ...] | None = None
    """The prompt of each reward value, where several samples share one."""
    level: float = LEVEL
    notes: tuple[str, ...] = ()
    """What the reader must know of how the runs were drawn."""


def compare(
    setting: Setting,
    contenders: Sequence[Contender],
    scored: Sequence[Scored],
    gallery: Sequence[GalleryPrompt] = (),
) -> Comparison:
    """Computes all intervals of a comparison.

    Args:
        setting: What is compared.
        contenders: The base first, then the runs.
        scored: Every contender at every number of steps.
        gallery: Pictures to show.

    Returns:
        The comparison.

    Raises:
        UserError: If a cell is missing or there twice, labels repeat, or rewards differ in names or length.
    """
    steps = tuple(sorted({cell.num_steps for cell in scored}))
    _check(setting, contenders, scored, steps)
    names = list(scored[0].rewards)
    rewards = (setting.reward, *(name for name in names if name != setting.reward))
    members = {c.label: c.num_members for c in contenders}
    diversity = next((cell.diversity for cell in scored if cell.diversity is not None), None)
    return Comparison(
        title=setting.title,
        model=setting.model,
        command=setting.command,
        prompts=setting.prompts,
        num_pictures=len(scored[0].rewards[setting.reward]),
        rewards=rewards,
        num_steps=steps,
        headline_steps=setting.headline_steps,
        contenders=tuple(contenders),
        rows=tuple(_row(cell, members[cell.contender], rewards, setting) for cell in scored),
        pairs=tuple(
            _pair(first, other, against, reward, setting)
            for first, other, against in _rivals(contenders, scored)
            for reward in rewards
        ),
        gallery=tuple(gallery),
        diversity_pairs=tuple(_diversity_pairs(_rivals(contenders, scored), setting.level)),
        level=setting.level,
        samples=0 if diversity is None else diversity.samples,
        features="" if diversity is None else diversity.features,
        notes=setting.notes,
    )


def _row(cell: Scored, num_members: int, rewards: Sequence[str], setting: Setting) -> Row:
    level, own = setting.level, cell.diversity
    means = {name: mean_interval(cell.rewards[name], setting.clusters, level=level) for name in rewards}
    spread = None
    if own is not None:
        spread = DiversityIntervals(
            mean_interval(own.vendi, level=level), mean_interval(own.pixel_distance, level=level)
        )
    return Row(cell.contender, cell.num_steps, cell.num_steps * num_members, means, spread)


def _pair(first: Scored, other: Scored, against: Against, reward: str, setting: Setting) -> Pair:
    mine, theirs = first.rewards[reward], other.rewards[reward]
    return Pair(
        first.contender,
        first.num_steps,
        other.contender,
        other.num_steps,
        against,
        reward,
        paired_interval(mine, theirs, setting.clusters, level=setting.level),
        win_interval(mine, theirs, setting.clusters, setting.level),
    )


def _diversity_pairs(rivals: Iterator[tuple[Scored, Scored, Against]], level: float) -> Iterator[DiversityPair]:
    for cell, base, against in rivals:
        mine, theirs = cell.diversity, base.diversity
        if against != "equal NFE" or mine is None or theirs is None:
            continue
        vendi = paired_interval(mine.vendi, theirs.vendi, level=level)
        distance = paired_interval(mine.pixel_distance, theirs.pixel_distance, level=level)
        yield DiversityPair(cell.contender, cell.num_steps, DiversityIntervals(vendi, distance))


def _rivals(contenders: Sequence[Contender], scored: Sequence[Scored]) -> Iterator[tuple[Scored, Scored, Against]]:
    """Each run against the bases of its own and of the highest NFE, and against the runs before it."""
    members = {c.label: c.num_members for c in contenders}
    order = {c.label: number for number, c in enumerate(contenders) if not c.is_base}
    bases = [cell for cell in scored if cell.contender not in order]

    def nfe(cell: Scored) -> int:
        return cell.num_steps * members[cell.contender]

    fullest = max(bases, key=nfe)
    for cell in (cell for cell in scored if cell.contender in order):
        yield from ((cell, base, "equal NFE") for base in bases if nfe(base) == nfe(cell))
        if nfe(fullest) != nfe(cell):  # else that is the comparison at equal NFE
            yield cell, fullest, "full NFE"
        for other in scored:
            earlier = other.contender in order and order[other.contender] < order[cell.contender]
            if earlier and other.num_steps == cell.num_steps:
                yield cell, other, "each other"


def _check(setting: Setting, contenders: Sequence[Contender], scored: Sequence[Scored], steps: tuple[int, ...]) -> None:
    labels = [c.label for c in contenders]
    if len(set(labels)) != len(labels):
        raise UserError(f"The runs are called {labels}; each needs a name of its own: give LABEL=FOLDER.")
    if sum(c.is_base for c in contenders) != 1 or len(contenders) < 2:
        raise UserError(f"There are {labels} to compare; it takes the base and one or more runs.")
    cells = sorted((cell.contender, cell.num_steps) for cell in scored)
    if cells != sorted((label, count) for label in labels for count in steps):
        raise UserError(f"Scored were {cells}; a comparison needs every one of {labels} once at each of {steps} steps.")
    if setting.headline_steps not in steps:
        raise UserError(f"The verdict is for {setting.headline_steps} steps; it must be one of {steps}.")
    shapes = [{name: np.shape(values) for name, values in cell.rewards.items()} for cell in scored]
    if any(shape != shapes[0] for shape in shapes) or setting.reward not in shapes[0]:
        raise UserError(
            f"The rewards are {shapes}; all need the same rewards over the same pictures, {setting.reward}."
        )
