"""The sampler: from noise to latents, with every member and candidate in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.sampling.kernels import euler_step

if TYPE_CHECKING:
    from calibri_lightning.backbones.base import Backbone
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
    active = _active_members(rows.weights, backbone.guides_by_first_member)
    scales = rows.scales[:, active].flatten(0, 1).to(backbone.device, torch.float32)
    weights = rows.weights[:, active].to(backbone.device, torch.float32)
    conditioning = _spread([members[m] for m in active], prompts, negatives)
    sigmas = backbone.schedule(num_steps).to(backbone.device)
    batch, count, x = len(noise), len(active), noise
    with attachment.rows(scales):
        for step in range(num_steps):
            x_rows = x.repeat_interleave(count, dim=0)
            velocity = backbone.velocity(x_rows, sigmas[step].expand(batch * count), conditioning)
            guided = backbone.guide(velocity.unflatten(0, (batch, count)), weights)
            x = euler_step(x, guided, sigmas[step], sigmas[step + 1])
    return Samples(x, batch * count * num_steps)


def _active_members(weights: Tensor, keep_first: bool) -> list[int]:
    """Members that count for some picture; one whose weight is 0 for all adds nothing and is not run."""
    active = torch.nonzero((weights != 0).any(dim=0)).flatten().tolist()
    return [0, *(member for member in active if member)] if keep_first or not active else active


def _spread(members: Sequence[Member], prompts: Conditioning, negatives: Conditioning | None) -> Conditioning:
    """The conditioning of each (picture, member) row, picture-major."""
    batch = len(prompts)
    both = prompts if negatives is None else Conditioning.cat([prompts, negatives])
    offsets = torch.tensor([0 if member.prompt == "prompt" else batch for member in members])
    return both.take((torch.arange(batch)[:, None] + offsets).flatten())
