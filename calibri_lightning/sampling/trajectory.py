"""Stochastic roll-outs, and the same steps once more with gradients.

A roll-out keeps the latents exactly as the network sees them (float32, which the backbone rounds to its type in every
forward alike), and takes the log-probability of exactly the next latents that it keeps. So a replay of unchanged
weights, on the same batch, gives the same bits: every ratio of probabilities before the first update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.kernels import Kernel, Transition, euler_step
from calibri_lightning.sampling.noise import step_noise_seed


@dataclass(frozen=True)
class Trajectory:
    """What a roll-out of B pictures keeps of its W stochastic steps."""

    steps: tuple[int, ...]
    """Numbers of the stochastic steps, rising."""
    x: Tensor
    """Latents before each of them, float32 [W, B, ...]."""
    x_next: Tensor
    """Latents after each of them, [W, B, ...]."""
    log_probs: Tensor
    """Log-probability of x_next under the weights that sampled, float32 [W, B] on the device."""
    means: Tensor | None
    """Means of the transitions [W, B, ...], where they were asked for."""
    latents: Tensor
    """Latents at sigma 0, [B, ...] on the device."""
    num_forwards: int
    """Transformer forwards, counted in rows: B x active members x steps."""


@dataclass(frozen=True)
class Replay:
    """One step of a trajectory under the present weights."""

    log_prob: Tensor
    """Log-probability of the trajectory's x_next, float32 [B]."""
    mean: Tensor
    """Mean of the transition [B, ...]."""
    std: Tensor
    """Standard deviation of the noise of the step, a scalar without gradient."""
    velocity: Tensor
    """Guided velocity [B, ...]."""


@torch.no_grad()
def roll_out(
    denoiser: Denoiser,
    noise: Tensor,
    kernel: Kernel,
    steps: Sequence[int],
    seeds: Sequence[int],
    *,
    keep_means: bool = False,
    offload: bool = False,
) -> Trajectory:
    """Samples pictures with noise in some steps, and Euler steps of the ODE elsewhere.

    Args:
        denoiser: The model and its B pictures; not attached.
        noise: Initial latents [B, ...], float32.
        kernel: The stochastic step.
        steps: Which steps are stochastic, rising; see `sampling.windows`. None for the ODE sampler.
        seeds: Seed of each picture. The noise of a step is drawn, row by row, from `step_noise_seed` of it.
        keep_means: Whether to keep the means of the transitions, which GRPO-Guard needs.
        offload: Whether to keep latents and means on the CPU until they are replayed; no bit depends on it.

    Returns:
        The trajectory.

    Raises:
        UserError: If a step is outside of the sampler's, or adds no noise.
    """
    _check(denoiser, kernel, steps)
    kept: list[tuple[Tensor, ...]] = []
    log_probs: list[Tensor] = []
    # Drawn before the first step: a copy to the device between steps would wait for them.
    draws = {step: denoiser.backbone.noise([step_noise_seed(seed, step) for seed in seeds]) for step in steps}
    x = noise
    with denoiser.attached():
        for step in range(denoiser.num_steps):
            velocity = denoiser.velocity(x, step)
            if step not in draws:
                x = euler_step(x, velocity, denoiser.sigmas[step], denoiser.sigmas[step + 1])
                continue
            transition = _transition(denoiser, kernel, x, velocity, step)
            x_next = transition.mean + transition.std * draws.pop(step)
            log_probs.append(kernel.log_prob(x_next, transition))
            parts = (x, x_next, transition.mean) if keep_means else (x, x_next)
            kept.append(tuple(part.cpu() for part in parts) if offload else parts)
            x = x_next
    stacks = [_stack([parts[i] for parts in kept], x, offload) for i in range(2 + keep_means)]
    return Trajectory(
        tuple(steps),
        stacks[0],
        stacks[1],
        torch.stack(log_probs) if log_probs else x.new_empty(0, len(x)),
        stacks[2] if keep_means else None,
        x,
        denoiser.num_rows * denoiser.num_steps,
    )


def replay(denoiser: Denoiser, trajectory: Trajectory, index: int, kernel: Kernel) -> Replay:
    """Takes one step of a trajectory again, to where it led, under the present weights.

    Gradients flow into the denoiser's scales and weights and into the network's parameters, where they are enabled.
    Call this and `backward` inside of `with denoiser.attached()`.

    Args:
        denoiser: That of the roll-out, or `denoiser.with_rows`: the same pictures in the same order.
        trajectory: What `roll_out` returned.
        index: Which of its W steps, 0 .. W - 1.
        kernel: That of the roll-out.

    Returns:
        The log-probability and what it was made of.
    """
    step, device = trajectory.steps[index], denoiser.sigmas.device
    x, x_next = (part[index].to(device) for part in (trajectory.x, trajectory.x_next))
    velocity = denoiser.velocity(x, step)
    transition = _transition(denoiser, kernel, x, velocity, step)
    return Replay(kernel.log_prob(x_next, transition), transition.mean, transition.std, velocity)


def _transition(denoiser: Denoiser, kernel: Kernel, x: Tensor, velocity: Tensor, step: int) -> Transition:
    sigmas = denoiser.sigmas
    return kernel.transition(x, velocity, sigmas[step], sigmas[step + 1], sigmas[1])


def _check(denoiser: Denoiser, kernel: Kernel, steps: Sequence[int]) -> None:
    """Refuses steps that have no log-probability; reads the levels on the CPU alone."""
    levels, num_steps = denoiser.levels, denoiser.num_steps
    rising = all(one < other for one, other in pairwise(steps))
    if not rising or any(not 0 <= step < num_steps for step in steps):
        raise UserError(
            f"The stochastic steps are {tuple(steps)}, but num_steps is {num_steps}. They must rise and lie in "
            f"0 .. {num_steps - 1}. Change the window or num_steps."
        )
    for step in steps:
        if not kernel.std(levels[step], levels[step + 1], levels[1]) > 0:
            raise UserError(
                f"{type(kernel).__name__} adds no noise in step {step} of {num_steps}, from sigma {levels[step]:g} to "
                f"{levels[step + 1]:g}, so its outcome has no log-probability. End the window before this step."
            )


def _stack(parts: Sequence[Tensor], like: Tensor, offload: bool) -> Tensor:
    """[W, B, ...], also where W is 0."""
    return torch.stack(list(parts)) if parts else like.new_empty(0, *like.shape, device="cpu" if offload else None)
