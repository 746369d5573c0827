"""Which steps of a sampler are stochastic and trained; the others follow the ODE.

Steps in the first half decide what a picture shows. Few of them make training cheaper (only they are replayed with
gradients) and rewards easier to attribute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from calibri_lightning.errors import UserError

_STREAM_TAG = 0x77696E646F77
"""Sets these random numbers apart from others that a run draws with the same key."""


class Window(ABC):
    """A choice of steps, the same on all ranks and after any resume: a function of seed and training step alone."""

    @abstractmethod
    def steps(self, seed: int, training_step: int, num_steps: int) -> tuple[int, ...]:
        """Chooses the steps of one training step.

        Args:
            seed: Seed of the run.
            training_step: Number of the training step, from 0.
            num_steps: Steps of the sampler.

        Returns:
            Numbers of sampling steps, rising, 0 .. num_steps - 1.

        Raises:
            UserError: If the window does not fit into the steps.
        """

    @abstractmethod
    def check(self, num_steps: int) -> None:
        """Refuses a window that does not fit into the steps; for the start of a run.

        Args:
            num_steps: Steps of the sampler.

        Raises:
            UserError: If some training step would have no steps, or steps outside of the sampler's.
        """


@dataclass(frozen=True)
class AllSteps(Window):
    """All steps, by default without the last one, as published (Flow-GRPO, DanceGRPO).

    In the last step the noise is either so small that rounding shows in the log-probability, or stays in the picture.

    Attributes:
        drop_last: Whether the last step follows the ODE.
    """

    drop_last: bool = True

    def steps(self, seed: int, training_step: int, num_steps: int) -> tuple[int, ...]:
        """Chooses the same steps each time."""
        self.check(num_steps)
        return tuple(range(num_steps - self.drop_last))

    def check(self, num_steps: int) -> None:
        """Refuses a sampler of which nothing is left."""
        if num_steps <= self.drop_last:
            raise UserError(
                f"num_steps is {num_steps}, of which AllSteps(drop_last={self.drop_last}) leaves no step to train. "
                f"Set num_steps to {1 + self.drop_last} or more."
            )


@dataclass(frozen=True)
class _Range(Window):
    """A run of `size` steps somewhere in a range of steps.

    Attributes:
        size: Steps in the window.
        first: First step that the window may hold.
        last: End of the range: the window holds steps below it. By default the last step of the sampler is left out.
    """

    size: int
    first: int = 0
    last: int | None = None

    def check(self, num_steps: int) -> None:
        """Refuses a window that does not fit into its range, or a range outside of the steps."""
        last = self._last(num_steps)
        name = type(self).__name__
        if self.size < 1:
            raise UserError(f"{name} has size {self.size}; at least one step is trained. Set size to 1 or more.")
        if not 0 <= self.first < last <= num_steps:
            raise UserError(
                f"{name} lies in the steps from {self.first} up to, not including, {last}, but the sampler has "
                f"num_steps {num_steps}. The rule is 0 <= first < last <= num_steps, and last is num_steps - 1 where "
                "it is left out. Change first, last or num_steps."
            )
        if self.size > last - self.first:
            raise UserError(
                f"{name} has size {self.size}, but there are {last - self.first} steps from {self.first} up to, not "
                f"including, {last}. Set size to {last - self.first} or less, or widen the range by first and last."
            )

    def _last(self, num_steps: int) -> int:
        return num_steps - 1 if self.last is None else self.last

    def _num_starts(self, num_steps: int) -> int:
        """Places where the window can start."""
        self.check(num_steps)
        return self._last(num_steps) - self.first - self.size + 1

    def _from(self, start: int) -> tuple[int, ...]:
        return tuple(range(self.first + start, self.first + start + self.size))


@dataclass(frozen=True)
class RandomWindow(_Range):
    """A window whose start is drawn anew for each training step, uniformly (Flow-GRPO-Fast)."""

    def steps(self, seed: int, training_step: int, num_steps: int) -> tuple[int, ...]:
        """Draws a window from a generator of its own, keyed by both numbers."""
        key = np.array([seed & (2**64 - 1), training_step], dtype=np.uint64)
        # A raw word: numpy promises the stream of a bit generator across versions, not that of Generator's methods
        # (NEP 19). The remainder's bias is below 2^-58 for any number of steps.
        word = int(np.random.Philox(key=key, counter=[0, 0, 0, _STREAM_TAG]).random_raw())
        return self._from(word % self._num_starts(num_steps))


@dataclass(frozen=True)
class SlidingWindow(_Range):
    """A window that moves from noise towards data, by one step at a time, and begins again (MixGRPO, "progressive").

    Attributes:
        stay: Training steps between two moves.
    """

    stay: int = 25

    def steps(self, seed: int, training_step: int, num_steps: int) -> tuple[int, ...]:
        """The window of a training step; the seed plays no part."""
        num_starts = self._num_starts(num_steps)
        return self._from(training_step // self.stay % num_starts)

    def check(self, num_steps: int) -> None:
        """Refuses a window that does not fit into its range, or that would not stay."""
        super().check(num_steps)
        if self.stay < 1:
            raise UserError(
                f"SlidingWindow has stay {self.stay}; the window stays for at least one training step. Set stay to 1 "
                "or more."
            )
