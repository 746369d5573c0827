"""All weights of a transformer, where those were trained: a `transformer/` folder in diffusers' format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calibri_lightning.adapters.lora import lora_layers
from calibri_lightning.adapters.swap import overwrite, swapped
from calibri_lightning.errors import UserError

TRANSFORMER = "transformer"
"""What a run calls the folder."""
CONFIG = "config.json"


def write_transformer(folder: str | Path, transformer: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes a transformer, so that `from_pretrained` of its class reads it; the folder is replaced whole.

    Args:
        folder: Where to.
        transformer: A diffusers transformer without a LoRA.
        tensors: Other numbers for its parameters (`Policy.tensors`); the live ones if None.

    Raises:
        UserError: If the transformer has a LoRA, tensors are missing, or the folder cannot be written.
    """
    if lora_layers(transformer):
        raise UserError("The transformer has a LoRA: write that with write_adapter, or merge it first.")
    live = {name: parameter.detach() for name, parameter in transformer.named_parameters()}
    missing = [] if tensors is None else sorted(live.keys() - tensors.keys())
    if missing:
        raise UserError(f"The transformer to write has no {missing[0]}. Give all its parameters.")
    folder = Path(folder)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext() if tensors is None else swapped(live, tensors):
            transformer.save_pretrained(new, safe_serialization=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except OSError as error:
        raise UserError(
            f"The transformer cannot be written to {folder} ({error.strerror or error}). Free space, or choose a "
            "folder that you may write to."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load_transformer(transformer: nn.Module, folder: str | Path) -> None:
    """Replaces all weights of a transformer by those of a folder, in place.

    Args:
        transformer: A diffusers transformer without a LoRA; unchanged if the folder does not fit.
        folder: A folder that `save_pretrained` of its class wrote.

    Raises:
        UserError: If the folder holds no such model, or one of another size.
    """
    if lora_layers(transformer):
        raise UserError("The transformer has a LoRA. Load all weights first, and the LoRA after them.")
    path, kind = Path(folder), type(transformer).__name__
    held = transformer_class(path)
    if held != kind:
        raise UserError(
            f"{path} holds {held or 'no model of diffusers'}; the rule is a {kind}, as this run's model is."
        )
    loader: Any = type(transformer)
    try:
        loaded = loader.from_pretrained(path, local_files_only=True, use_safetensors=True)
    # A damaged file surfaces as one of many classes of several libraries.
    except Exception as error:
        raise UserError(
            f"The transformer in {path} could not be loaded ({error}). Check that its files are complete."
        ) from error
    live, given = dict(transformer.named_parameters()), dict(loaded.named_parameters())
    odd = sorted(live.keys() ^ given.keys()) or [name for name in live if live[name].shape != given[name].shape]
    if odd:
        raise UserError(
            f"The transformer in {path} is a {kind} of another size than this run's: {odd[0]} differs. Give the model "
            "that it was trained from as model.backbone's pretrained."
        )
    overwrite(live, given)


def transformer_class(folder: Path) -> str | None:
    """Looks at what a folder holds.

    Args:
        folder: A folder.

    Returns:
        Name of the class of diffusers whose model it holds; None if it holds none.
    """
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = document.get("_class_name") if isinstance(document, dict) else None
    return name if isinstance(name, str) else None
