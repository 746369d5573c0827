"""Where a run that is started again goes on: `--ckpt_path auto`, and restarts by torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from calibri_lightning.checkpoint import LAST, PREVIOUS, is_whole
from calibri_lightning.ranks import LAUNCH

AUTO = "auto"
"""Value of --ckpt_path: the newest whole checkpoint of the run's name; a fresh start where there is none."""


def record_attempt(root: Path, name: str, folder: Path) -> None:
    """Notes where an attempt of a run is, whatever logger chose the place; called on rank 0.

    Args:
        root: trainer.default_root_dir.
        name: The run's name.
        folder: The attempt's folder.
    """
    notes = _notes(root, name)
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"folder": str(folder.resolve()), "launch": os.environ.get(LAUNCH)}) + "\n")


def is_of_this_launch(root: Path, name: str, folder: Path) -> bool:
    """Tells whether an earlier start of the same launch by torchrun made a folder.

    Args:
        root: trainer.default_root_dir.
        name: The run's name.
        folder: The folder.

    Returns:
        True where it did.
    """
    launch = os.environ.get(LAUNCH)
    return launch is not None and folder.resolve() in _noted(root, name, launch)


def newest_checkpoint(root: Path, name: str, launch: str | None = None) -> Path | None:
    """Finds the newest whole checkpoint among the attempts of a run.

    All ranks find the same one: an attempt writes its first checkpoint after a training step, in which all ranks take
    part, so none is still looking.

    Args:
        root: trainer.default_root_dir.
        name: The run's name.
        launch: Look only at attempts of the launch of this name.

    Returns:
        The checkpoint; None where no attempt got so far.
    """
    folders = list(_noted(root, name, launch))
    if launch is None:
        # Runs that were copied here, or are of a version that took no notes.
        numbered = [path for path in (root / name).glob("version_*") if path.name.removeprefix("version_").isdecimal()]
        folders += sorted(numbered, key=lambda path: int(path.name.removeprefix("version_")), reverse=True)
    paths = (folder / "checkpoints" / file for folder in folders for file in (LAST, PREVIOUS))
    return next((path for path in paths if path.is_file() and is_whole(path)), None)


def _notes(root: Path, name: str) -> Path:
    return root / f"{name}.attempts.jsonl"


def _noted(root: Path, name: str, launch: str | None) -> Iterator[Path]:
    """Folders of the attempts, the newest first."""
    notes = _notes(root, name)
    if not notes.is_file():
        return
    for line in reversed(notes.read_text(encoding="utf-8").splitlines()):
        try:
            note = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        if launch is None or note["launch"] == launch:
            yield Path(note["folder"])
