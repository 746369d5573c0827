"""The pictures of a study, one row each, as a CSV that grows prompt by prompt: the evidence, and where to go on.

A study that was cut off finds the prompts that it had finished and draws the others. Numbers are written so that
reading them gives the same float64.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibri_lightning.arrays import Floats
from calibri_lightning.atomic import replacing
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt

PICTURES, REQUEST = "pictures.csv", "study.json"
_PROMPT = ("prompt", "text", "negative", "seed")
_Key = tuple[int, str, str, int]
LEAST_PROMPTS = 12
"""Fewer make a bootstrap's intervals far too narrow: a resample of n has only n values to draw from."""
DISTANCE = "distance"
"""Name of the values that are no reward: how far a picture is from the reference."""


@dataclass(frozen=True)
class Scores:
    """What a study knows of its pictures: K rows (conditions) by P prompts."""

    values: Mapping[str, Floats]
    """float64 [K, P] of every reward, and of `DISTANCE`; NaN where a picture or reward failed."""
    clusters: tuple[int, ...]
    """Which prompts have one text: their pictures are not independent."""

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the rewards."""
        return tuple(name for name in self.values if name != DISTANCE)


class PictureLog:
    """Reads and extends the CSV of one study.

    Args:
        folder: The study's folder; it exists.
        columns: What names a row: "site" and "level", for example.
        rows: The K rows of every prompt, each with one text for each of the columns.
        values: Names of the numbers of a picture.
        request: All that the numbers depend on, as plain values for JSON; a study that goes on must find it unchanged.

    Raises:
        UserError: If the folder holds another study.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        values: Sequence[str],
        request: Mapping[str, object],
    ) -> None:
        self.path = folder / PICTURES
        self._columns, self._rows, self._values = tuple(columns), [tuple(row) for row in rows], tuple(values)
        self._header = [*_PROMPT, *columns, *values]
        self._done: dict[_Key, Floats] = {}
        text = json.dumps({**request, "rows": self._rows, "values": self._values}, indent=1)
        described = folder / REQUEST
        if not described.is_file():
            if self.path.exists():
                raise UserError(f"{folder} holds a {PICTURES} without its {REQUEST}. Give another folder with --out.")
            with replacing(described) as temporary:
                temporary.write_text(text, encoding="utf-8")
        elif described.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder} holds another study: other rows, rewards, model, calibration or steps ({REQUEST} there says "
                "which). A study goes on only as it began. Give another folder with --out."
            )
        self._read()

    def knows(self, prompt: Prompt, seed: int) -> bool:
        """Says whether the numbers of a prompt are known.

        Args:
            prompt: The prompt.
            seed: The seed of its noise.

        Returns:
            Whether they are.
        """
        return _key(prompt, seed) in self._done

    def put(self, prompt: Prompt, seed: int, numbers: Mapping[str, Floats]) -> None:
        """Appends the rows of a prompt.

        Args:
            prompt: The prompt.
            seed: The seed of its noise.
            numbers: float64 [K] by name.

        Raises:
            UserError: If the file cannot be written.
        """
        block = np.stack([numbers[name] for name in self._values])
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(self._header)
                for row, own in zip(self._rows, block.T, strict=True):
                    writer.writerow([*_key(prompt, seed), *row, *(repr(float(number)) for number in own)])
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path} ({error.strerror or error}). Free space and run the command again: it goes "
                "on where it stopped."
            ) from error
        self._done[_key(prompt, seed)] = block

    def scores(self, asked: Sequence[tuple[Prompt, int]]) -> Scores:
        """Puts the numbers of prompts together.

        Args:
            asked: Prompts with their seeds, all of which are known.

        Returns:
            Their scores, in this order.
        """
        blocks = np.stack([self._done[_key(prompt, seed)] for prompt, seed in asked], axis=-1)
        texts = list(dict.fromkeys(prompt.text for prompt, _ in asked))
        clusters = tuple(texts.index(prompt.text) for prompt, _ in asked)
        return Scores(dict(zip(self._values, blocks, strict=True)), clusters)

    def _read(self) -> None:
        """Takes the finished prompts; what a kill left of the last one is cut off."""
        if not self.path.is_file():
            return
        text = self.path.read_bytes().decode(errors="replace")
        # A number may have been cut off in its middle, and be a number still.
        whole = text[: text.rfind("\n") + 1]
        lines = list(csv.reader(io.StringIO(whole, newline="")))
        count, start, kept = len(self._rows), len(_PROMPT), lines[:1]
        if not kept or kept[0] != self._header:
            kept = [self._header]
        for first in range(1, len(lines), count):
            part = lines[first : first + count]
            if len(part) < count or any(len(line) != len(self._header) for line in part):
                break
            if [tuple(line[start : start + len(self._columns)]) for line in part] != self._rows:
                raise UserError(
                    f"{self.path} was edited: its rows are not those of the study. Remove it, or restore it."
                )
            block = [[_number(cell) for cell in line[start + len(self._columns) :]] for line in part]
            index, prompt, negative, seed = part[0][:start]
            self._done[int(index), prompt, negative, int(seed)] = np.array(block, dtype=np.float64).T
            kept += part
        if len(kept) < len(lines) or whole != text:
            with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(kept)


def _key(prompt: Prompt, seed: int) -> _Key:
    return prompt.index, prompt.text, prompt.negative, seed


def few_prompts(count: int, what: str = "prompts") -> list[str]:
    """Warns of intervals that mean little.

    Args:
        count: Number of prompts of a condition.
        what: What is counted.

    Returns:
        A sentence; nothing where there are enough.
    """
    if count >= LEAST_PROMPTS:
        return []
    counted = what.replace("prompts", "prompt", 1) if count == 1 else what
    return [f"Only {count} {counted}: a bootstrap of fewer than {LEAST_PROMPTS} gives too narrow intervals. Take more."]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
