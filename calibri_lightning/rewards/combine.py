"""Several rewards as one: weighted and added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward, features_checked, measure_checked
from calibri_lightning.rewards.finding import RewardConfig, find_reward


@dataclass(frozen=True)
class Scores:
    """What a batch of pictures scored."""

    total: Tensor
    """Weighted sum, float32 [B]; NaN where a reward of non-zero weight is NaN."""
    each: Mapping[str, Tensor]
    """float32 [B] of every reward and extra metric, in the order of `RewardSet.names`."""


@dataclass(frozen=True)
class Features:
    """What describes a batch of pictures."""

    reward: str
    """The reward whose features they are."""
    values: Tensor
    """float32 [B, F]; see `Reward.features`."""


class RewardSet:
    """A weighted sum of rewards."""

    _options: tuple[Mapping[str, Any], ...]

    def __init__(self, rewards: Mapping[str, float | RewardConfig]) -> None:
        """Finds rewards by name.

        Args:
            rewards: Name to weight, or to weight and options. A name is a built-in one ("shapes", "pickscore",
                "jpeg_compressibility", "jpeg_incompressibility") or an import path "package.module:name" of a
                `Reward` class, a `Reward` or a function (pictures, prompts) -> scores. Weight 0 reports a reward
                without optimising it.

        Raises:
            UserError: If a name cannot be found, a reward does not take its options, or the weights make no sum.
        """
        configs = {name: c if isinstance(c, RewardConfig) else RewardConfig(c) for name, c in rewards.items()}
        self._set([(find_reward(name, config.options), config.weight) for name, config in configs.items()])
        self._options = tuple(config.options for config in configs.values())

    @classmethod
    def of(cls, *weighted: tuple[Reward, float]) -> RewardSet:
        """Joins rewards that exist already.

        Args:
            *weighted: Pairs (reward, weight).

        Returns:
            The set.

        Raises:
            UserError: If the weights make no sum, or two rewards share a name.
        """
        made = cls.__new__(cls)
        made._set(list(weighted))
        return made

    def _set(self, weighted: list[tuple[Reward, float]]) -> None:
        for reward, weight in weighted:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UserError(
                    f"The weight of the reward {reward.name!r} is {weight!r}; it must be a finite number, such as 1.0."
                )
        if not any(weight for _, weight in weighted):
            raise UserError(
                "No reward has a weight other than 0, so there is nothing to optimise. Give one, for "
                "example rewards: {shapes: 1.0}."
            )
        self.weighted = tuple((reward, float(weight)) for reward, weight in weighted)
        self._options = ({},) * len(weighted)
        self.names = tuple(name for reward, _ in weighted for name in (reward.name, *reward.extra_names))
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise UserError(
                f"The name {repeated[0]!r} is reported by two rewards; names must differ. Remove or rename one."
            )

    @property
    def title(self) -> str:
        """What the sum is called: the reward's name where there is one, or the sum written out."""
        parts = [(reward.name, weight) for reward, weight in self.weighted if weight]
        if len(parts) == 1 and parts[0][1] > 0:
            return parts[0][0]
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts)

    @property
    def recipe(self) -> str:
        """All that the sum depends on, in one line: weights, names and options."""
        parts = []
        for (reward, weight), options in zip(self.weighted, self._options, strict=True):
            given = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
            parts.append(f"{weight:g} {reward.name}" + (f" ({given})" if given else ""))
        return ", ".join(parts)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Lets every reward refuse prompts that it cannot score.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If a reward refuses one.
        """
        for reward, _ in self.weighted:
            reward.check(prompts)

    def prepare(self, device: torch.device) -> None:
        """Lets every reward move its model.

        Args:
            device: Where pictures will be.
        """
        for reward, _ in self.weighted:
            reward.prepare(device)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            The scores, on the pictures' device.

        Raises:
            UserError: If a reward raises or does not return one number a picture.
        """
        total = torch.zeros(len(images), device=images.device)
        each: dict[str, Tensor] = {}
        for reward, weight in self.weighted:
            measured = measure_checked(reward, images, prompts)
            # Weight 0 would still spread NaN.
            if weight:
                total = total + weight * measured[reward.name]
            each.update(measured)
        return Scores(total, each)

    def features(self, images: Tensor, prompts: Sequence[Prompt]) -> Features | None:
        """Describes pictures by the first reward that can.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            The features, on the pictures' device; None if no reward has any.

        Raises:
            UserError: If a reward raises or does not return one row a picture.
        """
        for reward, _ in self.weighted:
            values = features_checked(reward, images, prompts)
            if values is not None:
                return Features(reward.name, values)
        return None
