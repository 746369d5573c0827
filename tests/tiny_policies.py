"""Gradient strategies on the tiny model: modules without a command line, short fits, and what is compared of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_rewards
import torch
from lightning.pytorch import Callback, Trainer
from quiet_trainer import quiet_trainer
from run_files import checkpoint, last
from tiny_runs import VAL, TinyRuns, forked
from torch import Tensor, nn

from calibri_lightning import SD3, CalibrationConfig, CalibriModule, PromptData
from calibri_lightning.adapters.lora import LoraOptions
from calibri_lightning.strategies import Strategy

REDNESS = "tiny_rewards:redness"
MEMBERS = {"single": CalibrationConfig("layer", "single", 3.0, "fixed")}
MEMBERS["cfg"] = CalibrationConfig("layer", "cfg", 3.0, "guidance")


def policy_module(folder: Path, strategy: Strategy, members: str = "single", **options: Any) -> CalibriModule:
    """A module on the tiny model.

    Args:
        folder: Where `tiny_runs.prepare` saved it.
        strategy: What is tested.
        members: "single" or "cfg".
        **options: Further arguments of the module, or others than these.
    """
    defaults: dict[str, Any] = {"rewards": {REDNESS: 1.0}, "num_steps": 2, "rows_per_forward": 6}
    if strategy.trains in ("lora", "both"):
        defaults["lora"] = LoraOptions(rank=2)
    backbone = SD3(str(folder / "model"))
    return CalibriModule(backbone, strategy=strategy, calibration=MEMBERS[members], **(defaults | options))


def train(
    module: CalibriModule, folder: Path, run_dir: Path, steps: int, *callbacks: Callback, ckpt: Path | None = None
) -> Trainer:
    """Fits a module on the tiny prompts, without validation."""
    trainer = quiet_trainer(run_dir, *callbacks, max_steps=steps)
    trainer.fit(module, PromptData(train=str(folder / "train.txt")), ckpt_path=ckpt)
    return trainer


def same(one: Any, other: Any) -> bool:
    """Whether two nested states agree, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def state_of(checkpoint: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """What a resumed run must share with an uninterrupted one: all but clocks."""
    ours = checkpoint["calibri_lightning"]
    callback = {name: value for name, value in checkpoint["callbacks"][strategy].items() if name != "elapsed"}
    return {
        "theta": checkpoint["state_dict"],
        "policy": ours["policy"],
        "answer": ours["answer"],
        "budget": ours["budget"][:2],
        "global_step": checkpoint["global_step"],
        "strategy": callback,
    }


def killed_and_resumed(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[Path, Path]:
    """Runs three steps whole, and again killed in the second unit of the second step and resumed; both folders."""
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    whole = runs.fit("whole", *flags, "--trainer.max_steps=3")
    calls = (tmp_path / "calls").read_text().splitlines()
    # Between the steps stand the validations of what they brought.
    first = next(place for place, text in enumerate(calls) if text in VAL)
    second = next(place for place in range(first, len(calls)) if calls[place] not in VAL)
    (tmp_path / "calls").unlink()
    kill = {tiny_rewards.KILL_AT: str(second + 2)}
    [code] = forked([runs.arguments("fit", "cut", *flags, "--trainer.max_steps=3")], [kill], tmp_path / "log")
    assert code == -signal.SIGKILL
    cut = runs.latest("cut")
    assert checkpoint(cut)["global_step"] == 1
    return runs.fit("cut", *flags, "--trainer.max_steps=3", f"--ckpt_path={last(cut)}"), whole


class CountedRows:
    """Counts the rows of a transformer's forwards: those under `no_grad` once, those with gradients twice."""

    def __init__(self, transformer: nn.Module) -> None:
        self.count = 0
        transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += len(kwargs["hidden_states"]) * (2 if torch.is_grad_enabled() else 1)


def perturbed(tensors: Mapping[str, Tensor], size: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The same tensors with noise added."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        yield name, tensor.detach() + size * noise
