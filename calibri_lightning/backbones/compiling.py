"""Regional compilation: each block by itself, so that equal blocks share one graph and start-up stays short."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from calibri_lightning.calibration.sites import find_sites, unwrap
from calibri_lightning.errors import UserError

GRAPHS = 64
"""Graphs that the blocks may have together. torch's own limit of 8, beyond which it silently stops compiling, is
reached by three kinds of block and three sizes of batch."""


def compile_blocks(transformer: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles every block that has sites, in place; diffusers' own list lacks SD3 and a dozen other models.

    Attach the hooks first: `torch.compile` ignores those that come later. Scales are inputs of the graphs, so a new
    candidate needs no new graph. Another number of rows does: a graph for all numbers would be slower, and which of two
    graphs computed a picture, and so its last bits, would depend on what came before it.

    Args:
        transformer: The transformer, with its hooks.
        backend: As for `torch.compile`.

    Returns:
        Number of blocks.

    Raises:
        UserError: If there is no compiler for what `torch.compile` writes.
    """
    if backend == "inductor":
        check_compiler()
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    transformer = unwrap(transformer)
    paths = dict.fromkeys(site.block for site in find_sites(transformer))
    for path in paths:
        transformer.get_submodule(path).compile(dynamic=False, backend=backend)
    return len(paths)


def check_compiler() -> None:
    """Looks for a C++ compiler, which torch needs on any device, before a long run fails at its first forward.

    Raises:
        UserError: If there is none.
    """
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("g++", "clang++", "c++", "cl")
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"Compiling blocks needs a C++ compiler, and there is none on PATH ({', '.join(names)}). Install one, set "
            "CXX to it, or leave compile out."
        )
