"""Where a run that is started again goes on: `--ckpt_path auto`, and restarts by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from calibri_lightning.checkpoint import LAST, PREVIOUS, is_whole

AUTO = "auto"
"""Value of --ckpt_path: the newest whole checkpoint of the run's name; a fresh start where there is none."""


def is_restart() -> bool:
    """Whether torchrun started this process after an earlier one of the same launch had failed.

    Returns:
        True from the second start on.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def newest_checkpoint(folder: Path) -> Path | None:
    """Finds the newest whole checkpoint among the attempts of a run.

    All ranks find the same one: an attempt writes its first checkpoint after a training step, in which all ranks take
    part, so none is still looking.

    Args:
        folder: Folder of the attempts (version_0, version_1 ...), or of the only one, where nothing numbers them.

    Returns:
        The checkpoint; None where no attempt got so far.
    """
    return next((path for path in _checkpoints(folder) if path.is_file() and is_whole(path)), None)


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints that may be there, the newest first."""
    attempts = [path for path in folder.glob("version_*") if path.name.removeprefix("version_").isdecimal()]
    attempts.sort(key=lambda path: int(path.name.removeprefix("version_")), reverse=True)
    for attempt in (*attempts, folder):
        for name in (LAST, PREVIOUS):
            yield attempt / "checkpoints" / name
