"""Devices that a command line names."""

from __future__ import annotations

import torch

from calibri_lightning.errors import UserError


def find_device(name: str) -> torch.device:
    """Finds the device of the option --device.

    Args:
        name: cpu, cuda or cuda:N.

    Returns:
        The device.

    Raises:
        UserError: If there is none of that name here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; it must be cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name}, but torch sees {torch.cuda.device_count()} CUDA device(s). Use cpu.")
    return device
