"""The module itself: what it trains, what it compares in a test, how it averages and names scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TEST

from calibri_lightning import SD3, CalibrationConfig, CalibriModule, PairES
from calibri_lightning.assembly import assemble
from calibri_lightning.conditions import Conditions
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.validation import validation_scores


@pytest.fixture
def module(tiny_folder: Path) -> CalibriModule:
    return CalibriModule(SD3(str(tiny_folder / "model")), {"tiny_rewards:redness": 1.0}, PairES(), rows_per_forward=6)


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
    layout = CalibrationConfig("layer", members, 3.0, weight_mode)
    module = CalibriModule(SD3(str(tiny_folder / "model")), {"tiny_rewards:redness": 1.0}, PairES(), layout)
    names = ["scale" if n.startswith("member") and not n.endswith("weight") else n for n in module.layout.names]
    module.answer = Candidate(module.layout.start + 0.1 * np.array([n in changed for n in names]))
    ways = {way.name: way for way in Conditions.of(module).ways}
    assert list(ways) == ["base @ 15 steps", "base @ 28 steps", *([name] if name else []), "calibrated @ 15 steps"]
    if name:
        moved = [
            (n, v - s) for n, v, s in zip(names, ways[name].candidate.theta, module.layout.start, strict=True) if v != s
        ]
        assert [n for n, _ in moved] == [changed[1]]
        assert moved[0][1] == pytest.approx(0.1)


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
