"""What a shared model needs is checked before ranks wait for each other, and planned before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import flux1, fresh
from tiny_runs import Capture, TinyRuns, refused
from torch import nn

from calibri_lightning import FLUX1, Sharded, UserError
from calibri_lightning.__main__ import main
from calibri_lightning.backbones import loading
from calibri_lightning.backbones.loading import load_pipeline
from calibri_lightning.planning.shards import plan_shards, read_ranks
from calibri_lightning.preflight import check_strategy
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.sharding.cut import blocks_of, check_can_be_cut
from calibri_lightning.sharding.strategy import shards_of

OURS = "calibri_lightning.Sharded"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("own call", {"is_native": False}, "native backbone"),
        ("full", {"trains": "full"}, "train: full"),
        ("compiled", {"compiles": True}, "model.compile"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(kind: str, options: dict[str, Any], words: str) -> None:
    fitting: dict[str, Any] = {"is_native": True, "trains": "both", "compiles": False}
    check_can_be_cut(nn.Linear(1, 1), **fitting)
    with pytest.raises(UserError, match=words):
        check_can_be_cut(nn.Linear(1, 1), **(fitting | options))


def test_a_quantised_model_cannot_be_cut() -> None:
    packed: Any = nn.Linear(1, 1)
    packed.hf_quantizer = object()
    with pytest.raises(UserError, match="quantised"):
        check_can_be_cut(packed, True, "scales", False)


def test_ranks_that_do_not_divide_are_refused(runs: TinyRuns, capsys: Capture) -> None:
    assert (shards_of(8, None), shards_of(8, 2), shards_of(6, 6)) == (8, 2, 6)
    with pytest.raises(UserError, match="divisor of 8"):
        shards_of(8, 3)
    with pytest.raises(UserError, match="at least 1"):
        Sharded(0)
    own = f"--trainer.strategy.class_path={OURS}"
    assert "ranks_per_replica is 2" in refused(runs, capsys, own, "--trainer.strategy.ranks_per_replica=2")


def test_other_strategies_that_cut_are_refused(runs: TinyRuns, capsys: Capture) -> None:
    class DeepSpeedStrategy:
        """Stands for Lightning's, whose package is not installed."""

    check_strategy(Sharded())
    with pytest.raises(UserError, match="strategy=sharded"):
        check_strategy(DeepSpeedStrategy())
    stock = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
    message = refused(runs, capsys, stock, "--trainer.strategy.data_parallel_size=1")
    assert "ModelParallelStrategy" in message
    assert "--trainer.strategy=sharded" in message


def test_a_shared_model_on_one_rank_is_a_whole_one(runs: TinyRuns) -> None:
    flags = ("--trainer.max_steps=1", "--data.val=null")
    one = runs.fit("one", *flags)
    shared = runs.fit("shared", "--trainer.strategy=sharded", *flags)
    assert (one / "calibration.json").read_bytes() == (shared / "calibration.json").read_bytes()


def test_blocks_are_all_of_the_classes_that_have_sites() -> None:
    model = fresh(flux1).transformer
    names = [f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(1)]
    assert list(blocks_of(model)) == names


@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        ({"strategy": "ddp", "devices": "auto"}, 1),
        ({"strategy": "sharded", "devices": 4}, 4),
        ({"strategy": "sharded", "devices": "4", "num_nodes": 2}, 8),
        ({"strategy": "sharded", "devices": "0,1"}, 2),
        ({"strategy": {"class_path": OURS, "init_args": {"ranks_per_replica": 2}}, "devices": [0, 1, 2, 3]}, 2),
        ({"strategy": {"class_path": OURS, "init_args": {"ranks_per_replica": 2}}, "devices": "auto"}, 2),
        ({"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"}, "devices": 4}, 1),
    ],
)
def test_ranks_are_read_from_the_trainer(trainer: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert read_ranks({"num_nodes": 1} | trainer) == ranks


def test_ranks_that_nobody_knows_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = {"num_nodes": 1, "strategy": "sharded", "devices": "auto"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="set ranks_per_replica"):
        read_ranks(trainer)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert read_ranks(trainer) == 8


def test_a_plan_is_of_one_rank(runs: TinyRuns, capsys: Capture) -> None:
    words = ["plan", "--config", str(runs.config), "--trainer.devices=2", "--model.strategy=FlowGRPO"]
    plans = []
    for strategy in ("ddp", "sharded"):
        assert main([*words, f"--trainer.strategy={strategy}", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    whole, shared = plans
    transformer = build_pipeline(TINY).transformer
    counted = plan_shards(transformer, 2)
    assert whole["shards"] is None
    assert shared["shards"] == asdict(counted)
    spared = sum(p.nbytes for p in transformer.parameters()) - counted.share_bytes
    for phase, peak in shared["phases"].items():
        gathered = {"sampling": counted.gathered_bytes, "training": counted.backward_bytes}
        assert peak == whole["phases"][phase] - spared + gathered.get(phase, 0), phase
    assert whole["training"] == shared["training"], "a LoRA is whole on each rank"
    assert main([*words, "--trainer.strategy=sharded"]) == 0
    assert "on each of 2 ranks" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="reads Linux's table of mappings")
def test_weights_are_mapped_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a machine then share one copy in its page cache, however many load the model."""
    # Where there is no GPU to move them to, weights are copied, to lie as a CPU's kernels expect them.
    monkeypatch.setattr(loading, "align", lambda _: None)
    tiny = fresh(flux1)
    tiny.to(torch.bfloat16).save_pretrained(tmp_path)
    transformer = load_pipeline(FLUX1.pipelines, str(tmp_path), "bfloat16", None).transformer
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(end, 16) for end in row[0].split("-")) for row in mapped if row[-1].startswith(str(tmp_path))]
    addresses = [parameter.data_ptr() for parameter in transformer.parameters()]
    assert all(any(start <= address < end for start, end in spans) for address in addresses)
