"""The alarm against reward hacking: it rings when it should, and only then."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pytest

from calibri_lightning.arrays import Floats
from calibri_lightning.rewards.watch import WINDOW, Watch

P = 50
RNG = np.random.default_rng(0)
BASE = RNG.normal(0, 1, P)
NOISE = RNG.normal(0, 0.1, P)

Each = Mapping[str, Mapping[str, Floats]]


def started() -> Watch:
    watch = Watch()
    watch.validated({"start": BASE}, {"start": {"aesthetic": BASE, "r": BASE}}, ["aesthetic"])
    return watch


def told(watch: Watch, gain: float, change: float) -> tuple[str, ...]:
    each = {"mean": {"aesthetic": BASE + change + NOISE, "r": BASE + gain}}
    return watch.validated({"mean": BASE + gain + NOISE[::-1]}, each, ["aesthetic"])


@pytest.mark.parametrize(
    ("gain", "change", "rings"),
    [(0.5, -0.2, True), (0.5, 0.2, False), (-0.5, -0.2, False), (0.5, 0.0, False), (0.0, -0.2, False)],
)
def test_it_rings_where_the_optimised_rises_and_the_watched_falls(gain: float, change: float, rings: bool) -> None:
    watch = started()
    alarms = told(watch, gain, change)
    assert bool(alarms) == rings
    assert watch.num_alarms == int(rings)
    if rings:
        assert "mean gained +0.5" in alarms[0]
        assert "of aesthetic" in alarms[0]


def test_it_is_silent_again_when_the_danger_is_over(caplog: pytest.LogCaptureFixture) -> None:
    watch = started()
    with caplog.at_level(logging.WARNING):
        told(watch, 0.5, -0.2)
        assert "Reward hacking?" in caplog.text
        caplog.clear()
        told(watch, 0.5, 0.2)
    assert not caplog.text
    assert watch.num_alarms == 0


def test_differences_are_paired_so_that_prompts_of_different_difficulty_do_not_hide_them() -> None:
    """A fall of 0.05 is far below the spread 1 of the prompts, and far above that of the differences."""
    assert told(started(), 0.5, -0.05 - NOISE.mean())


def test_it_rings_when_pictures_of_a_prompt_become_alike() -> None:
    watch = started()
    for diversity in [1.0] * WINDOW + [0.9] * WINDOW:
        watch.trained(diversity)
    assert not told(watch, 0.5, 0.2)
    for diversity in [0.7] * WINDOW:
        watch.trained(diversity)
    [alarm] = told(watch, 0.5, 0.2)
    assert "differ less: 0.7, in the first 10 steps 1" in alarm


def test_pictures_that_failed_do_not_count() -> None:
    watch = started()
    watch.trained(float("nan"))
    assert not watch.diversity
    broken = BASE.copy()
    broken[:] = np.nan
    assert not watch.validated({"mean": BASE + 1}, {"mean": {"aesthetic": broken, "r": BASE}}, ["aesthetic"])


def test_a_checkpoint_brings_it_back() -> None:
    watch = started()
    watch.trained(0.5)
    told(watch, 0.5, -0.2)
    again = Watch(**watch.state())
    assert again == watch
    assert told(again, 0.5, -0.2) == told(watch, 0.5, -0.2)


def test_differences_within_rounding_do_not_ring() -> None:
    watch = started()
    each = {"mean": {"aesthetic": BASE - 1e-9, "r": BASE}}
    assert not watch.validated({"mean": BASE + 1e-9}, each, ["aesthetic"])


def test_another_run_may_watch_others() -> None:
    """A resumed run: one reward is no longer held out, another one is new, and is compared once the start has it."""
    watch = Watch(**started().state())
    assert not watch.lacks(["aesthetic"])
    assert watch.lacks(["new"])
    fallen = {"mean": {"new": BASE - 1 + NOISE}}
    assert not watch.validated({"mean": BASE + 0.5 + NOISE[::-1]}, fallen, ["new"])
    with_start = {"start": {"new": BASE}, **fallen}
    assert watch.validated({"start": BASE, "mean": BASE + 0.5 + NOISE[::-1]}, with_start, ["new"])
    assert not watch.lacks(["new"])


def test_a_start_without_scores_is_asked_again() -> None:
    nothing = np.full(P, np.nan)
    watch = Watch()
    watch.validated({"start": nothing}, {"start": {"aesthetic": nothing}}, ["aesthetic"])
    assert watch.lacks(["aesthetic"])
    assert not watch.is_watching, "0 alarms would be a lie"
    watch.validated({"start": BASE}, {"start": {"aesthetic": BASE}}, ["aesthetic"])
    assert not watch.lacks(["aesthetic"])
    assert told(watch, 0.5, -0.2)


def test_without_anything_to_compare_with_nothing_is_said() -> None:
    assert not told(Watch(), 0.5, -0.2)
    assert not Watch().is_watching
