"""Puts a report where it was asked for, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calibri_lightning.errors import UserError
from calibri_lightning.tools.compare.comparison import Comparison
from calibri_lightning.tools.compare.page import render_page
from calibri_lightning.tools.compare.plots import draw_plots
from calibri_lightning.tools.compare.tables import to_csv, to_json

PAGE, TABLE, NUMBERS = "report.html", "comparison.csv", "comparison.json"


def write_report(folder: Path, comparison: Comparison) -> tuple[Path, ...]:
    """Writes the page, the table, the numbers and the plots.

    Args:
        folder: The report's folder. It must not exist, or be empty.
        comparison: What to write.

    Returns:
        The files, the page first.

    Raises:
        UserError: If the folder cannot be written, or holds something.
    """
    with new_folder(folder) as temporary:
        plots = draw_plots(temporary, comparison)
        (temporary / PAGE).write_text(render_page(comparison, plots), encoding="utf-8")
        (temporary / TABLE).write_text(to_csv(comparison), encoding="utf-8")
        (temporary / NUMBERS).write_text(to_json(comparison), encoding="utf-8")
    return tuple(folder / name for name in (PAGE, TABLE, NUMBERS, *(plot.path.name for plot in plots)))


def check_free(folder: Path) -> None:
    """Checks before hours of drawing that a report can be written.

    Args:
        folder: The report's folder.

    Raises:
        UserError: If it holds something, or cannot be made.
    """
    with new_folder(folder, keep=False):
        pass


@contextmanager
def new_folder(folder: Path, keep: bool = True) -> Iterator[Path]:
    """Lets a folder be filled beside its place and puts it there in one step.

    Args:
        folder: The folder. It must not exist, or be empty.
        keep: Whether it is put there; else this only tries.

    Yields:
        Where to write. After an error nothing is left.

    Raises:
        UserError: If the folder cannot be written, or holds something.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--out is {folder}, a link to nothing. Name a new folder, or remove the link.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out is {folder}, which exists and is not empty. Name a new folder, or remove that one.")
    # An empty folder is filled: it may be a mount, or where the user stands, and cannot be replaced.
    is_there = folder.is_dir()
    above = [parent for parent in folder.parents if not parent.exists()]
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder if is_there else folder.parent
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=place))
        yield temporary
        if keep and is_there:
            _move_content(temporary, folder)
        elif keep:
            temporary.chmod(0o755)  # mkdtemp's own mode is for its maker alone
            os.replace(temporary, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in above:  # those that hold something now stay
            with suppress(OSError):
                parent.rmdir()


def _move_content(source: Path, to: Path) -> None:
    moved: list[Path] = []
    try:
        for path in sorted(source.iterdir(), key=lambda path: path.name == PAGE):  # what shows the others comes last
            os.replace(path, to / path.name)
            moved.append(to / path.name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The report cannot be written to {folder} ({error.strerror or error}). Free space, or name another folder "
        "with --out."
    )
