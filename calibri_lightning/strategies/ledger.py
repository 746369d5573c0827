"""The append-only record of a search, from which a killed run resumes without repeating finished work.

Two kinds of JSON lines in `<run>/ledger/`: `generations.jsonl` (rank 0: one line for each complete
generation) and `units.rank<r>.jsonl` (one line for each finished unit of cells). Each line is on disk (fsync)
before the search goes on. A line is only ever used again for the same task: a digest of the candidates,
prompts, noise seeds and sampling steps. A cell is its candidate, its slot and its reward; where rewards are normalised
among the pictures that compete (`model.normalise`), the single rewards follow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.search import FAILED


@dataclass(frozen=True)
class Recall:
    """What a ledger knows of one generation."""

    rewards: Floats
    """Rewards [K, S]: NaN = not recorded, `FAILED` = recorded as not finite (complete generations only)."""
    complete: bool
    """Whether the whole generation had been finished."""
    progress: float | None = None
    """Used share of the budget with which a complete generation was asked for."""
    parts: Floats | None = None
    """The single rewards [R, K, S] of what is recorded, where they were recorded: NaN = not, or not finite."""


@dataclass
class _Entry:
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    parts: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    complete: bool = False
    progress: float | None = None


def digest(*parts: bytes | str) -> str:
    """Digest of a sequence of byte strings and texts.

    Args:
        *parts: What to digest; the boundaries between parts count.

    Returns:
        SHA-256 in hexadecimal.
    """
    mixer = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        mixer.update(len(data).to_bytes(8, "big") + data)
    return mixer.hexdigest()


class Ledger:
    """Writes the lines of this rank and recalls those of an earlier run.

    Args:
        folder: Where the lines are kept.
        rank: This process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._generations = folder / "generations.jsonl"
        self._units = folder / f"units.rank{rank}.jsonl"
        self._rank = rank
        self._known: dict[tuple[int, str], _Entry] = {}

    def start(self) -> None:
        """Prepares an empty ledger; lines of an earlier run in the same folder are set aside, not deleted.

        Raises:
            UserError: If the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._mine():
                if path.exists() and path.stat().st_size:
                    number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.{n}").exists())
                    path.rename(path.with_name(f"{path.name}.{number}"))
                path.touch()
        except OSError as error:
            _cannot_write(self.folder, error)

    def resume(self, previous: Path | None = None) -> None:
        """Reads what an earlier run finished and prepares to append.

        Args:
            previous: Folder of the earlier run's ledger, where that is another one.

        Raises:
            UserError: If a line is damaged or the folder cannot be written.
        """
        for folder in dict.fromkeys((previous or self.folder, self.folder)):
            self._read(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._mine():
                _cut_torn_line(path)
        except OSError as error:
            _cannot_write(self.folder, error)

    def record_unit(
        self,
        generation: int,
        task: str,
        cells: Iterable[tuple[int, int]],
        rewards: Iterable[float],
        parts: Floats | None = None,
    ) -> None:
        """Appends a finished unit.

        Args:
            generation: Number of the generation.
            task: Digest of what was evaluated.
            cells: (candidate, slot) of each picture.
            rewards: Reward of each.
            parts: Single rewards of each [R, B], where the reward of a picture depends on those of others.

        Raises:
            UserError: If the line cannot be written.
        """
        line = {"generation": generation, "task": task, "cells": _encode(cells, rewards, parts)}
        _append(self._units, line)

    def record_generation(
        self, generation: int, task: str, progress: float, rewards: Floats, parts: Floats | None = None
    ) -> None:
        """Appends a complete generation.

        Args:
            generation: Number of the generation.
            task: Digest of what was evaluated.
            progress: Used share of the budget with which it was asked for.
            rewards: Rewards [K, S]; NaN where a cell was not wanted.
            parts: Single rewards [R, K, S], where they are needed.

        Raises:
            UserError: If the line cannot be written.
        """
        where = np.argwhere(~np.isnan(rewards))
        cells = [(int(k), int(s)) for k, s in where]
        line = {"generation": generation, "task": task, "progress": progress}
        own = None if parts is None else parts[:, where[:, 0], where[:, 1]]
        _append(self._generations, {**line, "cells": _encode(cells, [rewards[cell] for cell in cells], own)})

    def recall(self, generation: int, task: str, shape: tuple[int, int], num_parts: int | None = None) -> Recall:
        """What is known of a generation.

        Args:
            generation: Number of the generation.
            task: Digest of what is to be evaluated.
            shape: (K, S).
            num_parts: Single rewards R of a picture, where they are needed.

        Returns:
            Its rewards so far, all NaN where nothing is known.
        """
        entry = self._known.get((generation, task), _Entry())
        rewards = np.full(shape, np.nan)
        parts = None
        if num_parts is not None:
            parts = np.full((num_parts, *shape), np.nan)
            for (k, s), values in entry.parts.items():
                parts[:, k, s] = values
        for cell, reward in entry.cells.items():
            # A failed picture of an unfinished generation is simply made again.
            rewards[cell] = reward if entry.complete or np.isfinite(reward) else np.nan
        return Recall(rewards, entry.complete, entry.progress, parts)

    def _mine(self) -> tuple[Path, ...]:
        return (self._generations, self._units) if self._rank == 0 else (self._units,)

    def _read(self, folder: Path) -> None:
        for path in (*sorted(folder.glob("units.rank*.jsonl")), folder / self._generations.name):
            for number, line in _lines(path):
                try:
                    entry = self._known.setdefault((line["generation"], line["task"]), _Entry())
                    cells = {(k, s): FAILED if r is None else float(r) for k, s, r, *_ in line["cells"]}
                    parts = {(k, s): [np.nan if p is None else float(p) for p in ps] for k, s, _, *ps in line["cells"]}
                    if "progress" in line:
                        entry.complete, entry.progress, entry.cells = True, float(line["progress"]), {}
                    entry.cells.update(cells)
                    entry.parts.update({cell: values for cell, values in parts.items() if values})
                except (KeyError, TypeError, ValueError) as error:
                    raise _damaged(path, number) from error


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        # A line without its end was cut by a kill; what it tells is lost, which costs one unit.
        if not line.endswith(b"\n"):
            return
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise _damaged(path, number) from error


def _damaged(path: Path, number: int) -> UserError:
    return UserError(
        f"{path} has an unreadable line {number}; each line must be as this program wrote it. "
        "Remove that line (its pictures are then made again) or resume without the file."
    )


def _encode(
    cells: Iterable[tuple[int, int]], rewards: Iterable[float], parts: Floats | None = None
) -> list[list[int | float | None]]:
    pairs: Sequence[tuple[tuple[int, int], float]] = list(zip(cells, rewards, strict=True))
    rows = np.empty((len(pairs), 0)) if parts is None else parts.T
    numbers = [[r, *row] for (_, r), row in zip(pairs, rows, strict=True)]
    return [
        [int(k), int(s), *(float(x) if np.isfinite(x) else None for x in own)]
        for ((k, s), _), own in zip(pairs, numbers, strict=True)
    ]


def _append(path: Path, line: dict[str, object]) -> None:
    data = (json.dumps(line, allow_nan=False) + "\n").encode()
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _cannot_write(path, error)


def _cut_torn_line(path: Path) -> None:
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    raise UserError(
        f"{path} cannot be written ({error.strerror or error}); the search records each finished unit there. "
        "Free some space or choose a writable folder, then resume from the last checkpoint: nothing "
        "finished is lost."
    ) from error
