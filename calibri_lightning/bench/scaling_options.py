"""Options of `bench --scaling`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from calibri_lightning.bench.simulation import Cost
from calibri_lightning.errors import UserError

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PROCESSES = (1, 2, 4)
POPSIZE = 17
"""Of the published search on 77 parameters."""
_COST = Cost()
_OWN = ("ranks", "processes", "picture_seconds", "unit_seconds", "jitter", "slowdown", "seed")


@dataclass(frozen=True)
class Scaling:
    """What `--scaling` does."""

    ranks: tuple[int, ...]
    """Numbers of simulated ranks."""
    processes: tuple[int, ...]
    """Numbers of real ones; none for no real run."""
    cost: Cost
    """Of the simulation."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds them.

    Args:
        parser: The parser of `bench`.
    """
    add, unset = parser.add_argument, argparse.SUPPRESS
    default = {name: getattr(_COST, name) for name in _OWN if hasattr(_COST, name)}
    add("--scaling", action="store_true", help="simulate many ranks and run few real ones instead of the loops")
    add(
        "--ranks",
        type=int,
        nargs="+",
        default=unset,
        metavar="W",
        help=f"with --scaling, simulated ranks (default: {' '.join(map(str, RANKS))})",
    )
    add(
        "--processes",
        type=int,
        nargs="*",
        default=unset,
        metavar="W",
        help=f"with --scaling, real ranks of one thread, none to leave them out (default: "
        f"{' '.join(map(str, PROCESSES))})",
    )
    for name, what in (
        ("picture_seconds", "seconds of a simulated picture"),
        ("unit_seconds", "seconds of a simulated unit besides its pictures"),
        ("jitter", "standard deviation of a simulated unit's time, relative to it"),
        ("slowdown", "how many times as long the last simulated rank takes"),
    ):
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=float, default=unset, help=f"with --scaling, {what} (default: {default[name]:g})")
    add("--seed", type=int, default=unset, help="with --scaling, of the jitter (default: 0)")


def read_options(given: argparse.Namespace) -> Scaling | None:
    """Reads them.

    Args:
        given: The parsed command line.

    Returns:
        What to do; None without `--scaling`.

    Raises:
        UserError: If one is out of its range, or for something else.
    """
    own = {name: getattr(given, name) for name in _OWN if hasattr(given, name)}
    if not given.scaling:
        if own:
            raise UserError(f"--{next(iter(own)).replace('_', '-')} is for --scaling. Add that, or leave it out.")
        return None
    for name, asked in (("order", given.order), ("popsizes", given.popsizes), ("compile", given.compile)):
        if asked:
            raise UserError(f"--{name} is for the evaluation loops, which --scaling leaves out. Run them apart.")
    if given.train:
        raise UserError("--train and --scaling measure different things. Run them apart.")
    if given.precision != ["float32"]:
        raise UserError(f"--scaling runs in float32, but --precision is {' '.join(given.precision)}. Leave it out.")
    if given.device != "cpu":
        raise UserError(f"--scaling runs on CPUs, but --device is {given.device}. Set --device cpu.")
    if given.threads not in (None, 1):
        raise UserError(f"--threads is {given.threads}; --scaling gives each process one. Leave it out.")
    ranks, processes = own.pop("ranks", RANKS), own.pop("processes", PROCESSES)
    for name, counts in (("ranks", ranks), ("processes", processes)):
        if any(count < 1 for count in counts):
            raise UserError(f"--{name} is {' '.join(map(str, counts))}; each must be at least 1.")
    for name in ("picture_seconds", "unit_seconds", "jitter"):
        if own.get(name, 1.0) < 0 or (name == "picture_seconds" and own.get(name) == 0):
            raise UserError(f"--{name.replace('_', '-')} is {own[name]:g}; it must be positive.")
    if own.get("slowdown", 1.0) < 1:
        raise UserError(f"--slowdown is {own['slowdown']:g}; it must be at least 1, as of a rank that is no slower.")
    return Scaling(tuple(sorted(set(ranks))), tuple(sorted(set(processes))), Cost(**own))
