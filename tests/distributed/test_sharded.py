"""A model that ranks hold together gives what a whole one gives, and no rank waits for ever for another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import tiny_rewards
import torch
from memory_tools import measured_peak
from metric_tools import on_ranks
from quiet_trainer import quiet_trainer
from run_files import checkpoint, column, last, pictures
from test_policy_ranks import GRPO
from tiny_policies import policy_module
from tiny_runs import CMA, TinyRuns, forked, rank_environments
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from calibri_lightning import FLUX1, SD3, DiffusionNFT, FlowGRPO, PromptData, QwenImage, Sharded
from calibri_lightning.adapters.lora import LoraOptions, add_lora
from calibri_lightning.backbones.native import Native
from calibri_lightning.planning.shards import plan_shards
from calibri_lightning.sampling.windows import AllSteps
from calibri_lightning.sharding.cut import cut_up
from calibri_lightning.strategies import Strategy

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("no_plots")]

SHARDED = "--trainer.strategy=sharded"
STEPS = "--trainer.max_steps=2"
COLUMNS = ("val/start", "val/mean", "train/reward_mean", "budget/images", "budget/forwards")


def replicas_of(count: int) -> tuple[str, str]:
    return "--trainer.strategy.class_path=calibri_lightning.Sharded", f"--trainer.strategy.ranks_per_replica={count}"


def ranks(runs: TinyRuns, log: Path, number: int, command: str, name: str, *flags: str) -> list[int | None]:
    words = runs.arguments(command, name, f"--trainer.devices={number}", *flags)
    return forked([words] * number, rank_environments(number), log)


@pytest.fixture
def fit(runs: TinyRuns, tmp_path: Path) -> Callable[..., Path]:
    """Runs a fit on some ranks that has to succeed; its folder."""

    def run(number: int, name: str, *flags: str, command: str = "fit") -> Path:
        codes = ranks(runs, tmp_path / "log", number, command, name, *flags)
        assert codes == [0] * number, (tmp_path / "log").read_text()
        return runs.latest(name)

    return run


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search by one process that has the whole model."""
    return TinyRuns.make(tiny_folder, tmp_path_factory.mktemp("alone")).fit("one", *CMA, STEPS)


@pytest.mark.parametrize(
    ("number", "strategy"),
    [(2, (SHARDED,)), (2, replicas_of(1)), (4, replicas_of(2))],
    ids=["two share", "two whole ones", "two pairs"],
)
def test_a_search_delivers_the_bytes_of_one_process(
    number: int, strategy: tuple[str, ...], fit: Callable[..., Path], alone: Path
) -> None:
    """Generations have three units, and validations two: some rank always has less to do than another."""
    run = fit(number, "shared", *strategy, *CMA, STEPS)
    assert (run / "calibration.json").read_bytes() == (alone / "calibration.json").read_bytes()
    for name in COLUMNS:
        assert column(run, name) == column(alone, name), f"{name}: what is run in vain must not count"


def test_a_fixed_lora_on_a_model_of_half_precision_delivers_the_bytes_of_one_process(
    fit: Callable[..., Path], runs: TinyRuns
) -> None:
    policy = ("--model.strategy=FlowGRPO", "--model.strategy.num_groups=1", "--model.strategy.group_size=2")
    lora = runs.fit("lora", *policy, "--model.lora.rank=2", "--trainer.max_steps=1", "--data.val=null")
    flags = (*CMA, f"--model.init_from={lora}", "--model.backbone.dtype=bfloat16", "--trainer.max_steps=1")
    one, shared = runs.fit("one", *flags), fit(2, "shared", SHARDED, *flags)
    assert (one / "calibration.json").read_bytes() == (shared / "calibration.json").read_bytes()
    weights = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (lora, shared)]
    assert weights[0] == weights[1]


def test_checkpoints_are_one_small_file_that_any_strategy_goes_on_from(
    fit: Callable[..., Path], runs: TinyRuns, alone: Path
) -> None:
    cut = fit(2, "cut", SHARDED, *CMA, "--trainer.max_steps=1")
    assert last(cut).is_file()
    assert list(checkpoint(cut)["state_dict"]) == ["theta"]
    whole = runs.fit("cut", *CMA, STEPS, f"--ckpt_path={last(cut)}")
    assert (whole / "calibration.json").read_bytes() == (alone / "calibration.json").read_bytes()

    start = runs.fit("start", *CMA, "--trainer.max_steps=1")
    went_on = fit(2, "start", SHARDED, *CMA, STEPS, f"--ckpt_path={last(start)}")
    assert (went_on / "calibration.json").read_bytes() == (alone / "calibration.json").read_bytes()
    assert last(start).stat().st_size == pytest.approx(last(cut).stat().st_size, rel=0.02)


def test_table_and_pictures_are_those_of_one_process(fit: Callable[..., Path], runs: TinyRuns, alone: Path) -> None:
    flags = (f"--model.init_from={alone}", "--data.predict_prompts=[a red circle, a blue square, a green circle]")
    assert runs("test", "one", *flags) == 0
    shared = fit(2, "two", SHARDED, *flags, command="test")
    documents = [json.loads((path / "summary.json").read_text()) for path in (runs.latest("one"), shared)]
    assert documents[0]["conditions"] == documents[1]["conditions"]
    small = "--model.rows_per_forward=2"  # three units of one picture
    assert runs("predict", "drawn", *flags, small) == 0
    theirs = pictures(fit(2, "drawn2", SHARDED, small, *flags, command="predict"))
    ours = pictures(runs.latest("drawn"))
    assert len(ours) == 3
    assert {name: picture.tobytes() for name, picture in ours.items()} == {
        name: picture.tobytes() for name, picture in theirs.items()
    }


GRADIENTS: dict[str, Callable[[], Strategy]] = {
    # Units of two pictures: three of them, so that rank 1 has one less; or one, so that it has none at all.
    "three units": lambda: FlowGRPO("both", 2, 3, window=AllSteps(drop_last=False), pictures_per_unit=2),
    "one unit": lambda: FlowGRPO("both", 1, 2, pictures_per_unit=2, gradient_checkpointing=True),
    "two updates": lambda: FlowGRPO("both", 2, 3, pictures_per_unit=2, updates=2),
    "nft": lambda: DiffusionNFT("both", 2, 3, pictures_per_unit=2),
}


def trained(folder: Path, run_dir: Path, how: Strategy, **trainer: Any) -> dict[str, Any]:
    """What two steps of training make of the tiny model, and what they cost."""
    module = policy_module(folder, how, num_steps=3)
    train = quiet_trainer(run_dir, max_steps=2, **trainer)
    train.fit(module, PromptData(train=str(folder / "train.txt")))
    cut = [isinstance(parameter, DTensor) for parameter in module.backbone.transformer.parameters()]
    return {
        "tensors": {name: tensor.detach().numpy() for name, tensor in module.policy.parameters().items()},
        "budget": (module.budget.images, module.budget.forwards),
        "cut": any(cut),
    }


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_one_process(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    def on_rank(rank: int) -> dict[str, Any]:
        os.environ.update(environments[rank])
        return trained(tiny_folder, tmp_path / "two", GRADIENTS[name](), devices=2, strategy=Sharded())

    environments = rank_environments(2)
    first, second = on_ranks(on_rank)
    [one] = on_ranks(lambda _: trained(tiny_folder, tmp_path / "one", GRADIENTS[name]()), 1)
    assert first["cut"]
    assert not one["cut"]
    assert first["budget"] == second["budget"] == one["budget"], "what is run in vain must not count"
    for key, tensor in one["tensors"].items():
        ours, theirs, alone = (
            torch.from_numpy(part) for part in (first["tensors"][key], second["tensors"][key], tensor)
        )
        assert torch.equal(ours, theirs), f"{key} differs between ranks"
        # Adam divides by the size of the gradient: where that is rounding noise, steps of lr may differ in sign.
        assert (ours - alone).abs().max() < 2 * 2 * 3e-3, key
        assert ((ours - alone).abs() < 1e-5).double().mean() > 0.95, key


@pytest.mark.parametrize("strategy", [CMA, ("--model.strategy=FlowGRPO", "--model.strategy.train=scales")])
def test_a_reward_that_fails_on_one_rank_ends_all(strategy: tuple[str, ...], runs: TinyRuns, tmp_path: Path) -> None:
    reward = '--model.rewards={"tiny_rewards:raises_on_rank_one": 1.0}'
    codes = ranks(runs, tmp_path / "log", 2, "fit", "bad", SHARDED, *strategy, reward, "--data.val=null")
    log = (tmp_path / "log").read_text()
    assert codes == [2, 2], log
    assert "tiny_rewards:raises_on_rank_one" in log
    assert "Rank 1 ended: error: " in log
    assert "Traceback" not in log


def test_memory_that_runs_out_on_one_rank_ends_all(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves within a unit, while the others wait for its part of the weights."""
    velocity = SD3.velocity

    def narrow(self: SD3, x: Tensor, *rest: Any) -> Tensor:
        # Not in the probe of a model that is whole still.
        if os.environ.get("LOCAL_RANK") == "1" and torch.distributed.is_initialized():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(self, x, *rest)

    monkeypatch.setattr(SD3, "velocity", narrow)
    codes = ranks(runs, tmp_path / "log", 2, "fit", "bad", SHARDED, *CMA)
    log = (tmp_path / "log").read_text()
    assert codes == [2, 2], log
    assert "Lower model.rows_per_forward" in log
    assert "ended: error: " in log
    assert "Traceback" not in log


SHARED_MODELS: dict[str, Callable[[], Native]] = {
    "shapes": lambda: SD3("shapes"),
    "flux1": lambda: FLUX1.of(tiny_pipelines.fresh(tiny_pipelines.flux1), 32, 48),
    "qwen": lambda: QwenImage.of(tiny_pipelines.fresh(tiny_pipelines.qwen_image), 32, 48),
}


def train_once(backbone: Native) -> None:
    sigma = backbone.schedule(2)[1].expand(1)
    backbone.velocity(backbone.noise([0]), sigma, backbone.example(2)).square().sum().backward()


def peaks(works: Sequence[Callable[[], object]]) -> list[int]:
    """Of each, when what it makes once and for all is there."""
    found = []
    for work in works:
        work()
        found.append(measured_peak(work))
    return found


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("family", SHARED_MODELS)
def test_a_plan_knows_what_a_rank_holds_and_gathers(family: str, number: int) -> None:
    """Bytes of the pieces, and peaks of a forward and of a backward as the profiler sees them."""

    def on_rank(rank: int) -> tuple[int, ...]:
        backbone = SHARED_MODELS[family]()
        add_lora(backbone.transformer, LoraOptions(2), 0)
        works = (lambda: backbone.probe_forward(1), lambda: train_once(backbone))
        alone = peaks(works)
        mesh = init_device_mesh("cpu", (number,))
        cutting = measured_peak(lambda: cut_up(backbone.transformer, mesh))
        pieces = [p.to_local() for p in backbone.transformer.parameters() if isinstance(p, DTensor)]
        held = sum(piece.untyped_storage().nbytes() for piece in pieces)
        return held, cutting, *alone, *peaks(works)

    transformer = SHARED_MODELS[family]().transformer
    whole = sum(parameter.nbytes for parameter in transformer.parameters())
    plan = plan_shards(transformer, number)
    assert whole / number <= plan.share_bytes < 1.05 * whole / number
    for held, cutting, forward_alone, backward_alone, forward, backward in on_ranks(on_rank, number):
        assert held == plan.share_bytes
        assert cutting < held + 1024, "no second copy of the model while it is cut"
        assert plan.gathered_bytes <= forward <= plan.gathered_bytes + forward_alone
        assert 0.4 * plan.backward_bytes <= backward - backward_alone <= plan.backward_bytes


def test_what_cannot_be_cut_is_refused(runs: TinyRuns, tmp_path: Path) -> None:
    full = ("--model.strategy=FlowGRPO", "--model.strategy.train=full")
    assert ranks(runs, tmp_path / "log", 2, "fit", "bad", SHARDED, *full) == [2, 2]
    log = (tmp_path / "log").read_text()
    assert "train: full" in log
    assert "Traceback" not in log


def test_a_signal_to_one_rank_stops_all_that_hold_the_model(runs: TinyRuns, tmp_path: Path) -> None:
    """The rank that is asked to stop goes on with its forwards, for which the other one waits."""
    for name, flags in (("search", CMA), ("gradients", GRPO)):
        calls = [{tiny_rewards.CALLS: str(tmp_path / f"{name}{rank}")} for rank in range(2)]
        calls[1][tiny_rewards.SIGNAL_AT] = "SIGTERM 2"
        words = runs.arguments("fit", name, SHARDED, "--trainer.devices=2", *flags, "--trainer.max_steps=4")
        environments = [rank | own for rank, own in zip(rank_environments(2), calls, strict=True)]
        codes = forked([words, words], environments, tmp_path / f"{name}.log")
        assert codes == [143, 143], (tmp_path / f"{name}.log").read_text()
