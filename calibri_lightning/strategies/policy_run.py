"""The run of a gradient strategy: its settings, copies, validation, checkpoint and end; the steps are a subclass's.

All decisions follow from numbers that are the same on all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn

from calibri_lightning.adapters.policy import LIVE, Trains
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.advantages import AdvantageOptions
from calibri_lightning.strategies.base import BestVector, CalibratedModule, Candidate, Words, outside_of_a_fit
from calibri_lightning.strategies.budget import SearchBudget, StopRules
from calibri_lightning.strategies.checks import check_at_least
from calibri_lightning.strategies.ema import Ema, EmaOptions
from calibri_lightning.strategies.gradient_step import AdamWOptions, GradientStep, ThetaBounds
from calibri_lightning.strategies.history import check_same
from calibri_lightning.strategies.rounds import on_rank_zero
from calibri_lightning.strategies.selection import START, Selection
from calibri_lightning.strategies.turns import TurnStrategy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_log = logging.getLogger(__name__)
ADVANTAGE, ADAMW, EMA_OPTIONS = AdvantageOptions(), AdamWOptions(), EmaOptions()
"""Defaults, which the command line needs as objects."""
EMA, BEST = "ema", "best"
"""Copies of the policy that a gradient strategy keeps, besides where it started."""
Reference = Literal["base", "start"]
"""What a KL term holds the policy to, by the name of the copy: the model without LoRA and scales, or the policy as the
run began."""


@dataclass(frozen=True)
class PolicySettings:
    """What all gradient strategies are told."""

    train: Trains
    """What is trained."""
    num_groups: int
    """Prompts P of a training step."""
    group_size: int
    """Pictures G of a prompt."""
    num_steps: int | None
    """Sampling steps in training; None for those of the module."""
    reference: Reference
    """What a KL term holds the policy to."""
    updates: int
    """Optimiser steps a training step; each takes its share of the pictures."""
    pictures_per_unit: int | None
    """Pictures that are made, and trained on, in one batch; None for one group, or what a forward may have if less."""
    gradient_checkpointing: bool
    """Whether activations are computed again in the backward."""
    offload: bool
    """Whether latents are kept on the CPU until they are trained on."""
    advantage: AdvantageOptions
    """How rewards become advantages."""
    optimizer: AdamWOptions
    """AdamW."""
    ema: EmaOptions | None
    """The moving average of what is trained, validated beside the policy."""
    max_wasted: int
    """So many training steps in a row without a usable gradient (NaN, or a constant reward) end the run."""
    stop: StopRules
    """When to end before `trainer.max_steps`."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: If one is out of its range.
        """
        check_at_least("num_groups", self.num_groups, 1, "it is a number of prompts")
        check_at_least("updates", self.updates, 1, "it is a number of optimiser steps")
        check_at_least("max_wasted", self.max_wasted, 1, "it is a number of training steps")
        check_at_least("group_size", self.group_size, 2, "advantages compare the pictures of one prompt")
        check_at_least("num_steps", self.num_steps, 1, "it is a number of sampling steps")
        check_at_least("pictures_per_unit", self.pictures_per_unit, 1, "it is a number of pictures")

    @property
    def images_per_step(self) -> int:
        """Pictures of a training step."""
        return self.num_groups * self.group_size

    def recorded(self) -> dict[str, str | int]:
        """What must not change when a run is resumed."""
        return {
            "train": self.train,
            "num_groups": self.num_groups,
            "group_size": self.group_size,
            "training steps": str(self.num_steps),
            "reference": self.reference,
            "updates": self.updates,
            "pictures_per_unit": str(self.pictures_per_unit),
            "advantage": str(self.advantage),
            "optimizer": str(self.optimizer),
            "ema": str(self.ema),
        }


class PolicyRun(TurnStrategy):
    """What strategies with gradients share but for their steps.

    Args:
        settings: What all of them are told.
    """

    words: ClassVar[Words] = Words("Training", "trained", "step")
    owns_theta: ClassVar[bool] = True

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.trains = settings.train
        self._reset()

    def _reset(self) -> None:
        self.report = None
        self.stop_reason = None
        self.steps, self.skipped, self.wasted = 0, 0, 0
        self._selection = Selection()
        self._validating: Mapping[str, Candidate] = {}
        self._gradients: GradientStep | None = None
        self._ema: Ema | None = None
        self._budget: SearchBudget | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._recorded: dict[str, str | int] = {}

    def check_run(self, module: CalibratedModule) -> None:
        """Checks the settings against the module, before anything runs.

        Args:
            module: The module that is trained.

        Raises:
            UserError: If the settings do not fit the module.
        """
        transformer = module.engine.backbone.transformer
        rounded = next((name for name, p in transformer.named_parameters() if p.dtype != torch.float32), None)
        if self.trains == "full" and rounded is not None:
            raise UserError(
                f"train is full, but {rounded} is not float32: most optimiser steps would be rounded away. Set "
                "the backbone's dtype to float32 (with trainer.precision bf16-mixed for speed), or train a LoRA."
            )

    def check_units(self, module: CalibratedModule) -> None:
        """Checks the settings against the rows of a forward, which are known when training starts.

        Args:
            module: The module that is trained.

        Raises:
            UserError: If the settings do not fit.
        """

    def keep_copies(self, module: CalibratedModule) -> None:
        """Keeps copies of the policy as a new run begins; a resumed run has those of its checkpoint.

        Args:
            module: The module that is trained.
        """
        module.policy.keep(START)

    @property
    def best(self) -> BestVector | None:
        """The best validated candidate so far."""
        return self._selection.best

    @property
    def selection(self) -> Selection:
        """Its validated candidates."""
        return self._selection

    @property
    def images(self) -> int:
        """Images judged so far, the same after any kill and resume."""
        return self.steps * self.settings.images_per_step

    @property
    def prompts_per_step(self) -> int:
        """Prompts that one training step takes."""
        return self.settings.num_groups

    def answer(self, module: CalibratedModule) -> Candidate:
        """Gives the best validated candidate; the policy as it is, where nothing was validated."""
        # The average stands near the start for long: unseen, it is the worse bet.
        return self._candidate(module, LIVE) if self.best is None else self.best

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit; refuses a backbone that has no velocities to give."""
        if stage == "fit":
            self._reset()
            module = cast("CalibratedModule", pl_module)
            module.engine.backbone.schedule(1)
            self.check_run(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the optimiser, or takes its state from the checkpoint; a run that had ended does not go on."""
        self._prepare(cast("CalibratedModule", pl_module))
        assert self._budget is not None
        self._budget.start_clock()
        self._stop_if_over(trainer)
        self._check_patience(trainer)

    def take_turn(self, module: CalibratedModule, moved: bool) -> None:
        """Goes on with the policy as it is; AdamW keeps its moments, the average of what others moved starts over."""
        assert self._budget is not None, "take_turn before on_train_start"
        self._budget.start_clock()
        if moved and self._ema is not None:
            self._ema.start(module.policy.parameters())

    def end_turn(self) -> None:
        """Stops the clock."""
        assert self._budget is not None, "end_turn before on_train_start"
        self._budget.stop_clock()

    def _candidate(self, module: CalibratedModule, name: str) -> Candidate:
        return Candidate(module.policy.theta_of(name), name)

    def validation_candidates(self, module: CalibratedModule) -> Mapping[str, Candidate]:
        """The start once; after new steps the policy as it is, and its average."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            return outside_of_a_fit(module)
        self._prepare(module)
        wanted = {} if self._selection.start_score is not None else {START: self._candidate(module, START)}
        if self.steps and self.steps != self._selection.validated_generation:
            wanted["policy"] = self._candidate(module, LIVE)
            # Before its first averaging it is the start.
            if self._ema is not None and self._ema.num_updates >= self._ema.interval:
                module.policy.keep(EMA, self._ema.averages)
                wanted[EMA] = self._candidate(module, EMA)
        self._validating = wanted
        return wanted

    def on_validated(self, module: CalibratedModule, scores: Mapping[str, float]) -> None:
        """Keeps the best validated candidate; out of patience, it ends the run."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            return
        before = self.best
        self._selection.take(self._validating, scores, self.steps)
        best = self.best
        if best is not None and best is not before and best.origin != START:
            # What was best must not change as training goes on.
            module.policy.keep(BEST, module.policy.tensors(best.weights))
            self._selection.best = replace(best, weights=BEST)
        self._validating = {}
        self._check_patience(module.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Gives the state after the last training step, in tensors, numbers and texts."""
        if self._gradients is None or self._budget is None:
            return dict(self._loaded or {})
        return {
            "settings": self._recorded,
            "optimizer": self._gradients.optimizer.state_dict(),
            "ema": dict(self._ema.state_dict()) if self._ema is not None else None,
            "selection": self._selection.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
            "elapsed": self._budget.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint; the optimiser is filled when training starts.

        Wasted steps are counted anew: whoever resumes wants to go on, and not to end at the next such step.
        """
        if state_dict:
            self._loaded = state_dict
            self._selection = Selection.load(state_dict["selection"])
            self.steps, self.skipped = state_dict["steps"], state_dict["skipped"]

    def own_settings(self) -> dict[str, str | int]:
        """What a subclass adds to what must not change when a run is resumed."""
        return {}

    def recorded(self, module: CalibratedModule) -> dict[str, str | int]:
        """What must not change when a run is resumed.

        Args:
            module: The module that is trained.

        Returns:
            Settings by name.
        """
        return {
            "strategy": type(self).__name__,
            "seed": module.seed,
            **self.settings.recorded(),
            **self.own_settings(),
            **module.judged_by,
        }

    def _prepare(self, module: CalibratedModule) -> None:
        """Makes what training needs, once; from a checkpoint where there is one."""
        if self._gradients is not None:
            return
        if self.settings.stop.patience is not None and not module.validates:
            raise UserError(
                f"patience is {self.settings.stop.patience}, which counts validations, but there are no validation "
                "prompts. Name some with data.val, or remove patience."
            )
        self.check_units(module)
        if self.settings.gradient_checkpointing:
            _checkpoint_gradients(module)
        parameters, layout = module.policy.parameters(), module.layout
        bounds = ThetaBounds(*(torch.from_numpy(part.copy()) for part in (layout.lower, layout.upper, layout.stds)))
        self._gradients = GradientStep(self.settings.optimizer, parameters, bounds)
        self._budget = SearchBudget(
            self.settings.stop, module.trainer.max_steps, self.settings.images_per_step, step=self.words.step
        )
        if self.settings.ema is not None:
            self._ema = self.settings.ema.build()
            self._ema.start(parameters)
        self._recorded = self.recorded(module)
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self.keep_copies(module)
            return
        check_same(loaded["settings"], self._recorded)
        self._gradients.optimizer.load_state_dict(loaded["optimizer"])
        if self._ema is not None:
            self._ema.load_state_dict(loaded["ema"])
        self._budget.elapsed = float(loaded["elapsed"])

    def _stop_if_over(self, trainer: Trainer) -> None:
        budget = self._budget
        assert budget is not None
        reason = on_rank_zero(trainer, lambda: budget.over(self.images)) if self.steps else None
        if reason is not None:
            self._end(trainer, reason)

    def _check_patience(self, trainer: Trainer) -> None:
        misses = self._selection.misses
        if self.settings.stop.patience is not None and misses >= self.settings.stop.patience:
            self._end(trainer, f"{misses} validations in a row brought no better score")

    def _end(self, trainer: Trainer, reason: str) -> None:
        self.stop_reason = reason
        trainer.should_stop = True
        _log.info("Training ends: %s.", reason)


def _checkpoint_gradients(module: CalibratedModule) -> None:
    transformer: Any = module.engine.backbone.transformer
    if not getattr(transformer, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"strategy.gradient_checkpointing is true, but {type(transformer).__name__} does not support it. "
            "Set it to false, and lower strategy.pictures_per_unit instead."
        )
    transformer.enable_gradient_checkpointing()
