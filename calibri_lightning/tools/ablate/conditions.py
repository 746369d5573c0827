"""The conditions of an ablation: one part of the model at a time, at one level at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration import Granularity, Layout
from calibri_lightning.errors import UserError

_MOST, _NEAREST = 10.0, 0.01
"""Range of levels, and how near to 1 they may be."""
UNTOUCHED = "untouched"
"""Name of the first condition: the model that all others are compared with."""


@dataclass(frozen=True)
class Level:
    """One condition."""

    site: str
    """The part that is changed, as `Layout.scale_name` calls it; `UNTOUCHED` for the first condition."""
    level: float
    """Its output is multiplied by this: 0 removes it, 1 leaves it."""


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Checks the levels of a study.

    Args:
        levels: As given.

    Returns:
        The levels from the lowest up, to six digits, without 1, which is the untouched model.

    Raises:
        UserError: If one is out of range or next to 1, or there is none besides 1.
    """
    bad = next((level for level in levels if not abs(level) <= _MOST), None)
    if bad is not None:
        raise UserError(f"--levels has {bad:g}; each must be a number from -{_MOST:g} to {_MOST:g}, such as 0 or 0.5.")
    kept = tuple(sorted({float(f"{level:g}") for level in levels} - {1.0}))
    near = next((level for level in kept if abs(level - 1) < _NEAREST), None)
    if near is not None:
        raise UserError(
            f"--levels has {near:g}, which is so near to 1 that rounding moves a picture as much. Keep at least "
            f"{_NEAREST:g} away from 1."
        )
    if not kept:
        raise UserError("--levels has nothing but 1, which leaves a part as it is. Give 0 to remove it, for example.")
    return kept


def conditions(layout: Layout, by: Granularity, levels: Sequence[float]) -> tuple[Level, ...]:
    """Lists the conditions of a study.

    Args:
        layout: A layout with all sites of the model.
        by: What is one part: a block, a layer of a block, or a gate (a site).
        levels: The levels of each part.

    Returns:
        The untouched model, and then every part in the model's order at every level.
    """
    parts = replace(layout, granularity=by).scale_names
    return (Level(UNTOUCHED, 1.0), *(Level(part, level) for part in parts for level in levels))


def ablated(layout: Layout, theta: Floats, by: Granularity, points: Sequence[Level]) -> Floats:
    """Makes the candidates of conditions: the scales of the part's sites, in all members, times the level.

    Args:
        layout: An unfolded layout: a scale for every site.
        theta: The untouched model, float64 [n].
        by: What is one part.
        points: The conditions.

    Returns:
        Candidates, float64 [K, n].
    """
    owners = _owners(layout, by)
    num_scales = len(layout.members) * len(owners)
    every = np.tile(theta, (len(points), 1))
    for row, point in zip(every, points, strict=True):
        row[:num_scales][np.tile(owners == point.site, len(layout.members))] *= point.level
    return every


def part_scales(layout: Layout, theta: Floats, by: Granularity) -> dict[str, float]:
    """Says what the levels of each part multiply.

    Args:
        layout: An unfolded layout: a scale for every site.
        theta: The untouched model, float64 [n].
        by: What is one part.

    Returns:
        By part, the root mean square of the scales of its sites in all members.
    """
    owners = _owners(layout, by)
    squares = theta[: len(layout.members) * len(owners)].reshape(len(layout.members), -1) ** 2
    return {part: float(np.sqrt(squares[:, owners == part].mean())) for part in dict.fromkeys(owners.tolist())}


def _owners(layout: Layout, by: Granularity) -> NDArray[np.str_]:
    """The part that each site belongs to."""
    parts = replace(layout, granularity=by)
    return np.array([parts.scale_name(site) for site in layout.sites])
