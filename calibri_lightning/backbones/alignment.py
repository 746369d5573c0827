"""Weights where a CPU's kernels expect them."""

from __future__ import annotations

import itertools

import torch
from torch import nn

BYTES = 64
"""A cache line, and what torch aligns its own tensors to."""


def align(network: nn.Module) -> None:
    """Moves weights that lie askew, as those that are mapped from a file do.

    Matrix kernels of CPUs take other paths for them, with other last bits (measured on an AMD EPYC with torch 2.13:
    2e-7 in the first layer of a transformer): the same weights would give other rewards out of another file. With a GPU
    at hand nothing is done. The networks go there, which aligns them, and mapped weights are shared by all processes of
    a machine until then.

    Args:
        network: Changed in place.
    """
    if torch.cuda.is_available():
        return
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if type(tensor.data) is torch.Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % BYTES:
            tensor.data = tensor.data.clone()
