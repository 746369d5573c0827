"""What the command `compare` can be told."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibri_lightning.commandline import OneLineParser
from calibri_lightning.devices import find_device
from calibri_lightning.errors import UserError

STEPS = (5, 8, 10, 15, 28)


@dataclass(frozen=True)
class Options:
    """What to compare."""

    runs: tuple[str, ...]
    prompts: str
    limit: int | None
    """Most prompts; None takes all."""
    steps: tuple[int, ...]
    at: int | None
    """Steps of the verdict; None takes those that the first run was trained with."""
    rewards: tuple[str, ...]
    """Names, the one that decides first; those of the first run where there are none."""
    samples: int
    diversity_prompts: int
    pictures: int
    rows: int | None
    seed: int
    device: torch.device
    title: str
    out: Path


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line.

    Args:
        arguments: Options.

    Returns:
        What to compare.

    Raises:
        UserError: If an option is unknown or out of its range.
    """
    given = vars(_parser().parse_args(list(arguments)))
    for name, least in (
        *(("samples", 0), ("diversity_prompts", 0), ("pictures", 0), ("seed", 0)),
        *(("limit", 1), ("rows", 1), ("at", 1)),
    ):
        if given[name] is not None and given[name] < least:
            raise UserError(f"--{name.replace('_', '-')} is {given[name]}; it must be at least {least}.")
    steps = tuple(sorted(set(given.pop("steps"))))
    if steps[0] < 1:
        raise UserError(f"--steps has {steps[0]}; a number of sampling steps is at least 1.")
    if given["at"] is not None and given["at"] not in steps:
        raise UserError(f"--at is {given['at']}; the verdict is given at one of --steps {' '.join(map(str, steps))}.")
    repeated = next((name for name in given["rewards"] if given["rewards"].count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"--rewards names {repeated} twice. Name each reward once.")
    device = find_device(given.pop("device"))
    return Options(
        **{**given, "runs": tuple(given["runs"]), "rewards": tuple(given["rewards"])}, steps=steps, device=device
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="calibri_lightning compare",
        description="Draws the same prompts from the same noises with the base and several runs of one model, scores "
        "the pictures, and writes a table and one self-contained page.",
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folder of a finished run, or LABEL=FOLDER")
    add("--prompts", required=True, help="file of prompts, or another source that data.test takes")
    add("--limit", type=int, help="the first so many prompts (default: all)")
    add("--steps", type=int, nargs="+", default=STEPS, help=f"sampling steps (default: {' '.join(map(str, STEPS))})")
    add("--at", type=int, help="steps of the verdict and the pictures (default: those of the first run, if drawn)")
    add("--rewards", nargs="+", default=(), help="the deciding one first (default: those of the first run)")
    add("--samples", type=int, default=8, help="samples of a prompt for diversity, 0 for none (default: 8)")
    add("--diversity-prompts", type=int, default=12, help="prompts that diversity is measured on (default: 12)")
    add("--pictures", type=int, default=12, help="prompts of the gallery (default: 12)")
    add("--rows", type=int, help="most rows of one forward (default: what the device takes)")
    add("--seed", type=int, default=0, help="of the noises (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--title", default="Comparison of runs", help="heading of the report")
    add("--out", type=Path, default=Path("comparison"), help="new folder for the report (default: comparison)")
    return parser
