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
