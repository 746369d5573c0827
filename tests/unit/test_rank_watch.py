"""A rank that hangs, is silent or has failed is named; one that waits is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore

from calibri_lightning.launch import watch as watching
from calibri_lightning.launch.guard import RankGuard
from calibri_lightning.launch.pulse import Pulse, StopRequested, Stopwatch
from calibri_lightning.launch.watch import EXIT_CODE, Failure, RankWatch, failed_rank, tell_failure


class Watches:
    """The watches of all ranks, in this process."""

    def __init__(self, count: int, patience: float) -> None:
        self.store, self.said, self.codes = HashStore(), [], []
        self.watches = [
            RankWatch(self.store, rank, count, patience, interval=0.01, give_up=self.give_up) for rank in range(count)
        ]
        for watch in self.watches:
            watch.start()

    def give_up(self, message: str, code: int) -> None:
        self.codes.append(code)
        self.said.append(message)

    def messages(self, seconds: float = 10.0) -> list[str]:
        """What was said, once there is something."""
        deadline = time.monotonic() + seconds
        while not self.said and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.said


@pytest.fixture
def watches() -> Iterator[Callable[[int, float], Watches]]:
    made: list[Watches] = []

    def make(count: int, patience: float) -> Watches:
        made.append(Watches(count, patience))
        return made[-1]

    yield make
    for each in made:
        for watch in each.watches:
            watch.stop()
            watch.join()


def test_the_rank_that_makes_no_progress_is_named_and_not_those_that_wait_for_it(watches) -> None:
    three = watches(3, 0.5)
    with three.watches[0].pulse.waiting(), three.watches[2].pulse.waiting():
        three.watches[1].pulse.beat("drawing unit 3 of 8")
        [said, *_] = three.messages()
    assert said.startswith("Rank 1 (")
    assert "makes no progress; it is drawing unit 3 of 8" in said
    assert "--rank_timeout" in said
    assert set(three.codes) == {EXIT_CODE}


def test_a_rank_of_which_nothing_is_heard_is_named(watches) -> None:
    two = watches(2, 0.5)
    time.sleep(0.1)
    two.watches[1].pulse.note("saving")
    time.sleep(0.1)
    two.watches[1].stop()
    with two.watches[0].pulse.waiting():
        [said] = two.messages()
    assert "Rank 1 (" in said
    assert "gives no sign of life, and was saving" in said


def test_ranks_that_all_wait_for_each_other_are_a_defect(watches) -> None:
    two = watches(2, 0.3)
    for watch in two.watches:
        watch.pulse.note("drawing")
    with two.watches[0].pulse.waiting(), two.watches[1].pulse.waiting():
        assert "collectives do not fit together" in two.messages()[0]


def test_loading_takes_as_long_as_it_takes(watches) -> None:
    two = watches(2, 0.3)
    time.sleep(1.0)
    with two.watches[0].pulse.waiting():
        time.sleep(0.6)
    assert two.said == []


def test_a_rank_that_never_came_is_named(watches) -> None:
    store = HashStore()
    said: list[str] = []
    alone = RankWatch(store, 0, 2, 0.3, interval=0.01, give_up=lambda message, _: said.append(message))
    alone.start()
    with alone.pulse.waiting():
        alone.join(timeout=10)
    assert said[0].startswith("Rank 1 has not started")


def test_progress_is_no_hang_and_patience_0_reports_none(watches) -> None:
    two, silent = watches(2, 0.4), watches(2, 0)
    deadline = time.monotonic() + 1.2
    while time.monotonic() < deadline:
        for watch in two.watches:
            watch.pulse.beat("drawing")
        time.sleep(0.02)
    assert two.said == silent.said == []


def test_the_first_failure_is_told_to_the_others(watches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE", 0.1)
    three = watches(3, 0)
    assert failed_rank(three.store) is None
    first = Failure(1, 2, "error: no such file")
    tell_failure(three.store, first)
    tell_failure(three.store, Failure(2, 75, "error: the connection was lost"))
    assert failed_rank(three.store) == first
    deadline = time.monotonic() + 10
    while len(three.said) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert three.said == ["Rank 1 ended: error: no such file"] * 2, "the rank itself needs no telling"
    assert three.codes == [2, 2], "all end with its code"


def test_a_store_that_is_gone_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(watching, "GRACE", 0.1)
    said: list[str] = []
    watch = RankWatch(Gone(), 1, 2, 0.1, interval=0.01, give_up=lambda message, _: said.append(message))
    watch.start()
    watch.join(timeout=10)
    assert "Rank 0, at which the ranks meet, has not answered" in said[0]


def test_a_pulse_stops_between_two_beats_and_not_within() -> None:
    pulse = Pulse()
    pulse.beat("one")
    pulse.stop = 15
    pulse.note("two")
    assert (pulse.reading.stage, pulse.reading.count) == ("two", 2)
    with pytest.raises(StopRequested, match="SIGTERM"):
        pulse.beat("three")
    with pulse.waiting():
        assert pulse.reading.waiting
        assert pulse.reading.stage == "three"
    assert not pulse.reading.waiting


def test_a_stopwatch_runs_from_the_last_change() -> None:
    watch = Stopwatch(0.0)
    assert [watch.seconds(value, now) for value, now in ((1, 5.0), (1, 7.5), (2, 8.0), (2, 9.0))] == [0, 2.5, 0, 1]


def test_one_process_has_nobody_to_tell() -> None:
    guard = RankGuard()
    assert guard.follows(RuntimeError("gloo")) is None
    guard.leave(1, "error")
