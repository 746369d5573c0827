"""The comparison of finished runs takes validation out of their costs and reads their tests as they are."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.diversity import Diversity
from calibri_lightning.evaluation.files import write_summary
from calibri_lightning.evaluation.summary import Budget, Condition, Summary, summarise
from calibri_lightning.tools.compare import history

SCRIPTS = Path(__file__).parents[2] / "docs/reproduce"


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return script("compare_methods")


@pytest.fixture(scope="module")
def method_runs() -> ModuleType:
    return history


def log(folder: Path, rows: Sequence[Mapping[str, float]]) -> Path:
    """Writes metrics as the trainer's logger does: a column for every name, empty where a row lacks it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for row in rows for name in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def run_of(
    folder: Path, name: str, average: str, per_image: int, steps: int = 6, every: int = 2, pictures: int = 10
) -> Path:
    """A run of 10 pictures a step that validates 3 candidates, then 2, on 4 pictures of 8 forwards each."""
    rows: list[Mapping[str, float]] = []
    images = forwards = 0
    for step in range(steps):
        images, forwards = images + pictures, forwards + pictures * per_image
        spent = {"budget/images": images, "budget/forwards": forwards, "budget/device_seconds": 2.0 * step}
        rows.append({"step": step, "train/images": pictures * (step + 1), **spent})
        if (step + 1) % every == 0:
            scores = {f"val/{name}": 0.3 + 0.01 * step, f"val/{average}": 0.3 + 0.005 * step}
            first = {"val/start": 0.25} if step + 1 == every else {}
            rows.append({"step": step, **scores, **first})
            images, forwards = images + 4 * (2 + len(first)), forwards + 4 * (2 + len(first)) * 8
    return log(folder, rows)


def add_test(folder: Path) -> Summary:
    soft = np.linspace(0.2, 0.6, 12)
    near = Diversity(tuple(np.linspace(4, 5, 6)), tuple(np.linspace(0.1, 0.2, 6)), 8, "pixels")
    conditions = [
        Condition("base @ 4 steps", "base", 4, 8, {"shapes": soft, "shapes_strict": soft > 0.5}, near),
        Condition("trained @ 4 steps", "calibrated", 4, 8, {"shapes": soft + 0.1, "shapes_strict": soft > 0.4}, near),
    ]
    summary = summarise(conditions, "shapes", Budget(84, 900, 12.5), folder / "calibration.json")
    write_summary(folder / "summary.json", summary)
    return summary


@pytest.mark.parametrize(("name", "average", "per_image"), [("mean", "tail", 8), ("policy", "ema", 16)])
def test_scores_stand_over_what_training_alone_had_cost(
    method_runs: ModuleType, tmp_path: Path, name: str, average: str, per_image: int
) -> None:
    run = method_runs.read_run("a", run_of(tmp_path / "run", name, average, per_image))
    assert run.current.images.tolist() == [0, 20, 40, 60]
    assert run.current.forwards.tolist() == [0, 20 * per_image, 40 * per_image, 60 * per_image]
    np.testing.assert_allclose(run.current.scores, [0.25, 0.31, 0.33, 0.35])
    assert run.average.images.tolist() == [20, 40, 60]
    np.testing.assert_allclose(run.average.scores, [0.305, 0.315, 0.325])
    assert (run.images, run.forwards, run.start, run.summary) == (60, 60 * per_image, 0.25, None)


def test_a_step_after_a_validation_costs_as_much_a_picture_as_the_nearest_other_step(method_runs: ModuleType) -> None:
    # Pictures become dearer at the fourth step; the third and the sixth one's budgets hold a validation, too.
    trained = np.array([10, 20, 10, 10, 10, 10])
    spent, forwards = trained + [0, 0, 8, 0, 0, 8], [80, 160, 144, 160, 160, 224]
    columns = zip(np.cumsum(trained), np.cumsum(spent), np.cumsum(forwards), strict=True)
    rows = [{"train/images": f"{a}", "budget/images": f"{b}", "budget/forwards": f"{c}"} for a, b, c in columns]
    images, found = method_runs.training_costs("a", rows)
    assert images.tolist() == np.cumsum(trained).tolist()
    assert np.diff(found, prepend=0).tolist() == [80, 160, 80, 160, 160, 160]


def test_a_run_that_validates_before_every_step_has_no_cost_of_its_own(method_runs: ModuleType) -> None:
    rows = [{"train/images": f"{n}", "budget/images": f"{2 * n}", "budget/forwards": f"{9 * n}"} for n in (1, 2, 3)]
    with pytest.raises(UserError, match="val_check_interval"):
        method_runs.training_costs("a", rows)


def test_the_table_says_what_the_tests_say(compare: ModuleType, method_runs: ModuleType, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", "policy", "ema", 16)
    summary = add_test(folder)
    rows = compare.tests([method_runs.read_run("Flow-GRPO", folder)])
    assert [(row.condition, row.reward) for row in rows] == [
        (condition.name, reward) for condition in summary.conditions for reward in ("shapes", "shapes_strict")
    ]
    base, soft = rows[0], rows[2]
    assert math.isnan(base.gain)
    assert soft.gain == pytest.approx(0.1)
    assert (soft.mean, soft.low, soft.high) == tuple(
        getattr(summary.means[1]["shapes"], name) for name in ("mean", "low", "high")
    )
    assert (soft.vendi, soft.pixel_distance) == (pytest.approx(4.5), pytest.approx(0.15))
    assert (soft.train_images, soft.train_forwards) == (60, 960)
    assert (soft.budget_images, soft.budget_forwards, soft.device_seconds) == (84, 900, 12.5)
    compare.write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert written[0]["gain"] == ""
    assert float(written[2]["gain"]) == soft.gain
    assert "+0.100" in compare.render(rows)


def test_the_command_draws_runs_writes_the_table_and_says_what_differs(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run_of(tmp_path / "one", "mean", "tail", 8)
    add_test(one)
    rows = [{"step": 0, "train/images": 10, "budget/images": 10, "budget/forwards": 160}]
    other = log(tmp_path / "other", [*rows, {"step": 0, "val/start": 0.2, "val/policy": 0.4}])
    out = tmp_path / "figure"
    assert compare.main([f"CMA-ES={one}", f"Flow-GRPO={other}", "--out", str(out)]) == 0
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width == 1200
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "lines and labels are drawn"
    printed = capsys.readouterr().out
    assert "CMA-ES" in printed
    assert "Flow-GRPO: not tested" in printed
    assert "Flow-GRPO: starts from 0.2000" in printed
    assert "CMA-ES: starts" not in printed
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 1 + 4


def test_seeds_are_averaged_where_they_were_validated_at_the_same_cost(method_runs: ModuleType) -> None:
    x, longer = np.array([0.0, 10.0]), np.array([0.0, 10.0, 20.0])
    one, other = method_runs.Curve(x, 8 * x, np.array([0.2, 0.4])), method_runs.Curve(x, 10 * x, np.array([0.4, 0.5]))
    (mean,) = method_runs.over_seeds([one, other])
    np.testing.assert_allclose(mean.scores, [0.3, 0.45])
    np.testing.assert_allclose(mean.forwards, [0, 90])
    apart = method_runs.Curve(longer, longer, longer)
    assert method_runs.over_seeds([one, apart]) == [one, apart]


def test_counts_on_axes_are_short(compare: ModuleType) -> None:
    assert [compare.short(count) for count in (0, 500, 2500, 1e6)] == ["0", "500", "2.5k", "1M"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/one"], ["LABEL=FOLDER"]),
        (["a=no/such/run"], ["metrics.csv", "does not exist"]),
        (["a={run}", "--base", "b"], ["--base is 'b'", "'a'"]),
        ([f"{name}={{run}}" for name in "abcdefg"], ["7 labels", "6 colours"]),
        (["a={run}", "--out", "no/such/folder/x"], ["no/such/folder", "does not exist"]),
        (["a={empty}"], ["val/start", "data.val"]),
    ],
)
def test_mistakes_are_said_in_one_line(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    run = run_of(tmp_path / "run", "mean", "tail", 8)
    empty = log(tmp_path / "empty", [{"step": 0, "train/images": 10, "budget/images": 10, "budget/forwards": 80}])
    assert compare.main([argument.format(run=run, empty=empty) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert all(word in error for word in words)
