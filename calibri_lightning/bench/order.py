"""Do candidates keep their order at a lower precision? A search sees nothing of the rewards but their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from calibri_lightning.bench.loops import Floats
from calibri_lightning.bench.precision import Setting
from calibri_lightning.bench.workbench import Workbench

NUM_CANDIDATES = 64
REFERENCE = Setting("float32")


@dataclass(frozen=True)
class OrderCheck:
    """How a setting ranks candidates."""

    setting: str
    num_candidates: int
    spearman: float
    """Rank correlation of the candidates' mean rewards with those in float32."""


def check_order(bench: Workbench, settings: Sequence[Setting]) -> tuple[OrderCheck, ...]:
    """Ranks the same candidates in float32 and otherwise.

    Args:
        bench: Models and work.
        settings: Settings to compare with eager float32.

    Returns:
        A check of each that is not the reference itself.
    """
    job = bench.job(NUM_CANDIDATES)
    reference = bench.batched(REFERENCE)(job).mean(axis=1)
    return tuple(
        OrderCheck(setting.name, NUM_CANDIDATES, spearman(reference, bench.batched(setting)(job).mean(axis=1)))
        for setting in settings
        if setting != REFERENCE
    )


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation of two series.

    Args:
        a: [K].
        b: [K].

    Returns:
        Spearman's rho.
    """
    return float(spearmanr(np.asarray(a), np.asarray(b)).statistic)
