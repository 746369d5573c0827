"""Finds out which forwards of a stock pipeline see which prompt, and gives each row its scales.

Pipelines guide in different ways: prompt and negative prompt as two rows of one forward, in either order, or as two
forwards. None of it is documented in the pipeline's interface, so it is observed: what changes when another prompt is
given is the prompt's, what stays is the negative prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from calibri_lightning.calibration.attach import Attachment

Role = Literal["prompt", "negative"]
"""Which prompt a row of a forward sees."""
Passes = tuple[tuple[Role, ...], ...]
"""The rows of each forward of one sampling step, for one picture."""

_STEPS = 2


@dataclass
class Count:
    """What a run has cost so far."""

    forwards: int = 0
    """Calls of the transformer."""
    rows: int = 0
    """Rows of all calls."""


def find_passes(transformer: nn.Module, run: Callable[[str, int], object]) -> Passes:
    """Observes a pipeline.

    Args:
        transformer: Its transformer.
        run: Draws one picture from a prompt in a number of steps, with noise and negative prompt always the same.

    Returns:
        The forwards of one step.

    Raises:
        UserError: If the forwards differ from step to step, or see something other than one prompt and at most one
            negative prompt.
    """
    # Two prompts of one token each, so that nothing but content differs.
    first, second = (_observe(transformer, run, prompt) for prompt in ("a", "b"))
    same = [len(rows) for rows in first] == [len(rows) for rows in second]
    step = len(first) // _STEPS
    if not same or not first or len(first) % _STEPS or [len(r) for r in first[:step]] != [len(r) for r in first[step:]]:
        raise UserError(
            f"The pipeline called its {type(transformer).__name__} {len(first)} times in {_STEPS} steps, not equally "
            "often in each. Stock needs the same forwards in every step; switch off what changes them (a second-order "
            "scheduler, guidance in an interval) under arguments."
        )
    passes: Passes = tuple(
        tuple("prompt" if _differ(old, new) else "negative" for old, new in zip(*rows, strict=True))
        for rows in zip(first[:step], second[:step], strict=True)
    )
    roles = sorted(role for call in passes for role in call)
    if roles not in (["prompt"], ["negative", "prompt"]):
        raise UserError(
            f"A step of the pipeline runs {roles.count('prompt')} row(s) with the prompt and {roles.count('negative')} "
            "without it; Stock serves one with, and at most one without. Use a native backbone, or other arguments."
        )
    return passes


@contextmanager
def steered(
    transformer: nn.Module, attachment: Attachment, passes: Passes, scales: Mapping[Role, Tensor]
) -> Iterator[Count]:
    """Gives the forwards of one picture their scales, each row those of the prompt that it sees.

    Args:
        transformer: The transformer.
        attachment: Its hooks.
        passes: The forwards of one step.
        scales: float32 [sites] of each role.

    Yields:
        The forwards so far.

    Raises:
        UserError: If a forward has another number of rows than `passes` says.
    """
    count = Count()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        roles = passes[count.forwards % len(passes)]
        num_rows = len(_latents(args, kwargs))
        if num_rows != len(roles):
            raise UserError(
                f"The pipeline ran a forward of {num_rows} row(s) where its first steps had {len(roles)}. Stock needs "
                "the same forwards in every step; switch off what changes them (guidance in an interval) under "
                "arguments."
            )
        attachment.set_rows(torch.stack([scales[role] for role in roles]))
        count.forwards += 1
        count.rows += num_rows

    handle = transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()
        attachment.set_rows(None)


def _observe(transformer: nn.Module, run: Callable[[str, int], object], prompt: str) -> list[list[list[Tensor]]]:
    """The tensors that each row of each forward saw: [forward][row][tensor]."""
    seen: list[list[list[Tensor]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        num_rows = len(_latents(args, kwargs))
        batched = [value for value in (*args, *kwargs.values()) if _is_batch(value, num_rows)]
        seen.append([[value[row].clone() for value in batched] for row in range(num_rows)])

    handle = transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        run(prompt, _STEPS)
    finally:
        handle.remove()
    return seen


def _latents(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _is_batch(value: object, num_rows: int) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == num_rows and all(isinstance(row, Tensor) for row in value)
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows


def _differ(old: list[Tensor], new: list[Tensor]) -> bool:
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(old, new, strict=True))
