"""What must be the same on all ranks of a run, compared before anything is computed.

Ranks that differ do not crash: they draw other pictures with other settings, and the answer is quietly wrong.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError

PACKAGES = ("calibri-lightning", "torch", "lightning", "diffusers", "transformers", "peft", "cma", "numpy")
"""Those on which results depend."""
_PATIENCE = 10.0
"""Seconds that a file system may take to show a new file on other machines."""


def versions() -> dict[str, str]:
    """Names the versions that results depend on.

    Returns:
        Version by package, and that of Python.
    """
    # Not its last number, which changes no result.
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Lays nested settings out, so that one that differs can be named.

    Args:
        settings: Settings by name; values that are mappings are walked into.
        prefix: Put before each name.

    Returns:
        Value as text by dotted name.
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found


def require_agreement(trainer: Any, what: str, facts: Mapping[str, str], fix: str) -> None:
    """Compares facts of all ranks.

    Args:
        trainer: The trainer, whose processes know each other.
        what: What the facts are of, such as "settings".
        facts: Texts by name.
        fix: What to do where they differ.

    Raises:
        UserError: On all ranks, if a rank's facts are not those of rank 0.
    """
    if trainer.world_size == 1:
        return
    mine = {"": platform.node(), **facts}
    every = [json.loads(text) for text in _gather(trainer, json.dumps(mine, sort_keys=True))]
    first = every[0]
    for rank, other in enumerate(every):
        odd = sorted(name for name in (first.keys() | other.keys()) - {""} if first.get(name) != other.get(name))
        if odd:
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise UserError(
                f"Rank {rank} on {other['']} has other {what} than rank 0 on {first['']}: {odd[0]} is "
                f"{_shown(other.get(odd[0]))} there and {_shown(first.get(odd[0]))} on rank 0{more}. {fix}"
            )


def require_same_bits(gather: Callable[[Floats], Sequence[Floats]], what: str, number: int) -> None:
    """Compares a digest of what all ranks must have alike, bit for bit.

    A broken GPU or link, or another kind of device, would otherwise let the ranks drift apart unseen.

    Args:
        gather: Gives each rank's float64 vector to every rank.
        what: What it is the digest of.
        number: The digest, of which 53 bits are compared.

    Raises:
        UserError: On all ranks, if one has other bits.
    """
    every = [float(part[0]) for part in gather(np.array([float(number % 2**53)]))]
    odd = [str(rank) for rank, digest in enumerate(every) if digest != every[0]]
    if odd:
        raise UserError(
            f"Rank(s) {', '.join(odd[:8])} of {len(every)} have other {what} than rank 0; they must be the same to the "
            "last bit. All ranks need the same kind of device and the same versions; if they have them, a device or a "
            "connection is at fault. The last checkpoint is intact."
        )


def checksum(tensors: Iterable[Tensor]) -> int:
    """Adds up the bits of tensors, where they are.

    Args:
        tensors: Of numbers.

    Returns:
        A number that is another one for nearly any other content.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for place, tensor in enumerate(tensors, start=1):
        bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
        total += place * int(bits.sum(dtype=torch.int64))
    return total


def require_shared(trainer: Any, folder: Path) -> None:
    """Checks that all ranks see the folder of a run: each writes its part there, and a resumed run reads all parts.

    Args:
        trainer: The trainer, whose processes know each other.
        folder: The run's folder.

    Raises:
        UserError: On all ranks, if one does not see what rank 0 writes.
    """
    if trainer.world_size == 1:
        return
    token: Path | None = None
    problem = ""
    if trainer.global_rank == 0:
        token = folder / f".shared-{uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = str(error.strerror or error)
    token, problem = trainer.strategy.broadcast((token, problem))
    assert token is not None
    there = not problem and _appears(token)
    every = _gather(trainer, json.dumps([there, platform.node()]))
    if trainer.global_rank == 0 and not problem:
        token.unlink(missing_ok=True)
    if problem:
        raise UserError(
            f"Rank 0 cannot write into the run's folder {folder} ({problem}). Free space, or choose another with "
            "--trainer.default_root_dir."
        )
    answers = [json.loads(text) for text in every]
    blind = [f"rank {rank} on {node}" for rank, (sees, node) in enumerate(answers) if not sees]
    if blind:
        raise UserError(
            f"The run's folder {folder} is not the same for all: {', '.join(blind[:4])} do(es) not see what rank 0 on "
            f"{answers[0][1]} writes there. Put trainer.default_root_dir on a file system that all machines share."
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < deadline:
        # Asking for the folder's content makes network file systems look again.
        os.listdir(path.parent) if path.parent.is_dir() else None
        time.sleep(0.1)
    return path.exists()


def _gather(trainer: Any, text: str) -> Sequence[str]:
    """Gives each rank's text to every rank."""
    return [trainer.strategy.broadcast(text, src=rank) for rank in range(trainer.world_size)]


def _shown(value: str | None) -> str:
    return "absent" if value is None else repr(value if len(value) <= 80 else f"{value[:77]}...")
