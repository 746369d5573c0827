"""The clipped policy-gradient loss of Flow-GRPO on steps of a stochastic sampler (torch).

A sample is one step of one picture: x' drawn from N(mu_old, n^2), with dt = sigma' - sigma < 0. Its log-probability
is the mean over the D latent dimensions, so that the ratio is the D-th root of the true one, and clips are small.

Sources: Flow-GRPO (arXiv 2505.05470) and its code; the clipped ratio is PPO's (arXiv 1707.06347, eq. 7), with separate
bounds as in DAPO (arXiv 2503.14476, "clip-higher"); GRPO-Guard (arXiv 2510.22319).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calibri_lightning.strategies.checks import check_at_least, check_choice, check_positive
from calibri_lightning.strategies.loss_stats import SummedStats, check_samples, masked_sum, sample_mean

KL = Literal["mean", "velocity", "none"]
"""How far the policy is from the reference: between the means of the step, between the velocities, or not measured."""
Guard = Literal["off", "ratio", "ratio_and_reweight"]
"""GRPO-Guard: off, its ratio normalisation, or that and its weights 1 / (-dt) of the steps."""


@dataclass(frozen=True)
class GRPOOptions:
    """Form of the loss.

    Attributes:
        clip_low: The ratio is clipped below 1 minus this: it bounds how far a sample of negative advantage is pushed
            away.
        clip_high: The ratio is clipped above 1 plus this: it bounds how far a sample of positive advantage is pulled
            near.
        kl: `mean`: mean((mu - mu_ref)^2) / (2 s^2), the Gaussian KL without its factor 1 / (-dt), so that late steps
            weigh more. `velocity`: mean((v - v_ref)^2), for training without guidance. `none`: no reference is needed.
        kl_weight: Weight of the KL term.
        guard: `ratio` centres the logarithm of the ratio and gives it the same spread at every step;
            `ratio_and_reweight` also divides the clipped term by -dt. For kernels whose log-probability is Gaussian:
            not for CPS.
    """

    clip_low: float = 1e-4
    clip_high: float = 1e-4
    kl: KL = "none"
    kl_weight: float = 0.0
    guard: Guard = "off"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_positive("clip_low", self.clip_low)
        check_positive("clip_high", self.clip_high)
        check_choice("kl", self.kl, get_args(KL))
        check_at_least("kl_weight", self.kl_weight, 0, "a negative weight would push the policy from its reference")
        check_choice("guard", self.guard, get_args(Guard))


@dataclass(frozen=True)
class StepPrediction:
    """What one policy says of B stored steps."""

    log_prob: Tensor
    """Log-probability of the stored x', mean over the latent dimensions, float32 [B]. Not read of a reference."""
    mean: Tensor | None = None
    """Mean mu of the step [B, ...]; needed by the guard (new and old) and by the KL `mean` (new and reference)."""
    velocity: Tensor | None = None
    """Velocity [B, ...]; needed by the KL `velocity` (new and reference)."""


@dataclass(frozen=True)
class StepNoise:
    """The noise of the stored steps: scalars, or one value a sample [B]."""

    std: Tensor
    """n, the std of the noise that was added."""
    coefficient: Tensor
    """s of the KL `mean`: s(sigma) of an SDE, n = s sqrt(-dt); for CPS, which has no dt, n itself."""
    dt: Tensor
    """sigma' - sigma, negative."""


@dataclass(frozen=True)
class LossStats(SummedStats):
    """What is worth logging of the policy loss."""

    ratio_sum: Tensor
    """Ratios of new to old policy."""
    ratio_max: Tensor
    """Largest ratio."""
    deviation_max: Tensor
    """Largest |ratio - 1|: exactly 0 before the first update."""
    clipped_low_sum: Tensor
    """Samples of negative advantage whose gradient the lower clip took."""
    clipped_high_sum: Tensor
    """Samples of positive advantage whose gradient the upper clip took."""
    log_ratio_sum: Tensor
    """Logarithms of the ratios; their negative mean estimates the KL of old to new."""
    old_kl_sum: Tensor
    """r - 1 - log r, the estimate of the same KL that is never negative (http://joschu.net/blog/kl-approx.html)."""

    def as_metrics(self) -> dict[str, float]:
        """What all losses report, ratios and clips."""
        return super().as_metrics() | {
            "ratio_mean": self.mean(self.ratio_sum),
            "ratio_max": float(self.ratio_max),
            "ratio_deviation_max": float(self.deviation_max),
            "clip_fraction": self.mean(self.clipped_low_sum + self.clipped_high_sum),
            "clip_fraction_low": self.mean(self.clipped_low_sum),
            "clip_fraction_high": self.mean(self.clipped_high_sum),
            "log_ratio_mean": self.mean(self.log_ratio_sum),
            "old_kl": self.mean(self.old_kl_sum),
        }


def grpo_loss(
    new: StepPrediction,
    old: StepPrediction,
    reference: StepPrediction | None,
    advantages: Tensor,
    mask: Tensor,
    noise: StepNoise,
    options: GRPOOptions,
) -> tuple[Tensor, LossStats]:
    """Sums the loss over the samples of a micro-batch.

    Args:
        new: Under the policy that is trained, with gradient.
        old: Under the policy that made the samples; its gradient is stopped.
        reference: Under the reference; its gradient is stopped. None where the options have no KL.
        advantages: float [B].
        mask: bool [B]: samples that count, in the KL term too.
        noise: Of the stored steps.
        options: Form of the loss.

    Returns:
        The sum over the samples of the mask, a scalar with gradient (the caller divides by the number of samples over
        all micro-batches and processes), and the statistics.

    Raises:
        ValueError: If the options need a prediction that is not there, or shapes do not fit.
    """
    check_samples(len(new.log_prob), old.log_prob, advantages, mask, noise.std, noise.coefficient, noise.dt)
    advantages = advantages.to(new.log_prob)
    log_ratio = torch.where(mask, _log_ratio(new, old, noise, options.guard), 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    # PPO, eq. 7, with the sign of a loss: max(-A r, -A clip(r, 1 - low, 1 + high)).
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    if options.guard == "ratio_and_reweight":
        # GRPO-Guard, gradient reweighting: the gradient of mu grows as -dt, which this takes out.
        policy = policy / -noise.dt
    policy_sum = masked_sum(policy, mask)
    kl_sum = masked_sum(kl_divergence(new, reference, noise, options.kl), mask)
    loss = policy_sum + options.kl_weight * kl_sum
    with torch.no_grad():
        stats = LossStats(
            count=mask.sum().to(ratio.dtype),
            loss_sum=loss.detach(),
            policy_sum=policy_sum.detach(),
            kl_sum=kl_sum.detach(),
            ratio_sum=masked_sum(ratio, mask),
            ratio_max=torch.where(mask, ratio, 0.0).amax(),
            deviation_max=(ratio - 1).abs().amax(),
            clipped_low_sum=masked_sum(((ratio < 1 - options.clip_low) & (advantages < 0)).to(ratio.dtype), mask),
            clipped_high_sum=masked_sum(((ratio > 1 + options.clip_high) & (advantages > 0)).to(ratio.dtype), mask),
            log_ratio_sum=log_ratio.sum(),
            old_kl_sum=(log_ratio.expm1() - log_ratio).sum(),
        )
    return loss, stats


def kl_divergence(new: StepPrediction, reference: StepPrediction | None, noise: StepNoise, kl: KL) -> Tensor:
    """How far the policy is from the reference at each sample.

    Args:
        new: Under the policy that is trained.
        reference: Under the reference; its gradient is stopped.
        noise: Of the stored steps.
        kl: Form.

    Returns:
        float [B]; zeros for `none`.

    Raises:
        ValueError: If the form needs a reference and there is none.
    """
    if kl == "none":
        return torch.zeros_like(new.log_prob)
    if reference is None:
        raise ValueError(f"The KL {kl!r} needs the predictions of a reference.")
    if kl == "velocity":
        return _squared_distance(new.velocity, reference.velocity)
    # KL(N(mu, n^2) || N(mu_ref, n^2)) a dimension is (mu - mu_ref)^2 / (2 n^2), n^2 = s^2 (-dt); Flow-GRPO's code
    # leaves out 1 / (-dt) on purpose (https://github.com/yifan123/flow_grpo/issues/22).
    return _squared_distance(new.mean, reference.mean) / (2 * noise.coefficient**2)


def _log_ratio(new: StepPrediction, old: StepPrediction, noise: StepNoise, guard: Guard) -> Tensor:
    difference = new.log_prob - old.log_prob.detach()
    if guard == "off":
        return difference
    # GRPO-Guard, ratio normalisation, for each sample: n [delta log p + mean((mu - mu_old)^2) / (2 n^2)]. With
    # x' = mu_old + n z it equals mean(z (mu - mu_old)): zero mean under the old policy at every step.
    return noise.std * (difference + _squared_distance(new.mean, old.mean) / (2 * noise.std**2))


def _squared_distance(new: Tensor | None, other: Tensor | None) -> Tensor:
    if new is None or other is None:
        raise ValueError("The guard and the KL need means or velocities, which were not given.")
    return sample_mean((new - other.detach()) ** 2)
