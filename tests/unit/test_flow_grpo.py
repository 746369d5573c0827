"""FlowGRPO in a fit: ratios of exactly 1, costs, what goes wrong and is borne, resume, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from run_files import checkpoint, last
from tiny_policies import CountedRows, killed_and_resumed, policy_module, same, state_of, train
from tiny_runs import Capture, TinyRuns, refused
from torch import Tensor

from calibri_lightning import CalibriModule, FlowGRPO
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE, Kernel
from calibri_lightning.sampling.windows import RandomWindow
from calibri_lightning.strategies.grpo_loss import GRPOOptions

pytestmark = pytest.mark.usefixtures("no_plots")


def grpo(**options: Any) -> FlowGRPO:
    return FlowGRPO(**({"train": "scales", "num_groups": 2, "group_size": 3, "pictures_per_unit": 3} | options))


class Watch(Callback):
    """What was logged, and theta, after each step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.theta: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.theta.append(module.theta.detach().clone())


class NoisyGradients:
    """A forward with gradients that differs a little from one without, as some kernels do."""

    def __init__(self, module: CalibriModule) -> None:
        module.engine.backbone.transformer.register_forward_hook(self._disturb)

    @staticmethod
    def _disturb(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (output[0] * (1 + 1e-3), *output[1:]) if torch.is_grad_enabled() else output


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS()], ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize(("trains", "members"), [("scales", "cfg"), ("both", "single")])
def test_ratios_are_exactly_one_before_the_first_update(
    tiny_folder: Path, tmp_path: Path, kernel: Kernel, trains: str, members: str
) -> None:
    watch = Watch()
    module = policy_module(tiny_folder, grpo(train=trains, kernel=kernel), members, num_steps=3)
    train(module, tiny_folder, tmp_path, 1, watch)
    [logged] = watch.logged
    assert (logged["train/ratio_mean"], logged["train/ratio_max"]) == (1, 1)
    assert logged["train/ratio_deviation_max"] == 0
    assert logged["train/grad_norm"] > 0
    assert not torch.equal(watch.theta[0], torch.from_numpy(module.layout.start.copy()))


def test_a_replay_that_differs_from_the_rollout_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    module = policy_module(tiny_folder, grpo(), num_steps=3)
    NoisyGradients(module)
    with pytest.raises(UserError, match="differs from 1 by .*ratio_tolerance"):
        train(module, tiny_folder, tmp_path, 1)
    tolerant = policy_module(tiny_folder, grpo(ratio_tolerance=0.5), num_steps=3)
    NoisyGradients(tolerant)
    train(tolerant, tiny_folder, tmp_path, 1)


FAST = {"window": RandomWindow(3, 0, 5)}
CLASSIC = {"loss": GRPOOptions(kl="mean", kl_weight=0.01)}


@pytest.mark.parametrize(
    ("options", "members", "each"),
    [(FAST, "single", 10 + 3 * 2), (CLASSIC, "cfg", 10 * 2 + 9 * 2 * 2 + 9 * 2)],
    ids=["fast", "classic"],
)
def test_costs_are_those_on_paper_and_those_of_the_network(
    tiny_folder: Path, tmp_path: Path, options: dict[str, Any], members: str, each: int
) -> None:
    module = policy_module(tiny_folder, grpo(num_steps=10, **options), members)
    counted = CountedRows(module.engine.backbone.transformer)
    train(module, tiny_folder, tmp_path, 1)
    assert module.budget.forwards == 6 * each == counted.count
    assert module.budget.images == 6


def test_a_picture_without_a_reward_is_masked(tiny_folder: Path, tmp_path: Path) -> None:
    """One of each unit of three: what is left of a group still has an order."""
    watch = Watch()
    rewards = {"tiny_rewards:nan_on_the_first": 1.0}
    module = policy_module(tiny_folder, grpo(), num_steps=3, rewards=rewards)
    train(module, tiny_folder, tmp_path, 2, watch)
    for logged in watch.logged:
        assert logged["train/failed"] == 2
        assert math.isfinite(logged["train/reward_mean"])
        assert 0 < logged["train/grad_norm"] < math.inf
    assert watch.theta[1].isfinite().all()
    assert not torch.equal(*watch.theta)


GRPO = (
    "--model.strategy=FlowGRPO",
    "--model.strategy.train=scales",
    "--model.strategy.num_groups=2",
    "--model.strategy.group_size=3",
    "--model.strategy.pictures_per_unit=3",
    "--model.strategy.ema.interval=1",
    "--model.calibration.members=single",
    "--model.calibration.weight_mode=fixed",
)


def test_a_constant_reward_ends_the_run_with_a_checkpoint_to_go_on_from(runs: TinyRuns, capsys: Capture) -> None:
    flags = (*GRPO, '--model.rewards={"tiny_rewards:constant": 1.0}', "--data.val=null", "--trainer.max_steps=9")
    assert runs("fit", "a", *flags, "--model.strategy.max_wasted=3") == 2
    error = capsys.readouterr().err
    assert "3 training steps in a row taught nothing" in error
    assert "no group of pictures has rewards that are finite and differ" in error
    path = runs.latest("a")
    assert checkpoint(path)["global_step"] == 2
    assert "start a new run with --model.init_from RUN" in error
    assert f"To go on from the last finished step, add --ckpt_path {last(path)}" in error
    assert runs("fit", "a", *flags, f"--ckpt_path={last(path)}", "--model.strategy.max_wasted=2") == 2
    assert "2 training steps in a row" in capsys.readouterr().err
    assert checkpoint(runs.latest("a"))["global_step"] == 3, "the two before the checkpoint are forgotten"


class SpoilGradient(Callback):
    """Makes the gradient of one step NaN."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1:
            self.hook = module.theta.register_hook(lambda gradient: gradient * math.nan)
        elif trainer.global_step == 2:
            self.hook.remove()


def test_a_gradient_that_is_nan_is_skipped_and_counted(tiny_folder: Path, tmp_path: Path) -> None:
    watch, strategy = Watch(), grpo()
    module = policy_module(tiny_folder, strategy, num_steps=3)
    train(module, tiny_folder, tmp_path, 3, watch, SpoilGradient())
    assert torch.equal(watch.theta[0], watch.theta[1])
    assert watch.theta[2].isfinite().all()
    assert not torch.equal(watch.theta[1], watch.theta[2])
    assert [logged["train/skipped_updates"] for logged in watch.logged] == [0, 1, 1]
    assert (strategy.skipped, strategy.wasted) == (1, 0)


def test_gradients_that_are_nan_for_too_long_end_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    module = policy_module(tiny_folder, grpo(max_wasted=2), num_steps=3)
    module.theta.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="2 training steps in a row taught nothing.*gradient is not finite"):
        train(module, tiny_folder, tmp_path, 5)


@pytest.mark.parametrize("trains", ["scales", "lora"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains: str
) -> None:
    """Weights, optimiser, average, best copy and window, bit for bit."""
    window = '--model.strategy.window={"class_path": "RandomWindow", "init_args": {"size": 1, "first": 0, "last": 3}}'
    lora = ("--model.lora.rank=2",) if trains == "lora" else ()
    flags = (*GRPO, f"--model.strategy.train={trains}", *lora, "--model.strategy.num_steps=4", window)
    resumed, whole = killed_and_resumed(runs, tmp_path, monkeypatch, *flags)
    found, expected = (state_of(checkpoint(path), "FlowGRPO") for path in (resumed, whole))
    for name, value in expected.items():
        assert same(found[name], value), name
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_gradient_checkpointing_changes_no_step(tiny_folder: Path, tmp_path: Path) -> None:
    found, calls = [], [0, 0]
    for is_on in (False, True):
        module = policy_module(tiny_folder, grpo(train="both", gradient_checkpointing=is_on), num_steps=3)

        def count(*_: Any, place: int = int(is_on)) -> None:
            calls[place] += 1

        module.engine.backbone.transformer.transformer_blocks[0].register_forward_pre_hook(count)
        train(module, tiny_folder, tmp_path, 2)
        found.append({name: p.detach() for name, p in module.policy.parameters().items()})
    assert calls[1] > calls[0], "activations are computed again"
    assert same(*found)


def test_two_updates_are_two_optimiser_steps_of_one_training_step(tiny_folder: Path, tmp_path: Path) -> None:
    watch, strategy = Watch(), grpo(updates=2)
    module = policy_module(tiny_folder, strategy, num_steps=3)
    trainer = train(module, tiny_folder, tmp_path, 1, watch)
    assert trainer.global_step == 1
    assert strategy._gradients is not None
    [state] = strategy._gradients.optimizer.state.values()
    assert state["step"] == 2
    assert watch.logged[0]["train/ratio_deviation_max"] > 0, "the second is off-policy"
    assert module.budget.forwards == 6 * (3 + 2 * 2), "no picture is trained on twice"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 1}, ["group_size is 1", "compare the pictures"]),
        ({"updates": 0}, ["updates is 0"]),
        ({"num_steps": 0}, ["num_steps is 0", "at least 1"]),
        ({"kernel": CPS(), "loss": GRPOOptions(guard="ratio")}, ["loss.guard is ratio", "CPS"]),
        ({"loss": GRPOOptions(kl="mean")}, ["loss.kl is mean", "kl_weight 0"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        grpo(**options)
    for word in words:
        assert word in str(caught.value)


def test_a_window_outside_of_the_steps_is_refused_before_the_first_picture(runs: TinyRuns, capsys: Capture) -> None:
    window = '--model.strategy.window={"class_path": "RandomWindow", "init_args": {"size": 2, "first": 0, "last": 9}}'
    message = refused(runs, capsys, *GRPO, window, worked=True)
    for word in ("RandomWindow lies in the steps", "num_steps 2"):
        assert word in message
