"""What finished runs left behind: validation scores over what training had cost, and their tests."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.files import from_json
from calibri_lightning.evaluation.summary import Summary

Floats = NDArray[np.float64]
Row = Mapping[str, str]

CURRENT, AVERAGES = ("mean", "policy"), ("tail", "ema")
"""What strategies call where they are, and the moving average of that."""


@dataclass(frozen=True)
class Curve:
    """Validation scores of one kind over what training had cost by then."""

    images: Floats
    """Training pictures."""
    forwards: Floats
    """Forwards of one row in training; a backward counts as one more."""
    scores: Floats


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    label: str
    folder: Path
    current: Curve
    """Where the run was: the search's mean, or the policy; from its start on."""
    average: Curve
    """The moving average of that."""
    images: float
    """Training pictures of the whole run."""
    forwards: float
    """Training forwards of the whole run."""
    summary: Summary | None
    """Its test; None if it was not tested."""

    @property
    def start(self) -> float:
        """Validation score of what the run started from."""
        return float(self.current.scores[0])


def read_run(label: str, folder: Path) -> Run:
    """Reads metrics.csv and summary.json of a run.

    Args:
        label: What to call it.
        folder: Its folder, which holds both.

    Returns:
        The run.

    Raises:
        UserError: If there are no metrics, or no validation of the start.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{label}: {path} does not exist. Give the folder of a run, such as runs/name/version_0.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row.get("train/images")]
    starts = [float(row["val/start"]) for row in rows if row.get("val/start")]
    if not trained or not starts:
        raise UserError(f"{label}: {path} has no training step or no val/start. The run needs data.val, and to go on.")
    images, forwards = training_costs(label, trained)
    done = np.cumsum([bool(row.get("train/images")) for row in rows])
    costs = [np.concatenate([[0.0], column]) for column in (images, forwards)]

    def curve(names: Sequence[str], first: Sequence[float]) -> Curve:
        # A validation belongs to the training step that was logged last before it.
        found = [(done[i], float(row[f"val/{n}"])) for i, row in enumerate(rows) for n in names if row.get(f"val/{n}")]
        steps = [0] * len(first) + [int(step) for step, _ in found]
        scores = np.array([*first, *(score for _, score in found)])
        return Curve(costs[0][steps], costs[1][steps], scores)

    summary = folder / "summary.json"
    return Run(
        label,
        folder,
        curve(CURRENT, starts[:1]),
        curve(AVERAGES, ()),
        float(images[-1]),
        float(forwards[-1]),
        from_json(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    )


def training_costs(label: str, rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """Takes validation out of a run's budget.

    `train/images` counts training pictures alone. `budget/*` counts those of validations, too, in the first step that
    is logged after them: there the forwards are taken to be as many a training picture as in the nearest other step.

    Args:
        label: Name of the run.
        rows: The metrics of each training step.

    Returns:
        Training pictures and training forwards up to the end of each step.

    Raises:
        UserError: If every step follows a validation.
    """
    trained, spent, forwards = (
        np.diff([float(row[name]) for row in rows], prepend=0.0)
        for name in ("train/images", "budget/images", "budget/forwards")
    )
    # Numbers are logged in float32.
    clean = np.flatnonzero((trained > 0) & (np.abs(spent - trained) <= 1e-6 * np.cumsum(spent) + 0.5))
    if not len(clean):
        raise UserError(
            f"{label}: every step follows a validation, so that what training alone cost in forwards is unknown. "
            "Validate less often (trainer.val_check_interval)."
        )
    per_image = forwards[clean] / trained[clean]
    nearest = np.abs(np.arange(len(rows))[:, None] - clean).argmin(axis=1)
    return np.cumsum(trained), np.cumsum(trained * per_image[nearest])


def over_seeds(curves: Sequence[Curve]) -> list[Curve]:
    """Averages runs that were validated at the same cost; others stay apart.

    Args:
        curves: One or more.

    Returns:
        Their mean, or all of them.
    """
    first = curves[0]
    if any(not np.array_equal(first.images, curve.images) for curve in curves):
        return list(curves)
    forwards, scores = (np.mean([getattr(curve, name) for curve in curves], axis=0) for name in ("forwards", "scores"))
    return [Curve(first.images, forwards, scores)]
