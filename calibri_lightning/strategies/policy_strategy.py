"""What strategies with gradients share: pictures by the group, rewards, optimiser steps, copies, validation, resume.

A training step makes P x G pictures with the policy, scores them, and takes some optimiser steps on what it kept. A
subclass says how a unit of pictures is made and what its loss is. All decisions follow from numbers that are the same on
all ranks.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from calibri_lightning.adapters.policy import LIVE
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.advantages import AdvantageOptions, Advantages, advantages
from calibri_lightning.strategies.base import BestVector, Candidate, Strategy, Words
from calibri_lightning.strategies.budget import SearchBudget, StopRules
from calibri_lightning.strategies.checks import check_at_least
from calibri_lightning.strategies.ema import Ema, EmaOptions
from calibri_lightning.strategies.gradient_step import AdamWOptions, GradientStep, ThetaBounds
from calibri_lightning.strategies.groups import Slots, parts
from calibri_lightning.strategies.history import check_same
from calibri_lightning.strategies.rollouts import Drawn, Rollout, roll_out_units
from calibri_lightning.strategies.rounds import GenerationReport, on_rank_zero
from calibri_lightning.strategies.selection import START, Selection
from calibri_lightning.strategies.step_record import StepRecord

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from calibri_lightning.adapters.policy import Trains
    from calibri_lightning.prompts import PromptBatch
    from calibri_lightning.strategies.base import CalibratedModule
    from calibri_lightning.strategies.loss_stats import SummedStats

_log = logging.getLogger(__name__)
T = TypeVar("T")
ADVANTAGE, ADAMW, EMA_OPTIONS = AdvantageOptions(), AdamWOptions(), EmaOptions()
"""Defaults, which the command line needs as objects."""
EMA, BEST = "ema", "best"
"""Copies of the policy that a gradient strategy keeps, besides where it started."""


@dataclass(frozen=True)
class UnitWork(Generic[T]):
    """A unit of pictures to train on."""

    slots: Slots
    """All pictures of the step."""
    unit: range
    """Those of this unit."""
    kept: T
    """What was kept of them."""
    advantages: Tensor
    """float32 [B] on the device."""
    mask: Tensor
    """bool [B]: pictures that count."""
    count: int
    """Pictures of the whole optimiser step, over all ranks, masked ones included: what sums are divided by."""
    is_fresh: bool
    """Whether the policy is still the one that made the pictures."""


class PolicyStrategy(Strategy, Generic[T]):
    """Trains scales, a LoRA, both, or all weights by gradients.

    Args:
        train: What is trained.
        num_groups: Prompts P of a step.
        group_size: Pictures G of a prompt.
        updates: Optimiser steps a training step; each takes its share of the units.
        pictures_per_unit: Pictures that are made, and trained on, in one batch; by default as many as a forward may
            have (model.rows_per_forward), at most one group.
        gradient_checkpointing: Whether activations are computed again in the backward.
        advantage: How rewards become advantages.
        optimizer: AdamW.
        ema: The moving average of what is trained; none if null.
        max_wasted: So many training steps in a row without a usable gradient (NaN, or a constant reward) end the run.
        stop: When to end before `trainer.max_steps`.

    Raises:
        UserError: If a setting is out of its range.
    """

    stats: ClassVar[type[SummedStats]]
    """Statistics of the loss."""
    words: ClassVar[Words] = Words("Training", "trained", "step")
    owns_theta: ClassVar[bool] = True

    def __init__(
        self,
        train: Trains,
        num_groups: int,
        group_size: int,
        updates: int,
        pictures_per_unit: int | None,
        gradient_checkpointing: bool,
        advantage: AdvantageOptions,
        optimizer: AdamWOptions,
        ema: EmaOptions | None,
        max_wasted: int,
        stop: StopRules,
    ) -> None:
        counts = {"num_groups": num_groups, "updates": updates, "max_wasted": max_wasted}
        for name, value in counts.items():
            check_at_least(name, value, 1, "it is a number of something")
        check_at_least("group_size", group_size, 2, "advantages compare the pictures of one prompt")
        check_at_least("pictures_per_unit", pictures_per_unit, 1, "it is a number of pictures")
        optimizer.check()
        self.trains, self.num_groups, self.group_size, self.updates = train, num_groups, group_size, updates
        self.pictures_per_unit, self.advantage, self.optimizer = pictures_per_unit, advantage, optimizer
        self.ema_options, self.max_wasted, self.stop = ema, max_wasted, stop
        self.gradient_checkpointing = gradient_checkpointing
        self._reset()

    def _reset(self) -> None:
        self.report: GenerationReport | None = None
        self.stop_reason: str | None = None
        self.steps, self.skipped, self._wasted = 0, 0, 0
        self._selection = Selection()
        self._validating: Mapping[str, Candidate] = {}
        self._gradients: GradientStep | None = None
        self._ema: Ema | None = None
        self._budget: SearchBudget | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._is_checked = False

    # --- what a subclass defines ---

    @abstractmethod
    def draw(self, module: CalibratedModule, slots: Slots, unit: range) -> Drawn[T]:
        """Makes the pictures of a unit with the policy, under `no_grad`.

        Args:
            module: The module that is trained.
            slots: All pictures of the step.
            unit: Those to make.

        Returns:
            Latents and what training needs.
        """

    @abstractmethod
    def backward(self, module: CalibratedModule, work: UnitWork[T], record: StepRecord) -> None:
        """Runs forward and backward of the loss of a unit, divided by the number of pictures of the whole update.

        Args:
            module: The module that is trained.
            work: The unit.
            record: Takes diagnostics and costs.
        """

    def check_run(self, module: CalibratedModule) -> None:
        """Checks what only the module knows, before the first step.

        Args:
            module: The module that is trained.

        Raises:
            UserError: If the settings do not fit the module.
        """

    def after_updates(self, module: CalibratedModule) -> None:  # noqa: B027 - most do nothing
        """Called once after the optimiser steps of a training step.

        Args:
            module: The module that is trained.
        """

    # --- the course of a run ---

    @property
    def best(self) -> BestVector | None:
        """The best validated candidate so far."""
        return self._selection.best

    @property
    def images(self) -> int:
        """Images judged so far, the same after any kill and resume."""
        return self.steps * self.num_groups * self.group_size

    @property
    def prompts_per_step(self) -> int:
        """Prompts that one training step takes."""
        return self.num_groups

    def answer(self, module: CalibratedModule) -> Candidate:
        """Gives the best validated candidate; the average, or the policy as it is, where nothing was validated."""
        if self.best is not None:
            return self.best
        return self._candidate(module, LIVE if self._ema is None else EMA)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the optimiser, or takes its state from the checkpoint; a run that had ended does not go on."""
        self._prepare(cast("CalibratedModule", pl_module))
        assert self._budget is not None
        self._budget.start_clock()
        self._stop_if_over(trainer)
        self._check_patience(trainer)

    def training_step(self, module: CalibratedModule, batch: PromptBatch) -> None:
        """Makes pictures, scores them, and takes the optimiser steps of one training step."""
        started = time.monotonic()
        slots = Slots.of(batch, self.group_size, module.seed)
        size = self._unit_size(module)
        rollout = roll_out_units(module, slots, size, lambda unit: self.draw(module, slots, unit))
        worth = self._advantages(module, rollout)
        record = StepRecord(self.stats)
        if worth.mask.any():
            self._update(module, slots, rollout, worth, record)
            self.after_updates(module)
        # Without an optimizer of the trainer's this steps Lightning's stand-in, which is what moves global_step, once a
        # training step; it counts only inside training_step (lightning 2.6.6, issue #20674).
        module.optimizers().step()
        self.steps += 1
        metrics, forwards = record.over_ranks(module.gather)
        module.spend(rollout.num_images, rollout.num_forwards + forwards, time.monotonic() - started)
        self._publish(module, rollout, worth, record, metrics)

    def _unit_size(self, module: CalibratedModule) -> int:
        return self.pictures_per_unit or min(module.engine.evaluator.cells_per_unit, self.group_size)

    def _advantages(self, module: CalibratedModule, rollout: Rollout[T]) -> Advantages:
        shape = (-1, self.group_size)
        weights = {reward.name: weight for reward, weight in module.rewards.weighted if weight}
        rewards = {name: rollout.each[name].reshape(shape) for name in weights}
        return advantages(rewards, weights, self.advantage)

    def _update(
        self, module: CalibratedModule, slots: Slots, rollout: Rollout[T], worth: Advantages, record: StepRecord
    ) -> None:
        """Takes the optimiser steps, each on its share of the units."""
        assert self._gradients is not None
        device, trainer = module.engine.evaluator.backbone.device, module.trainer
        values = torch.from_numpy(worth.values.ravel()).to(device, torch.float32)
        mask = torch.from_numpy(worth.mask.ravel()).to(device)
        taken = 0
        for share in parts(rollout.units, self.updates):
            count = sum(len(rollout.units[index]) for index in share)
            for index in (index for index in share if index in rollout.kept):
                unit = rollout.units[index]
                here = slice(unit.start, unit.stop)
                work = UnitWork(slots, unit, rollout.kept[index], values[here], mask[here], count, not taken)
                self.backward(module, work, record)
            norm = self._gradients.step(trainer.world_size)
            record.grad_norms.append(norm)
            if not math.isfinite(norm):
                record.skipped += 1
                continue
            taken += 1
            if self._ema is not None:
                self._ema.update(module.policy.parameters())
        self._is_checked = True

    def _publish(
        self,
        module: CalibratedModule,
        rollout: Rollout[T],
        worth: Advantages,
        record: StepRecord,
        metrics: Mapping[str, float],
    ) -> None:
        """Logs what the step showed, and ends a run that learns nothing or is over."""
        failed = int((~np.isfinite(rollout.total)).sum())
        finite = rollout.total[np.isfinite(rollout.total)]
        total = self._budget.total_generations if self._budget is not None else None
        groups = rollout.total.reshape(-1, self.group_size)
        self.report = GenerationReport(
            generation=self.steps,
            total_generations=total,
            reward_mean=float(finite.mean()) if finite.size else math.nan,
            reward_best=float(finite.max()) if finite.size else math.nan,
            pace=record.grad_norms[-1] if record.grad_norms else math.nan,
            images=self.images,
            failed=failed,
            dropped=int((~np.isfinite(groups)).all(axis=1).sum()),
            pace_name="grad norm",
            step_name="step",
        )
        self.skipped += record.skipped
        names = ("reward_mean", "reward_best", "images", "failed", "dropped")
        values = {name: float(getattr(self.report, name)) for name in names}
        for name, scores in rollout.each.items():
            values[f"reward/{name}"] = float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan
        values |= {
            "diversity": rollout.diversity,
            "advantage_std": worth.std,
            "zero_std_share": worth.zero_std_share,
            "grad_norm": self.report.pace,
            "skipped_updates": float(self.skipped),
            **metrics,
        }
        for name, value in values.items():
            module.log(f"train/{name}", value)
        self._count_waste(worth, record)
        self._stop_if_over(module.trainer)

    def _count_waste(self, worth: Advantages, record: StepRecord) -> None:
        """Ends a run of which so many steps in a row taught nothing."""
        if worth.mask.any() and record.skipped < len(record.grad_norms):
            self._wasted = 0
            return
        self._wasted += 1
        reason = (
            "its gradient is not finite (train/grad_norm)"
            if worth.mask.any()
            else "no group of pictures has rewards that are finite and differ"
        )
        _log.warning("Step %d taught nothing: %s.", self.steps, reason)
        if self._wasted >= self.max_wasted:
            raise UserError(
                f"{self._wasted} training steps in a row taught nothing, the last because {reason}. Check the reward on "
                "a few images, lower the learning rate, or take more pictures a group (max_wasted sets how many such "
                "steps are borne); the checkpoint of the last step that did is intact."
            )

    # --- validation ---

    def _candidate(self, module: CalibratedModule, name: str) -> Candidate:
        return Candidate(module.policy.theta_of(name), name)

    def validation_candidates(self, module: CalibratedModule) -> Mapping[str, Candidate]:
        """The start once; after new steps the policy as it is, and its average."""
        if module.trainer.state.fn != TrainerFn.FITTING:
            # Outside of a fit the answer of the checkpoint is what counts, wherever it came from.
            best = {} if module.answer == module.start else {"best": module.answer}
            return {START: module.start} | best
        self._prepare(module)
        wanted = {} if self._selection.start_score is not None else {START: self._candidate(module, START)}
        if self.steps and self.steps != self._selection.validated_generation:
            wanted["policy"] = self._candidate(module, LIVE)
            if self._ema is not None:
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

    # --- resume ---

    def state_dict(self) -> dict[str, Any]:
        """Gives the state after the last training step, in tensors, numbers and texts."""
        if self._gradients is None or self._budget is None:
            return dict(self._loaded or {})
        return {
            "settings": self._settings(),
            "optimizer": self._gradients.optimizer.state_dict(),
            "ema": dict(self._ema.state_dict()) if self._ema is not None else None,
            "selection": self._selection.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
            "wasted": self._wasted,
            "elapsed": self._budget.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint; the optimiser is filled when training starts."""
        if state_dict:
            self._loaded = state_dict
            self._selection = Selection.load(state_dict["selection"])
            self.steps, self.skipped = state_dict["steps"], state_dict["skipped"]
            self._wasted = state_dict["wasted"]

    def _settings(self) -> dict[str, str]:
        """What must not change when a run is resumed."""
        return {
            "strategy": type(self).__name__,
            "train": self.trains,
            "num_groups": str(self.num_groups),
            "group_size": str(self.group_size),
            "updates": str(self.updates),
            "advantage": str(self.advantage),
            "ema": str(self.ema_options),
        }

    def _prepare(self, module: CalibratedModule) -> None:
        """Makes what training needs, once; from a checkpoint where there is one."""
        if self._gradients is not None:
            return
        if self.stop.patience is not None and not module.validates:
            raise UserError(
                f"patience is {self.stop.patience}, which counts validations, but there are no validation prompts. "
                "Name some with data.val, or remove patience."
            )
        self.check_run(module)
        if self.gradient_checkpointing:
            _checkpoint_gradients(module)
        parameters, layout = module.policy.parameters(), module.layout
        bounds = ThetaBounds(*(torch.from_numpy(part.copy()) for part in (layout.lower, layout.upper, layout.stds)))
        self._gradients = GradientStep(self.optimizer, parameters, bounds)
        self._budget = SearchBudget(self.stop, module.trainer.max_steps, self.num_groups * self.group_size)
        if self.ema_options is not None:
            self._ema = self.ema_options.build()
            self._ema.start(parameters)
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            module.policy.keep(START)
            return
        check_same(loaded["settings"], self._settings())
        self._gradients.optimizer.load_state_dict(loaded["optimizer"])
        if self._ema is not None:
            self._ema.load_state_dict(loaded["ema"])
        self._budget.elapsed = float(loaded["elapsed"])

    # --- the end ---

    def _stop_if_over(self, trainer: Trainer) -> None:
        budget = self._budget
        assert budget is not None
        reason = on_rank_zero(trainer, lambda: budget.over(self.images)) if self.steps else None
        if reason is not None:
            self._end(trainer, reason)

    def _check_patience(self, trainer: Trainer) -> None:
        misses = self._selection.misses
        if self.stop.patience is not None and misses >= self.stop.patience:
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
