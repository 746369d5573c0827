"""Other numbers in the same tensors, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def swapped(live: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Writes other numbers into tensors, in place, and puts the old ones back, bitwise, whatever happens.

    A backward pass of a graph that was built before is right again afterwards; inside the `with` it would be wrong.

    Args:
        live: The tensors, by name.
        other: What to write, by the same names; on any device.

    Yields:
        What was in the tensors.
    """
    before = {name: tensor.detach().clone() for name, tensor in live.items()}
    try:
        overwrite(live, other)
        yield before
    finally:
        overwrite(live, before)


def overwrite(live: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Writes numbers into tensors, in place.

    Args:
        live: The tensors, by name.
        other: What to write, by the same names; on any device.
    """
    with torch.no_grad():
        for name, tensor in live.items():
            # .data has a version of its own: autograd takes a graph for broken by any write, also by one undone.
            tensor.data.copy_(other[name])
