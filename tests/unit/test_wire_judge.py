"""Judges behind the chat API: closed forms of the probability of yes, numbers in texts, what servers are sent."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import wire_servers as peers

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.wire import Batch, WireError
from calibri_lightning.remote.wires import make_wire

ONE = peers.make_batch(1)


def score(reply: Any, **options: Any) -> tuple[float, str | None]:
    wire = make_wire("openai", "vqa", {"model": "m", **options})
    found = wire.parse(ONE, json.dumps(reply).encode())
    assert found.scores["vqa"].shape == (1,)
    return float(found.scores["vqa"][0]), found.errors.get(0)


@pytest.mark.parametrize(
    ("tokens", "ratio", "alone"),
    [
        ({"Yes": 0.6, "No": 0.2}, 0.75, 0.6),
        ({"Yes": 0.3, "yes": 0.2, " Yes": 0.1, "NO": 0.1, "no": 0.05, "It": 0.2}, 0.8, 0.6),
        ({"\u2581Yes": 0.1, "\u0120no": 0.3, "Yes\n": 0.2}, 0.5, 0.3),
        ({"Yes": 0.9, "Maybe": 0.05}, 1.0, 0.9),
        ({"No": 0.9, "Maybe": 0.05}, 0.0, 0.0),
        ({"Yes": 1e-300, "No": 3e-300, "The": 0.99}, 0.25, 1e-300),
    ],
)
def test_the_probability_of_yes_is_its_closed_form(tokens: dict[str, float], ratio: float, alone: float) -> None:
    assert score(peers.chat(tokens)) == (pytest.approx(ratio, rel=1e-12), None)
    assert score(peers.chat(tokens), score="yes") == (pytest.approx(alone, rel=1e-12), None)


def test_tokens_of_one_text_add_up_and_tiny_ones_keep_their_ratio() -> None:
    # Two tokens of a SentencePiece model can be the same text once decoded.
    same = [("Yes", math.log(0.2)), ("Yes", math.log(0.4)), ("No", math.log(0.2))]
    assert score(peers.chat(same))[0] == pytest.approx(0.75, rel=1e-12)
    tiny = [("Yes", -2000.0), ("No", -2000.0 + math.log(3)), ("Hm", -0.0)]
    assert score(peers.chat(tiny))[0] == pytest.approx(0.25, rel=1e-9)
    assert score(peers.chat([("Yes", -4000.0), ("No", -0.1)])) == (0.0, None)
    assert score(peers.chat([("Yes", -0.1), ("No", -4000.0)])) == (1.0, None)


def test_unlikely_tokens_are_no_answer() -> None:
    for absent in (-9999.0, None):
        tokens = [("Yes", absent), ("No", absent), ("<think>", -0.1), ("\x1b\n", -3.0)]
        value, reason = score(peers.chat(tokens))
        assert math.isnan(value)
        assert reason is not None
        assert reason.startswith("neither yes nor no is among the likely first tokens: '<think>', ''")
        assert reason.isprintable()
    assert score(peers.chat([("Yes", -0.5), ("No", -9999.0)])) == (1.0, None)
    value, reason = score(peers.chat({"Yesterday": 0.5, "Nothing": 0.4}))
    assert math.isnan(value)
    assert reason == "neither yes nor no is among the likely first tokens: 'Yesterday', 'Nothing'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": None}, "no log-probabilities.*ask for a number"),
        ({"logprobs": {"content": []}}, "no log-probabilities"),
        ({"logprobs": {"content": [{"token": "Yes"}]}}, "top_logprobs is null"),
        (peers.chat([("Yes", 0.5)])["choices"][0], "log-probability is 0.5; the rule is 0 or less"),
        (peers.chat({"Yes": 0.9, "No": 0.9})["choices"][0], "sum up to more than 1"),
        (peers.chat([("Yes", "-0.5")])["choices"][0], "log-probability is a str"),  # type: ignore[list-item]
    ],
)
def test_log_probabilities_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    reply = peers.chat({"Yes": 0.5})
    reply["choices"][0] |= change
    with pytest.raises(WireError, match=message):
        score(reply)


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        ("Final Score: 3.5", 3.5, None),
        ("Final Score: 1, no:\nFinal Score:  4", 4.0, None),
        ("The score after 'Final Score:' is 5.", math.nan, "no score in the answer, which ends with"),
        ("", math.nan, "no score in the answer"),
        ("Final Score: 7", math.nan, "7.0 is not within 1.0..5.0"),
        ("Final Score: -2", math.nan, "-2.0 is not within 1.0..5.0"),
        ("Final Score: 0", math.nan, "0.0 is not within"),
    ],
)
def test_numbers_in_texts_are_within_their_range(text: str, value: float, reason: str | None) -> None:
    found, why = score(peers.chat({}, text), score="number")
    assert found == value or (math.isnan(found) and math.isnan(value))
    assert (why or "").startswith(reason or "")
    assert (why is None) == (reason is None)


def test_an_answer_that_was_cut_says_so() -> None:
    reply = peers.chat({}, "Let me think about")
    assert "raise max_tokens" in (score(reply, score="number")[1] or "")
    reply["choices"][0]["finish_reason"] = "stop"
    assert "raise max_tokens" not in (score(reply, score="number")[1] or "")
    reply["choices"][0]["message"]["content"] = None
    with pytest.raises(WireError, match="content of the message is null"):
        score(reply, score="number")


def test_the_pattern_and_its_range_are_options() -> None:
    options = {"score": "number", "pattern": r"(\d+)\s*%", "low": 0, "high": 100}
    assert score(peers.chat({}, "about 85 %"), **options) == (85.0, None)
    empty = {"score": "number", "pattern": r"x(\d*)y"}
    assert score(peers.chat({}, "xy"), **empty)[1] == "no number: ''"
    assert score(peers.chat({}, "b"), score="number", pattern="a(1)|b")[1] == "no number: 'null'"


def test_a_judge_is_asked_one_picture_at_a_time() -> None:
    batch = peers.make_batch(3)
    values = {}
    for kind in ("yes_ratio", "yes", "number"):
        wire = make_wire("openai", "vqa", {"score": kind})
        assert wire.max_items == 1
        found = []
        with peers.serving(peers.judge()) as address:
            assert peers.ask(address, wire.probe()) == (200, b"")  # type: ignore[arg-type]
            wire.accept_probe(b"")
            wire.accept_roster(peers.ask(address, wire.roster())[1])  # type: ignore[arg-type]
            for pixels, prompt in zip(batch.pixels, batch.prompts, strict=True):
                single = Batch(pixels[None], [prompt])
                status, body = peers.ask(address, wire.request(single))
                assert status == 200
                found.append(float(wire.parse(single, body).scores["vqa"][0]))
        values[kind] = np.array(found)
    bright = np.array([peers.brightness(pixels) for pixels in batch.pixels]) / 255
    np.testing.assert_allclose(values["yes_ratio"], bright, rtol=1e-12)
    np.testing.assert_allclose(values["yes"], 0.9 * bright, rtol=1e-12)
    np.testing.assert_allclose(values["number"], 1 + 4 * bright, atol=1e-6)


def asked(**options: Any) -> dict[str, Any]:
    wire = make_wire("openai", "vqa", {"model": "m", **options})
    batch = Batch(ONE.pixels, [Prompt("a {text} {0} \u4e09", 0)])
    return json.loads(wire.request(batch).body)  # type: ignore[no-any-return]


def test_questions_hold_any_prompt() -> None:
    text = asked()["messages"][0]["content"][1]["text"]
    assert text == 'Does this figure show "a {text} {0} \u4e09"? Please answer yes or no.'
    assert asked(question="Is it beautiful?")["messages"][0]["content"][1]["text"] == "Is it beautiful?"
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    assert asked(extra_body=thinking)["chat_template_kwargs"] == {"enable_thinking": False}
    number = asked(score="number", seed=7)
    assert (number["max_tokens"], number["seed"], "logprobs" in number) == (1024, 7, False)


def test_models_are_those_of_the_server() -> None:
    def models(*names: str) -> bytes:
        return json.dumps({"data": [{"id": name} for name in names]}).encode()

    wire = make_wire("openai", "vqa", {})
    with pytest.raises(UserError, match="does not know which model to ask"):
        wire.request(ONE)
    with pytest.raises(UserError, match="has the models a, b. Say which one judges: model"):
        wire.accept_roster(models("a", "b"))
    wire.accept_roster(models("a"))
    assert json.loads(wire.request(ONE).body)["model"] == "a"
    with pytest.raises(UserError, match="no model 'a'; it has b.*all servers of a reward"):
        wire.accept_roster(models("b"))
    make_wire("openai", "vqa", {"model": "b"}).accept_roster(models("a", "b"))
    for bad in (b'{"data": []}', b'{"data": [{}]}', b'{"data": "a"}'):
        with pytest.raises(WireError, match="does not say which models"):
            wire.accept_roster(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "p"}, "must be one of yes_ratio, yes, number"),
        ({"question": "Is it {caption}?"}, "has '{caption}'"),
        ({"question": " "}, "must be a text"),
        ({"pattern": "(", "score": "number"}, "no regular expression"),
        ({"pattern": r"\d"}, "has no group"),
        ({"low": 5, "high": 1}, "low must be below high"),
        ({"low": float("nan")}, "must be finite"),
        ({"max_tokens": 0}, "integer within 1"),
        ({"seed": -1}, "integer within 0"),
        ({"health": "health"}, "must be a path"),
        ({"extra_body": {"temperature": 1}}, "sets 'temperature', which the wire sets itself"),
        ({"extra_body": {"x": {1}}}, "is no JSON"),
    ],
)
def test_mistakes_in_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_wire("openai", "vqa", {"model": "m", **options})


def test_a_run_depends_on_the_model_that_the_server_has() -> None:
    wire = make_wire("openai", "judge", {})
    assert wire.describe() is None
    wire.accept_roster(b'{"data": [{"id": "Qwen/A"}]}')
    info = wire.describe()
    assert info is not None
    assert info.model == "Qwen/A"
    assert "yes_ratio" in info.preprocessing
