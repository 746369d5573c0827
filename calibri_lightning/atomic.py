"""Writes files and folders whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lets a file be written beside its place and puts it there: a reader sees the old file or the new one, whole.

    Args:
        path: The file; its folder exists.

    Yields:
        Where to write. After an error the old file is untouched and nothing half-written is left.

    Raises:
        OSError: If the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def keep_copy(path: Path, copy: Path) -> None:
    """Gives a file's present content a second name, whatever is put in its place later.

    Args:
        path: The file; where there is none, nothing happens.
        copy: The second name, in the same folder; an older file of that name is replaced.

    Raises:
        OSError: If it cannot be written.
    """
    if not path.is_file():
        return
    with replacing(copy) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # not every file system knows hard links
            shutil.copyfile(path, temporary)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system knows how to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Lets a new folder be filled beside its place and puts it there: it appears whole, or not at all.

    Args:
        folder: The folder; nothing of that name exists. Folders above it are made.

    Yields:
        Where to write. After an error nothing half-written is left, and none of the folders above it that were made.

    Raises:
        FileExistsError: If there is something of that name already.
        OSError: If the folder cannot be made.
    """
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    above = [parent for parent in folder.parents if not parent.exists()]
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (path for path in temporary.rglob("*") if path.is_file()):
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in above:
            # Another process may have put something there.
            with suppress(OSError):
                parent.rmdir()
        raise
    _sync_folder(folder.parent)
