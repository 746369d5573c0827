"""The pictures of one training step of a policy: prompt groups, and the units in which they are made and trained on.

A slot is one picture: slots are prompt-major, the G pictures of the first prompt before those of the second. A group is
known by its place in the batch, so that a prompt which is drawn twice makes two groups. Units have a fixed composition,
whatever the number of ranks; a unit is rolled out and replayed as one batch, because the last bits of a forward change
with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibri_lightning.sampling.noise import noise_seed

if TYPE_CHECKING:
    from calibri_lightning.prompts import Prompt, PromptBatch


@dataclass(frozen=True)
class Slots:
    """The pictures of one step."""

    prompts: tuple[Prompt, ...]
    """Prompt of each of the S = P x G pictures."""
    seeds: tuple[int, ...]
    """Seed of each picture: of its initial noise and of the noise of its steps."""
    group_size: int
    """Pictures G of a prompt."""

    @classmethod
    def of(cls, batch: PromptBatch, group_size: int, seed: int) -> Slots:
        """Gives each prompt of a batch its pictures.

        Args:
            batch: The prompts.
            group_size: Pictures of a prompt.
            seed: Seed of the run.

        Returns:
            The slots.
        """
        prompts, seeds = [], []
        for prompt, occurrence in zip(batch.prompts, batch.occurrences, strict=True):
            for sample in range(group_size):
                prompts.append(prompt)
                # A prompt that occurs twice in a step gets other pictures the second time.
                seeds.append(noise_seed(seed, batch.step, prompt.index, occurrence * group_size + sample))
        return cls(tuple(prompts), tuple(seeds), group_size)

    @property
    def num_groups(self) -> int:
        """Prompt groups P."""
        return len(self.prompts) // self.group_size

    def units(self, size: int) -> tuple[range, ...]:
        """Cuts the slots into units.

        Args:
            size: Pictures of a unit; the last one may be smaller.

        Returns:
            The slots of each unit.
        """
        count = len(self.prompts)
        return tuple(range(first, min(first + size, count)) for first in range(0, count, size))


def parts(units: Sequence[range], count: int) -> list[list[int]]:
    """Cuts the units of a step into those of each optimiser step, in order and as evenly as they go.

    Args:
        units: The units.
        count: Optimiser steps.

    Returns:
        Numbers of the units of each optimiser step; none is empty where there are units enough.
    """
    bounds = [len(units) * number // count for number in range(count + 1)]
    return [list(range(first, last)) for first, last in zip(bounds, bounds[1:], strict=False)]
