"""The benchmark of training counts what really passes the transformer, and that is what was derived on paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_recipes import TINY_RECIPES
from torch import Tensor, nn

from calibri_lightning.__main__ import main
from calibri_lightning.backbones import SD3
from calibri_lightning.backbones.native import Native
from calibri_lightning.bench.models import RANDOM_MODELS
from calibri_lightning.bench.random_models import build_random
from calibri_lightning.bench.recipes import VARIANTS, Recipe, Variant, recipes
from calibri_lightning.bench.trainee import PassCounter, Trainee
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

CPU = torch.device("cpu")
FAST, CLASSIC = recipes(guided=True)
PROMPTS = (Prompt("a red circle", 0), Prompt("two blue squares", 1))


def tiny(name: str = "shapes") -> Native:
    if name == "shapes":
        return SD3.of(build_pipeline(TINY))
    return build_random(TINY_RECIPES[name], "float32", CPU, 2, 16)


def trainee(plain: Native, recipe: Recipe, variant: Variant, num_steps: int, rows: int = 8) -> Trainee:
    strategy = recipe.strategy(variant, num_steps, len(PROMPTS), 3)
    # The tiny models' pictures are too alike for a file size.
    return Trainee(plain, recipe.guided, strategy, RewardSet({"tiny_rewards:redness": 1.0}), rows, PROMPTS)


def test_a_picture_of_the_published_recipes_costs_what_was_derived_on_paper() -> None:
    def on_paper(recipe: Recipe) -> int:
        made = trainee(tiny(), recipe, VARIANTS[0], 10)
        return made.strategy.forwards_per_picture(made.module)

    assert on_paper(FAST) == 10 + 3 * 2 == 16
    assert on_paper(CLASSIC) == 2 * (10 + 9 * (2 + 1)) == 74
    assert on_paper(recipes(guided=False)[1]) == 10 + 9 * 3, "a guidance-distilled model has no second member"


@pytest.mark.parametrize(
    ("recipe", "expected", "variant"),
    [*((FAST, 16, variant) for variant in VARIANTS), *((CLASSIC, 74, variant) for variant in VARIANTS[1:3])],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_passes_the_transformer_is_what_the_budget_and_the_paper_say(
    recipe: Recipe, expected: int, variant: Variant
) -> None:
    # Units of 3 pictures, or of 2 with guidance: the count does not depend on how a step is cut.
    measured = trainee(tiny(), recipe, variant, 10, rows=4)
    measured.train()
    num_images = 6
    assert measured.passed_rows == measured.spent_forwards == expected * num_images
    assert measured.logged["train/ratio_deviation_max"] == [0.0]
    trained = len(recipe.window.steps(0, 0, 10)) * (2 if recipe.guided else 1)
    assert measured.counter.backwards == trained * num_images
    kept = measured.strategy.settings.gradient_checkpointing
    assert measured.engine.backbone.transformer.is_gradient_checkpointing == kept == variant.checkpointing


@pytest.mark.parametrize("name", ["flux.1-dev", "z-image"])
def test_all_kinds_of_transformers_are_counted(name: str) -> None:
    measured = trainee(tiny(name), FAST, Variant("lora", True), 4)
    measured.train()
    assert measured.passed_rows == measured.spent_forwards == (4 + 3 * 2) * 6


def test_training_moves_what_is_trained_and_leaves_the_model_that_it_shares_as_it_was() -> None:
    plain = tiny()
    weights = {name: value.clone() for name, value in plain.transformer.state_dict().items()}
    before = plain.probe_forward(2).clone()
    for variant in (Variant("lora", False), Variant("scales", False)):
        measured = trainee(plain, FAST, variant, 4)
        start = {name: value.detach().clone() for name, value in measured.policy.parameters().items()}
        measured.train()
        moved = [not torch.equal(value, start[name]) for name, value in measured.policy.parameters().items()]
        assert any(moved)
    assert plain.transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in plain.transformer.state_dict().items())
    assert torch.equal(plain.probe_forward(2), before)


def test_single_passes_leave_nothing_behind() -> None:
    measured = trainee(tiny(), FAST, Variant("scales", False), 4)
    theta, counter = measured.theta.detach().clone(), measured.counter
    forward, with_backward = measured.passes()
    forward()
    assert (counter.forwards, counter.backwards) == (3, 0)
    with_backward()
    assert (counter.forwards, counter.backwards) == (6, 3)
    assert measured.theta.grad is None
    assert torch.equal(measured.theta, theta)
    assert measured.passed_rows == 0, "these are no training steps"


class Rows(nn.Module):
    """Answers as Z-Image does (a list of pictures), or as the others do."""

    def forward(self, hidden_states: list[Tensor] | Tensor) -> tuple[list[Tensor] | Tensor]:
        return ([2 * row for row in hidden_states] if isinstance(hidden_states, list) else 2 * hidden_states,)


@pytest.mark.parametrize("listed", [False, True])
def test_only_rows_whose_gradient_is_taken_count_as_backwards(listed: bool) -> None:
    network, x = Rows(), torch.ones(3, 4, requires_grad=True)
    counter = PassCounter(network)

    def run() -> Tensor:
        (out,) = network(list(x)) if listed else network(hidden_states=x)
        return torch.stack(out) if listed else out

    with torch.no_grad():
        run()
    assert (counter.forwards, counter.backwards, counter.total) == (3, 0, 3)
    kept = run()
    assert (counter.forwards, counter.backwards) == (6, 0), "no backward has run yet"
    kept.sum().backward()
    assert (counter.forwards, counter.backwards, counter.total) == (6, 3, 9)


def test_command_prints_a_table_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RANDOM_MODELS, "sd3.5-medium", TINY_RECIPES["sd3.5-medium"])  # type: ignore[arg-type]
    monkeypatch.setattr("calibri_lightning.bench.training.REWARD", "tiny_rewards:redness")
    monkeypatch.setattr("calibri_lightning.bench.training.VARIANTS", VARIANTS[1:3])
    out = tmp_path / "training.json"
    model = ["--model", "sd3.5-medium", "--layers", "2", "--resolution", "16"]
    work = ["--groups", "1", "--group-size", "2", "--repeats", "1", "--forward-repeats", "2", "--out", str(out)]
    assert main(["bench", "--train", *model, *work]) == 0
    report = json.loads(out.read_text())
    counts = {(step["recipe"], step["forwards_per_image"], step["spent_per_image"]) for step in report["steps"]}
    assert counts == {("fast", 16, 16), ("classic", 74, 74)}
    assert [step["on_paper"] for step in report["steps"]] == [16] * 2 + [74] * 2
    assert all(len(step["timing"]["seconds"]) == 1 for step in report["steps"])
    assert all(step["ratio_deviation"] == 0 for step in report["steps"])
    assert [one["rows"] for one in report["passes"]] == [2] * 2
    printed = capsys.readouterr().out
    for words in ("fast, scales", "classic, lora, checkpointing", "images/s", "on paper", "2 pictures, 10 steps"):
        assert words in printed
    assert "straightforward" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--groups", "2"], ["--groups", "--train"]),
        (["--group-size", "4"], ["--group-size", "--train"]),
        (["--train", "--groups", "0"], ["--groups is 0", "at least 1"]),
        (["--train", "--group-size", "1"], ["--group-size is 1", "at least 2"]),
        (["--train", "--steps", "3"], ["--steps is 3", "at least 4"]),
        (["--train", "--compile"], ["--compile", "--train"]),
        (["--train", "--popsizes", "4"], ["--popsizes", "--train"]),
        (["--train", "--order", "--compile"], ["--order", "--train"]),
        (["--train", "--precision", "float32", "autocast"], ["one precision", "float32 autocast"]),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for word in words:
        assert word in error
