"""`calibration.json`: the file that people share. Plain JSON, written atomically, checked in full when read."""

from __future__ import annotations

import json
from pathlib import Path

from calibri_lightning.atomic import replacing
from calibri_lightning.calibration.document import CalibrationFile, from_json, to_json
from calibri_lightning.errors import UserError

CALIBRATION = "calibration.json"
"""What a run calls it."""


def write_calibration(path: str | Path, file: CalibrationFile) -> None:
    """Writes a calibration atomically: a reader sees the old file or the new one, whole.

    Args:
        path: Where to write.
        file: What to write.

    Raises:
        UserError: If the folder is missing or cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            temporary.write_text(to_json(file), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The calibration cannot be written to {path}: {error.strerror or error}. The folder must exist, "
            "be writable and have space. Choose another place; a calibration that was there before is "
            "untouched."
        ) from error


def read_calibration(path: str | Path) -> CalibrationFile:
    """Reads and checks a calibration.

    Args:
        path: The file.

    Returns:
        The calibration.

    Raises:
        UserError: If the file is missing, not a calibration, of another version, cut short, or holds a bad
            value.
    """
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no calibration at {path}. Give the path of a calibration.json that a run wrote."
        ) from None
    except OSError as error:
        raise UserError(
            f"The calibration at {path} cannot be read: {error.strerror}. Give the path of a file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text, so not a calibration.json. Give the file that a run wrote."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. It was "
            "probably cut short or edited by hand. Copy or download it again."
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
