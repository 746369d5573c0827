"""What the checker measures: numbers in batches and ranges, components, shapes and colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shapes_pictures import CHECKER, PAPER, SIZE, WANTED, colour, noisy, tensor, true_pictures

from calibri_lightning.shapes.captions import COLOURS, SHAPES, Scene, SceneObject, scenes
from calibri_lightning.shapes.checker import (
    MIN_AREA,
    STRAY_AREA,
    WORKING_SIZE,
    classify,
    find_components,
    score_scene,
    shape_credit,
    to_lab,
)
from calibri_lightning.shapes.render import BACKGROUND, PALETTE, Placement, render


def test_a_batch_scores_as_its_pictures_do_alone() -> None:
    some = slice(0, None, 3)
    images, asked = noisy(true_pictures()[some], 0.2), WANTED[some]
    batch = CHECKER.score(images, asked)
    alone = [CHECKER.score(images[i : i + 1], [scene]) for i, scene in enumerate(asked)]
    assert torch.equal(batch.soft, torch.cat([scores.soft for scores in alone]))
    assert torch.equal(batch.strict, torch.cat([scores.strict for scores in alone]))
    flipped = CHECKER.score(images.flip(0), asked[::-1])
    assert torch.equal(batch.soft, flipped.soft.flip(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_pixel_spoils_its_own_picture_only(bad: float) -> None:
    images, asked = true_pictures()[:7].clone(), WANTED[:7]
    clean = CHECKER.score(images, asked)
    images[3, 1, 20, 30] = bad
    scores = CHECKER.score(images, asked)
    others = torch.arange(7) != 3
    for got, expected in ((scores.soft, clean.soft), (scores.strict, clean.strict)):
        assert got.isnan().tolist() == (~others).tolist()
        assert torch.equal(got[others], expected[others])


def test_scores_stay_in_range_and_finite() -> None:
    generator = torch.Generator().manual_seed(2)
    wild = torch.cat([3 * torch.randn(40, 3, SIZE, SIZE, generator=generator), 5 * true_pictures()[:20] - 2])
    scores = CHECKER.score(wild, WANTED[:60])
    assert ((scores.soft >= 0) & (scores.soft <= 1)).all()
    assert set(scores.strict.tolist()) <= {0.0, 1.0}
    assert scores.soft.dtype == scores.strict.dtype == torch.float32


def test_an_empty_batch_has_no_scores() -> None:
    scores = CHECKER.score(torch.empty(0, 3, SIZE, SIZE), [])
    assert scores.soft.shape == scores.strict.shape == (0,)


def test_scoring_leaves_its_input_alone(untouched_rng: None) -> None:
    before = true_pictures().clone()
    CHECKER.score(true_pictures(), WANTED)
    assert torch.equal(true_pictures(), before)


def test_a_label_map_without_objects_has_no_components() -> None:
    found = find_components(np.full((2, SIZE, SIZE), len(COLOURS), np.uint8))
    assert [len(picture) for picture in found] == [len(COLOURS)] * 2
    assert all(c.area.shape == (0,) and c.centre.shape == (0, 2) for picture in found for c in picture)
    for scene in (scenes()[0], scenes()[95], scenes()[-1]):
        soft, strict = score_scene(scene, found[0], 0.0)
        assert soft == 0
        assert strict == 0


@pytest.mark.parametrize("size", [1, 8, 16, SIZE])
def test_a_single_pixel_component_divides_by_nothing(size: int) -> None:
    labels = np.full((1, size, size), len(COLOURS), np.uint8)
    labels[0, size // 2, size // 2] = 0
    with np.errstate(all="raise", under="ignore"):
        (found,) = find_components(labels)
        soft, strict = score_scene(scenes()[0], found, 0.0)
    assert len(found[0].area) == (1 / size**2 >= STRAY_AREA)
    assert np.isfinite(soft)
    assert strict == 0


def test_components_are_measured_per_colour_and_picture() -> None:
    labels = np.full((2, 10, 10), len(COLOURS), np.uint8)
    labels[0, 1:4, 2:6] = 3
    labels[0, 7:9, 7:9] = 3
    labels[1, 1:4, 2:6] = 3  # In the same place of the next picture: not connected through the batch.
    labels[1, 4:6, 2:6] = 4  # Touching, of another colour.
    first, second = find_components(labels)
    np.testing.assert_allclose(first[3].area, [0.12, 0.04])
    np.testing.assert_allclose(first[3].centre, [[0.4, 0.25], [0.8, 0.8]])
    np.testing.assert_allclose(second[3].area, [0.12])
    np.testing.assert_allclose(second[4].area, [0.08])
    np.testing.assert_allclose(second[4].centre, [[0.4, 0.5]])
    assert sum(len(c.area) for c in first + second) == 4


def test_corners_connect() -> None:
    labels = np.full((1, 10, 10), len(COLOURS), np.uint8)
    labels[0, 2:4, 2:4] = labels[0, 4:6, 4:6] = 0
    np.testing.assert_allclose(find_components(labels)[0][0].area, [0.08])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_overlap_is_best_with_the_drawn_shape(shape: str) -> None:
    pictures = [render((Placement("red", shape, 24.3, 23.8, radius),), SIZE) for radius in (4.6, 6, 9, 12)]
    for picture in find_components(classify(tensor(pictures))):
        (overlap,) = picture[0].overlap
        assert overlap.argmax() == SHAPES.index(shape)
        assert overlap.max() > 0.8
        assert picture[0].area[0] > MIN_AREA
        assert shape_credit(picture[0].overlap, shape)[0] > 0.7
    assert shape_credit(np.zeros((0, 3)), shape).shape == (0,)


def test_touching_objects_of_one_colour_are_one_component() -> None:
    objects = (Placement("red", "circle", 18, 24, 6), Placement("red", "circle", 29, 24, 6))
    scores = CHECKER.score(tensor([render(objects, SIZE)]), [Scene((SceneObject("red", "circle", 2),))])
    assert scores.strict.item() == 0


def test_palette_colours_are_classified_as_themselves() -> None:
    images = torch.stack([colour(name).expand(3, SIZE, SIZE) for name in COLOURS])
    labels = classify(torch.cat([images, PAPER.expand(1, 3, SIZE, SIZE)]))
    assert labels.shape == (9, WORKING_SIZE, WORKING_SIZE)
    assert (labels == np.arange(9)[:, None, None]).all()


def test_a_far_colour_belongs_to_none() -> None:
    # Cyan lies 50 and more from every palette colour.
    cyan = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)
    assert (classify(cyan) == len(COLOURS) + 1).all()


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((1, 1, 1), (100, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((1, 1, 0), (97.14, -21.55, 94.48)),
        ((0, 1, 1), (91.11, -48.09, -14.13)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ((0.01, 0.01, 0.01), (0.70, 0, 0)),
        ((1.5, -0.5, 0), (53.24, 80.09, 67.20)),
    ],
)
def test_lab_has_the_published_values(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    got = to_lab(torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(got, torch.tensor(lab, dtype=torch.float32), atol=0.1, rtol=0)


def test_palette_colours_are_far_apart() -> None:
    palette = torch.tensor([PALETTE[name] for name in COLOURS] + [BACKGROUND]).T[None, :, :, None]
    lab = to_lab(palette)[0, :, :, 0].T
    distances = torch.cdist(lab, lab) + 1e3 * torch.eye(len(lab))
    assert distances.min() > 25
