"""What a run leaves in its folder, read back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def last(path: Path) -> Path:
    """Where the checkpoint of a run is."""
    return path / "checkpoints" / "last.ckpt"


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(last(path), weights_only=True)


def column(path: Path, name: str) -> list[float]:
    """A number over the generations that logged it."""
    with (path / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def pictures(path: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((path / "images").glob("*.png"))}
