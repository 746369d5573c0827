"""The OCR reward on text that Pillow renders, read by the real reader."""

from __future__ import annotations

import logging
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardConfig, RewardSet
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.ocr import Ocr, edit_distance, normalised, text_score, wanted_text

SIDE = 256


def render(*lines: str, places: tuple[tuple[int, int], ...] = (), ink: str = "black") -> Tensor:
    """Text on white [3, H, W] in 0..1, line below line unless places are given."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(36)
    for number, line in enumerate(lines):
        draw.text(places[number] if places else (16, 40 + 70 * number), line, fill=ink, font=font)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reward() -> Ocr:
    return Ocr()


def score(reward: Ocr, picture: Tensor, text: str) -> float:
    return float(reward(picture[None], [Prompt(text, 0)]))


def test_what_is_written_is_read(reward: Ocr) -> None:
    picture = render("HELLO")
    assert score(reward, picture, 'A sign that says "Hello"') == 1
    wrong = score(reward, picture, 'A sign that says "Jelly"')
    assert wrong == pytest.approx(1 - 2 / 5)
    assert score(reward, picture, 'A sign that says "music"') == 0


def test_words_are_read_in_order(reward: Ocr) -> None:
    below = render("GOOD", "NIGHT")
    beside = render("NIGHT", "GOOD", places=((140, 100), (8, 100)))
    for picture in (below, beside):
        assert normalised(reward.read(np.asarray((picture * 255).byte().permute(1, 2, 0)))) == "goodnight"
        assert score(reward, picture, 'A poster with "good night"') == 1
    assert score(reward, render("NIGHT", "GOOD"), 'A poster with "good night"') < 1
    # Several quotations: each is found where it is.
    assert score(reward, render("NIGHT", "GOOD"), 'A poster with "good" above "night"') == 1


def test_a_picture_without_text_scores_zero_silently(
    reward: Ocr, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert score(Ocr(), torch.ones(3, SIDE, SIDE), 'A sign that says "Hello"') == 0
    assert capfd.readouterr() == ("", "")


def test_scores_do_not_depend_on_the_batch_and_repeat(reward: Ocr) -> None:
    pictures = torch.stack([render("OPEN"), torch.ones(3, SIDE, SIDE), render("0PEN NOW", ink="red")])
    prompts = [Prompt('a door with "open"', 0), Prompt('a door with "open"', 0), Prompt('says "open now"', 1)]
    together = reward(pictures, prompts)
    assert together.dtype == torch.float32
    assert torch.equal(together, reward(pictures, prompts))
    alone = [reward(pictures[i : i + 1], prompts[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), together)


def test_red_is_red_to_the_reader(reward: Ocr, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV's pictures have blue first."""
    seen = []
    monkeypatch.setitem(reward.__dict__, "_reader", lambda pixels: seen.append(pixels) or _Nothing())
    reward.read(np.asarray([[[255, 20, 0]]], dtype=np.uint8))
    assert seen[0].tolist() == [[[0, 20, 255]]]


class _Nothing:
    txts = None


def test_text_around_the_wanted_one() -> None:
    assert text_score("we are open today", ["open"]) == 1
    assert text_score("we are open today", ["open"], exact=True) == 0
    assert text_score("open!", ["open"], exact=True) == pytest.approx(1 - 1 / 4)
    # No copy: the distance between all that was read and what was wanted, never below 0.
    assert text_score("oben", ["open"]) == pytest.approx(3 / 4)
    assert text_score("a long line of other words", ["open"]) == 0
    # Of two parts one is there.
    assert text_score("we are open today", ["open", "closed"]) == pytest.approx(1 - 6 / 10)
    assert text_score("ＯＰＥＮ\n at 9", ["open at 9"]) == 1


def reference_distance(one: str, other: str) -> int:
    """Levenshtein's definition, top down."""

    @cache
    def of(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        if one[i - 1] == other[j - 1]:
            return of(i - 1, j - 1)
        return 1 + min(of(i - 1, j), of(i, j - 1), of(i - 1, j - 1))

    return of(len(one), len(other))


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    draw = np.random.default_rng(0)
    for _ in range(200):
        one, other = ("".join(draw.choice(list("abc"), size=draw.integers(0, 9))) for _ in range(2))
        assert edit_distance(one, other) == reference_distance(one, other)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt('a sign "New York" and "Rome"', 0), ("New York", "Rome")),
        (Prompt("a sign “Zu” und „ab“ und „an”", 0), ("Zu", "ab", "an")),
        (Prompt("un panneau « Ouvert » 「本」", 0), (" Ouvert ", "本")),
        (Prompt('it\'s "a" sign', 0, {"text": "Rome"}), ("Rome",)),
        (Prompt('an open quote "here', 0), ()),
        (Prompt('"" and " "', 0), ()),
        (Prompt("a cat", 0), ()),
        (Prompt("a cat", 0, {"text": 5}), ()),
    ],
)
def test_wanted_text(prompt: Prompt, expected: tuple[str, ...]) -> None:
    assert wanted_text(prompt) == expected


def test_prompts_that_ask_for_no_text_are_refused() -> None:
    rewards = RewardSet({"ocr": RewardConfig(1.0)})
    with pytest.raises(UserError, match=r"the prompt 'a cat' \(row 4\): it asks for no text. .*double quotes"):
        rewards.check([Prompt('says "a"', 0), Prompt("a cat", 3)])


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_extra_is_named_before_any_work(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"needs rapidocr .*pip install 'calibri-lightning\[rewards\]'"):
        Ocr().check([Prompt('says "a"', 0)])


def test_no_network_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the reader opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert score(Ocr(), render("OPEN"), 'says "open"') == 1


def test_it_says_what_reads() -> None:
    info = Ocr(min_confidence=0.25).describe()
    assert info.model == "rapidocr"
    assert info.revision.startswith("3.")
    assert info.preprocessing == "min_confidence 0.25"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": 1}, "exact .* is 1; it must be true or false"),
        ({"min_confidence": 1.5}, "min_confidence .* is 1.5; it must lie in 0..1"),
        ({"min_confidence": "high"}, "min_confidence .* 'high'; it must be a number"),
        ({"num_threads": 0}, "num_threads .* is 0; it must be a number from 1 up"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_reward("ocr", options)
