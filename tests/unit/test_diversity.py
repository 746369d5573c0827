"""How different samples are: closed forms of the measures, and the features that shapes are compared by."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from shapes_pictures import WANTED, draw, rng, tensor
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation import measure_diversity, pixel_distance, rbf, thumbnails, vendi_score
from calibri_lightning.evaluation.diversity import PIXEL_WIDTH, THUMBNAIL
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import Reward, RewardError, RewardSet
from calibri_lightning.rewards.shapes import ShapesReward
from calibri_lightning.shapes.attributes import NUM_ATTRIBUTES, POSITION_UNIT, RADIUS_UNIT, attributes
from calibri_lightning.shapes.captions import Scene, SceneObject, split_scenes
from calibri_lightning.shapes.render import BACKGROUND, Placement, place, render


def dot(features: np.ndarray) -> np.ndarray:
    return features @ features.T


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_equal_samples_count_as_one_and_orthogonal_ones_as_all(count: int) -> None:
    assert vendi_score(np.ones((count, 3)), rbf()) == pytest.approx(1, abs=1e-9)
    assert vendi_score(np.eye(count), dot) == pytest.approx(count)
    assert vendi_score(100 * np.eye(count), rbf()) == pytest.approx(count)


def test_clusters_count_as_their_entropy_says() -> None:
    # The eigenvalues of K / N are the shares of the clusters.
    even = np.repeat([[0.0], [100.0]], 4, axis=0)
    assert vendi_score(even, rbf()) == pytest.approx(2)
    shares = np.array([6, 2]) / 8
    uneven = np.repeat([[0.0], [100.0]], [6, 2], axis=0)
    assert vendi_score(uneven, rbf()) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_two_samples_follow_the_closed_form() -> None:
    distance, width = 0.7, 0.9
    similarity = math.exp(-(distance**2) / (2 * width**2))
    shares = np.array([1 + similarity, 1 - similarity]) / 2
    found = vendi_score(np.array([[0.0, 0.0], [0.0, distance]]), rbf(width))
    assert found == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_order_and_copies_of_all_samples_change_nothing_and_spread_counts() -> None:
    features = np.random.default_rng(0).normal(size=(8, 5))
    score = vendi_score(features, rbf())
    assert 1 < score < 8
    assert vendi_score(features[::-1], rbf()) == pytest.approx(score)
    assert vendi_score(np.concatenate([features, features]), rbf()) == pytest.approx(score)
    assert vendi_score(2 * features, rbf(2)) == pytest.approx(score), "only distance over width counts"
    assert vendi_score(2 * features, rbf()) > score
    assert math.isnan(vendi_score(features[:0], rbf()))


def test_pixel_distance_is_the_loop_over_all_pairs() -> None:
    groups = random(3, 6, 10)
    expected = [
        math.sqrt(np.mean([(a - b).square().mean().item() for a, b in combinations(group.double(), 2)]))
        for group in groups
    ]
    torch.testing.assert_close(pixel_distance(groups), torch.tensor(expected, dtype=torch.float64))
    assert pixel_distance(groups[:, :1].repeat(1, 4, 1)).tolist() == [0, 0, 0]
    black_and_white = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert pixel_distance(black_and_white).item() == pytest.approx(1)
    assert pixel_distance(groups[:, :1]).isnan().all(), "one picture differs from no other"


def test_thumbnails_keep_composition_and_lose_noise() -> None:
    flat = random(4, 3, 1, 1).expand(4, 3, 64, 48)
    torch.testing.assert_close(thumbnails(flat), flat[:, :, :1, :1].expand(4, 3, 16, 16).flatten(1))
    noisy = flat + 0.1 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    # An average over 4 x 3 pixels has 1 / sqrt(12) of their standard deviation.
    assert (thumbnails(noisy) - thumbnails(flat)).std().item() == pytest.approx(0.1 / 12**0.5, rel=0.05)
    assert thumbnails(random(2, 3, 8, 8)).shape == (2, 3 * THUMBNAIL**2), "smaller pictures work, too"


def test_without_features_a_prompt_is_judged_by_its_pixels() -> None:
    grey = torch.full((1, 4, 6), 0.5)
    steps = grey + PIXEL_WIDTH * torch.arange(4.0).view(1, 4, 1)
    found = measure_diversity(torch.cat([grey, steps]))
    assert (found.features, found.samples, found.prompts) == ("pixels", 4, 2)
    assert found.vendi[0] == pytest.approx(1)
    assert found.vendi[1] == pytest.approx(vendi_score(np.arange(4.0)[:, None], rbf())), "a step is one width"
    assert found.pixel_distance[0] == 0


def test_broken_samples_are_left_out_and_lone_ones_have_no_diversity() -> None:
    pictures, features = random(2, 4, 6), random(2, 4, 3, seed=1)
    features[0, 1], pictures[0, 2], features[1, 1:] = torch.nan, torch.inf, torch.nan
    found = measure_diversity(pictures, features, "mine")
    whole = measure_diversity(pictures[:1, [0, 3]], features[:1, [0, 3]], "mine")
    assert found.vendi[0] == whole.vendi[0]
    assert found.pixel_distance[0] == whole.pixel_distance[0]
    assert found.features == "mine"
    assert math.isnan(found.vendi[1])
    assert math.isnan(found.pixel_distance[1])


def circle(x: float, y: float, radius: float = 7.0, colour: str = "red") -> Placement:
    return Placement(colour, "circle", x, y, radius)


def described(scene: Scene, *pictures: tuple[Placement, ...]) -> Tensor:
    return attributes(tensor([render(picture, 48) for picture in pictures]), [scene] * len(pictures))


ONE = Scene((SceneObject("red", "circle"),))
TWO = Scene((SceneObject("red", "circle", 2),))
PAIR = Scene((SceneObject("red", "circle"), SceneObject("blue", "circle")), "above")


def test_a_unit_is_a_move_or_a_growth_of_a_single_object() -> None:
    unit = 48 * POSITION_UNIT
    here, right, diagonal, larger = described(
        ONE,
        (circle(20, 20),),
        (circle(20 + unit, 20),),
        (circle(20 + unit, 20 + unit),),
        (circle(20, 20, 7 + 48 * RADIUS_UNIT),),
    )
    assert (right - here).norm().item() == pytest.approx(1, rel=0.05)
    assert (diagonal - here).norm().item() == pytest.approx(2**0.5, rel=0.05)
    assert (larger - here).norm().item() == pytest.approx(1, rel=0.1)


def test_copies_have_no_order_and_no_jump_where_they_would_swap() -> None:
    """Ordered by x, two circles above each other would change places with every tremble."""
    upright, left, right = described(
        TWO,
        (circle(24.0, 12), circle(24.0, 36)),
        (circle(23.5, 12), circle(24.5, 36)),
        (circle(24.5, 12), circle(23.5, 36)),
    )
    tremble = 0.5 / 48 / POSITION_UNIT
    for other in (left, right):
        assert (other - upright).norm().item() < 1.5 * tremble
    swapped = described(TWO, (circle(24, 36), circle(24, 12)), (circle(24, 12), circle(24, 36)))
    torch.testing.assert_close(swapped[0], swapped[1])


def test_a_step_of_all_objects_is_one_unit_however_many_there_are() -> None:
    shift = 0.5 * 48 * POSITION_UNIT
    first = (circle(24, 12, 5), circle(24, 36, 5, "blue"))
    moved = tuple(replace(placed, x=placed.x + shift) for placed in first)
    here, there = described(PAIR, first, moved)
    assert (there - here).norm().item() == pytest.approx(0.5, rel=0.1)


def test_missing_objects_are_described_alike_and_unlike_those_that_are_there() -> None:
    empty, other_colour, full_frame, there = described(
        ONE, (), (circle(10, 10, colour="blue"),), (circle(24, 24, 60),), (circle(24, 24),)
    )
    assert torch.equal(empty, torch.zeros(NUM_ATTRIBUTES, dtype=torch.float64))
    assert torch.equal(other_colour, empty)
    assert torch.equal(full_frame, empty), "a frame full of colour is no object"
    assert (there - empty).norm().item() > 3, "even in the centre, where a missing object is put"
    one_of_two, two_of_two = described(TWO, (circle(12, 12),), (circle(12, 12), circle(36, 36)))
    assert (one_of_two - two_of_two).norm().item() > 2


def test_every_scene_is_described_and_a_broken_picture_is_nan() -> None:
    images = draw(WANTED, 1)
    images[3, 0, 5, 5] = torch.nan
    found = attributes(images, WANTED)
    assert found.shape == (len(WANTED), NUM_ATTRIBUTES)
    assert found[3].isnan().all()
    assert found[[i for i in range(len(WANTED)) if i != 3]].isfinite().all()


@pytest.mark.parametrize(("spread", "expected"), [(1.0, 6.8), (0.3, 2.3), (0.1, 1.2), (0.0, 1.0)])
def test_the_scale_of_the_score_on_pictures_that_are_drawn_together(spread: float, expected: float) -> None:
    """The numbers of docs/rewards.md: mean Vendi score of 8 placements, drawn towards the first one, of 30 captions."""
    generator, scores = rng(5), []
    for scene in split_scenes("test")[:30]:
        first, *others = [place(scene, 48, generator) for _ in range(8)]
        near = [tuple(between(a, b, spread) for a, b in zip(first, other, strict=True)) for other in (first, *others)]
        images = tensor([render(placements, 48) for placements in near])
        scores.append(vendi_score(attributes(images, [scene] * 8).numpy(), rbf()))
    assert np.mean(scores) == pytest.approx(expected, abs=0.1)


def between(start: Placement, end: Placement, share: float) -> Placement:
    def mix(a: float, b: float) -> float:
        return a + share * (b - a)

    return replace(start, x=mix(start.x, end.x), y=mix(start.y, end.y), radius=mix(start.radius, end.radius))


class Described(Reward):
    """A reward whose features are as told."""

    name = "described"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __call__(self, images: Tensor, prompts: object) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def features(self, images: Tensor, prompts: object) -> Tensor | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_first_reward_with_features_describes() -> None:
    images, prompts = torch.full((2, 3, 48, 48), BACKGROUND[0]), [Prompt("", 0, ONE.metadata)] * 2
    plain, mine = Described(None), Described(torch.ones(2, 4, dtype=torch.float64))
    assert RewardSet.of((plain, 1.0)).features(images, prompts) is None
    plain.name = "plain"
    found = RewardSet.of((plain, 1.0), (mine, 0.0), (ShapesReward(), 1.0)).features(images, prompts)
    assert found.reward == "described"
    assert found.values.dtype == torch.float32
    shapes = RewardSet.of((plain, 1.0), (ShapesReward(), 1.0)).features(images, prompts)
    assert (shapes.reward, shapes.values.shape) == ("shapes", (2, NUM_ATTRIBUTES))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (ValueError("no weights"), RewardError, "'described' raised ValueError: no weights"),
        (torch.ones(3, 4), UserError, r"a tensor \[3, 4\].*\[2, F\]"),
        (torch.ones(2), UserError, r"a tensor \[2\]"),
        ([[1.0], [2.0]], UserError, "are a list"),
    ],
)
def test_wrong_features_are_refused(answer: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RewardSet.of((Described(answer), 1.0)).features(torch.zeros(2, 3, 8, 8), [Prompt("", 0)] * 2)
