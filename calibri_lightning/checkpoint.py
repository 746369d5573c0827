"""When a checkpoint is written, how it reaches the disk and comes back, and how a run that was cut off goes on."""

from __future__ import annotations

import io
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from calibri_lightning.atomic import replacing
from calibri_lightning.errors import UserError
from calibri_lightning.resume import KEY


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
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                temporary.write_bytes(buffer.getvalue())
        except OSError as error:
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
    """Writes checkpoints/last.ckpt after every training step, and again after a validation: neither is repeated."""

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
        trainer.save_checkpoint(self.path, self.save_weights_only)

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
        self.exit_code: int | None = None
        """That of a run ended by a signal: 130 for Ctrl+C, 143 for SIGTERM, as shells and schedulers know them."""
        self.text = ""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Notes what happened and where the last checkpoint is.

        Args:
            trainer: The trainer.
            pl_module: The module; its strategy says what a step is called.
            exception: What ended the run.
        """
        if isinstance(exception, KeyboardInterrupt):
            self.exit_code = 128 + signal.SIGINT
        elif isinstance(exception, SIGTERMException):
            self.exit_code = 128 + signal.SIGTERM
        checkpoint = run_checkpoint(trainer)
        if trainer.state.fn != "fit" or not trainer.is_global_zero or checkpoint is None:
            return
        if checkpoint.path.is_file():
            step = pl_module.strategy.words.step
            self.text = f"To go on from the last finished {step}, add --ckpt_path {checkpoint.path}"

    def print(self) -> None:
        """Prints it, if there is something to go on from."""
        if self.text:
            print(self.text, file=sys.stderr)
