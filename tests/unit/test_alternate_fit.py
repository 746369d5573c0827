"""Gradients and searches in turn, in whole fits on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_rewards
import torch
import yaml
from run_files import checkpoint, column, last
from tiny_runs import CMA, TinyRuns, refused
from torch import Tensor

from calibri_lightning import read_calibration
from calibri_lightning.cli import parse_fit
from calibri_lightning.strategies import Alternate
from calibri_lightning.strategies.ledger import digest

pytestmark = pytest.mark.usefixtures("no_plots")

SMALL = {"num_groups": 2, "group_size": 2, "pictures_per_unit": 2}
AGAIN = {"class_path": "CMAES", "init_args": {"popsize": 4, "bucket_size": 4}}


def grpo(train: str, **settings: Any) -> dict[str, Any]:
    rates = {"lr": 0.05, "scales_lr": 0.05}
    return {"class_path": "FlowGRPO", "init_args": {"train": train, "optimizer": rates, **SMALL, **settings}}


def turns(*phases: tuple[dict[str, Any], int]) -> dict[str, Any]:
    listed = [{"strategy": strategy, "steps": steps} for strategy, steps in phases]
    return {"class_path": "Alternate", "init_args": {"phases": listed}}


@pytest.fixture
def with_strategy(tiny_folder: Path, tmp_path: Path) -> Callable[[dict[str, Any]], TinyRuns]:
    """The tiny runs with another strategy."""

    def make(strategy: dict[str, Any]) -> TinyRuns:
        config = yaml.safe_load((tiny_folder / "config.yaml").read_text())
        config["model"]["strategy"] = strategy
        path = tmp_path / f"{digest(repr(strategy))[:8]}.yaml"
        path.write_text(yaml.safe_dump(config))
        return TinyRuns(tmp_path / "runs", path)

    return make


Make = Callable[[dict[str, Any]], TinyRuns]


@dataclass
class Seen:
    """What a run was like after each of its steps."""

    phases: list[int] = field(default_factory=list)
    thetas: list[np.ndarray] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    module: Any = None


def of_network(tensors: dict[str, Tensor]) -> str:
    return digest(*(tensor.detach().numpy().tobytes() for name, tensor in tensors.items() if name != "theta"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watches the run of an Alternate."""
    notes, end = Seen(), Alternate.on_train_batch_end

    def spy(self: Alternate, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        end(self, trainer, module, outputs, batch, batch_idx)
        notes.module = module
        notes.phases.append(self._turn.phase)
        notes.thetas.append(module.theta.detach().numpy().copy())
        notes.networks.append(of_network(dict(module.policy.tensors("live"))))
        lora = [p for name, p in module.policy.parameters().items() if name != "theta"]
        notes.trained.append(any(p.requires_grad for p in lora))
        notes.prompts.append(len(batch.prompts))
        assert all(p.grad is None for p in module.policy.parameters().values()), "gradients were left behind"

    monkeypatch.setattr(Alternate, "on_train_batch_end", spy)
    return notes


def trained_state(path: Path) -> dict[str, Any]:
    """All that training leaves, but for clocks."""
    found = checkpoint(path)
    state = dict(found["callbacks"][next(key for key in found["callbacks"] if "Alternate" in key)])
    state["phases"] = [
        {key: value for key, value in part.items() if key not in ("elapsed", "ledger")} for part in state["phases"]
    ]
    return {"theta": found["state_dict"], "strategy": state, "policy": found["calibri_lightning"]["policy"]}


def values(path: Path) -> tuple[float, ...]:
    return read_calibration(path / "calibration.json").values


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, through all that a checkpoint may hold."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


@pytest.mark.parametrize("train", ["scales", "lora"])
def test_one_phase_of_gradients_is_the_strategy_itself(with_strategy: Make, train: str) -> None:
    strategy = grpo(train, ema={"interval": 1})
    alone = with_strategy(strategy).fit("alone", "--trainer.max_steps=3")
    alternate = with_strategy(turns((strategy, 2))).fit("turns", "--trainer.max_steps=3")
    one, other = checkpoint(alone), checkpoint(alternate)
    assert_same(one["state_dict"], other["state_dict"])
    ours, theirs = other["calibri_lightning"], one["calibri_lightning"]
    assert_same(ours["policy"]["network"], theirs["policy"]["network"])
    assert ours["policy"]["copies"].keys() == {
        name if name == "start" else f"phase0.{name}" for name in theirs["policy"]["copies"]
    }
    for name, tensors in theirs["policy"]["copies"].items():
        assert_same(ours["policy"]["copies"][name if name == "start" else f"phase0.{name}"], tensors)
    assert ours["trace"] == theirs["trace"]
    assert values(alternate) == values(alone)
    assert column(alternate, "train/reward_mean") == column(alone, "train/reward_mean")


def test_one_phase_of_a_search_is_the_search_itself(with_strategy: Make, runs: TinyRuns) -> None:
    alone = runs.fit("alone", *CMA, "--trainer.max_steps=3")
    alternate = with_strategy(turns((AGAIN, 1))).fit("turns", "--trainer.max_steps=3")
    assert values(alternate) == values(alone)
    assert column(alternate, "val/mean") == column(alone, "val/mean")
    assert column(alternate, "train/sigma") == column(alone, "train/sigma")


def test_each_phase_moves_its_own_variables_alone(with_strategy: Make, seen: Seen) -> None:
    path = with_strategy(turns((grpo("lora"), 2), (AGAIN, 1))).fit("a", "--trainer.max_steps=5", "--data.val=null")
    assert seen.phases == [0, 0, 1, 0, 0]
    assert seen.trained == [True, True, False, True, True]
    assert seen.prompts == [4] * 5, "every step is offered the most that a phase takes"
    start = seen.module.start_theta
    np.testing.assert_array_equal(seen.thetas[1], start)
    assert not np.array_equal(seen.thetas[2], start)
    np.testing.assert_array_equal(seen.thetas[3], seen.thetas[2])
    np.testing.assert_array_equal(seen.thetas[4], seen.thetas[2])
    assert len(set(seen.networks)) == 4
    assert seen.networks[2] == seen.networks[1]
    # What only another phase logs is not repeated.
    with (path / "metrics.csv").open() as file:
        assert "train/grad_norm" in file.readline()
    assert np.isnan(column(path, "train/sigma")).tolist() == [False, True, True]
    assert np.isnan(column(path, "train/grad_norm")).tolist() == [False, False, True, False, False]
    assert column(path, "train/images") == [4, 8, 8 + seen.module.strategy.parts[1].images] + [
        images + seen.module.strategy.parts[1].images for images in (12, 16)
    ]


def test_scales_of_gradients_and_of_a_search_hand_theta_on(with_strategy: Make, seen: Seen) -> None:
    runs = with_strategy(turns((grpo("scales", ema={"interval": 1}), 1), (AGAIN, 1)))
    runs.fit("a", "--trainer.max_steps=4", "--data.val=null")
    search = seen.module.strategy.parts[1]
    np.testing.assert_array_equal(search._history.moves[0], seen.thetas[0])
    np.testing.assert_array_equal(search._history.moves[1], seen.thetas[2])
    assert len({theta.tobytes() for theta in seen.thetas}) == 4
    # The average starts over where the search has moved theta.
    ema = seen.module.strategy.parts[0]._ema
    assert ema.num_updates == 1


@pytest.mark.parametrize(
    ("train", "cuts"),
    [
        pytest.param("scales", (3,), id="scales, in the second turn of a search"),
        pytest.param("both", (1, 2), id="both, in the first turn of a search and after it"),
    ],
)
def test_cut_off_anywhere_and_resumed_is_uninterrupted(
    with_strategy: Make, train: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = with_strategy(turns((grpo(train, ema={"interval": 1}), 1), (AGAIN, 1)))
    steps = f"--trainer.max_steps={max(cuts) + 1}"
    calls, after = tmp_path / "calls", []
    monkeypatch.setenv(tiny_rewards.CALLS, str(calls))
    step = Alternate.training_step

    def spy(*arguments: Any) -> None:
        step(*arguments)
        after.append(len(calls.read_text().splitlines()))

    with monkeypatch.context() as patch:
        patch.setattr(Alternate, "training_step", spy)
        whole = runs.fit("whole", steps)
    for done in cuts:
        calls.unlink()
        with monkeypatch.context() as patch:
            # The last pictures of the next step: its turn has begun, and some of its work is in the ledger.
            patch.setenv(tiny_rewards.INTERRUPT_AT, str(after[done]))
            assert runs("fit", f"cut{done}", steps) == 130
        cut = runs.latest(f"cut{done}")
        assert checkpoint(cut)["global_step"] == done
        resumed = runs.fit(f"on{done}", steps, f"--ckpt_path={last(cut)}")
        assert_same(trained_state(resumed), trained_state(whole))
        assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_a_checkpoint_of_a_search_turn_is_that_of_the_same_model(with_strategy: Make) -> None:
    """Its LoRA wants no gradients there, and is trained nevertheless."""
    runs = with_strategy(turns((grpo("lora"), 1), (AGAIN, 1)))
    path = runs.fit("a", "--trainer.max_steps=2", "--data.val=null")
    small = ("--model.num_diversity_prompts=0", "--model.num_grid_prompts=1")
    assert runs("test", "t", f"--ckpt_path={last(path)}", *small) == 0
    conditions = json.loads((runs.latest("t") / "summary.json").read_text())["conditions"]
    assert any(condition["role"] == "calibrated" for condition in conditions)


def test_the_best_of_a_search_keeps_the_network_it_was_validated_with(
    with_strategy: Make, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[tuple[float, str, bytes]] = []
    validated = Alternate.on_validated

    def favour_the_search(self: Alternate, module: Any, found: dict[str, float]) -> None:
        number = float(self.steps)
        found = {name: number if name == "mean" else -1.0 - number for name in found}
        network = of_network(dict(module.policy.tensors("live")))
        scores.extend((score, network, module.theta.detach().numpy().tobytes()) for score in found.values())
        validated(self, module, found)

    monkeypatch.setattr(Alternate, "on_validated", favour_the_search)
    path = with_strategy(turns((grpo("lora"), 1), (AGAIN, 1), (grpo("lora"), 3))).fit("a", "--trainer.max_steps=3")
    answer = seen.module.answer
    assert (answer.score, answer.origin, answer.generation, answer.weights) == (2.0, "mean", 2, "phase1.best")
    best = next(score for score in scores if score[0] == 2.0)
    assert answer.theta.tobytes() == best[2]
    with seen.module.policy.using(answer.weights):
        held = dict(seen.module.policy.parameters())
        assert of_network(held) == best[1] == seen.networks[1]
    assert of_network(dict(seen.module.policy.tensors("live"))) != best[1]
    assert values(path) == tuple(answer.theta)


def test_a_search_starts_from_the_scales_of_a_gradient_run(with_strategy: Make, runs: TinyRuns) -> None:
    trained = with_strategy(grpo("scales", ema=None)).fit("trained", "--trainer.max_steps=1", "--data.val=null")
    theta = values(trained)
    assert max(abs(value - 1) for value in theta[:-1]) > 0.03
    start = f"--model.init_from={trained / 'calibration.json'}"
    # With so small a step size the first candidates, and with them the mean, stay where the search began.
    path = runs.fit("warm", *CMA, start, "--model.strategy.sigma0=1e-5", "--trainer.max_steps=1", "--data.val=null")
    np.testing.assert_allclose(values(path), theta, atol=1e-3)


def test_phases_parse_with_short_names_and_say_what_is_wrong(
    with_strategy: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_strategy(turns((grpo("lora"), 2), (AGAIN, 1)))
    parsed = parse_fit([f"--config={made.config}"])["model"]["strategy"]
    assert parsed["class_path"].rpartition(".")[2] == "Alternate"
    first, second = parsed["init_args"]["phases"]
    assert first["strategy"]["class_path"].rpartition(".")[2] == "FlowGRPO"
    assert first["strategy"]["init_args"]["optimizer"]["lr"] == 0.05
    assert (first["steps"], second["steps"], second["strategy"]["init_args"]["popsize"]) == (2, 1, 4)
    assert "phases[0].steps" in refused(with_strategy(turns((AGAIN, 0))), capsys)
