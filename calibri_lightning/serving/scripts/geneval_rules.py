"""GenEval's rules: does a picture hold the objects that its prompt names, in number, colour and place?

Ghosh et al., arXiv 2310.11513, section 3. The metadata of a prompt are those of the benchmark: {"tag": "counting",
"include": [{"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]}], "exclude": [{"class": "dog",
"count": 3}]}. All include clauses and no exclude clause must hold; a position is relative to the objects of an earlier
include clause, by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The colours that prompts name."""
RELATIONS = ("left of", "right of", "above", "below")
"""The relations that prompts name."""
_RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_POSITION_THRESHOLD = 0.1
_MIN_DIRECTION = 0.5


@dataclass(frozen=True)
class Found:
    """An object of a picture.

    Attributes:
        box: x0, y0, x1, y1 in pixels, y downwards.
        mask: Which pixels it covers, bool [H, W].
    """

    box: NDArray[np.floating[Any]]
    mask: NDArray[np.bool_] | None = None


ClassifyColours = Callable[[Sequence[Found], str], list[str]]
"""Objects and their class to the colour of each."""


@dataclass(frozen=True)
class Verdict:
    """What a picture is worth.

    Attributes:
        correct: Whether the benchmark counts it: at least as many objects as asked for, and no exclude clause broken.
        strict: Whether it also holds no more of them than asked for.
        partial: 0 to 1: how many of the conditions hold, counts by degree.
    """

    correct: bool
    strict: bool
    partial: float


def class_names(detector: Sequence[str]) -> list[str]:
    """Names a detector's classes as the benchmark does.

    Args:
        detector: The names of COCO.

    Returns:
        The names in the same order.
    """
    return [_RENAMED.get(name, name) for name in detector]


def problem_of(metadata: Mapping[str, Any], classes: Sequence[str]) -> str | None:
    """Looks for what is wrong with a prompt's metadata.

    Args:
        metadata: Of one prompt.
        classes: What the detector knows.

    Returns:
        What is wrong; None if nothing is.
    """
    include = metadata.get("include")
    if not isinstance(include, list) or not include or not isinstance(metadata.get("exclude", []), list):
        return "there is no list 'include' of what the picture should hold, as in GenEval's evaluation_metadata.jsonl"
    for number, clause in enumerate([*include, *metadata.get("exclude", [])]):
        if not isinstance(clause, Mapping) or clause.get("class") not in classes:
            return f"{clause!r} names no class that the detector knows"
        count = clause.get("count")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            return f"{clause!r} has no count from 1 up"
        if clause.get("color", COLOURS[0]) not in COLOURS:
            return f"{clause!r} names none of the colours {', '.join(COLOURS)}"
        if "position" in clause and not _is_position(clause["position"], number):
            return f"{clause!r} has no position [relation, number of an earlier include clause]"
    return None


def judge(metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Found]], colours: ClassifyColours) -> Verdict:
    """Judges a picture.

    Args:
        metadata: Of its prompt.
        objects: What was found, by class, the surest first.
        colours: Tells the colours of objects.

    Returns:
        The verdict.
    """
    told: dict[tuple[str, int], list[str]] = {}

    def remembered(found: Sequence[Found], name: str) -> list[str]:
        key = (name, len(found))
        if key not in told:
            told[key] = colours(found, name)
        return told[key]

    excluded = any(len(objects.get(clause["class"], ())) >= clause["count"] for clause in metadata.get("exclude", []))
    lenient = _credits(metadata, objects, remembered, exact=False)
    strict = _credits(metadata, objects, remembered, exact=True)
    return Verdict(
        correct=not excluded and all(credit == 1 for credit in lenient),
        strict=not excluded and all(credit == 1 for credit in strict),
        partial=sum(strict) / len(strict),
    )


def _credits(
    metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Found]], colours: ClassifyColours, exact: bool
) -> list[float]:
    """What each condition earns, 0 to 1, in the order of the clauses: count, then colour and position where asked for.

    Flow-GRPO's reward server has the same conditions, but lets surplus objects earn less than 0 and gives a wrong
    position half of what a right one earns.
    """
    earned: list[float] = []
    groups: list[Sequence[Found]] = []
    for clause in metadata["include"]:
        count, name = clause["count"], clause["class"]
        found = objects.get(name, ())
        found = found if exact else found[:count]
        credits = [max(0.0, 1 - abs(count - len(found)) / count)]
        if "color" in clause:
            right = colours(found, name).count(clause["color"]) if len(found) == count else 0
            credits.append(right / count)
        if "position" in clause:
            relation, target = clause["position"]
            held = all(credit == 1 for credit in credits) and bool(groups[target])
            pairs = ((one, other) for one in found for other in groups[target])
            credits.append(float(held and all(relation in relations(one, other) for one, other in pairs)))
        groups.append(found if all(credit == 1 for credit in credits) else ())
        earned += credits
    return earned


def relations(one: Found, other: Found) -> set[str]:
    """Tells where an object is, seen from another; near ones have no relation (section 3.2).

    Args:
        one: The object.
        other: Where it is seen from.

    Returns:
        Some of `RELATIONS`: one, two for diagonal places, or none.
    """
    boxes = np.stack([one.box[:4], other.box[:4]]).astype(float).reshape(2, 2, 2)
    centres, sizes = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    # What remains of the distance beyond a tenth of both sizes.
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - _POSITION_THRESHOLD * sizes.sum(axis=0), 0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = (x < -_MIN_DIRECTION, x > _MIN_DIRECTION, y < -_MIN_DIRECTION, y > _MIN_DIRECTION)
    return {relation for relation, holds in zip(RELATIONS, held, strict=True) if holds}


def _is_position(position: object, number: int) -> bool:
    if not isinstance(position, Sequence) or len(position) != 2 or position[0] not in RELATIONS:
        return False
    target = position[1]
    return isinstance(target, int) and not isinstance(target, bool) and 0 <= target < number
