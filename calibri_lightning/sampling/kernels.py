"""Steps of a sampler: pure functions of latents, velocity and neighbouring noise levels.

sigma runs from 1 (noise) to 0 (data), dt = sigma_next - sigma < 0, and v = noise - data. Everything is computed in the
type of the latents, float32 in a run: bfloat16 would swallow the differences that a log-probability is made of.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calibri_lightning.errors import UserError


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Explicit Euler step of the probability-flow ODE dx / d sigma = v.

    Args:
        x: Latents [B, ...] at sigma, float32.
        velocity: Predicted velocity, shaped as x.
        sigma: Present noise level, a scalar tensor on the same device.
        sigma_next: Next, smaller noise level.

    Returns:
        Latents at sigma_next.
    """
    return x + (sigma_next - sigma) * velocity


class Transition(NamedTuple):
    """The distribution of the next latents: normal, with independent dimensions."""

    mean: Tensor
    """[B, ...]."""
    std: Tensor
    """Standard deviation of the noise that a step really adds, a scalar or broadcast over the mean."""


class Kernel(ABC):
    """A stochastic step: where it leads on the average, how much noise it adds, and how likely an outcome is."""

    noise_level: float

    @abstractmethod
    def std(self, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor) -> Tensor:
        """Standard deviation of the noise that a step adds.

        Args:
            sigma: Present noise level.
            sigma_next: Next, smaller noise level.
            sigma_second: Second level of the schedule, which stands in where a formula is singular at sigma 1.

        Returns:
            The standard deviation, shaped as sigma; 0 for a step that adds none.
        """

    def coefficient(self, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor) -> Tensor:
        """What the KL between means is measured against: s(sigma) of an SDE, otherwise the noise of the step.

        Args:
            sigma: Present noise level.
            sigma_next: Next, smaller noise level.
            sigma_second: Second level of the schedule.

        Returns:
            The coefficient, shaped as sigma.
        """
        return self.std(sigma, sigma_next, sigma_second)

    @abstractmethod
    def transition(
        self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor
    ) -> Transition:
        """The distribution of the latents at sigma_next.

        Args:
            x: Latents [B, ...] at sigma, float32.
            velocity: Predicted velocity, shaped as x.
            sigma: Present noise level, a scalar tensor on the same device.
            sigma_next: Next, smaller noise level.
            sigma_second: Second level of the schedule.

        Returns:
            Its mean and standard deviation.
        """

    @abstractmethod
    def log_prob(self, x_next: Tensor, transition: Transition) -> Tensor:
        """How likely an outcome is, averaged over its dimensions.

        The average, not the sum, is what the published clip ranges refer to: the ratio of two policies is the D-th root
        of the true one, for latents of D dimensions.

        Args:
            x_next: Latents [B, ...] at the end of the step.
            transition: Their distribution.

        Returns:
            [B].
        """


class _ReverseSDE(Kernel):
    """Euler-Maruyama step of the SDE with the marginals of the flow (Flow-GRPO, arXiv 2505.05470, from ODE to SDE).

    dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt + s dw, for any s(sigma): those of Flow-GRPO and DanceGRPO differ
    in s alone.
    """

    @abstractmethod
    def _diffusion(self, sigma: Tensor, sigma_second: Tensor) -> Tensor:
        """s(sigma)."""

    def std(self, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor) -> Tensor:
        """Standard deviation of the noise that a step adds: s sqrt(-dt)."""
        return self._diffusion(sigma, sigma_second) * (sigma - sigma_next).sqrt()

    def transition(
        self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor
    ) -> Transition:
        """The distribution of the latents at sigma_next."""
        dt = sigma_next - sigma
        # s^2 dt / (2 sigma): the score of the marginal, -(x + (1 - sigma) v) / sigma, undoes what the noise spreads.
        pull = self._diffusion(sigma, sigma_second).square() * dt / (2 * sigma)
        mean = x * (1 + pull) + velocity * (dt + pull * (1 - sigma))
        return Transition(mean, self.std(sigma, sigma_next, sigma_second))

    def coefficient(self, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor) -> Tensor:
        """The SDE's own s(sigma), without the length of the step."""
        return self._diffusion(sigma, sigma_second)

    def log_prob(self, x_next: Tensor, transition: Transition) -> Tensor:
        """Logarithm of the normal density, averaged over all dimensions but the first."""
        mean, std = transition
        density = -((x_next - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
        return density.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class FlowSDE(_ReverseSDE):
    """The SDE of Flow-GRPO: s = a sqrt(sigma / (1 - sigma)) (arXiv 2505.05470).

    At sigma = 1, where s is infinite, the 1 - sigma below the fraction is that of the second level of the schedule, as
    in the published code.

    Attributes:
        noise_level: a, above 0.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        """Refuses a level that gives no probabilities."""
        _check_noise_level(self)

    def _diffusion(self, sigma: Tensor, sigma_second: Tensor) -> Tensor:
        # Chosen by `where`: comparing in Python would wait for the device.
        below = torch.where(sigma == 1, sigma_second, sigma)
        return self.noise_level * (sigma / (1 - below)).sqrt()


@dataclass(frozen=True)
class DanceSDE(_ReverseSDE):
    """The SDE of DanceGRPO: s is a constant eta (arXiv 2505.07818).

    Attributes:
        noise_level: eta, above 0.
    """

    noise_level: float = 0.3

    def __post_init__(self) -> None:
        """Refuses a level that gives no probabilities."""
        _check_noise_level(self)

    def _diffusion(self, sigma: Tensor, sigma_second: Tensor) -> Tensor:
        return torch.full_like(sigma, self.noise_level)


@dataclass(frozen=True)
class CPS(Kernel):
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): signal and noise keep the schedule's amounts.

    x' = (1 - sigma') x0 + sigma' (cos(a pi / 2) x1 + sin(a pi / 2) noise), with x0 = x - sigma v and
    x1 = x + (1 - sigma) v the predicted data and noise. The noise of a step does not shrink with its length, so many
    such steps do not converge to the data's distribution: use it in a window.

    Attributes:
        noise_level: a, above 0 and at most 1; at 1 all noise is new.
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        """Refuses a level that gives no probabilities, or more noise than the schedule has."""
        _check_noise_level(self)
        if self.noise_level > 1:
            raise UserError(
                f"noise_level of CPS is {self.noise_level:g}. It is the share of a quarter turn from old to new noise, "
                "above 0 and at most 1. Set noise_level to 0.8, the published value, or below 1."
            )

    def std(self, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor) -> Tensor:
        """Standard deviation of the noise that a step adds: sigma' sin(a pi / 2), 0 at the end of the schedule."""
        return sigma_next * math.sin(self.noise_level * math.pi / 2)

    def transition(
        self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor
    ) -> Transition:
        """The distribution of the latents at sigma_next."""
        data, noise = x - sigma * velocity, x + (1 - sigma) * velocity
        kept = sigma_next * math.cos(self.noise_level * math.pi / 2)
        return Transition((1 - sigma_next) * data + kept * noise, self.std(sigma, sigma_next, sigma_second))

    def log_prob(self, x_next: Tensor, transition: Transition) -> Tensor:
        """-mean (x' - mu)^2, as published: the density's logarithm without its 1 / (2 std^2) and its constant.

        The published clip ranges belong to this form. Dividing by 2 std^2 would weigh late steps, whose noise is small,
        far more than they do.
        """
        return -(x_next - transition.mean).square().flatten(1).mean(dim=1)


def _check_noise_level(kernel: Kernel) -> None:
    level = kernel.noise_level
    if not (math.isfinite(level) and level > 0):
        raise UserError(
            f"noise_level of {type(kernel).__name__} is {level:g}. Without noise a step has one outcome and no "
            "log-probability to learn from; the rule is a number above 0. Leave noise_level out for the published one."
        )
