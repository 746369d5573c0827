"""Ablation: what is untouched is the base bit for bit, a planted site is found, and the table is what was drawn."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_rewards import CALLS, SIGNAL_AT, redness
from tiny_runs import CMA, VAL, Capture, TinyRuns, forked
from torch import nn

from calibri_lightning.__main__ import main
from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration import Attachment, attach, build_layout, find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import FunctionReward, RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.grid import Cell
from calibri_lightning.sampling.noise import TEST_STEP, noise_seed
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.strategies.sensitivity import read_sensitivity
from calibri_lightning.tools.ablate.conditions import UNTOUCHED, Level, ablated, check_levels, conditions, part_scales
from calibri_lightning.tools.ablate.plot import plot_levels, plot_removed
from calibri_lightning.tools.ablate.results import Results, distances_per_unit, render
from calibri_lightning.tools.drawing import Distances
from calibri_lightning.tools.pictures import DISTANCE, PictureLog, Scores
from calibri_lightning.tools.unfold import at_guidance, unfold

PROMPT = Prompt("a red circle", 0)
REWARDS = RewardSet.of((FunctionReward("redness", redness), 1.0))


@pytest.fixture
def backbone() -> SD3:
    return SD3.of(build_pipeline(TINY))


@pytest.fixture
def attachment(backbone: SD3) -> Iterator[Attachment]:
    made = attach(backbone.transformer, find_sites(backbone.transformer))
    yield made
    made.detach()


@pytest.mark.parametrize("granularity", ["block", "layer", "gate"])
@pytest.mark.parametrize("mode", ["fixed", "raw", "guidance"])
def test_an_unfolded_theta_is_the_same_model(granularity: str, mode: str, attachment: Attachment) -> None:
    layout = build_layout(attachment.sites, granularity, "cfg", 3.3, mode)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for theta in (layout.start, layout.start + 0.1 * rng.standard_normal(layout.num_parameters)):
        finest, spread = unfold(layout, theta)
        one, other = layout.rows(torch.from_numpy(theta[None].copy())), finest.rows(torch.from_numpy(spread[None]))
        assert torch.equal(one.scales, other.scales)
        assert torch.equal(one.weights, other.weights)


def test_guidance_is_set_and_strength_kept(attachment: Attachment) -> None:
    layout = build_layout(attachment.sites, "gate", "cfg", 4.0, "raw")
    theta = np.array(layout.start)
    assert np.array_equal(at_guidance(theta, 4.0), theta), "its own guidance changes nothing"
    theta[-2:] = 4.5, -3.0
    weights = layout.member_weights(at_guidance(theta, 2.0))
    assert sum(weights) == 1.5
    assert weights[0] / sum(weights) == 2.0


def test_conditions_scale_the_sites_of_one_part_in_all_members(attachment: Attachment) -> None:
    layout = build_layout(attachment.sites, "gate", "cfg", 3.0, "raw")
    base = np.array(layout.start) * 1.1
    for by, levels in itertools.product(("block", "layer", "gate"), ((0.0,), (0.5, 1.5))):
        points = conditions(layout, by, levels)  # type: ignore[arg-type]
        every = ablated(layout, base, by, points)  # type: ignore[arg-type]
        assert points[0] == Level(UNTOUCHED, 1.0)
        assert np.array_equal(every[0], base)
        for point, theta in zip(points[1:], every[1:], strict=True):
            for name, value, was in zip(layout.names, theta, base, strict=True):
                inside = f"{name.partition('/')[2]}.".startswith(f"{point.site}.")
                assert value == was * (point.level if inside else 1.0), (point, name)


def test_levels_are_checked() -> None:
    assert check_levels([1.5, 0, 1, 0.5, 0.5]) == (0.0, 0.5, 1.5)
    assert check_levels([0.1234567, 0.12345671, 1.0000001]) == (0.123457,)
    for levels in ([1.0], [0.5, float("nan")], [0.5, float("inf")], [0.5, 1e300], [0.5, 0.995]):
        with pytest.raises(UserError, match="--levels"):
            check_levels(levels)


def test_level_one_is_the_untouched_model_bit_for_bit(backbone: SD3, attachment: Attachment) -> None:
    layout = build_layout(attachment.sites, "gate", "cfg", 3.0, "raw")
    points = (Level(UNTOUCHED, 1.0), *(Level(site.name, level) for site in layout.sites[:2] for level in (1.0, 0.0)))
    distances = Distances(len(points))
    thetas = ablated(layout, layout.start, "gate", points)
    answer = Evaluator(backbone, attachment, layout, REWARDS, 64).evaluate(thetas, [PROMPT], [3], 2, seen=distances)
    same = np.array([point.level == 1.0 for point in points])
    rewards = answer.rewards[:, 0]
    assert (rewards[same] == rewards[0]).all()
    assert (distances.values.numpy()[same, 0] == 0).all()
    assert (distances.values.numpy()[~same, 0] > 0).all()


def test_distances_are_root_mean_squares_over_units() -> None:
    distances = Distances(3, 2)
    first = torch.zeros(2, 3, 4, 4)
    first[1] += 0.5
    distances((Cell(0, 0), Cell(1, 0)), first)
    second = torch.zeros(4, 3, 4, 4)
    second[0, 0] = 0.3
    second[1:] += 0.1  # the reference of the second prompt, and a picture beside it
    second[2] += 0.2
    distances((Cell(2, 0), Cell(0, 1), Cell(1, 1), Cell(2, 1)), second)
    expected = [[0, 0], [0.5, 0.2], [0.3 / 3**0.5, 0]]
    assert distances.values.numpy() == pytest.approx(np.array(expected), abs=1e-7)


def test_sensitivity_is_of_a_unit_of_the_scale_that_the_levels_multiply() -> None:
    """Of a run the same level changes a scale of 2 by twice as much."""
    points = (Level("untouched", 1.0), Level("a", 0.9), Level("a", 1.1), Level("b", 0.9), Level("c", 0.9))
    scores = Scores({"distance": np.array([[0.0], [0.02], [0.02], [0.02], [0.0]])}, (0,))
    found = distances_per_unit(points, scores, {"a": 1.0, "b": 2.0, "c": 0.0})
    assert found == pytest.approx({"a": 0.2, "b": 0.1})


def test_the_scale_of_a_part_is_that_of_its_sites_in_all_members(attachment: Attachment) -> None:
    layout = build_layout(attachment.sites, "gate", "cfg", 3.0)
    theta = layout.start.copy()
    count = len(layout.sites)
    theta[: 2 * count] = np.concatenate([np.full(count, 3.0), np.full(count, 4.0)])
    for by in ("block", "gate"):
        found = list(part_scales(layout, theta, by).values())
        assert found == pytest.approx([12.5**0.5] * len(found))


def silence(transformer: nn.Module, kept: str) -> None:
    """Zeroes what every gated layer adds, but that of the kept one."""
    for block in range(len(transformer.transformer_blocks)):  # type: ignore[arg-type]
        for name in ("attn.to_out.0", "attn2.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"):
            path = f"transformer_blocks.{block}.{name}"
            try:
                layer = transformer.get_submodule(path)
            except AttributeError:  # not every block has a second attention or a text stream
                continue
            if path != kept and isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


def test_the_one_site_with_an_effect_is_found(backbone: SD3, attachment: Attachment, tmp_path: Path) -> None:
    silence(backbone.transformer, "transformer_blocks.1.ff.net.2")
    layout = build_layout(attachment.sites, "gate", "single", 1.0, "raw")
    points = conditions(layout, "gate", (0.0, 0.5))
    thetas = ablated(layout, layout.start, "gate", points)
    evaluator, columns, away = Evaluator(backbone, attachment, layout, REWARDS, 64), [], []
    for seed in range(4):
        distances = Distances(len(points))
        columns.append(evaluator.evaluate(thetas, [PROMPT], [seed], 2, seen=distances).rewards[:, 0])
        away.append(distances.values.numpy()[:, 0])
    scores = Scores({"redness": np.stack(columns, 1), DISTANCE: np.stack(away, 1)}, (0, 1, 2, 3))
    results = Results.of(points, scores, "redness")
    # Batches of other sizes may differ in the last bits.
    moved = {f.point.site for f in results.findings if f.distance.mean > 1e-5}
    assert moved == {"transformer_blocks.1.mlp.image"}
    half, gone = (results.at(level) for level in (0.5, 0.0))
    farther = [g.distance.mean > h.distance.mean for g, h in zip(gone, half, strict=True) if g.point.site in moved]
    assert farther == [True]
    assert "transformer_blocks.1.mlp.image" in render(results, "t").partition("costs least")[0]
    plot_removed(tmp_path / "a.png", results, 0.0, "t")
    plot_levels(tmp_path / "b.png", results, "t")
    assert (tmp_path / "a.png").stat().st_size > 1000


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_files_hold_what_the_evaluator_gives_and_a_cut_study_goes_on(
    runs: TinyRuns, capsys: Capture, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plot_removed", "plot_levels"):  # the test above draws them
        monkeypatch.setattr(f"calibri_lightning.tools.ablate.plot.{name}", lambda *_: None)
    out = runs.folder / "study"
    words = ["ablate", "--config", str(runs.config), "--by", "layer", "--levels", "0", "1.5", "--out", str(out)]
    assert main(words) == 0
    whole = (out / "pictures.csv").read_bytes()
    pictures = rows(out / "pictures.csv")
    assert list(dict.fromkeys(row["text"] for row in pictures)) == list(VAL), "validation prompts by default"

    real = SD3(str(runs.config.parent / "model"))
    sites = find_sites(real.transformer)
    layout = build_layout(sites, "layer", "cfg", 3.0, "guidance")
    evaluator = Evaluator(real, attach(real.transformer, sites), layout, REWARDS, 6)
    thetas = np.tile(layout.start, (1 + 2 * len(layout.scale_names), 1))
    for i, (part, level) in enumerate(itertools.product(range(len(layout.scale_names)), (0.0, 1.5))):
        thetas[i + 1, [part, part + len(layout.scale_names)]] = level
    seed = noise_seed(0, TEST_STEP, 1, 0)
    real.prepare(list(VAL), [""])
    expected = evaluator.evaluate(thetas, [Prompt(VAL[1], 1)], [seed], 2).rewards[:, 0]
    mine = [row for row in pictures if row["text"] == VAL[1]]
    assert [int(row["seed"]) for row in mine] == [seed] * len(mine)
    reward = next(name for name in mine[0] if "redness" in name)
    assert [float(row[reward]) for row in mine] == expected.tolist()

    table = rows(out / "ablate.csv")
    third = [float(row[reward]) for row in pictures if (row["site"], row["level"]) == (table[3]["site"], "0")]
    base = [float(row[reward]) for row in pictures if row["site"] == UNTOUCHED]
    assert (table[3]["level"], float(table[3]["difference"])) == ("0", pytest.approx(np.mean(third) - np.mean(base)))

    # A scheduler's SIGTERM ends it between two prompts, and it goes on as after a kill.
    cut, calls = runs.folder / "cut", runs.folder / "calls"
    stopped = {CALLS: str(calls), SIGNAL_AT: "SIGTERM 2"}
    [code] = forked([[*words[:-1], str(cut)]], [stopped], runs.folder / "log")
    assert code == 143
    assert len(calls.read_text().splitlines()) == 2
    assert main([*words[:-1], str(cut)]) == 0
    assert (cut / "pictures.csv").read_bytes() == whole

    kept = whole.decode().splitlines(keepends=True)
    (out / "pictures.csv").write_text("".join(kept[: len(thetas) + 4])[:-3], newline="")
    assert main(words) == 0
    assert (out / "pictures.csv").read_bytes() == whole
    capsys.readouterr()
    assert main([*words, "--seed_everything=1"]) == 2
    assert "holds another study" in capsys.readouterr().err
    assert (out / "pictures.csv").read_bytes() == whole

    # Levels 0 and 1.5: the nearer one tells how strongly a part acts.
    nearer = [row for row in pictures if (row["site"], row["level"]) == (table[3]["site"], "1.5")]
    moved = [float(row["distance"]) / 0.5 for row in nearer]
    sensitivity = out / "sensitivity.json"
    found = read_sensitivity(sensitivity).distances
    assert list(found) == list(layout.scale_names)
    assert found[table[3]["site"]] == pytest.approx(np.sqrt(np.mean(np.square(moved))))
    runs.fit("seeded", *CMA, f"--model.strategy.sigma_from={sensitivity}", "--trainer.max_steps=1")


def test_a_log_takes_whole_prompts_alone_and_only_its_own_study(tmp_path: Path) -> None:
    def open_log(**changes: object) -> PictureLog:
        return PictureLog(tmp_path, ("site",), [("a",), ("b",)], ("r",), {"steps": 4} | changes)

    log, asked = open_log(), [(Prompt("one", 0), 7), (Prompt("two, with a comma", 1), 8)]
    for number, (prompt, seed) in enumerate(asked):
        log.put(prompt, seed, {"r": np.array([number + 0.123456789, np.nan])})
    whole = log.path.read_bytes()
    for length in range(len(whole)):
        log.path.write_bytes(whole[:length])
        again = open_log()
        known = [again.knows(prompt, seed) for prompt, seed in asked]
        assert known == [length >= whole.index(b"\r\n1,") + 2, False]
        for (prompt, seed), there in zip(asked, known, strict=True):
            if not there:
                again.put(prompt, seed, {"r": np.array([prompt.index + 0.123456789, np.nan])})
        assert log.path.read_bytes() == whole
    assert not open_log().knows(Prompt("one", 0, negative="blurry"), 7)
    with pytest.raises(UserError, match="another study"):
        open_log(steps=5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ablate", "absent"], "no finished run"),
        (["ablate", "--by", "gate"], "give the folder of a run, or --config FILE"),
        (["ablate", "--config", "c", "--by", "all"], "invalid choice"),
        (["sweep", "--num_prompts", "few"], "invalid int value"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: Capture) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
