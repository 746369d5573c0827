"""Guided velocities of a batch of pictures: what the ODE sampler, the roll-out and its replay have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.backbones.conditioning import Conditioning

if TYPE_CHECKING:
    from calibri_lightning.backbones.base import Backbone
    from calibri_lightning.calibration.attach import Attachment
    from calibri_lightning.calibration.scales import Member, Rows


class Denoiser:
    """A model with the scales, weights and texts of B pictures, ready for any step of one schedule.

    Floating-point results change with the composition of a batch. So a roll-out and its replay use denoisers of the
    same pictures in the same order with the same members: one and the same, or another made by `with_rows`.
    """

    rows: Rows
    """Each picture's scales [B, M, sites] and member weights [B, M]."""
    sigmas: Tensor
    """Noise levels, float32 [num_steps + 1] on the device."""
    levels: Tensor
    """The same on the CPU, to be read without waiting for the device."""

    def __init__(
        self,
        backbone: Backbone,
        attachment: Attachment,
        rows: Rows,
        members: Sequence[Member],
        prompts: Conditioning,
        negatives: Conditioning | None,
        num_steps: int,
        all_members: bool = False,
    ) -> None:
        """Puts on the device whatever a step needs, so that no step waits for it.

        Args:
            backbone: The model.
            attachment: Its hooks.
            rows: Each picture's scales [B, M, sites] and member weights [B, M].
            members: Which prompt each of the M members sees.
            prompts: B rows.
            negatives: B rows; None if no member sees the negative prompt.
            num_steps: Number of steps.
            all_members: Whether members run whose weight is 0 for every picture. They add nothing to the velocity, but
                to its gradient by their weight.

        Raises:
            UserError: If the backbone runs its pipeline as a whole and has no velocities to give.
        """
        self.levels = backbone.schedule(num_steps)
        self.sigmas = self.levels.to(backbone.device)
        self.backbone, self.attachment, self.num_steps = backbone, attachment, num_steps
        self.rows = rows
        everyone = list(range(len(members)))
        self._active = everyone if all_members else _active_members(rows.weights, backbone.guides_by_first_member)
        self._conditioning = _spread([members[m] for m in self._active], prompts, negatives)
        self._weights: Tensor | None = None

    def __len__(self) -> int:
        """Number of pictures B."""
        return len(self.rows.weights)

    @property
    def num_rows(self) -> int:
        """Rows of one forward: B x active members."""
        return len(self) * len(self._active)

    def with_rows(self, rows: Rows) -> Denoiser:
        """The same pictures and members with other scales and weights, for example some that require gradients.

        Args:
            rows: Scales [B, M, sites] and weights [B, M].

        Returns:
            A denoiser that shares everything else with this one.
        """
        other = copy.copy(self)
        other.rows, other._weights = rows, None
        return other

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Sets the rows' scales for the forwards and the backwards inside a `with`, and none after it.

        Gradient checkpointing runs the forward again during the backward, with the scales that are set then: `backward`
        belongs inside. The scales and weights of the rows enter the graph once each time; gradients flow into them.

        Yields:
            Nothing.

        Raises:
            RuntimeError: If this denoiser is attached already.
        """
        if self._weights is not None:
            raise RuntimeError("this denoiser is attached already: leaving the inner `with` would unset its scales")
        device = self.backbone.device
        scales = self.rows.scales[:, self._active].flatten(0, 1).to(device, torch.float32)
        with self.attachment.rows(scales):
            self._weights = self.rows.weights[:, self._active].to(device, torch.float32)
            try:
                yield
            finally:
                self._weights = None

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """Guided velocity at the start of a step, in one forward over all rows and members.

        Args:
            x: Latents [B, ...], float32.
            step: Number of the step, 0 .. num_steps - 1.

        Returns:
            float32 [B, ...], with the gradients of scales, weights and parameters where they are enabled.

        Raises:
            RuntimeError: Outside of `attached`.
        """
        return self.velocity_at(x, self.sigmas[step].expand(len(x)))

    def velocity_at(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Guided velocity with a noise level of its own for each picture, for losses that draw them.

        Args:
            x: Latents [B, ...], float32.
            sigma: Noise levels [B], float32 on the device.

        Returns:
            float32 [B, ...], as `velocity`.

        Raises:
            RuntimeError: Outside of `attached`.
        """
        if self._weights is None:
            raise RuntimeError(
                "velocities are asked for outside of `with denoiser.attached()`, where no scales are set"
            )
        batch, count = self._weights.shape
        x_rows, sigma_rows = x.repeat_interleave(count, dim=0), sigma.repeat_interleave(count)
        velocity = self.backbone.velocity(x_rows, sigma_rows, self._conditioning)
        return self.backbone.guide(velocity.unflatten(0, (batch, count)), self._weights)


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
