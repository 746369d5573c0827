"""The deterministic sampler: from noise to latents, with every member and candidate in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.kernels import euler_step

if TYPE_CHECKING:
    from calibri_lightning.backbones.base import Backbone
    from calibri_lightning.backbones.conditioning import Conditioning
    from calibri_lightning.calibration.attach import Attachment
    from calibri_lightning.calibration.scales import Member, Rows


@dataclass(frozen=True)
class Samples:
    """What a sampler made, and what it cost."""

    latents: Tensor
    """float32 [B, ...]."""
    num_forwards: int
    """Transformer forwards, counted in rows: B x active members x steps."""


@torch.no_grad()
def sample(
    backbone: Backbone,
    attachment: Attachment,
    rows: Rows,
    members: Sequence[Member],
    prompts: Conditioning,
    negatives: Conditioning | None,
    noise: Tensor,
    num_steps: int,
) -> Samples:
    """Integrates the probability-flow ODE; each step is one forward over all rows and members.

    Everything that a step needs is on the device before the first one, so no step waits for the device.

    Args:
        backbone: The model.
        attachment: Its hooks.
        rows: Each picture's scales [B, M, sites] and member weights [B, M].
        members: Which prompt each of the M members sees.
        prompts: B rows.
        negatives: B rows; None if no member sees the negative prompt.
        noise: Initial latents [B, ...], float32.
        num_steps: Number of steps.

    Returns:
        The latents at sigma 0.
    """
    return integrate(Denoiser(backbone, attachment, rows, members, prompts, negatives, num_steps), noise)


@torch.no_grad()
def integrate(denoiser: Denoiser, noise: Tensor) -> Samples:
    """Integrates the probability-flow ODE by Euler steps.

    Args:
        denoiser: The model and its B pictures; not attached.
        noise: Initial latents [B, ...], float32.

    Returns:
        The latents at sigma 0.
    """
    sigmas, x = denoiser.sigmas, noise
    with denoiser.attached():
        for step in range(denoiser.num_steps):
            x = euler_step(x, denoiser.velocity(x, step), sigmas[step], sigmas[step + 1])
    return Samples(x, denoiser.num_rows * denoiser.num_steps)
