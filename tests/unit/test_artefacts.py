"""What runs on trained weights leave: which weights the scales belong to, and what the table calls them."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import disturb
from calibration_models import tiny_sd3
from quiet_trainer import quiet_trainer
from tiny_policies import policy_module
from torch import nn

from calibri_lightning import load_calibration, read_calibration, unload_calibration
from calibri_lightning.adapters import LoraOptions, add_lora, load_adapter, load_transformer, write_adapter
from calibri_lightning.calibration import WeightsRecord, base_digests
from calibri_lightning.calibration.document import from_json, to_json
from calibri_lightning.conditions import Conditions
from calibri_lightning.errors import UserError
from calibri_lightning.module import CalibriModule
from calibri_lightning.report import RunReport
from calibri_lightning.resume import restore_run, save_run
from calibri_lightning.shapes.pipeline import TINY, build_pipeline
from calibri_lightning.strategies import PairES
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.strategies.flow_grpo import FlowGRPO


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return not set(base_digests(one)).isdisjoint(base_digests(other))


@torch.no_grad()
def shift(model: nn.Module, by: float = 0.01) -> None:
    for parameter in model.parameters():
        parameter += by


def finish(module: CalibriModule, folder: Path) -> Path:
    """Writes the answer of a run as a fit does."""
    module.trainer = quiet_trainer(folder, max_steps=1)
    module.run_dir = folder
    RunReport(module).write_answer()
    return folder


def full_run(tiny_folder: Path, folder: Path) -> Path:
    """What a run that trained all weights leaves."""
    module = policy_module(tiny_folder, FlowGRPO(train="full"), lora=None)
    shift(module.backbone.transformer)
    return finish(module, folder)


def lora_folder(folder: Path) -> Path:
    model = build_pipeline(TINY).transformer
    add_lora(model, LoraOptions(rank=2), seed=0)
    disturb(model)
    write_adapter(folder, model)
    return folder


def test_weights_are_the_same_in_any_precision_with_a_lora_or_trained_and_different_once_moved() -> None:
    model = tiny_sd3(num_layers=1)
    for precision in (torch.bfloat16, torch.float16):
        assert same_weights(model, deepcopy(model).to(precision))
        moved = deepcopy(model)
        shift(moved, 1e-3)
        assert not same_weights(model, moved.to(precision))
    assert same_weights(model, deepcopy(model).requires_grad_(False))
    before, other = base_digests(model), dict(deepcopy(model).named_parameters())
    with_lora = deepcopy(model)
    add_lora(with_lora, LoraOptions(rank=1), seed=0)
    disturb(with_lora)
    assert base_digests(with_lora) == before
    shift(model)
    assert base_digests(model) != before
    assert base_digests(model, other) == before
    with pytest.raises(UserError, match="offloaded.*before enable_sequential_cpu_offload"):
        base_digests(deepcopy(model).to("meta"))


def test_files_with_and_without_weights_are_read_and_written(tiny_folder: Path, tmp_path: Path) -> None:
    file = read_calibration(finish(policy_module(tiny_folder, PairES(), lora=None), tmp_path) / "calibration.json")
    assert file.weights is None
    assert "weights" not in json.loads(to_json(file))
    recorded = replace(file, weights=WeightsRecord(("a", "b"), "transformer", "owner/name"))
    assert from_json(to_json(recorded)) == recorded
    wrong: tuple[Any, ...] = (None, [], {}, {"digests": "a"}, {"digests": [1]}, {"digests": ["a"], "merged": ""})
    for weights in wrong:
        with pytest.raises(UserError, match="weights"):
            from_json(json.dumps(json.loads(to_json(recorded)) | {"weights": weights}))


def test_scales_of_a_full_run_need_its_weights_first(tiny_folder: Path, tmp_path: Path) -> None:
    run = full_run(tiny_folder, tmp_path / "full")
    search = finish(policy_module(tiny_folder, PairES(), lora=None, init_from=str(run)), tmp_path / "search")
    assert not (search / "transformer").exists()
    weights = {folder: read_calibration(folder / "calibration.json").weights for folder in (run, search)}
    assert weights[run].digests == weights[search].digests
    assert (weights[run].transformer, weights[search].transformer) == ("transformer", str(run / "transformer"))
    for path in (run, run / "calibration.json", search):
        pipe = build_pipeline(TINY)
        with pytest.raises(UserError, match=rf"load_transformer\(pipe.transformer, '{run / 'transformer'}'\)"):
            load_calibration(pipe, path)
        unload_calibration(load_calibration(pipe, path, check_adapter=False))
        load_transformer(pipe.transformer, run / "transformer")
        unload_calibration(load_calibration(pipe, path))
        load_calibration(pipe, path)
        shift(pipe.transformer)
        with pytest.raises(UserError, match="has other weights"):
            load_calibration(unload_calibration(pipe), path)


def test_the_record_is_of_the_answer_and_not_of_the_live_weights(tiny_folder: Path, tmp_path: Path) -> None:
    module = policy_module(tiny_folder, FlowGRPO(train="full"), lora=None)
    module.policy.keep("best")
    module.answer = Candidate(module.start_theta, "best")
    shift(module.backbone.transformer)
    path = finish(module, tmp_path)
    pipe = build_pipeline(TINY, seed=1)
    load_transformer(pipe.transformer, path / "transformer")
    load_calibration(pipe, path)
    assert not same_weights(pipe.transformer, module.backbone.transformer)


def test_a_merged_adapter_under_a_trained_one_is_missed(tiny_folder: Path, tmp_path: Path) -> None:
    merged = lora_folder(tmp_path / "merged")
    module = policy_module(tiny_folder, FlowGRPO(train="lora"), init_from=str(merged), merge_adapter=True)
    disturb(module.backbone.transformer, seed=5)
    run, plain = finish(module, tmp_path / "run"), build_pipeline(TINY)
    model = tiny_folder / "model"
    assert read_calibration(run / "calibration.json").weights.merged == str(merged)
    with pytest.raises(UserError, match=f"load_adapter.*{merged}', merge=True"):
        load_calibration(plain, run)
    assert not hasattr(plain.transformer, "peft_config"), "refused, so nothing was left"
    pipe = type(plain).from_pretrained(model)
    load_adapter(pipe.transformer, merged, merge=True)
    load_calibration(pipe, run)
    # Without training a LoRA, the record of weights speaks for the merged one.
    search = policy_module(tiny_folder, PairES(), lora=None, init_from=str(merged), merge_adapter=True)
    unload_calibration(pipe)
    load_calibration(pipe, finish(search, tmp_path / "search"))


def test_the_table_calls_the_base_by_what_is_in_it(tiny_folder: Path, tmp_path: Path) -> None:
    run, lora = full_run(tiny_folder, tmp_path / "full"), lora_folder(tmp_path / "lora")

    def names(strategy: Any, **options: Any) -> list[str]:
        module = policy_module(tiny_folder, strategy, full_num_steps=3, **options)
        module.answer = Candidate(module.start_theta + 0.1, module.answer.weights)
        return [way.name for way in Conditions.of(module).ways]

    start = ["start (weights of init_from) @ 2 steps", "start (weights of init_from) @ 3 steps"]
    assert names(PairES(), lora=None)[:-1] == ["base @ 2 steps", "base @ 3 steps"]
    assert names(PairES(), lora=None, init_from=str(run))[:-1] == start
    assert names(FlowGRPO(train="full"), lora=None, init_from=str(run))[:-1] == start
    assert names(PairES(), lora=None, init_from=str(lora), merge_adapter=True)[:-1] == start
    assert names(PairES(), lora=None, init_from=str(lora))[:-1] == [
        "base @ 2 steps",
        "base @ 3 steps",
        "start @ 2 steps",
    ]
    both = names(PairES(), lora=None, init_from=[str(run), str(lora)])
    assert both[:-1] == [*start, "start @ 2 steps"]


def test_a_checkpoint_of_a_run_that_trained_something_else_says_so(tiny_folder: Path) -> None:
    full = policy_module(tiny_folder, FlowGRPO(train="full"), lora=None)
    checkpoint: dict[str, Any] = {"state_dict": full.state_dict(), "global_step": 0}
    save_run(full, checkpoint)
    with pytest.raises(UserError, match="trains: full, and this one has trains: lora"):
        restore_run(policy_module(tiny_folder, FlowGRPO(train="lora")), checkpoint)
