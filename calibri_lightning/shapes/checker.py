"""Scores how well pictures show their scenes, without any learned weights.

Pixels are assigned to the palette by distance in CIE Lab, connected components of one colour are compared with ideal
shapes of the same centre and area, and the scene's attributes (each object, their number, nothing else, the relation)
are each scored in 0..1. Their product, the soft score, reads as the chance that all are right were the strict limits
uncertain: optimise that. The strict score is 1 only if everything is right: report that.

Why not the geometric mean (Soft-TIFA of GenEval 2, arXiv 2512.16853)? It pays most for turning a missing object into a
poor one, and hardly for turning a poor one into a right one. A search gained as much of it with the product, and only
with the product did strict accuracy follow (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from calibri_lightning.arrays import Floats
from calibri_lightning.shapes.captions import COLOURS, SHAPES, Scene
from calibri_lightning.shapes.render import (
    BACKGROUND,
    PALETTE,
    RELATION_AXES,
    SQUARE_SIDE,
    TRIANGLE_RADIUS,
    signed_distance,
)

WORKING_SIZE = 48
"""Pictures are resized to this before scoring, pixels: the size that the embedded model draws."""
COLOUR_SIGMA = 9.0
"""Spread of a palette colour, CIE Lab units."""
OFF_PALETTE_DISTANCE = 32.0
"""A pixel further than this (Lab) from every palette colour belongs to none."""
MIN_AREA = 0.008
"""Smallest component that counts as an object, share of the picture; the smallest drawn object has 0.023."""
STRAY_AREA = 0.0015
"""Smallest component that counts at all."""
MAX_AREA = 0.33
"""Largest component that can be an object; the largest drawn one has 0.24. Rejects full frames."""
MAX_BORDER_SHARE = 0.35
"""An object may be cut by the picture's edge along at most this share of its diameter."""
STRICT_IOU = 0.78
"""Least overlap with the ideal shape for a strict match."""
STRICT_EXTRA = 0.004
"""Largest area that no wanted object explains, share of the picture, for a strict match: 9 pixels of 48 x 48, so that a
stray patch of 4 x 4 fails while one of 3 x 3, which noise can make, passes."""


@dataclass(frozen=True)
class CheckerScores:
    """Scores of B pictures."""

    soft: Tensor
    """float32 [B] in 0..1, product of the attributes."""
    strict: Tensor
    """float32 [B], 1 where every attribute is right, else 0."""


@dataclass(frozen=True)
class Components:
    """Connected components of one colour in one picture, n of them."""

    area: Floats
    """[n] share of the picture."""
    centre: Floats
    """[n, 2] x and y in 0..1, y downwards."""
    overlap: Floats
    """[n, 3] intersection over union with each ideal shape of `SHAPES`, 0 where no object can be."""


class Checker:
    """Batch scorer of scenes; stateless but for its constants."""

    @torch.no_grad()
    def score(self, images: Tensor, scenes: Sequence[Scene]) -> CheckerScores:
        """Scores pictures.

        Args:
            images: [B, 3, H, W] in 0..1.
            scenes: B scenes.

        Returns:
            Scores; a picture with a non-finite pixel scores NaN.
        """
        finite = images.flatten(1).isfinite().all(1).cpu()
        labels = classify(torch.where(finite.to(images.device).view(-1, 1, 1, 1), images, 0.0))
        found = find_components(labels)
        # Share of the picture that is neither background nor a palette colour: haze, gradients, half-made objects.
        haze = (labels == len(COLOURS) + 1).mean((1, 2))
        scores = np.array(
            [score_scene(scene, found[i], float(haze[i])) for i, scene in enumerate(scenes)], np.float32
        ).reshape(-1, 2)
        soft, strict = (torch.from_numpy(scores[:, column].copy()) for column in (0, 1))
        return CheckerScores(soft.masked_fill(~finite, torch.nan), strict.masked_fill(~finite, torch.nan))


def classify(images: Tensor) -> NDArray[np.uint8]:
    """Assigns each pixel to a palette colour.

    Args:
        images: [B, 3, H, W] in 0..1.

    Returns:
        uint8 [B, S, S], S = `WORKING_SIZE`: index into `COLOURS`, or `len(COLOURS)` for background and
        one more for off-palette.
    """
    resized = images.float()
    if resized.shape[-2:] != (WORKING_SIZE, WORKING_SIZE):
        resized = functional.interpolate(resized, (WORKING_SIZE, WORKING_SIZE), mode="bilinear", antialias=True)
    palette = torch.tensor([PALETTE[colour] for colour in COLOURS] + [BACKGROUND])
    centres = to_lab(palette.T[None, :, :, None])[0, :, :, 0].T.to(resized)
    lab = to_lab(resized)
    # Blurring the evidence for each colour, not the picture, keeps the edge between two colours from becoming a third.
    # |a - c|^2 = |a|^2 - 2 a.c + |c|^2: one small matrix product instead of nine differences.
    products = torch.einsum("nc,bchw->bnhw", centres, lab)
    squared = lab.square().sum(1, keepdim=True) - 2 * products + centres.square().sum(1).view(1, -1, 1, 1)
    off = torch.full_like(squared[:, :1], OFF_PALETTE_DISTANCE**2)
    evidence = (-torch.cat([squared, off], 1) / (2 * COLOUR_SIGMA**2)).softmax(1)
    return functional.avg_pool2d(evidence, 3, 1, 1, count_include_pad=False).argmax(1).to(torch.uint8).cpu().numpy()


def to_lab(rgb: Tensor) -> Tensor:
    """Converts sRGB (IEC 61966-2-1, D65) to CIE 1976 L*a*b*.

    Args:
        rgb: [B, 3, H, W] in 0..1; values outside are clipped.

    Returns:
        [B, 3, H, W]: L in 0..100, a and b.
    """
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    white = torch.tensor([0.95047, 1.0, 1.08883])
    xyz = torch.einsum("ij,bjhw->bihw", (matrix / white[:, None]).to(rgb), linear)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-8) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def find_components(labels: NDArray[np.uint8]) -> list[list[Components]]:
    """Finds the 8-connected components of each colour in each picture, all in one pass.

    Args:
        labels: [B, S, S] from `classify`.

    Returns:
        For each picture, for each colour, its components of at least `STRAY_AREA`.
    """
    batch, size, _ = labels.shape
    num_colours = len(COLOURS)
    masks = (labels[:, None] == np.arange(num_colours, dtype=np.uint8)[None, :, None, None]).reshape(-1, size, size)
    within_plane = np.zeros((3, 3, 3), bool)
    within_plane[1] = True
    marked, count = ndimage.label(masks, within_plane)
    plane, row, column = np.nonzero(marked)
    owner = marked[plane, row, column] - 1
    pixels = np.bincount(owner, minlength=count)
    x = np.bincount(owner, column + 0.5, count) / np.maximum(pixels, 1)
    y = np.bincount(owner, row + 0.5, count) / np.maximum(pixels, 1)
    edge = (row == 0) | (row == size - 1) | (column == 0) | (column == size - 1)
    border = np.bincount(owner, edge, count)
    home = np.zeros(count, np.int64)
    home[owner] = plane
    large = np.flatnonzero(pixels >= STRAY_AREA * size**2)
    overlap = _overlap(marked, large, home[large], pixels[large], x[large], y[large])
    area = pixels[large] / size**2
    cut = border[large] / np.sqrt(pixels[large])
    possible = (area >= MIN_AREA) & (area <= MAX_AREA) & (cut <= MAX_BORDER_SHARE)
    overlap *= possible[:, None]
    centre = np.stack([x[large], y[large]], 1) / size
    # Components are numbered plane by plane, so those of one plane lie side by side.
    ends = np.searchsorted(home[large], np.arange(batch * num_colours + 1))
    flat = [Components(area[a:b], centre[a:b], overlap[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return [flat[i * num_colours : (i + 1) * num_colours] for i in range(batch)]


def _overlap(
    marked: NDArray[np.int32],
    which: NDArray[np.int64],
    home: NDArray[np.int64],
    pixels: NDArray[np.integer],
    x: Floats,
    y: Floats,
) -> Floats:
    """Intersection over union of components with anti-aliased ideal shapes of equal centre and area: [n, 3]."""
    size = marked.shape[-1]
    grid_y, grid_x = np.mgrid[0:size, 0:size].astype(np.float32) + np.float32(0.5)
    x, y = x.astype(np.float32), y.astype(np.float32)
    actual = marked[home] == which[:, None, None] + 1
    # Radii for which circle, square and triangle have the component's area.
    unit_areas = {"circle": np.pi, "square": 4 * SQUARE_SIDE**2, "triangle": 0.75 * np.sqrt(3) * TRIANGLE_RADIUS**2}
    result = np.zeros((len(which), len(SHAPES)))
    for index, shape in enumerate(SHAPES):
        radius = np.sqrt(pixels / unit_areas[shape]).astype(np.float32)[:, None, None]
        distance = signed_distance(shape, grid_x - x[:, None, None], grid_y - y[:, None, None], radius)
        ideal = np.clip(0.5 - distance, 0, 1)
        common = np.where(actual, ideal, 0).sum((1, 2))
        result[:, index] = common / np.maximum(ideal.sum((1, 2)) + pixels - common, 1e-9)
    return result


def shape_credit(overlap: Floats, shape: str) -> Floats:
    """How surely components are a shape: quality of the fit times its share against the other shapes.

    Args:
        overlap: [n, 3].
        shape: One of `SHAPES`.

    Returns:
        [n] in 0..1.
    """
    wanted = overlap[:, SHAPES.index(shape)]
    share = np.exp((overlap - overlap.max(1, keepdims=True, initial=0)) / 0.04)
    # Half of it is a slope that reaches far, for a search that is far away; half is the strict limit, smoothed.
    far, near = np.clip((wanted - 0.45) / 0.4, 0, 1), _sigmoid((wanted - STRICT_IOU) / 0.03)
    return 0.5 * (far + near) * share[:, SHAPES.index(shape)] / share.sum(1)


def assign(scene: Scene, found: Sequence[Components]) -> Iterator[tuple[Components, Floats, list[int]]]:
    """Decides which components stand for which object of a scene.

    Args:
        scene: What a picture should show.
        found: Its components, by colour.

    Yields:
        For each object of the scene the components of its colour, how surely each has its shape, and which of them
        stand for it, the surest first; at most as many as its count.
    """
    # Two objects of one colour share its components: each takes those that look most like it.
    taken: dict[str, list[int]] = {}
    for wanted in scene.objects:
        components = found[COLOURS.index(wanted.colour)]
        credit = shape_credit(components.overlap, wanted.shape)
        free = [int(i) for i in np.argsort(-credit, kind="stable") if i not in taken.get(wanted.colour, [])]
        chosen = free[: wanted.count]
        taken.setdefault(wanted.colour, []).extend(chosen)
        yield components, credit, chosen


def score_scene(scene: Scene, found: Sequence[Components], haze: float) -> tuple[float, float]:
    """Scores one picture.

    Args:
        scene: What it should show.
        found: Its components, by colour.
        haze: Share of off-palette pixels.

    Returns:
        Soft and strict score.
    """
    soft, strict, explained = 1.0, True, 0.0
    anchors: list[tuple[Floats, float]] = []
    for wanted, (components, credit, chosen) in zip(scene.objects, assign(scene, found), strict=True):
        explained += float(components.area[chosen].sum())
        soft *= float(credit[chosen].sum()) / wanted.count  # what is missing counts as 0
        fits = components.overlap[chosen]
        best = fits.argmax(1) == SHAPES.index(wanted.shape) if len(chosen) else np.zeros(0, bool)
        strict &= len(chosen) == wanted.count and bool((best & (fits.max(1, initial=0) >= STRICT_IOU)).all())
        if len(chosen):
            area = float(components.area[chosen[0]])
            anchors.append((components.centre[chosen[0]], float(np.sqrt(area / np.pi))))
    # Count: components large enough to be objects, whatever their colour, against what was asked for.
    expected = sum(o.count for o in scene.objects)
    count = sum(int((c.area >= MIN_AREA).sum()) for c in found)
    soft *= float(np.exp(-abs(count - expected) / expected))
    # Nothing else: coloured area that no wanted object explains, and haze beyond what edges produce.
    extra = sum(float(c.area.sum()) for c in found) - explained + max(0.0, haze - 0.06)
    soft *= float(0.5 * np.exp(-12 * extra) + 0.5 * np.exp(-50 * extra))
    strict &= count == expected and extra < STRICT_EXTRA
    if scene.relation is not None:
        margin = relation_margin(scene, anchors) if len(anchors) == 2 else -1.0
        soft *= float(_sigmoid(np.float64(margin / 0.03)))
        strict &= margin > 0
    return soft, float(strict)


def _sigmoid(x: Floats | np.float64) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def relation_margin(scene: Scene, anchors: Sequence[tuple[Floats, float]]) -> float:
    """How far a relation is from failing, in widths of the picture; positive where it holds.

    Args:
        scene: A scene with a relation.
        anchors: Centre (x, y) and radius of both objects.

    Returns:
        The smaller of two slacks: along the axis beyond half the sum of radii, and along beyond 0.7 times across.
    """
    if scene.relation is None:
        raise ValueError("The scene has no relation.")
    axis, sign = RELATION_AXES[scene.relation]
    (first, first_radius), (second, second_radius) = anchors
    offset = second - first
    along, across = sign * offset[axis], abs(offset[1 - axis])
    return float(min(along - 0.5 * (first_radius + second_radius), along - 0.7 * across))
