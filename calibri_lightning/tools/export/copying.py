"""Copies of files that others get: configurations without the paths of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_NAMES = ("_name_or_path", "base_model_name_or_path")
"""Where configurations say which model they are of."""


def public_name(pretrained: str) -> str:
    """Names a model as others may see it.

    Args:
        pretrained: A folder, a Hub id, or "shapes".

    Returns:
        The last part of a folder's path; all else as it is.
    """
    path = Path(pretrained)
    local = path.is_dir() or path.is_absolute() or pretrained.startswith((".", "~"))
    return path.name if local else pretrained


def copy_public(source: str | Path, to: str | Path) -> str:
    """Copies a file, and not its rights: a cache is read-only.

    Args:
        source: The file.
        to: The copy.

    Returns:
        The copy, as `shutil.copytree` wants to hear. It is the file byte for byte, unless it is a configuration that
        names a folder of this machine: of that, the last part alone.

    Raises:
        OSError: If it cannot be copied.
    """
    source, to = Path(source), Path(to)
    cleaned = _without_paths(source) if source.suffix == ".json" else None
    if cleaned is None:
        shutil.copyfile(source, to)
    else:
        to.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(to)


def _without_paths(source: Path) -> dict[str, Any] | None:
    """A configuration without paths; None where it has none, or is something else."""
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    names = {key: document[key] for key in _NAMES if isinstance(document.get(key), str)}
    public = {key: public_name(name) for key, name in names.items()}
    return None if public == names else document | public
