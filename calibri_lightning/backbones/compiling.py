"""Regional compilation: each block by itself, so that equal blocks share one graph and start-up stays short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from calibri_lightning.calibration.sites import find_sites, unwrap


def compile_blocks(
    transformer: nn.Module, dynamic: bool | None = False, backend: str | Callable[..., Any] = "inductor"
) -> int:
    """Compiles every block that has sites, in place; diffusers' own list lacks SD3 and a dozen other models.

    Attach the hooks first: `torch.compile` ignores those that come later. Scales are inputs of the graphs, so a new
    candidate needs no new graph; another number of rows does.

    Args:
        transformer: The transformer, with its hooks.
        dynamic: As for `torch.compile`; False makes a graph for every shape.
        backend: As for `torch.compile`.

    Returns:
        Number of blocks.
    """
    transformer = unwrap(transformer)
    paths = dict.fromkeys(site.block for site in find_sites(transformer))
    for path in paths:
        transformer.get_submodule(path).compile(dynamic=dynamic, backend=backend)
    return len(paths)
