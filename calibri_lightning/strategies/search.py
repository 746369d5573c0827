"""What every search without gradients shares: space, random streams, the ask/evaluate/tell protocol.

Rewards are maximised. A generation is a grid of cells, candidate x prompt slot. In its matrix of rewards a
cell is NaN until it has been evaluated and `FAILED` where the evaluation gave no finite number. No file of
this protocol imports
lightning: a core is numpy only, lives on rank 0 alone and is rebuilt by replaying its generations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.errors import UserError

FAILED = -math.inf
"""Marks an evaluated cell whose reward is not finite: worse than any reward, never a middling one."""

LEAST_USABLE = 0.75
"""Smallest share of usable prompt slots in a generation that is told (docs/search.md)."""

_TAIL = 0.25
_STREAM_TAG = 0x63616C69627269


@dataclass(frozen=True)
class SearchSpace:
    """Where a search may go; all arrays are float64 [n]."""

    start: Floats
    """First mean."""
    lower: Floats
    """Least allowed values."""
    upper: Floats
    """Largest allowed values."""
    stds: Floats
    """Relative step sizes: sigma times these is the standard deviation of a coordinate."""

    def __post_init__(self) -> None:
        """Checks the arrays.

        Raises:
            UserError: If a length, a bound, the start or a step size is unusable.
        """
        sizes = {array.shape for array in (self.start, self.lower, self.upper, self.stds)}
        if len(sizes) != 1 or self.start.ndim != 1 or self.start.size == 0:
            raise UserError(
                f"The search space has arrays of shapes {sorted(sizes)}; start, lower, upper and stds must "
                f"be equally long "
                "and not empty. Give one value of each for every parameter."
            )
        # A comparison with NaN is false, so that a NaN anywhere is caught here as well.
        outside = np.flatnonzero(~((self.lower <= self.start) & (self.start <= self.upper) & (self.lower < self.upper)))
        if outside.size:
            i = int(outside[0])
            raise UserError(
                f"Parameter {i} starts at {self.start[i]:g} with bounds [{self.lower[i]:g}, "
                f"{self.upper[i]:g}] "
                f"({outside.size} such parameter(s)); the start must lie within its bounds. Widen the "
                f"bounds or change the start."
            )
        if not (np.isfinite(self.start).all() and np.isfinite(self.stds).all() and (self.stds > 0).all()):
            raise UserError(
                "A start value or a relative step size is not a finite number, or a step size is not above "
                "0; "
                "each parameter needs a finite start and a positive step size. Correct the calibration's "
                "settings."
            )

    @property
    def num_parameters(self) -> int:
        """Number n of parameters."""
        return int(self.start.size)


def search_space(
    names: Sequence[str], start: Floats, lower: Floats, upper: Floats, stds: Floats, weight_std: float | None
) -> SearchSpace:
    """Puts a search space together.

    Args:
        names: Parameter names; raw member weights end in "/weight".
        start: First mean, [n].
        lower: Least allowed values, [n].
        upper: Largest allowed values, [n].
        stds: Relative step sizes, [n].
        weight_std: Replaces the relative step size of raw member weights.

    Returns:
        The space.

    Raises:
        UserError: If a step size is given for weights that are not learned.
    """
    weights = np.array([name.endswith("/weight") for name in names])
    if weight_std is not None:
        if not weights.any():
            raise UserError(
                f"weight_std is {weight_std}, but this run learns no raw member weights for it to act on. Remove it, "
                "or set model.calibration.weight_mode to raw."
            )
        stds = np.where(weights, weight_std, stds)
    arrays = [np.array(array, dtype=np.float64) for array in (start, lower, upper, stds)]
    return SearchSpace(*arrays)


def generation_stream(seed: int, generation: int) -> np.random.Generator:
    """Random stream of one generation, so that a resumed search needs no generator state.

    Args:
        seed: Seed of the run.
        generation: Number of the generation, from 0.

    Returns:
        A Philox generator keyed by both numbers.
    """
    key = np.array([seed & (2**64 - 1), generation], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, _STREAM_TAG]))


class SearchCore(ABC):
    """A search over theta: ask for candidates, evaluate cells until none is wanted, tell the rewards.

    Args:
        space: Start, bounds and relative step sizes.
        seed: Seed of the run.
        popsize: Candidates K of a generation.
        num_slots: Prompt slots S of a generation.
    """

    def __init__(self, space: SearchSpace, seed: int, popsize: int, num_slots: int) -> None:
        self.space, self.seed, self.popsize, self.num_slots = space, seed, popsize, num_slots
        self._means: list[Floats] = []
        self._tail_begins = 0  # means before a move are of elsewhere

    @property
    @abstractmethod
    def mean(self) -> Floats:
        """The current mean, float64 [n], within the bounds."""

    @property
    @abstractmethod
    def sigma(self) -> float:
        """The current overall step size."""

    @property
    @abstractmethod
    def num_cells(self) -> int:
        """Images of one complete generation."""

    @abstractmethod
    def ask(self, generation: int, progress: float = 0.0) -> Floats:
        """Draws the candidates of a generation.

        Args:
            generation: Number of the generation, from 0; also the number of tells so far.
            progress: Used share of the budget, 0 .. 1, which drives the annealed settings.

        Returns:
            Candidates, float64 [K, n], within the bounds.
        """

    @abstractmethod
    def next_cells(self, rewards: Floats) -> Cells:
        """Says which cells to evaluate next.

        Args:
            rewards: Rewards so far [K, S]: NaN = not evaluated, `FAILED` = not finite.

        Returns:
            Bool [K, S]; all False when the generation is complete.
        """

    @abstractmethod
    def tell(self, rewards: Floats) -> None:
        """Moves the distribution.

        Args:
            rewards: A complete matrix [K, S] that `rejection` does not object to.
        """

    def tail_mean(self) -> Floats:
        """Average of the means of the last quarter of the generations since a move, float64 [n]; at first the mean."""
        means = self._means[self._tail_begins :]
        if not means:
            return self.mean
        count = max(1, math.ceil(_TAIL * len(means)))
        return np.mean(means[-count:], axis=0)

    def move(self, theta: Floats) -> None:
        """Puts the mean elsewhere, between two generations; all else that the search has learned stays.

        Args:
            theta: The new mean, float64 [n], within the bounds.
        """
        self._tail_begins = len(self._means)
        self._put_mean(theta)

    @abstractmethod
    def _put_mean(self, theta: Floats) -> None: ...

    def fitness(self, rewards: Floats) -> Floats:
        """Mean reward of each candidate over its evaluated, usable slots.

        Args:
            rewards: Rewards [K, S].

        Returns:
            float64 [K]; `FAILED` for a candidate with a failed cell in a usable slot, NaN without any cell.
        """
        usable = rewards[:, usable_slots(rewards)]
        done = ~np.isnan(usable)
        total = np.where(done, usable, 0.0).sum(axis=1)
        count = done.sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def rejection(self, rewards: Floats) -> str | None:
        """Says why a generation must not be told.

        Args:
            rewards: Rewards [K, S], complete or so far.

        Returns:
            The reason as a sentence; None where there is none.
        """
        evaluated = int((~np.isnan(rewards)).any(axis=0).sum())
        usable = int(usable_slots(rewards).sum())
        if usable < LEAST_USABLE * evaluated:
            return f"only {usable} of {evaluated} prompts have a finite reward ({LEAST_USABLE:.0%} are needed)"
        if not self.next_cells(rewards).any() and self.is_flat(rewards):
            return "the rewards do not tell the candidates apart: all that are finite are equal"
        return None

    def is_flat(self, rewards: Floats) -> bool:
        """Whether a complete generation holds no information.

        Args:
            rewards: A complete matrix [K, S].

        Returns:
            True where every slot gave all its finite candidates the same reward.
        """
        finite = np.isfinite(rewards)
        highest = np.where(finite, rewards, -np.inf).max(axis=0)
        lowest = np.where(finite, rewards, np.inf).min(axis=0)
        return not bool((highest > lowest).any())

    def diagnostics(self) -> Mapping[str, float]:
        """Numbers worth a curve.

        Returns:
            Values by name.
        """
        return {"sigma": self.sigma}


def usable_slots(rewards: Floats) -> Cells:
    """Slots with a finite reward; one that failed for all candidates is dropped for all of them.

    Args:
        rewards: Rewards [K, S].

    Returns:
        Bool [S].
    """
    return np.asarray(np.isfinite(rewards).any(axis=0))
