"""Rewards and networks for metrics, in functions that another process can import."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import Reward


class RedReward(Reward):
    """The mean of red; NaN for prompts with "nan", and an extra score."""

    name = "red"
    extra_names = ("green",)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.checked = scale, 0

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.checked += len(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        lost = torch.tensor(["nan" in prompt.text for prompt in prompts])
        return (self.scale * images[:, 0].mean(dim=(1, 2))).masked_fill(lost, torch.nan)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"red": self(images, prompts), "green": images[:, 1].mean(dim=(1, 2))}


def centre(images: Tensor) -> Tensor:
    """The pixel in the middle: pictures of one colour stand for points in three dimensions."""
    return images[:, :, images.shape[2] // 2, images.shape[3] // 2]


def flat(points: Tensor, side: int = 12) -> Tensor:
    """Pictures of one colour each, [B, 3] to [B, 3, side, side]."""
    return points[:, :, None, None].expand(-1, -1, side, side)


def on_ranks(work: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """What `work(rank)` returns on each of several forked processes that share a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_rank, args=(work, rank, world_size, port, answers)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
    for answer in found.values():
        if isinstance(answer, BaseException):
            raise answer
    return [found[rank] for rank in range(world_size)]


def _rank(work: Callable[[int], Any], rank: int, world_size: int, port: int, answers: Any) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        answers.put((rank, work(rank)))
    except Exception as error:  # handed over: the test shall fail with what went wrong here
        answers.put((rank, RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
