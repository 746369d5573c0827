"""Scoring behind the sampler: the same bits in the same order, bounded, and no failure is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration.attach import attach
from calibri_lightning.calibration.scales import build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import FunctionReward, RewardError, RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.grid import UnitResult
from calibri_lightning.sampling.overlap import Behind
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

PROMPTS = tuple(Prompt(text, index) for index, text in enumerate(("a red circle", "two green squares", "a star")))
SEEDS = (1, 2, 3)
K, PATIENCE = 2, 30.0
UNITS = K * len(PROMPTS)

Score = Callable[[Tensor, Sequence[Prompt]], Tensor]
Make = Callable[..., Evaluator]


def ignore(result: object) -> None:
    pass


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    weights = torch.linspace(0.1, 1, images[0].numel())
    return images.flatten(1) @ weights


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3.of(build_pipeline(TINY))


@pytest.fixture
def make(backbone: SD3) -> Iterator[Make]:
    attachment = attach(backbone.transformer, find_sites(backbone.transformer))

    def build(score: Score = brightness, overlap: bool = True, rows: int = 1) -> Evaluator:
        layout = build_layout(attachment.sites, "gate", "single", 3.0)
        return Evaluator(backbone, attachment, layout, RewardSet.of((FunctionReward("r", score), 1.0)), rows, overlap)

    yield build
    attachment.detach()


def evaluate(evaluator: Evaluator, done: Callable[[UnitResult], None] | None = None) -> Any:
    layout = evaluator.layout
    thetas = layout.start + 0.2 * np.random.default_rng(0).standard_normal((K, layout.num_parameters))
    return evaluator.evaluate(thetas, PROMPTS, SEEDS, 2, done=done)


@pytest.fixture
def starts(backbone: SD3, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry whenever the sampling of a unit begins."""
    began: list[int] = []
    original = backbone.sample

    def sample(*arguments: Any) -> Any:
        began.append(len(began))
        return original(*arguments)

    monkeypatch.setattr(backbone, "sample", sample)
    return began


def no_thread_left() -> bool:
    return not any(thread.name.startswith("calibri-scoring") for thread in threading.enumerate())


def test_results_and_their_order_are_those_of_the_blocking_path(make: Make) -> None:
    units: dict[bool, list[UnitResult]] = {True: [], False: []}
    rewards = {overlap: evaluate(make(overlap=overlap), units[overlap].append).rewards for overlap in units}
    assert rewards[True].tobytes() == rewards[False].tobytes()
    for one, other in zip(units[True], units[False], strict=True):
        assert (one.index, one.num_units, one.cells) == (other.index, other.num_units, other.cells)
        assert one.rewards.tobytes() == other.rewards.tobytes()
    assert [unit.index for unit in units[True]] == list(range(UNITS))
    assert no_thread_left()


def test_one_unit_is_sampled_while_another_is_scored_and_no_more(make: Make, starts: list[int]) -> None:
    """Each unit but the last is held in scoring until the next one is being sampled; the one after must wait."""
    scored, ahead = 0, []

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        nonlocal scored
        assert threading.current_thread() is not threading.main_thread()
        deadline = time.monotonic() + PATIENCE
        while scored < UNITS - 1 and len(starts) < scored + 2:
            assert time.monotonic() < deadline, "nothing is sampled meanwhile"
            time.sleep(0.001)
        ahead.append(len(starts) - scored)
        scored += 1
        return brightness(images, prompts)

    evaluate(make(score))
    assert scored == UNITS
    assert max(ahead) == 2, "one unit is scored, one is sampled"


def test_without_overlap_everything_happens_in_the_calling_thread(make: Make) -> None:
    threads: list[threading.Thread] = []

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        threads.append(threading.current_thread())
        return brightness(images, prompts)

    evaluate(make(score, overlap=False))
    assert threads == [threading.main_thread()] * UNITS


def test_a_failing_reward_stops_the_sampler_and_keeps_what_was_scored(make: Make, starts: list[int]) -> None:
    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if prompts[0].index == 1:
            raise RuntimeError("the server is down")
        return brightness(images, prompts)

    recorded: list[int] = []
    with pytest.raises(RewardError, match="the server is down"):
        evaluate(make(score), lambda unit: recorded.append(unit.index))
    assert recorded == [0, 1], "the units of the first prompt"
    assert len(starts) <= 4, "the failing unit, and the one that was sampled meanwhile"
    assert no_thread_left()


def test_a_failing_record_stops_the_run(make: Make) -> None:
    def full(unit: UnitResult) -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        evaluate(make(), full)


def test_what_is_scored_when_the_sampler_fails_is_recorded(
    make: Make, backbone: SD3, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = backbone.sample, []
    failed = threading.Event()

    def sample(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            failed.set()
            raise ValueError("a broken model")
        return original(*arguments)

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if prompts[0].index == 0 and len(recorded) == 1:
            assert failed.wait(PATIENCE)
        return brightness(images, prompts)

    monkeypatch.setattr(backbone, "sample", sample)
    recorded: list[int] = []
    with pytest.raises(ValueError, match="a broken model"):
        evaluate(make(score), lambda unit: recorded.append(unit.index))
    assert recorded == [0, 1]
    assert no_thread_left()


def test_an_interrupt_in_the_reward_reaches_the_main_thread(make: Make) -> None:
    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(make(score))
    assert no_thread_left()


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_autocast_and_inference_mode_hold_behind_the_sampler(at_once: int) -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    def work() -> None:
        seen.append((torch.is_inference_mode_enabled(), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype))

    with Behind(torch.device("cpu"), at_once) as behind:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            behind.submit(work, ignore)
        behind.wait()
        behind.submit(work, ignore)
    assert seen == [(True, torch.bfloat16), (False, torch.float32)]


@pytest.mark.parametrize("overlap", [True, False])
def test_rewards_compute_in_their_own_precision(make: Make, overlap: bool) -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        product = images.flatten(1) @ torch.ones(images[0].numel(), 1)
        seen.append((torch.is_inference_mode_enabled(), product.dtype))
        return product[:, 0]

    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        evaluate(make(score, overlap))
    assert seen == [(True, torch.float32)] * UNITS


def test_memory_that_the_scoring_held_is_awaited_before_units_are_cut(
    make: Make, backbone: SD3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler runs out of memory while a unit is scored, and not after it."""
    original, sizes, scoring, retried = backbone.velocity, [], threading.Event(), threading.Event()

    def velocity(x: Tensor, *arguments: Any) -> Tensor:
        if scoring.is_set():
            retried.set()
            raise torch.OutOfMemoryError("the reward's network takes it all")
        sizes.append(len(x))
        return original(x, *arguments)

    def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if not retried.is_set():
            scoring.set()
            assert retried.wait(PATIENCE)
            scoring.clear()
        return brightness(images, prompts)

    expected = evaluate(make(rows=2)).rewards
    monkeypatch.setattr(backbone, "velocity", velocity)
    assert evaluate(make(score, rows=2)).rewards.tobytes() == expected.tobytes()
    assert set(sizes) == {2}


def test_work_is_done_in_order_and_one_at_a_time() -> None:
    log: list[str] = []

    def work(number: int) -> None:
        log.append(f"begin {number}")
        log.append(f"end {number}")

    with Behind(torch.device("cpu")) as behind:
        assert not behind.wait()
        for number in range(20):
            behind.submit(partial(work, number), ignore)
    assert log == [f"{what} {n}" for n in range(20) for what in ("begin", "end")]


def test_several_pieces_run_at_once_and_are_delivered_in_order() -> None:
    meeting, running, most, delivered = threading.Barrier(3, timeout=PATIENCE), [0], [0], []
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        meeting.wait()  # passes only if three are under way at the same time
        if number % 3 == 0:
            time.sleep(0.05)  # the first of each three is the last to be ready
        with lock:
            running[0] -= 1
        return number

    with Behind(torch.device("cpu"), 3) as behind:
        for number in range(9):
            behind.submit(partial(work, number), delivered.append)
    assert delivered == list(range(9))
    assert most == [3]


def test_nothing_is_delivered_after_a_piece_that_failed() -> None:
    delivered: list[int] = []

    def work(number: int) -> int:
        if number == 1:
            raise ZeroDivisionError("the second")
        return number

    def hand_out() -> None:
        with Behind(torch.device("cpu"), 2) as behind:
            for number in range(6):
                behind.submit(partial(work, number), delivered.append)

    with pytest.raises(ZeroDivisionError, match="the second"):
        hand_out()
    assert delivered == [0]
    assert no_thread_left()


def test_scoring_several_units_at_once_changes_no_bit_and_no_order(make: Make) -> None:
    class Parallel(FunctionReward):
        concurrency = 3

    meeting = threading.Barrier(3, timeout=PATIENCE)

    def together(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        meeting.wait()
        return brightness(images, prompts)

    first, second = [], []
    expected = evaluate(make(), first.append).rewards
    evaluator = make()
    evaluator.rewards = RewardSet.of((Parallel("r", together), 1.0))
    assert evaluate(evaluator, second.append).rewards.tobytes() == expected.tobytes()
    assert [unit.index for unit in second] == [unit.index for unit in first]


def test_a_reward_is_never_asked_more_often_at_once_than_it_can_serve(make: Make) -> None:
    class Parallel(FunctionReward):
        concurrency = 3

    lock = threading.Lock()

    def alone(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert lock.acquire(blocking=False), "asked twice at once"
        time.sleep(0.01)
        lock.release()
        return brightness(images, prompts)

    evaluator = make()
    evaluator.rewards = RewardSet.of((Parallel("p", brightness), 1.0), (FunctionReward("r", alone), 1.0))
    assert evaluator.num_scoring == 3
    np.testing.assert_allclose(evaluate(evaluator).rewards, 2 * evaluate(make()).rewards, rtol=1e-6)
