"""A sweep recommends the fewest forwards whose interval reaches the base's best, and draws what it says."""

from __future__ import annotations

import csv

import numpy as np
from tiny_runs import Capture, TinyRuns

from calibri_lightning.__main__ import main
from calibri_lightning.arrays import Floats
from calibri_lightning.tools.pictures import Scores
from calibri_lightning.tools.sweep.points import Point, Sweep
from calibri_lightning.tools.sweep.results import advice, render

COUNT = 40
LUCK = np.random.default_rng(0).standard_normal(COUNT)
"""Of the prompts, far larger than any difference: pairs cancel it."""


def _few_bits(values: Floats | float) -> Floats:
    return np.asarray(np.round(np.multiply(values, 1024)) / 1024)


def sweep(*conditions: tuple[str, int, float, float]) -> Sweep:
    """Points (which, steps, mean, spread of the paired differences) of two members."""
    points = [Point(which, steps, None, 2 * steps) for which, steps, _, _ in conditions]  # type: ignore[arg-type]
    wave = np.where(np.arange(COUNT) % 2, 1.0, -1.0)
    # Of numbers with few bits, so that differences are exact.
    luck = _few_bits(10 * LUCK)
    values: list[Floats] = [luck + _few_bits(mean) + _few_bits(spread) * wave for _, _, mean, spread in conditions]
    return Sweep.of(points, Scores({"r": np.stack(values)}, tuple(range(COUNT))), "r")


def test_the_fewest_forwards_that_reach_the_best_of_the_base_are_recommended() -> None:
    found = sweep(
        ("base", 5, 0.0, 0.0),
        ("base", 15, 1.0, 0.0),
        ("base", 28, 0.9, 0.0),
        ("answer", 5, 0.5, 0.1),  # below for certain
        ("answer", 8, 0.97, 0.2),  # 1 lies within 0.97 +- 0.06
        ("answer", 15, 1.2, 0.2),  # above for certain
        ("answer", 28, 1.4, 0.2),
    )
    assert found.best.point.label == "base @ 15 steps"
    assert found.recommended is found.findings[4]
    assert found.proven is found.findings[5]
    assert found.recommended.difference.low < 0 < found.recommended.difference.high
    assert advice(found).startswith("Recommended: answer @ 8 steps, 16 forwards a picture")
    assert "Of answer @ 15 steps, 30 forwards a picture, the whole interval does." in advice(found)
    assert render(found, "r", "t").count("<- recommended") == 1


def test_nothing_is_recommended_where_nothing_reaches() -> None:
    found = sweep(("base", 5, 0.0, 0.0), ("base", 15, 1.0, 0.0), ("answer", 5, 0.5, 0.1))
    assert found.recommended is found.proven is None
    assert advice(found).startswith("No point reaches the base's best (base @ 15 steps, 30 forwards), so none is")
    assert "Nearest: answer @ 5 steps" in advice(found)


def test_the_base_alone_is_compared_with_itself() -> None:
    found = sweep(("base", 5, 0.2, 0.0), ("base", 8, 1.0, 0.0), ("base", 15, 0.5, 0.0), ("base", 28, 1.02, 0.3))
    assert found.best is found.findings[3]
    assert found.recommended is found.findings[1], "no worse for certain, and cheaper"
    assert found.proven is found.findings[3]


def test_equals_are_told_apart_by_cost() -> None:
    found = sweep(("base", 15, 1.0, 0.0), ("base", 8, 1.0, 0.0))
    assert found.best.point.num_steps == found.recommended.point.num_steps == 8  # type: ignore[union-attr]


def test_a_single_prompt_recommends_nothing() -> None:
    points = [Point("base", 5, None, 5), Point("answer", 4, None, 4)]
    found = Sweep.of(points, Scores({"r": np.array([[0.0], [1.0]])}, (0,)), "r")
    assert found.recommended is None, "there is no interval"


def test_a_sweep_of_a_run(runs: TinyRuns, capsys: Capture, no_plots: None) -> None:
    run = runs.fit("swept", "--trainer.max_steps=1")
    words = ["sweep", str(run), "--steps", "2", "1", "--guidance", "3", "1", "1.0000001", "--num_prompts", "3"]
    assert main(words) == 0
    assert "base @ 2 steps, guidance 3" in capsys.readouterr().out
    with (run / "sweep" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    points = [(row["steps"], row["guidance"], row["forwards"]) for row in table if row["which"] == "base"]
    expected = [("1", "1", "1"), ("1", "3", "2"), ("2", "1", "2"), ("2", "3", "4")]
    assert points == expected, "without guidance the stock pipeline leaves out the negative prompt"
    assert (run / "sweep" / "sweep.png").is_file()
    assert sum(int(row["recommended"]) for row in table) <= 1
