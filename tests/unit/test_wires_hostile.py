"""Whatever a server answers, a wire gives one finite score (or NaN and a reason) a picture, or says what is wrong."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import wire_servers as peers
from hypothesis import given, settings
from hypothesis import strategies as st

from calibri_lightning.errors import UserError
from calibri_lightning.remote.wire import BatchScores, Wire, WireError
from calibri_lightning.remote.wires import make_wire

BATCH = peers.make_batch(3)
ONE = peers.make_batch(1)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def scored(key: str, *more: str) -> Callable[[Any], Any]:
    return lambda scores: {key: scores, **dict.fromkeys(more, [0.0, 0.0, 0.0])}


# Wire, its options, how bytes are made of a reply, and a right reply with given scores.
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Any], bytes], Callable[[Any], Any]]] = {
    "hpsv3": ("calibri", {}, pickle.dumps, scored("scores")),
    "deqa": ("flow-grpo", {"key": "outputs"}, pickle.dumps, scored("outputs")),
    "geneval": ("flow-grpo", {"key": "scores"}, pickle.dumps, scored("scores", "strict_rewards")),
    "strict": ("flow-grpo", {"key": "strict_rewards"}, pickle.dumps, scored("strict_rewards", "scores")),
    "flow-factory": ("flow-factory", {}, as_json, scored("rewards")),
}
ALL = {
    **KINDS,
    "unirl": (
        "unirl",
        {},
        as_json,
        lambda s: {"results": [{"x": {"x": v}} for v in s] if isinstance(s, list) else s},
    ),
}


def wire_of(kind: str) -> Wire:
    name, options, _, _ = ALL[kind]
    return make_wire(name, "x", options)


@pytest.mark.parametrize("kind", ALL)
def test_a_right_reply_is_read(kind: str) -> None:
    _, _, encode, reply = ALL[kind]
    found = wire_of(kind).parse(BATCH, encode(reply([-0.5, 2, 1e30])))
    np.testing.assert_array_equal(found.scores["x"], [-0.5, 2, 1e30])
    assert found.scores["x"].dtype == np.float64
    assert found.errors == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "has 0 entries for 3 pictures"),
        ([1.0, 2.0], "has 2 entries for 3 pictures"),
        ([1.0] * 4, "has 4 entries for 3 pictures"),
        ([1.0, float("nan"), 2.0], "is nan; the rule is a finite number|NaN is no number"),
        ([1.0, float("inf"), 2.0], "is inf; the rule|Infinity is no number"),
        ([1.0, -float("inf"), 2.0], "is -inf; the rule|-Infinity is no number"),
        ([1.0, 1e39, 2.0], "is 1e.39; the rule is a finite number"),
        ([1.0, 2**63, 1.7e308], r"\[2\] is 1.7e.308; the rule"),
        ([1.0, True, 2.0], r"\[1\] is a bool; the rule is a number"),
        ([1.0, "2.0", 2.0], r"\[1\] is a str; the rule is a number"),
        ([1.0, None, 2.0], r"\[1\] is null; the rule is a number"),
        ([[1.0], [2.0], [3.0]], r"\[0\] is a list; the rule is a number"),
        ([{}, 1.0, 1.0], r"\[0\] is a dict"),
        ({"0": 1.0, "1": 1.0, "2": 1.0}, "is a dict; the rule is a list"),
        ("abc", "is a str; the rule is a list"),
        (1.0, "is a float; the rule is a list"),
        (None, "is null; the rule is a list"),
    ],
)
def test_wrong_scores_are_named(kind: str, scores: Any, message: str) -> None:
    _, _, encode, reply = KINDS[kind]
    with pytest.raises(WireError, match=message):
        wire_of(kind).parse(BATCH, encode(reply(scores)))


def test_extra_scores_are_checked_as_well() -> None:
    reply = {"scores": [1.0, 1.0, 1.0], "strict_rewards": [1.0, float("nan"), 1.0]}
    with pytest.raises(WireError, match=r"strict_rewards\[1\] is nan"):
        wire_of("geneval").parse(BATCH, pickle.dumps(reply))
    with pytest.raises(WireError, match="no key 'strict_rewards'; it has scores"):
        wire_of("geneval").parse(BATCH, pickle.dumps({"scores": [1.0, 1.0, 1.0]}))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", [None, [], "x", 1.5, {}, {"other": [1.0]}, [{"scores": [1.0]}]])
def test_replies_of_another_form_are_refused(kind: str, value: Any) -> None:
    with pytest.raises(WireError, match="the rule is an object with keys|has no key"):
        wire_of(kind).parse(BATCH, ALL[kind][2](value))


@pytest.mark.parametrize("kind", ALL)
def test_cut_and_huge_replies_are_refused(kind: str) -> None:
    _, _, encode, reply = ALL[kind]
    wire, body = wire_of(kind), encode(reply([1.0, 2.0, 3.0]))
    for cut in range(len(body)):
        with pytest.raises(WireError):
            wire.parse(BATCH, body[:cut])
    for huge in (body + b" " * (5 << 20), encode(reply([1.0] * 300_000)), b"[" * 200_000, b"\xff" * 100):
        with pytest.raises(WireError):
            wire.parse(BATCH, huge)


@pytest.mark.parametrize("digits", [400, 4000, 5000])
def test_integers_without_end_are_refused(digits: int) -> None:
    with pytest.raises(WireError, match="an integer; the rule is a finite number|no JSON"):
        wire_of("flow-factory").parse(BATCH, b'{"rewards": [1, 2, ' + b"9" * digits + b"]}")


def test_numpy_scores_are_refused_with_what_to_change() -> None:
    for scores in (np.ones(3), list(np.ones(3, np.float32))):
        with pytest.raises(WireError, match=r"must convert it before"):
            wire_of("hpsv3").parse(BATCH, pickle.dumps({"scores": scores}))


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["Yes", " no", "x", "ok", -0.1])
)
KEYS = st.sampled_from(
    [
        *("scores", "rewards", "outputs", "strict_rewards", "results", "errors", "identities", "x", "request_id"),
        *("choices", "logprobs", "content", "top_logprobs", "token", "logprob", "message", "status", "state", "data"),
        *("id", "error"),
    ]
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)


def check_outcome(call: Callable[[], BatchScores], count: int) -> None:
    try:
        found = call()
    except (WireError, UserError) as error:
        assert 0 < len(str(error)) < 1000  # noqa: PT017 - either outcome is right
        return
    for values in found.scores.values():
        assert values.shape == (count,)
        assert values.dtype == np.float64
        assert not np.isinf(values).any()
        assert set(np.flatnonzero(np.isnan(values))) <= set(found.errors)
    assert all(reason.isprintable() and reason for reason in found.errors.values())


@given(TREES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_reply_is_scores_or_an_error(tree: Any, alone: bool) -> None:
    for kind in ALL:
        wire, encode = wire_of(kind), ALL[kind][2]
        check_outcome(lambda wire=wire, encode=encode: wire.parse(BATCH, encode(tree)), 3)
        for accept in (wire.accept_probe, wire.accept_roster):
            with contextlib.suppress(WireError, UserError):
                accept(as_json(tree))
    for score in ("yes" if alone else "yes_ratio", "number"):
        judge = make_wire("openai", "x", {"model": "m", "score": score})
        check_outcome(lambda judge=judge: judge.parse(ONE, as_json(tree)), 1)


GOOD_CHAT = peers.chat({"Yes": 0.4, " no": 0.2, "Well": 0.1}, "Final Score: 3")
GOOD_UNIRL = {"results": [{"x": {"x": 1.0}}] * 3, "errors": [{}] * 3, "identities": [{"request_id": "0"}] + [{}] * 2}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


@given(st.sampled_from(["unirl", "yes", "number"]), LEAVES | st.just([]) | st.just({}), st.data())
@settings(max_examples=300, deadline=None)
def test_right_replies_with_one_place_changed(kind: str, value: Any, draw: st.DataObject) -> None:
    tree = json.loads(json.dumps(GOOD_UNIRL if kind == "unirl" else GOOD_CHAT))
    *path, last = draw.draw(st.sampled_from(places(tree)[1:]))
    inside = tree
    for key in path:
        inside = inside[key]
    inside[last] = value
    batch = BATCH if kind == "unirl" else ONE
    wire = wire_of("unirl") if kind == "unirl" else make_wire("openai", "x", {"model": "m", "score": kind})
    check_outcome(lambda: wire.parse(batch, as_json(tree)), len(batch.prompts))
