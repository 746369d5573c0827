"""What a run found: every condition's rewards, and base against calibrated with confidence intervals.

A condition is a way to make the fixed evaluation pictures: base or calibrated, with a number of steps. Each
calibrated condition is compared with the base that costs the same (equal NFE), with the most expensive base (full NFE)
and with the learned member weights without the learned scales (weights alone), which leaves what the scales do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.bootstrap import (
    FloatArray,
    Interval,
    WinRate,
    mean_interval,
    paired_interval,
    win_rate,
)
from calibri_lightning.evaluation.diversity import Diversity

Role = Literal["base", "start", "weights", "calibrated"]
Against = Literal["equal NFE", "full NFE", "start", "weights alone"]
AGAINST: tuple[Against, ...] = get_args(Against)
"""The kinds of comparison, in the order in which they are reported."""


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to make the evaluation pictures, and what the rewards said of each.

    Attributes:
        name: What the table calls it, e.g. "base @ 8 steps"; different for each condition of a summary.
        role: What of the answer was on: nothing, what the run began with, the members' weights alone, or all of it.
        num_steps: Sampler steps.
        num_forwards_per_image: NFE, transformer forwards an image: steps times members.
        rewards: Reward name to float64[P], one value a picture, NaN where a reward failed. All conditions
            hold the same (prompt, seed) pairs in the same order.
        diversity: How different its samples of one prompt are; None where that was not measured. All conditions hold
            the same prompts and seeds in the same order.
    """

    name: str
    role: Role
    num_steps: int
    num_forwards_per_image: int
    rewards: Mapping[str, FloatArray]
    diversity: Diversity | None = None

    def __post_init__(self) -> None:
        """Store the rewards as read-only float64 vectors."""
        copies = {name: np.array(values, dtype=np.float64) for name, values in self.rewards.items()}
        for values in copies.values():
            values.setflags(write=False)
        object.__setattr__(self, "rewards", copies)


@dataclass(frozen=True)
class DiversityIntervals:
    """The mean over prompts of both measures of diversity, or of their paired differences."""

    vendi: Interval
    pixel_distance: Interval


@dataclass(frozen=True)
class DiversityComparison:
    """The diversity of a calibrated condition against that of another one, prompt by prompt.

    Attributes:
        calibrated: Name of the calibrated condition.
        base: Name of the condition that it is compared with.
        against: As in `Comparison`.
        differences: Means of calibrated minus base.
    """

    calibrated: str
    base: str
    against: Against
    differences: DiversityIntervals


@dataclass(frozen=True)
class Comparison:
    """A calibrated condition against another one, in one reward, pair by pair.

    Attributes:
        calibrated: Name of the calibrated condition.
        base: Name of the condition that it is compared with.
        against: `equal NFE`: a base that costs as much; `full NFE`: the most expensive base; `start`: what the run
            began with; `weights alone`: the same member weights, all scales 1.
        reward: Name of the reward.
        difference: Mean of calibrated minus base, with its interval.
        wins: Pairs in which the calibrated picture scored higher, the same or lower.
    """

    calibrated: str
    base: str
    against: Against
    reward: str
    difference: Interval
    wins: WinRate


@dataclass(frozen=True)
class Budget:
    """What the calibration cost: images generated and scored, forwards of one image each, device-seconds."""

    images: int
    forwards: int
    device_seconds: float

    def plus(self, images: int, forwards: int, device_seconds: float) -> Budget:
        """Adds what more was spent.

        Args:
            images: Images generated and scored.
            forwards: Forwards of one image each.
            device_seconds: Seconds of all devices.

        Returns:
            The sum.
        """
        return Budget(self.images + images, self.forwards + forwards, self.device_seconds + device_seconds)


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything that the end of a run reports; made by `summarise` or `files.from_json`.

    Attributes:
        reward: The reward that was optimised, or their sum.
        conditions: All conditions, base first as given.
        comparisons: Calibrated against base, for every reward.
        budget: What the calibration cost.
        calibration: Where `calibration.json` is.
        clusters: The prompt index of each reward value; None when every value has a prompt of its own.
        level: Confidence of all intervals.
        means: For each condition, in order, the mean of each reward with its interval.
        diversity: For each condition, in order, its diversity; empty unless all were measured.
        diversity_comparisons: Calibrated against base; empty like `diversity`.
        watched: Rewards that played no part in what was optimised.
        calibration_sha256: `CalibrationFile.sha256` of that file; empty where there was none, or it is not known.
    """

    reward: str
    conditions: tuple[Condition, ...]
    comparisons: tuple[Comparison, ...]
    budget: Budget
    calibration: str
    clusters: tuple[int, ...] | None
    level: float
    means: tuple[Mapping[str, Interval], ...]
    diversity: tuple[DiversityIntervals, ...]
    diversity_comparisons: tuple[DiversityComparison, ...]
    watched: tuple[str, ...] = ()
    calibration_sha256: str = ""

    def compared(self, against: Against, reward: str | None = None) -> tuple[Comparison, ...]:
        """The comparisons of one kind in one reward, the optimised one unless told."""
        wanted = (against, reward or self.reward)
        return tuple(c for c in self.comparisons if (c.against, c.reward) == wanted)


def summarise(
    conditions: Sequence[Condition],
    reward: str,
    budget: Budget,
    calibration: str | Path,
    clusters: Sequence[int] | None = None,
    level: float = 0.95,
    watched: Sequence[str] = (),
    calibration_sha256: str = "",
) -> Summary:
    """Compare every calibrated condition with the base at equal and at full NFE, in every reward.

    Args:
        conditions: All conditions; each with the same reward names, over the same (prompt, seed) pairs.
        reward: The reward that was optimised.
        budget: What the calibration cost.
        calibration: Where `calibration.json` is.
        clusters: The prompt index of each value when several samples share a prompt.
        level: Confidence of all intervals.
        watched: Rewards that played no part in what was optimised.
        calibration_sha256: `CalibrationFile.sha256` of that file.

    Returns:
        The summary. When the base at equal NFE is also the most expensive one, it is compared once, as `equal
        NFE`.

    Raises:
        UserError: If the conditions differ in names of rewards or in length, share a name, or lack `reward`.
    """
    _check(conditions, reward)
    members = None if clusters is None else tuple(int(c) for c in clusters)
    means = tuple({name: mean_interval(r, members, level=level) for name, r in c.rewards.items()} for c in conditions)
    comparisons = tuple(
        Comparison(
            calibrated.name,
            base.name,
            against,
            name,
            paired_interval(calibrated.rewards[name], base.rewards[name], members, level=level),
            win_rate(calibrated.rewards[name], base.rewards[name]),
        )
        for calibrated, base, against in _rivals(conditions)
        for name in calibrated.rewards
    )
    diversity = _diversity(conditions, level)
    return Summary(
        reward,
        tuple(conditions),
        comparisons,
        budget,
        str(calibration),
        members,
        level,
        means,
        *diversity,
        tuple(watched),
        calibration_sha256,
    )


def _diversity(
    conditions: Sequence[Condition], level: float
) -> tuple[tuple[DiversityIntervals, ...], tuple[DiversityComparison, ...]]:
    """The diversity of each condition, and of each pair that is compared; a prompt is one value."""
    measured = {c.name: c.diversity for c in conditions if c.diversity is not None}
    if len(measured) < len(conditions):
        return (), ()

    def differences(first: Diversity, second: Diversity) -> DiversityIntervals:
        return DiversityIntervals(
            paired_interval(first.vendi, second.vendi, level=level),
            paired_interval(first.pixel_distance, second.pixel_distance, level=level),
        )

    means = [
        DiversityIntervals(mean_interval(d.vendi, level=level), mean_interval(d.pixel_distance, level=level))
        for d in measured.values()
    ]
    comparisons = [
        DiversityComparison(
            calibrated.name, base.name, against, differences(measured[calibrated.name], measured[base.name])
        )
        for calibrated, base, against in _rivals(conditions)
    ]
    return tuple(means), tuple(comparisons)


def _rivals(conditions: Sequence[Condition]) -> Iterator[tuple[Condition, Condition, Against]]:
    """Pairs to compare: each calibrated condition with the bases of its own and highest NFE, start and weights."""
    bases = [c for c in conditions if c.role == "base"]
    for calibrated in (c for c in conditions if c.role == "calibrated"):
        equal = [b for b in bases if b.num_forwards_per_image == calibrated.num_forwards_per_image]
        yield from ((calibrated, base, "equal NFE") for base in equal)
        if bases:
            fullest = max(bases, key=lambda b: b.num_forwards_per_image)
            if fullest not in equal:
                yield calibrated, fullest, "full NFE"
        others: tuple[tuple[Role, Against], ...] = (("start", "start"), ("weights", "weights alone"))
        for role, against in others:
            for other in (c for c in conditions if c.role == role and c.num_steps == calibrated.num_steps):
                yield calibrated, other, against


def _check(conditions: Sequence[Condition], reward: str) -> None:
    names = [c.name for c in conditions]
    if len(set(names)) != len(names):
        raise UserError(
            f"conditions are named {names}; every condition needs a name of its own, rename the repeated ones"
        )
    if not conditions or any(reward not in c.rewards for c in conditions):
        known = sorted({name for c in conditions for name in c.rewards})
        raise UserError(f"reward is {reward!r}, but not every condition was scored with it; choose one of {known}")
    shapes = [{name: r.shape for name, r in c.rewards.items()} for c in conditions]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            f"conditions have the rewards {shapes}; a paired comparison needs the same rewards over the same "
            "prompts and seeds in every condition, so score them all again with one list of prompts"
        )
