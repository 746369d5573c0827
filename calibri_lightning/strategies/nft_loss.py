"""The loss of DiffusionNFT on noised pictures (torch).

A sample is one noise level t of one picture: x_t = (1 - t) x0 + t noise, with velocity v = noise - x0, so that
x0 = x_t - t v. No log-probability is needed: a good picture pulls the policy towards itself, a bad one pushes it away.

Source: DiffusionNFT (arXiv 2509.16117), and its code (adaptive weights, schedules).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibri_lightning.strategies.checks import check_at_least, check_between, check_positive
from calibri_lightning.strategies.loss_stats import SummedStats, check_samples, masked_sum, sample_mean

_LEAST_ERROR = 1e-5
"""Floor of the errors that adaptive weights divide by, as in the published code."""


@dataclass(frozen=True)
class NFTOptions:
    """Form of the loss."""

    beta: float = 1.0
    """Length of the step from the old policy that is judged: v+- = v_old +- beta (v - v_old). Smaller is bolder."""
    advantage_max: float = 5.0
    """Advantages are cut to plus and minus this and mapped to 0..1; also the weight of the policy term."""
    kl_weight: float = 1e-4
    """Weight of mean((v - v_ref)^2)."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_positive("beta", self.beta)
        check_positive("advantage_max", self.advantage_max)
        check_at_least("kl_weight", self.kl_weight, 0, "a negative weight would push the policy from its reference")


@dataclass(frozen=True)
class OldPolicyDecay:
    """Share eta of itself that the old policy keeps: old <- eta old + (1 - eta) new, after each step.

    The defaults are those of DiffusionNFT's code; its other schedule is flat_steps 75, slope 0.0075, maximum 0.999.
    """

    start: float = 0.0
    """Share at first; 0 makes the old policy the last one."""
    slope: float = 0.001
    """Growth a step."""
    maximum: float = 0.5
    """Where it ends."""
    flat_steps: int = 0
    """Steps before it grows."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_between("start", self.start, 0, 1, "it is a share")
        check_at_least("slope", self.slope, 0, "the old policy follows ever more slowly")
        check_between("maximum", self.maximum, self.start, 1, "it is a share that grows from start")
        check_at_least("flat_steps", self.flat_steps, 0, "it counts steps")

    def at(self, step: int) -> float:
        """The share after a step.

        Args:
            step: Training steps that are done.

        Returns:
            eta, in 0..1.
        """
        return min(self.start + self.slope * max(step - self.flat_steps, 0), self.maximum)


@dataclass(frozen=True)
class NoisedPictures:
    """Pictures of the old policy, noised again."""

    x0: Tensor
    """Clean latents [B, ...]."""
    x_t: Tensor
    """(1 - t) x0 + t noise, shaped as x0."""
    t: Tensor
    """Noise level in 0..1: a scalar or [B]."""


@dataclass(frozen=True)
class Velocities:
    """What the policies predict for the noised pictures, each [B, ...]."""

    new: Tensor
    """Of the policy that is trained, with gradient."""
    old: Tensor
    """Of the policy that made the pictures; its gradient is stopped."""
    reference: Tensor | None = None
    """Of the reference; its gradient is stopped. Needed where the KL has a weight."""


@dataclass(frozen=True)
class NFTStats(SummedStats):
    """What is worth logging of the loss."""

    positive_sum: Tensor
    """Adaptively weighted errors of the positive policy."""
    negative_sum: Tensor
    """The same of the negative policy."""
    weight_sum: Tensor
    """Optimality probabilities w."""
    old_distance_sum: Tensor
    """mean((v - v_old)^2): how far the policy has moved since it made the pictures."""
    old_distance_max: Tensor
    """The largest of these."""

    def as_metrics(self) -> dict[str, float]:
        """What all losses report, errors and distances."""
        return super().as_metrics() | {
            "positive_error": self.mean(self.positive_sum),
            "negative_error": self.mean(self.negative_sum),
            "weight_mean": self.mean(self.weight_sum),
            "old_distance": self.mean(self.old_distance_sum),
            "old_distance_max": float(self.old_distance_max),
        }


def nft_weights(advantages: Tensor, advantage_max: float) -> Tensor:
    """Maps advantages to optimality probabilities.

    Args:
        advantages: Of any shape.
        advantage_max: Where they are cut.

    Returns:
        w = clip(A / A_max, -1, 1) / 2 + 1/2, in 0..1, of the same shape.
    """
    return (advantages / advantage_max).clamp(-1, 1) / 2 + 0.5


def nft_loss(
    velocities: Velocities, pictures: NoisedPictures, advantages: Tensor, mask: Tensor, options: NFTOptions
) -> tuple[Tensor, NFTStats]:
    """Sums the loss over the samples of a micro-batch.

    Args:
        velocities: Predictions of the policies.
        pictures: What they were made for.
        advantages: float [B].
        mask: bool [B]: samples that count, in the KL term too.
        options: Form of the loss.

    Returns:
        The sum over the samples of the mask, a scalar with gradient (the caller divides by the number of samples over
        all micro-batches and processes), and the statistics.

    Raises:
        ValueError: If the KL has a weight and there is no reference, or shapes do not fit.
    """
    check_samples(len(velocities.new), advantages, mask, pictures.t)
    new, old, beta = velocities.new, velocities.old.detach(), options.beta
    weights = nft_weights(advantages.to(new), options.advantage_max)
    # DiffusionNFT, implicit policies: v+ = beta v + (1 - beta) v_old, v- = (1 + beta) v_old - beta v. Written as a step
    # from v_old, both are v_old to the bit where v is.
    step = beta * (new - old)
    positive = _adaptive_error(old + step, pictures)
    negative = _adaptive_error(old - step, pictures)
    # DiffusionNFT's code: A_max [w l+ / beta + (1 - w) l- / beta]. At v = v_old its gradient is A (cut) times that of
    # v's own error, whatever beta is.
    policy = options.advantage_max * (weights * positive + (1 - weights) * negative) / beta
    distance = torch.zeros_like(weights)
    if velocities.reference is not None:
        distance = sample_mean((new - velocities.reference.detach()) ** 2)
    elif options.kl_weight:
        raise ValueError("The KL has a weight, so it needs the velocities of a reference.")
    policy_sum, kl_sum = masked_sum(policy, mask), masked_sum(distance, mask)
    loss = policy_sum + options.kl_weight * kl_sum
    with torch.no_grad():
        moved = torch.where(mask, sample_mean((new - old) ** 2), 0.0)
        stats = NFTStats(
            count=mask.sum().to(weights.dtype),
            loss_sum=loss.detach(),
            policy_sum=policy_sum.detach(),
            kl_sum=kl_sum.detach(),
            positive_sum=masked_sum(positive, mask),
            negative_sum=masked_sum(negative, mask),
            weight_sum=masked_sum(weights, mask),
            old_distance_sum=moved.sum(),
            old_distance_max=moved.amax(),
        )
    return loss, stats


def _adaptive_error(velocity: Tensor, pictures: NoisedPictures) -> Tensor:
    """Error [B] of the predicted picture: mean(e^2) / stop_gradient(mean |e|), e = x_t - t v - x0."""
    t = pictures.t.to(velocity)
    error = pictures.x_t - t.reshape(-1, *(1,) * (velocity.ndim - 1)) * velocity - pictures.x0
    return sample_mean(error**2) / sample_mean(error.detach().abs()).clamp(min=_LEAST_ERROR)
