"""The grid candidate x prompt slot: its cells, the units they are cut into, and results between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.sampling.sharing import unit_sizes

_HEADER = 5
"""Numbers that travel before the values."""


class Cell(NamedTuple):
    """One picture of the grid."""

    candidate: int
    """Row of theta, 0 .. K - 1."""
    slot: int
    """Prompt and seed, 0 .. S - 1."""


@dataclass(frozen=True)
class UnitResult:
    """A finished unit."""

    index: int
    """Number of the unit."""
    num_units: int
    """Number of units of the whole request."""
    cells: tuple[Cell, ...]
    """Its pictures."""
    rewards: NDArray[np.float64]
    """Combined reward of each picture; NaN where it or the picture is not finite."""
    each: Mapping[str, NDArray[np.float64]]
    """The same for every single reward and extra metric."""


@dataclass(frozen=True)
class Evaluation:
    """The answer to a request, the same on every rank."""

    rewards: NDArray[np.float64]
    """Combined rewards [K, S]; NaN where not requested or not finite."""
    per_reward: Mapping[str, NDArray[np.float64]]
    """[K, S] of every single reward and extra metric; NaN also where a cell was known beforehand."""
    num_images: int
    """Pictures made, over all ranks."""
    num_forwards: int
    """Transformer forwards over all ranks, counted in rows (one picture, one member, one step)."""


def cut_units(cells: NDArray[np.bool_], cells_per_unit: int, balance_over: int = 1) -> tuple[tuple[Cell, ...], ...]:
    """Cuts the requested cells, slot by slot, into units.

    Slot-major order puts candidates of one prompt side by side: their prompt is encoded and moved once.

    Args:
        cells: Requested cells, bool [K, S].
        cells_per_unit: Most pictures of a unit.
        balance_over: Number of ranks among which they are to be shared evenly; see `sharing.unit_sizes`.

    Returns:
        The units.
    """
    ordered = [Cell(int(k), int(s)) for s, k in np.argwhere(cells.T)]
    ends = list(accumulate(unit_sizes(len(ordered), cells_per_unit, balance_over)))
    return tuple(tuple(ordered[start:end]) for start, end in pairwise([0, *ends]))


@dataclass
class Grid:
    """Results of one rank, or of all, as they travel: [1 + R, K, S] values and a few numbers."""

    values: NDArray[np.float64]
    """Combined reward, then every reward and extra metric; NaN where there is none."""
    names: tuple[str, ...]
    """Names of the rewards and extra metrics."""
    num_images: int = 0
    num_forwards: int = 0
    failed: bool = False
    """Whether scoring raised."""
    stop: int = 0
    """The signal that asked for a stop in the middle; 0 for none."""
    at_once: int = 0
    """Pictures that this rank can sample at once, of all ranks the fewest; 0 where nothing bounds them."""

    @classmethod
    def empty(cls, names: Sequence[str], shape: tuple[int, int]) -> Grid:
        """Makes a grid without results.

        Args:
            names: Names of the rewards and extra metrics.
            shape: K and S.

        Returns:
            The grid.
        """
        return cls(np.full((1 + len(names), *shape), np.nan), tuple(names))

    def put(self, result: UnitResult, num_forwards: int) -> None:
        """Enters a finished unit.

        Args:
            result: The unit.
            num_forwards: What it cost.
        """
        index = tuple(np.array(result.cells).T)
        self.values[0][index] = result.rewards
        for row, name in zip(self.values[1:], self.names, strict=True):
            row[index] = result.each[name]
        self.num_images += len(result.cells)
        self.num_forwards += num_forwards

    def pack(self) -> NDArray[np.float64]:
        """Lays everything out as one vector, to be sent; see `unpack`."""
        header = [self.num_images, self.num_forwards, self.failed, self.stop, self.at_once]
        return np.concatenate([header, self.values.ravel()])

    @classmethod
    def unpack(cls, packed: NDArray[np.float64], names: Sequence[str], shape: tuple[int, int]) -> Grid:
        """Reads what `pack` wrote.

        Args:
            packed: The vector.
            names: Names of the rewards and extra metrics.
            shape: K and S.

        Returns:
            The grid.
        """
        values = np.asarray(packed[_HEADER:]).reshape(1 + len(names), *shape)
        images, forwards, failed, stop, at_once = map(int, packed[:_HEADER])
        return cls(values, tuple(names), images, forwards, bool(failed), stop, at_once)

    @classmethod
    def merge(cls, parts: Sequence[Grid], owners: Mapping[Cell, int]) -> Grid:
        """Joins the grids of all ranks, each cell from the rank that made it.

        Args:
            parts: One grid a rank.
            owners: Rank of each cell.

        Returns:
            The joint grid.
        """
        merged = cls.empty(parts[0].names, parts[0].values.shape[1:])
        for (k, s), owner in owners.items():
            merged.values[:, k, s] = parts[owner].values[:, k, s]
        merged.num_images = sum(part.num_images for part in parts)
        merged.num_forwards = sum(part.num_forwards for part in parts)
        merged.failed = any(part.failed for part in parts)
        merged.stop = max(part.stop for part in parts)
        merged.at_once = min((part.at_once for part in parts if part.at_once), default=0)
        return merged
