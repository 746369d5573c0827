"""A trainer that says and writes nothing of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def quiet_trainer(folder: Path | None, *callbacks: Callback, **options: Any) -> Trainer:
    """A trainer on one CPU with one endless epoch; it saves where a callback does.

    Args:
        folder: Root of what callbacks write; None where they do not.
        *callbacks: Callbacks.
        **options: Further arguments of the trainer, or others than these.
    """
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | options))
