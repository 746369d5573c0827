"""The noise levels at which finished pictures are trained on: each picture has its own, in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.noise import levels_seed
from calibri_lightning.strategies.checks import check_at_least, check_choice, check_share

Timesteps = Literal["schedule", "uniform"]
"""Where noise levels come from: those of the sampler, or any between 0 and 1."""


@dataclass(frozen=True)
class NoiseLevels:
    """Which noise levels a picture is trained on.

    Both choices are permuted for each picture, as in DiffusionNFT's code (arXiv 2509.16117): neighbours in a batch are
    at different levels.
    """

    timesteps: Timesteps = "schedule"
    """`schedule`: levels at which the sampler's steps start, each at most once for a picture. `uniform`: one drawn from
    each of `num_timesteps` equal parts of the range, which makes every level as likely as any other."""
    num_timesteps: int | None = None
    """Levels J of a picture; None for as many as the schedule has in the range."""
    noisiest: float = 1.0
    """Share of the levels, the noisiest, that are trained on, above 0 and at most 1."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_choice("timesteps", self.timesteps, get_args(Timesteps))
        check_at_least("num_timesteps", self.num_timesteps, 1, "it is a number of noise levels")
        check_share("noisiest", self.noisiest)

    def check(self, num_steps: int) -> None:
        """Checks that the schedule has levels enough.

        Args:
            num_steps: Sampling steps.

        Raises:
            UserError: If it has fewer than are asked for.
        """
        there = self._in_schedule(num_steps)
        if self.timesteps == "schedule" and self.count(num_steps) > there:
            raise UserError(
                f"num_timesteps is {self.num_timesteps}, but a schedule of {num_steps} steps has {there} noise levels "
                f"in its noisiest share of {self.noisiest:g}, and a picture is trained on each at most once. Lower "
                "num_timesteps, raise num_steps or noisiest, or set timesteps: uniform."
            )

    def count(self, num_steps: int) -> int:
        """Levels of a picture.

        Args:
            num_steps: Sampling steps.

        Returns:
            J.
        """
        return self.num_timesteps or self._in_schedule(num_steps)

    def draw(self, sigmas: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draws the levels of pictures, each from a generator of its own: the same in any batch, on any rank.

        Args:
            sigmas: Noise levels of the schedule [num_steps + 1], on the CPU.
            seeds: Seed of each of B pictures.

        Returns:
            float32 [J, B] on the CPU, above 0.
        """
        return torch.stack([self._of_picture(sigmas, seed) for seed in seeds], dim=1)

    def _of_picture(self, sigmas: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(levels_seed(seed))
        num_steps = len(sigmas) - 1
        count = self.count(num_steps)
        if self.timesteps == "schedule":
            return sigmas[torch.randperm(self._in_schedule(num_steps), generator=generator)[:count]]
        parts = torch.randperm(count, generator=generator)
        return 1 - self.noisiest * (parts + torch.rand(count, generator=generator)) / count

    def _in_schedule(self, num_steps: int) -> int:
        return max(1, round(self.noisiest * num_steps))
