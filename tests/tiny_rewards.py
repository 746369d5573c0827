"""Rewards for runs of the whole program, found by import path; some of them misbehave on purpose."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

CALLS = "TINY_REWARDS_CALLS"
"""Environment variable: a file that gets one line for each call, the prompt of its first picture."""
KILL_AT = "TINY_REWARDS_KILL_AT"
"""Environment variable: the process is killed (SIGKILL) at the start of this call, counted from 1."""
INTERRUPT_AT = "TINY_REWARDS_INTERRUPT_AT"
"""Environment variable: this call raises KeyboardInterrupt, as Ctrl+C does."""
SIGNAL_AT = "TINY_REWARDS_SIGNAL_AT"
"""Environment variable, such as "SIGTERM 3": this call sends the process that signal, as schedulers do."""

RAISE_AT = "TINY_REWARDS_RAISE_AT"
"""Environment variable: this call of `raises_at` raises."""


def redness(images: Tensor, prompts: Sequence[object]) -> Tensor:
    if CALLS in os.environ:
        log = Path(os.environ[CALLS])
        with log.open("a") as file:
            file.write(f"{prompts[0].text}\n")
        number = len(log.read_text().splitlines())
        if number == int(os.environ.get(KILL_AT, 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == int(os.environ.get(INTERRUPT_AT, 0)):
            raise KeyboardInterrupt
        name, at = os.environ.get(SIGNAL_AT, "SIGTERM 0").split()
        if number == int(at):
            os.kill(os.getpid(), signal.Signals[name])
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def raises(images: Tensor, prompts: Sequence[object]) -> Tensor:
    raise RuntimeError("the reward's server is down")


def always_nan(images: Tensor, prompts: Sequence[object]) -> Tensor:
    return torch.full((len(images),), torch.nan)


def constant(images: Tensor, prompts: Sequence[object]) -> Tensor:
    return torch.ones(len(images))


def nan_on_the_first(images: Tensor, prompts: Sequence[object]) -> Tensor:
    rewards = redness(images, prompts)
    rewards[0] = torch.nan
    return rewards


def nan_on_green(images: Tensor, prompts: Sequence[object]) -> Tensor:
    green = torch.tensor(["green" in prompt.text for prompt in prompts])
    return redness(images, prompts).masked_fill(green, torch.nan)


def one_too_many(images: Tensor, prompts: Sequence[object]) -> Tensor:
    return torch.zeros(len(images) + 1)


def not_a_tensor(images: Tensor, prompts: Sequence[object]) -> list[float]:
    return [0.0] * len(images)


def raises_on_rank_one(images: Tensor, prompts: Sequence[object]) -> Tensor:
    if os.environ.get("LOCAL_RANK") == "1":
        raise RuntimeError("rank one has no server")
    return redness(images, prompts)


def redness_uncounted(images: Tensor, prompts: Sequence[object]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def raises_at(images: Tensor, prompts: Sequence[object]) -> Tensor:
    rewards = redness(images, prompts)
    if len(Path(os.environ[CALLS]).read_text().splitlines()) == int(os.environ[RAISE_AT]):
        raise RuntimeError("a hiccup")
    return rewards
