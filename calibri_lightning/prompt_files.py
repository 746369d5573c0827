"""Reads rows of prompts from files and Hugging Face datasets, without interpreting them.

A row is a string (the prompt) or a mapping with the prompt in one of its columns. Rows keep the order of the
source and none is left out, so that a row number can always be named to the user.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType

from calibri_lightning.errors import UserError


def read_rows(path: Path) -> list[object]:
    """Read all rows of a prompts file.

    Args:
        path: A file whose suffix is one of `FORMATS`.

    Returns:
        Its rows in order. A blank line inside a line format is an empty string; blank lines at the end are
        left out.

    Raises:
        UserError: When the suffix is unknown or the file is missing, unreadable, not UTF-8 or malformed.
    """
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(FORMATS)
        raise UserError(
            f"prompts file {str(path)!r}: the suffix must be one of {known}; rename or convert the file. "
            "Other sources are 'hf:dataset[:split[:column]]' and 'shapes:train|val|test'."
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"prompts file {str(path)!r} does not exist (looked in {Path.cwd()}); give the path of an existing file. "
            "docs/configs.md says where those of the shipped configurations come from."
        ) from None
    except OSError as error:
        raise UserError(f"prompts file {str(path)!r} cannot be read: {error.strerror}; give a readable file.") from None
    return reader(data, path)


def read_hf(source: str) -> list[object]:
    """Read the rows of a dataset of the Hugging Face Hub, or of a local dataset folder.

    Args:
        source: "hf:dataset", "hf:dataset:split" or "hf:dataset:split:column"; the split defaults to "train".
            Columns of pictures, sound or video are not read.

    Returns:
        One mapping a row; with a column named, it stands under "prompt".

    Raises:
        UserError: When `datasets` is not installed, the dataset cannot be loaded or the column is missing.
    """
    name, split, column = (source.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
    if not name:
        raise UserError(f"prompts source {source!r}: the form is 'hf:dataset[:split[:column]]'; name a dataset.")
    datasets = _optional("datasets", source)
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # The Hub client raises dozens of unrelated classes; the user needs the cause, not the trace.
        cause = " ".join(str(error).split())
        raise UserError(
            f"prompts source {source!r} cannot be loaded ({type(error).__name__}: {cause}); the form is "
            "'hf:dataset[:split[:column]]': check the name, the split and the connection."
        ) from error
    if column and column not in loaded.column_names:
        raise UserError(
            f"prompts source {source!r}: there is no column {column!r}; the columns are"
            f" {', '.join(loaded.column_names)}."
        )
    media = [key for key, kind in loaded.features.items() if type(kind).__name__ in {"Image", "Audio", "Video"}]
    rows = loaded.remove_columns(media)
    return [{**row, "prompt": row[column]} if column else dict(row) for row in rows]


def _optional(module: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"prompts source {source!r} needs the package {module.partition('.')[0]!r}, which is not"
            " installed: pip install 'calibri-lightning[data]'"
        ) from None


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")  # an editor's byte-order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompts file {str(path)!r}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; prompts"
            " files must be UTF-8: save the file again with that encoding."
        ) from None


def _lines(data: bytes, path: Path) -> list[str]:
    # Not str.splitlines: it also splits on form feeds and U+2028, and line numbers would then differ from an
    # editor's.
    lines = [line.strip() for line in _decode(data, path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read_txt(data: bytes, path: Path) -> list[object]:
    return list(_lines(data, path))


def _read_jsonl(data: bytes, path: Path) -> list[object]:
    rows: list[object] = []
    for number, line in enumerate(_lines(data, path), start=1):
        try:
            rows.append(json.loads(line) if line else "")
        except json.JSONDecodeError as error:
            raise UserError(
                f"prompts file {str(path)!r}, line {number}: not JSON ({error.msg} at column {error.colno});"
                ' every line must hold one JSON string or object, such as {"prompt": "a red circle"}.'
            ) from None
    return rows


def _read_json(data: bytes, path: Path) -> list[object]:
    text = _decode(data, path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"prompts file {str(path)!r}, line {error.lineno}: not JSON ({error.msg} at column"
            f" {error.colno}); the file must hold one list of strings or objects. One object a line is the"
            " format .jsonl."
        ) from None
    if not isinstance(rows, list):
        raise UserError(
            f"prompts file {str(path)!r} holds a JSON {type(rows).__name__}; it must hold one list of strings"
            " or objects."
        )
    return rows


def _read_csv(data: bytes, path: Path) -> list[object]:
    reader = csv.reader(io.StringIO(_decode(data, path), newline=""), strict=True)
    rows: list[object] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"prompts file {str(path)!r}, line {reader.line_num}: {len(cells)} cells under"
                    f" {len(header)} column names; every row needs one cell a column: put quotes around a"
                    " cell that holds a comma."
                )
            rows.append(dict(zip(header, cells, strict=True)) if cells else "")
    except csv.Error as error:
        raise UserError(
            f"prompts file {str(path)!r}, line {reader.line_num}: not CSV ({error}); check the quotes on that line."
        ) from None
    while rows and not rows[-1]:
        rows.pop()
    return rows


def _read_parquet(data: bytes, path: Path) -> list[object]:
    parquet = _optional("pyarrow.parquet", str(path))
    lib = _optional("pyarrow.lib", str(path))
    try:
        return list(parquet.read_table(io.BytesIO(data)).to_pylist())
    except lib.ArrowException as error:
        raise UserError(f"prompts file {str(path)!r} is not a parquet file ({error}); write it again.") from None


FORMATS: Mapping[str, Callable[[bytes, Path], list[object]]] = MappingProxyType(
    {
        ".txt": _read_txt,
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
)
"""The reader of each file suffix."""
