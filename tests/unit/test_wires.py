"""Round trips of the wires through servers that read requests and answer as the peers' own do."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import wire_servers as peers
from PIL import Image

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.wire import Batch, BatchScores, Wire, WireError
from calibri_lightning.remote.wires import WIRES, make_wire

COUNTING = {"tag": "counting", "include": [{"class": "cube", "count": 2}], "exclude": [{"class": "cube", "count": 3}]}


def round_trip(wire: Wire, batch: Batch, routes: peers.Routes) -> BatchScores:
    """Asks whether the server is ready, what it has, and for scores."""
    with peers.serving(routes) as address:
        for request, accept in ((wire.probe(), wire.accept_probe), (wire.roster(), wire.accept_roster)):
            if request is not None:
                status, body = peers.ask(address, request)
                assert status == 200
                accept(body)
        assert wire.check(batch.prompts) is None
        status, body = peers.ask(address, wire.request(batch))
        assert status == 200
    scores = wire.parse(batch, body)
    assert list(scores.scores) == [next(iter(scores.scores)), *wire.extra_names]
    return scores


def after_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return peers.file_pixels(buffer.getvalue(), "jpeg")


def expected(batch: Batch, quality: int | None = None) -> np.ndarray:
    seen = [pixels if quality is None else after_jpeg(pixels, quality) for pixels in batch.pixels]
    return np.array([peers.brightness(pixels) for pixels in seen])


def lengths(batch: Batch) -> np.ndarray:
    return np.array([len(prompt.text) for prompt in batch.prompts])


def test_hpsv3_scores_jpegs_of_quality_95_in_their_order() -> None:
    batch = peers.make_batch(4)
    scores = round_trip(make_wire("calibri", "hpsv3", {}), batch, {("POST", "/"): peers.hpsv3})
    np.testing.assert_array_equal(scores.scores["hpsv3"], expected(batch, 95) + lengths(batch))
    assert not np.array_equal(expected(batch, 95), expected(batch)), "the compression is seen"
    assert scores.errors == {}


@pytest.mark.parametrize(("task", "sign"), [("quality", 1), ("aesthetics", -1)])
def test_qalign_is_told_its_task(task: str, sign: int) -> None:
    batch = peers.make_batch(3)
    scores = round_trip(make_wire("calibri", "qalign", {"task": task}), batch, {("POST", "/"): peers.qalign})
    np.testing.assert_array_equal(scores.scores["qalign"], sign * expected(batch, 95))


def test_deqa_scores_jpegs_of_quality_75() -> None:
    batch = peers.make_batch(4)
    scores = round_trip(make_wire("flow-grpo", "deqa", {"key": "outputs"}), batch, {("POST", "/"): peers.deqa})
    np.testing.assert_array_equal(scores.scores["deqa"], expected(batch, 75))
    assert list(scores.scores) == ["deqa"]


@pytest.mark.parametrize("key", ["scores", "rewards", "strict_rewards"])
def test_geneval_reads_metadata_and_is_not_clamped(key: str) -> None:
    batch = peers.make_batch(4, COUNTING)
    wire = make_wire("flow-grpo", "geneval", {"key": key})
    scores = round_trip(wire, batch, {("POST", "/"): peers.geneval}).scores
    partial = 1 - expected(batch, 75) / 2 + lengths(batch)
    assert partial.min() < 0, "partial credit below 0 is part of the test"
    names = {"scores": "geneval_partial", "rewards": "geneval_correct", "strict_rewards": "geneval_strict"}
    names[key] = "geneval"
    np.testing.assert_array_equal(scores[names["scores"]], partial)
    np.testing.assert_array_equal(scores[names["strict_rewards"]], np.ones(4))
    # The server says 0 for all when it was asked for strict ones alone: never taken for a score.
    if key == "rewards":
        np.testing.assert_array_equal(scores["geneval"], np.ones(4))
    else:
        assert "geneval_correct" not in scores


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, r"metadata are \[\]"),
        ({"tag": "counting"}, "`include`"),
        ({"tag": "counting", "include": []}, "`include`"),
        ({"include": COUNTING["include"]}, "`tag`"),
        ({"tag": "counting", "include": '[{"class": "cube", "count": 2}]'}, "a list of objects"),
        ({"tag": "counting", "include": [{"class": "cube", "count": 0}]}, "`count` of 1 or more"),
        ({"tag": "counting", "include": [{"class": "cube", "count": "2"}]}, "`count` of 1 or more"),
        ({"tag": "counting", "include": [{"count": 2}]}, "`class`"),
        ({**COUNTING, "exclude": [{"class": "cube"}]}, "`exclude` likewise"),
        ({**COUNTING, "colour": np.float32(1)}, "numpy.float32"),
    ],
)
def test_prompts_that_geneval_would_score_0_or_fail_on_are_refused(metadata: dict[str, Any], problem: str) -> None:
    wire = make_wire("flow-grpo", "geneval", {})
    wire.check([Prompt("two cubes", 0, COUNTING)])
    with pytest.raises(UserError, match=problem):
        wire.check([Prompt("two cubes", 0, COUNTING), Prompt("a sphere", 1, metadata)])
    assert make_wire("flow-grpo", "deqa", {"key": "outputs"}).check([Prompt("a sphere", 1, metadata)]) is None


@pytest.mark.parametrize(("fields", "keys"), [("client", ("prompt", "image")), ("template", ("prompts", "images"))])
def test_flow_factory_gets_lossless_pictures(fields: str, keys: tuple[str, str]) -> None:
    batch = peers.make_batch(4)
    wire = make_wire("flow-factory", "mine", {"fields": fields})
    scores = round_trip(wire, batch, peers.flow_factory(*keys))
    np.testing.assert_array_equal(scores.scores["mine"], expected(batch) + lengths(batch))


def test_flow_factory_names_an_error() -> None:
    wire = make_wire("flow-factory", "mine", {})
    with pytest.raises(WireError, match="the server says: out of memory"):
        wire.parse(peers.make_batch(1), b'{"error": "out of memory", "rewards": []}')
    with pytest.raises(WireError, match="says of its health 'loading', not 'ok'"):
        wire.accept_probe(b'{"status": "loading"}')


def test_unirl_isolates_failures() -> None:
    batch = peers.make_batch(4, {"bonus": 1000})
    options = {"metric": "wiscore", "extra_metrics": ["Aesthetic Quality"]}
    scores = round_trip(make_wire("unirl", "wise", options), batch, peers.unirl(broken=2))
    values = expected(batch) + lengths(batch) + 1000
    values[2] = np.nan
    np.testing.assert_array_equal(scores.scores["wise"], values)
    np.testing.assert_array_equal(scores.scores["wise_aesthetic_quality"], values / 2)
    assert scores.errors == {2: "TimeoutError(\"reward 'wise' exceeded 120s\")"}


def unirl_reply(*subs: Any, **more: Any) -> bytes:
    return json.dumps({"results": [{"wise": sub} for sub in subs], "errors": [{}] * len(subs), **more}).encode()


def test_unirl_chooses_the_only_sub_score_or_its_namesake() -> None:
    batch, wire = peers.make_batch(1), make_wire("unirl", "wise", {})
    assert wire.parse(batch, unirl_reply({"anything": 2.5})).scores["wise"] == [2.5]
    assert wire.parse(batch, unirl_reply({"realism": 1.0, "wise": 2.5})).scores["wise"] == [2.5]
    with pytest.raises(UserError, match=r"sub-scores: realism, consistency.*Say which is optimised: metric"):
        wire.parse(batch, unirl_reply({"realism": 1.0, "consistency": 2.5}))
    with pytest.raises(WireError, match="no sub-score"):
        wire.parse(batch, unirl_reply({}))
    with pytest.raises(WireError, match="no key 'total'; it has realism"):
        make_wire("unirl", "wise", {"metric": "total"}).parse(batch, unirl_reply({"realism": 1.0}))


def test_unirl_makes_null_nan_and_sees_what_is_mixed_up() -> None:
    batch, wire = peers.make_batch(2), make_wire("unirl", "wise", {})
    found = wire.parse(batch, unirl_reply({"wise": None}, {"wise": 3}))
    np.testing.assert_array_equal(found.scores["wise"], [np.nan, 3])
    assert found.errors == {0: "no number for wise"}
    silent = json.dumps({"results": [{}, {"wise": {"wise": 3}}], "errors": [{"wise": ""}, {}]}).encode()
    assert wire.parse(batch, silent).errors == {0: "no reason given"}
    swapped = [{"request_id": "1"}, {"request_id": "0"}]
    with pytest.raises(WireError, match="mixed up: place 0 answers request '1'"):
        wire.parse(batch, unirl_reply({"wise": 2}, {"wise": 3}, identities=swapped))
    nameless = [{"request_id": None}, {}]
    np.testing.assert_array_equal(
        wire.parse(batch, unirl_reply({"wise": 2}, {"wise": 3}, identities=nameless)).scores["wise"], [2, 3]
    )


def test_unirl_asks_for_what_the_server_has() -> None:
    wire = make_wire("unirl", "hpsv3", {})
    wire.accept_roster(b'{"rewards": ["clip", "hpsv3"]}')
    with pytest.raises(UserError, match="no reward 'hpsv3'; it has clip, ocr.*goes: reward"):
        wire.accept_roster(b'{"rewards": ["clip", "ocr"]}')
    with pytest.raises(WireError, match="scorer is offloaded"):
        wire.accept_probe(b'{"status": "ok", "state": "offloaded"}')
    wire.accept_probe(b'{"status": "ok", "state": "resident"}')


@pytest.mark.parametrize("name", [name for name in WIRES if name != "calibri-lightning"])
def test_only_pictures_of_8_bits_are_sent(name: str) -> None:
    wire = make_wire(name, "x", {"model": "m"} if name == "openai" else {})
    assert wire.name == name
    prompts = [Prompt("a", 0, COUNTING)]
    for pixels in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 2, 8, 8, 3), np.uint8)):
        with pytest.raises(UserError, match=r"the rule is pictures uint8 \[B, H, W, 3\]"):
            wire.request(Batch(pixels, prompts))


@pytest.mark.parametrize("value", [float("nan"), np.float32(1), {1, 2}, b"x"])
def test_metadata_that_are_no_plain_data_are_named(value: object) -> None:
    prompt = Prompt("a red cube", 0, {"deep": {"list": [1, {"x": value}]}})
    with pytest.raises(UserError, match=r"metadata 'deep' of the prompt 'a red cube' hold"):
        make_wire("unirl", "clip", {}).check([prompt])


def test_wires_go_by_name_or_path() -> None:
    batch = Batch(np.zeros((100, 1, 1, 3), np.uint8), [Prompt("a", 0)] * 100)
    path = "calibri_lightning.remote.wires.calibri:CalibriWire"
    assert make_wire(path, "hpsv3", {}).name == "calibri"
    assert [make_wire(name, "x", {}).name for name in WIRES] == list(WIRES)
    # Our own servers say themselves how many they take.
    assert {name: make_wire(name, "x", {}).most_items(batch) for name in WIRES if name != "calibri-lightning"} == {
        "calibri": 8,
        "flow-grpo": 64,
        "flow-factory": 100,
        "unirl": 100,
        "openai": 1,
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("calibry", {}, "no wire 'calibry'.*Did you mean 'calibri'"),
        ("no.such:Wire", {}, "cannot be imported"),
        ("collections:OrderedDict", {}, "is a type; built in|is a .*; built in|class derived from Wire"),
        ("calibri", {"tsk": "quality"}, "no option 'tsk'.*has task. Did you mean 'task'"),
        (
            "calibri",
            {"task": "beauty"},
            "is 'beauty'; it must be one of quality, aesthetics",
        ),
        ("flow-grpo", {"key": "group_rewards"}, "must be one of scores, rewards, strict_rewards, outputs"),
        ("flow-factory", {"fields": "both"}, "must be one of client, template"),
        ("unirl", {"extra_metrics": "Realism"}, "must be a list of names"),
        ("unirl", {"extra_metrics": 3}, "must be a list of names"),
    ],
)
def test_mistakes_in_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_wire(name, "x", options)
