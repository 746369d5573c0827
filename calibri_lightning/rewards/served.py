"""A reward as a server's scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.devices import find_device
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward, measure_checked
from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.scorer import Scorer


class RewardScorer(Scorer):
    """Serves a reward of this package, or anything else that is a `Reward`."""

    def __init__(self, reward: Reward, device: str = "cpu") -> None:
        """Loads nothing yet.

        Args:
            reward: The reward.
            device: Where it scores: cpu, cuda or cuda:1.

        Raises:
            UserError: If there is no such device.
        """
        self._reward, self.device = reward, device
        self._torch_device = find_device(device)

    def load(self) -> RewardInfo:
        """Moves the reward to its device.

        Returns:
            What it says about itself.

        Raises:
            UserError: If its model cannot be loaded.
        """
        self._reward.prepare(self._torch_device)
        info = self._reward.describe()
        return RewardInfo(
            name=self._reward.name,
            model=info.model,
            revision=info.revision,
            preprocessing=info.preprocessing,
            pixels=self._reward.pixels,
            extra_names=list(self._reward.extra_names),
            takes_frames=self._reward.takes_frames,
        )

    def check(self, prompts: Sequence[PromptText]) -> str | None:
        """Asks the reward.

        Args:
            prompts: The prompts.

        Returns:
            What it refuses; None if it takes them all.
        """
        try:
            self._reward.check(_prompts(prompts))
        except UserError as error:
            return str(error)
        return None

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures, uint8 or float32 [H, W, 3], or videos [F, H, W, 3].
            prompts: The prompt of each.

        Returns:
            B numbers under the reward's name and each of its extra names.

        Raises:
            UserError: If the reward raises or does not return one number a picture.
        """
        measured = measure_checked(self._reward, to_images(images).to(self._torch_device), _prompts(prompts))
        return {name: scores.tolist() for name, scores in measured.items()}


def to_images(pictures: Sequence[NDArray[Any]]) -> Tensor:
    """Turns pictures of the wire into those of a reward.

    Bytes become the float32 next to byte / 255. They are divided on the CPU: a GPU multiplies by 1 / 255 instead, with
    other last bits.

    Args:
        pictures: B of them, uint8 or float32, [H, W, 3] or [F, H, W, 3].

    Returns:
        float32 [B, 3, H, W] or [B, F, 3, H, W] in 0..1, contiguous as those that a backbone makes: products of other
        layouts differ in the last bits.
    """
    stacked = np.stack(list(pictures))
    if stacked.dtype == np.uint8:
        stacked = stacked.astype(np.float32) / np.float32(255)
    return torch.from_numpy(stacked).movedim(-1, -3).contiguous()


def _prompts(texts: Sequence[PromptText]) -> list[Prompt]:
    return [Prompt(text.text, index, text.metadata) for index, text in enumerate(texts)]
