"""The table of block classes: one file for each way in which models gate their branches.

Read off the sources of diffusers 0.42.1. Importing this package fills `calibration.sites.BLOCKS`.
"""

from __future__ import annotations

from calibri_lightning.calibration.tables import (
    block_tables,
    modulation_chunks,
    norm_tuples,
    passed_over,
    post_norms,
    shared_modulation,
    ungated,
)

__all__ = [
    "block_tables",
    "modulation_chunks",
    "norm_tuples",
    "passed_over",
    "post_norms",
    "shared_modulation",
    "ungated",
]
