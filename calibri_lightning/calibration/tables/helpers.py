"""Short ways to write the rows that most blocks have."""

from __future__ import annotations

from typing import Any

from torch import nn

from calibri_lightning.calibration.sites import (
    Choice,
    Chunk,
    ColumnBlock,
    Fold,
    Hook,
    InputColumns,
    Layer,
    OutputProjection,
    PostNormWeight,
    Row,
    RowChunk,
    Stream,
    TupleElement,
    WholeOutput,
)


def tuple_gate(layer: Layer, stream: Stream, norm: str, index: int, n: int, row: int) -> Row:
    """A gate at `index` of the tuple that an adaptive norm returns, and at chunk `row` of `n` of its Linear.

    Args:
        layer: Kind of branch.
        stream: Tokens that the branch writes to.
        norm: Path of the norm, whose Linear is `norm.linear`.
        index: Position in the tuple.
        n: Number of chunks of the Linear's rows.
        row: The chunk that makes the gate.

    Returns:
        The row.
    """
    return Row(layer, stream, TupleElement(norm, index), RowChunk(f"{norm}.linear", n, row))


def ada_zero(norm: str, stream: Stream, n: int = 6) -> tuple[Row, ...]:
    """Both gates of an `AdaLayerNormZero`: element 1 of its tuple for the attention, 4 for the MLP.

    Args:
        norm: Path of the norm.
        stream: Tokens that it modulates.
        n: Number of chunks of its Linear's rows: 6, or 9 for `SD35AdaLayerNormZeroX`.

    Returns:
        The rows.
    """
    return tuple_gate("attn", stream, norm, 1, n, 2), tuple_gate("mlp", stream, norm, 4, n, 5)


def chunk_gate(layer: Layer, stream: Stream, module: str, linear: str, n: int, index: int) -> Row:
    """A gate that is the `index`-th of `n` chunks of a modulation's output.

    Args:
        layer: Kind of branch.
        stream: Tokens that the branch writes to.
        module: Path of the modulation.
        linear: Path of the Linear that ends it.
        n: Number of chunks.
        index: The chunk that is the gate.

    Returns:
        The row.
    """
    return Row(layer, stream, Chunk(module, n, index), RowChunk(linear, n, index))


def branch(layer: Layer, stream: Stream, module: str, projection: str | None, choice: Choice = "always") -> Row:
    """A branch whose module returns its output alone, to be scaled there because no module makes its gate.

    Args:
        layer: Kind of branch.
        stream: Tokens that the branch writes to.
        module: Path of the module.
        projection: Path of the Linear or convolution that the output is linear in; None where there is none.
        choice: When the row is used.

    Returns:
        The row.
    """
    return Row(layer, stream, WholeOutput(module), OutputProjection(projection) if projection else None, choice)


def post_norm(layer: Layer, stream: Stream, norm: str) -> Row:
    """A branch that ends in a norm, behind which alone a scale has an effect.

    Args:
        layer: Kind of branch.
        stream: Tokens that the branch writes to.
        norm: Path of the norm, which has an affine weight.

    Returns:
        The row.
    """
    return Row(layer, stream, WholeOutput(norm), PostNormWeight(norm))


def fused(block: nn.Module, gate: Hook, fold: Fold, projection: str) -> tuple[Row, ...]:
    """A block that joins attention and MLP before one output projection, behind which they share a gate.

    Args:
        block: The block.
        gate: Where the shared gate is.
        fold: Weights that can carry its scale.
        projection: Path of the projection; its first input columns, as many as its rows, are the attention's.

    Returns:
        The row of the whole, and the rows of the halves for `SiteOptions.split_fused`.
    """
    linear: Any = block.get_submodule(projection)
    width, total = linear.out_features, linear.in_features
    halves: tuple[tuple[Layer, int, int], ...] = (("attn", 0, width), ("mlp", width, total))
    return (
        Row("fused", "joint", gate, fold, "fused"),
        *(
            Row(layer, "joint", InputColumns(projection, a, b), ColumnBlock(projection, a, b), "split")
            for layer, a, b in halves
        ),
    )
