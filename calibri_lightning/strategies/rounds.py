"""One generation across the ranks: what rank 0 hands out, and the rounds that fill its matrix."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import fingerprint
from calibri_lightning.rewards.blend import Blend, Scale
from calibri_lightning.strategies.base import CalibratedModule
from calibri_lightning.strategies.history import digest_candidates
from calibri_lightning.strategies.ledger import Ledger, Recall, digest
from calibri_lightning.strategies.search import FAILED, SearchCore

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from calibri_lightning.prompts import PromptBatch
    from calibri_lightning.sampling.grid import Evaluation, UnitResult

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Generation:
    """What rank 0 tells the others before an evaluation."""

    number: int
    """Number of the generation, from 0."""
    thetas: Floats
    """Candidates, float64 [K, n]."""
    seeds: tuple[int, ...]
    """Noise seed of each of the S slots."""
    task: str
    """Digest of all that the rewards depend on."""
    progress: float
    """Used share of the budget."""
    recall: Recall
    """What a killed run had finished."""


@dataclass(frozen=True)
class Status:
    """What rank 0 tells the others of its core."""

    mean: Floats
    """The mean, float64 [n]."""
    tail: Floats
    """The average of the last means."""
    diagnostics: Mapping[str, float]
    """sigma and other numbers."""
    fitness: Floats | None = None
    """Mean reward of each candidate of the generation just told."""
    stop: str | None = None
    """The reason to stop."""


@dataclass(frozen=True)
class GenerationReport:
    """What a finished generation showed."""

    generation: int
    """Generations told, 1 after the first."""
    total_generations: int | None
    """Generations of the budget, where it is a number of them."""
    reward_mean: float
    """Mean over the candidates of their mean reward."""
    reward_best: float
    """Best candidate's mean reward on this generation's prompts: luck included, never what is kept."""
    pace: float
    """How fast the run moves: a search's step size, a gradient strategy's clipped share."""
    images: int
    """Images judged so far."""
    failed: int
    """Cells of this generation without a finite reward."""
    dropped: int
    """Prompts of this generation that failed for all candidates."""
    pace_name: str = "sigma"
    """What the pace is."""
    step_name: str = "generation"
    """What the strategy calls a training step."""


def on_rank_zero(trainer: Trainer, work: Callable[[], _T]) -> _T:
    """Does some work on rank 0 and gives its result to all ranks.

    Args:
        trainer: The trainer.
        work: What to do.

    Returns:
        The result.

    Raises:
        UserError: On every rank, where the work raises one; otherwise the others would wait for ever.
    """
    result: _T | None = None
    failure: UserError | None = None
    if trainer.global_rank == 0:
        try:
            result = work()
        except UserError as error:
            failure = error
    message = str(failure) if failure is not None else None
    module: Any = trainer.lightning_module
    with module.pulse.waiting():
        result, message = trainer.strategy.broadcast((result, message))
    if message is not None:
        raise UserError(message) from failure
    return cast(_T, result)


def pose(
    core: SearchCore,
    ledger: Ledger,
    module: CalibratedModule,
    batch: PromptBatch,
    number: int,
    progress: float,
) -> Generation:
    """Asks for the candidates of a generation and looks up what is known of them (rank 0).

    Args:
        core: The search.
        ledger: The record of finished work.
        module: The module that is trained.
        batch: The prompts of this generation.
        number: Number of the generation.
        progress: Used share of the budget.

    Returns:
        The task of all ranks.
    """
    thetas = core.ask(number, progress)
    seeds = module.noise_seeds(batch)
    judged_by = json.dumps(dict(module.judged_by), sort_keys=True)
    task = digest(digest_candidates(thetas), fingerprint(batch.prompts), json.dumps(seeds), judged_by)
    num_parts = len(module.blend.names) if module.blend.keeps_parts else None
    recall = ledger.recall(number, task, (core.popsize, core.num_slots), num_parts)
    if recall.progress is not None:
        progress = recall.progress
        core.ask(number, progress)
    return Generation(number, thetas, tuple(seeds), task, progress, recall)


@dataclass(frozen=True)
class Judged:
    """What the pictures of a generation are worth."""

    rewards: Floats
    """[K, S], complete and fit to be told."""
    parts: Floats | None
    """Single rewards [R, K, S], where there are several, or a picture's worth depends on those of others."""


def evaluate(
    core: SearchCore | None,
    ledger: Ledger,
    module: CalibratedModule,
    batch: PromptBatch,
    generation: Generation,
) -> Judged:
    """Fills the matrix of a generation; a useless one is made once more (all ranks).

    Args:
        core: The search, on rank 0 only.
        ledger: The record of finished work.
        module: The module that is trained.
        batch: The prompts of this generation.
        generation: The task.

    Returns:
        What its pictures are worth.

    Raises:
        UserError: If the generation is useless twice.
    """
    recall = generation.recall
    if recall.complete:
        return Judged(recall.rewards, recall.parts)
    reason: str | None = None
    for known in (recall, None):
        board = _Board(recall.rewards.shape, module.blend, known)
        reason = _run(core, ledger, module, batch, generation, board)
        if reason is None:
            return Judged(board.rewards, board.parts)
        _log.warning("Generation %d: %s.", generation.number, reason)
    raise UserError(
        f"Generation {generation.number} is useless, twice: {reason}. The search needs rewards that are "
        f"finite and differ. "
        "Check the reward (and its server) on a few images, or take a larger sigma0; the last checkpoint "
        "is intact."
    )


class _Board:
    """The matrix of a generation as it fills.

    Args:
        shape: (K, S).
        blend: What makes one number of several rewards.
        known: What a killed run had finished.
    """

    def __init__(self, shape: tuple[int, ...], blend: Blend, known: Recall | None) -> None:
        self._blend, self._known = blend, known
        self._totals, self._done = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        self._scale: Scale | None = None
        self.parts = np.full((len(blend.names), *shape), np.nan) if blend.keeps_parts else None

    @property
    def known(self) -> Floats | None:
        """Rewards that are known already."""
        return None if self._known is None else self._known.rewards

    def put(self, cells: Cells, answer: Evaluation) -> Cells:
        """Enters what was made, or known.

        Args:
            cells: Cells that were asked for.
            answer: Their rewards.

        Returns:
            Those of them that failed.
        """
        self._done |= cells
        self._totals[cells] = answer.rewards[cells]
        if self.parts is not None:
            fresh = self._blend.parts(answer.per_reward)
            earlier = None if self._known is None else self._known.parts
            if earlier is not None:
                fresh = np.where(np.isfinite(fresh), fresh, earlier)
            self.parts[:, cells] = fresh[:, cells]
            if self._scale is None:
                # The first cells of a generation, for the very first one has no other scale.
                self._scale = self._blend.scale(self.parts)
        return cells & ~np.isfinite(self._totals)

    @property
    def rewards(self) -> Floats:
        """[K, S]: NaN = not made, `FAILED` = not finite."""
        judged = self._totals
        if self.parts is not None and not self._blend.is_plain:
            judged = self._blend.total(self.parts, self._scale)
        return np.where(self._done, np.where(np.isfinite(judged), judged, FAILED), np.nan)


def _run(
    core: SearchCore | None,
    ledger: Ledger,
    module: CalibratedModule,
    batch: PromptBatch,
    generation: Generation,
    board: _Board,
) -> str | None:
    """Fills the board, round by round; says why the generation is useless, if it is."""

    def decide() -> tuple[Cells, str | None]:
        assert core is not None, "only rank 0 decides"
        rewards = board.rewards
        return core.next_cells(rewards), core.rejection(rewards)

    def done(unit: UnitResult) -> None:
        parts = module.blend.parts(unit.each) if module.blend.keeps_parts else None
        ledger.record_unit(generation.number, generation.task, unit.cells, unit.rewards, parts)

    while True:
        cells, reason = on_rank_zero(module.trainer, decide)
        if reason is not None or not cells.any():
            return reason
        # What fails is made once more with the same noise: a server's hiccup must not cost a candidate its
        # rank.
        for recalled in (board.known, None):
            answer = module.evaluate(
                generation.thetas, batch.prompts, generation.seeds, cells=cells, done=done, known=recalled
            )
            cells = board.put(cells, answer)
            if not cells.any():
                break
