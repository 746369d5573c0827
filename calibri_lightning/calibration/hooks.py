"""The ways to scale what goes into or comes out of a module, as hooks that read `ROWS` of their module.

Hooks of one kind are one and the same function object, so that `torch.compile` shares one graph between all
blocks: a closure a module costs one graph a block and hits the recompile limit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calibri_lightning.calibration.sites import ArgumentChunk, Chunk, Hook, InputColumns, TupleElement, WholeOutput

ROWS = "_calibri_rows"
"""Attribute of a hooked module: None, or a plain float32 tensor [B, k] with a column for each site."""


def install(module: nn.Module, hooks: tuple[Hook, ...]) -> RemovableHandle:
    """Hangs one hook on a module, with no scales set.

    Args:
        module: The module; for `ArgumentChunk`, the block.
        hooks: What to scale, all of one kind; the i-th reads column i of `ROWS`.

    Returns:
        The handle that removes the hook.
    """
    setattr(module, ROWS, None)
    first = hooks[0]
    if isinstance(first, ArgumentChunk):
        names = list(inspect.signature(module.forward).parameters)
        arguments = [hook for hook in hooks if isinstance(hook, ArgumentChunk)]
        chunks = tuple((hook.arg, names.index(hook.arg), hook.n, hook.index) for hook in arguments)
        return module.register_forward_pre_hook(_argument_hook(chunks), with_kwargs=True)
    if isinstance(first, InputColumns):
        columns = tuple((hook.start, hook.stop) for hook in hooks if isinstance(hook, InputColumns))
        return module.register_forward_pre_hook(_input_hook(columns))
    if isinstance(first, WholeOutput):
        return module.register_forward_hook(_whole_hook(first.batch_dim))
    if isinstance(first, Chunk):
        indices = tuple(hook.index for hook in hooks if isinstance(hook, Chunk))
        return module.register_forward_hook(_chunk_hook(first.n, indices))
    indices = tuple(hook.index for hook in hooks if isinstance(hook, TupleElement))
    return module.register_forward_hook(_tuple_hook(indices))


def _scale(gate: Tensor, rows: Tensor, column: int, batch_dim: int = 0) -> Tensor:
    """Multiplies each row of `gate` by its scale, in float32 or better, and rounds once."""
    _check_batch(gate.shape[batch_dim], rows)
    shape = [1] * gate.ndim
    shape[batch_dim] = -1
    return (gate * rows[:, column].to(gate.device).view(shape)).to(gate.dtype)


def _check_batch(batch: int, rows: Tensor) -> None:
    if rows.shape[0] != batch:
        raise ValueError(f"scales were set for a batch of {rows.shape[0]} rows, but the forward has {batch}")


@cache
def _tuple_hook(
    indices: tuple[int, ...],
) -> Callable[[nn.Module, Any, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = getattr(module, ROWS)
        if rows is None:
            return None
        scaled = list(output)
        for column, index in enumerate(indices):
            scaled[index] = _scale(scaled[index], rows, column)
        return tuple(scaled)

    return hook


@cache
def _chunk_hook(n: int, indices: tuple[int, ...]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        rows = getattr(module, ROWS)
        if rows is None:
            return None
        chunks = list(output.chunk(n, dim=-1))
        for column, index in enumerate(indices):
            chunks[index] = _scale(chunks[index], rows, column)
        return torch.cat(chunks, dim=-1)

    return hook


@cache
def _whole_hook(batch_dim: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        rows = getattr(module, ROWS)
        return None if rows is None else _scale(output, rows, 0, batch_dim)

    return hook


@cache
def _input_hook(
    columns: tuple[tuple[int, int], ...],
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """Scales columns (start, stop) of the first argument [B, ..., C]; the others are multiplied by 1."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = getattr(module, ROWS)
        if rows is None:
            return None
        value = args[0]
        _check_batch(value.shape[0], rows)
        factor = rows.new_ones(len(rows), value.shape[-1])
        for column, (start, stop) in enumerate(columns):
            factor[:, start:stop] = rows[:, column, None]
        factor = factor.to(value.device).view(len(rows), *[1] * (value.ndim - 2), -1)
        return ((value * factor).to(value.dtype), *args[1:])

    return hook


@cache
def _argument_hook(
    chunks: tuple[tuple[str, int, int, int], ...],
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Scales chunks (name, position, n, index) of arguments, passed by name or position (checkpointing)."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows = getattr(module, ROWS)
        if rows is None:
            return None
        positional, named = list(args), dict(kwargs)
        for column, (name, position, n, index) in enumerate(chunks):
            value = named[name] if name in named else positional[position]
            pieces = list(value.chunk(n, dim=-1))
            pieces[index] = _scale(pieces[index], rows, column)
            scaled = torch.cat(pieces, dim=-1)
            if name in named:
                named[name] = scaled
            else:
                positional[position] = scaled
        return tuple(positional), named

    return hook
