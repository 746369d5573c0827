"""The caption grammar of the `shapes` model, and which captions training never sees.

A scene is one object, two to four copies of an object, or two objects in a spatial relation:
"a red circle", "three green triangles", "a red circle above a blue square". Its meaning travels as structured metadata
with each prompt, so that the checker never parses text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Literal

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt

Split = Literal["train", "val", "test"]
Relation = Literal["above", "below", "left of", "right of"]

COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
RELATIONS: tuple[Relation, ...] = ("above", "below", "left of", "right of")
NUMBERS: tuple[str, ...] = ("a", "two", "three", "four")

HELD_OUT_OBJECTS: frozenset[tuple[str, str]] = frozenset(
    {("orange", "triangle"), ("purple", "circle"), ("black", "square")}
)
"""Objects (colour, shape) that training never shows in any number or relation."""

_ALL_WORDS = ("an", *NUMBERS, *COLOURS, *SHAPES, *(shape + "s" for shape in SHAPES), *" ".join(RELATIONS).split())
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys(_ALL_WORDS))
"""Every word a caption can hold."""


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene: `count` copies of a coloured shape."""

    colour: str
    shape: str
    count: int = 1

    def __str__(self) -> str:
        """The noun phrase: "a red circle", "an orange circle", "two red circles"."""
        return f"an {self.key[2:]}" if self.key.startswith("a o") else self.key

    @property
    def key(self) -> str:
        """The phrase without regard to grammar ("a orange circle"): what the splits are keyed by."""
        return f"{NUMBERS[self.count - 1]} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for; with a relation, objects[0] stands in that relation to objects[1]."""

    objects: tuple[SceneObject, ...]
    relation: Relation | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Scene:
        """Reads a scene from a prompt's metadata.

        Args:
            metadata: {"objects": [{"colour": "red", "shape": "circle", "count": 1}, ...], "relation": "above"}, one
                object, or two and a relation.

        Returns:
            The scene.

        Raises:
            UserError: If the metadata describes no scene of the grammar.
        """
        try:
            objects = tuple(SceneObject(**item) for item in metadata["objects"])
            # The grammar's own instance: a count that a table stored as 2.0 equals 2, but cannot index.
            return _by_value()[cls(objects, metadata.get("relation"))]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"The prompt's metadata {dict(metadata)!r} describes no scene. The shapes reward needs "
                '{"objects": [{"colour": "red", "shape": "circle", "count": 1}]} with a count of 1 to 4, or two '
                'different objects, each with a count of 1, and a "relation"; '
                f"colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; relations: {', '.join(RELATIONS)}. "
                "Use the prompts shapes:train, shapes:val, shapes:test, or a .jsonl file with such metadata."
            ) from error

    @property
    def metadata(self) -> dict[str, object]:
        """The scene as JSON-ready metadata of a prompt; `from_metadata` reads it back."""
        objects = [{"colour": o.colour, "shape": o.shape, "count": o.count} for o in self.objects]
        return {"objects": objects, "relation": self.relation, "kind": self.kind}

    @property
    def caption(self) -> str:
        """The caption, e.g. "a red circle above a blue square"."""
        return f" {self.relation} ".join(map(str, self.objects))

    @property
    def key(self) -> str:
        """What the splits are keyed by."""
        return f" {self.relation} ".join(o.key for o in self.objects)

    @property
    def kind(self) -> Literal["single", "count", "relation"]:
        """The kind of scene, for reports by kind."""
        if self.relation:
            return "relation"
        return "count" if self.objects[0].count > 1 else "single"


@cache
def scenes() -> tuple[Scene, ...]:
    """All scenes of the grammar, in a fixed order: 24 single, 72 counted, 2,208 related."""
    objects = list(product(COLOURS, SHAPES))
    counted = [Scene((SceneObject(colour, shape, count),)) for count in (1, 2, 3, 4) for colour, shape in objects]
    related = [
        Scene((SceneObject(*first), SceneObject(*second)), relation)
        for first, second, relation in product(objects, objects, RELATIONS)
        if first != second
    ]
    return (*counted, *related)


@cache
def _by_value() -> dict[Scene, Scene]:
    return {scene: scene for scene in scenes()}


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to: a pure function of what it shows.

    Held out are every scene with an object of `HELD_OUT_OBJECTS`, a quarter of the counted and 40 % of the related
    scenes; they are shared between `val` (a third) and `test`.

    Args:
        scene: The scene.

    Returns:
        "train", "val" or "test".
    """
    digest = hashlib.sha256(scene.key.encode()).digest()
    unseen = any((o.colour, o.shape) in HELD_OUT_OBJECTS for o in scene.objects)
    share = {"single": 0.0, "count": 0.25, "relation": 0.4}[scene.kind]
    if not unseen and int.from_bytes(digest[:8], "big") >= share * 2**64:
        return "train"
    return "val" if digest[8] < 256 // 3 else "test"


@cache
def split_scenes(split: Split) -> tuple[Scene, ...]:
    """The scenes of a split, shuffled deterministically so that its first N are a fair sample.

    Args:
        split: Which split.

    Returns:
        Its scenes.
    """
    chosen = [scene for scene in scenes() if split_of(scene) == split]
    return tuple(sorted(chosen, key=lambda s: hashlib.sha256(b"order:" + s.key.encode()).digest()))


def prompts(split: Split) -> tuple[Prompt, ...]:
    """The prompts of a split, each with its scene as metadata.

    Counted and single scenes are few beside 2,208 related ones; each of them stands in the list as it is, and users who
    want another balance pass a file of their own.

    Args:
        split: Which split.

    Returns:
        One prompt a scene.
    """
    return tuple(Prompt(s.caption, index, s.metadata) for index, s in enumerate(split_scenes(split)))
