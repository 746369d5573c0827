"""What numpy arrays hold, for annotations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
"""Parameters, rewards and scores: all float64."""
Cells = NDArray[np.bool_]
"""Which cells of a matrix of candidates and prompts are meant."""
ROUNDING = 2 * float(np.finfo(np.float32).eps)
"""Spread, relative to the size of scores, that float32 rounding alone can cause: rewards are float32."""


def means(values: Floats, axis: int | None = None) -> Floats:
    """Means of what is finite.

    Args:
        values: Any shape.
        axis: Over which axis; over all by default.

    Returns:
        The means; NaN where nothing is finite.
    """
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
