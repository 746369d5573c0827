"""The part that CMA-ES and the antithetic pairs share: ask, evaluate, tell, record, resume, stop.

Rank 0 alone owns the core. It broadcasts the candidates, what is already known of them, and whether to stop;
all ranks then share the evaluation and keep the same history. A generation is one training step.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn

from calibri_lightning.arrays import Floats, means
from calibri_lightning.errors import UserError
from calibri_lightning.launch.agreement import require_same_bits
from calibri_lightning.prompts import fingerprint
from calibri_lightning.sampling.sharing import Request
from calibri_lightning.strategies.base import BestVector, CalibratedModule, Candidate
from calibri_lightning.strategies.budget import SearchBudget, StopRules
from calibri_lightning.strategies.history import History, Settings, check_same, digest_candidates, numerics
from calibri_lightning.strategies.ledger import Ledger, digest
from calibri_lightning.strategies.plan import SearchPlan
from calibri_lightning.strategies.rounds import (
    Generation,
    GenerationReport,
    Status,
    evaluate,
    on_rank_zero,
    pose,
)
from calibri_lightning.strategies.search import SearchCore
from calibri_lightning.strategies.selection import Selection
from calibri_lightning.strategies.turns import TurnStrategy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from calibri_lightning.prompts import PromptBatch

_log = logging.getLogger(__name__)


class EvolutionStrategy(TurnStrategy, SearchPlan):
    """Searches theta by judging candidates, without gradients.

    Args:
        stop: When to end before `trainer.max_steps`.
    """

    def __init__(self, stop: StopRules) -> None:
        self.stop = stop
        self._reset()

    def _reset(self) -> None:
        self.report = None
        self.stop_reason = None
        self._core: SearchCore | None = None
        self._ledger: Ledger | None = None
        self._history: History | None = None
        self._status: Status | None = None
        self._generation: Generation | None = None
        self._rewards: Floats | None = None
        self._parts: Floats | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._selection = Selection()
        self._budget: SearchBudget | None = None
        self._sigmas: list[float] = []
        self._validating: Mapping[str, Candidate] = {}

    @property
    def best(self) -> BestVector | None:
        """The best validated vector so far."""
        return self._selection.best

    @property
    def selection(self) -> Selection:
        """Its validated candidates."""
        return self._selection

    @property
    def mean(self) -> Floats | None:
        """The current mean, float64 [n]; None before the first generation."""
        return self._status.mean if self._status is not None and self.generation else None

    @property
    def generation(self) -> int:
        """Generations told so far."""
        return len(self._history) if self._history is not None else 0

    @property
    def images(self) -> int:
        """Images judged so far, the same after any kill and resume."""
        return self._history.num_images if self._history is not None else 0

    def answer(self, module: CalibratedModule) -> Candidate:
        """Gives the best validated vector; the mean where nothing was validated."""
        if self.best is not None:
            return self.best
        return Candidate(module.start_theta if self._status is None else self._status.mean)

    def requests(self, module: CalibratedModule) -> Sequence[Request]:
        """The rounds of a generation."""
        evaluator, sizes = module.engine.evaluator, self.round_sizes(module.layout.num_parameters)
        return [Request(size, evaluator.cells_per_unit, evaluator.balance_over) for size in sizes]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the core, or rebuilds it from the checkpoint; a search that had ended does not go on."""
        self._prepare(cast(CalibratedModule, pl_module))
        assert self._budget is not None
        self._budget.start_clock()
        stop = on_rank_zero(trainer, lambda: self._reason_to_stop(self.images)) if self.generation else None
        if stop is not None:
            self._end(trainer, stop)
        self._check_patience(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Asks for candidates and looks up what a killed run already knew of them."""
        module = cast(CalibratedModule, pl_module)
        if len(batch.prompts) != self.prompts_per_step:
            raise UserError(
                f"A training batch has {len(batch.prompts)} prompts; this strategy takes "
                f"{self.prompts_per_step} a generation. "
                "Let the data module draw strategy.prompts_per_step prompts a step."
            )
        core, ledger, budget = self._core, self._ledger, self._budget
        assert ledger is not None
        assert budget is not None
        number, progress = self.generation, budget.progress(self.generation)

        def ask() -> Generation:
            assert core is not None, "rank 0 owns the core"
            return pose(core, ledger, module, batch, number, progress)

        self._generation = on_rank_zero(trainer, ask)

    def training_step(self, module: CalibratedModule, batch: PromptBatch) -> None:
        """Evaluates the candidates."""
        assert self._generation is not None, "training_step before on_train_batch_start"
        assert self._ledger is not None
        number = self._generation.number
        judged = evaluate(self._core, self._ledger, module, batch, self._generation)
        if module.trainer.world_size > 1:
            # What each rank knows by itself is in it: one that read another checkpoint draws other prompts.
            place = json.dumps([self.generation, fingerprint(batch.prompts), list(module.noise_seeds(batch))])
            bits = digest(self._generation.thetas.tobytes(), judged.rewards.tobytes(), place)
            require_same_bits(module.gather, f"candidates, prompts or rewards in generation {number}", int(bits, 16))
        if judged.parts is not None:
            module.blend.learn(judged.parts)
        # Without an optimizer this steps Lightning's stand-in, which is what moves global_step and with it
        # max_steps and the checkpoints; it counts only inside training_step (lightning 2.6.6, issue #20674).
        module.optimizers().step()
        self._rewards, self._parts = judged.rewards, judged.parts

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Records the generation, tells the core, and decides whether to stop."""
        generation, rewards = self._generation, self._rewards
        assert generation is not None, "on_train_batch_end before on_train_batch_start"
        assert rewards is not None, "on_train_batch_end before training_step"
        self._status = on_rank_zero(trainer, lambda: self._tell(generation, rewards))
        self._history = self._complete_history()
        parts, self._generation, self._rewards, self._parts = self._parts, None, None, None
        self._publish(trainer, pl_module, rewards, parts)

    def take_turn(self, module: CalibratedModule, moved: bool) -> None:
        """Goes on from theta as it is: the mean jumps there; step size, covariance and generations go on."""
        assert self._budget is not None, "take_turn before on_train_start"
        assert self._history is not None
        self._budget.start_clock()
        theta = module.theta.detach().cpu().numpy().copy()
        here = self.mean if self.mean is not None else module.start_theta
        if np.array_equal(theta, here):
            return

        def move() -> Status:
            core = self._core
            assert core is not None, "rank 0 owns the core"
            core.move(theta)
            return Status(core.mean, core.tail_mean(), core.diagnostics())

        self._status = on_rank_zero(module.trainer, move)
        self._history = self._history.moved(theta)

    def end_turn(self) -> None:
        """Stops the clock."""
        assert self._budget is not None, "end_turn before on_train_start"
        self._budget.stop_clock()

    def validation_candidates(self, module: CalibratedModule) -> Mapping[str, Candidate]:
        """Vectors worth a score on the validation set."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            return {"start": Candidate(module.start_theta)} | ({"best": self.best} if self.best is not None else {})
        self._prepare(module)
        assert self._status is not None
        self._validating = self._selection.candidates(
            module.start_theta, self._status.mean, self._status.tail, self.generation
        )
        return self._validating

    def on_validated(self, module: CalibratedModule, scores: Mapping[str, float]) -> None:
        """Keeps the best validated vector; out of patience, it ends the run."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            return
        self._selection.take(self._validating, scores, self.generation)
        self._validating = {}
        self._check_patience(module.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Gives the state as of the last evaluated generation, in tensors, numbers and texts."""
        if self._history is None or self._ledger is None or self._budget is None:
            return dict(self._loaded or {})
        return {
            "history": self._complete_history().state_dict(),
            "selection": self._selection.state_dict(),
            "elapsed": self._budget.seconds,
            "ledger": str(self._ledger.folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint; the core is rebuilt when training starts."""
        if state_dict:
            self._loaded = state_dict
            self._selection = Selection.load(state_dict["selection"])

    def _complete_history(self) -> History:
        """Counts a generation from its evaluation on, as global_step does, though it may not be told yet."""
        assert self._history is not None, "the search has not started"
        if self._rewards is None or self._generation is None:
            return self._history
        generation = self._generation
        return self._history.extended(digest_candidates(generation.thetas), generation.progress, self._rewards)

    def _prepare(self, module: CalibratedModule) -> None:
        if self._status is not None:
            return
        space, loaded, trainer = self.space(module), self._loaded, module.trainer
        if self.stop.patience is not None and not module.validates:
            raise UserError(
                f"patience is {self.stop.patience}, which counts validations, but there are no validation prompts. "
                "Name some with data.val, or remove patience."
            )
        earlier = History.load(loaded["history"]) if loaded is not None else None
        self._budget = SearchBudget(
            self.stop, trainer.max_steps, self.num_cells(space.num_parameters), self.has_other_rule
        )
        if loaded is not None:
            self._budget.elapsed = float(loaded["elapsed"])
        settings: Settings = {
            "strategy": type(self).__name__,
            "seed": module.seed,
            **self.resolve(
                space.num_parameters,
                self._budget.total_images,
                earlier.settings if earlier is not None else {},
            ),
            "parameters": digest(*module.layout.names),
            "space": digest_candidates(np.stack([space.start, space.lower, space.upper, space.stds])),
            "numerics": numerics(),
            **module.judged_by,
        }
        if earlier is not None:
            check_same(earlier.settings, settings)
        history = earlier if earlier is not None else History(settings)
        self._ledger = Ledger(module.run_dir / "ledger", trainer.global_rank)

        def build() -> Status:
            self._open_ledger()
            self._core = self.build_core(space, module.seed, settings)
            self._sigmas = history.replay(self._core)
            return Status(self._core.mean, self._core.tail_mean(), self._core.diagnostics())

        self._status = on_rank_zero(trainer, build)
        if trainer.global_rank != 0:
            self._open_ledger()
        self._history = history

    def _open_ledger(self) -> None:
        assert self._ledger is not None
        if self._loaded is None:
            self._ledger.start()
        else:
            self._ledger.resume(Path(self._loaded["ledger"]))

    def _tell(self, generation: Generation, rewards: Floats) -> Status:
        core = self._core
        assert core is not None
        assert self._ledger is not None
        # First to disk, then into the core: a failed write leaves both as they were.
        self._ledger.record_generation(generation.number, generation.task, generation.progress, rewards, self._parts)
        core.tell(rewards)
        self._sigmas.append(core.sigma)
        images = self.images + int((~np.isnan(rewards)).sum())
        stop = self._reason_to_stop(images)
        return Status(core.mean, core.tail_mean(), core.diagnostics(), core.fitness(rewards), stop)

    def _reason_to_stop(self, images: int) -> str | None:
        assert self._budget is not None
        return self._budget.over(images) or self.plateau(self._sigmas)

    def _check_patience(self, trainer: Trainer) -> None:
        misses = self._selection.misses
        if self.stop.patience is not None and misses >= self.stop.patience:
            self._end(trainer, f"{misses} validations in a row brought no better score")

    def _publish(self, trainer: Trainer, pl_module: LightningModule, rewards: Floats, parts: Floats | None) -> None:
        status, blend = self._status, cast(CalibratedModule, pl_module).blend
        assert status is not None
        assert status.fitness is not None
        fitness = status.fitness
        if parts is not None and not blend.is_plain:
            # What is told to the core is about 0 in every generation; curves show rewards as they are.
            fitness = means(blend.plain(parts), axis=1)
        finite = fitness[np.isfinite(fitness)]
        asked = ~np.isnan(rewards)
        self.report = GenerationReport(
            generation=self.generation,
            total_generations=self._budget.total_generations if self._budget is not None else None,
            reward_mean=float(finite.mean()) if finite.size else math.nan,
            reward_best=float(finite.max()) if finite.size else math.nan,
            pace=status.diagnostics["sigma"],
            images=self.images,
            failed=int(np.isneginf(rewards).sum()),
            dropped=int((asked.any(axis=0) & ~np.isfinite(rewards).any(axis=0)).sum()),
        )
        names = ("reward_mean", "reward_best", "images", "failed", "dropped")
        values = {name: float(getattr(self.report, name)) for name in names} | dict(status.diagnostics)
        if parts is not None:
            values |= {f"reward/{name}": float(means(part)) for name, part in zip(blend.names, parts, strict=True)}
        for name, value in values.items():
            pl_module.log(f"train/{name}", value)
        if status.stop is not None:
            self._end(trainer, status.stop)

    def _end(self, trainer: Trainer, reason: str) -> None:
        self.stop_reason = reason
        trainer.should_stop = True
        _log.info("The search ends: %s.", reason)
