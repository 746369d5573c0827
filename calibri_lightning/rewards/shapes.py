"""Does a picture show the scene of its caption? The verifiable reward of the embedded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward
from calibri_lightning.shapes.captions import Scene

if TYPE_CHECKING:
    from calibri_lightning.shapes.checker import Checker


class ShapesReward(Reward):
    """The checker's soft score in 0..1; its strict score, 0 or 1, is reported as `shapes_strict`."""

    name = "shapes"
    extra_names = ("shapes_strict",)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures softly.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: Prompts with a scene, as `shapes:train`, `shapes:val` and `shapes:test` have it.

        Returns:
            Soft scores [B].
        """
        return self.measure(images, prompts)[self.name]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts without a scene.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If a prompt's metadata describes no scene.
        """
        for prompt in prompts:
            try:
                Scene.from_metadata(prompt.metadata)
            except UserError as error:
                raise UserError(f"The reward 'shapes' cannot score the prompt {prompt.text!r}: {error}") from error

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Scores pictures softly and strictly.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: Prompts with a scene.

        Returns:
            The soft score under its name, the strict one under its extra name, each [B].

        Raises:
            UserError: If a prompt's metadata describes no scene.
        """
        scores = self._checker.score(images, [Scene.from_metadata(prompt.metadata) for prompt in prompts])
        return dict(zip((self.name, *self.extra_names), (scores.soft, scores.strict), strict=True))

    def features(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Describes pictures by place, size and presence of the objects of their captions.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: Prompts with a scene.

        Returns:
            [B, F].

        Raises:
            UserError: If a prompt's metadata describes no scene.
        """
        from calibri_lightning.shapes.attributes import attributes

        return attributes(images, [Scene.from_metadata(prompt.metadata) for prompt in prompts])

    @cached_property
    def _checker(self) -> Checker:
        from calibri_lightning.shapes.checker import Checker

        return Checker()
