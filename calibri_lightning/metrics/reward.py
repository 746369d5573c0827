"""A reward as a metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.metrics.mean import FiniteMean
from calibri_lightning.metrics.pictures import to_float
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward, measure_checked
from calibri_lightning.rewards.finding import find_reward


class RewardMetric(FiniteMean):
    """Mean of a reward over pictures and ranks.

    A picture that cannot be scored does not count in the mean; `failed` says how many there were. A mean over nothing
    is NaN, never 0. Copies of a metric share the reward, and so its model.
    """

    higher_is_better = True

    def __init__(
        self, reward: str | Reward, options: Mapping[str, Any] | None = None, extras: bool = False, **kwargs: Any
    ) -> None:
        """Makes the reward; its model is loaded when it is first used.

        Args:
            reward: A built-in name, an import path "package.module:name", or a reward.
            options: Arguments of a named reward's class.
            extras: Whether `compute` gives a dict that also has the reward's further scores and the numbers of pictures
                that could not be scored.
            **kwargs: Settings of every metric of torchmetrics, for instance `sync_on_compute`.

        Raises:
            UserError: If there is no such reward, or it does not take these options.
        """
        held = _Held(reward, dict(options or {}))
        super().__init__(len(held.names), held.identity, **kwargs)
        self._held, self._extras = held, extras

    @property
    def reward(self) -> Reward:
        """The reward."""
        return self._held.reward

    def update(self, images: Tensor, prompts: Sequence[str | Prompt]) -> None:
        """Scores pictures.

        Args:
            images: [B, 3, H, W], or [B, F, 3, H, W] for videos, uint8 or floating point in 0..1. One with a pixel that
                is not finite cannot be scored.
            prompts: The prompt of each, as text, or with metadata for rewards that need some.

        Raises:
            UserError: If they are no pictures, there is not one prompt for each, or the reward refuses a prompt.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            given = "one text" if isinstance(prompts, str) else str(len(prompts))
            raise UserError(f"There are {len(images)} pictures and {given} of prompts; give a list with one for each.")
        if not len(images):
            return
        pictures = to_float(images, videos=True)
        full = [Prompt(each, index) if isinstance(each, str) else each for index, each in enumerate(prompts)]
        whole = pictures.isfinite().flatten(1).all(dim=1)
        self.reward.check(full)
        measured = measure_checked(self.reward, pictures.nan_to_num(0, 0, 0), full)
        rows = torch.stack([measured[name] for name in self._held.names], dim=1)
        self.add_rows(torch.where(whole[:, None], rows, torch.nan))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Gives the mean over all pictures of all ranks.

        Returns:
            float32, NaN if no picture could be scored. With `extras` a dict: the mean of the reward and of each further
            score under its name, and under the name with `_failed` how many pictures it could not score.
        """
        means = self.means()
        if not self._extras:
            return means[0]
        found = dict(zip(self._held.names, means, strict=True))
        return found | {f"{name}_failed": count for name, count in zip(self._held.names, self.failed, strict=True)}


class _Held:
    """A reward that copies share, and that a pickle makes anew from its name."""

    def __init__(self, reward: str | Reward, options: dict[str, Any]) -> None:
        if isinstance(reward, Reward) and options:
            raise UserError(
                f"The reward {reward.name!r} is made already and cannot take options ({', '.join(options)}). Give its "
                "name, or make it with them."
            )
        self._made_from = (reward, options)
        self.reward = reward if isinstance(reward, Reward) else find_reward(reward, options)
        self.names = (self.reward.name, *self.reward.extra_names)

    @property
    def identity(self) -> int:
        """A number of 62 bits: the same for copies and pickles, another one for another reward or other options."""
        reward, options = self._made_from
        told = f"{type(self.reward).__module__}.{type(self.reward).__qualname__} {self.reward.name} {options}"
        made_here = f"{told} {id(reward)}" if isinstance(reward, Reward) else f"{told} {reward}"
        return int.from_bytes(hashlib.sha256(made_here.encode()).digest()[:8], "big") >> 2

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, self._made_from
