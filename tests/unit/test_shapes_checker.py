"""A true picture is right, another scene's picture is wrong, and corruption costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes_pictures import CHECKER, OPPOSITE, PAPER, SIZE, WANTED, draw, noisy, rng, tensor, true_pictures, true_scores
from torch import Tensor
from torch.nn import functional

from calibri_lightning.shapes.captions import COLOURS, SHAPES, Relation, Scene, SceneObject, scenes
from calibri_lightning.shapes.checker import relation_margin
from calibri_lightning.shapes.render import RELATION_AXES, Placement, render


def test_a_drawn_scene_satisfies_itself() -> None:
    many = [scenes()[i] for i in rng(2).integers(len(scenes()), size=300)] + [s for s in scenes() if not s.relation]
    scores = CHECKER.score(draw(many, 3), many)
    assert scores.strict.mean() >= 0.97
    assert scores.soft.mean() > 0.85
    assert scores.soft.min() > 0.55


@pytest.mark.parametrize("size", [32, 64, 96])
def test_other_resolutions_score_alike(size: int) -> None:
    scores = CHECKER.score(draw(WANTED, 4, size), WANTED)
    assert scores.strict.mean() >= 0.9
    assert scores.soft.mean() >= 0.85


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
def test_another_scene_is_never_strictly_right(change: Callable[[Scene, int], Scene | None]) -> None:
    pairs = [(scene, change(scene, step)) for step, scene in enumerate(WANTED * 2)]
    asked = [scene for scene, shown in pairs if shown]
    scores = CHECKER.score(draw([shown for _, shown in pairs if shown], 5), asked)
    assert len(asked) > 25
    assert scores.strict.sum() == 0
    # One wrong attribute among many right ones is enough: what is right elsewhere does not make up for it.
    assert scores.soft.mean() < 0.25 * true_scores().soft.mean()


def test_a_third_object_is_wrong() -> None:
    singles = [scene for scene in WANTED if scene.kind == "single"]
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


# Corruption costs, the more the worse, and mild corruption is forgiven.


def faded(images: Tensor, amount: float) -> Tensor:
    return torch.lerp(images, PAPER.expand_as(images), amount)


def blur(images: Tensor, sigma: float) -> Tensor:
    steps = torch.arange(-24.0, 25.0)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = functional.pad(images, (24,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def blurred(images: Tensor, amount: float) -> Tensor:
    return blur(images, 6 * amount) if amount else images


@pytest.mark.parametrize("corrupt", [faded, noisy, blurred])
def test_growing_corruption_never_pays(corrupt: Callable[[Tensor, float], Tensor]) -> None:
    means = [
        float(CHECKER.score(corrupt(true_pictures(), amount), WANTED).soft.mean()) for amount in (0, 0.25, 0.5, 0.75, 1)
    ]
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
def test_mild_corruption_is_forgiven(name: str) -> None:
    scores = CHECKER.score(MILD[name](true_pictures()), WANTED)
    assert scores.strict.mean() >= 0.85
    assert scores.soft.mean() >= 0.82
