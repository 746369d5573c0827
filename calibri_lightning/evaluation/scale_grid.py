"""The named scales of a calibration, sorted into one matrix a member: layers and streams by blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LAYERS = ("attn", "attn2", "xattn", "mlp", "fused")
_STREAMS = ("image", "text", "joint")


@dataclass(frozen=True)
class ScaleGrid:
    """The scales of one member as a matrix.

    Attributes:
        member: Name of the member, e.g. "member0".
        rows: Layer and stream of each row, e.g. "attn image".
        columns: Block path of each column, e.g. "transformer_blocks.3".
        values: float64[rows, columns]; NaN where a block has no such site.
        others: Values that are no scales, e.g. {"weight": 4.0}, as pairs.
    """

    member: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    others: tuple[tuple[str, float], ...]


def scale_grids(names: Sequence[str], values: Sequence[float]) -> tuple[ScaleGrid, ...]:
    """Sort the named values of a calibration into one matrix a member.

    Args:
        names: `Layout.names`: "member0/transformer_blocks.3.attn.image", with coarser granularity without the
            stream or the layer; "member0/weight"; "strength" and "guidance", which belong to no member and
            are left out.
        values: The value of each name.

    Returns:
        The members in order of appearance.
    """
    cells: dict[str, dict[tuple[str, str], float]] = {}
    others: dict[str, list[tuple[str, float]]] = {}
    for name, value in zip(names, values, strict=True):
        member, slash, path = name.rpartition("/")
        if not slash:
            continue
        block, row = _split(path)
        if block:
            cells.setdefault(member, {})[row, block] = float(value)
        else:
            others.setdefault(member, []).append((path, float(value)))
    return tuple(_grid(member, found, tuple(others.get(member, ()))) for member, found in cells.items())


def _split(path: str) -> tuple[str, str]:
    """Cut "transformer_blocks.3.attn.image" into block and "attn image"; "weight" has no block."""
    parts = path.split(".")
    tail: list[str] = []
    while parts and parts[-1] in (*_LAYERS, *_STREAMS):
        tail.insert(0, parts.pop())
    block = ".".join(parts)
    return (block, " ".join(tail) or "block") if re.search(r"\.\d+$", block) else ("", path)


def _grid(member: str, cells: dict[tuple[str, str], float], others: tuple[tuple[str, float], ...]) -> ScaleGrid:
    rows = tuple(sorted({row for row, _ in cells}, key=_row_order))
    columns = tuple(dict.fromkeys(block for _, block in cells))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, block), value in cells.items():
        values[rows.index(row), columns.index(block)] = value
    return ScaleGrid(member, rows, columns, values, others)


def _row_order(row: str) -> tuple[int, ...]:
    """Layers in the order a block runs them, in each the picture before the text."""
    known = (*_LAYERS, *_STREAMS)
    return tuple(known.index(word) if word in known else -1 for word in row.split())


def bands(grid: ScaleGrid, max_columns: int) -> tuple[ScaleGrid, ...]:
    """Cut a wide grid into bands of neighbouring blocks that can be drawn below each other.

    Args:
        grid: The scales of one member.
        max_columns: Most blocks a band may have.

    Returns:
        Bands of nearly equal width, each of one kind of block and without the rows that this kind lacks.
    """
    kinds = [block.rpartition(".")[0] for block in grid.columns]
    found = []
    for kind in dict.fromkeys(kinds):
        columns = [i for i, k in enumerate(kinds) if k == kind]
        for part in np.array_split(columns, -(-len(columns) // max_columns)):
            values = grid.values[:, part]
            kept = [bool(np.isfinite(row).any()) for row in grid.values[:, columns]]
            rows = tuple(row for row, keep in zip(grid.rows, kept, strict=True) if keep)
            names = tuple(grid.columns[i] for i in part)
            found.append(ScaleGrid(grid.member, rows, names, values[kept], grid.others))
    return tuple(found)
