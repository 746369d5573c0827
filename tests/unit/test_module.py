"""Whole runs on a tiny model: what a fit, a validation, a test and a prediction leave behind."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import CMA, OFFICIAL, PAIRS, TEST, VAL, TinyRuns

from calibri_lightning import SD3, CalibrationConfig, CalibriModule, PairES, read_calibration
from calibri_lightning.assembly import assemble
from calibri_lightning.calibration import write_calibration
from calibri_lightning.conditions import Conditions
from calibri_lightning.evaluation.files import from_json
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.validation import validation_scores

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


def load(path: Path) -> dict:
    return torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def pictures(path: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((path / "images").glob("*.png"))}


@pytest.fixture
def module(tiny_folder: Path) -> CalibriModule:
    return CalibriModule(SD3(str(tiny_folder / "model")), {"tiny_rewards:redness": 1.0}, PairES(), rows_per_forward=6)


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
    assert load(path)["global_step"] == 2, "a step is a generation"


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("strategy", [PAIRS, CMA])
def test_checkpoint_is_small_safe_and_holds_the_answer_alone(runs: TinyRuns, strategy: tuple[str, ...]) -> None:
    path = runs.fit("a", *strategy, "--trainer.max_steps=3")

    checkpoint = load(path)

    assert list(checkpoint["state_dict"]) == ["theta"], "the frozen base is not copied"
    assert (path / "checkpoints" / "last.ckpt").stat().st_size < 50_000
    assert checkpoint["state_dict"]["theta"].dtype == torch.float64
    delivered = read_calibration(path / "calibration.json").values
    assert checkpoint["state_dict"]["theta"].tolist() == list(delivered), "the last checkpoint knows the answer"
    assert checkpoint["global_step"] == 3
    assert len(checkpoint["calibri_lightning"]["trace"]["images"]) == 3, "no generation is missing from the plot"


@pytest.mark.usefixtures("no_plots")
def test_metrics_have_a_row_of_each_kind_for_every_generation(runs: TinyRuns) -> None:
    path = runs.fit("a", "--trainer.max_steps=3")
    rows = metrics(path)

    for name in ("train/reward_mean", "train/sigma", "budget/images", "budget/forwards", "val/mean"):
        assert len(column(rows, name)) == 3, name
    assert column(rows, "train/images") == [8, 16, 24], "2 pairs x 2 candidates x 2 prompts each"
    # The budget counts all that is made, validation included: start and mean on 3 prompts.
    assert column(rows, "budget/images")[:2] == [8, 8 + 6 + 8]
    assert len(column(rows, "val/start")) == 1
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


def test_start_draws_exactly_the_pictures_of_the_bare_model(tiny_folder: Path) -> None:
    """With all scales 1: an Euler loop by hand, on a model without hooks, bit for bit."""
    backbone = SD3(str(tiny_folder / "model"))
    batch = PromptBatch(-3, tuple(Prompt(text, index) for index, text in enumerate(TEST)))
    seeds = [noise_seed(0, -3, prompt.index, 0) for prompt in batch.prompts]
    texts = [prompt.text for prompt in batch.prompts]
    with torch.no_grad():
        x, sigmas = backbone.noise(seeds), backbone.schedule(2)
        both = [text for prompt in texts for text in (prompt, "")]
        conditioning = backbone.encode(both)
        for step in range(2):
            velocity = backbone.velocity(x.repeat_interleave(2, dim=0), sigmas[step].expand(6), conditioning)
            guided = velocity.unflatten(0, (3, 2))
            guided = backbone.guide(guided, torch.tensor([[3.0, -2.0]]).expand(3, 2))
            x = x + (sigmas[step + 1] - sigmas[step]) * guided
        expected = backbone.decode(x)

    layout, attachment = assemble(backbone, CalibrationConfig("gate", "cfg", 3.0, "raw"))
    evaluator = Evaluator(backbone, attachment, layout, RewardSet({"tiny_rewards:redness": 1.0}), rows_per_forward=6)
    [(_, images)] = evaluator.images(layout.start[None], batch.prompts, seeds, num_steps=2)

    assert torch.equal(images, expected)


def test_theta_is_a_parameter_that_ddp_does_not_overwrite(module: CalibriModule) -> None:
    """DDP broadcasts buffers at every forward, and refuses a module without parameters that require gradients."""
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trainable == ["theta"]
    assert "theta" not in dict(module.named_buffers())
    assert all(name.startswith("networks.") for name, _ in module.named_buffers())
    assert not any(network.training for network in module.networks)


@pytest.mark.usefixtures("no_plots")
def test_bf16_mixed_leaves_the_answer_in_float64(runs: TinyRuns) -> None:
    path = runs.fit("a", "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")
    assert load(path)["state_dict"]["theta"].dtype == torch.float64


@pytest.mark.usefixtures("no_plots")
def test_without_validation_the_mean_is_delivered(runs: TinyRuns) -> None:
    path = runs.fit("a", "--data.val=null", "--data.test=null", "--test_after_fit=true")
    found = read_calibration(path / "calibration.json")
    assert found.obtained_by.validation_score is None
    assert not (path / "summary.json").exists()
    assert list(found.values) == load(path)["state_dict"]["theta"].tolist()
    assert any(abs(value - 1) > 1e-4 for value in found.values), "Adam has moved the mean"


@pytest.mark.usefixtures("no_plots")
def test_without_loggers_everything_is_in_the_root_folder(runs: TinyRuns) -> None:
    assert runs("fit", "a", "--trainer.logger=false") == 0
    expected = {"calibration.json", "config.yaml", "ledger", "checkpoints"}
    assert expected <= {path.name for path in runs.folder.iterdir()}


@pytest.mark.usefixtures("no_plots")
def test_image_budget_ends_the_run_early_and_says_so(runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.fit("a", "--model.strategy.max_images=17", "--trainer.max_steps=10")
    assert load(path)["global_step"] == 2, "a generation takes 8 pictures; a third one would exceed 17"
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
    budget = column(metrics(path), "budget/images")[-1]
    assert budget <= summary.budget.images <= budget + 2 * len(VAL), "the test is no part of the calibration's cost"
    assert str(path / "calibration.json") in printed.out
    assert "DataLoader 0" not in printed.out, "Lightning's table of metrics"
    assert "Warning" not in printed.err
    assert "deprecated" not in printed.err


def shifted(path: Path, target: Path) -> Path:
    """A calibration that draws other pictures."""
    file = read_calibration(path)
    values = tuple(v * 1.5 if "attn" in n else v for n, v in zip(file.names, file.values, strict=True))
    write_calibration(target, type(file)(**{**vars(file), "values": values}))
    return target


@pytest.mark.parametrize(
    ("members", "weight_mode", "changed", "name"),
    [
        ("cfg", "guidance", ("scale", "guidance"), "guidance alone @ 15 steps"),
        ("cfg", "raw", ("scale", "member1/weight"), "weights alone @ 15 steps"),
        ("cfg", "guidance", ("scale",), None),
        ("cfg", "guidance", ("guidance",), None),
        ("single", "fixed", ("scale",), None),
    ],
)
def test_learned_weights_are_a_condition_of_their_own_where_scales_and_weights_moved(
    tiny_folder: Path, members: str, weight_mode: str, changed: tuple[str, ...], name: str | None
) -> None:
    layout = CalibrationConfig("layer", members, 3.0, weight_mode)  # type: ignore[arg-type]
    module = CalibriModule(SD3(str(tiny_folder / "model")), {"tiny_rewards:redness": 1.0}, PairES(), layout)
    names = ["scale" if n.startswith("member") and not n.endswith("weight") else n for n in module.layout.names]
    with torch.no_grad():
        module.theta += 0.1 * torch.tensor([n in changed for n in names])
    ways = {way.name: way for way in Conditions.of(module).ways}
    assert list(ways) == ["base @ 15 steps", "base @ 28 steps", *([name] if name else []), "calibrated @ 15 steps"]
    if name:
        moved = [(n, v - s) for n, v, s in zip(names, ways[name].theta, module.layout.start, strict=True) if v != s]
        assert [n for n, _ in moved] == [changed[1]]
        assert moved[0][1] == pytest.approx(0.1)


@pytest.mark.usefixtures("no_plots")
def test_calibration_and_checkpoint_draw_the_same_pictures(runs: TinyRuns, tmp_path: Path) -> None:
    path = runs.fit("a", *CMA, "--data.val=null")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue cross\n")
    ways = {
        "file": (f"--data.predict={prompts}", f"--model.init_from={path}"),
        "list": ("--data.predict_prompts=[a red circle, a blue cross]", f"--model.init_from={path}/calibration.json"),
        "ckpt": (f"--data.predict={prompts}", f"--ckpt_path={path}/checkpoints/last.ckpt"),
        "base": (f"--data.predict={prompts}",),
        "other": (
            f"--data.predict={prompts}",
            f"--model.init_from={shifted(path / 'calibration.json', tmp_path / 'o.json')}",
        ),
    }
    drawn = {}
    for name, flags in ways.items():
        assert runs("predict", name, *flags) == 0
        drawn[name] = pictures(runs.latest(name))

    assert list(drawn["file"]) == ["00000-a-red-circle.png", "00001-a-blue-cross.png"]
    for name in ("list", "ckpt"):
        np.testing.assert_equal(drawn[name], drawn["file"])
    for name in ("base", "other"):
        assert any((drawn[name][file] != drawn["file"][file]).any() for file in drawn["file"]), name


@pytest.mark.usefixtures("no_plots")
def test_test_and_validate_work_from_a_calibration_and_from_a_checkpoint(
    runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.fit("a", *CMA, "--data.val=null")
    capsys.readouterr()
    summaries = {}
    for name, flag in {"i": f"--model.init_from={path}", "c": f"--ckpt_path={path}/checkpoints/last.ckpt"}.items():
        assert runs("test", name, flag) == 0
        document = json.loads((runs.latest(name) / "summary.json").read_text())
        assert Path(document["calibration"]).is_file()
        summaries[name] = document["conditions"]
    assert summaries["i"] == summaries["c"]
    assert [condition["role"] for condition in summaries["i"]] == ["base", "base", "weights", "calibrated"]

    validated = runs.fit("b", *CMA, "--trainer.max_steps=1")
    score = read_calibration(validated / "calibration.json").obtained_by
    capsys.readouterr()
    assert runs("validate", "v", f"--ckpt_path={validated}/checkpoints/last.ckpt", *CMA) == 0
    out = capsys.readouterr().out
    assert f"start  {score.start_score:.4f}" in out
    assert f"best   {score.validation_score:.4f}" in out


@pytest.mark.usefixtures("no_plots")
def test_a_run_starts_from_the_calibration_of_another(runs: TinyRuns) -> None:
    first = runs.fit("a", *CMA, "--data.val=null")
    second = runs.fit("b", f"--model.init_from={first}", "--trainer.max_steps=1", "--model.strategy.lr=1e-12")
    np.testing.assert_allclose(
        read_calibration(second / "calibration.json").values,
        read_calibration(first / "calibration.json").values,
        atol=1e-9,
    )


@pytest.mark.usefixtures("no_plots")
def test_a_prompt_whose_reward_is_nan_does_not_end_the_search(runs: TinyRuns) -> None:
    rewards = '--model.rewards={"tiny_rewards:nan_on_green": 1.0}'
    path = runs.fit("a", rewards, *CMA, "--model.strategy.halving=[4]", "--trainer.max_steps=4", "--data.val=null")
    values = column(metrics(path), "train/reward_mean")
    assert len(values) == 4
    assert all(map(math.isfinite, values))
    assert sum(column(metrics(path), "train/dropped")) >= 1, "the green prompt was met, and left out"


def test_validation_leaves_out_what_fails_for_all_and_scores_no_vector_that_fails_alone() -> None:
    good, bad = np.array([1.0, 2.0, 3.0, np.nan, 5.0]), np.array([1.0, np.nan, 3.0, np.nan, 5.0])
    assert validation_scores({"a": good, "b": good + 1}) == {"a": 11 / 4, "b": 15 / 4}
    scores = validation_scores({"a": good, "b": bad})
    assert scores["a"] == 11 / 4
    assert math.isnan(scores["b"])
    assert math.isnan(validation_scores({"a": np.array([1.0, np.nan])})["a"]), "half of the prompts fail"
    assert validation_scores({}) == {}


def test_weighted_sum_is_called_what_it_is(tiny_folder: Path) -> None:
    def name(rewards: dict[str, float]) -> str:
        return CalibriModule(SD3(str(tiny_folder / "model")), rewards, PairES(), rows_per_forward=6).reward_name

    jpeg = "jpeg_compressibility"
    assert name({jpeg: 2.0}) == jpeg
    assert name({jpeg: -1.0}) == f"-1 {jpeg}"
    assert name({jpeg: 1.0, "tiny_rewards:redness": 0.5}) == f"{jpeg} + 0.5 tiny_rewards:redness"
