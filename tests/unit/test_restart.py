"""A run that is started again finds by itself where it was, and a damaged checkpoint costs one step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny_rewards
import torch
from run_files import checkpoint, last
from tiny_runs import Capture, TinyRuns, forked

from calibri_lightning.checkpoint import LAST, PREVIOUS, CheckpointFiles, is_whole
from calibri_lightning.errors import UserError
from calibri_lightning.launch.restart import is_of_this_launch, newest_checkpoint, record_attempt
from calibri_lightning.ranks import LAUNCH
from calibri_lightning.resume import KEY

pytestmark = pytest.mark.usefixtures("no_plots")

STEPS = ("--trainer.max_steps=3", "--data.val=null")


def content(path: Path) -> bytes:
    return (path / "calibration.json").read_bytes()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_auto_goes_on_from_the_newest_checkpoint(
    runs: TinyRuns, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    whole = runs.fit("whole", *STEPS)
    total = len((tmp_path / "calls").read_text().splitlines())
    (tmp_path / "calls").unlink()
    words = runs.arguments("fit", "cut", *STEPS, "--ckpt_path=auto")
    for at in (2, total // 2):  # in the first generation, of which there is no checkpoint; and in a later one
        (tmp_path / "calls").unlink(missing_ok=True)
        assert forked([words], [{tiny_rewards.KILL_AT: str(at)}], tmp_path / "log") == [-signal.SIGKILL]
    capsys.readouterr()
    resumed = runs.fit("cut", *STEPS, "--ckpt_path=auto")
    assert f"Going on from {runs.folder / 'cut' / 'version_1' / 'checkpoints' / LAST}" in capsys.readouterr().err
    assert content(resumed) == content(whole)


def test_restarts_of_torchrun_go_on_as_auto_does(
    runs: TinyRuns, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    whole = runs.fit("whole", *STEPS)
    total = len((tmp_path / "calls").read_text().splitlines())
    (tmp_path / "calls").unlink()
    killed = {tiny_rewards.KILL_AT: str(total), LAUNCH: "this"}
    assert forked([runs.arguments("fit", "cut", *STEPS)], [killed], tmp_path / "log") == [-signal.SIGKILL]
    cut = runs.latest("cut")
    monkeypatch.setenv(LAUNCH, "another")
    capsys.readouterr()
    assert content(runs.fit("cut", *STEPS)) == content(whole), "of another launch: from the beginning"
    assert "Going on" not in capsys.readouterr().err
    monkeypatch.setenv(LAUNCH, "this")
    assert content(runs.fit("cut", *STEPS)) == content(whole)
    assert f"Going on from {last(cut)}" in capsys.readouterr().err


def test_auto_without_a_run_to_test_is_refused(runs: TinyRuns, capsys: Capture) -> None:
    assert runs("test", "nothing", "--ckpt_path=auto") == 2
    assert "no whole checkpoint of a run named nothing" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(runs: TinyRuns, capsys: Capture) -> None:
    whole = runs.fit("whole", *STEPS)
    path = runs.fit("cut", *STEPS)
    before = last(path).with_name(PREVIOUS)
    assert torch.load(before, weights_only=True)["global_step"] == checkpoint(path)["global_step"] == 3
    damage(last(path))
    assert not is_whole(last(path))
    capsys.readouterr()
    resumed = runs.fit("cut", *STEPS, f"--ckpt_path={last(path)}")
    assert f"goes on from {before}" in capsys.readouterr().err
    assert content(resumed) == content(whole)
    damage(before)
    assert runs("fit", "cut", *STEPS, f"--ckpt_path={last(path)}") == 2
    error = capsys.readouterr().err
    assert f"{last(path)} is no checkpoint, or it is damaged" in error
    assert newest_checkpoint(runs.folder, "cut") is None


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    files, path = CheckpointFiles(), tmp_path / LAST
    files.save_checkpoint({KEY: {}, "state_dict": {"theta": torch.arange(300.0)}}, path)
    whole = path.read_bytes()
    at = whole.index(torch.arange(300.0).numpy().tobytes())
    for place in range(at, at + 1200, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 128]) + whole[place + 1 :])
        with pytest.raises(UserError, match="damaged or cut short"):
            files.load_checkpoint(path)
    for length in range(0, len(whole), 211):
        path.write_bytes(whole[:length])
        assert not is_whole(path)


def test_the_newest_attempt_that_got_somewhere_is_found(tmp_path: Path) -> None:
    files = CheckpointFiles()
    assert newest_checkpoint(tmp_path, "none") is None
    for number in (0, 2, 10):
        folder = tmp_path / "run" / f"version_{number}" / "checkpoints"
        for step in (1, 2):
            files.save_checkpoint({KEY: {}, "state_dict": {}, "global_step": 100 * number + step}, folder / LAST)
    (tmp_path / "run" / "version_11").mkdir()
    (tmp_path / "run" / "version_old" / "checkpoints").mkdir(parents=True)

    def step() -> int:
        found = newest_checkpoint(tmp_path, "run")
        assert found is not None
        return int(files.load_checkpoint(found)["global_step"])

    assert step() == 1002
    damage(tmp_path / "run" / "version_10" / "checkpoints" / LAST)
    assert step() == 1001
    (tmp_path / "run" / "version_10" / "checkpoints" / PREVIOUS).unlink()
    assert step() == 202


def test_attempts_in_places_of_other_loggers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CheckpointFiles()
    for number, launch in enumerate(("one", "two", "two")):
        monkeypatch.setenv(LAUNCH, launch)
        folder = tmp_path / "elsewhere" / str(number)
        record_attempt(tmp_path / "root", "run", folder)
        assert is_of_this_launch(tmp_path / "root", "run", folder)
        if number < 2:
            files.save_checkpoint({KEY: {}, "state_dict": {}}, folder / "checkpoints" / LAST)
    with (tmp_path / "root" / "run.attempts.jsonl").open("a") as notes:
        notes.write('{"folder": "/cut')
    found = [newest_checkpoint(tmp_path / "root", "run", launch) for launch in (None, "one", "two", "three")]
    places = [None if path is None else path.parts[-3] for path in found]
    assert places == ["1", "0", "1", None]
    assert not is_of_this_launch(tmp_path / "root", "run", tmp_path / "elsewhere" / "0")
