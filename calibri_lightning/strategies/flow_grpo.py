"""Flow-GRPO (arXiv 2505.05470): policy gradients on the stochastic steps of a flow-matching sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.kernels import CPS, FlowSDE, Kernel
from calibri_lightning.sampling.trajectory import Replay, Trajectory, replay, roll_out
from calibri_lightning.sampling.windows import AllSteps, Window
from calibri_lightning.strategies.advantages import AdvantageOptions
from calibri_lightning.strategies.budget import StopRules
from calibri_lightning.strategies.ema import EmaOptions
from calibri_lightning.strategies.gradient_step import AdamWOptions
from calibri_lightning.strategies.grpo_loss import GRPOOptions, LossStats, StepNoise, StepPrediction, grpo_loss
from calibri_lightning.strategies.policy_run import ADAMW, ADVANTAGE, EMA_OPTIONS, PolicySettings, Reference
from calibri_lightning.strategies.policy_strategy import PolicyStrategy, UnitWork
from calibri_lightning.strategies.rollouts import Drawn, cleaned
from calibri_lightning.strategies.unit_denoiser import live_rows, rows_of, unit_denoiser

if TYPE_CHECKING:
    from calibri_lightning.adapters.policy import Trains
    from calibri_lightning.sampling.denoiser import Denoiser
    from calibri_lightning.strategies.base import CalibratedModule
    from calibri_lightning.strategies.groups import Slots
    from calibri_lightning.strategies.step_record import StepRecord

_LOSS = GRPOOptions()


class FlowGRPO(PolicyStrategy[Trajectory]):
    """Flow-GRPO; the defaults are those of its published recipes, for groups that a small machine can bear.

    Args:
        train: What is trained: scales, lora, both, or full (all weights of the transformer; small models).
        num_groups: Prompts of a training step.
        group_size: Pictures of a prompt.
        kernel: The stochastic step: FlowSDE, DanceSDE or CPS. Default: FlowSDE at noise level 0.7.
        window: Which steps are stochastic, and trained on: AllSteps, RandomWindow (Flow-GRPO-Fast) or SlidingWindow
            (MixGRPO). Default: all but the last.
        num_steps: Sampling steps in training. Default: model.num_steps, with which is validated.
        loss: Clips, KL and GRPO-Guard.
        reference: What the KL term holds the policy to: base (no LoRA, all scales 1) or start (as the run began).
        advantage: How rewards become advantages.
        optimizer: AdamW.
        ema: The moving average of what is trained, validated beside the policy; none if null.
        updates: Optimiser steps a training step, each on its share of the pictures; only the first is on-policy.
        pictures_per_unit: Pictures that are made, and trained on, in one batch. Default: those of one group, or of
            model.rows_per_forward if that is fewer.
        gradient_checkpointing: Forget activations and compute them again in the backward; less memory, more time.
        offload: Keep trajectories on the CPU until they are trained on.
        ratio_tolerance: Most that a ratio may differ from 1 before the first update. Default 0: roll-out and replay
            are the same computation. More is for kernels whose results differ with and without gradients.
        max_wasted: So many training steps in a row without a usable gradient end the run.
        max_images: End before this many training images are exceeded.
        max_seconds: End after so many seconds of training, resumed parts included.
        patience: End after so many validations in a row without a better score.

    Raises:
        UserError: If a setting is out of its range, or settings exclude each other.
    """

    stats: ClassVar[type[LossStats]] = LossStats

    def __init__(
        self,
        train: Trains = "lora",
        num_groups: int = 8,
        group_size: int = 12,
        kernel: Kernel | None = None,
        window: Window | None = None,
        num_steps: int | None = None,
        loss: GRPOOptions = _LOSS,
        reference: Reference = "base",
        advantage: AdvantageOptions = ADVANTAGE,
        optimizer: AdamWOptions = ADAMW,
        ema: EmaOptions | None = EMA_OPTIONS,
        updates: int = 1,
        pictures_per_unit: int | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
        ratio_tolerance: float = 0.0,
        max_wasted: int = 5,
        max_images: int | None = None,
        max_seconds: float | None = None,
        patience: int | None = None,
    ) -> None:
        stop = StopRules(max_images, max_seconds, patience)
        super().__init__(
            PolicySettings(
                train,
                num_groups,
                group_size,
                num_steps,
                reference,
                updates,
                pictures_per_unit,
                gradient_checkpointing,
                offload,
                advantage,
                optimizer,
                ema,
                max_wasted,
                stop,
            )
        )
        if loss.guard != "off" and isinstance(kernel, CPS):
            raise UserError(
                f"loss.guard is {loss.guard} and the kernel CPS, whose log-probability is not that of a Gaussian, so "
                "that the guard's correction does not apply. Use FlowSDE or DanceSDE, or loss.guard: off."
            )
        if (loss.kl != "none") != (loss.kl_weight > 0):
            raise UserError(
                f"loss.kl is {loss.kl} and loss.kl_weight {loss.kl_weight:g}: a KL term needs both its form (mean or "
                "velocity) and a weight above 0, and without one both are left out."
            )
        self.kernel: Kernel = kernel or FlowSDE()
        self.window: Window = window or AllSteps()
        self.loss, self.ratio_tolerance = loss, ratio_tolerance

    def own_settings(self) -> dict[str, str | int]:
        """The sampler and the loss."""
        return {
            "kernel": str(self.kernel),
            "window": str(self.window),
            "loss": str(self.loss),
        }

    def check_run(self, module: CalibratedModule) -> None:
        """Checks that the window lies within the steps."""
        super().check_run(module)
        self.window.check(self.sampling_steps(module))

    def forwards_per_picture(self, module: CalibratedModule) -> int:
        """The sampler's steps, and for each step of the window forward, backward and reference."""
        steps = self.sampling_steps(module)
        window = len(self.window.steps(module.seed, 0, steps))
        return len(module.layout.members) * (steps + window * (2 if self.loss.kl == "none" else 3))

    def draw(self, module: CalibratedModule, slots: Slots, unit: range) -> Drawn[Trajectory]:
        """Samples a unit with noise in the window's steps."""
        denoiser = unit_denoiser(module, slots, unit, self.sampling_steps(module))
        seeds = [slots.seeds[slot] for slot in unit]
        trajectory = roll_out(
            denoiser,
            module.engine.backbone.noise(seeds),
            self.kernel,
            # The same window on all ranks, and after any resume.
            self.window.steps(module.seed, self.steps, denoiser.num_steps),
            seeds,
            keep_means=self.loss.guard != "off",
            offload=self.settings.offload,
        )
        finite = replace(
            trajectory,
            x=cleaned(trajectory.x),
            x_next=cleaned(trajectory.x_next),
            means=None if trajectory.means is None else cleaned(trajectory.means),
        )
        return Drawn(finite, trajectory.latents, trajectory.num_forwards)

    def backward(self, module: CalibratedModule, work: UnitWork[Trajectory], record: StepRecord) -> None:
        """Replays the window's steps with gradients, each with a backward pass of its own."""
        trajectory = work.kept
        denoiser = unit_denoiser(module, work.slots, work.unit, self.sampling_steps(module))
        references = self._references(module, denoiser, trajectory)
        for index in range(len(trajectory.steps)):
            policy = denoiser.with_rows(live_rows(module, len(denoiser)))
            # Gradient checkpointing runs the forward again inside of the backward, with the scales that are set then.
            with policy.attached():
                found = replay(policy, trajectory, index, self.kernel)
                record.failure = record.failure or self._check_ratio(found, trajectory, index, work)
                mean = None if trajectory.means is None else trajectory.means[index].to(found.mean.device)
                total, stats = grpo_loss(
                    _prediction(found),
                    StepPrediction(trajectory.log_probs[index], mean),
                    references[index] if references else None,
                    work.advantages,
                    work.mask,
                    self._noise(denoiser, trajectory.steps[index]),
                    self.loss,
                )
                # The mean over the pictures of this optimiser step, of all ranks, and over the window's steps.
                (total / (work.count * len(trajectory.steps))).backward()
            record.add(stats, 2 * denoiser.num_rows + (denoiser.num_rows if references else 0))

    def _references(
        self, module: CalibratedModule, denoiser: Denoiser, trajectory: Trajectory
    ) -> list[StepPrediction] | None:
        """What the reference says of each step, before any graph of the policy exists."""
        if self.loss.kl == "none":
            return None
        reference = denoiser.with_rows(rows_of(module, module.policy.theta_of(self.settings.reference), len(denoiser)))
        with torch.no_grad(), module.policy.using(self.settings.reference), reference.attached():
            steps = range(len(trajectory.steps))
            return [_prediction(replay(reference, trajectory, index, self.kernel)) for index in steps]

    def _noise(self, denoiser: Denoiser, step: int) -> StepNoise:
        sigmas = denoiser.sigmas
        levels = (sigmas[step], sigmas[step + 1], sigmas[1])
        return StepNoise(self.kernel.std(*levels), self.kernel.coefficient(*levels), sigmas[step + 1] - sigmas[step])

    def _check_ratio(
        self, found: Replay, trajectory: Trajectory, index: int, work: UnitWork[Trajectory]
    ) -> UserError | None:
        """Fails closed: before any update the policy that is trained is the one that made the pictures."""
        if self.is_checked or not work.is_fresh:
            return None
        difference = (found.log_prob.detach() - trajectory.log_probs[index]).exp() - 1
        worst = float(difference.nan_to_num().abs().max())  # a picture that went wrong is masked
        if worst <= self.ratio_tolerance:
            return None
        return UserError(
            f"Before the first update the probability ratio of step {trajectory.steps[index]} differs from 1 by "
            f"{worst:.2g}: roll-out and replay do not compute the same, so that clips of {self.loss.clip_high:g} "
            "would act on numerical noise. Turn off what differs with gradients (compile, an attention back end), "
            "or set strategy.ratio_tolerance above this if it is small against the clips."
        )


def _prediction(found: Replay) -> StepPrediction:
    return StepPrediction(found.log_prob, found.mean, found.velocity)
