"""What numpy arrays hold, for annotations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
"""Parameters, rewards and scores: all float64."""
Cells = NDArray[np.bool_]
"""Which cells of a matrix of candidates and prompts are meant."""
