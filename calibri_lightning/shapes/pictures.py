"""The training pictures of the `shapes` model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibri_lightning.shapes.captions import Scene, split_scenes
from calibri_lightning.shapes.render import place, render

KIND_SHARES: dict[str, float] = {"single": 0.10, "count": 0.30, "relation": 0.60}
"""Share of each kind of scene among the training pictures."""


@dataclass(frozen=True)
class Pictures:
    """The training set: pictures and what they show."""

    pixels: np.ndarray
    """uint8 [N, size, size, 3]."""
    captions: tuple[str, ...]
    """N captions."""


def draw_pictures(count: int, size: int, seed: int) -> Pictures:
    """Draws training pictures; picture i depends on (seed, i) alone.

    Args:
        count: How many.
        size: Height and width, pixels.
        seed: Seed.

    Returns:
        The pictures.
    """
    by_kind: dict[str, list[Scene]] = {kind: [] for kind in KIND_SHARES}
    for scene in split_scenes("train"):
        by_kind[scene.kind].append(scene)
    pixels = np.empty((count, size, size, 3), np.uint8)
    captions = []
    for index in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        scenes = by_kind[str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))]
        scene = scenes[int(rng.integers(len(scenes)))]
        pixels[index] = np.rint(render(place(scene, size, rng), size) * 255)
        captions.append(scene.caption)
    return Pictures(pixels, tuple(captions))
