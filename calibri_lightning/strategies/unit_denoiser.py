"""The model with a unit's texts and the policy's scales, for roll-outs, replays and references alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration.scales import Rows
from calibri_lightning.sampling.denoiser import Denoiser

if TYPE_CHECKING:
    from calibri_lightning.strategies.base import CalibratedModule
    from calibri_lightning.strategies.groups import Slots


def unit_denoiser(module: CalibratedModule, slots: Slots, unit: range, num_steps: int) -> Denoiser:
    """Prepares the pictures of a unit, with the policy's scales as they are and without gradients.

    Args:
        module: The module that is trained.
        slots: All pictures of the step.
        unit: Those of the unit.
        num_steps: Sampling steps.

    Returns:
        A denoiser; `with_rows` gives it scales with gradients, or those of a reference.
    """
    backbone, layout = module.engine.backbone, module.layout
    prompts = [slots.prompts[slot] for slot in unit]
    guided = any(member.prompt == "negative" for member in layout.members)
    with torch.no_grad():
        return Denoiser(
            backbone,
            module.engine.attachment,
            rows_of(module, module.theta.detach(), len(unit)),
            layout.members,
            backbone.encode([prompt.text for prompt in prompts]),
            backbone.encode([prompt.negative for prompt in prompts], negative=True) if guided else None,
            num_steps,
            all_members=_needs_all(module),
        )


def _needs_all(module: CalibratedModule) -> bool:
    """Whether members must run whose weight is 0 now: it has a gradient, or is none in a reference."""
    layout = module.layout
    if layout.weight_mode == "fixed":
        return False
    vectors = [module.theta.detach().cpu(), torch.from_numpy(module.start_theta), torch.tensor(layout.start)]
    silent = layout.rows(torch.stack(vectors)).weights == 0
    return module.policy.trains_theta or bool((silent != silent[0]).any())


def rows_of(module: CalibratedModule, theta: Tensor | Floats, count: int) -> Rows:
    """Gives the same scales and member weights to all pictures of a unit.

    Args:
        module: The module that is trained.
        theta: Parameters [n]; gradients flow into a tensor that wants them.
        count: Pictures.

    Returns:
        Scales [count, M, sites] and weights [count, M] on the backbone's device.
    """
    vector = theta if isinstance(theta, Tensor) else torch.from_numpy(theta)
    rows = module.layout.rows(vector[None].to(module.engine.backbone.device))
    return Rows(rows.scales.expand(count, -1, -1), rows.weights.expand(count, -1))


def live_rows(module: CalibratedModule, count: int) -> Rows:
    """The policy's own scales, with gradients where they are trained.

    Args:
        module: The module that is trained.
        count: Pictures.

    Returns:
        Rows for one forward and its backward.
    """
    return rows_of(module, module.theta if module.policy.trains_theta else module.theta.detach(), count)
