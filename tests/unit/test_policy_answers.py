"""What gradient strategies deliver, hold to and refuse: answers without validation, references, NaN, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import checkpoint, column, last
from tiny_policies import policy_module, train
from tiny_runs import TinyRuns
from torch import Tensor

from calibri_lightning import FlowGRPO
from calibri_lightning.adapters.policy import LIVE
from calibri_lightning.conditions import Conditions
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.windows import AllSteps
from calibri_lightning.strategies import flow_grpo
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.strategies.ema import EmaOptions
from calibri_lightning.strategies.grpo_loss import GRPOOptions
from calibri_lightning.strategies.policy_run import EMA

pytestmark = pytest.mark.usefixtures("no_plots")


def grpo(**options: Any) -> FlowGRPO:
    return FlowGRPO(**({"train": "both", "num_groups": 2, "group_size": 3, "pictures_per_unit": 3} | options))


def test_without_validation_the_policy_itself_is_delivered(tiny_folder: Path, tmp_path: Path) -> None:
    """The average stands at the start until it is moved for the first time, after 8 optimiser steps."""
    module = policy_module(tiny_folder, grpo(), num_steps=3)
    before = {name: tensor.clone() for name, tensor in module.policy.tensors(LIVE).items()}
    train(module, tiny_folder, tmp_path, 2)
    assert module.answer.weights == LIVE
    assert not all(torch.equal(before[name], tensor) for name, tensor in module.policy.tensors(LIVE).items())
    assert not module.same(module.answer, module.start)


@pytest.mark.parametrize(("interval", "offered"), [(1, True), (3, False)])
def test_the_average_is_offered_once_it_differs_from_the_start(
    tiny_folder: Path, tmp_path: Path, interval: int, offered: bool
) -> None:
    module = policy_module(tiny_folder, grpo(ema=EmaOptions(interval=interval)), num_steps=3)
    train(module, tiny_folder, tmp_path, 2)
    candidates = module.strategy.validation_candidates(module)
    assert "policy" in candidates
    assert (EMA in candidates) == offered


def test_a_checkpoint_before_any_validation_has_the_policy_as_its_answer(runs: TinyRuns) -> None:
    flags = ("--model.strategy=FlowGRPO", "--model.strategy.train=scales", "--model.strategy.num_groups=2")
    sizes = ("--model.strategy.group_size=3", "--model.num_steps=3", "--data.val=null")
    run = runs.fit("run", *flags, *sizes, "--trainer.max_steps=2")
    held = checkpoint(run)
    answer = held["calibri_lightning"]["answer"]
    assert torch.equal(answer["theta"], held["state_dict"]["theta"])
    assert runs("test", "tested", *flags, *sizes, f"--ckpt_path={last(run)}") == 0
    assert "trained @" in (runs.latest("tested") / "summary.json").read_text()


@pytest.mark.parametrize(("reference", "is_zero"), [("start", True), ("base", False)])
def test_the_reference_of_a_stacked_run_is_the_one_that_was_chosen(
    tiny_folder: Path, tmp_path: Path, reference: str, is_zero: bool
) -> None:
    """`disable_adapter` alone would leave the scales on; the base has neither LoRA nor scales."""
    first = policy_module(tiny_folder, grpo(ema=None), num_steps=3)
    train(first, tiny_folder, tmp_path / "first", 2)
    folder = first.run_dir
    loss = GRPOOptions(kl="mean", kl_weight=0.1)
    stacked = policy_module(
        tiny_folder, grpo(loss=loss, reference=reference), num_steps=3, lora=None, init_from=str(folder)
    )
    trainer = train(stacked, tiny_folder, tmp_path / "second", 1)
    kl = float(trainer.callback_metrics["train/kl"])
    assert (kl == 0) if is_zero else (kl > 0)
    assert float(trainer.callback_metrics["train/ratio_deviation_max"]) == 0


@pytest.mark.parametrize("guard", ["off", "ratio"])
def test_a_picture_that_went_wrong_leaves_the_gradient_finite(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    roll_out = flow_grpo.roll_out

    def broken(*args: Any, **options: Any) -> Any:
        made = roll_out(*args, **options)
        for part in (made.x[-1:], made.x_next, made.means, made.latents[None]):
            if isinstance(part, Tensor):
                part[:, 0] = torch.nan
        return made

    monkeypatch.setattr(flow_grpo, "roll_out", broken)
    module = policy_module(tiny_folder, grpo(loss=GRPOOptions(guard=guard), ratio_tolerance=1.0), num_steps=3)
    trainer = train(module, tiny_folder, tmp_path, 1)
    assert float(trainer.callback_metrics["train/failed"]) == 2  # the first picture of each unit
    assert float(trainer.callback_metrics["train/skipped_updates"]) == 0
    assert float(trainer.callback_metrics["train/grad_norm"]) > 0


def test_running_out_of_memory_in_the_backward_says_what_to_lower(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(FlowGRPO, "backward", full)
    with pytest.raises(UserError, match=r"backward pass of 3 pictures .*pictures_per_unit.*gradient_checkpointing"):
        train(policy_module(tiny_folder, grpo(), num_steps=3), tiny_folder, tmp_path, 1)


def test_all_weights_in_bfloat16_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    module = policy_module(tiny_folder, grpo(train="full"), lora=None)
    module.backbone.transformer.to(torch.bfloat16)
    with pytest.raises(UserError, match="is not float32: .* rounded away"):
        train(module, tiny_folder, tmp_path, 1)


def test_the_cost_that_is_announced_is_that_of_a_picture(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = grpo(window=AllSteps(), num_steps=4, loss=GRPOOptions(kl="mean", kl_weight=0.1))
    module = policy_module(tiny_folder, strategy, "cfg", num_steps=2)
    trainer = train(module, tiny_folder, tmp_path, 1)
    # Two members, 4 steps, and of 3 of them the forward with its backward and the reference's.
    assert "2 prompts x 3 pictures a step, 26 forwards a picture, 3 pictures a unit" in capsys.readouterr().out
    assert float(trainer.callback_metrics["budget/forwards"]) == 26 * 6


def test_what_the_scales_do_is_told_apart_from_what_the_network_does(tiny_folder: Path) -> None:
    """Were the learned guidance tested on the base, the LoRA's part would be counted as the scales'."""
    module = policy_module(tiny_folder, grpo(), "cfg")
    base = module.layout.start
    moved = np.where([name.endswith("guidance") or name.startswith("member0") for name in module.layout.names], 0.1, 0)
    module.answer = Candidate(base + moved, LIVE)
    [alone] = [way for way in Conditions.of(module).ways if way.role == "weights"]
    assert alone.name.startswith("answer without scales @")
    assert alone.candidate.weights == LIVE
    assert (alone.candidate.theta != base).sum() == 1, "the guidance alone"


def test_all_strategies_log_the_score_of_their_best_candidate(runs: TinyRuns) -> None:
    for strategy in ("PairES", "FlowGRPO"):
        flags = ("--model.strategy.train=scales", "--model.num_steps=3") if strategy == "FlowGRPO" else ()
        run = runs.fit(strategy, f"--model.strategy={strategy}", *flags)
        best = checkpoint(run)["callbacks"][strategy]["selection"]["score"]
        assert column(run, "val/best")[-1] == pytest.approx(best)
