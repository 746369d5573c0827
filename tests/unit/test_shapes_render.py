from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from shapes_pictures import OPPOSITE, rng

from calibri_lightning.shapes.captions import COLOURS, RELATIONS, SHAPES, Relation, Scene, SceneObject, scenes
from calibri_lightning.shapes.render import (
    BACKGROUND,
    PALETTE,
    SQUARE_SIDE,
    TRIANGLE_RADIUS,
    Placement,
    holds,
    place,
    render,
    signed_distance,
)

AREAS = {
    "circle": lambda r: np.pi * r**2,
    "square": lambda r: (2 * SQUARE_SIDE * r) ** 2,
    "triangle": lambda r: 0.75 * np.sqrt(3) * (TRIANGLE_RADIUS * r) ** 2,
}


@pytest.fixture(scope="module")
def placed() -> list[tuple[Scene, int, tuple[Placement, ...]]]:
    draw = rng(0)
    chosen = [scenes()[i] for i in draw.integers(len(scenes()), size=300)] + [s for s in scenes() if not s.relation] * 2
    return [(scene, size, place(scene, size, draw)) for scene in chosen for size in (32, 48)]


def test_placements_show_what_the_scene_asks_for(placed: list[tuple[Scene, int, tuple[Placement, ...]]]) -> None:
    for scene, _, objects in placed:
        wanted = [(o.colour, o.shape) for o in scene.objects for _ in range(o.count)]
        assert [(p.colour, p.shape) for p in objects] == wanted


def test_placements_lie_inside_the_picture(placed: list[tuple[Scene, int, tuple[Placement, ...]]]) -> None:
    for _, size, objects in placed:
        for p in objects:
            # Every shape lies within the triangle's circumradius, the longest reach of all.
            reach = TRIANGLE_RADIUS * p.radius
            assert reach <= min(p.x, p.y)
            assert max(p.x, p.y) <= size - reach


def test_placements_do_not_overlap(placed: list[tuple[Scene, int, tuple[Placement, ...]]]) -> None:
    for _, _, objects in placed:
        for a, b in combinations(objects, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= TRIANGLE_RADIUS * (a.radius + b.radius) - 1e-9


def test_placements_satisfy_the_relation(placed: list[tuple[Scene, int, tuple[Placement, ...]]]) -> None:
    truths = {
        "above": lambda a, b: b.y - a.y > abs(b.x - a.x) - 1e-9,
        "below": lambda a, b: a.y - b.y > abs(b.x - a.x) - 1e-9,
        "left of": lambda a, b: b.x - a.x > abs(b.y - a.y) - 1e-9,
        "right of": lambda a, b: a.x - b.x > abs(b.y - a.y) - 1e-9,
    }
    assert {scene.relation for scene, _, _ in placed} == {None, *RELATIONS}
    for scene, _, objects in placed:
        if scene.relation:
            assert truths[scene.relation](*objects)


def test_placing_is_a_function_of_the_generator(untouched_rng: None) -> None:
    scene = Scene((SceneObject("red", "circle", 4),))
    assert place(scene, 48, rng(5)) == place(scene, 48, rng(5)) != place(scene, 48, rng(6))


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_excludes_its_opposite(relation: Relation) -> None:
    offsets = rng(1).normal(size=(1000, 2)) * 20
    distance = np.full(1000, 1.0)
    first = holds(relation, offsets, distance)
    # Seen from the other object, the opposite relation holds.
    np.testing.assert_array_equal(first, holds(OPPOSITE[relation], -offsets, distance))
    assert not (first & holds(OPPOSITE[relation], offsets, distance)).any()
    assert first.any()


def test_every_clear_offset_has_a_relation() -> None:
    offsets = rng(2).normal(size=(1000, 2)) * 20
    total = sum(holds(relation, offsets, np.zeros(1000)).astype(int) for relation in RELATIONS)
    np.testing.assert_array_equal(total, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [4.5, 8.0, 12.5])
def test_coverage_adds_up_to_the_analytic_area(shape: str, radius: float) -> None:
    y, x = np.mgrid[0:48, 0:48] + 0.5
    for dx, dy in rng(3).random((8, 2)):
        distance = signed_distance(shape, x - 23.5 - dx, y - 23.5 - dy, radius)
        # The ramp is exact on average along edges and a little generous at corners.
        assert np.clip(0.5 - distance, 0, 1).sum() == pytest.approx(AREAS[shape](radius), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_inside_has_the_analytic_area(shape: str) -> None:
    y, x = np.mgrid[-20:20:801j, -20:20:801j]
    assert (signed_distance(shape, x, y, 10.0) < 0).mean() * 40.05**2 == pytest.approx(AREAS[shape](10.0), rel=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distance_has_unit_slope_and_never_overstates(shape: str) -> None:
    y, x = np.mgrid[-20:20:401j, -20:20:401j]
    distance = signed_distance(shape, x, y, 10.0)
    slope = np.hypot(*np.gradient(distance, 0.1))
    # Kinks, where two edges are equally near, and the circle's centre have no slope.
    assert np.mean(np.abs(slope - 1) < 0.01) > 0.97
    assert slope.max() <= 1 + 1e-6


def test_the_three_shapes_have_nearly_the_same_area() -> None:
    areas = [AREAS[shape](1.0) for shape in SHAPES]
    assert max(areas) / min(areas) < 1.3


def test_triangles_stand_on_their_base() -> None:
    assert signed_distance("triangle", np.array([0.0]), np.array([-12.0]), 10.0)[0] < 0
    assert signed_distance("triangle", np.array([0.0]), np.array([12.0]), 10.0)[0] > 0
    # The apex is one circumradius above the centre.
    apex = signed_distance("triangle", np.array([0.0]), np.array([-10 * TRIANGLE_RADIUS]), 10.0)
    assert apex[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("colour", COLOURS)
def test_objects_have_their_palette_colour_on_the_background(colour: str) -> None:
    picture = render((Placement(colour, "square", 24, 24, 10),), 48)
    assert picture.dtype == np.float32
    assert picture.shape == (48, 48, 3)
    np.testing.assert_allclose(picture[24, 24], PALETTE[colour], atol=1e-6)
    np.testing.assert_allclose(picture[2, 2], BACKGROUND, atol=1e-6)


def test_y_points_down() -> None:
    picture = render((Placement("black", "circle", 12, 36, 6),), 48)
    np.testing.assert_allclose(picture[36, 12], PALETTE["black"], atol=1e-6)
    np.testing.assert_allclose(picture[12, 36], BACKGROUND, atol=1e-6)


def test_pictures_stay_in_range(placed: list[tuple[Scene, int, tuple[Placement, ...]]]) -> None:
    for _, size, objects in placed[:100]:
        picture = render(objects, size)
        assert picture.min() >= 0
        assert picture.max() <= 1


def test_nothing_drawn_is_the_background() -> None:
    np.testing.assert_array_equal(render((), 16), np.broadcast_to(np.float32(BACKGROUND), (16, 16, 3)))
