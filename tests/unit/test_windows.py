"""Windows of stochastic steps: where they lie, how often, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.windows import AllSteps, RandomWindow, SlidingWindow, Window


def test_all_steps_leave_the_last_one_out_unless_told_otherwise() -> None:
    assert AllSteps().steps(0, 0, 5) == (0, 1, 2, 3)
    assert AllSteps(drop_last=False).steps(3, 7, 5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("window", "starts"),
    [
        (RandomWindow(3), [0, 1, 2, 3, 4, 5, 6]),
        (RandomWindow(3, last=5), [0, 1, 2]),
        (RandomWindow(2, first=1, last=10), [1, 2, 3, 4, 5, 6, 7, 8]),
        (RandomWindow(4, first=3, last=7), [3]),
    ],
)
def test_random_windows_start_anywhere_in_their_range_equally_often(window: RandomWindow, starts: list[int]) -> None:
    draws = 4000
    chosen = [window.steps(17, step, 10) for step in range(draws)]
    assert all(steps == tuple(range(steps[0], steps[0] + window.size)) for steps in chosen)
    counts = Counter(steps[0] for steps in chosen)
    assert sorted(counts) == starts
    share = 1 / len(starts)
    for count in counts.values():
        assert abs(count - draws * share) <= 4.5 * (draws * share * (1 - share)) ** 0.5


def test_random_windows_are_a_pure_function_of_seed_and_training_step(untouched_rng: None) -> None:
    window, other = RandomWindow(2), RandomWindow(2)
    forwards = [window.steps(5, step, 20) for step in range(50)]
    assert forwards == [other.steps(5, step, 20) for step in reversed(range(50))][::-1]
    assert forwards != [window.steps(6, step, 20) for step in range(50)]
    # Any seed of a run, and known forever: a change would change every resumed run.
    assert [RandomWindow(3, last=5).steps(-1, step, 8)[0] for step in range(6)] == [1, 1, 2, 2, 2, 1]


def test_sliding_windows_stay_move_by_one_and_begin_again() -> None:
    window = SlidingWindow(2, stay=3)
    starts = [window.steps(0, step, 6)[0] for step in range(15)]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]
    assert SlidingWindow(2, first=1, last=6, stay=1).steps(0, 3, 6) == (4, 5)
    assert window.steps(0, 4, 6) == window.steps(9, 4, 6) == (1, 2)


@pytest.mark.parametrize(
    ("window", "num_steps", "message"),
    [
        (AllSteps(), 1, "leaves no step to train. Set num_steps to 2 or more"),
        (AllSteps(drop_last=False), 0, "Set num_steps to 1 or more"),
        (RandomWindow(0), 8, "has size 0"),
        (RandomWindow(3, last=9), 8, "up to, not including, 9, but the sampler has num_steps 8"),
        (RandomWindow(3, first=-1), 8, "from -1"),
        (RandomWindow(1, first=7), 8, "from 7 up to, not including, 7"),
        (RandomWindow(8), 8, "has size 8, but there are 7 steps"),
        (SlidingWindow(3, last=2), 8, "has size 3, but there are 2 steps"),
        (SlidingWindow(3, stay=0), 8, "has stay 0"),
    ],
)
def test_windows_that_do_not_fit_are_refused(window: Window, num_steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        window.check(num_steps)
    with pytest.raises(UserError, match=message):
        window.steps(0, 0, num_steps)


def test_windows_that_fit_are_not_refused() -> None:
    for window in (AllSteps(), RandomWindow(7), RandomWindow(8, last=8), SlidingWindow(1, first=7, last=8)):
        window.check(8)
        assert all(0 <= step < 8 for step in window.steps(0, 3, 8))


def test_windows_come_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--window", type=Window)
    config: dict[str, Any] = {"class_path": "SlidingWindow", "init_args": {"size": 3, "stay": 2}}
    assert parser.instantiate(parser.parse_object({"window": config})).window == SlidingWindow(3, stay=2)
    assert parser.instantiate(parser.parse_object({"window": "AllSteps"})).window == AllSteps()
