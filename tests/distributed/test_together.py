"""Ranks begin together or not at all, and end together, whatever happens to one of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_rewards
from run_files import last
from test_policy_ranks import GRPO
from tiny_runs import TinyRuns, forked, rank_environments

from calibri_lightning import checkpoint
from calibri_lightning.calibration import weights
from calibri_lightning.launch import agreement
from calibri_lightning.strategies.evolution import EvolutionStrategy
from calibri_lightning.strategies.gradient_step import GradientStep

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("no_plots")]

DDP = ("--trainer.devices=2", "--trainer.strategy=ddp")
STEPS = ("--trainer.max_steps=3", "--data.val=null")
Pair = Callable[..., tuple[list[int | None], str]]


def on_rank(rank: int) -> bool:
    return os.environ.get("LOCAL_RANK") == str(rank)


@pytest.fixture
def pair(runs: TinyRuns, tmp_path: Path) -> Pair:
    """Runs a fit on two ranks; exit codes, and what was printed."""

    def run(
        *flags: str, of_one: tuple[str, ...] = (), stopped: int | None = None, **environment: str
    ) -> tuple[list[int | None], str]:
        words = runs.arguments("fit", "two", *DDP, *STEPS, *flags)
        ranks = [
            rank | {tiny_rewards.CALLS: str(tmp_path / f"calls{number}")} | (environment if number else {})
            for number, rank in enumerate(rank_environments(2))
        ]
        log = tmp_path / "log"
        codes = forked([words, [*words, *of_one]], ranks, log, stopped)
        return codes, log.read_text()

    return run


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_to_one_rank_stops_all_at_a_place_from_which_they_go_on(
    runs: TinyRuns, pair: Pair, name: str, code: int
) -> None:
    whole = runs.fit("whole", *STEPS)
    codes, log = pair(TINY_REWARDS_SIGNAL_AT=f"{name} 2")
    assert codes == [code, code], log
    cut = runs.latest("two")
    assert f"--ckpt_path {last(cut)}" in log
    assert "Traceback" not in log
    resumed = runs.fit("two", *STEPS, "--ckpt_path=auto")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_a_signal_to_one_rank_stops_a_training_of_a_lora(pair: Pair) -> None:
    codes, log = pair(*GRPO, TINY_REWARDS_SIGNAL_AT="SIGTERM 1")
    assert codes == [143, 143], log


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("--model.num_steps=3", "model.num_steps is '3' there and '2' on rank 0"),
        ("--seed_everything=1", "seed_everything is '1' there and '0' on rank 0"),
    ],
)
def test_other_settings_on_one_rank_are_named(pair: Pair, other: str, said: str) -> None:
    codes, log = pair(of_one=(other,))
    assert codes == [2, 2], log
    assert "Rank 1 on" in log
    assert "has other settings" in log
    assert said in log or "more)" in log
    assert "Traceback" not in log


def test_other_files_on_one_rank_are_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "weights_digest", lambda *_, **__: os.environ["LOCAL_RANK"])
    codes, log = pair()
    assert codes == [2, 2], log
    assert "has other files than rank 0" in log
    assert "the model's weights is '1' there" in log


def test_a_folder_that_is_not_shared_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_appears", lambda _: on_rank(0))
    codes, log = pair()
    assert codes == [2, 2], log
    assert "is not the same for all: rank 1 on" in log


def test_a_full_disk_on_rank_0_ends_all(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "replacing", full)
    codes, log = pair()
    assert codes == [2, 2], log
    assert "The checkpoint cannot be written to" in log
    assert "Rank 0 ended: error: The checkpoint cannot be written" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("rank", [0, 1])
def test_a_defect_on_one_rank_ends_all(pair: Pair, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    publish = EvolutionStrategy._publish

    def broken(*arguments: Any) -> None:
        if on_rank(rank):
            raise ZeroDivisionError("nobody foresaw this")
        publish(*arguments)

    monkeypatch.setattr(EvolutionStrategy, "_publish", broken)
    codes, log = pair()
    assert codes == [1, 1], log
    assert f"Rank {rank} ended: ZeroDivisionError('nobody foresaw this')" in log


def test_a_hung_rank_is_named_and_all_end(pair: Pair) -> None:
    codes, log = pair("--rank_timeout=4", "--trainer.max_steps=100", TINY_REWARDS_SIGNAL_AT="SIGSTOP 15", stopped=1)
    assert codes == [75, -9], log
    assert "Rank 1 (" in log
    assert "gives no sign of life, and was drawing unit" in log


def test_ranks_that_drift_apart_are_stopped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientStep, "_sum_over_ranks", lambda *_: None)
    codes, log = pair(*GRPO)
    assert codes == [2, 2], log
    assert "Rank(s) 1 of 2 have other parameters or prompts after step 1 than rank 0" in log
