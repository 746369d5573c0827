"""Whole fits on a tiny model: what they deliver, log and print."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import checkpoint, column, last
from tiny_runs import CMA, OFFICIAL, PAIRS, TEST, VAL, TinyRuns

from calibri_lightning import SD3, CalibrationConfig, read_calibration
from calibri_lightning.assembly import assemble
from calibri_lightning.evaluation.files import from_json
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.noise import noise_seed

LAYOUTS = {
    "block": ("block", "single", "fixed"),
    "layer": ("layer", "cfg", "guidance"),
    "gate": ("gate", "2", "raw"),
}


def layout_flags(granularity: str, members: str, weight_mode: str) -> tuple[str, ...]:
    return (
        f"--model.calibration.granularity={granularity}",
        f"--model.calibration.members={members}",
        f"--model.calibration.weight_mode={weight_mode}",
    )


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [(PAIRS, "block"), (PAIRS, "gate"), (CMA, "layer"), (CMA, "gate"), (OFFICIAL, "block"), (OFFICIAL, "layer")],
)
def test_fit_delivers_a_calibration_of_the_configured_layout(
    runs: TinyRuns, tiny_folder: Path, strategy: tuple[str, ...], layout: str
) -> None:
    path = runs.fit("a", *strategy, *layout_flags(*LAYOUTS[layout]))
    granularity, members, weight_mode = LAYOUTS[layout]
    config = CalibrationConfig(granularity, int(members) if members.isdigit() else members, 3.0, weight_mode)
    expected, _ = assemble(SD3(str(tiny_folder / "model")), config)

    found = read_calibration(path / "calibration.json")

    assert found.names == expected.names
    assert (found.granularity, found.weight_mode, found.members) == (granularity, weight_mode, expected.members)
    assert all(
        low <= value <= high for low, value, high in zip(expected.lower, found.values, expected.upper, strict=True)
    )
    assert checkpoint(path)["global_step"] == 2, "a step is a generation"


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("strategy", [PAIRS, CMA])
def test_checkpoint_is_small_safe_and_holds_the_answer_alone(runs: TinyRuns, strategy: tuple[str, ...]) -> None:
    path = runs.fit("a", *strategy, "--trainer.max_steps=3")

    found = checkpoint(path)

    assert list(found["state_dict"]) == ["theta"], "the frozen base is not copied"
    assert last(path).stat().st_size < 50_000
    assert found["state_dict"]["theta"].dtype == torch.float64
    delivered = read_calibration(path / "calibration.json").values
    assert found["state_dict"]["theta"].tolist() == list(delivered), "the last checkpoint knows the answer"
    assert found["global_step"] == 3
    assert len(found["calibri_lightning"]["trace"]["images"]) == 3, "no generation is missing from the plot"


@pytest.mark.usefixtures("no_plots")
def test_metrics_have_a_row_of_each_kind_for_every_generation(runs: TinyRuns) -> None:
    path = runs.fit("a", "--trainer.max_steps=3")

    for name in ("train/reward_mean", "train/sigma", "budget/images", "budget/forwards", "val/mean"):
        assert len(column(path, name)) == 3, name
    assert column(path, "train/images") == [8, 16, 24], "2 pairs x 2 candidates x 2 prompts each"
    # The budget counts all that is made, validation included: start and mean on 3 prompts.
    assert column(path, "budget/images")[:2] == [8, 8 + 6 + 8]
    assert len(column(path, "val/start")) == 1
    assert (path / "config.yaml").is_file()
    assert list(path.glob("events.out.tfevents.*"))


@pytest.mark.usefixtures("no_plots")
def test_validation_score_in_the_file_is_the_mean_reward_of_those_scales(runs: TinyRuns, tiny_folder: Path) -> None:
    path = runs.fit("a", "--trainer.max_steps=3", *CMA)
    found = read_calibration(path / "calibration.json")
    backbone = SD3(str(tiny_folder / "model"))
    layout, attachment = assemble(backbone, CalibrationConfig("layer", "cfg", 3.0, "guidance"))
    evaluator = Evaluator(backbone, attachment, layout, RewardSet({"tiny_rewards:redness": 1.0}), rows_per_forward=6)
    prompts = [Prompt(text, index) for index, text in enumerate(VAL)]
    seeds = [noise_seed(0, -1, index, 0) for index in range(len(VAL))]

    thetas = np.stack([layout.start, np.array(found.values)])
    start, chosen = evaluator.evaluate(thetas, prompts, seeds, num_steps=2).rewards.mean(axis=1)

    assert found.obtained_by.start_score == pytest.approx(start, abs=1e-6)
    assert found.obtained_by.validation_score == pytest.approx(chosen, abs=1e-6)
    assert chosen >= start, "never worse than the start on the validation prompts"


@pytest.mark.usefixtures("no_plots")
def test_bf16_mixed_leaves_the_answer_in_float64(runs: TinyRuns) -> None:
    path = runs.fit("a", "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")
    assert checkpoint(path)["state_dict"]["theta"].dtype == torch.float64


@pytest.mark.usefixtures("no_plots")
def test_without_validation_the_mean_is_delivered(runs: TinyRuns) -> None:
    path = runs.fit("a", "--data.val=null", "--data.test=null", "--test_after_fit=true")
    found = read_calibration(path / "calibration.json")
    assert found.obtained_by.validation_score is None
    assert not (path / "summary.json").exists()
    assert list(found.values) == checkpoint(path)["state_dict"]["theta"].tolist()
    assert any(abs(value - 1) > 1e-4 for value in found.values), "Adam has moved the mean"


@pytest.mark.usefixtures("no_plots")
def test_without_loggers_everything_is_in_the_root_folder(runs: TinyRuns) -> None:
    assert runs("fit", "a", "--trainer.logger=false") == 0
    expected = {"calibration.json", "config.yaml", "ledger", "checkpoints"}
    assert expected <= {path.name for path in runs.folder.iterdir()}


@pytest.mark.usefixtures("no_plots")
def test_image_budget_ends_the_run_early_and_says_so(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.fit("a", "--model.strategy.max_images=17", "--trainer.max_steps=10")
    assert checkpoint(path)["global_step"] == 2, "a generation takes 8 pictures; a third one would exceed 17"
    assert "max_images = 17" in capsys.readouterr().out


def test_fit_then_test_reports_on_the_test_prompts(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    """The one run with everything on: plots, grid, table and summary."""
    path = runs.fit("a", *CMA, "--test_after_fit=true", "--trainer.max_steps=3")
    summary = from_json((path / "summary.json").read_text())
    printed = capsys.readouterr()

    files = {"calibration.json", "scales.png", "convergence.png", "before_after.png", "summary.json"}
    assert files <= {file.name for file in path.iterdir()}
    names = [condition.name for condition in summary.conditions]
    moved = any(
        abs(v - s) > 1e-12 for v, s in zip(read_calibration(path / "calibration.json").values, [1.0] * 99, strict=False)
    )
    assert names[:2] == ["base @ 2 steps", "base @ 3 steps"]
    assert moved == (names[2:] == ["guidance alone @ 2 steps", "calibrated @ 2 steps"])
    assert [c.num_forwards_per_image for c in summary.conditions[:2]] == [4, 6]
    assert all(len(c.rewards["tiny_rewards:redness"]) == len(TEST) for c in summary.conditions)
    budget = column(path, "budget/images")[-1]
    assert budget <= summary.budget.images <= budget + 2 * len(VAL), "the test is no part of the calibration's cost"
    assert str(path / "calibration.json") in printed.out
    assert "DataLoader 0" not in printed.out, "Lightning's table of metrics"
    assert "Warning" not in printed.err
    assert "deprecated" not in printed.err


@pytest.mark.usefixtures("no_plots")
def test_a_prompt_whose_reward_is_nan_does_not_end_the_search(runs: TinyRuns) -> None:
    rewards = '--model.rewards={"tiny_rewards:nan_on_green": 1.0}'
    path = runs.fit("a", rewards, *CMA, "--model.strategy.halving=[4]", "--trainer.max_steps=4", "--data.val=null")
    values = column(path, "train/reward_mean")
    assert len(values) == 4
    assert all(map(math.isfinite, values))
    assert sum(column(path, "train/dropped")) >= 1, "the green prompt was met, and left out"
