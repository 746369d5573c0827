from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from calibri_lightning.shapes.captions import COLOURS, SHAPES, Relation, Scene, SceneObject, scenes
from calibri_lightning.shapes.checker import (
    MIN_AREA,
    STRAY_AREA,
    WORKING_SIZE,
    Checker,
    CheckerScores,
    classify,
    find_components,
    relation_margin,
    score_scene,
    shape_credit,
    to_lab,
)
from calibri_lightning.shapes.render import BACKGROUND, PALETTE, RELATION_AXES, Placement, place, render

SIZE = 48
OPPOSITE: dict[Relation, Relation] = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
CHECKER = Checker()
PAPER = torch.tensor(BACKGROUND).view(1, 3, 1, 1)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def tensor(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def draw(wanted: list[Scene], seed: int, size: int = SIZE) -> Tensor:
    generator = rng(seed)
    return tensor([render(place(scene, size, generator), size) for scene in wanted])


def colour(name: str) -> Tensor:
    return torch.tensor(PALETTE[name]).view(3, 1, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    steps = torch.arange(-24.0, 25.0)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = functional.pad(images, (24,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


@pytest.fixture(scope="module")
def wanted() -> list[Scene]:
    """Singles, counts and relations, about as many of each word."""
    related = [scene for scene in scenes() if scene.relation]
    picked = [related[i] for i in rng(0).integers(len(related), size=30)]
    return [scene for scene in scenes() if not scene.relation][::3] + picked


@pytest.fixture(scope="module")
def true(wanted: list[Scene]) -> Tensor:
    return draw(wanted, 1)


@pytest.fixture(scope="module")
def true_scores(wanted: list[Scene], true: Tensor) -> CheckerScores:
    return CHECKER.score(true, wanted)


# A true picture is right, and another scene's picture is wrong.


def test_a_drawn_scene_satisfies_itself() -> None:
    many = [scenes()[i] for i in rng(2).integers(len(scenes()), size=300)] + [s for s in scenes() if not s.relation]
    scores = CHECKER.score(draw(many, 3), many)
    assert scores.strict.mean() >= 0.97
    assert (scores.soft > 0.9).float().mean() >= 0.97
    assert scores.soft.min() > 0.7


@pytest.mark.parametrize("size", [32, 64, 96])
def test_other_resolutions_score_alike(wanted: list[Scene], size: int) -> None:
    scores = CHECKER.score(draw(wanted, 4, size), wanted)
    assert scores.strict.mean() >= 0.9
    assert scores.soft.mean() >= 0.95


def with_first(scene: Scene, **changes: object) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], **changes), *scene.objects[1:]))


def other_colour(scene: Scene, step: int) -> Scene:
    return with_first(scene, colour=COLOURS[(COLOURS.index(scene.objects[0].colour) + 1 + step % 7) % 8])


def other_shape(scene: Scene, step: int) -> Scene:
    return with_first(scene, shape=SHAPES[(SHAPES.index(scene.objects[0].shape) + 1 + step % 2) % 3])


def other_count(scene: Scene, step: int) -> Scene | None:
    return None if scene.relation else with_first(scene, count=(scene.objects[0].count + step % 3) % 4 + 1)


def opposite_relation(scene: Scene, _: int) -> Scene | None:
    return replace(scene, relation=OPPOSITE[scene.relation]) if scene.relation else None


def swapped_objects(scene: Scene, _: int) -> Scene | None:
    return replace(scene, objects=scene.objects[::-1]) if scene.relation else None


def swapped_colours(scene: Scene, _: int) -> Scene | None:
    if not scene.relation or len({o.colour for o in scene.objects}) == 1 or len({o.shape for o in scene.objects}) == 1:
        return None
    first, second = scene.objects
    return replace(scene, objects=(replace(first, colour=second.colour), replace(second, colour=first.colour)))


def without_second(scene: Scene, _: int) -> Scene | None:
    return Scene(scene.objects[:1]) if scene.relation else None


@pytest.mark.parametrize(
    "change",
    [other_colour, other_shape, other_count, opposite_relation, swapped_objects, swapped_colours, without_second],
)
def test_another_scene_is_never_strictly_right(
    change: Callable[[Scene, int], Scene | None], wanted: list[Scene], true_scores: CheckerScores
) -> None:
    pairs = [(scene, change(scene, step)) for step, scene in enumerate(wanted * 2)]
    asked = [scene for scene, shown in pairs if shown]
    scores = CHECKER.score(draw([shown for _, shown in pairs if shown], 5), asked)
    assert len(asked) > 25
    assert scores.strict.sum() == 0
    assert scores.soft.mean() < 0.7 * true_scores.soft.mean()


def test_a_third_object_is_wrong(wanted: list[Scene]) -> None:
    singles = [scene for scene in wanted if scene.kind == "single"]
    shown = [Scene((*s.objects, SceneObject("green", "circle")), "left of") for s in singles]
    assert CHECKER.score(draw(shown, 6), singles).strict.sum() == 0


@pytest.mark.parametrize("relation", list(RELATION_AXES))
def test_relations_follow_the_centres(relation: Relation) -> None:
    # A ring of second objects around a first one; the answer is known from the angle. Near the diagonal both
    # neighbouring relations may hold: "above" and "left of" are both true of a picture.
    scene = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), relation)
    angles = np.deg2rad(np.arange(0, 360, 5))
    centres = np.stack([24 + 15 * np.cos(angles), 24 + 15 * np.sin(angles)], 1)
    pictures = [
        render((Placement("red", "circle", 24, 24, 5), Placement("blue", "square", *c, 5)), SIZE) for c in centres
    ]
    strict = CHECKER.score(tensor(pictures), [scene] * len(pictures)).strict.numpy()
    axis, sign = RELATION_AXES[relation]
    offset = centres - 24
    tangent = sign * offset[:, axis] / np.abs(offset[:, 1 - axis]).clip(1e-9)
    assert (strict[tangent > 0.8] == 1).all()
    assert (strict[tangent < 0.6] == 0).all()


def test_the_margin_is_the_smaller_slack() -> None:
    scene = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), "above")
    anchors = [(np.array([0.5, 0.2]), 0.1), (np.array([0.6, 0.7]), 0.2)]
    assert relation_margin(scene, anchors) == pytest.approx(min(0.5 - 0.15, 0.5 - 0.07))
    assert relation_margin(replace(scene, relation="below"), anchors) == pytest.approx(min(-0.5 - 0.15, -0.5 - 0.07))
    with pytest.raises(ValueError, match="no relation"):
        relation_margin(Scene(scene.objects[:1]), anchors)


# What a search could exploit scores low.


def grid(cells: int, gap: int) -> Tensor:
    picture = PAPER.repeat(1, 1, SIZE, SIZE)
    side = SIZE // cells
    for cell in range(cells**2):
        top, left = side * (cell // cells), side * (cell % cells)
        picture[0, :, top + gap : top + side - gap, left + gap : left + side - gap] = colour(COLOURS[cell % 8])
    return picture


FIXED: dict[str, Callable[[], Tensor]] = {
    "background": lambda: PAPER.expand(1, 3, SIZE, SIZE),
    "white": lambda: torch.ones(1, 3, SIZE, SIZE),
    "grey": lambda: torch.full((1, 3, SIZE, SIZE), 0.5),
    "black": lambda: torch.zeros(1, 3, SIZE, SIZE),
    "uniform noise": lambda: torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),
    **{f"grid of {n}, gap {gap}": lambda n=n, gap=gap: grid(n, gap) for n in (2, 3, 4, 6, 8, 12) for gap in (0, 1)},
}


@pytest.mark.parametrize("name", FIXED)
def test_a_picture_that_ignores_the_prompt_scores_low(name: str, wanted: list[Scene]) -> None:
    asked = wanted[::3]
    scores = CHECKER.score(FIXED[name]().expand(len(asked), -1, -1, -1), asked)
    assert scores.strict.sum() == 0
    # The grid of four holds two right squares for some relations, and two too many.
    assert scores.soft.max() < 0.5
    assert scores.soft.mean() < 0.06


@pytest.mark.parametrize("margin", [0, 2, 5, 9])
def test_a_frame_full_of_the_prompt_colour_scores_low(margin: int, wanted: list[Scene]) -> None:
    images = PAPER.repeat(len(wanted), 1, SIZE, SIZE)
    for image, scene in zip(images, wanted, strict=True):
        image[:, margin : SIZE - margin, margin : SIZE - margin] = colour(scene.objects[0].colour)
    scores = CHECKER.score(images, wanted)
    assert scores.strict.sum() == 0
    assert scores.soft.max() < 0.2


@pytest.mark.parametrize("radius", [0.8, 1.5, 2.0])
def test_stray_dots_of_the_prompt_colours_score_low(radius: float, wanted: list[Scene]) -> None:
    generator = rng(7)
    pictures = []
    for scene in wanted:
        names = [o.colour for o in scene.objects for _ in range(3)]
        dots = (Placement(name, "circle", *generator.uniform(4, 44, 2), radius) for name in names)
        pictures.append(render(tuple(dots), SIZE))
    scores = CHECKER.score(tensor(pictures), wanted)
    assert scores.strict.sum() == 0
    assert scores.soft.mean() < 0.2


@pytest.mark.parametrize("spread", [0.7, 1.3, 1.8, 2.5])
def test_blurred_blobs_score_low(spread: float, wanted: list[Scene]) -> None:
    generator, (y, x) = rng(8), np.mgrid[0:SIZE, 0:SIZE] + 0.5
    pictures = []
    for scene in wanted:
        picture = np.broadcast_to(np.float32(BACKGROUND), (SIZE, SIZE, 3)).copy()
        for p in place(scene, SIZE, generator):
            bump = np.exp(-((x - p.x) ** 2 + (y - p.y) ** 2) / (2 * (spread * p.radius) ** 2))[..., None]
            picture += (bump * (np.asarray(PALETTE[p.colour]) - picture)).astype(np.float32)
        pictures.append(picture)
    scores = CHECKER.score(tensor(pictures), wanted)
    # The middle of a round blob is a disc: a small one, or one of a colour as pale as the background, is a circle.
    round_ones = torch.tensor([all(o.shape == "circle" for o in scene.objects) for scene in wanted])
    assert scores.strict[~round_ones].sum() == 0
    assert scores.soft[~round_ones].mean() < 0.45
    if spread > 1.5:
        assert scores.strict.sum() == 0
        assert scores.soft.mean() < 0.2


@pytest.mark.parametrize("side", [4, 5, 7])
@pytest.mark.parametrize("of_the_prompt", [False, True], ids=["wrong colour", "prompt colour"])
def test_a_stray_patch_spoils_a_true_picture(
    side: int, of_the_prompt: bool, wanted: list[Scene], true: Tensor, true_scores: CheckerScores
) -> None:
    images, generator, spoiled = true.clone(), rng(9), []
    for index, scene in enumerate(wanted):
        asked = [o.colour for o in scene.objects]
        name = asked[0] if of_the_prompt else next(c for c in np.roll(COLOURS, index) if c not in asked)
        drawn = ((true[index] - PAPER[0]).abs().amax(0) > 0.01).numpy()
        for top, left in generator.integers(0, SIZE - side, (300, 2)):
            if not drawn[max(top - 3, 0) : top + side + 3, max(left - 3, 0) : left + side + 3].any():
                images[index, :, top : top + side, left : left + side] = colour(name)
                spoiled.append(index)
                break
    scores = CHECKER.score(images, wanted)
    assert len(spoiled) > 0.9 * len(wanted)
    assert scores.strict[spoiled].sum() == 0
    assert (scores.soft[spoiled] < true_scores.soft[spoiled]).all()


# Corruption costs, the more the worse, and mild corruption is forgiven.


def faded(images: Tensor, amount: float) -> Tensor:
    return torch.lerp(images, PAPER.expand_as(images), amount)


def noisy(images: Tensor, amount: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 0.5 * amount * noise).clamp(0, 1)


def blurred(images: Tensor, amount: float) -> Tensor:
    return blur(images, 6 * amount) if amount else images


@pytest.mark.parametrize("corrupt", [faded, noisy, blurred])
def test_growing_corruption_never_pays(
    corrupt: Callable[[Tensor, float], Tensor], wanted: list[Scene], true: Tensor
) -> None:
    means = [float(CHECKER.score(corrupt(true, amount), wanted).soft.mean()) for amount in (0, 0.25, 0.5, 0.75, 1)]
    assert np.diff(means).max() < 0.002
    assert means[-1] < 0.1 * means[0]


MILD: dict[str, Callable[[Tensor], Tensor]] = {
    "noise of .05": lambda x: noisy(x, 0.1),
    "brightness of .9": lambda x: x * 0.9,
    "brightness of 1.1": lambda x: (x * 1.1).clamp(0, 1),
    "blur of one pixel": lambda x: blur(x, 1.0),
    "box blur of 3 pixels": lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "8 bits": lambda x: x.mul(255).round().div(255),
    "half precision": lambda x: x.half(),
}


@pytest.mark.parametrize("name", MILD)
def test_mild_corruption_is_forgiven(name: str, wanted: list[Scene], true: Tensor) -> None:
    scores = CHECKER.score(MILD[name](true), wanted)
    assert scores.strict.mean() >= 0.85
    assert scores.soft.mean() >= 0.93


# Numbers: batches, ranges, divisions by zero.


def test_a_batch_scores_as_its_pictures_do_alone(wanted: list[Scene], true: Tensor) -> None:
    some = slice(0, None, 3)
    images, asked = noisy(true[some], 0.2), wanted[some]
    batch = CHECKER.score(images, asked)
    alone = [CHECKER.score(images[i : i + 1], [scene]) for i, scene in enumerate(asked)]
    assert torch.equal(batch.soft, torch.cat([scores.soft for scores in alone]))
    assert torch.equal(batch.strict, torch.cat([scores.strict for scores in alone]))
    flipped = CHECKER.score(images.flip(0), asked[::-1])
    assert torch.equal(batch.soft, flipped.soft.flip(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_pixel_spoils_its_own_picture_only(bad: float, wanted: list[Scene], true: Tensor) -> None:
    images, asked = true[:7].clone(), wanted[:7]
    clean = CHECKER.score(images, asked)
    images[3, 1, 20, 30] = bad
    scores = CHECKER.score(images, asked)
    others = torch.arange(7) != 3
    for got, expected in ((scores.soft, clean.soft), (scores.strict, clean.strict)):
        assert got.isnan().tolist() == (~others).tolist()
        assert torch.equal(got[others], expected[others])


def test_scores_stay_in_range_and_finite(wanted: list[Scene], true: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    wild = torch.cat([3 * torch.randn(40, 3, SIZE, SIZE, generator=generator), 5 * true[:20] - 2])
    scores = CHECKER.score(wild, wanted[:60])
    assert ((scores.soft > 0) & (scores.soft <= 1)).all()
    assert set(scores.strict.tolist()) <= {0.0, 1.0}
    assert scores.soft.dtype == scores.strict.dtype == torch.float32


def test_an_empty_batch_has_no_scores() -> None:
    scores = CHECKER.score(torch.empty(0, 3, SIZE, SIZE), [])
    assert scores.soft.shape == scores.strict.shape == (0,)


def test_scoring_leaves_its_input_alone(wanted: list[Scene], true: Tensor, untouched_rng: None) -> None:
    before = true.clone()
    CHECKER.score(true, wanted)
    assert torch.equal(true, before)


def test_a_label_map_without_objects_has_no_components() -> None:
    found = find_components(np.full((2, SIZE, SIZE), len(COLOURS), np.uint8))
    assert [len(picture) for picture in found] == [len(COLOURS)] * 2
    assert all(c.area.shape == (0,) and c.centre.shape == (0, 2) for picture in found for c in picture)
    for scene in (scenes()[0], scenes()[95], scenes()[-1]):
        soft, strict = score_scene(scene, found[0], 0.0)
        assert 0 < soft < 0.1
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
