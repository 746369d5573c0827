"""Rewards of different units as one number: limited, normalised, weighted and added (numpy, float64).

Pictures are compared with those they compete with: the candidates of a search that share a prompt and its noise, or the
group of a prompt in GRPO. A matrix [C, S] has the C competitors of each of its S columns; NaN marks what was not made
or failed. Normalising within a column is what GDPO does for each reward (arXiv 2601.05242) before the weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import rankdata

from calibri_lightning.arrays import ROUNDING, Floats
from calibri_lightning.errors import UserError
from calibri_lightning.rewards.combine import Entry

Normalise = Literal["none", "running", "z_score", "rank"]
"""How rewards are brought to one unit before they are weighted."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each reward."""

    mean: Floats
    """[R]."""
    std: Floats
    """[R]; 1 where a reward did not vary: it then keeps its own unit."""

    def apply(self, parts: Floats) -> Floats:
        """Brings rewards to mean 0 and std 1.

        Args:
            parts: [R, ...].

        Returns:
            [R, ...].
        """
        shape = (-1, *(1,) * (parts.ndim - 1))
        return (parts - self.mean.reshape(shape)) / self.std.reshape(shape)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each reward over all pictures so far (Chan et al. 1979)."""

    count: Floats
    mean: Floats
    squares: Floats

    @classmethod
    def none(cls, num_rewards: int) -> Moments:
        """Before the first picture.

        Args:
            num_rewards: Rewards R.

        Returns:
            Zeros.
        """
        return cls(np.zeros(num_rewards), np.zeros(num_rewards), np.zeros(num_rewards))

    def plus(self, parts: Floats) -> Moments:
        """Adds pictures.

        Args:
            parts: [R, ...]; what is not finite does not count.

        Returns:
            The new moments.
        """
        flat = parts.reshape(len(parts), -1)
        finite = np.isfinite(flat)
        count = finite.sum(axis=1).astype(np.float64)
        mean = np.where(finite, flat, 0.0).sum(axis=1) / np.maximum(count, 1)
        squares = (np.where(finite, flat - mean[:, None], 0.0) ** 2).sum(axis=1)
        total = self.count + count
        gap, share = mean - self.mean, count / np.maximum(total, 1)
        return Moments(total, self.mean + gap * share, self.squares + squares + gap**2 * self.count * share)

    @property
    def scale(self) -> Scale:
        """Mean and std so far; NaN of a reward that had no finite score yet."""
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        flat, empty = std <= ROUNDING * np.abs(self.mean), self.count == 0
        return Scale(np.where(empty, np.nan, self.mean), np.where(empty, np.nan, np.where(flat, 1.0, std)))


class Blend:
    """Makes one number of the rewards that are optimised, and keeps what that needs to know of the run.

    Args:
        entries: The rewards that are optimised.
        normalise: none: as they are. running: mean 0 and std 1 over all training pictures of the steps before. z_score:
            mean 0 and std 1 among the pictures that compete. rank: their ranks from -1 to 1.

    Raises:
        UserError: If there is no such way.
    """

    def __init__(self, entries: Sequence[Entry], normalise: Normalise = "none") -> None:
        if normalise not in get_args(Normalise):
            raise UserError(
                f"model.normalise is {normalise!r}; it is one of {', '.join(get_args(Normalise))}: what is done to "
                "each reward before it is weighted."
            )
        self.normalise = normalise
        self.names = tuple(entry.reward.name for entry in entries)
        self._weights = np.array([float(entry.config.weight) for entry in entries])
        self._limits = [(_or(e.config.floor, -np.inf), _or(e.config.cap, np.inf)) for e in entries]
        self._moments = Moments.none(len(self.names))
        self._reference: Scale | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a picture's number depends on its own rewards alone."""
        return self.normalise == "none"

    @property
    def keeps_parts(self) -> bool:
        """Whether single rewards must be kept: to be compared, or because there is more than one to be reported."""
        return not self.is_plain or len(self.names) > 1

    def parts(self, each: Mapping[str, Floats]) -> Floats:
        """The rewards that are optimised, within their limits.

        Args:
            each: Rewards by name, all of one shape.

        Returns:
            [R, ...], float64.
        """
        return np.stack([np.clip(each[name], *limits) for name, limits in zip(self.names, self._limits, strict=True)])

    def scale(self, parts: Floats) -> Scale | None:
        """The scale of a training step, which is fixed while it lasts.

        Args:
            parts: Parts [R, ...] of its first pictures: they give the scale of rewards that have none of the steps
                before, as in the very first one.

        Returns:
            The scale; None where rewards are normalised otherwise.
        """
        if self.normalise != "running":
            return None
        before, now = self._moments.scale, Moments.none(len(self.names)).plus(parts).scale
        unknown = np.isnan(before.mean)
        return Scale(np.where(unknown, now.mean, before.mean), np.where(unknown, now.std, before.std))

    def total(self, parts: Floats, scale: Scale | None = None) -> Floats:
        """Makes one number of the parts of pictures that compete.

        Args:
            parts: [R, C, S]; NaN where not made or failed.
            scale: That of the step.

        Returns:
            [C, S]; NaN where a part is.
        """
        # A picture without one of its rewards is compared in none of them.
        usable = np.isfinite(parts).all(axis=0)
        masked = np.where(usable, parts, np.nan)
        if self.normalise == "z_score":
            masked = np.stack([_z_scores(part) for part in masked])
        elif self.normalise == "rank":
            masked = np.stack([_ranks(part) for part in masked])
        elif scale is not None:
            masked = scale.apply(masked)
        return self._sum(masked)

    def plain(self, parts: Floats) -> Floats:
        """The weighted sum of rewards as they are, which means the same in every step.

        Args:
            parts: [R, ...].

        Returns:
            [...]; NaN where a part is.
        """
        return self._sum(parts)

    def learn(self, parts: Floats) -> None:
        """Takes note of the pictures of a finished training step.

        Args:
            parts: [R, ...].
        """
        if self.normalise == "running":
            self._moments = self._moments.plus(parts)

    def judge(self, each: Mapping[str, Floats], reference: Scale) -> Floats:
        """Makes one number that means the same in all validations of a run, or in all conditions of a test.

        Args:
            each: Rewards by name, [P].
            reference: What counts as mean 0 and std 1.

        Returns:
            [P].
        """
        return self._sum(reference.apply(self.parts(each)))

    def scale_of(self, each: Mapping[str, Floats]) -> Scale:
        """The scale of some pictures, as a reference for others.

        Args:
            each: Rewards by name, [P].

        Returns:
            The scale.
        """
        return Moments.none(len(self.names)).plus(self.parts(each)).scale

    def reference(self, start: Mapping[str, Floats] | None) -> Scale:
        """The reference of the run's validations.

        Args:
            start: Rewards of the start by name, [P], where they are known now; the first with a finite score of every
                reward are kept.

        Returns:
            The reference; NaN as long as there is none.
        """
        if self._reference is not None:
            return self._reference
        nothing = np.full(len(self.names), np.nan)
        found = Scale(nothing, nothing) if start is None else self.scale_of(start)
        if np.isfinite(found.mean).all():
            self._reference = found
        return found

    @property
    def changes_units(self) -> bool:
        """Whether the number that validation and test report is in other units than the rewards."""
        return not self.is_plain and len(self.names) > 1

    @property
    def lacks_reference(self) -> bool:
        """Whether the start's scores are still needed to judge others."""
        return self.changes_units and self._reference is None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain lists."""
        reference = self._reference
        return {
            "moments": [values.tolist() for values in vars(self._moments).values()],
            "reference": None if reference is None else [reference.mean.tolist(), reference.std.tolist()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave.

        Args:
            state: The state of a run with the same rewards.
        """
        self._moments = Moments(*(np.array(values) for values in state["moments"]))
        given = state["reference"]
        self._reference = None if given is None else Scale(*(np.array(values) for values in given))

    def _sum(self, parts: Floats) -> Floats:
        return np.tensordot(self._weights, parts, axes=1)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _z_scores(values: Floats) -> Floats:
    """Each column [C] of [C, S] to mean 0 and std 1; 0 where its spread is rounding alone."""
    usable = np.isfinite(values)
    count = np.maximum(usable.sum(axis=0), 1)
    centred = np.where(usable, values - np.where(usable, values, 0.0).sum(axis=0) / count, 0.0)
    std = np.sqrt((centred**2).sum(axis=0) / count)
    flat = std <= ROUNDING * np.where(usable, np.abs(values), 0.0).max(axis=0, initial=0.0)
    return np.where(usable, np.where(flat, 0.0, centred / np.where(flat, 1.0, std)), np.nan)


def _ranks(values: Floats) -> Floats:
    """Each column [C] of [C, S] to -1 (lowest) .. 1 (highest), ties to their mean; 0 for the only one."""
    ranks = rankdata(values, axis=0, nan_policy="omit")
    count = np.isfinite(values).sum(axis=0)
    return np.where(
        count > 1, 2 * (ranks - 1) / np.maximum(count - 1, 1) - 1, np.where(np.isfinite(values), 0.0, np.nan)
    )
