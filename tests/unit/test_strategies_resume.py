"""The strategies in a real Trainer: resumed equals uninterrupted, killed equals replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_module import (
    STRATEGIES,
    FakeModule,
    Killed,
    SaveAlways,
    StopAt,
    fingerprint,
    fit,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer


@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_equals_an_uninterrupted_run(name: str, tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES[name](), tmp_path / "whole")
    fit(whole, 6)
    first = FakeModule(STRATEGIES[name](), tmp_path / "parts")
    ckpt = tmp_path / "last.ckpt"
    trainer = fit(first, 6, StopAt(3))
    assert trainer.global_step == 3
    trainer.save_checkpoint(ckpt)
    assert torch.load(ckpt, weights_only=True)["global_step"] == 3
    second = FakeModule(STRATEGIES[name](), tmp_path / "parts")
    assert fit(second, 6, ckpt=ckpt).global_step == 6
    assert fingerprint(second) == fingerprint(whole)
    assert {step for step, _ in second.units} == {3, 4, 5}


def test_more_generations_than_planned_continue_a_search_without_annealing(tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES["official"](), tmp_path / "whole")
    fit(whole, 6)
    fit(FakeModule(STRATEGIES["official"](), tmp_path / "parts"), 3, SaveAlways(tmp_path / "c.ckpt"))
    second = FakeModule(STRATEGIES["official"](), tmp_path / "parts")
    fit(second, 6, ckpt=tmp_path / "c.ckpt")
    assert fingerprint(second) == fingerprint(whole)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("into", [1, 4])
def test_kill_inside_a_generation_repeats_no_finished_unit(name: str, into: int, tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES[name](), tmp_path / "whole")
    fit(whole, 4)
    before = sum(step < 2 for step, _ in whole.units)
    killed = FakeModule(STRATEGIES[name](), tmp_path / "run", kill_after=before + into)
    with pytest.raises(Killed):
        fit(killed, 4, SaveAlways(tmp_path / "last.ckpt"))
    resumed = FakeModule(STRATEGIES[name](), tmp_path / "run")
    fit(resumed, 4, ckpt=tmp_path / "last.ckpt")
    assert fingerprint(resumed) == fingerprint(whole)
    # Together the two processes did exactly the units of the uninterrupted run, each of them once.
    assert killed.units + resumed.units == whole.units


def test_checkpoints_of_lightnings_own_callback_resume_exactly(tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES["default"](), tmp_path / "whole")
    fit(whole, 5)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    first = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    trainer = quiet_trainer(tmp_path, saver, max_steps=5)
    trainer.fit(first)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={n}.ckpt" for n in range(1, 6)]
    for step in (1, 4):
        resumed = FakeModule(STRATEGIES["default"](), tmp_path / f"from{step}")
        fit(resumed, 5, ckpt=tmp_path / f"step={step}.ckpt")
        assert fingerprint(resumed) == fingerprint(whole)
        assert resumed.units == []  # the ledger of the first run, in another folder, knows everything


def test_kill_between_generation_and_checkpoint_repeats_nothing(tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES["default"](), tmp_path / "whole")
    fit(whole, 5)
    fit(
        FakeModule(STRATEGIES["default"](), tmp_path / "run"),
        5,
        StopAt(2),
        SaveAlways(tmp_path / "early.ckpt"),
    )
    further = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    fit(further, 5, StopAt(4), ckpt=tmp_path / "early.ckpt")  # generations 2 and 3 are in the ledger only
    resumed = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    fit(resumed, 5, ckpt=tmp_path / "early.ckpt")
    assert {step for step, _ in resumed.units} == {4}
    assert fingerprint(resumed) == fingerprint(whole)


def test_new_run_in_the_same_folder_reuses_nothing(tmp_path: Path) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 2)
    again = FakeModule(STRATEGIES["default"](), tmp_path)
    fit(again, 2)
    assert {step for step, _ in again.units} == {0, 1}
