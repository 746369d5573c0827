"""A run that is cut off anywhere and resumed delivers what the uninterrupted run delivers, byte for byte."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_rewards
import torch
from run_files import checkpoint, last
from tiny_runs import CMA, OFFICIAL, PAIRS, VAL, TinyRuns, forked

from calibri_lightning import read_calibration
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

pytestmark = pytest.mark.usefixtures("no_plots")

STEPS = "--trainer.max_steps=3"


def content(path: Path) -> bytes:
    return (path / "calibration.json").read_bytes()


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def blocks(log: Path) -> list[tuple[str, int]]:
    """Number of calls of each generation and each validation, in order; the texts of the prompts tell them apart."""
    kinds = ["validation" if text in VAL else "generation" for text in log.read_text().splitlines()]
    return [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]


def edit(path: Path, **changes: object) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Counts the calls of the reward: one for each unit, of training and of validation."""
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    return tmp_path / "calls"


@pytest.mark.parametrize("strategy", [PAIRS, CMA, OFFICIAL], ids=["pairs", "cma", "official"])
@pytest.mark.parametrize("where", ["generation", "validation"])
def test_kill_and_resume_deliver_the_same_bytes(
    runs: TinyRuns, tmp_path: Path, counted: Path, strategy: tuple[str, ...], where: str
) -> None:
    """Killed in the second unit of the second generation, or in the last unit of the validation after it."""
    flags = (*strategy, STEPS)
    whole = runs.fit("whole", *flags)
    total, parts = calls(counted), blocks(counted)
    assert [kind for kind, _ in parts] == ["generation", "validation"] * 3
    sizes = [size for _, size in parts]
    kill_at = sum(sizes[:2]) + 2 if where == "generation" else sum(sizes[:4])
    counted.unlink()
    environment = {tiny_rewards.KILL_AT: str(kill_at)}
    [code] = forked([runs.arguments("fit", "cut", *flags)], [environment], tmp_path / "log")
    assert code == -signal.SIGKILL
    cut = runs.latest("cut")
    assert checkpoint(cut)["global_step"] == (1 if where == "generation" else 2)
    counted.unlink()

    resumed = runs.fit("cut", *flags, f"--ckpt_path={last(cut)}")

    assert content(resumed) == content(whole)
    assert last(cut).is_file(), "the resumed run leaves the old one's checkpoint where it is"
    repeated = 0 if where == "generation" else sizes[3] - 1
    assert calls(counted) == total - (kill_at - 1) + repeated, "finished units of a generation are not made again"
    trace = checkpoint(resumed)["calibri_lightning"]["trace"]
    assert trace == checkpoint(whole)["calibri_lightning"]["trace"], "a hole in the plot"


@pytest.mark.parametrize("strategy", [PAIRS, CMA], ids=["pairs", "cma"])
def test_units_finished_before_the_kill_are_not_computed_again(
    runs: TinyRuns, tmp_path: Path, counted: Path, strategy: tuple[str, ...]
) -> None:
    """Without validation every call is a unit of a generation, so the two parts add up exactly."""
    flags = (*strategy, STEPS, "--data.val=null")
    whole = runs.fit("whole", *flags)
    total = calls(counted)
    counted.unlink()
    environment = {tiny_rewards.KILL_AT: str(total - 1)}
    [code] = forked([runs.arguments("fit", "cut", *flags)], [environment], tmp_path / "log")
    assert code == -signal.SIGKILL
    assert calls(counted) == total - 1
    counted.unlink()
    resumed = runs.fit("cut", *flags, f"--ckpt_path={last(runs.latest('cut'))}")
    assert content(resumed) == content(whole)
    assert calls(counted) == 2, "the unit that was killed, and the last"


def test_kill_in_the_closing_validation(runs: TinyRuns, tmp_path: Path, counted: Path) -> None:
    """After the last generation Lightning would skip the loop, and with it the end of the run."""
    flags = (STEPS, "--trainer.val_check_interval=100")
    whole = runs.fit("whole", *flags)
    total = calls(counted)
    counted.unlink()
    [code] = forked([runs.arguments("fit", "cut", *flags)], [{tiny_rewards.KILL_AT: str(total)}], tmp_path / "log")
    assert code == -signal.SIGKILL
    cut = runs.latest("cut")
    assert checkpoint(cut)["global_step"] == 3
    assert not (cut / "calibration.json").exists()
    resumed = runs.fit("cut", *flags, f"--ckpt_path={last(cut)}")
    assert content(resumed) == content(whole)


def test_a_finished_run_resumes_to_itself_and_may_be_extended(runs: TinyRuns) -> None:
    path = runs.fit("a", *CMA, STEPS)
    again = runs.fit("a", *CMA, STEPS, f"--ckpt_path={last(path)}")
    assert content(again) == content(path)

    longer = runs.fit("a", *CMA, "--trainer.max_steps=5", f"--ckpt_path={last(path)}")
    extended = checkpoint(longer)
    assert extended["global_step"] == 5
    trace = extended["calibri_lightning"]["trace"]
    assert len(trace["images"]) == 5
    assert trace["images"][:3] == checkpoint(path)["calibri_lightning"]["trace"]["images"]
    score = read_calibration(longer / "calibration.json").obtained_by.validation_score
    assert score >= read_calibration(path / "calibration.json").obtained_by.validation_score


def test_resume_without_loggers_goes_on_in_the_same_folder(runs: TinyRuns, tmp_path: Path, counted: Path) -> None:
    flags = (STEPS, "--trainer.logger=false", "--data.val=null")
    whole = runs.fit("whole", STEPS, "--data.val=null")
    counted.unlink()
    [code] = forked([runs.arguments("fit", "b", *flags)], [{tiny_rewards.KILL_AT: "5"}], tmp_path / "log")
    assert code == -signal.SIGKILL
    assert runs("fit", "b", *flags, f"--ckpt_path={last(runs.folder)}") == 0
    assert content(runs.folder) == content(whole)


def test_settings_stored_in_a_checkpoint_do_not_override_the_command_line(runs: TinyRuns) -> None:
    """Lightning's CLI would take `hyper_parameters` over the configuration and over explicit flags (issue #20801)."""
    path = runs.fit("a", "--trainer.max_steps=1")
    edit(last(path), hyper_parameters={"num_steps": 7, "num_grid_prompts": 9})
    again = runs.fit("a", "--trainer.max_steps=2", "--model.num_steps=2", f"--ckpt_path={last(path)}")
    assert read_calibration(again / "calibration.json").obtained_by.num_steps == 2
    assert "num_grid_prompts: 2" in (again / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.strategy.sigma0=0.2", ("sigma0 was 0.15 and is 0.2", "init_from")),
        ("--seed_everything=1", ("seed", "init_from")),
        ("--model.calibration.granularity=gate", ("does not fit this run", "granularity", "init_from")),
        ("--model.calibration.weight_mode=raw", ("does not fit this run", "weight_mode")),
        ("--model.strategy.prompts_per_pair=1", ("prompts_per_step=4", "init_from")),
    ],
)
def test_resume_under_other_settings_is_refused(
    runs: TinyRuns, capsys: pytest.CaptureFixture[str], flag: str, words: tuple[str, ...]
) -> None:
    path = runs.fit("a", "--trainer.max_steps=1")
    before = last(path).read_bytes()
    capsys.readouterr()
    assert runs("fit", "a", f"--ckpt_path={last(path)}", flag) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert last(path).read_bytes() == before


def test_resume_on_another_fine_tune_of_the_model_is_refused(
    runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.fit("a", "--trainer.max_steps=1")
    build_pipeline(TINY, seed=1).save_pretrained(tmp_path / "other")
    other = f"--model.backbone.pretrained={tmp_path / 'other'}"
    assert runs("fit", "a", f"--ckpt_path={last(path)}", other) == 2
    assert "its model has other weights" in capsys.readouterr().err
    assert runs("fit", "b", f"--model.init_from={path}", other) == 0, "a calibration may move to a fine-tune"


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        (tiny_rewards.INTERRUPT_AT, "9", 130),
        (tiny_rewards.SIGNAL_AT, "SIGTERM 9", 143),
        (tiny_rewards.SIGNAL_AT, "SIGUSR1 9", 138),
    ],
)
def test_interrupt_says_how_to_go_on(
    runs: TinyRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counted: Path,
    variable: str,
    value: str,
    code: int,
) -> None:
    whole = runs.fit("whole", STEPS)
    total = calls(counted)
    counted.unlink()
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv(variable, value)
    assert runs("fit", "cut", STEPS) == code
    signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    monkeypatch.delenv(variable)
    cut = runs.latest("cut")
    error = capsys.readouterr().err
    assert "interrupted" in error
    assert f"--ckpt_path {last(cut)}" in error
    resumed = runs.fit("cut", STEPS, f"--ckpt_path={last(cut)}")
    assert content(resumed) == content(whole)
    if variable == tiny_rewards.SIGNAL_AT:
        # Validation prompts in the middle are scored anew; a unit of a generation that was begun is finished and kept.
        assert calls(counted) <= total + blocks(counted)[0][1]


def test_ledger_of_a_run_is_readable_json_lines(runs: TinyRuns) -> None:
    path = runs.fit("a", STEPS, "--data.val=null")
    lines = [json.loads(line) for line in (path / "ledger" / "generations.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 1, 2]
    rewards = np.array([reward for line in lines for _, _, reward in line["cells"]])
    assert len(rewards) == 24
    assert np.isfinite(rewards).all()
