from __future__ import annotations

import json
from collections import Counter
from typing import get_args

import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.shapes.captions import (
    COLOURS,
    HELD_OUT_OBJECTS,
    RELATIONS,
    SHAPES,
    VOCABULARY,
    Relation,
    Scene,
    SceneObject,
    Split,
    prompts,
    scenes,
    split_of,
    split_scenes,
)

SPLITS: tuple[Split, ...] = get_args(Split)
PINNED_SIZES = [1060, 392, 852]
PINNED_FIRST = [
    "a red square left of a red circle",
    "a purple circle above a black square",
    "a green circle above a yellow triangle",
]


def test_the_grammar_counts_what_it_says() -> None:
    assert Counter(scene.kind for scene in scenes()) == {"single": 24, "count": 72, "relation": 24 * 23 * 4}
    captions = [scene.caption for scene in scenes()]
    assert len(set(captions)) == len(set(scenes())) == len(scenes())
    assert get_args(Relation) == RELATIONS


def test_splits_are_disjoint_and_complete() -> None:
    parts = [split_scenes(split) for split in SPLITS]
    assert sum(map(len, parts)) == len(scenes())
    assert set().union(*parts) == set(scenes())
    assert all(split_of(scene) == split for split, part in zip(SPLITS, parts, strict=True) for scene in part)


def test_training_never_shows_a_held_out_object() -> None:
    shown = {(o.colour, o.shape) for scene in split_scenes("train") for o in scene.objects}
    assert not shown & HELD_OUT_OBJECTS
    assert shown | HELD_OUT_OBJECTS == {(colour, shape) for colour in COLOURS for shape in SHAPES}


def test_training_shows_every_word_and_every_relation() -> None:
    words = {word for scene in split_scenes("train") for word in scene.caption.split()}
    assert words == set(VOCABULARY)
    assert {scene.relation for scene in split_scenes("train")} == {None, *RELATIONS}


def test_held_out_shares_are_what_the_docstring_says() -> None:
    def seen(scene: Scene) -> bool:
        return all((o.colour, o.shape) not in HELD_OUT_OBJECTS for o in scene.objects)

    held_out = Counter(s.kind for s in scenes() if seen(s) and split_of(s) != "train")
    in_all = Counter(s.kind for s in scenes() if seen(s))
    assert held_out["single"] == 0
    assert held_out["count"] / in_all["count"] == pytest.approx(0.25, abs=0.1)
    assert held_out["relation"] / in_all["relation"] == pytest.approx(0.4, abs=0.03)
    num_val, num_test = len(split_scenes("val")), len(split_scenes("test"))
    assert num_val / (num_val + num_test) == pytest.approx(1 / 3, abs=0.03)


def test_the_splits_are_pinned() -> None:
    # The shipped model was trained on this split: another one would put training captions into the test set.
    assert [len(split_scenes(split)) for split in SPLITS] == PINNED_SIZES
    assert [split_scenes(split)[0].caption for split in SPLITS] == PINNED_FIRST


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((SceneObject("red", "circle"),)), "a red circle"),
        (Scene((SceneObject("orange", "triangle"),)), "an orange triangle"),
        (Scene((SceneObject("orange", "square", 4),)), "four orange squares"),
        (Scene((SceneObject("green", "triangle", 3),)), "three green triangles"),
        (
            Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), "above"),
            "a red circle above a blue square",
        ),
        (
            Scene((SceneObject("orange", "circle"), SceneObject("orange", "square")), "left of"),
            "an orange circle left of an orange square",
        ),
    ],
)
def test_captions_read_as_english(scene: Scene, caption: str) -> None:
    assert scene.caption == caption
    assert scene in scenes()


def test_no_caption_has_the_wrong_article() -> None:
    assert not any("a orange" in scene.caption or "an " in scene.caption.replace("an orange", "") for scene in scenes())


def test_every_scene_survives_json() -> None:
    for scene in scenes():
        assert Scene.from_metadata(json.loads(json.dumps(scene.metadata))) == scene


def test_counts_that_a_table_stored_as_floats_become_integers() -> None:
    scene = Scene.from_metadata({"objects": [{"colour": "red", "shape": "circle", "count": 2.0}], "relation": None})
    assert scene.caption == "two red circles"
    assert type(scene.objects[0].count) is int


def test_a_count_of_one_may_be_left_out() -> None:
    assert Scene.from_metadata({"objects": [{"colour": "red", "shape": "circle"}]}).caption == "a red circle"


RED = {"colour": "red", "shape": "circle", "count": 1}
BLUE = {"colour": "blue", "shape": "square", "count": 1}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"objects": []},
        {"objects": None},
        {"objects": "red circle"},
        {"objects": 3},
        {"objects": [["red", "circle", 1]]},
        {"objects": [{"colour": "red"}]},
        {"objects": [{**RED, "size": 3}]},
        {"objects": [{**RED, "colour": "mauve"}]},
        {"objects": [{**RED, "colour": ["red"]}]},
        {"objects": [{**RED, "shape": "circles"}]},
        {"objects": [{**RED, "count": 0}]},
        {"objects": [{**RED, "count": 5}]},
        {"objects": [{**RED, "count": 1.5}]},
        {"objects": [{**RED, "count": float("nan")}]},
        {"objects": [{**RED, "count": "two"}]},
        {"objects": [RED, BLUE]},
        {"objects": [RED, BLUE], "relation": "beside"},
        {"objects": [RED, BLUE], "relation": ["above"]},
        {"objects": [RED], "relation": "above"},
        {"objects": [RED, BLUE, RED], "relation": "above"},
        {"objects": [{**RED, "count": 2}, BLUE], "relation": "above"},
        {"objects": [RED, RED], "relation": "above"},
    ],
    ids=str,
)
def test_other_metadata_is_a_user_error(metadata: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"describes no scene.*colours: red.*shapes:val"):
        Scene.from_metadata(metadata)


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_carry_their_scene(split: Split) -> None:
    listed = prompts(split)
    assert [prompt.index for prompt in listed] == list(range(len(listed)))
    assert all(prompt.negative == "" for prompt in listed)
    for prompt, scene in zip(listed, split_scenes(split), strict=True):
        assert prompt.text == scene.caption
        assert Scene.from_metadata(prompt.metadata) == scene


def test_the_first_validation_captions_are_a_fair_sample() -> None:
    shares = [Counter(s.kind for s in part)["relation"] / len(part) for part in (split_scenes("test")[:300], scenes())]
    assert shares[0] == pytest.approx(shares[1], abs=0.06)
