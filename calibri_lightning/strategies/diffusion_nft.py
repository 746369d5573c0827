"""DiffusionNFT (arXiv 2509.16117): finished pictures are noised again; good ones attract the policy, bad ones repel it.

The forward process alone is needed: no stochastic sampler, no log-probabilities, no trajectories. A picture costs
num_steps forwards to make; each noise level of it costs 1 of the old policy, 2 of the policy (a forward with its
backward) and 1 of the reference where the KL has a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from calibri_lightning.sampling.noise import forward_noise_seed
from calibri_lightning.sampling.rollout import integrate
from calibri_lightning.strategies.advantages import AdvantageOptions
from calibri_lightning.strategies.budget import StopRules
from calibri_lightning.strategies.ema import EmaOptions, blend_into
from calibri_lightning.strategies.gradient_step import AdamWOptions
from calibri_lightning.strategies.nft_loss import (
    NFTOptions,
    NFTStats,
    NoisedPictures,
    OldPolicyDecay,
    Velocities,
    nft_loss,
)
from calibri_lightning.strategies.noise_levels import NoiseLevels, Timesteps
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

OLD = "old"
"""The copy of the policy that makes the pictures, and that implicit policies are measured from."""
_LOSS, _OLD_DECAY = NFTOptions(), OldPolicyDecay()


class DiffusionNFT(PolicyStrategy[Tensor]):
    """DiffusionNFT; the defaults are those of its published recipes, for groups that a small machine can bear.

    The published recipe is without classifier-free guidance (members: single). With several members all velocities are
    guided ones, and what is trained is the policy under that guidance.

    Args:
        train: What is trained: scales, lora, both, or full (all weights of the transformer; small models).
        num_groups: Prompts of a training step.
        group_size: Pictures of a prompt.
        num_steps: Sampling steps in training. Default: model.num_steps, with which is validated.
        timesteps: Noise levels that a picture is trained on: schedule (those at which sampling steps start, in an order
            of its own) or uniform (between 0 and 1, one from each of num_timesteps equal parts).
        num_timesteps: Noise levels of a picture. Default: all that the schedule has.
        noisiest: Train on this share of the noise levels, the noisiest; above 0 and at most 1.
        loss: Length of the step from the old policy, cut of the advantages, and KL.
        old_decay: How slowly the old policy, which makes the pictures, follows the one that is trained.
        reference: What the KL term holds the policy to: base (no LoRA, all scales 1) or start (as the run began).
        advantage: How rewards become advantages.
        optimizer: AdamW.
        ema: The moving average of what is trained, validated beside the policy; none if null.
        updates: Optimiser steps a training step, each on its share of the pictures.
        pictures_per_unit: Pictures that are made, and trained on, in one batch. Default: those of one group, or of
            model.rows_per_forward if that is fewer.
        gradient_checkpointing: Forget activations and compute them again in the backward; less memory, more time.
        offload: Keep the pictures' latents on the CPU until they are trained on.
        max_wasted: So many training steps in a row without a usable gradient end the run.
        max_images: End before this many training images are exceeded.
        max_seconds: End after so many seconds of training, resumed parts included.
        patience: End after so many validations in a row without a better score.

    Raises:
        UserError: If a setting is out of its range.
    """

    stats: ClassVar[type[NFTStats]] = NFTStats

    def __init__(
        self,
        train: Trains = "lora",
        num_groups: int = 8,
        group_size: int = 12,
        num_steps: int | None = None,
        timesteps: Timesteps = "schedule",
        num_timesteps: int | None = None,
        noisiest: float = 1.0,
        loss: NFTOptions = _LOSS,
        old_decay: OldPolicyDecay = _OLD_DECAY,
        reference: Reference = "base",
        advantage: AdvantageOptions = ADVANTAGE,
        optimizer: AdamWOptions = ADAMW,
        ema: EmaOptions | None = EMA_OPTIONS,
        updates: int = 1,
        pictures_per_unit: int | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
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
        self.levels = NoiseLevels(timesteps, num_timesteps, noisiest)
        self.loss, self.old_decay = loss, old_decay

    def own_settings(self) -> dict[str, str | int]:
        """The sampler, the noise levels and the loss."""
        return {
            "noise levels": str(self.levels),
            "loss": str(self.loss),
            "old policy": str(self.old_decay),
        }

    def check_run(self, module: CalibratedModule) -> None:
        """Checks that the schedule has as many noise levels as are trained on."""
        super().check_run(module)
        self.levels.check(self.sampling_steps(module))

    def keep_copies(self, module: CalibratedModule) -> None:
        """Lets the policy of the start be the old one."""
        super().keep_copies(module)
        module.policy.keep(OLD)

    def forwards_per_picture(self, module: CalibratedModule) -> int:
        """The sampler's steps, and for each noise level the old policy, forward, backward and reference."""
        steps = self.sampling_steps(module)
        each = 4 if self.loss.kl_weight else 3
        return len(module.layout.members) * (steps + self.levels.count(steps) * each)

    def draw(self, module: CalibratedModule, slots: Slots, unit: range) -> Drawn[Tensor]:
        """Samples a unit with the old policy, along the ODE, and keeps the finished latents alone."""
        denoiser = self._frozen(module, unit_denoiser(module, slots, unit, self.sampling_steps(module)), OLD)
        noise = module.engine.backbone.noise([slots.seeds[slot] for slot in unit])
        with module.policy.using(OLD):
            samples = integrate(denoiser, noise)
        finite = cleaned(samples.latents)
        return Drawn(finite.cpu() if self.settings.offload else finite, samples.latents, samples.num_forwards)

    def backward(self, module: CalibratedModule, work: UnitWork[Tensor], record: StepRecord) -> None:
        """Trains on a unit at each of its noise levels, with a backward pass of its own for each."""
        denoiser = unit_denoiser(module, work.slots, work.unit, self.sampling_steps(module))
        noised = self._noised(denoiser, work)
        # Before any graph of the policy exists: other weights are swapped in.
        old = self._velocities(module, denoiser, OLD, noised)
        references = (
            self._velocities(module, denoiser, self.settings.reference, noised) if self.loss.kl_weight else None
        )
        num_forwards = denoiser.num_rows * (4 if references else 3)
        for number, pictures in enumerate(noised):
            policy = denoiser.with_rows(live_rows(module, len(denoiser)))
            # Gradient checkpointing runs the forward again inside of the backward, with the scales that are set then.
            with policy.attached():
                new = policy.velocity_at(pictures.x_t, pictures.t)
                velocities = Velocities(new, old[number], references[number] if references else None)
                total, stats = nft_loss(velocities, pictures, work.advantages, work.mask, self.loss)
                # The mean over the pictures of this optimiser step, of all ranks, and over their noise levels.
                (total / (work.count * len(noised))).backward()
            record.add(stats, num_forwards)

    def after_updates(self, module: CalibratedModule) -> None:
        """Lets the old policy follow: old <- eta old + (1 - eta) new (DiffusionNFT, soft update of the old policy)."""
        old = {name: tensor.clone() for name, tensor in module.policy.tensors(OLD).items()}
        blend_into(old, module.policy.parameters(), self.old_decay.at(self.steps + 1))
        module.policy.keep(OLD, old)

    def _noised(self, denoiser: Denoiser, work: UnitWork[Tensor]) -> list[NoisedPictures]:
        """The unit at each of its noise levels: x_t = (1 - t) x0 + t noise (DiffusionNFT, forward process)."""
        seeds, device = [work.slots.seeds[slot] for slot in work.unit], denoiser.sigmas.device
        x0, levels = work.kept.to(device), self.levels.draw(denoiser.levels, seeds).to(device)
        noised = []
        for number, t in enumerate(levels):
            noise = denoiser.backbone.noise([forward_noise_seed(seed, number) for seed in seeds])
            share = t.reshape(-1, *(1,) * (x0.ndim - 1))
            noised.append(NoisedPictures(x0, (1 - share) * x0 + share * noise, t))
        return noised

    def _velocities(
        self, module: CalibratedModule, denoiser: Denoiser, name: str, noised: list[NoisedPictures]
    ) -> list[Tensor]:
        """What a copy of the policy predicts at each noise level."""
        frozen = self._frozen(module, denoiser, name)
        with torch.no_grad(), module.policy.using(name), frozen.attached():
            return [frozen.velocity_at(pictures.x_t, pictures.t) for pictures in noised]

    def _frozen(self, module: CalibratedModule, denoiser: Denoiser, name: str) -> Denoiser:
        return denoiser.with_rows(rows_of(module, module.policy.theta_of(name), len(denoiser)))
