"""Prompts: where they come from, and which of them a training step sees.

`draw_prompts` is a pure function of (seed, step): no sampler holds state, so a resumed run, another number of
ranks or a skipped validation cannot change which prompts a step gets.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.errors import UserError
from calibri_lightning.prompt_files import FORMATS, read_hf, read_rows

Duplicates = Literal["error", "keep", "drop"]

TEXT_COLUMNS: tuple[str, ...] = ("prompt", "caption", "text")
"""Columns that can hold the prompt; the first one that is there is taken."""

NEGATIVE_COLUMNS: tuple[str, ...] = ("negative", "negative_prompt")
"""Columns that can hold the negative prompt."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a source.

    Attributes:
        text: What the picture should show.
        index: Its row in the source, from 0. It seeds the noise, so two equal texts on different rows get
            different pictures, and dropping a duplicate changes no other prompt's pictures.
        metadata: The other columns of its row, for rewards that need structure.
        negative: What members with the negative prompt see.
    """

    text: str
    index: int
    metadata: Mapping[str, object] = field(default_factory=dict)
    negative: str = ""


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one step.

    Attributes:
        step: The training step from 0, or -1 for validation, -2 for test, -3 for predict.
        prompts: The prompts; a training batch larger than what is left of an epoch can hold one twice.
    """

    step: int
    prompts: tuple[Prompt, ...]

    @property
    def occurrences(self) -> tuple[int, ...]:
        """How often each prompt stood in the batch before: as sample index, it keeps their noise apart."""
        seen: Counter[int] = Counter()
        numbers = []
        for prompt in self.prompts:
            numbers.append(seen[prompt.index])
            seen[prompt.index] += 1
        return tuple(numbers)


def read_prompts(source: str, duplicates: Duplicates = "error") -> tuple[Prompt, ...]:
    """Read the prompts of a source.

    In tables (json, jsonl, csv, parquet, hf) the prompt is the column "prompt", "caption" or "text", the
    negative prompt "negative" or "negative_prompt", and all other columns become metadata.

    Args:
        source: A path (.txt with one prompt a line, .json, .jsonl, .csv, .parquet),
            "hf:dataset[:split[:column]]" or "shapes:train|val|test".
        duplicates: What to do with rows whose prompt and negative prompt stood on an earlier row: refuse
            them, keep them (each with its own noise), or drop all but the first.

    Returns:
        The prompts in the order of the source.

    Raises:
        UserError: When the source is missing, malformed or empty, or has blank or (by default) duplicate
            rows.
    """
    if duplicates not in get_args(Duplicates):
        raise UserError(f"duplicates={duplicates!r}: must be one of {', '.join(get_args(Duplicates))}.")
    if source.startswith("shapes:"):
        return _shapes(source)
    rows = read_hf(source) if source.startswith("hf:") else read_rows(Path(source).expanduser())
    if not rows:
        raise UserError(f"prompts source {source!r} holds no prompts; at least one is needed: add some.")
    prompts = tuple(_prompt(row, index, source) for index, row in enumerate(rows))
    if blank := [prompt.index for prompt in prompts if not prompt.text]:
        raise UserError(
            f"prompts source {source!r} has blank prompts ({places(source, blank)}); every row needs a text:"
            " delete or fill them."
        )
    return _without_duplicates(prompts, source, duplicates)


def check_source(source: str) -> None:
    """Refuse a source that cannot exist, without reading it: cheap enough to run before any model is loaded.

    Args:
        source: As for `read_prompts`.

    Raises:
        UserError: When the file is missing, or its suffix or the split of `shapes` unknown.
    """
    if source.startswith("shapes:"):
        _shapes_split(source)
    elif not source.startswith("hf:") and (
        Path(source).suffix.lower() not in FORMATS or not Path(source).expanduser().is_file()
    ):
        read_rows(Path(source).expanduser())  # says what is wrong


def place(source: str, index: int) -> str:
    """Name a row of a source as its reader would: "line 3" of a text file, "row 3" of a table.

    Args:
        source: As for `read_prompts`.
        index: The row, from 0.

    Returns:
        The name, counted from 1. Rows of a .csv are counted without the header.
    """
    return f"{_unit(source)} {index + 1}"


def places(source: str, indices: Sequence[int], most: int = 10) -> str:
    """Name several rows of a source: "lines 3, 7 and 12".

    Args:
        source: As for `read_prompts`.
        indices: The rows, from 0; at least one.
        most: How many to name before the rest are only counted.

    Returns:
        Their names.
    """
    if len(indices) == 1:
        return place(source, indices[0])
    return f"{_unit(source)}s {some([str(index + 1) for index in indices], most)}"


def some(items: Sequence[str], most: int = 10) -> str:
    """Join items to a phrase, counting what is too much to name: "a, b and 5 more".

    Args:
        items: The items.
        most: How many to name.

    Returns:
        The phrase.
    """
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


def draw_prompts(prompts: Sequence[Prompt], seed: int, step: int, count: int) -> tuple[Prompt, ...]:
    """Draw the prompts of one training step: a window into an endless sequence of shuffled epochs.

    Step t sees positions [t * count, (t + 1) * count) of the sequence; epoch e of it is a permutation of all
    prompts keyed by (seed, e). So no prompt repeats within an epoch, each comes equally often over it, and no
    step depends on which steps ran before.

    Args:
        prompts: All training prompts.
        seed: The seed of the shuffles.
        step: The step, from 0.
        count: How many prompts to draw.

    Returns:
        `count` prompts.

    Raises:
        UserError: When there are no prompts, count is below 1 or step below 0.
    """
    if not prompts or count < 1 or step < 0:
        raise UserError(
            f"cannot draw {count} of {len(prompts)} prompts for step {step}: there must be prompts, count"
            " must be at least 1 and step at least 0."
        )
    drawn = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, len(prompts))
        drawn.append(prompts[int(_permutation(len(prompts), seed, epoch)[offset])])
    return tuple(drawn)


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Hash the prompts that a run draws from, so that a resume with others is noticed.

    Args:
        prompts: The prompts.

    Returns:
        A sha256 over indices, texts, negative prompts and metadata, in hexadecimal.
    """
    rows = [[prompt.index, prompt.text, prompt.negative, dict(prompt.metadata)] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=repr).encode()).hexdigest()


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.intp]:
    # Sorting raw Philox words, not Generator.permutation: numpy promises the stream of a bit generator across
    # versions, but not that of Generator's methods (NEP 19).
    digest = hashlib.sha256(f"prompts:{seed}:{epoch}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(size)
    return np.argsort(words, kind="stable")


def _shapes_split(source: str) -> str:
    split = source.removeprefix("shapes:")
    if split not in ("train", "val", "test"):
        raise UserError(f"prompts source {source!r}: the form is 'shapes:train', 'shapes:val' or 'shapes:test'.")
    return split


def _shapes(source: str) -> tuple[Prompt, ...]:
    # Not at the top: captions imports Prompt from this file.
    from calibri_lightning.shapes.captions import Split, prompts

    splits: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
    return prompts(splits[_shapes_split(source)])


def _unit(source: str) -> str:
    return "line" if Path(source).suffix.lower() in (".txt", ".jsonl") and not source.startswith("hf:") else "row"


def _prompt(row: object, index: int, source: str) -> Prompt:
    where = f"prompts source {source!r}, {place(source, index)}"
    if isinstance(row, str):
        return Prompt(row.strip(), index)
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: {row!r:.60}; a row must be a string or an object with a prompt in it.")
    column = next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None:
        raise UserError(
            f"{where}: none of the columns {', '.join(TEXT_COLUMNS)} is there, only"
            f" {', '.join(map(str, row)) or 'none'}; name the column with the prompts 'prompt'."
        )
    negative_column = next((name for name in NEGATIVE_COLUMNS if name in row), None)
    negative = row[negative_column] if negative_column else None
    for name, value in ((column, row[column]), (negative_column, negative)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: column {name!r} holds {value!r}; it must be a text.")
    metadata = {str(key): value for key, value in row.items() if key not in (column, negative_column)}
    return Prompt((row[column] or "").strip(), index, metadata, (negative or "").strip())


def _without_duplicates(prompts: tuple[Prompt, ...], source: str, duplicates: Duplicates) -> tuple[Prompt, ...]:
    first: dict[tuple[str, str], int] = {}
    for prompt in prompts:
        first.setdefault((prompt.text, prompt.negative), prompt.index)
    repeats = [prompt for prompt in prompts if first[prompt.text, prompt.negative] != prompt.index]
    if repeats and duplicates == "error":
        named = [
            f"{place(source, p.index)} (as {place(source, first[p.text, p.negative])}: {p.text!r})" for p in repeats
        ]
        raise UserError(
            f"prompts source {source!r} repeats prompts: {some(named)}. Each prompt may stand once: remove"
            ' the repeats, or set duplicates to "drop", or to "keep" (a repeated prompt then counts more,'
            " each time with other noise)."
        )
    if duplicates == "drop":
        return tuple(prompt for prompt in prompts if first[prompt.text, prompt.negative] == prompt.index)
    return prompts
