"""What a checkpoint holds, and where a new run may start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from calibri_lightning.calibration import Layout, check_model, read_calibration
from calibri_lightning.errors import UserError

CALIBRATION = "calibration.json"


def trainable_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained.

    Args:
        module: The module.

    Returns:
        Names as in its state dict.
    """
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep_trainable(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops the frozen base from a state dict.

    Args:
        module: The module.
        state: Its state dict.

    Returns:
        The trainable part.
    """
    names = trainable_names(module)
    return {name: tensor for name, tensor in state.items() if name in names}


def require_trainable(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Checks that a checkpoint holds exactly what is trained, in the right shapes.

    Args:
        module: The module.
        state: The checkpoint's state dict.

    Raises:
        UserError: If it does not.
    """
    expected = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    found = {name: tensor.shape for name, tensor in state.items()}
    if expected == found:
        return
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    details = ", ".join(
        f"{name}: checkpoint {_shape(found.get(name))}, run {_shape(expected.get(name))}" for name in odd[:4]
    )
    raise UserError(
        f"The checkpoint does not fit this run ({details}). --ckpt_path resumes a run with its own model, granularity and "
        "members. Restore its config.yaml, or start a new run with --model.init_from RUN/calibration.json."
    )


def load_start(source: str, layout: Layout, transformer: nn.Module) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Reads the parameters that a new run starts from.

    Args:
        source: A calibration.json, or a run folder that holds one.
        layout: The new run's layout.
        transformer: The new run's transformer.

    Returns:
        float64 [n].

    Raises:
        UserError: If there is no such file, or it is of another model or layout.
    """
    path = Path(source)
    file = read_calibration(path / CALIBRATION if path.is_dir() else path)
    check_model(file, transformer)
    values = dict(zip(file.names, file.values, strict=True))
    if values.keys() != set(layout.names):
        odd = sorted(values.keys() ^ set(layout.names))
        raise UserError(
            f"init_from {source} has {len(values)} parameters (granularity {file.granularity}, {len(file.members)} "
            f"member(s), weight_mode {file.weight_mode}); this run has {layout.num_parameters}, and they differ, for "
            f"example, in {odd[0]}. Set model.calibration to the same granularity, members and weight_mode."
        )
    return np.array([values[name] for name in layout.names], dtype=np.float64)


def _shape(shape: Any) -> str:
    return "absent" if shape is None else str(list(shape))
