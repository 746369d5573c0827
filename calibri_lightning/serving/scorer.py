"""What a server asks of a reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from calibri_lightning.serving.protocol import PromptText, RewardInfo


class Scorer(ABC):
    """A reward as a server sees it; all its methods are called in one thread, that of its device's queue."""

    device: str = "cpu"
    """Where it computes; the scorers of one device share a thread and take turns."""

    @abstractmethod
    def load(self) -> RewardInfo:
        """Loads the model; called once, before the server says that it is ready.

        Returns:
            What scores.
        """

    def check(self, prompts: Sequence[PromptText]) -> str | None:
        """Looks for prompts that it cannot score.

        Args:
            prompts: The prompts.

        Returns:
            What is wrong with one of them, as a sentence; None if nothing is.
        """
        return None

    @abstractmethod
    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Scores pictures.

        Args:
            images: B pictures of one shape, uint8 or float32 (0..1) [H, W, 3], or videos [F, H, W, 3].
            prompts: The prompt of each.

        Returns:
            B numbers under the reward's name and each of its extra names; NaN where a picture cannot be scored.

        Raises:
            Exception: Anything; all pictures of the call have then failed.
        """
