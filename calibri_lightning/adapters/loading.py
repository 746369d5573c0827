"""An adapter from a folder or the Hub onto a transformer, all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from calibri_lightning.adapters.files import (
    ADAPTER,
    CONFIG,
    WEIGHTS,
    AdapterFile,
    AdapterRecord,
    live_name,
    read_adapter,
)
from calibri_lightning.adapters.lora import NAME, inject, lora_parameters, refuse_second, remove_lora
from calibri_lightning.adapters.targets import linear_names
from calibri_lightning.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name"""
_INSIDE = ("", ADAPTER, "lora")
"""Where in a folder the files may lie: there itself, in a run's folder, in a checkpoint of Flow-GRPO's code."""


def load_adapter(transformer: nn.Module, source: str | Path, merge: bool = False) -> AdapterRecord:
    """Puts a LoRA in peft's format onto a transformer, with its own alpha and ranks; it is fixed until it is trained.

    The transformer keeps its class. Load before the calibration's hooks are attached.

    Args:
        transformer: A diffusers transformer without a LoRA; unchanged if the adapter does not fit.
        source: An adapter's folder, the folder of a run that holds `adapter/`, or a Hub id "owner/name".
        merge: Add it to the weights: forwards then cost nothing extra and scales can be folded, but it can no longer be
            trained or switched off.

    Returns:
        What was loaded.

    Raises:
        UserError: If there is no such adapter, it is of another model, damaged or more than a plain LoRA, or the
            transformer has a LoRA already.
    """
    refuse_second(transformer)
    file = read_adapter(adapter_folder(source))
    _check_layers(transformer, file, source)
    try:
        inject(transformer, file.config)
        _fill(transformer, file, source)
    except Exception as error:
        remove_lora(transformer)
        if isinstance(error, UserError):
            raise
        # peft refuses targets in many ways.
        raise UserError(
            f"The adapter {source} does not fit this {type(transformer).__name__} ({error}). Load the model that it "
            "was trained on."
        ) from error
    if merge:
        remove_lora(transformer, merge=True)
    return AdapterRecord(str(source), file.digest, merge)


def find_adapter(folder: Path) -> Path | None:
    """Looks for an adapter in a folder.

    Args:
        folder: An adapter's folder, or a run's.

    Returns:
        The folder that holds the files; None if there is none.
    """
    return next((folder / inside for inside in _INSIDE if (folder / inside / CONFIG).is_file()), None)


def adapter_folder(source: str | Path) -> Path:
    """Finds the folder of an adapter; what is not here is fetched from the Hub, two files only.

    Args:
        source: An adapter's folder, a run's folder, or a Hub id.

    Returns:
        The folder that holds the files.

    Raises:
        UserError: If there is none.
    """
    path = Path(source)
    if path.is_dir():
        # Without a configuration, the reader says what is missing.
        return find_adapter(path) or next(p for p in (path / ADAPTER, path) if p.is_dir())
    if path.is_file():
        raise UserError(f"The adapter {source} is a file. Give the folder that holds {CONFIG} and {WEIGHTS}.")
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(
            f"The adapter {str(source)!r} is neither an existing folder nor a Hub id 'owner/name'. Check the path."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS]))
    # No network, no such repository, no right to read it: each has its own class.
    except Exception as error:
        raise UserError(
            f"The adapter {source} is not a folder here, and could not be fetched from the Hub "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}). Check its name, "
            "your network and, for a gated repository, `hf auth login`; or give a local folder."
        ) from error


def _check_layers(transformer: nn.Module, file: AdapterFile, source: str | Path) -> None:
    """Refuses an adapter whose layers are not in the transformer, before anything changes."""
    layers = {key.partition(".lora_")[0] for key in file.tensors}
    absent = sorted(layers - set(linear_names(transformer)))
    if absent:
        extent = "none" if len(absent) == len(layers) else f"{len(absent)} not"
        raise UserError(
            f"The adapter {source} is of another model: of its {len(layers)} layers, {extent} in this "
            f"{type(transformer).__name__}, for example {absent[0]}. Load the model that it was trained on."
        )


def _fill(transformer: nn.Module, file: AdapterFile, source: str | Path) -> None:
    """Writes the numbers into the injected layers; each parameter must be given, each tensor used."""
    live = lora_parameters(transformer)
    given = {live_name(key, NAME): (key, tensor) for key, tensor in file.tensors.items()}
    missing, unused = sorted(live.keys() - given.keys()), sorted(given.keys() - live.keys())
    if missing or unused:
        what = f"it lacks {missing[0]}" if missing else f"it does not target the layer of its {given[unused[0]][0]}"
        raise UserError(
            f"The adapter {source} does not agree with its {CONFIG}: {what}. Its files were cut or mixed up: use the "
            "original ones."
        )
    for name, (key, tensor) in given.items():
        if live[name].shape != tensor.shape:
            raise UserError(
                f"The adapter {source} is of another model: its {key} is {_by(tensor.shape)}, and this "
                f"{type(transformer).__name__} takes {_by(live[name].shape)} there. Load the model that it was trained "
                "on."
            )
        live[name].data.copy_(tensor)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
