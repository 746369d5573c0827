"""The strategies in a real Trainer: stop rules, bad rewards, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_module import (
    STRATEGIES,
    FakeModule,
    Generations,
    N,
    SaveAlways,
    fingerprint,
    fit,
)
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from calibri_lightning.errors import UserError
from calibri_lightning.strategies import CMAES, EvolutionStrategy, PairES

# --- stop rules ---


def test_max_images_is_never_exceeded_and_sets_the_horizon(tmp_path: Path) -> None:
    strategy = PairES(num_pairs=4, prompts_per_pair=2, max_images=16 * 5 + 15)
    trainer = fit(FakeModule(strategy, tmp_path), -1)
    assert trainer.global_step == 5
    assert strategy.images == 80
    assert strategy.report is not None
    assert strategy.report.total_generations == 5
    assert "max_images" in str(strategy.stop_reason)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PairES(num_pairs=4, prompts_per_pair=2, max_images=32),
        lambda: PairES(num_pairs=4, prompts_per_pair=2, patience=1),
    ],
)
def test_search_that_had_ended_does_not_go_on_when_resumed(
    make: Callable[[], EvolutionStrategy], tmp_path: Path
) -> None:
    worse = FakeModule(make(), tmp_path, score=lambda x: -float(np.abs(x - 1).sum()))
    trainer = fit(worse, -1)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert trainer.global_step == 2
    resumed = FakeModule(make(), tmp_path)
    fit(resumed, -1, ckpt=tmp_path / "c.ckpt")
    assert resumed.evaluations == 0
    assert resumed.strategy.generation == 2


def test_max_seconds_ends_and_counts_the_earlier_parts(tmp_path: Path) -> None:
    strategy = PairES(num_pairs=4, prompts_per_pair=2, max_seconds=1e-6)
    assert fit(FakeModule(strategy, tmp_path), -1, SaveAlways(tmp_path / "c.ckpt")).global_step == 1
    assert "max_seconds" in str(strategy.stop_reason)
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["PairES"]
    state["elapsed"] = 1e5
    later = PairES(num_pairs=4, prompts_per_pair=2, max_seconds=1e4)
    later.load_state_dict(state)
    module = FakeModule(later, tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=9)
    module._trainer = trainer
    trainer.strategy.connect(module)
    later._prepare(module)
    assert later._budget is not None
    assert later._budget.over(0) is not None


def test_patience_ends_after_validations_without_a_better_score(tmp_path: Path) -> None:
    strategy = PairES(num_pairs=4, prompts_per_pair=2, patience=3)
    module = FakeModule(strategy, tmp_path, score=lambda x: -float(np.abs(x - 1).sum()))
    # The first validation finds the start; three more find nothing better.
    assert fit(module, 50).global_step == 4
    assert "3 validations" in str(strategy.stop_reason)


def test_patience_without_validation_prompts_is_refused(tmp_path: Path) -> None:
    module = FakeModule(CMAES(popsize=8, bucket_size=8, patience=2), tmp_path)
    module.validates = False
    with pytest.raises(UserError, match="patience is 2.*no validation prompts.*data.val"):
        fit(module, 3)
    assert module.evaluations == 0


def test_sigma_plateau_ends() -> None:
    strategy = CMAES(sigma_plateau=3)
    assert strategy.plateau([0.2, 0.1]) is None
    assert strategy.plateau([0.1, 0.1, 0.11]) is None
    assert strategy.plateau([0.3, 0.1, 0.1, 0.101]) is not None


def test_search_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no end.*Set trainer.max_steps"):
        fit(FakeModule(PairES(), tmp_path), -1)


def test_budget_below_one_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_images is 100, but one generation takes 256"):
        fit(FakeModule(CMAES(max_images=100), tmp_path), 5)


# --- bad rewards ---


def test_failed_candidate_does_not_stop_the_search(tmp_path: Path) -> None:
    def broken(_: int, candidate: int, slot: int, reward: float) -> float:
        return float("nan") if candidate == 3 and slot == 1 else reward

    module = FakeModule(STRATEGIES["default"](), tmp_path, break_cells=broken)
    fit(module, 10)
    assert module.strategy.report is not None
    assert module.strategy.report.generation == 10
    assert np.isfinite(module.strategy._status.mean).all()


def test_reward_that_fails_once_is_made_again_and_changes_nothing(tmp_path: Path) -> None:
    tried: set[tuple[int, int, int]] = set()

    def hiccup(step: int, candidate: int, slot: int, reward: float) -> float:
        first = (step, candidate, slot) not in tried
        tried.add((step, candidate, slot))
        return float("inf") if first and candidate == 2 else reward

    whole = FakeModule(STRATEGIES["pairs"](), tmp_path / "whole")
    fit(whole, 4)
    module = FakeModule(STRATEGIES["pairs"](), tmp_path / "run", break_cells=hiccup)
    fit(module, 4)
    assert fingerprint(module) == fingerprint(whole)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_dead_reward_is_tried_twice_then_refused_and_nothing_is_told(name: str, value: float, tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES[name](), tmp_path, break_cells=lambda step, c, s, r: value if step == 2 else r)
    with pytest.raises(UserError, match=r"Generation 2 is useless, twice"):
        fit(module, 4, SaveAlways(tmp_path / "last.ckpt"))
    assert module.strategy.generation == 2
    # The checkpoint is that of generation 2: the repaired run continues as if nothing had happened.
    repaired = FakeModule(STRATEGIES[name](), tmp_path)
    if not np.isfinite(value):
        fit(repaired, 4, ckpt=tmp_path / "last.ckpt")
        whole = FakeModule(STRATEGIES[name](), tmp_path / "whole")
        fit(whole, 4)
        assert fingerprint(repaired) == fingerprint(whole)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"popsize": 1}, "popsize is 1.*at least 4"),
        ({"preset": "best"}, 'preset is "best"'),
        ({"sigma0": 0.0}, "sigma0 is 0.0"),
        ({"sigma0": float("nan")}, "sigma0 is nan"),
        ({"bucket_size": 0}, "bucket_size is 0"),
        ({"halving": [4, 4]}, r"halving is \[4, 4\] with bucket_size 16"),
        ({"halving": [0, 16]}, "halving"),
        ({"cmean_final": 0.0}, "cmean_final"),
        ({"weight_std": -1.0}, "weight_std"),
        ({"sigma_plateau": 1}, "sigma_plateau"),
        ({"max_images": 0}, "max_images"),
        ({"max_seconds": -1.0}, "max_seconds"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_settings_of_cma_es_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CMAES(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"prompts_per_pair": 0}, "prompts_per_pair is 0"),
        ({"sigma0": -0.1}, "sigma0 is -0.1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"final_lr_fraction": 1.5}, "final_lr_fraction is 1.5"),
    ],
)
def test_bad_settings_of_pair_es_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairES(**settings)


@pytest.mark.parametrize("name", STRATEGIES)
def test_bounds_that_exclude_the_start_are_refused_before_any_picture(name: str, tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES[name](), tmp_path, start=np.full(N, 5.0))
    with pytest.raises(UserError, match="starts at 5 with bounds"):
        fit(module, 3)
    assert module.evaluations == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: CMAES(popsize=10, bucket_size=8), "popsize was 8 and is 10"),
        (lambda: CMAES(popsize=8, bucket_size=8, sigma0=0.3), "sigma0 was 0.2 and is 0.3"),
        (lambda: CMAES(popsize=8, bucket_size=8, halving=[8]), r"halving was 2\+2\+4 and is 8"),
    ],
)
def test_resume_with_other_settings_is_refused(
    changed: Callable[[], EvolutionStrategy], message: str, tmp_path: Path
) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 2, SaveAlways(tmp_path / "c.ckpt"))
    with pytest.raises(UserError, match=message):
        fit(FakeModule(changed(), tmp_path), 4, ckpt=tmp_path / "c.ckpt")


def test_resume_with_another_seed_is_refused(tmp_path: Path) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 2, SaveAlways(tmp_path / "c.ckpt"))
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    module.seed = 8
    with pytest.raises(UserError, match="seed was 7 and is 8"):
        fit(module, 4, ckpt=tmp_path / "c.ckpt")


def test_checkpoint_whose_candidates_cannot_be_redrawn_is_refused(tmp_path: Path) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 3, SaveAlways(tmp_path / "c.ckpt"))
    ckpt = torch.load(tmp_path / "c.ckpt", weights_only=True)
    ckpt["callbacks"]["CMAES"]["history"]["candidates"][1] = "0" * 64
    torch.save(ckpt, tmp_path / "d.ckpt")
    with pytest.raises(UserError, match="Generation 1 of the checkpoint cannot be replayed.*numpy.*cma"):
        fit(FakeModule(STRATEGIES["default"](), tmp_path), 4, ckpt=tmp_path / "d.ckpt")


def test_full_disk_in_mid_run_names_the_file_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calibri_lightning.strategies import ledger

    whole = FakeModule(STRATEGIES["default"](), tmp_path / "whole")
    fit(whole, 4)
    module = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    real, calls = ledger.os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if module.trainer.global_step == 2 and len(calls) % 3 == 0:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", fsync)
        with pytest.raises(UserError, match=r"ledger/.*jsonl cannot be written \(No space left on device\)"):
            fit(module, 4, SaveAlways(tmp_path / "last.ckpt"))
    resumed = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    fit(resumed, 4, ckpt=tmp_path / "last.ckpt")
    assert fingerprint(resumed) == fingerprint(whole)


def test_unwritable_run_folder_is_refused_before_any_picture(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    (tmp_path / "ledger").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="ledger cannot be written"):
        fit(module, 2)
    assert module.evaluations == 0


def test_batch_that_does_not_fill_the_slots_is_refused(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    module.train_dataloader = lambda: DataLoader(Generations(module, 5), batch_size=None)
    with pytest.raises(UserError, match="has 5 prompts; this strategy takes 8"):
        fit(module, 2)
