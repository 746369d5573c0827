"""`compare` on finished runs of a tiny model: what is drawn, what is refused, and that the model is untouched after."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import Capture, TinyRuns

from calibri_lightning.__main__ import main
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.scales import Member
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.tools.compare import command
from calibri_lightning.tools.compare.conditions import check_seen, notes
from calibri_lightning.tools.compare.contenders import Contender
from calibri_lightning.tools.compare.drawing import dressed
from calibri_lightning.tools.compare.runs import read_runs

GRPO = {"num_groups": 2, "group_size": 2, "pictures_per_unit": 2, "optimizer": {"lr": 0.05, "scales_lr": 0.05}}
FAST = ("--test_after_fit=true", "--data.val=null", "--trainer.max_steps=1", "--model.num_diversity_prompts=0")


def configured(tiny_folder: Path, folder: Path, train: str) -> TinyRuns:
    config = yaml.safe_load((tiny_folder / "config.yaml").read_text())
    config["model"]["strategy"] = {"class_path": "FlowGRPO", "init_args": {"train": train, **GRPO}}
    path = folder / f"{train}.yaml"
    path.write_text(yaml.safe_dump(config))
    return TinyRuns(folder / "runs", path)


def contenders(arguments: list[str]) -> list[Contender]:
    runs = read_runs(arguments)
    return [run.contender(runs) for run in runs]


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search for scales; shared, so never written to."""
    with plotless():
        return TinyRuns.make(tiny_folder, tmp_path_factory.mktemp("searched")).fit("search", *FAST)


@pytest.fixture(scope="module")
def fitted(run: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Scales, a LoRA, all weights, and scales on that LoRA; shared, so never written to."""
    folder = tmp_path_factory.mktemp("fitted")
    found = {"search": run}
    with plotless():
        for train in ("lora", "full"):
            found[train] = configured(tiny_folder, folder, train).fit(train, *FAST)
        stacked = TinyRuns.make(tiny_folder, folder / "runs")
        found["stacked"] = stacked.fit("stacked", *FAST, f"--model.init_from={found['lora']}/adapter")
    return found


@contextmanager
def plotless() -> Iterator[None]:
    """Leaves out the plots at the end of a fit, half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_scales", "plot_convergence"):
            patch.setattr(f"calibri_lightning.report.{name}", lambda *_: None)
        yield


def compare(tiny_folder: Path, out: Path, *arguments: str) -> int:
    small = ("--steps", "2", "3", "--samples", "2", "--diversity-prompts", "1", "--pictures", "2", "--rows", "12")
    prompts = () if "--prompts" in arguments else ("--prompts", str(tiny_folder / "test.txt"))
    return main(["compare", *arguments, *prompts, "--device", "cpu", *small, "--out", str(out)])


def labelled(folders: Mapping[str, Path]) -> list[str]:
    return [f"{name}={folder}" for name, folder in folders.items()]


def test_runs_are_drawn_as_their_own_tests_drew_them(
    fitted: Mapping[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    assert compare(tiny_folder, out, *labelled(fitted)) == 0
    document = json.loads((out / "comparison.json").read_text())
    mean = {
        (row["contender"], row["num_steps"]): row["means"]["tiny_rewards:redness"]["mean"] for row in document["rows"]
    }
    for name, folder in fitted.items():
        summary = json.loads((folder / "summary.json").read_text())
        own = {(c["role"], c["num_steps"]): c["means"]["tiny_rewards:redness"]["mean"] for c in summary["conditions"]}
        assert mean["base", 2] == pytest.approx(own["base", 2], abs=1e-6)
        assert mean["base", 3] == pytest.approx(own["base", 3], abs=1e-6)
        assert mean[name, 2] == pytest.approx(own["calibrated", 2], abs=1e-6)
        assert mean[name, 2] != mean["base", 2]
    few = [note for note in document["notes"] if "too narrow intervals" in note]
    assert len(few) == 2, "of prompts, and of prompts for diversity"
    assert (out / "report.html").read_text().count("<article") == 2


def test_a_model_is_untouched_after_every_run(fitted: Mapping[str, Path]) -> None:
    found = read_runs(labelled(fitted))
    backbone = command.load_backbone(found[0])
    before = {name: value.clone() for name, value in backbone.transformer.state_dict().items()}
    for run in found:
        with dressed(backbone, run):
            pass
        after = backbone.transformer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_stacked_run_costs_what_it_stands_on_as_well(fitted: Mapping[str, Path], tmp_path: Path) -> None:
    by_name = {c.label: c for c in contenders(labelled(fitted))}
    stacked, lora = by_name["stacked"], by_name["lora"]
    assert stacked.stacked_on == "lora"
    assert stacked.budget is not None
    assert lora.budget is not None
    assert stacked.whole_budget is not None
    assert stacked.whole_budget.images == stacked.budget.images + lora.budget.images
    assert stacked.whole_budget.forwards == stacked.budget.forwards + lora.budget.forwards
    assert stacked.is_budget_whole
    assert (lora.stacked_on, lora.whole_budget, lora.is_budget_whole) == ("", lora.budget, True)
    trained = {name: c.num_trained for name, c in by_name.items()}
    assert 0 < trained["search"] == trained["stacked"] < trained["lora"] < trained["full"]
    # Runs that were moved are known by their adapter; where none of them trained it, the cost is not whole.
    moved = {name: Path(shutil.copytree(fitted[name], tmp_path / name)) for name in ("lora", "stacked")}
    config = yaml.safe_load((moved["stacked"] / "config.yaml").read_text())
    config["model"]["init_from"] = "gone/lora/adapter"
    (moved["stacked"] / "config.yaml").write_text(yaml.safe_dump(config))
    _, found = contenders(labelled(moved))
    assert (found.stacked_on, found.whole_budget) == ("lora", stacked.whole_budget)
    (alone,) = contenders([f"stacked={moved['stacked']}"])
    assert (alone.stacked_on, alone.whole_budget, alone.is_budget_whole) == ("gone/lora/adapter", alone.budget, False)


def changed(run: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of a run with another calibration.json, whose test was not done."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("summary.json"))
    document = json.loads((run / "calibration.json").read_text())
    change(document)
    (folder / "calibration.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def refused(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> Callable[..., str]:
    """Runs a command that has to be refused before the model is loaded; the message."""

    def refused(*arguments: str) -> str:
        out = tmp_path / "out" / "report"
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "load_backbone", lambda _: pytest.fail("the model was loaded"))
            assert compare(tiny_folder, out, *arguments) == 2
        assert not out.parent.exists() or not any(out.parent.iterdir())
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return refused


def test_an_adapter_that_is_cut_or_forgotten_is_refused(
    fitted: Mapping[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    cut = Path(shutil.copytree(fitted["lora"], tmp_path / "cut"))
    weights = cut / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    assert "cut" in refused(str(cut))
    forgotten = changed(fitted["lora"], tmp_path / "forgotten", lambda document: document.pop("adapter"))
    assert "of which its calibration.json says nothing" in refused(str(forgotten))


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "No run is given" in refused()
    assert "is not a folder" in refused(str(tmp_path / "absent"))
    assert "give one of these" in refused(str(run.parent))
    assert "more than one contender" in refused(f"a={run}", f"a={run}")
    assert "more than one contender" in refused(f"base={run}")
    assert "cannot be printed" in refused(f"x\ny\x1b[31m={run}")
    assert "is not a folder" in refused("L" * 5000)
    assert "--at is 5" in refused(str(run), "--at", "5")
    assert "absent" in refused(str(run), "--rewards", "absent")


def test_runs_of_different_models_are_refused(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def grow(document: dict) -> None:
        document["model"]["num_parameters"] += 1

    assert "different models" in refused(str(run), str(changed(run, tmp_path / "other", grow)))
    wide = Path(shutil.copytree(run, tmp_path / "wide"))
    config = yaml.safe_load((wide / "config.yaml").read_text())
    config["model"]["backbone"]["init_args"]["width"] = 64
    (wide / "config.yaml").write_text(yaml.safe_dump(config))
    assert "width None in search and 64 in wide" in refused(str(run), str(wide))


def test_a_half_written_run_is_refused(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def without_adapter(document: dict) -> None:
        document["adapter"] = {"source": "adapter", "sha256": "0" * 64, "merged": False}

    assert "adapter" in refused(str(run), str(changed(run, tmp_path / "bare", without_adapter)))
    for number, (file, content, words) in enumerate(
        (
            ("calibration.json", None, "which it writes at each validation"),
            ("calibration.json", (run / "calibration.json").read_bytes()[:300], "not valid JSON"),
            ("summary.json", (run / "summary.json").read_bytes()[:300], "cannot be read"),
            ("config.yaml", b"model: {backbone: ", "is not the configuration of a fit"),
            ("config.yaml", b"[]", "is not the configuration of a fit"),
            ("metrics.csv", b"step,train/images,val/start\n0,ten,0.1\n", "is cut or was edited"),
            ("metrics.csv", b"\0\0", "is cut or was edited"),
            ("metrics.csv", (run / "metrics.csv").read_bytes()[:-3], "is cut or was edited"),
        )
    ):
        half = Path(shutil.copytree(run, tmp_path / f"half{number}"))
        (half / file).unlink(missing_ok=True)
        if content is not None:
            (half / file).write_bytes(content)
        assert words in refused(str(run), str(half)), file


def test_a_folder_that_holds_something_is_left_as_it_is(
    run: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert compare(tiny_folder, tmp_path / "full", str(run)) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "full" / "mine").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["command.draw_all", "writing.draw_plots", "writing.to_json"])
def test_an_interruption_leaves_nothing(
    run: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: signal.Signals
) -> None:
    monkeypatch.setattr(f"calibri_lightning.tools.compare.{place}", lambda *_: os.kill(os.getpid(), number))
    assert compare(tiny_folder, tmp_path / "report", str(run), "--samples", "0") == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_negative_prompts_that_a_run_would_not_see_are_refused(run: Path) -> None:
    (guided,) = read_runs([str(run)])
    alone = replace(guided, label="alone", calibration=replace(guided.calibration, members=(Member("prompt", 1.0),)))
    plain, negative = Prompt("a", 0), Prompt("b", 1, negative="blurry")
    check_seen([guided], "p.csv", [plain, negative])
    check_seen([guided, alone], "p.csv", [plain])
    with pytest.raises(UserError, match=r"p.csv \(for the run alone\) has 1 negative prompts"):
        check_seen([guided, alone], "p.csv", [plain, negative])


def test_the_report_says_where_runs_were_not_trained_alike(run: Path) -> None:
    (first,) = read_runs([f"first={run}"])
    assert notes([first, replace(first, label="same")]) == ()

    def note(calibration: CalibrationFile = first.calibration, **settings: object) -> str:
        other = replace(first, label="other", calibration=calibration, settings=replace(first.settings, **settings))
        (found,) = notes([first, other])
        return found

    model = {**first.settings.model, "backbone": {**first.settings.model["backbone"]}}
    model["backbone"]["init_args"] = {**model["backbone"]["init_args"], "dtype": "bfloat16"}
    own = first.settings.model["backbone"]["init_args"]["dtype"]
    assert note(model=model) == (f"other was trained with dtype bfloat16; here all are drawn with {own}, as first.")
    assert "trainer.precision bf16-mixed" in note(precision="bf16-mixed")
    single = replace(first.calibration, members=(Member("prompt", 1.0),))
    assert "other: 1 member, no guidance" in note(calibration=single)
    steps = replace(first.calibration, obtained_by=replace(first.calibration.obtained_by, num_steps=9))
    assert "first 2, other 9" in note(calibration=steps)


def test_a_run_is_named_by_its_folder(run: Path) -> None:
    (found,) = read_runs([str(run)])
    assert found.label == "search"
    assert np.isfinite(found.calibration.values).all()
