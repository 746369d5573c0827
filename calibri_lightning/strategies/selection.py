"""The honest choice of the answer: the vector with the best score on a fixed validation set.

The reward of a training bucket never enters: the best of many noisy numbers is mostly luck
(docs/search.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from calibri_lightning.adapters.policy import LIVE
from calibri_lightning.arrays import Floats
from calibri_lightning.strategies.base import BestVector, Candidate

START = "start"


class Selection:
    """Keeps the best validated vector and counts validations without a gain."""

    def __init__(self) -> None:
        self.best: BestVector | None = None
        self.start_score: float | None = None
        self.misses = 0
        self.validated_generation = -1

    def candidates(self, start: Floats, mean: Floats, tail: Floats, generation: int) -> Mapping[str, Candidate]:
        """Vectors whose score is not known yet.

        Args:
            start: Where the search began, float64 [n].
            mean: The current mean.
            tail: The average of the last means.
            generation: Generations told.

        Returns:
            Candidates by name: "start" once, "mean" and "tail" after each new generation.
        """
        wanted = {} if self.start_score is not None else {START: Candidate(start)}
        if generation > 0 and generation != self.validated_generation:
            wanted["mean"] = Candidate(mean)
            if not np.array_equal(tail, mean):
                wanted["tail"] = Candidate(tail)
        return wanted

    def take(self, candidates: Mapping[str, Candidate], scores: Mapping[str, float], generation: int) -> None:
        """Takes the scores of a validation.

        Args:
            candidates: What was scored.
            scores: Score by name. One that is not finite never wins; among equal ones the earlier stays.
            generation: Generations told.
        """
        if not candidates:
            return
        before = self.best
        for name, candidate in candidates.items():
            score = float(scores[name])
            if name == START:
                self.start_score = score
            if math.isfinite(score) and (self.best is None or score > self.best.score):
                number = 0 if name == START else generation
                self.best = BestVector(
                    candidate.theta.copy(), candidate.weights, score=score, origin=name, generation=number
                )
        self.misses = 0 if self.best is not before else self.misses + 1
        self.validated_generation = generation

    def state_dict(self) -> dict[str, Any]:
        """Gives the state as tensors and numbers.

        Returns:
            What `load` takes.
        """
        state: dict[str, Any] = {
            "misses": self.misses,
            "validated_generation": self.validated_generation,
            "start_score": self.start_score,
        }
        if self.best is not None:
            state["theta"] = torch.from_numpy(self.best.theta.copy())
            state |= {
                "score": self.best.score,
                "weights": self.best.weights,
                "origin": self.best.origin,
                "generation": self.best.generation,
            }
        return state

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Selection:
        """Rebuilds a selection.

        Args:
            state: What `state_dict` gave.

        Returns:
            The selection.
        """
        selection = cls()
        selection.misses, selection.start_score = state["misses"], state["start_score"]
        selection.validated_generation = state["validated_generation"]
        if "theta" in state:
            theta = state["theta"].numpy().astype(np.float64)
            selection.best = BestVector(
                theta,
                state.get("weights", LIVE),
                score=state["score"],
                origin=state["origin"],
                generation=state["generation"],
            )
        return selection
