"""Where a run that is started again goes on: `--ckpt_path auto`, and restarts by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from calibri_lightning.checkpoint import LAST, PREVIOUS, is_whole
from calibri_lightning.ranks import LAUNCH

AUTO = "auto"
"""Value of --ckpt_path: the newest whole checkpoint of the run's name; a fresh start where there is none."""


LAUNCH_FILE = "launch.txt"
"""File of a run's folder with the name of the launch that made it, where torchrun did."""


def record_launch(folder: Path) -> None:
    """Notes which launch makes a run, so that a restart of the same launch finds it.

    Args:
        folder: The run's folder.
    """
    launch = os.environ.get(LAUNCH)
    if launch is not None:
        (folder / LAUNCH_FILE).write_text(f"{launch}\n", encoding="utf-8")


def newest_checkpoint(folder: Path, launch: str | None = None) -> Path | None:
    """Finds the newest whole checkpoint among the attempts of a run.

    All ranks find the same one: an attempt writes its first checkpoint after a training step, in which all ranks take
    part, so none is still looking.

    Args:
        folder: Folder of the attempts (version_0, version_1 ...), or of the only one, where nothing numbers them.
        launch: Look only at attempts of the launch of this name.

    Returns:
        The checkpoint; None where no attempt got so far.
    """
    return next((path for path in _checkpoints(folder, launch) if path.is_file() and is_whole(path)), None)


def _checkpoints(folder: Path, launch: str | None) -> Iterator[Path]:
    """Checkpoints that may be there, the newest first."""
    attempts = [path for path in folder.glob("version_*") if path.name.removeprefix("version_").isdecimal()]
    attempts.sort(key=lambda path: int(path.name.removeprefix("version_")), reverse=True)
    for attempt in (*attempts, folder):
        note = attempt / LAUNCH_FILE
        if launch is None or (note.is_file() and note.read_text(encoding="utf-8").strip() == launch):
            for name in (LAST, PREVIOUS):
                yield attempt / "checkpoints" / name
