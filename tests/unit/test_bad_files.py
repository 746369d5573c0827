"""Files of an earlier run that do not fit, and folders that cannot be written: one clear message, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import checkpoint, last
from tiny_runs import Capture, TinyRuns, refused

from calibri_lightning.shapes.pipeline import TINY, PipelineConfig, build_pipeline

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def calibrated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    runs = TinyRuns.make(tiny_folder, tmp_path_factory.mktemp("calibrated"))
    return runs.fit("a", "--trainer.max_steps=1", "--data.val=null")


def _with(changes: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    return lambda document: json.dumps(document | changes)


def _nan(document: dict[str, Any]) -> str:
    name = next(iter(document["values"]))
    return json.dumps(document | {"values": document["values"] | {name: float("nan")}})


def _far(document: dict[str, Any]) -> str:
    name = next(iter(document["values"]))
    return json.dumps(document | {"values": document["values"] | {name: 100.0}})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_with({"format_version": 99}), ["format_version 99", "Install the version"]),
        (_nan, ["nan", "finite"]),
        (_with({"model": {"transformer_class": "X", "num_parameters": 1, "sites_hash": "", "name": "y"}}), ["X", "y"]),
        (lambda document: json.dumps(document)[:-40], ["not valid JSON"]),
        (_with({"format": "other"}), ["not a calibration"]),
    ],
)
def test_calibration_to_start_from(
    runs: TinyRuns,
    calibrated: Path,
    tmp_path: Path,
    capsys: Capture,
    edit: Callable[[dict[str, Any]], str],
    words: list[str],
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(edit(json.loads((calibrated / "calibration.json").read_text())))
    message = refused(runs, capsys, f"--model.init_from={path}")
    for word in words:
        assert word in message


def test_start_outside_of_the_bounds(runs: TinyRuns, calibrated: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(_far(json.loads((calibrated / "calibration.json").read_text())))
    message = refused(runs, capsys, f"--model.init_from={path}", worked=True)
    assert "100" in message
    assert "bounds" in message


def test_calibration_of_another_layout(runs: TinyRuns, calibrated: Path, capsys: Capture) -> None:
    message = refused(runs, capsys, f"--model.init_from={calibrated}", "--model.calibration.granularity=gate")
    assert "granularity layer" in message
    assert "model.calibration" in message


def test_calibration_and_checkpoint_of_another_model(
    runs: TinyRuns, calibrated: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = PipelineConfig(**{**vars(TINY), "num_layers": 4})
    build_pipeline(other).save_pretrained(tmp_path / "other")
    model = f"--model.backbone.pretrained={tmp_path / 'other'}"
    assert "another architecture" in refused(runs, capsys, model, f"--model.init_from={calibrated}")
    assert "does not fit this run" in refused(runs, capsys, model, f"--ckpt_path={last(calibrated)}", command="test")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_checkpoint_of_another_layout(runs: TinyRuns, calibrated: Path, capsys: Capture, command: str) -> None:
    """Both have 16 parameters, so shapes alone would not tell them apart."""
    flags = (f"--ckpt_path={last(calibrated)}", "--model.calibration.weight_mode=raw")
    message = refused(runs, capsys, *flags, "--data.predict_prompts=[a red circle]", command=command)
    assert "16 parameters" in message
    assert "weight_mode" in message


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 0}, path)


def _calibration(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ["is no checkpoint, or it is damaged or cut short"]),
        (_foreign, ["no checkpoint of calibri_lightning"]),
        (_calibration, ["no checkpoint", "calibration.json goes to"]),
    ],
)
def test_damaged_checkpoint(
    runs: TinyRuns,
    calibrated: Path,
    tmp_path: Path,
    capsys: Capture,
    damage: Callable[[Path], None],
    words: list[str],
) -> None:
    path = shutil.copy(last(calibrated), tmp_path / "last.ckpt")
    damage(Path(path))
    message = refused(runs, capsys, f"--ckpt_path={path}")
    for word in (*words, "init_from"):
        assert word in message


@pytest.mark.parametrize("inside", ["file/sub", "/proc/sub"])
def test_folder_that_cannot_be_written(runs: TinyRuns, tmp_path: Path, capsys: Capture, inside: str) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / inside
    message = refused(runs, capsys, f"--trainer.default_root_dir={root}")
    assert str(root) in message
    assert "--trainer.default_root_dir" in message


def test_folder_of_an_earlier_run(runs: TinyRuns, capsys: Capture) -> None:
    flags = ("--trainer.logger=false", "--trainer.max_steps=1", "--data.val=null")
    assert runs("fit", "a", *flags) == 0
    before = {path: path.read_bytes() for path in runs.folder.rglob("*") if path.is_file()}
    message = refused(runs, capsys, *flags)
    assert str(runs.folder) in message
    assert {path: path.read_bytes() for path in runs.folder.rglob("*") if path.is_file()} == before
    assert runs("predict", "a", "--trainer.logger=false", "--data.predict_prompts=[a red circle]") == 0
    assert (runs.folder / "config.yaml").read_bytes() == before[runs.folder / "config.yaml"]


class FullDisk:
    """Lets writes of files whose path holds a word fail once it is armed, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, word: str, free: int) -> None:
        self.word, self.free = word, free
        original = os.fsync

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self.word in path:
                self.free -= 1
                if self.free < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the file of a descriptor in /proc")
@pytest.mark.parametrize("word", ["last.ckpt", "calibration.json", "generations.jsonl", "units.rank0"])
def test_full_disk_loses_no_checkpoint(
    runs: TinyRuns, capsys: Capture, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    flags = ("--trainer.max_steps=3", "--trainer.val_check_interval=2")
    whole = runs.fit("whole", *flags)
    with monkeypatch.context() as patch:
        # Enough room for the first generation, which has 3 units; the calibration is first written after the second.
        FullDisk(patch, word, free={"units.rank0": 4, "calibration.json": 0}.get(word, 1))
        capsys.readouterr()
        assert runs("fit", "cut", *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1
    assert "No space left on device" in captured.err
    assert "Traceback" not in captured.err
    path = runs.latest("cut")
    assert f"--ckpt_path {last(path)}" in captured.err
    assert checkpoint(path)["global_step"] in (1, 2)
    assert not list(last(path).parent.glob(".*")), "no half-written file is left"
    resumed = runs.fit("cut", *flags, f"--ckpt_path={last(path)}")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        "--data.val_size=2",
        "--model.num_steps=3",
        '--model.rewards={"jpeg_compressibility": 1.0}',
        "--model.rows_per_forward=4",
    ],
)
def test_resume_under_another_judge(runs: TinyRuns, calibrated: Path, capsys: Capture, changed: str) -> None:
    # Scores of the two halves of such a run could not be compared.
    flags = (f"--ckpt_path={last(calibrated)}", "--trainer.max_steps=3", changed)
    assert "The run of the checkpoint was set up otherwise" in refused(runs, capsys, *flags, worked=True)
