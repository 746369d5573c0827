"""What a rank holds of a transformer that several hold together, and what it gathers of it in a forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.lora import lora_parameters
from calibri_lightning.calibration.sites import unwrap
from calibri_lightning.errors import UserError
from calibri_lightning.planning.configured import class_of
from calibri_lightning.sharding.cut import blocks_of
from calibri_lightning.sharding.strategy import Sharded, shards_of

_BLOCKS_IN_BACKWARD = 4
"""Blocks' worth of memory at most in a backward: one that computes, and the next, gathered ahead, on its way twice."""


@dataclass(frozen=True)
class ShardPlan:
    """A transformer that ranks hold together, in bytes."""

    ranks: int
    """Ranks that hold one copy."""
    share_bytes: int
    """What the fullest of them holds, padding included."""
    gathered_bytes: int
    """Peak of what it gathers in a forward."""
    backward_bytes: int
    """The same with gradients; an upper bound."""


def plan_shards(transformer: nn.Module, ranks: int) -> ShardPlan:
    """Counts as torch's fully_shard divides: each weight by its first dimension, rounded up; a LoRA stays whole.

    Args:
        transformer: The transformer, whole; it may be a sketch.
        ranks: Ranks that hold one copy.

    Returns:
        The plan.
    """
    inner = unwrap(transformer)
    left_whole = {id(parameter) for parameter in lora_parameters(inner).values()}
    blocks = [list(block.parameters()) for block in blocks_of(inner).values()]
    inside = {id(parameter) for block in blocks for parameter in block}
    outside = [parameter for parameter in inner.parameters() if id(parameter) not in inside]
    *shares, root = (
        _share((parameter for parameter in group if id(parameter) not in left_whole), ranks)
        for group in (*blocks, outside)
    )
    with_gradients = root + _BLOCKS_IN_BACKWARD * max(shares)
    return ShardPlan(ranks, sum(shares) + root, *(ranks * n for n in (_most_gathered(root, shares), with_gradients)))


def _most_gathered(root: int, blocks: Sequence[int]) -> int:
    """Peak of what is gathered in a forward, in shares.

    What is outside of the blocks is gathered first, and stays while they run. A block takes its own size twice while
    it is gathered: the pieces as they arrive, and the weights that they are copied to. The pieces of what was gathered
    before it are given up only then (torch 2.13).
    """
    before = (root, *blocks[:-1])
    return max(2 * root, *(root + earlier + 2 * block for earlier, block in zip(before, blocks, strict=True)))


def _share(parameters: Iterable[Tensor], ranks: int) -> int:
    return sum(-(-p.shape[0] // ranks) * p[0].numel() * p.element_size() for p in parameters)


def read_ranks(trainer: dict[str, Any]) -> int:
    """Reads how many ranks hold one copy of the transformer.

    Args:
        trainer: The configuration of the trainer.

    Returns:
        The number; 1 where the trainer's strategy is not ours.

    Raises:
        UserError: If it follows from the number of devices, and that is unknown here.
    """
    strategy = trainer["strategy"]
    given: dict[str, Any] = {}
    if isinstance(strategy, dict):
        if not issubclass(class_of(strategy), Sharded):
            return 1
        given = dict(strategy.get("init_args") or {})
    elif strategy != "sharded":
        return 1
    wanted = given.get("ranks_per_replica")
    devices = _count_devices(trainer["devices"])
    if devices is None:
        if wanted is None:
            raise UserError(
                f"trainer.devices is {trainer['devices']!r} and no GPU is here to be counted, so nobody knows how many "
                "ranks will hold the model together. Give --trainer.devices a number, or set ranks_per_replica."
            )
        return int(wanted)
    return shards_of(devices * int(trainer["num_nodes"]), wanted)


def _count_devices(devices: Any) -> int | None:
    """Devices of a node, as Lightning reads the option; None where it depends on the machine and this one has none."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices)
    if devices == "auto" or int(devices) == -1:
        return torch.cuda.device_count() or None
    return int(devices)
