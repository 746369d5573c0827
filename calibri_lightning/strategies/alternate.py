"""Strategies that take turns inside one fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn

from calibri_lightning.adapters.policy import LIVE
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import PromptBatch
from calibri_lightning.sampling.sharing import BALANCE
from calibri_lightning.strategies.base import (
    BestVector,
    CalibratedModule,
    Candidate,
    Strategy,
    Words,
    outside_of_a_fit,
)
from calibri_lightning.strategies.checks import check_at_least
from calibri_lightning.strategies.history import check_same
from calibri_lightning.strategies.phases import (
    Order,
    Phase,
    PhaseModule,
    Turn,
    check_phases,
    copy_prefix,
    overlap,
    union,
)
from calibri_lightning.strategies.policy_run import BEST
from calibri_lightning.strategies.selection import START
from calibri_lightning.strategies.turns import TurnStrategy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from calibri_lightning.sampling.sharing import Request
    from calibri_lightning.strategies.rounds import GenerationReport

_log = logging.getLogger(__name__)


class Alternate(Strategy):
    """Strategies in turn inside one fit, for example 20 steps of FlowGRPO, then 10 generations of CMAES, and again.

    Every phase keeps its state from one turn to its next: AdamW's moments, the average, the search's generations, step
    size and covariance. What it hands on is the present policy: theta (of a search its mean) and the network as they
    are, not the best validated candidate. That one may belong to other network weights than those that the next phase
    finds, and training would depend on the validation prompts and on how often they are scored. A search whose mean
    others have moved goes on from there; since it keeps all generations in one history, with the moves between them, it
    resumes by the same replay as a search alone. The answer is the best candidate that was validated in any phase, with
    the network that it was validated with.

    A phase plans with the steps of its own turns (`trainer.max_steps` counts those of all phases), and its own rules
    (max_images, patience and so on) count its own work. A phase that a rule ends has no more turns; the others go on.
    Every step is offered the most prompts that any phase takes, and a phase takes the first of them, so that prompts
    depend on seed and step alone, whoever's turn it is.

    Args:
        phases: Strategies and the training steps of their turns.
        cycles: End after each phase has had so many turns. Default: trainer.max_steps or the phases' rules end the run.

    Raises:
        UserError: If there are no phases, one has no steps, or their strategies cannot take turns.
    """

    words: ClassVar[Words] = Words("Training", "trained", "step")
    owns_theta: ClassVar[bool] = True

    def __init__(self, phases: list[Phase] | None = None, cycles: int | None = None) -> None:
        # The default is there to be refused: the message then says how a phase is written.
        phases = phases or []
        check_phases(phases)
        check_at_least("cycles", cycles, 1, "it is a number of turns of each phase")
        self.phases = tuple(phases)
        self.parts = tuple(cast("TurnStrategy", phase.strategy) for phase in phases)
        self.order = Order(tuple(phase.steps for phase in phases), cycles)
        trains = union([part.trains for part in self.parts])
        if trains is None:
            raise UserError(
                "One phase trains all weights (train: full) and another one scales or a LoRA, for which there is no "
                "common checkpoint. Train a LoRA in all phases with gradients (train: lora)."
            )
        self.trains = trains
        self._reset()

    def _reset(self) -> None:
        count = len(self.parts)
        self.report: GenerationReport | None = None
        self.stop_reason: str | None = None
        self.steps = 0
        self._turn, self._playing = Turn(0, 0, 0), False
        self._over: dict[int, str] = {}
        self._last_step, self._best_step = [0] * count, [0] * count
        self._views: list[PhaseModule] = []
        self._logged: dict[str, float] = {}
        self._loaded: Mapping[str, Any] | None = None

    @property
    def best(self) -> BestVector | None:
        """The best validated candidate of all phases; among equal ones the earlier."""
        found = [
            replace(part.best, weights=_copy_name(number, part.best.weights), generation=self._best_step[number])
            for number, part in enumerate(self.parts)
            if part.best is not None
        ]
        return max(found, key=lambda best: (best.score, -best.generation), default=None)

    @property
    def images(self) -> int:
        """Images judged so far in all phases, the same after any kill and resume."""
        return sum(part.images for part in self.parts)

    @property
    def prompts_per_step(self) -> int:
        """The most prompts that a step of any phase takes."""
        return max(part.prompts_per_step for part in self.parts)

    def answer(self, module: CalibratedModule) -> Candidate:
        """Gives the best validated candidate; where nothing was validated, what the last phase stands at."""
        if self.best is not None:
            return self.best
        self._prepare(module)
        number = self._turn.phase
        return self._views[number].named(self.parts[number].answer(self._views[number].module))

    def requests(self, module: CalibratedModule) -> Sequence[Request]:
        """Those of a step of each phase."""
        asked = [request for part in self.parts for request in part.requests(module)]
        # A phase's own settings have no flag: they stand in the list of phases.
        return [r if r.setting == BALANCE else replace(r, setting=f"that phase's {_last_word(r)}") for r in asked]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            self._reset()
        for part in self.parts:
            part.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Readies all phases, so that what is wrong with any of them is said at once; a run that is over ends here."""
        self._prepare(cast("CalibratedModule", pl_module))
        self._end_if_over(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Hands over where a turn begins."""
        following = self.order.following(self._turn, self._over)
        assert following is not None, "the run was over"
        if not self._playing or following is not self._turn:
            self._begin(following)
        part, view = self._current()
        part.on_train_batch_start(view.trainer, view.lightning, self._share(batch), batch_idx)

    def training_step(self, module: CalibratedModule, batch: PromptBatch) -> None:
        """Does a step of the phase whose turn it is."""
        part, view = self._current()
        view.logged.clear()
        part.training_step(view.module, self._share(batch))
        # From here on the step counts, as global_step does: a checkpoint may be written before `on_train_batch_end`.
        self.steps += 1
        self._turn = replace(self._turn, done=self._turn.done + 1)
        self._last_step[self._turn.phase] = self.steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Lets the phase finish its step, and decides whether it, or the run, is over."""
        part, view = self._current()
        part.on_train_batch_end(view.trainer, view.lightning, outputs, self._share(batch), batch_idx)
        self._take_mean(part, view)
        self._publish(trainer, pl_module, part, view)
        self._end_if_over(trainer)

    def validation_candidates(self, module: CalibratedModule) -> Mapping[str, Candidate]:
        """The start once, as the run began; then what the phase whose turn it is has to offer."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            return outside_of_a_fit(module)
        self._prepare(module)
        part, view = self._current()
        if part.selection.start_score is None:
            scores = (other.selection.start_score for other in self.parts)
            part.selection.start_score = next((score for score in scores if score is not None), None)
        wanted = {name: view.named(one) for name, one in part.validation_candidates(view.module).items()}
        if START in wanted:
            # Vectors that share their weights are scored in one batch; where nothing has moved, live is the start.
            weights = LIVE if module.policy.same(LIVE, START) and not part.owns_theta else START
            wanted[START] = Candidate(module.start_theta, weights)
        return wanted

    def on_validated(self, module: CalibratedModule, scores: Mapping[str, float]) -> None:
        """Hands the scores to the phase; its best candidate keeps the network that it was validated with."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            return
        part, view = self._current()
        before = part.best
        part.on_validated(view.module, scores)
        best = part.best
        if best is not None and best is not before:
            from_start = best.origin == START
            self._best_step[self._turn.phase] = 0 if from_start else self.steps
            if not part.owns_theta and module.policy.network_names:
                # A search alone never sees its network change; here another phase will train it.
                if not from_start:
                    view.part.keep(BEST)
                part.selection.best = replace(best, weights=START if from_start else BEST)
        self._end_if_over(module.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Gives the state of all phases and whose turn it is, in tensors, numbers and texts."""
        if not self._views:
            return dict(self._loaded or {})
        return {
            "settings": self._settings(),
            "phases": [part.state_dict() for part in self.parts],
            "steps": self.steps,
            "turn": [self._turn.cycle, self._turn.phase, self._turn.done],
            "over": dict(self._over),
            "last_step": list(self._last_step),
            "best_step": list(self._best_step),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint; the phases rebuild what they need when training starts."""
        if not state_dict:
            return
        check_same(state_dict["settings"], self._settings())
        self._loaded = state_dict
        self.steps, self._turn = state_dict["steps"], Turn(*state_dict["turn"])
        self._over = dict(state_dict["over"])
        self._last_step, self._best_step = list(state_dict["last_step"]), list(state_dict["best_step"])
        for part, state in zip(self.parts, state_dict["phases"], strict=True):
            part.load_state_dict(state)

    def _settings(self) -> dict[str, str]:
        return {"phases": ", ".join(f"{type(phase.strategy).__name__} x {phase.steps}" for phase in self.phases)}

    def _current(self) -> tuple[TurnStrategy, PhaseModule]:
        return self.parts[self._turn.phase], self._views[self._turn.phase]

    def _share(self, batch: PromptBatch) -> PromptBatch:
        """The first prompts of a batch, as many as the phase takes."""
        return PromptBatch(batch.step, batch.prompts[: self.parts[self._turn.phase].prompts_per_step])

    def _prepare(self, module: CalibratedModule) -> None:
        """Readies all phases, once."""
        if self._views:
            return
        if self._loaded is None:
            module.policy.keep(START)
        total = self.order.total(module.trainer.max_steps)
        views = []
        for number, part in enumerate(self.parts):
            view = PhaseModule(module, part, number, self.order.planned(number, total))
            part.on_train_start(view.trainer, view.lightning)
            part.end_turn()
            views.append(view)
        self._views = views
        if self.steps:
            # A checkpoint may have been written before a search was told what it had evaluated.
            last = self._last_step.index(self.steps)
            self._take_mean(self.parts[last], self._views[last])

    def _begin(self, turn: Turn) -> None:
        """Hands over to a phase; within a resumed turn this changes nothing."""
        if self._playing:
            self._current()[0].end_turn()
        self._turn, self._playing = turn, True
        part, view = self._current()
        since = self._last_step[turn.phase]
        moved = any(
            number != turn.phase and step > since and overlap(other, part)
            for number, (other, step) in enumerate(zip(self.parts, self._last_step, strict=True))
        )
        view.part.focus()
        view.part.refresh(moved, lasting=(BEST,))
        if not part.owns_theta:
            view.note_network()
        part.take_turn(view.module, moved)

    def _take_mean(self, part: TurnStrategy, view: PhaseModule) -> None:
        """Puts theta where a search stands."""
        if part.mean is not None:
            with torch.no_grad():
                view.module.theta.copy_(torch.from_numpy(part.mean))

    def _publish(self, trainer: Trainer, pl_module: LightningModule, part: TurnStrategy, view: PhaseModule) -> None:
        """Reports and logs the step; what only other phases log is NaN, or their last values would be repeated."""
        assert part.report is not None
        total = self.order.total(trainer.max_steps)
        self.report = replace(
            part.report, generation=self.steps, total_generations=total, images=self.images, step_name="step"
        )
        own = {"train/images": float(self.images), "train/phase": float(self._turn.phase)}
        self._logged = dict.fromkeys(self._logged, math.nan) | view.logged | own
        for name, value in self._logged.items():
            pl_module.log(name, value)

    def _end_if_over(self, trainer: Trainer) -> None:
        for number, part in enumerate(self.parts):
            if part.stop_reason is not None and number not in self._over:
                self._over[number] = part.stop_reason
                _log.info("Phase %d (%s) has no more turns: %s.", number, type(part).__name__, part.stop_reason)
        if self.order.following(self._turn, self._over) is None:
            trainer.should_stop = True
            if len(self._over) == len(self.parts):
                reasons = (f"{type(part).__name__}: {self._over[i]}" for i, part in enumerate(self.parts))
                self.stop_reason = "; ".join(reasons)


def _last_word(request: Request) -> str:
    return request.setting.rpartition(".")[2]


def _copy_name(number: int, name: str) -> str:
    return name if name in (LIVE, START) else f"{copy_prefix(number)}{name}"
