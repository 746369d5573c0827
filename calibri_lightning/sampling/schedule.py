"""Noise levels of flow-matching samplers, as the pipeline's own scheduler computes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


def flow_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, num_image_tokens: int) -> Tensor:
    """Asks a copy of a scheduler for its noise levels; the pipeline's own scheduler keeps its state.

    The scheduler is asked, not imitated: the stock one, for example, applies its shift twice to its last
    levels.

    Args:
        scheduler: The pipeline's scheduler.
        num_steps: Number of sampling steps.
        num_image_tokens: Length of the image sequence, on which a dynamic shift depends.

    Returns:
        float32 [num_steps + 1] on the CPU, ending in 0.

    Raises:
        UserError: If num_steps is below 1.
    """
    check_steps(num_steps)
    own = copy.deepcopy(scheduler)
    mu = dynamic_shift(scheduler, num_image_tokens) if scheduler.config.use_dynamic_shifting else None
    own.set_timesteps(num_steps, device="cpu", mu=mu)
    return own.sigmas


def shifted_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, sigmas: Sequence[float], shift: float) -> Tensor:
    """Asks a copy of a scheduler to shift noise levels that the pipeline chose, as most pipelines have it.

    Args:
        scheduler: The pipeline's scheduler.
        sigmas: Noise level at the start of each step, falling from 1; see `even_sigmas`.
        shift: Resolution-dependent shift mu; ignored by a scheduler whose shift is constant.

    Returns:
        float32 [len(sigmas) + 1] on the CPU, ending in 0.
    """
    own = copy.deepcopy(scheduler)
    own.set_timesteps(sigmas=list(sigmas), device="cpu", mu=shift)
    return own.sigmas


def even_sigmas(num_steps: int) -> list[float]:
    """Noise levels 1, 1 - 1/n, ..., 1/n, which most pipelines hand to their scheduler.

    Args:
        num_steps: Number of sampling steps n.

    Returns:
        The levels.

    Raises:
        UserError: If num_steps is below 1.
    """
    check_steps(num_steps)
    return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]


def check_steps(num_steps: int) -> None:
    """Refuses a sampler without steps.

    Args:
        num_steps: Number of sampling steps.

    Raises:
        UserError: If it is below 1.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; a sampler takes at least one step. Set num_steps to 1 or more.")


def dynamic_shift(scheduler: FlowMatchEulerDiscreteScheduler, num_image_tokens: int) -> float:
    """The resolution-dependent shift mu, linear in the length of the image sequence (SD3 paper, 5.3.2).

    Args:
        scheduler: Gives the two points of the line.
        num_image_tokens: Length of the image sequence.

    Returns:
        mu.
    """
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (num_image_tokens - config.base_image_seq_len))
