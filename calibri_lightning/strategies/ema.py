"""An exponential moving average of trained tensors, with warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.checks import check_at_least


@dataclass(frozen=True)
class EmaOptions:
    """A moving average of what is trained; the defaults are Flow-GRPO's.

    Attributes:
        decay: Share of itself that the average keeps, in 0..1 (1 excluded).
        interval: Optimiser steps from one averaging to the next.
        warmup: Whether the first averagings keep less: (1 + n) / (10 + n) after n optimiser steps.
    """

    decay: float = 0.9
    interval: int = 8
    warmup: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        self.build()

    def build(self) -> Ema:
        """Makes an average that has not started.

        Returns:
            The average.
        """
        return Ema(self.decay, self.interval, self.warmup)


class EmaState(TypedDict):
    """What a checkpoint keeps of an average: loadable with `weights_only=True`."""

    num_updates: int
    averages: dict[str, Tensor]


class Ema:
    """Averages e of named tensors: every `interval` optimiser steps e <- d e + (1 - d) x.

    The warm-up d = min(decay, (1 + n) / (10 + n)), n = optimiser steps so far, is that of TensorFlow's
    ExponentialMovingAverage; decay 0.9 every 8 steps are Flow-GRPO's. n counts optimiser steps, so `update` is called
    once after each, not after each micro-batch.

    Args:
        decay: Share of itself that the average keeps, in 0..1 (1 excluded).
        interval: Optimiser steps from one averaging to the next.
        warmup: Whether the first averagings keep less.

    Raises:
        UserError: If a value is out of range.
    """

    def __init__(self, decay: float = 0.9, interval: int = 8, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(
                f"decay is {decay}; it is the share of itself that an average keeps, so it must be at least 0 and "
                "below 1. Set decay accordingly, for example 0.9."
            )
        check_at_least("interval", interval, 1, "it is a number of optimiser steps")
        self.decay, self.interval, self.warmup = decay, interval, warmup
        self._num_updates = 0
        self._averages: dict[str, Tensor] = {}

    @property
    def num_updates(self) -> int:
        """Optimiser steps so far."""
        return self._num_updates

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """The averages by name, float32 (float64 where the tensor is); `update` changes them in place."""
        return self._averages

    def start(self, current: Mapping[str, Tensor]) -> None:
        """Starts over: the averages are the present values.

        Args:
            current: Tensors by name; they are copied.
        """
        self._num_updates = 0
        self._averages = {name: _wide(tensor).clone() for name, tensor in current.items()}

    def decay_at(self, num_updates: int) -> float:
        """What the average keeps of itself at an optimiser step.

        Args:
            num_updates: Optimiser steps so far, this one included.

        Returns:
            d, in 0..1.
        """
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    def update(self, current: Mapping[str, Tensor]) -> None:
        """Counts an optimiser step, and averages if it is a multiple of the interval.

        Args:
            current: Tensors by name, as they are after the step.

        Raises:
            ValueError: If the names are not those of `start`.
        """
        self._num_updates += 1
        if self._num_updates % self.interval == 0:
            blend_into(self._averages, current, self.decay_at(self._num_updates))

    def state_dict(self) -> EmaState:
        """A copy of the averages and of the count.

        Returns:
            Tensors and whole numbers alone.
        """
        return {
            "num_updates": self._num_updates,
            "averages": {name: tensor.clone() for name, tensor in self._averages.items()},
        }

    def load_state_dict(self, state: EmaState) -> None:
        """Goes on from a saved state, bit for bit.

        Args:
            state: Of `state_dict`, on any device; where the average was started, it stays on its own device.

        Raises:
            ValueError: If the average was started with other names or shapes.
        """
        saved = state["averages"]
        if self._averages:
            _check_same(self._averages, saved)
        self._averages = {
            name: tensor.to(self._averages[name].device if name in self._averages else tensor.device, copy=True)
            for name, tensor in saved.items()
        }
        self._num_updates = state["num_updates"]


def blend_into(averages: Mapping[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """Moves averages towards the present values, in place: e <- decay e + (1 - decay) x.

    Args:
        averages: Tensors by name, which change.
        current: Tensors by name, of any dtype and device.
        decay: Share that is kept; 0 copies the present values.

    Raises:
        ValueError: If names or shapes differ.
    """
    _check_same(averages, current)
    with torch.no_grad():
        for name, average in averages.items():
            average.lerp_(current[name].detach().to(average), 1 - decay)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    others = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    if shapes != others:
        different = sorted(name for name in shapes | others if shapes.get(name) != others.get(name))
        raise ValueError(f"The averages are of other tensors: {', '.join(different[:5])} differ in name or shape.")
