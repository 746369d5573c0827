"""GenEval's rules on scenes whose verdicts follow from the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from calibri_lightning.serving.scripts.geneval_rules import Found, class_names, judge, problem_of, relations


def box(x: float, y: float, size: float = 10) -> Found:
    """A square around a centre."""
    return Found(np.array([x - size / 2, y - size / 2, x + size / 2, y + size / 2]))


def no_colours(some: Sequence[Found], name: str) -> list[str]:
    raise AssertionError("no colour was asked for")


def verdict(metadata: dict[str, Any], objects: dict[str, list[Found]], colours: Any = no_colours) -> tuple[Any, ...]:
    found = judge(metadata, objects, colours)
    return found.correct, found.strict, pytest.approx(found.partial)


def dogs(count: int) -> dict[str, list[Found]]:
    return {"dog": [box(20 * number, 0) for number in range(count)]}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, (False, False, 0)),
        (1, (False, False, 0.5)),
        (2, (True, True, 1)),
        (3, (False, False, 0.5)),
        (4, (False, False, 0)),
        # Flow-GRPO's server would give -1 here.
        (6, (False, False, 0)),
    ],
)
def test_counting(count: int, expected: tuple[bool, bool, float]) -> None:
    metadata = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert verdict(metadata, dogs(count)) == expected


def test_surplus_objects_are_correct_where_none_are_excluded_and_not_strictly_so() -> None:
    assert verdict({"include": [{"class": "dog", "count": 1}]}, dogs(2)) == (True, False, 0)


def test_colours_of_the_surest_objects_count() -> None:
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}

    def colours(some: Sequence[Found], name: str) -> list[str]:
        assert name == "dog"
        return ["red" if each.box[0] < 0 else "blue" for each in some]

    assert verdict(metadata, {"dog": [box(-20, 0), box(-40, 0)]}, colours) == (True, True, 1)
    assert verdict(metadata, {"dog": [box(-20, 0), box(40, 0)]}, colours) == (False, False, (1 + 0.5) / 2)
    # A third, less sure one is not looked at by the benchmark, and spoils the strict count.
    assert verdict(metadata, {"dog": [box(-20, 0), box(-40, 0), box(40, 0)]}, colours) == (True, False, 0.25)
    assert verdict(metadata, {"dog": [box(-20, 0)]}, colours) == (False, False, 0.25)


def test_positions_are_relative_to_an_earlier_object() -> None:
    metadata = {
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    }
    assert verdict(metadata, {"cat": [box(0, 0)], "dog": [box(-50, 0)]}) == (True, True, 1)
    # A wrong place earns nothing: 2 of 3 conditions hold. Flow-GRPO's server would give half of the third.
    assert verdict(metadata, {"cat": [box(0, 0)], "dog": [box(50, 0)]}) == (False, False, 2 / 3)
    assert verdict(metadata, {"dog": [box(-50, 0)]}) == (False, False, 1 / 3)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((-50, 0), {"left of"}),
        ((50, 0), {"right of"}),
        ((0, -50), {"above"}),
        ((0, 50), {"below"}),
        ((50, 50), {"right of", "below"}),
        # Of a way of 112 pixels, 48 are sideways: less than half.
        ((50, 100), {"below"}),
        # A tenth of both sizes is 2 pixels.
        ((1.9, 0), set()),
        ((0, 0), set()),
    ],
)
def test_relations(place: tuple[float, float], expected: set[str]) -> None:
    assert relations(box(*place), box(0, 0)) == expected


def test_classes_are_named_as_in_the_benchmark() -> None:
    assert class_names(["dog", "mouse", "remote", "keyboard"]) == [
        "dog",
        "computer mouse",
        "tv remote",
        "computer keyboard",
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "no list 'include'"),
        ({"include": []}, "no list 'include'"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "no class"),
        ({"include": [{"class": "dog"}]}, "no count"),
        ({"include": [{"class": "dog", "count": True}]}, "no count"),
        ({"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "none of the colours"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "no position"),
        ({"include": [{"class": "dog", "count": 1}], "exclude": ["dog"]}, "no class"),
    ],
)
def test_wrong_metadata_are_told(metadata: dict[str, Any], words: str) -> None:
    assert words in str(problem_of(metadata, ["dog"]))


def test_metadata_of_the_benchmark_are_fine() -> None:
    metadata = {
        "tag": "color_attr",
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 1, "position": ["above", 0]},
        ],
        "exclude": [{"class": "dog", "count": 2}],
    }
    assert problem_of(metadata, ["dog", "cat"]) is None
