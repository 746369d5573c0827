"""A pass over the validation prompts: the vectors that are scored, and their scores so far."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from calibri_lightning.arrays import Floats

MOST_FAILED = 0.25
"""Share of the validation prompts that may fail for every vector before there is no score."""


class Validation:
    """One pass over the validation prompts.

    Args:
        thetas: float64 [n] by name; may be empty.
    """

    def __init__(self, thetas: Mapping[str, Floats]) -> None:
        self._names = tuple(thetas)
        self.thetas = np.stack(list(thetas.values())) if thetas else np.empty((0, 0))
        self._batches: list[Floats] = []

    def add(self, rewards: Floats) -> None:
        """Takes the rewards of a batch of prompts.

        Args:
            rewards: float64 [vectors, prompts], NaN where a picture failed.
        """
        self._batches.append(rewards)

    def scores(self) -> dict[str, float]:
        """Averages what was added.

        Returns:
            Score by vector, as of `validation_scores`; empty where nothing was scored.
        """
        if not self._batches:
            return {}
        return validation_scores(dict(zip(self._names, np.concatenate(self._batches, axis=1), strict=True)))


def validation_scores(rewards: Mapping[str, Floats]) -> dict[str, float]:
    """Averages each vector's rewards over the prompts.

    A prompt that fails for every vector (a reward that divides by zero, say) tells nothing about any of them and
    is left out; a vector that fails on a prompt on which another one does not gets no score.

    Args:
        rewards: Rewards [P] by vector, NaN where a picture failed.

    Returns:
        Mean by vector; NaN where there is none.
    """
    if not rewards:
        return {}
    matrix = np.stack(list(rewards.values()))
    usable = np.isfinite(matrix).any(axis=0)
    if usable.mean() < 1 - MOST_FAILED:
        return dict.fromkeys(rewards, math.nan)
    return {name: float(row[usable].mean()) for name, row in zip(rewards, matrix, strict=True)}
