"""Diversity in a summary, its JSON and its table, and as a test of a run measures it."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TEST, TinyRuns

from calibri_lightning import SD3, CalibrationConfig
from calibri_lightning.assembly import assemble
from calibri_lightning.conditions import Way
from calibri_lightning.diversity import SAMPLES, diversities
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation import (
    Budget,
    Condition,
    Diversity,
    Summary,
    from_json,
    mean_interval,
    measure_diversity,
    paired_interval,
    render_table,
    summarise,
    thumbnails,
    to_json,
    verdict,
)
from calibri_lightning.launch.pulse import Pulse
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.lockstep import Lockstep
from calibri_lightning.sampling.noise import TEST_STEP, noise_seed
from calibri_lightning.strategies.base import Candidate

HARD = np.linspace(-0.8, 0.8, 8)
"""Some prompts leave more room than others."""


def measured(vendi: float, distance: float, seed: int) -> Diversity:
    luck = np.random.default_rng(seed).normal(size=(2, 8))
    scores, distances = vendi + HARD + 0.1 * luck[0], distance + 0.02 * HARD + 0.005 * luck[1]
    return Diversity(tuple(scores.tolist()), tuple(distances.tolist()), 8, "shapes")


def make(gain: float = -1.0) -> Summary:
    rewards = {"shapes": np.random.default_rng(0).random(40), "shapes_strict": np.random.default_rng(1).random(40)}
    ways = (
        ("base @ 4 steps", "base", 4, 5.5),
        ("base @ 28 steps", "base", 28, 6.0),
        ("guidance alone @ 4 steps", "weights", 4, 5.0),
        ("calibrated @ 4 steps", "calibrated", 4, 5.5 + gain),
    )
    conditions = [
        Condition(name, role, steps, 2 * steps, rewards, measured(vendi, 0.2, seed))
        for seed, (name, role, steps, vendi) in enumerate(ways)
    ]
    return summarise(conditions, "shapes", Budget(10, 20, 3.0), "runs/a/calibration.json")


def test_prompts_are_compared_in_pairs() -> None:
    summary = make()
    base, _, _, calibrated = (condition.diversity for condition in summary.conditions)
    assert summary.diversity[0].vendi == mean_interval(base.vendi)
    found = {c.against: c for c in summary.diversity_comparisons}
    assert {c.base for c in found.values()} == {"base @ 4 steps", "base @ 28 steps", "guidance alone @ 4 steps"}
    equal = found["equal NFE"].differences
    assert equal.vendi == paired_interval(calibrated.vendi, base.vendi)
    assert equal.pixel_distance == paired_interval(calibrated.pixel_distance, base.pixel_distance)
    assert equal.vendi.excludes(0.0)
    alone = summary.diversity[0].vendi
    assert equal.vendi.high - equal.vendi.low < (alone.high - alone.low) / 3, "pairs cancel what prompts allow"


def test_json_round_trip_keeps_every_prompt_and_reads_older_files() -> None:
    summary = make()
    broken = replace(summary.conditions[0].diversity, vendi=(math.nan, *summary.conditions[0].diversity.vendi[1:]))
    conditions = (replace(summary.conditions[0], diversity=broken), *summary.conditions[1:])
    text = to_json(summarise(conditions, "shapes", summary.budget, "c.json"))
    back = from_json(text)
    assert to_json(back) == text
    assert back.conditions[1].diversity == summary.conditions[1].diversity
    document = json.loads(text)
    assert document["conditions"][0]["diversity"]["vendi"][0] is None
    assert document["diversity"]["means"]["base @ 4 steps"]["vendi"]["dropped"] == 1
    assert len(document["diversity"]["comparisons"]) == 3

    del document["diversity"]
    for condition in document["conditions"]:
        del condition["diversity"]
    older = from_json(json.dumps(document))
    assert (older.diversity, older.diversity_comparisons) == ((), ())
    assert older.means == summary.means
    assert "Vendi" not in render_table(older)


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (-1.0, "Calibrated @ 4 steps draws less diverse samples of a prompt than base @ 4 steps: Vendi score -"),
        (1.0, "Calibrated @ 4 steps draws more diverse samples of a prompt than base @ 4 steps: Vendi score +"),
        (0.0, "Calibrated @ 4 steps shows no clear difference in diversity from base @ 4 steps"),
    ],
)
def test_verdict_follows_the_interval_of_the_vendi_score(gain: float, words: str) -> None:
    assert words in verdict(make(gain))
    assert "(8 prompts, 95% interval)" in verdict(make(gain))


def test_table_has_a_block_of_its_own_within_its_width() -> None:
    table = render_table(make())
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert table.isascii()
    assert lines.count("diversity of 8 samples of a prompt, 8 prompts [95% interval]") == 1
    start = lines.index("diversity of 8 samples of a prompt, 8 prompts [95% interval]")
    block = lines[start : start + 13]
    column = block[1].index("Vendi score (1 to 8)")
    rows = [line for line in block if line.startswith(("base", "guidance", "calibrated @", "against"))]
    assert len(rows) == 4 + 3
    assert all(row[column - 1] == " " and row[column] in "0123456789+-" for row in rows)
    mean = make().diversity[3].vendi
    assert f"{mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}]" in rows[3]
    assert "amount to, by what the reward shapes sees in them" in table
    assert max(map(len, render_table(make(), width=72).splitlines())) <= 72


def test_a_condition_without_diversity_hides_that_of_the_others() -> None:
    summary = make()
    some = (replace(summary.conditions[0], diversity=None), *summary.conditions[1:])
    found = summarise(some, "shapes", summary.budget, "c.json")
    assert found.diversity == ()
    assert "Vendi" not in render_table(found)
    assert from_json(to_json(found)).conditions[1].diversity == some[1].diversity


def drawn(folder: Path, steps: int) -> Diversity:
    """The diversity of the untouched model's samples, drawn one by one."""
    backbone = SD3(str(folder / "model"))
    layout, attachment = assemble(backbone, CalibrationConfig("layer", "cfg", 3.0, "guidance"))
    evaluator = Evaluator(backbone, attachment, layout, RewardSet({"tiny_rewards:redness": 1.0}), rows_per_forward=2)
    prompts = [Prompt(text, index) for index, text in enumerate(TEST[:2]) for _ in range(SAMPLES)]
    seeds = [noise_seed(0, TEST_STEP, prompt.index, i % SAMPLES) for i, prompt in enumerate(prompts)]
    pictures = torch.cat([images for _, images in evaluator.images(layout.start[None], prompts, seeds, steps)])
    return measure_diversity(thumbnails(pictures).reshape(2, SAMPLES, -1))


@pytest.mark.usefixtures("no_plots")
def test_a_run_measures_the_samples_of_its_first_test_prompts(
    runs: TinyRuns, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("test", "a") == 0
    summary = from_json((runs.latest("a") / "summary.json").read_text())
    assert "Diversity: 8 samples of each of 2 prompts under every condition" in capsys.readouterr().out
    for condition, steps in zip(summary.conditions, (2, 3), strict=True):
        expected = drawn(tiny_folder, steps)
        assert condition.diversity.features == "pixels"
        assert condition.diversity.vendi == pytest.approx(expected.vendi, abs=1e-4)
        assert condition.diversity.pixel_distance == pytest.approx(expected.pixel_distance, abs=1e-5)

    assert runs("test", "b", "--model.num_diversity_prompts=0") == 0
    assert all(c.diversity is None for c in from_json((runs.latest("b") / "summary.json").read_text()).conditions)
    assert "iversity" not in capsys.readouterr().out


class Pictures:
    """Draws grey pictures, one a unit, whose level tells their slot; every rank its own."""

    def images(self, thetas: Any, prompts: Any, seeds: Any, num_steps: int, cells: Any, *rest: Any):
        rank, world_size, beat = rest
        for slot in range(rank, len(prompts), world_size):
            beat("drawing")
            yield (SimpleNamespace(slot=slot),), torch.full((1, 3, 8, 8), slot / len(prompts))


def fake_module(rank: int, others: dict[int, list[torch.Tensor]], failing: int = -1) -> Any:
    """A module on one of two ranks; `others` collects what each hands to a sum, and the second one gets the sums."""

    def reduce(values: torch.Tensor, reduce_op: str) -> torch.Tensor:
        others[rank].append(values.clone())
        return values + others[1 - rank][len(others[rank]) - 1] if rank == 1 else values

    def features(images: torch.Tensor, prompts: Any) -> None:
        if rank == failing and images.any():
            raise UserError("no features here")

    return SimpleNamespace(
        backbone=SimpleNamespace(image_size=(8, 8)),
        device=torch.device("cpu"),
        rewards=SimpleNamespace(features=features),
        noise_seeds=lambda batch: [0] * len(batch.prompts),
        engine=SimpleNamespace(evaluator=Pictures(), lockstep=Lockstep()),
        pulse=Pulse(),
        policy=SimpleNamespace(using=lambda weights: nullcontext()),
        trainer=SimpleNamespace(
            global_rank=rank,
            world_size=2,
            strategy=SimpleNamespace(reduce=reduce),
            precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
        ),
    )


WAYS = (Way("base", "base", Candidate(np.ones(3)), 2),)


def test_ranks_draw_a_share_each_and_know_all() -> None:
    others: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    prompts = (Prompt("a", 0), Prompt("b", 5))
    diversities(fake_module(0, others), WAYS, prompts, samples=2)
    (found,) = diversities(fake_module(1, others), WAYS, prompts, samples=2)
    assert found.pixel_distance == pytest.approx((0.25, 0.25)), "neighbours differ by 1 / 4, drawn by different ranks"
    assert (found.samples, found.prompts) == (2, 2)
    assert diversities(fake_module(0, others), WAYS, (), samples=2) == ()


def test_a_failure_on_one_rank_stops_all() -> None:
    others: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    prompts = (Prompt("a", 0), Prompt("b", 5))
    with pytest.raises(UserError, match="no features here"):
        diversities(fake_module(0, others, failing=0), WAYS, prompts, samples=2)
    with pytest.raises(UserError, match="failed on another rank"):
        diversities(fake_module(1, others, failing=0), WAYS, prompts, samples=2)
