"""A calibration and a checkpoint of a finished fit draw, test, validate and start other runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_files import last, pictures
from tiny_runs import CMA, TinyRuns

from calibri_lightning import read_calibration
from calibri_lightning.calibration import write_calibration


def shifted(path: Path, target: Path) -> Path:
    """A calibration that draws other pictures."""
    file = read_calibration(path)
    values = tuple(v * 1.5 if "attn" in n else v for n, v in zip(file.names, file.values, strict=True))
    write_calibration(target, type(file)(**{**vars(file), "values": values}))
    return target


@pytest.mark.usefixtures("no_plots")
def test_calibration_and_checkpoint_draw_the_same_pictures(runs: TinyRuns, tmp_path: Path) -> None:
    path = runs.fit("a", *CMA, "--data.val=null")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue cross\n")
    ways = {
        "file": (f"--data.predict={prompts}", f"--model.init_from={path}"),
        "list": ("--data.predict_prompts=[a red circle, a blue cross]", f"--model.init_from={path}/calibration.json"),
        "ckpt": (f"--data.predict={prompts}", f"--ckpt_path={last(path)}"),
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
    for name, flag in {"i": f"--model.init_from={path}", "c": f"--ckpt_path={last(path)}"}.items():
        assert runs("test", name, flag) == 0
        document = json.loads((runs.latest(name) / "summary.json").read_text())
        assert Path(document["calibration"]).is_file()
        summaries[name] = document["conditions"]
    assert summaries["i"] == summaries["c"]
    assert [condition["role"] for condition in summaries["i"]] == ["base", "base", "weights", "calibrated"]

    validated = runs.fit("b", *CMA, "--trainer.max_steps=1")
    score = read_calibration(validated / "calibration.json").obtained_by
    assert "after 1 generation." in capsys.readouterr().out
    assert runs("validate", "v", f"--ckpt_path={last(validated)}", *CMA) == 0
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
