"""How pictures are cut into units and units are dealt to ranks, counted before anything is drawn.

Rank r of W takes units r, r + W, r + 2W and so on. Where their number is a multiple of W and their sizes differ by at
most one picture, the larger ones first, the busiest rank has ceil(pictures / W) of them, the least there can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

MOST_IDLE = 0.1
"""Share of all ranks' time above which a launch is told how to use them."""
BALANCE = "--model.balance_over"
"""The flag that cuts the requests of a search otherwise."""


def unit_sizes(num_pictures: int, pictures_per_unit: int, balance_over: int = 1) -> tuple[int, ...]:
    """Cuts a request, whatever the number of ranks.

    Args:
        num_pictures: Pictures of the request.
        pictures_per_unit: Most pictures of a unit.
        balance_over: The number of units is a multiple of this, as far as there are pictures for it, and their sizes
            differ by at most 1; with 1 all units but the last are full.

    Returns:
        Pictures of each unit.
    """
    least = -(-num_pictures // pictures_per_unit)
    if balance_over == 1:
        return tuple(min(pictures_per_unit, num_pictures - i * pictures_per_unit) for i in range(least))
    count = min(-(-least // balance_over) * balance_over, num_pictures)
    small, large = divmod(num_pictures, count) if count else (0, 0)
    return tuple(small + (number < large) for number in range(count))


def share_of(units: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Gives a rank's units.

    Args:
        units: All units, or their numbers or sizes, in order.
        rank: The rank.
        world_size: Number of ranks.

    Returns:
        Those that it does, in order.
    """
    return units[rank::world_size]


def owner_of(number: int, world_size: int) -> int:
    """Says who does a unit.

    Args:
        number: Its place among the units that are to be done.
        world_size: Number of ranks.

    Returns:
        The rank.
    """
    return number % world_size


def loads(sizes: Sequence[int], world_size: int) -> tuple[int, ...]:
    """Counts what each rank does of one request.

    Args:
        sizes: Pictures of each unit.
        world_size: Number of ranks.

    Returns:
        Pictures of each rank.
    """
    return tuple(sum(share_of(sizes, rank, world_size)) for rank in range(world_size))


@dataclass(frozen=True)
class Request:
    """What a training step asks of all ranks at once."""

    num_pictures: int
    pictures_per_unit: int
    """Most pictures of a unit."""
    balance_over: int = 1
    setting: str = BALANCE
    """With what a user cuts it otherwise: `BALANCE`, or what the pictures of a unit are called."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pictures of each unit."""
        return unit_sizes(self.num_pictures, self.pictures_per_unit, self.balance_over)


def idle_share(requests: Sequence[Request], world_size: int) -> float:
    """Share of all ranks' time in which they wait for the busiest one, if every picture takes equally long.

    Args:
        requests: Answered one after another; all ranks wait at the end of each.
        world_size: Number of ranks.

    Returns:
        0 .. 1.
    """
    taken = world_size * sum(max(loads(request.sizes, world_size)) for request in requests)
    return 1 - sum(request.num_pictures for request in requests) / taken if taken else 0.0


def advice(requests: Sequence[Request], world_size: int) -> tuple[str, ...]:
    """Says where ranks would wait, and what to set.

    Args:
        requests: Those of a training step.
        world_size: Number of ranks.

    Returns:
        A sentence or two for each setting whose requests leave more than a tenth of the ranks' time unused.
    """
    found = []
    for setting in dict.fromkeys(request.setting for request in requests):
        ours = [request for request in requests if request.setting == setting]
        idle = idle_share(ours, world_size)
        if idle <= MOST_IDLE:
            continue
        pictures, units = sum(r.num_pictures for r in ours), sum(len(r.sizes) for r in ours)
        said = (
            f"{idle:.0%} of the time of {world_size} processes will be idle: the {pictures} pictures of a training "
            f"step are cut into {units} unit(s), which do not share evenly."
        )
        flag, better = _best(setting, ours, world_size)
        if better < idle:
            found.append(f"{said} With {flag} it is {better:.0%}; a resumed run must keep what it began with.")
        else:
            found.append(f"{said} No setting shares them better: use fewer processes, or more pictures a step.")
    return tuple(found)


def _best(setting: str, requests: Sequence[Request], world_size: int) -> tuple[str, float]:
    """What shares these requests best, and what is idle then; of equally good ones the largest units."""
    if setting == BALANCE:
        balanced = [replace(request, balance_over=world_size) for request in requests]
        return f"{BALANCE}={world_size}", idle_share(balanced, world_size)

    def idle(size: int) -> float:
        return idle_share([replace(request, pictures_per_unit=size) for request in requests], world_size)

    most = max(request.pictures_per_unit for request in requests)
    size = min(range(most, 0, -1), key=idle)
    return f"{setting}={size}", idle(size)
