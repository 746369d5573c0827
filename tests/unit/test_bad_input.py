"""Every mistake of a user ends in one clear message, exit code 2, no traceback, and before long work."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CMA, TinyRuns

from calibri_lightning.shapes.pipeline import TINY, PipelineConfig, build_pipeline

pytestmark = pytest.mark.usefixtures("no_plots")

Capture = pytest.CaptureFixture[str]


def refused(runs: TinyRuns, capsys: Capture, *flags: str, command: str = "fit", worked: bool = False) -> str:
    """Runs a command that has to be refused; the message."""
    capsys.readouterr()
    assert runs(command, "bad", *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1, captured.err
    assert "Traceback" not in captured.err
    assert "usage:" not in captured.err
    assert ("Calibrating" in captured.out) <= worked, "refused before the run begins"
    assert "generation 1" not in captured.out
    return next(line for line in captured.err.splitlines() if line.startswith("error:"))


def edited(runs: TinyRuns, tmp_path: Path, old: str, new: str) -> tuple[str, ...]:
    """A second configuration file over the first, in which a text is replaced."""
    text = runs.config.read_text()
    assert old in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new))
    return ("--config", str(path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_steps: 2", "num_stepz: 2", ["model.num_stepz"]),
        ("num_pairs: 2", "num_pears: 2", ["num_pears"]),
        ("class_path: PairES", "class_path: PairEZ", ["model.strategy", "PairEZ", "PairES, CMAES"]),
        ("class_path: SD3", "class_path: SD9", ["model.backbone", "SD9", "built in are SD3"]),
        ("granularity: layer", "granularity: head", ["model.calibration.granularity", "'block', 'layer', 'gate'"]),
        ("num_steps: 2", "num_steps: two", ["model.num_steps", "int", "two"]),
        ("trainer: {", "trainer: {{", ["parsing"]),
    ],
)
def test_configuration(runs: TinyRuns, tmp_path: Path, capsys: Capture, old: str, new: str, words: list[str]) -> None:
    message = refused(runs, capsys, *edited(runs, tmp_path, old, new))
    for word in (*words, "fit --help"):
        assert word in message


def test_test_prompts_that_a_reward_cannot_score_are_refused_before_the_search(runs: TinyRuns, capsys: Capture) -> None:
    flags = ("--model.rewards={shapes: 1.0}", "--data.train=shapes:train", "--data.val=shapes:val")
    message = refused(runs, capsys, *flags, "--data.allow_overlap=true")
    for word in ("reward 'shapes'", "three red circles", "shapes:train"):
        assert word in message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.nonsense=1", ["--model.nonsense"]),
        ("--config=absent.yaml", ["absent.yaml", "does not exist"]),
        ("--model.num_steps=0", ["num_steps=0", "at least 1"]),
        ("--model.rewards={shapez: 1.0}", ["no reward 'shapez'", "Did you mean 'shapes'"]),
        ("--model.rewards={absent_module:f: 1.0}", ["absent_module:f", "PYTHONPATH"]),
        ("--model.rewards={shapes: .nan}", ["shapes", "finite"]),
        ("--model.rewards={shapes: 0.0}", ["nothing to optimise"]),
        ("--model.strategy.num_pairs=0", ["num_pairs is 0", "at least 1"]),
        ("--model.strategy.sigma0=-1", ["sigma0", "-1"]),
        ("--model.rows_per_forward=1", ["rows_per_forward is 1", "2"]),
        ("--model.calibration.guidance_scale=30", ["30", "20"]),
        ("--model.calibration.members=0", ["members", "from 1 up"]),
        ("--trainer.precision=bf16-true", ["bf16-true", "theta", "bf16-mixed", "dtype"]),
        ("--trainer.precision=64-true", ["64-true", "32-true"]),
        ("--trainer.devices=none", ["devices", "int > 0"]),
        ("--trainer.gradient_clip_val=1.0", ["gradient_clip_val"]),
        ("--data.train=null", ["no train prompts", "data.train"]),
        ("--data.train=absent.txt", ["absent.txt", "does not exist"]),
        ("--data.val_size=0", ["data.val_size=0"]),
        ("--ckpt_path=absent.ckpt", ["absent.ckpt", "no checkpoint"]),
        ("--model.init_from=absent", ["absent", "calibration.json"]),
        ("--model.backbone.pretrained=absent/", ["absent/"]),
        ("--model.backbone.pretrained=/", ["model_index.json"]),
    ],
)
def test_flags(runs: TinyRuns, capsys: Capture, flag: str, words: list[str]) -> None:
    message = refused(runs, capsys, flag)
    for word in words:
        assert word in message


@pytest.mark.parametrize("popsize", [1, 3])
def test_popsize(runs: TinyRuns, capsys: Capture, popsize: int) -> None:
    message = refused(runs, capsys, *CMA, f"--model.strategy.popsize={popsize}")
    assert f"popsize is {popsize}" in message
    assert "at least 4" in message


def test_a_search_without_an_end(runs: TinyRuns, capsys: Capture) -> None:
    message = refused(runs, capsys, "--trainer.max_steps=-1", worked=True)
    assert "trainer.max_steps" in message
    assert "max_images" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no prompts"]),
        (b"\n\n", ["no prompts"]),
        (b"a red circle\n\na blue circle\n", ["blank", "line 2"]),
        (b"a red circle\na blue circle\na red circle\n", ["line", "3", "duplicates"]),
        (b"a caf\xe9\n", ["UTF-8"]),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_prompts_file(
    runs: TinyRuns, tmp_path: Path, capsys: Capture, part: str, content: bytes, words: list[str]
) -> None:
    """The test prompts too are read before the search, not after hours of it."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    message = refused(runs, capsys, f"--data.{part}={path}")
    for word in (str(path), *words):
        assert word in message


def test_prompts_shared_by_train_and_test(runs: TinyRuns, capsys: Capture) -> None:
    message = refused(runs, capsys, f"--data.test={runs.config.parent / 'train.txt'}")
    assert "a red circle" in message
    assert "held out" in message


def test_prediction_without_prompts(runs: TinyRuns, capsys: Capture) -> None:
    assert "data.predict_prompts" in refused(runs, capsys, command="predict")


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
    checkpoint = f"--ckpt_path={calibrated / 'checkpoints' / 'last.ckpt'}"
    assert "does not fit this run" in refused(runs, capsys, model, checkpoint, command="test")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_checkpoint_of_another_layout(runs: TinyRuns, calibrated: Path, capsys: Capture, command: str) -> None:
    """Both have 16 parameters, so shapes alone would not tell them apart."""
    flags = (f"--ckpt_path={calibrated / 'checkpoints' / 'last.ckpt'}", "--model.calibration.weight_mode=raw")
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
        (_truncate, ["no checkpoint, or it is cut short"]),
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
    path = shutil.copy(calibrated / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    damage(Path(path))
    message = refused(runs, capsys, f"--ckpt_path={path}")
    for word in (*words, "init_from"):
        assert word in message


@pytest.mark.parametrize("component", ["vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_model_folder_without_a_component(
    runs: TinyRuns, tiny_folder: Path, tmp_path: Path, capsys: Capture, component: str
) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / component)
    message = refused(runs, capsys, f"--model.backbone.pretrained={tmp_path / 'model'}")
    assert f"lacks its component {component!r}" in message


def test_unknown_block_class(runs: TinyRuns, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_sd3

    novel = type("NovelBlock", (transformer_sd3.JointTransformerBlock,), {})
    monkeypatch.setattr(transformer_sd3, "JointTransformerBlock", novel)
    message = refused(runs, capsys)
    assert "NovelBlock" in message


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("raises", ["tiny_rewards:raises", "RuntimeError", "server is down"]),
        ("one_too_many", ["tiny_rewards:one_too_many", "[4]", "[3]"]),
        ("not_a_tensor", ["tiny_rewards:not_a_tensor", "list"]),
        ("always_nan", ["finite reward"]),
    ],
)
def test_reward(runs: TinyRuns, capsys: Capture, reward: str, words: list[str]) -> None:
    message = refused(runs, capsys, f'--model.rewards={{"tiny_rewards:{reward}": 1.0}}', worked=True)
    for word in words:
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
    last = runs.latest("cut") / "checkpoints" / "last.ckpt"
    assert f"--ckpt_path {last}" in captured.err
    assert torch.load(io.BytesIO(last.read_bytes()), weights_only=True)["global_step"] in (1, 2)
    assert not list(last.parent.glob(".*")), "no half-written file is left"
    resumed = runs.fit("cut", *flags, f"--ckpt_path={last}")
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
    path = calibrated / "checkpoints" / "last.ckpt"
    assert "set up otherwise" in refused(
        runs, capsys, f"--ckpt_path={path}", "--trainer.max_steps=3", changed, worked=True
    )


def test_a_share_of_the_endless_epoch_between_validations(runs: TinyRuns, capsys: Capture) -> None:
    assert "whole number" in refused(runs, capsys, "--trainer.val_check_interval=1.0")


def test_no_generation_at_all(runs: TinyRuns, capsys: Capture) -> None:
    assert "max_steps is 0" in refused(runs, capsys, "--trainer.max_steps=0")
