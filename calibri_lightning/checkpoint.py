"""What a checkpoint holds, how it reaches the disk, and where a new run may start from."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from calibri_lightning.calibration import (
    Layout,
    SiteOptions,
    check_model,
    fingerprint,
    read_calibration,
    weights_digest,
)
from calibri_lightning.errors import UserError

CALIBRATION = "calibration.json"
KEY = "calibri_lightning"
"""Where our own part of a checkpoint stands."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and says in one sentence why one cannot be written or read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; the one that was there before stays until the new one is on the disk.

        Args:
            checkpoint: Its content.
            path: Where to write.
            storage_options: Unused.

        Raises:
            UserError: If the disk is full or the folder cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                stream.write(buffer.getvalue())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"The checkpoint cannot be written to {target} ({error.strerror or error}). Free space, or choose "
                "another folder with --trainer.default_root_dir; a checkpoint that was there before is untouched."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; nothing is ever unpickled.

        Args:
            path: The file.
            map_location: Where its tensors go; the CPU by default.
            weights_only: Unused: anything but tensors and plain values is refused.

        Returns:
            Its content.

        Raises:
            UserError: If there is no such file, or it is no checkpoint of this package.
        """
        check_exists(path)
        if "://" not in str(path) and not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is no checkpoint, or it is cut short. --ckpt_path takes the checkpoints/last.ckpt of a run; a "
                "calibration.json goes to --model.init_from."
            )
        try:
            found = super().load_checkpoint(path, map_location or _to_cpu, weights_only=True)
        except Exception as error:  # a damaged file surfaces as one of many classes of torch and zipfile
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"The checkpoint {path} cannot be read ({type(error).__name__}: {reason[0][:200]}). It is damaged or "
                "something else: use another checkpoint, or start again with --model.init_from RUN/calibration.json."
            ) from error
        if not isinstance(found, dict) or KEY not in found or "state_dict" not in found:
            raise UserError(
                f"{path} is no checkpoint of calibri_lightning. Give the last.ckpt of a run; a calibration.json goes "
                "to --model.init_from."
            )
        return found


def _to_cpu(storage: Any, location: str) -> Any:
    return storage


def check_exists(path: Any) -> None:
    """Refuses a checkpoint that is not there, early enough to save the loading of a model.

    Args:
        path: A path; Lightning's words "best", "last", "hpc" and "registry" and remote paths pass.

    Raises:
        UserError: If there is no such file.
    """
    text = str(path)
    named = text in ("best", "last", "hpc") or text.startswith("registry") or "://" in text
    if not named and not Path(text).is_file():
        raise UserError(
            f"There is no checkpoint {text}. --ckpt_path takes the checkpoints/last.ckpt of a run's folder."
        )


class RunCheckpoint(ModelCheckpoint):
    """Writes checkpoints/last.ckpt after every generation, and again after a validation: neither is repeated."""

    def __init__(self) -> None:
        super().__init__(filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False)

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return Path(str(self.dirpath)) / "last.ckpt"

    def save(self, trainer: Any) -> None:
        """Writes the checkpoint.

        Args:
            trainer: The trainer.
        """
        # When saving, this means "not the weights alone"; for reading see `CheckpointFiles`.
        trainer.save_checkpoint(self.path, weights_only=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the checkpoint again, which now knows the best vector.

        Args:
            trainer: The trainer.
            pl_module: Unused.
        """
        if trainer.state.fn == "fit":
            self.save(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Forgets what the resumed run had written: its files are not ours to remove.

        Args:
            state_dict: Unused.
        """


def run_checkpoint(trainer: Any) -> RunCheckpoint | None:
    """Finds the callback that writes last.ckpt.

    Args:
        trainer: The trainer.

    Returns:
        The callback; None where checkpoints are turned off.
    """
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None)


class ResumeHint(Callback):
    """Knows, after a run was cut off, how to go on."""

    def __init__(self) -> None:
        self.interrupted = False
        self.text = ""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Notes what happened and where the last checkpoint is.

        Args:
            trainer: The trainer.
            pl_module: Unused.
            exception: What ended the run.
        """
        self.interrupted = isinstance(exception, KeyboardInterrupt)
        checkpoint = run_checkpoint(trainer)
        if trainer.state.fn != "fit" or not trainer.is_global_zero or checkpoint is None:
            return
        if checkpoint.path.is_file():
            self.text = f"To go on from the last finished generation, add --ckpt_path {checkpoint.path}"

    def print(self) -> None:
        """Prints it, if there is something to go on from."""
        if self.text:
            print(self.text, file=sys.stderr)


def describe(module: nn.Module, layout: Layout, transformer: nn.Module) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that loads it.

    Args:
        module: The module.
        layout: The meaning of theta.
        transformer: The model.

    Returns:
        Plain values.
    """
    made = fingerprint(transformer)
    return {
        "model": [made.transformer_class, made.num_parameters, made.sites_hash],
        "weights": weights_digest(transformer),
        "parameters": list(layout.names),
        "site_options": asdict(layout.site_options),
        "trained": {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad},
    }


def require_same(here: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Checks that a checkpoint is of the model and of the parameters of this run.

    Non-strict loading would hide a missing tensor, and two layouts may have equally many parameters.

    Args:
        here: What `describe` says of this run.
        checkpoint: The checkpoint.

    Raises:
        UserError: If it is not.
    """
    there = dict(checkpoint[KEY]["describes"])
    held = {name: list(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    details = []
    if there["model"] != here["model"]:
        details.append(f"its model is another {there['model'][0]}, of {there['model'][1]:,} parameters")
    elif there["weights"] != here["weights"]:
        details.append("its model has other weights than this one")
    if there["parameters"] != here["parameters"]:
        odd = sorted(set(there["parameters"]) ^ set(here["parameters"])) or ["their order"]
        details.append(
            f"it has {len(there['parameters'])} parameters and this run {len(here['parameters'])}, which differ, "
            f"for example, in {odd[0]}"
        )
    elif there.get("site_options", asdict(SiteOptions())) != here["site_options"]:
        details.append("its scales of whole blocks act on other sites (cross_attention, split_fused)")
    elif held != here["trained"]:
        odd = sorted(name for name in held.keys() | here["trained"] if held.get(name) != here["trained"].get(name))
        details.append(f"{odd[0]} is absent or of another shape")
    if details:
        raise UserError(
            f"The checkpoint does not fit this run: {'; '.join(details)}. --ckpt_path takes a run's own model, "
            "granularity, members, weight_mode and site options: restore its config.yaml, or start a new run with "
            "--model.init_from."
        )


def keep_trainable(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops the frozen base from a state dict.

    Args:
        module: The module.
        state: Its state dict.

    Returns:
        The trainable part.
    """
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in names}


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
    other = [f"granularity {file.granularity}"] if file.granularity != layout.granularity else []
    if file.weight_mode != layout.weight_mode:
        other.append(f"weight_mode {file.weight_mode}")
    elif file.weight_mode == "fixed" and file.members != layout.members:
        other.append("fixed weights " + ", ".join(f"{member.weight:g}" for member in file.members))
    if file.site_options != layout.site_options:
        flags = asdict(file.site_options).items()
        other.append(", ".join(f"{name} {str(value).lower()}" for name, value in flags))
    if other:
        raise UserError(
            f"init_from {source} was made with {' and '.join(other)}; this run has granularity {layout.granularity}, "
            f"weight_mode {layout.weight_mode} and weights {', '.join(f'{m.weight:g}' for m in layout.members)}. "
            "Set model.calibration as it was."
        )
    if values.keys() != set(layout.names):
        odd = sorted(values.keys() ^ set(layout.names))
        raise UserError(
            f"init_from {source} has {len(values)} parameters (granularity {file.granularity}, {len(file.members)} "
            f"member(s), weight_mode {file.weight_mode}); this run has {layout.num_parameters}, and they differ, for "
            f"example, in {odd[0]}. Set model.calibration to the same granularity, members and weight_mode."
        )
    return np.array([values[name] for name in layout.names], dtype=np.float64)
