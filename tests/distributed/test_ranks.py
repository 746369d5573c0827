"""Two processes deliver what one delivers, byte for byte, and draw and score the same pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_rewards
import torch
from run_files import checkpoint, column, last
from tiny_runs import CMA, OFFICIAL, PAIRS, TinyRuns, forked, rank_environments

from calibri_lightning import engine
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.grid import Cell

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("no_plots")]

DDP = ("--trainer.devices=2", "--trainer.strategy=ddp")


def two(runs: TinyRuns, tmp_path: Path, command: str, name: str, *flags: str, ranks: int = 2) -> Path:
    """Runs a command on two ranks, or more, that has to succeed; its folder."""
    words = runs.arguments(command, name, *DDP, f"--trainer.devices={ranks}", *flags)
    codes = forked([words] * ranks, rank_environments(ranks), tmp_path / "log")
    assert codes == [0] * ranks, (tmp_path / "log").read_text()
    assert len(list((runs.folder / name).iterdir())) == 1, "the ranks share one folder"
    return runs.latest(name)


@pytest.mark.parametrize("strategy", [PAIRS, CMA, OFFICIAL], ids=["pairs", "cma", "official"])
def test_two_ranks_deliver_the_bytes_of_one(runs: TinyRuns, tmp_path: Path, strategy: tuple[str, ...]) -> None:
    """Were candidates buffers, DDP would overwrite rank 1's; were prompts sampled per rank, they would differ."""
    flags = (*strategy, "--trainer.max_steps=3")
    one = runs.fit("one", *flags)
    pair = two(runs, tmp_path, "fit", "two", *flags)

    assert (pair / "calibration.json").read_bytes() == (one / "calibration.json").read_bytes()
    for name in ("val/start", "val/mean", "train/reward_mean", "train/sigma", "budget/images"):
        assert column(pair, name) == column(one, name), name
    states = [checkpoint(path) for path in (one, pair)]
    assert states[0]["global_step"] == states[1]["global_step"] == 3
    assert torch.equal(states[0]["state_dict"]["theta"], states[1]["state_dict"]["theta"])
    assert {file.name for file in (pair / "ledger").iterdir()} == {
        "generations.jsonl",
        "units.rank0.jsonl",
        "units.rank1.jsonl",
    }
    for rank in (0, 1):
        assert (pair / "ledger" / f"units.rank{rank}.jsonl").stat().st_size, f"rank {rank} did work"


@pytest.mark.parametrize(("strategy", "ranks"), [(PAIRS, 3), (CMA, 3), (CMA, 7)], ids=["pairs-3", "cma-3", "cma-7"])
def test_any_number_of_ranks_delivers_the_bytes_of_one(
    runs: TinyRuns, tmp_path: Path, strategy: tuple[str, ...], ranks: int
) -> None:
    """Numbers that divide neither the candidates nor the units; of seven ranks some have nothing to do."""
    one = runs.fit("one", *strategy)
    several = two(runs, tmp_path, "fit", "several", *strategy, ranks=ranks)
    assert (several / "calibration.json").read_bytes() == (one / "calibration.json").read_bytes()
    assert column(several, "val/mean") == column(one, "val/mean")


def test_ranks_agree_on_automatic_rows(runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their devices would take different numbers of rows, all take the smallest."""
    flags = ("--trainer.max_steps=2", "--data.val=null")
    one = runs.fit("one", *flags, "--model.rows_per_forward=4")
    rows = {"0": 6, "1": 4}
    monkeypatch.setattr(engine, "automatic_rows", lambda *_: rows[os.environ["LOCAL_RANK"]])
    pair = two(runs, tmp_path, "fit", "two", *flags, "--model.rows_per_forward=auto")
    assert (pair / "calibration.json").read_bytes() == (one / "calibration.json").read_bytes()
    assert "4 rows a forward" in (tmp_path / "log").read_text()


def test_balanced_units_of_two_ranks_deliver_the_bytes_of_one(runs: TinyRuns, tmp_path: Path) -> None:
    flags = ("--trainer.max_steps=2", "--model.rows_per_forward=10", "--model.balance_over=2")
    one = runs.fit("one", *flags)
    pair = two(runs, tmp_path, "fit", "two", *flags)
    assert (pair / "calibration.json").read_bytes() == (one / "calibration.json").read_bytes()
    for rank in (0, 1):
        units = [json.loads(line) for line in (pair / "ledger" / f"units.rank{rank}.jsonl").read_text().splitlines()]
        assert [len(unit["cells"]) for unit in units if "cells" in unit] == [4, 4], "8 pictures a generation"
    assert "will be idle" not in (tmp_path / "log").read_text()


def test_a_launch_whose_ranks_would_wait_is_told_once_what_to_set(runs: TinyRuns, tmp_path: Path) -> None:
    two(runs, tmp_path, "fit", "two", "--trainer.max_steps=1", "--data.val=null", "--model.rows_per_forward=16")
    log = (tmp_path / "log").read_text()
    assert log.count("50% of the time of 2 processes will be idle") == 1
    assert "--model.balance_over=2 it is 0%" in log


def test_table_and_pictures_of_two_ranks_are_those_of_one(runs: TinyRuns, tmp_path: Path) -> None:
    start = runs.fit("start", *CMA, "--data.val=null")
    flags = (f"--model.init_from={start}", "--data.predict_prompts=[a red circle, a blue square, a green circle]")
    assert runs("test", "one", *flags) == 0
    pair = two(runs, tmp_path, "test", "two", *flags)
    one = runs.latest("one")
    documents = [json.loads((path / "summary.json").read_text()) for path in (one, pair)]
    assert documents[0]["conditions"] == documents[1]["conditions"]
    assert (one / "before_after.png").read_bytes() == (pair / "before_after.png").read_bytes()

    small = "--model.rows_per_forward=2"  # one picture a unit, so that both ranks draw some
    assert runs("predict", "drawn", *flags, small) == 0
    shared = two(runs, tmp_path, "predict", "drawn2", *flags, small)
    pictures = {
        name: {file.name: file.read_bytes() for file in (path / "images").iterdir()}
        for name, path in (("one", runs.latest("drawn")), ("two", shared))
    }
    assert len(pictures["one"]) == 3
    assert pictures["one"] == pictures["two"]


def test_kill_on_two_ranks_resumes_on_one(runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledgers of all ranks are read, whatever the number of ranks that go on."""
    flags = ("--trainer.max_steps=3", "--data.val=null")
    whole = runs.fit("whole", *flags)
    words = runs.arguments("fit", "cut", *DDP, *flags)
    # Each generation is 3 units: 2 on rank 0 and 1 on rank 1. Rank 1 dies in its second one, and rank 0 with it.
    environments = [
        rank | {tiny_rewards.CALLS: str(tmp_path / f"calls{number}"), tiny_rewards.KILL_AT: str(at)}
        for number, (rank, at) in enumerate(zip(rank_environments(2), (4, 2), strict=True))
    ]
    codes = forked([words, words], environments, tmp_path / "log")
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    resumed = runs.fit("cut", *flags, f"--ckpt_path={last(runs.latest('cut'))}")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()
    # Of the 9 units 3 + 1 were finished: the first generation, and rank 0's first unit of the second.
    assert len((tmp_path / "calls").read_text().splitlines()) == 9 - 4


def test_memory_that_runs_out_on_one_rank_halves_the_forwards_of_all(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the next request on, and in a run that is resumed."""
    sample = Evaluator._sample

    def limited(self: Evaluator, unit: Sequence[Cell], *rest: Any) -> Any:
        rank = os.environ.get("LOCAL_RANK", "alone")
        if rank == "1" and len(unit) > 2:
            raise torch.OutOfMemoryError("the smaller device")
        with (tmp_path / f"sizes{rank}").open("a") as file:
            file.write(f"{len(unit)} ")
        return sample(self, unit, *rest)

    monkeypatch.setattr(Evaluator, "_sample", limited)
    flags = ("--data.val=null", "--model.rows_per_forward=6")
    pair = two(runs, tmp_path, "fit", "two", *flags, "--trainer.max_steps=2")
    # Units of 3, 3 and 2 pictures a generation.
    assert (tmp_path / "sizes0").read_text().split() == ["3", "2", "2", "1", "2"]
    assert (tmp_path / "sizes1").read_text().split() == ["2", "1", "2", "1"]
    assert checkpoint(pair)["calibri_lightning"]["at_once"] == 2
    runs.fit("two", *flags, "--trainer.max_steps=3", f"--ckpt_path={last(pair)}")
    assert (tmp_path / "sizesalone").read_text().split() == ["2", "1", "2", "1", "2"]


def test_a_checkpoint_of_an_earlier_version_knows_no_bound(runs: TinyRuns) -> None:
    path = last(runs.fit("a", "--data.val=null", "--trainer.max_steps=1"))
    state = torch.load(path, weights_only=True)
    del state["calibri_lightning"]["at_once"]
    torch.save(state, path)
    runs.fit("a", "--data.val=null", "--trainer.max_steps=2", f"--ckpt_path={path}")


def test_error_on_one_rank_ends_all(runs: TinyRuns, tmp_path: Path) -> None:
    words = runs.arguments("fit", "bad", *DDP, '--model.rewards={"tiny_rewards:raises_on_rank_one": 1.0}')
    assert forked([words, words], rank_environments(2), tmp_path / "log") == [2, 2]
    log = (tmp_path / "log").read_text()
    assert "tiny_rewards:raises_on_rank_one" in log
    assert "Rank 1 ended: error: " in log
    assert "Traceback" not in log


def torchrun(runs: TinyRuns, *flags: str) -> subprocess.CompletedProcess[str]:
    """Starts a fit on two ranks with the real launcher, as a user would."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "calibri_lightning"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny_rewards.__file__).parent), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launcher, *runs.arguments("fit", "two", *DDP, *flags)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=550, check=False)


@pytest.mark.slow
def test_torchrun_starts_the_ranks(runs: TinyRuns) -> None:
    one = runs.fit("one", "--trainer.max_steps=1")
    answer = torchrun(runs, "--trainer.max_steps=1")
    assert answer.returncode == 0, answer.stderr
    two_ranks = runs.latest("two") / "calibration.json"
    assert two_ranks.read_bytes() == (one / "calibration.json").read_bytes()
    assert answer.stdout.count("Calibrating") == 1, "one rank speaks"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["--model.num_stepz=2", "--data.train=null"])
def test_a_mistake_that_all_ranks_meet_is_one_line(runs: TinyRuns, mistake: str) -> None:
    answer = torchrun(runs, mistake)
    assert answer.returncode != 0
    assert sum(line.startswith("error:") for line in answer.stderr.splitlines()) == 1, answer.stderr
