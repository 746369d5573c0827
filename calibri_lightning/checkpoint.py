"""When a checkpoint is written, and how it reaches the disk and comes back."""

from __future__ import annotations

import io
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from calibri_lightning.atomic import keep_copy, replacing
from calibri_lightning.errors import UserError
from calibri_lightning.ranks import print_once
from calibri_lightning.resume import KEY

LAST = "last.ckpt"
"""The newest checkpoint of a run."""
PREVIOUS = "previous.ckpt"
"""The one before it, for the case that the newest turns out to be damaged."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, keeps the one before, and says why one cannot be written or read."""

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
                if target.name == LAST:
                    keep_copy(target, target.with_name(PREVIOUS))
        except OSError as error:
            raise UserError(
                f"The checkpoint cannot be written to {target} ({error.strerror or error}). Free space, or choose "
                "another folder with --trainer.default_root_dir; a checkpoint that was there before is untouched."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; nothing is ever unpickled. Where the newest of a run is damaged, the one before is read.

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
        try:
            return self._load(path, map_location)
        except UserError as error:
            previous = Path(str(path)).with_name(PREVIOUS)
            if Path(str(path)).name != LAST or not previous.is_file():
                raise
            found = None
            with suppress(UserError):
                found = self._load(previous, map_location)
            if found is None:
                raise
            print_once(f"warning: {error} The run goes on from {previous}, the checkpoint before it.")
            return found

    def _load(self, path: Any, map_location: Any) -> dict[str, Any]:
        if "://" not in str(path) and not is_whole(Path(path)):
            raise UserError(
                f"{path} is no checkpoint, or it is damaged or cut short. --ckpt_path takes the checkpoints/last.ckpt "
                "of a run; a calibration.json goes to --model.init_from."
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


def is_whole(path: Path) -> bool:
    """Compares a checkpoint with its checksums, which torch writes and does not look at again.

    Args:
        path: The file.

    Returns:
        False where it is damaged, cut short, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    # A damaged directory surfaces in many ways.
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, zlib.error):
        return False


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


class RunCheckpoint(Checkpoint):
    """Writes checkpoints/last.ckpt after every training step, and again after a validation: neither is repeated."""

    def __init__(self) -> None:
        self.path = Path()
        """Where the checkpoint is, once a stage has begun."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Finds the place.

        Args:
            trainer: The trainer.
            pl_module: Unused.
            stage: Unused.
        """
        # All ranks at once: the trainer broadcasts the folder whenever it is asked for.
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / LAST

    def save(self, trainer: Any) -> None:
        """Writes the checkpoint; all ranks call.

        Args:
            trainer: The trainer.
        """
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes the checkpoint of a finished training step.

        Args:
            trainer: The trainer.
            pl_module: Unused.
            outputs: Unused.
            batch: Unused.
            batch_idx: Unused.
        """
        self.save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the checkpoint again, which now knows the best vector.

        Args:
            trainer: The trainer.
            pl_module: Unused.
        """
        if trainer.state.fn == "fit":
            self.save(trainer)


def run_checkpoint(trainer: Any) -> RunCheckpoint | None:
    """Finds the callback that writes last.ckpt.

    Args:
        trainer: The trainer.

    Returns:
        The callback; None where checkpoints are turned off.
    """
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None)
