"""What varies among pictures of one caption: where each wanted object is, how large, and whether it is there.

The features behind the diversity of `shapes`. Colour and shape are fixed by the caption; whether they are right is for
the score to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.arrays import Floats
from calibri_lightning.shapes.captions import NUMBERS, Scene
from calibri_lightning.shapes.checker import Components, assign, classify, find_components

POSITION_UNIT = 0.1
"""A move that counts as different, widths of the picture: about the radius of a small object."""
RADIUS_UNIT = 0.03
"""A change of radius that counts as different, widths of the picture; drawn radii of one caption span 0.03 to 0.12."""
_DIRECTIONS = np.array([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5], [0.5**0.5, -(0.5**0.5)]])
NUM_ATTRIBUTES = len(NUMBERS) * (len(_DIRECTIONS) + 2)
"""Features of a picture: those of four objects, the most that a caption names."""


@torch.no_grad()
def attributes(images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Describes pictures by the objects that their captions name; see `describe`.

    Args:
        images: [B, 3, H, W] in 0..1.
        scenes: B scenes.

    Returns:
        float64 [B, `NUM_ATTRIBUTES`] on the CPU; comparable among pictures of one scene. NaN for a picture with a
        non-finite pixel.
    """
    finite = images.flatten(1).isfinite().all(1)
    found = find_components(classify(torch.where(finite.view(-1, 1, 1, 1), images, 0.0)))
    rows = [describe(scene, components) for scene, components in zip(scenes, found, strict=True)]
    values = torch.from_numpy(np.array(rows).reshape(-1, NUM_ATTRIBUTES))
    return values.masked_fill(~finite.cpu()[:, None], torch.nan)


def describe(scene: Scene, found: Sequence[Components]) -> Floats:
    """Describes one picture.

    The copies of an object ("three circles") have no order, and one that is missing has no place. So an object of n
    copies is described by their sorted coordinates along four directions, their sorted radii, and for each copy
    whether it is there. Sorted projections (as in the sliced Wasserstein distance) do not depend on the order of the
    copies and move no further than the copies do; for a single object the distance of two descriptions is that of its
    places. A missing copy counts as one of radius 0 in the centre of the picture. Divided by the root of the number of
    objects, a distance of 1 is one unit for each of them, on average (root mean square).

    Args:
        scene: What the picture should show.
        found: Its components, by colour.

    Returns:
        float64 [`NUM_ATTRIBUTES`]; what the caption does not fill is 0.
    """
    parts = []
    for wanted, (components, _, chosen) in zip(scene.objects, assign(scene, found), strict=True):
        # A component that can be no object (too small, a full frame) has no overlap with any shape.
        there = [i for i in chosen if components.overlap[i].max() > 0]
        places, radii, presence = np.zeros((wanted.count, 2)), np.zeros(wanted.count), np.zeros(wanted.count)
        places[: len(there)] = components.centre[there] - 0.5
        radii[: len(there)] = np.sqrt(components.area[there] / np.pi)
        presence[: len(there)] = 1.0
        # The four directions see each move twice.
        projections = np.sort(places @ _DIRECTIONS.T, axis=0) / 2**0.5
        parts += [projections.ravel() / POSITION_UNIT, np.sort(radii) / RADIUS_UNIT, presence]
    described = np.concatenate(parts) / sum(wanted.count for wanted in scene.objects) ** 0.5
    return np.pad(described, (0, NUM_ATTRIBUTES - len(described)))
