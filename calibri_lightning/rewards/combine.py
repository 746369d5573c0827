"""Several rewards as one: those that are optimised, weighted and added, and those that are held out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    """float32 [B] of every reward and extra metric, in the order of `RewardSet.names`; NaN for those held out that were
    not asked for."""


@dataclass(frozen=True)
class Features:
    """What describes a batch of pictures."""

    reward: str
    """The reward whose features they are."""
    values: Tensor
    """float32 [B, F]; see `Reward.features`."""


@dataclass(frozen=True)
class Entry:
    """A reward of a set, and the part it plays."""

    reward: Reward
    """What scores."""
    config: RewardConfig
    """Weight, limits and options."""
    held_out: bool
    """Whether it is measured in validation and test alone."""
    turn: threading.Semaphore
    """Lets as many threads in as the reward can serve."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name and those of its extra metrics."""
        return (self.reward.name, *self.reward.extra_names)


class RewardSet:
    """Rewards that are optimised as a weighted sum, and rewards that are only watched."""

    def __init__(
        self,
        rewards: Mapping[str, float | RewardConfig],
        held_out: Mapping[str, RewardConfig | None] | Iterable[str] = (),
    ) -> None:
        """Finds rewards by name.

        Args:
            rewards: Name to weight, or to weight and options. A name is a built-in one ("shapes", "pickscore",
                "jpeg_compressibility", "jpeg_incompressibility") or an import path "package.module:name" of a
                `Reward` class, a `Reward` or a function (pictures, prompts) -> scores. Weight 0 reports a reward
                without optimising it.
            held_out: Names, or names with options, of rewards that validation and test measure besides. Nothing is
                optimised or chosen by them.

        Raises:
            UserError: If a name cannot be found, a reward does not take its options, or the weights make no sum.
        """
        configs = {name: c if isinstance(c, RewardConfig) else RewardConfig(c) for name, c in rewards.items()}
        self._set([_entry(name, config) for name, config in configs.items()] + held_out_entries(held_out))

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
        made._set([_entry_of(reward, RewardConfig(weight)) for reward, weight in weighted])
        return made

    def _set(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.config.check(entry.reward.name)
        if not any(entry.config.weight for entry in entries if not entry.held_out):
            raise UserError(
                "No reward has a weight other than 0, so there is nothing to optimise. Give one, for "
                "example rewards: {shapes: 1.0}."
            )
        self.entries = tuple(entries)
        self.names = tuple(name for entry in entries for name in entry.names)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise UserError(
                f"The name {repeated[0]!r} is reported by two rewards; names must differ. Remove or rename one."
            )

    @property
    def optimised(self) -> tuple[Entry, ...]:
        """Those of which the sum is made."""
        return tuple(entry for entry in self.entries if not entry.held_out and entry.config.weight)

    @property
    def watched(self) -> tuple[Entry, ...]:
        """Those that play no part in the sum: held out, or of weight 0."""
        return tuple(entry for entry in self.entries if entry.held_out or not entry.config.weight)

    @property
    def held_out_names(self) -> tuple[str, ...]:
        """What validation and test alone report."""
        return tuple(name for entry in self.entries if entry.held_out for name in entry.names)

    @property
    def concurrency(self) -> int:
        """Batches worth scoring at the same time."""
        return max(entry.reward.concurrency for entry in self.entries)

    @property
    def title(self) -> str:
        """What the sum is called: the reward's name where there is one, or the sum written out."""
        parts = [(entry.reward.name, float(entry.config.weight)) for entry in self.optimised]
        if len(parts) == 1 and parts[0][1] > 0:
            return parts[0][0]
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in parts)

    @property
    def recipe(self) -> str:
        """All that the sum depends on, in one line: weights, names, limits and options."""
        return ", ".join(_recipe(entry) for entry in self.entries if not entry.held_out)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Lets every reward refuse prompts that it cannot score.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If a reward refuses one.
        """
        for entry in self.entries:
            entry.reward.check(prompts)

    def prepare(self, device: torch.device) -> None:
        """Lets every reward move its model.

        Args:
            device: Where pictures will be.
        """
        for entry in self.entries:
            entry.reward.prepare(device)

    def score(self, images: Tensor, prompts: Sequence[Prompt], held_out: bool = True) -> Scores:
        """Scores pictures; several threads may call it at once.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.
            held_out: Whether those held out are asked, too.

        Returns:
            The scores, on the pictures' device.

        Raises:
            UserError: If a reward raises or does not return one number a picture.
        """
        total = torch.zeros(len(images), device=images.device)
        each: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.held_out and not held_out:
                each.update((name, torch.full_like(total, torch.nan)) for name in entry.names)
                continue
            with entry.turn:
                measured = measure_checked(entry.reward, images, prompts, entry.config.on_failure)
            each.update(measured)
            # Weight 0 would still spread NaN.
            if entry.config.weight and not entry.held_out:
                total = total + entry.config.weight * _limited(measured[entry.reward.name], entry.config)
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
        for entry in self.entries:
            values = features_checked(entry.reward, images, prompts)
            if values is not None:
                return Features(entry.reward.name, values)
        return None


def held_out_entries(given: Mapping[str, RewardConfig | None] | Iterable[str]) -> list[Entry]:
    """Finds the rewards that are held out.

    Args:
        given: Names, or names with options.

    Returns:
        Their entries.

    Raises:
        UserError: If a name cannot be found, or one has a weight.
    """
    named = given.items() if isinstance(given, Mapping) else ((name, None) for name in given)
    entries = []
    for name, config in named:
        limits = {} if config is None else {"floor": config.floor, "cap": config.cap}
        given = [what for what, value in limits.items() if value is not None]
        if config is not None and config.weight not in (0, RewardConfig().weight):
            given.insert(0, "weight")
        if given:
            raise UserError(
                f"The reward {name!r} is held out and has a {given[0]}; what is held out is never optimised. Leave the "
                f"{given[0]} out, or move the reward to model.rewards."
            )
        entries.append(_entry(name, config or RewardConfig(), held_out=True))
    return entries


def _entry(name: str, config: RewardConfig, held_out: bool = False) -> Entry:
    reward = find_reward(config.reward or name, config.options, called=name if config.reward else None)
    return _entry_of(reward, config, held_out)


def _entry_of(reward: Reward, config: RewardConfig, held_out: bool = False) -> Entry:
    return Entry(reward, config, held_out, threading.BoundedSemaphore(reward.concurrency))


def _limited(scores: Tensor, config: RewardConfig) -> Tensor:
    limits = (config.floor, config.cap)
    return scores if limits == (None, None) else scores.clamp(*limits)


def _recipe(entry: Entry) -> str:
    config = entry.config
    given = [f"{key}={value}" for key, value in sorted(entry.reward.recipe(config.options).items())]
    limits = {"is": config.reward, "floor": config.floor, "cap": config.cap}
    given += [f"{key} {value}" for key, value in limits.items() if value is not None]
    return f"{float(config.weight):g} {entry.reward.name}" + (f" ({', '.join(given)})" if given else "")
