"""A training step of a policy: pictures by the group, rewards, advantages, and optimiser steps on what was kept."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.arrays import means
from calibri_lightning.errors import EchoError, UserError
from calibri_lightning.launch.agreement import checksum, require_same_bits
from calibri_lightning.launch.pulse import StopRequested
from calibri_lightning.prompts import fingerprint
from calibri_lightning.sampling.sharing import Request
from calibri_lightning.strategies.advantages import Advantages, advantages
from calibri_lightning.strategies.base import CalibratedModule
from calibri_lightning.strategies.groups import Slots, parts
from calibri_lightning.strategies.ledger import digest
from calibri_lightning.strategies.policy_run import PolicyRun
from calibri_lightning.strategies.rollouts import Drawn, Rollout, roll_out_units
from calibri_lightning.strategies.rounds import GenerationReport
from calibri_lightning.strategies.step_record import StepRecord

if TYPE_CHECKING:
    from calibri_lightning.prompts import PromptBatch
    from calibri_lightning.strategies.loss_stats import SummedStats

_log = logging.getLogger(__name__)
_UNIT_SETTING = "--model.strategy.pictures_per_unit"
T = TypeVar("T")


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


class PolicyStrategy(PolicyRun, Generic[T]):
    """Trains scales, a LoRA, both, or all weights by gradients.

    A training step makes P x G pictures with the policy, scores them, and takes some optimiser steps on what it kept. A
    subclass says how a unit of pictures is made and what its loss is.
    """

    stats: ClassVar[type[SummedStats]]
    """Statistics of the loss."""

    def _reset(self) -> None:
        super()._reset()
        self.is_checked = False

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

    @abstractmethod
    def forwards_per_picture(self, module: CalibratedModule) -> int:
        """Counts what a picture costs on paper.

        Args:
            module: The module that is trained.

        Returns:
            Forwards of one row; 2 for one with its backward.
        """

    def sampling_steps(self, module: CalibratedModule) -> int:
        """Sampling steps in training.

        Args:
            module: The module that is trained.

        Returns:
            The strategy's own, or those of the module.
        """
        return self.settings.num_steps or module.num_steps

    def describe_step(self, module: CalibratedModule) -> str:
        """Says what a training step takes."""
        settings = self.settings
        return (
            f"{settings.num_groups} prompts x {settings.group_size} pictures a step, "
            f"{self.forwards_per_picture(module)} forwards a picture, {self._unit_size(module)} pictures a unit"
        )

    def requests(self, module: CalibratedModule) -> Sequence[Request]:
        """All pictures of a step, in its own units."""
        return [Request(self.settings.images_per_step, self._unit_size(module), setting=_UNIT_SETTING)]

    def after_updates(self, module: CalibratedModule) -> None:  # noqa: B027 - most do nothing
        """Called once after the optimiser steps of a training step.

        Args:
            module: The module that is trained.
        """

    def training_step(self, module: CalibratedModule, batch: PromptBatch) -> None:
        """Makes pictures, scores them, and takes the optimiser steps of one training step."""
        started = time.monotonic()
        slots = Slots.of(batch, self.settings.group_size, module.seed)
        size = self._unit_size(module)
        rollout = roll_out_units(module, slots, size, lambda unit: self.draw(module, slots, unit))
        worth = self._advantages(module, rollout)
        record = StepRecord(self.stats)
        if worth.mask.any():
            self._update(module, slots, rollout, worth, record)
            self.after_updates(module)
            if module.trainer.world_size > 1:
                bits = checksum(module.policy.parameters().values())
                # What each rank knows by itself is in it: one that read another checkpoint draws other prompts.
                place = int(digest(fingerprint(batch.prompts), str(self.steps)), 16)
                require_same_bits(module.gather, f"parameters or prompts after step {self.steps + 1}", bits + place)
        # Without an optimizer of the trainer's this steps Lightning's stand-in, which is what moves global_step, once a
        # training step; it counts only inside training_step (lightning 2.6.6, issue #20674).
        module.optimizers().step()
        self.steps += 1
        metrics, forwards = record.over_ranks(module.gather)
        module.spend(rollout.num_images, rollout.num_forwards + forwards, time.monotonic() - started)
        self._publish(module, rollout, worth, record, metrics)

    def check_units(self, module: CalibratedModule) -> None:
        """Checks that every optimiser step has pictures of its own, and that rewards are normalised in one place."""
        combine = self.settings.advantage.combine
        if not module.blend.is_plain and combine != "sum":
            raise UserError(
                f"model.normalise is {module.blend.normalise} and strategy's advantage.combine is {combine}: rewards "
                "would be normalised twice. Set one of them back: model.normalise: none, or combine: sum."
            )
        size, images = self._unit_size(module), self.settings.images_per_step
        if self.settings.updates > -(-images // size):
            raise UserError(
                f"updates is {self.settings.updates}, but the {images} pictures of a training step make only "
                f"{-(-images // size)} unit(s) of {size} pictures, and an optimiser step needs at least one. Lower "
                "updates or pictures_per_unit."
            )

    def _unit_size(self, module: CalibratedModule) -> int:
        return self.settings.pictures_per_unit or min(module.engine.evaluator.cells_per_unit, self.settings.group_size)

    def _advantages(self, module: CalibratedModule, rollout: Rollout[T]) -> Advantages:
        shape, blend = (-1, self.settings.group_size), module.blend
        parts = blend.parts({name: rollout.each[name].reshape(shape) for name in blend.names})
        if blend.is_plain:
            weights = {entry.reward.name: float(entry.config.weight) for entry in module.rewards.optimised}
            return advantages(dict(zip(blend.names, parts, strict=True)), weights, self.settings.advantage)
        # Its columns are what competes, here the pictures of a group.
        total = blend.total(parts.swapaxes(1, 2), blend.scale(parts)).T
        blend.learn(parts)
        return advantages({"blend": total}, {"blend": 1.0}, self.settings.advantage)

    def _update(
        self, module: CalibratedModule, slots: Slots, rollout: Rollout[T], worth: Advantages, record: StepRecord
    ) -> None:
        """Takes the optimiser steps, each on its share of the units."""
        assert self._gradients is not None
        device, trainer = module.engine.evaluator.backbone.device, module.trainer
        lockstep = module.engine.lockstep
        values = torch.from_numpy(worth.values.ravel()).to(device, torch.float32)
        mask = torch.from_numpy(worth.mask.ravel()).to(device)
        taken = 0
        for share in parts(rollout.units, self.settings.updates):
            count = sum(len(rollout.units[index]) for index in share)
            turns = lockstep.turns(
                [[index for index in share if index in own] for own in rollout.shares],
                trainer.global_rank,
                next(iter(rollout.kept), 0),
            )
            late = lockstep.late()
            with self._together(module):
                for index, counts in turns:
                    unit = rollout.units[index]
                    with late.kept():
                        module.pulse.beat(f"training on unit {index + 1} of {len(rollout.units)}")
                    here = slice(unit.start, unit.stop)
                    work = UnitWork(slots, unit, rollout.kept[index], values[here], mask[here], count, not taken)
                    with lockstep.forwards():
                        if counts:
                            self.backward(module, work, record)
                        else:
                            with self._gradients.discarded():
                                self.backward(module, work, StepRecord(self.stats))
                    if record.failure is not None and not lockstep.binds:
                        break
                if record.failure is not None:
                    raise record.failure
                late.raise_it()
            norm = self._gradients.step(trainer.world_size)
            record.grad_norms.append(norm)
            if not math.isfinite(norm):
                record.skipped += 1
                continue
            taken += 1
            if self._ema is not None:
                self._ema.update(module.policy.parameters())
        self.is_checked = True

    @contextmanager
    def _together(self, module: CalibratedModule) -> Iterator[None]:
        """Stops all ranks where one fails: the others would wait for its gradients for ever."""
        failure: Exception | None = None
        stop = 0
        try:
            yield
        except StopRequested as request:
            stop = request.number
        except torch.OutOfMemoryError as error:
            failure = UserError(
                f"The backward pass of {self._unit_size(module)} pictures does not fit into memory. Lower "
                "strategy.pictures_per_unit, or set strategy.gradient_checkpointing to true."
            )
            failure.__cause__ = error
        except Exception as error:
            failure = error
        if failure is not None and module.engine.lockstep.is_lost:
            raise failure
        gathered = np.stack(module.gather(np.array([float(failure is not None), float(stop)])))
        failed, stop = gathered.max(axis=0)
        if failure is not None:
            raise failure
        if failed:
            raise EchoError("Training failed on another rank; its own message says why. Fix that and run again.")
        if stop:
            raise StopRequested(int(stop))

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
        groups = rollout.total.reshape(-1, self.settings.group_size)
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
        module.watch.trained(rollout.diversity)
        watched = {name: scores for name, scores in rollout.each.items() if name not in module.rewards.held_out_names}
        for name, scores in watched.items():
            values[f"reward/{name}"] = float(means(scores))
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
            self.wasted = 0
            return
        self.wasted += 1
        reason = (
            "its gradient is not finite (train/grad_norm)"
            if worth.mask.any()
            else "no group of pictures has rewards that are finite and differ"
        )
        _log.warning("Step %d taught nothing: %s.", self.steps, reason)
        if self.wasted >= self.settings.max_wasted:
            raise UserError(
                f"{self.wasted} training steps in a row taught nothing, the last because {reason}. Check the reward on "
                "a few images. To change what is trained with (a lower learning rate, more pictures a group), start a "
                "new run with --model.init_from RUN: this run's folder, with its answer as of the last validation. "
                "--ckpt_path resumes this one unchanged but for max_wasted, and counts such steps anew."
            )
