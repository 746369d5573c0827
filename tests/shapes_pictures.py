"""Scenes and their pictures, for the tests of the renderer and of the checker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.shapes.captions import Relation, Scene, scenes
from calibri_lightning.shapes.checker import Checker, CheckerScores
from calibri_lightning.shapes.render import BACKGROUND, PALETTE, place, render

SIZE = 48
OPPOSITE: dict[Relation, Relation] = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
CHECKER = Checker()
PAPER = torch.tensor(BACKGROUND).view(1, 3, 1, 1)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def draw(wanted: Sequence[Scene], seed: int, size: int = SIZE) -> Tensor:
    generator = rng(seed)
    return tensor([render(place(scene, size, generator), size) for scene in wanted])


def colour(name: str) -> Tensor:
    return torch.tensor(PALETTE[name]).view(3, 1, 1)


def _some_of_each() -> tuple[Scene, ...]:
    related = [scene for scene in scenes() if scene.relation]
    picked = [related[i] for i in rng(0).integers(len(related), size=30)]
    return (*[scene for scene in scenes() if not scene.relation][::3], *picked)


WANTED = _some_of_each()
"""Singles, counts and relations, about as many of each word."""


@cache
def true_pictures() -> Tensor:
    """A right picture of each scene of `WANTED`; not to be written to."""
    return draw(WANTED, 1)


@cache
def true_scores() -> CheckerScores:
    """The scores of `true_pictures`."""
    return CHECKER.score(true_pictures(), WANTED)


def noisy(images: Tensor, amount: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 0.5 * amount * noise).clamp(0, 1)
