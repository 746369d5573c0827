"""Prompts of a step: a pure function of seed and step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, PromptBatch, draw_prompts, fingerprint, places, some

TEN = tuple(Prompt(f"prompt {i}", i) for i in range(10))


def indices(prompts: tuple[Prompt, ...]) -> list[int]:
    return [prompt.index for prompt in prompts]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 23])
def test_the_draws_concatenated_are_permutations_of_all_prompts(count: int) -> None:
    num_epochs = 3 * count  # so that the steps end where an epoch ends
    stream = [p.index for step in range(num_epochs * 10 // count) for p in draw_prompts(TEN, 5, step, count)]
    epochs = [stream[start : start + 10] for start in range(0, len(stream), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert set(Counter(stream).values()) == {num_epochs}


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = {tuple(indices(draw_prompts(TEN, seed, epoch, 10))) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400  # two of 400 random orders of ten agree with probability 2 %; these do not


def test_every_prompt_is_equally_likely_first() -> None:
    first = Counter(draw_prompts(TEN, seed, 0, 1)[0].index for seed in range(2000))
    chi_squared = sum((first[i] - 200) ** 2 / 200 for i in range(10))
    assert chi_squared < 27.9  # the 99.9 % quantile with 9 degrees of freedom


@pytest.mark.usefixtures("untouched_rng")
def test_a_step_does_not_depend_on_history() -> None:
    forward = [draw_prompts(TEN, 3, step, 4) for step in range(12)]
    assert [draw_prompts(TEN, 3, step, 4) for step in reversed(range(12))] == forward[::-1]


def test_another_process_draws_the_same() -> None:
    code = (
        "from calibri_lightning.prompts import Prompt, draw_prompts\n"
        "ten = tuple(Prompt(f'prompt {i}', i) for i in range(10))\n"
        "print([p.index for step in range(9) for p in draw_prompts(ten, 3, step, 4)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [p.index for step in range(9) for p in draw_prompts(TEN, 3, step, 4)]


def test_a_larger_batch_is_the_same_sequence_cut_differently() -> None:
    singly = [draw_prompts(TEN, 1, step, 1)[0] for step in range(24)]
    assert [p for step in range(3) for p in draw_prompts(TEN, 1, step, 8)] == singly


@pytest.mark.parametrize(("prompts", "step", "count"), [((), 0, 1), (TEN, 0, 0), (TEN, -1, 4)])
def test_impossible_draws_are_refused(prompts: tuple[Prompt, ...], step: int, count: int) -> None:
    with pytest.raises(UserError, match="cannot draw"):
        draw_prompts(prompts, 0, step, count)


def test_occurrences_tell_repeats_apart() -> None:
    batch = PromptBatch(0, draw_prompts(TEN[:3], 0, 0, 8))
    assert len(set(zip(indices(batch.prompts), batch.occurrences, strict=True))) == 8
    assert PromptBatch(0, draw_prompts(TEN, 0, 0, 10)).occurrences == (0,) * 10


def test_fingerprint_sees_texts_rows_negatives_and_metadata() -> None:
    base = fingerprint([Prompt("a", 0), Prompt("b", 1)])
    assert base == fingerprint([Prompt("a", 0), Prompt("b", 1)])
    others = [
        [Prompt("a", 0, {"tag": 1}), Prompt("b", 1)],
        [Prompt("b", 0), Prompt("a", 1)],
        [Prompt("a", 0), Prompt("b", 2)],
        [Prompt("a", 0), Prompt("b", 1, {}, "c")],
    ]
    assert base not in [fingerprint(other) for other in others]


def test_long_lists_are_cut() -> None:
    assert some(["a"]) == "a"
    assert some(["a", "b"]) == "a and b"
    assert some(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
    assert places("p.txt", [0]) == "line 1"
    assert places("p.csv", [0, 4, 6]) == "rows 1, 5 and 7"
