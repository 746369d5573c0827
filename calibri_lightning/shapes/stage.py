"""A resumable, logged training stage: optimiser, weight average and checkpoints around one loss function."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each field is a command-line flag."""

    out: Path
    """Folder of checkpoints, log and the finished pipeline."""
    num_pictures: int = 48_000
    """Pictures drawn once and reused."""
    vae_steps: int = 1_500
    """Optimiser steps of the autoencoder."""
    steps: int = 3_800
    """Optimiser steps of the transformer."""
    vae_batch_size: int = 16
    """Pictures a step of the autoencoder."""
    batch_size: int = 48
    """Pictures a step of the transformer."""
    vae_lr: float = 2e-3
    """Peak learning rate of the autoencoder (Adam)."""
    lr: float = 1.5e-3
    """Peak learning rate of transformer and text encoders (AdamW)."""
    warmup: int = 300
    """Steps of linear warm-up; afterwards the rate falls along a cosine to zero."""
    ema: float = 0.999
    """Decay of the weight average that is saved."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    shift: float = 3.0
    """Time shift of the shipped schedule."""
    save_every: int = 250
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of weights, pictures and noise."""
    device: str = "cpu"
    """Torch device."""
    compile: bool = False
    """Compile the transformer's blocks: a quarter less time on a CPU, where it needs a C++ compiler."""


def cosine_rate(step: int, total: int, warmup: int) -> float:
    """Learning-rate factor in 0..1: linear warm-up, then a cosine to zero.

    Args:
        step: Steps done.
        total: Steps in all.
        warmup: Steps of warm-up.

    Returns:
        The factor.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))


class Stage:
    """A resumable training stage: optimiser, weight average, log and checkpoints around one loss function."""

    def __init__(self, name: str, modules: nn.ModuleList, config: TrainConfig, lr: float, total: int) -> None:
        """Prepares a stage and resumes it where a checkpoint is found.

        Args:
            name: Names the checkpoint and the log rows.
            modules: What is trained.
            config: The run's settings.
            lr: Peak learning rate.
            total: Optimiser steps.
        """
        self.name, self.modules, self.config, self.lr, self.total = name, modules, config, lr, total
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.average = [p.detach().clone() for p in modules.parameters()]
        self.step = 0
        self.path = config.out / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=config.device)
            modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = [tensor.detach() for tensor in state["average"]], state["step"]

    def run(self, loss: Callable[[torch.Generator, float], Tensor]) -> None:
        """Trains to the end, then loads the average weights into the modules.

        Args:
            loss: Draws a batch with the given generator (seeded by the step, so a resumed run draws the same) and
                returns its mean loss; the number is the share of the steps that are done.
        """
        started, losses = time.monotonic(), list[float]()
        while self.step < self.total:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * cosine_rate(self.step, self.total, self.config.warmup)
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
            value = loss(generator, self.step / self.total)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():  # or the average would hold the graph of every step so far
                torch._foreach_lerp_(self.average, list(self.modules.parameters()), 1 - decay)
            losses.append(float(value.detach()))
            if self.step % 100 == 0:
                self._log(float(np.mean(losses)), time.monotonic() - started)
                losses.clear()
            if self.step % self.config.save_every == 0 or self.step == self.total:
                self._save()
        with torch.no_grad():
            for parameter, average in zip(self.modules.parameters(), self.average, strict=True):
                parameter.copy_(average)

    def _log(self, loss: float, seconds: float) -> None:
        print(f"{self.name} step {self.step}/{self.total} loss {loss:.4f} {seconds:.0f} s", flush=True)
        with (self.config.out / "train.csv").open("a", newline="") as file:
            csv.writer(file).writerow([self.name, self.step, f"{loss:.6f}", f"{seconds:.1f}"])

    def _save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)
