"""The queue: what is put together, what is left alone, and what a failure takes with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from reward_servers import Toy, expected, noise, until

from calibri_lightning.serving.batching import DeviceQueue, Job, Loaded, ScoringError
from calibri_lightning.serving.protocol import PromptText
from calibri_lightning.serving.refusals import Refusal


@contextmanager
def queue(*toys: Toy, window: float = 0.0, max_batch: int = 4, max_length: int = 100) -> Iterator[DeviceQueue]:
    made = DeviceQueue("cpu", max_batch, window, max_length)
    made.start()
    yield made
    for toy in toys:
        toy.go.set()
    made.close()


def loaded(toy: Toy) -> Loaded:
    return Loaded(toy.load(), toy)


def job(reward: Loaded, *texts: str, exact: bool = False, shape: tuple[int, ...] = (2, 2, 3)) -> Job:
    pictures = [noise(len(text), *shape) for text in texts]
    return Job(reward, pictures, [PromptText(text=text) for text in texts], exact)


@contextmanager
def held(toy: Toy, line: DeviceQueue, reward: Loaded) -> Iterator[None]:
    """The thread is busy with a first job, while others pile up; then goes on."""
    toy.begun.clear()
    toy.go.clear()
    first = job(reward, "first")
    line.submit([first])
    assert toy.begun.wait(20)
    yield
    toy.go.set()
    first.future.result(20)


def test_waiting_jobs_of_one_kind_are_scored_together_and_handed_back_apart() -> None:
    toy = Toy()
    reward = loaded(toy)
    jobs = [job(reward, "a", "bb"), job(reward, "ccc"), job(reward, "dddd"), job(reward, "eeeee")]
    with queue(toy) as line:
        with held(toy, line, reward):
            for each in jobs:
                line.submit([each])
        rows = [each.future.result(20) for each in jobs]
    assert toy.calls == [["first"], ["a", "bb", "ccc", "dddd"], ["eeeee"]]
    for each, found in zip(jobs, rows, strict=True):
        assert found == [
            {"toy": expected(image), "letters": len(prompt.text)}
            for image, prompt in zip(each.images, each.prompts, strict=True)
        ]


def test_other_shapes_types_and_rewards_are_not_mixed() -> None:
    toy, other = Toy(), Toy("other")
    one, two = loaded(toy), loaded(other)
    wide = job(one, "wide", shape=(2, 4, 3))
    floats = Job(one, [noise(1, 2, 2, 3).astype(np.float32) / 255], [PromptText(text="float")], False)
    jobs = [job(one, "a"), wide, job(two, "b"), floats, job(one, "c"), job(two, "d")]
    with queue(toy) as line:
        with held(toy, line, one):
            for each in jobs:
                line.submit([each])
        for each in jobs:
            each.future.result(20)
    assert toy.calls == [["first"], ["a", "c"], ["wide"], ["float"]]
    assert other.calls == [["b", "d"]]


def test_exact_jobs_are_one_batch_of_their_own_whatever_its_size() -> None:
    toy = Toy()
    reward = loaded(toy)
    exact, plain = job(reward, *"abcdefg", exact=True), [job(reward, "x"), job(reward, "y")]
    with queue(toy) as line:
        with held(toy, line, reward):
            for each in (plain[0], exact, plain[1]):
                line.submit([each])
        exact.future.result(20)
    assert toy.calls == [["first"], ["x", "y"], list("abcdefg")]


def test_the_window_waits_for_company() -> None:
    toy = Toy()
    reward = loaded(toy)
    jobs = [job(reward, text) for text in "abcd"]
    with queue(toy, window=3600) as line:
        for each in jobs:
            line.submit([each])
        for each in jobs:
            each.future.result(20)  # the fourth fills the batch
    assert toy.calls == [list("abcd")]


@pytest.mark.parametrize("poison", ["raise", "exit"])
def test_a_poisoned_picture_fails_its_own_request_alone(poison: str) -> None:
    toy = Toy()
    reward = loaded(toy)
    jobs = [job(reward, "a"), job(reward, poison), job(reward, "c")]
    with queue(toy) as line:
        with held(toy, line, reward):
            for each in jobs:
                line.submit([each])
        assert jobs[0].future.result(20)[0]["letters"] == 1
        name = {"raise": "ArithmeticError: no such picture", "exit": "SystemExit: 3"}[poison]
        with pytest.raises(ScoringError, match=f"'toy' raised {name}"):
            jobs[1].future.result(20)
        assert jobs[2].future.result(20)[0]["letters"] == 1
        after = job(reward, "after")
        line.submit([after])
        after.future.result(20)


@pytest.mark.parametrize(
    ("text", "message"),
    [("short", "returned 1 scores under 'toy' for 2 pictures"), ("nameless", "no scores under 'letters'")],
)
def test_scores_of_another_number_or_name_are_an_error(text: str, message: str) -> None:
    toy = Toy()
    with queue(toy) as line:
        wrong = job(loaded(toy), text, "b")
        line.submit([wrong])
        with pytest.raises(ScoringError, match=message):
            wrong.future.result(20)


def test_what_is_not_finite_is_none() -> None:
    toy = Toy()
    with queue(toy) as line:
        some = job(loaded(toy), "nan", "b")
        line.submit([some])
        rows = some.future.result(20)
    assert [row["toy"] is None for row in rows] == [True, False]


def test_cancelled_jobs_are_dropped_unless_begun() -> None:
    toy = Toy()
    reward = loaded(toy)
    jobs = [job(reward, "a"), job(reward, "b")]
    with queue(toy) as line:
        with held(toy, line, reward):
            for each in jobs:
                line.submit([each])
            assert jobs[0].future.cancel()
        jobs[1].future.result(20)
    assert toy.calls == [["first"], ["b"]]


def test_a_full_queue_refuses_and_says_when_to_return() -> None:
    toy = Toy()
    reward = loaded(toy)
    with queue(toy, max_length=3) as line:
        with held(toy, line, reward):
            line.submit([job(reward, "a", "b", "c")])
            with pytest.raises(Refusal) as refused:
                line.submit([job(reward, "d")])
            assert refused.value.status == 429
            assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
        last = job(reward, "d")
        until(lambda: submitted(line, last))
        last.future.result(20)


def submitted(line: DeviceQueue, job: Job) -> bool:
    try:
        line.submit([job])
    except Refusal:
        return False
    return True


def test_calls_run_in_the_thread_of_the_scores() -> None:
    toy = Toy()
    with queue(toy) as line:
        reward = line.call(lambda: loaded(toy)).result(20)
        some = job(reward, "a")
        line.submit([some])
        some.future.result(20)
        failing: Future[Any] = line.call(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failing.result(20)
        assert line.call(threading.get_ident).result(20) in toy.threads
    assert len(toy.threads) == 1


def test_a_closed_queue_drops_what_waits_and_takes_nothing() -> None:
    toy = Toy()
    reward = loaded(toy)
    waiting = job(reward, "a")
    with queue(toy) as line:
        with held(toy, line, reward):
            line.submit([waiting])
            line.close(0)
        with pytest.raises(Refusal, match="ending"):
            line.submit([job(reward, "b")])
        assert line.call(threading.get_ident).cancelled()
    assert waiting.future.cancelled()
    assert toy.calls == [["first"]]
