"""A pass over the validation prompts: the candidates that are scored, their scores, and who is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibri_lightning.arrays import Floats, means
from calibri_lightning.rewards.watch import Watch
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.strategies.selection import START

if TYPE_CHECKING:
    from calibri_lightning.module import CalibriModule
    from calibri_lightning.prompts import PromptBatch

MOST_FAILED = 0.25
"""Share of the validation prompts that may fail for every vector before there is no score."""


class Validation:
    """One pass over the validation prompts.

    Args:
        candidates: By name; may be empty.
        start: The start, where its scores are needed and the strategy does not offer it: it is told to nobody.
    """

    def __init__(self, candidates: Mapping[str, Candidate], start: Candidate | None = None) -> None:
        self._adds_start = start is not None
        self._candidates = dict(candidates) if start is None else {START: start, **candidates}
        candidates = self._candidates
        self._rewards: dict[str, list[Floats]] = {name: [] for name in candidates}
        self._each: dict[str, dict[str, list[Floats]]] = {name: {} for name in candidates}
        self.means: dict[str, dict[str, float]] = {}
        """Mean of every single reward by candidate, once closed."""

    @classmethod
    def of(cls, module: CalibriModule) -> Validation:
        """The candidates that the strategy has to offer now.

        Args:
            module: The module.

        Returns:
            A pass that has not scored anything yet.
        """
        offered = module.strategy.validation_candidates(module)
        needed = module.blend.lacks_reference or module.watch.lacks(_watched(module))
        return cls(offered, module.start if offered and needed and START not in offered else None)

    def score(self, module: CalibriModule, batch: PromptBatch) -> None:
        """Scores the candidates on a batch, if there are any.

        Args:
            module: The module.
            batch: The prompts.
        """
        # One copy of the weights at a time is in the network; vectors that share it are rows of one batch.
        for weights in dict.fromkeys(candidate.weights for candidate in self._candidates.values()):
            names = [name for name, candidate in self._candidates.items() if candidate.weights == weights]
            thetas = np.stack([self._candidates[name].theta for name in names])
            answer = module.evaluate(thetas, batch.prompts, module.noise_seeds(batch), weights=weights, held_out=True)
            for row, name in enumerate(names):
                self._rewards[name].append(answer.rewards[row])
                for reward, values in answer.per_reward.items():
                    self._each[name].setdefault(reward, []).append(values[row])

    def close(self, module: CalibriModule) -> dict[str, float]:
        """Hands the scores to the strategy and to the trace.

        Args:
            module: The module.

        Returns:
            Score by candidate, as of `validation_scores`; empty where nothing was scored.
        """
        if not any(self._rewards.values()):
            return {}
        each = {
            name: {reward: np.concatenate(parts) for reward, parts in rewards.items()}
            for name, rewards in self._each.items()
        }
        totals = {name: np.concatenate(parts) for name, parts in self._rewards.items()}
        if module.blend.changes_units:
            # In units of the start's scores in the first validation of the run.
            reference = module.blend.reference(each.get(START))
            totals = {name: module.blend.judge(rewards, reference) for name, rewards in each.items()}
        # A validation by itself may have other prompts than the run that its checkpoint is of.
        watch = module.watch if module.trainer.state.fn == "fit" else Watch()
        watch.validated(totals, each, _watched(module))
        if self._adds_start:
            del totals[START], each[START]
        self.means = {
            name: {reward: float(means(values)) for reward, values in rewards.items()} for name, rewards in each.items()
        }
        scores = validation_scores(totals)
        module.strategy.on_validated(module, scores)
        module.trace.add_validation(scores)
        return scores


def _watched(module: CalibriModule) -> list[str]:
    return [name for entry in module.rewards.watched for name in entry.names]


def validation_metrics(
    module: CalibriModule, scores: Mapping[str, float], means: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Names what a validation logs.

    Args:
        module: The module.
        scores: Score by candidate.
        means: Mean of every single reward by candidate.

    Returns:
        The scores; `val/best`, that of the best candidate so far: one curve that all strategies share; where there is
        more than one reward, `val/CANDIDATE/REWARD`; and `val/alarms`, where anything is watched.
    """
    best = module.strategy.best
    metrics = {f"val/{name}": score for name, score in scores.items()}
    if best is not None and scores:
        metrics["val/best"] = best.score
    if len(module.rewards.names) > 1:
        metrics |= {f"val/{name}/{reward}": mean for name, own in means.items() for reward, mean in own.items()}
    if scores and module.watch.is_watching:
        metrics["val/alarms"] = float(module.watch.num_alarms)
    return metrics


def validate(module: CalibriModule) -> None:
    """Validates outside of the trainer's loop; does nothing where the strategy has nothing new.

    Args:
        module: A module with a trainer.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    validation = Validation.of(module)
    for batch in data.val_dataloader() if data is not None else []:
        validation.score(module, batch)
    scores = validation.close(module)
    for logger in module.trainer.loggers if scores else ():
        # `module.log` works in the trainer's own loop alone.
        logger.log_metrics(validation_metrics(module, scores, validation.means), module.trainer.global_step)


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
