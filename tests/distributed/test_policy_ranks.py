"""Gradient strategies on two processes: groups span ranks, and what is trained agrees with one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import checkpoint, column
from tiny_runs import TinyRuns, forked, rank_environments

from calibri_lightning.strategies import FlowGRPO

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("no_plots")]

GRPO = (
    "--model.strategy=FlowGRPO",
    "--model.strategy.train=both",
    "--model.strategy.num_groups=2",
    "--model.strategy.group_size=3",
    # Three units of 2 pictures: the second group's pictures lie on both ranks, and rank 1 has fewer units.
    "--model.strategy.pictures_per_unit=2",
    "--model.strategy.window=AllSteps",
    "--model.strategy.window.drop_last=false",
    "--model.num_steps=3",
    "--model.lora.rank=2",
    "--trainer.max_steps=2",
)


def trained(run: Path) -> dict[str, torch.Tensor]:
    state = checkpoint(run)
    policy: dict[str, Any] = state["calibri_lightning"]["policy"]
    return {"theta": state["state_dict"]["theta"], **policy["network"]}


def test_a_unit_that_does_not_fit_on_one_rank_ends_all(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit is made and trained on whole, so it is not halved: what to lower is said, and no rank waits for ever."""
    draw = FlowGRPO.draw

    def limited(self: FlowGRPO, *rest: Any) -> Any:
        if os.environ["LOCAL_RANK"] == "1":
            raise torch.OutOfMemoryError("the smaller device")
        return draw(self, *rest)

    monkeypatch.setattr(FlowGRPO, "draw", limited)
    words = runs.arguments("fit", "bad", "--trainer.devices=2", "--trainer.strategy=ddp", "--data.val=null", *GRPO)
    assert forked([words, words], rank_environments(2), tmp_path / "log") == [2, 2]
    log = (tmp_path / "log").read_text()
    assert "2 pictures of a unit do not fit into the memory" in log
    assert "lower strategy.pictures_per_unit" in log
    assert "ended: error: 2 pictures of a unit do not fit" in log
    assert "Traceback" not in log


def test_two_ranks_train_as_one_does(runs: TinyRuns, tmp_path: Path) -> None:
    one = runs.fit("one", *GRPO)
    words = runs.arguments("fit", "two", "--trainer.devices=2", "--trainer.strategy=ddp", *GRPO)
    codes = forked([words, words], rank_environments(2), tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()
    two = runs.latest("two")
    # What is made before the first update does not depend on who makes it; sums of gradients have another order.
    assert column(one, "train/reward_mean")[0] == column(two, "train/reward_mean")[0]
    assert column(one, "val/start") == column(two, "val/start")
    for name in ("train/grad_norm", "train/reward_mean", "val/policy", "train/diversity"):
        assert column(one, name) == pytest.approx(column(two, name), rel=1e-4), name
    for name in ("budget/images", "budget/forwards"):
        assert column(one, name) == column(two, name), name
    ours, theirs = trained(one), trained(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Adam divides by the size of the gradient: where that is rounding noise, steps of lr may differ in sign.
        assert (tensor - theirs[name]).abs().max() < 2 * 2 * 3e-3, name
        assert ((tensor - theirs[name]).abs() < 1e-5).double().mean() > 0.95, name
