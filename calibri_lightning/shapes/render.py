"""Draws a scene: flat coloured shapes with anti-aliased edges on a light background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibri_lightning.shapes.captions import Relation, Scene

BACKGROUND: tuple[float, float, float] = (0.93, 0.93, 0.93)
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.56, 0.10),
    "yellow": (0.97, 0.87, 0.12),
    "green": (0.13, 0.62, 0.26),
    "blue": (0.12, 0.32, 0.85),
    "purple": (0.50, 0.18, 0.68),
    "pink": (0.98, 0.55, 0.78),
    "black": (0.10, 0.10, 0.10),
}
"""sRGB colours, 0..1, far apart in CIE Lab."""

SQUARE_SIDE = 0.89
"""Half the side of a square over the radius of a circle of nearly the same area."""
TRIANGLE_RADIUS = 1.4
"""Circumradius of a triangle over that radius."""
RELATION_AXES: dict[Relation, tuple[int, int]] = {
    "above": (1, 1),
    "below": (1, -1),
    "left of": (0, 1),
    "right of": (0, -1),
}
"""For each relation, the axis (0 = x, 1 = y downwards) and sign of (second centre - first centre) that make it hold."""
TRIES = 64
"""Placements drawn at once."""


@dataclass(frozen=True)
class Placement:
    """Where one drawn object sits: centre and radius in pixels, y downwards."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


def place(scene: Scene, size: int, rng: np.random.Generator) -> tuple[Placement, ...]:
    """Draws positions and sizes that satisfy a scene, by rejection.

    Args:
        scene: What to show.
        size: Height and width of the picture, pixels.
        rng: Source of randomness.

    Returns:
        One placement a drawn object, not overlapping.
    """
    wanted = [(o.colour, o.shape) for o in scene.objects for _ in range(o.count)]
    low, high = {1: (0.15, 0.27), 2: (0.12, 0.18), 3: (0.10, 0.14), 4: (0.095, 0.125)}[len(wanted)]
    while True:
        # Many tries at once: the first that satisfies the scene is taken, as one-by-one rejection would.
        radii = rng.uniform(low * size, high * size, (TRIES, len(wanted)))
        margin = radii * TRIANGLE_RADIUS
        centres = margin[..., None] + rng.random((TRIES, len(wanted), 2)) * (size - 2 * margin[..., None])
        gaps = np.linalg.norm(centres[:, :, None] - centres[:, None], axis=-1) - margin[:, :, None] - margin[:, None]
        valid = ((gaps >= 0) | np.eye(len(wanted), dtype=bool)).all((1, 2))
        if scene.relation:
            valid &= holds(scene.relation, centres[:, 1] - centres[:, 0], radii.sum(1))
        if valid.any():
            first = int(valid.argmax())
            rows = zip(wanted, centres[first].tolist(), radii[first].tolist(), strict=True)
            return tuple(Placement(colour, shape, x, y, radius) for (colour, shape), (x, y), radius in rows)


def holds(relation: Relation, offset: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Whether a relation clearly holds between two objects.

    Args:
        relation: How the first stands to the second.
        offset: [..., 2] centre of the second minus centre of the first, (x, y) in pixels, y downwards.
        distance: [...] least offset along the relation's axis, pixels.

    Returns:
        bool [...]: the offset along the axis is at least `distance` and at least the offset across it.
    """
    axis, sign = RELATION_AXES[relation]
    along = sign * offset[..., axis]
    return (along >= distance) & (along >= np.abs(offset[..., 1 - axis]))


def render(placements: tuple[Placement, ...], size: int) -> np.ndarray:
    """Draws placed objects.

    Args:
        placements: The objects.
        size: Height and width of the picture, pixels.

    Returns:
        float32 [size, size, 3] in 0..1.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    picture = np.broadcast_to(np.asarray(BACKGROUND, np.float32), (size, size, 3)).copy()
    for p in placements:
        # A pixel's coverage: its signed distance to the edge, as a ramp one pixel wide.
        coverage = np.clip(0.5 - signed_distance(p.shape, x - p.x, y - p.y, p.radius), 0.0, 1.0)[..., None]
        picture += coverage * (np.asarray(PALETTE[p.colour], np.float32) - picture)
    return picture


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a shape's edge (exact inside; a lower bound outside corners), negative inside.

    Args:
        shape: "circle", "square" or "triangle" (upright, equilateral).
        x: Horizontal offset from the centre, pixels.
        y: Vertical offset from the centre, pixels, downwards.
        radius: Size, pixels.

    Returns:
        The distance, the shape of `x`.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_SIDE * radius
    inradius = 0.5 * TRIANGLE_RADIUS * radius
    return np.maximum(y, 0.5 * np.sqrt(3.0, dtype=np.float32) * np.abs(x) - 0.5 * y) - inradius
