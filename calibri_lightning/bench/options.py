"""The benchmark's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from calibri_lightning.bench.models import MODELS, RANDOM_MODELS, members_of
from calibri_lightning.bench.precision import PRECISIONS, Precision, Setting
from calibri_lightning.bench.recipes import WINDOW
from calibri_lightning.bench.scaling_options import POPSIZE, Scaling, add_options, read_options
from calibri_lightning.commandline import OneLineParser
from calibri_lightning.devices import find_device
from calibri_lightning.errors import UserError

_RESOLUTION = 512
_STEPS, _TRAINING_STEPS = 8, 10
"""Sampling steps of the loops, and of training, where Flow-GRPO takes 10."""
_GROUPS, _GROUP_SIZE = 2, 12
_POPSIZE = 16
_LEAST_TRAINING_STEPS = WINDOW + 1
_MULTIPLE = 16
"""What all random models make: sides of this many pixels, and multiples."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    num_blocks: int | None
    resolution: int
    precisions: tuple[Precision, ...]
    compile: bool
    popsize: int
    bucket: int
    num_steps: int
    rows: int
    repeats: int
    forward_repeats: int
    order: bool
    popsizes: tuple[int, ...]
    train: bool
    num_groups: int
    group_size: int
    device: torch.device
    threads: int | None
    out: Path | None
    scaling: Scaling | None = None
    """What to do instead of the loops; None to measure them."""

    @property
    def members(self) -> Literal["single", "cfg"]:
        """How the model is guided."""
        return members_of(self.model)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The batched loops, the one of the first precision first."""
        compiled = (False, True) if self.compile else (False,)
        return tuple(Setting(precision, c) for precision in self.precisions for c in compiled)


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line.

    Args:
        arguments: Options.

    Returns:
        What to measure.

    Raises:
        UserError: If an option is unknown or out of its range.
    """
    given = _parser().parse_args(
        list(arguments),
        argparse.Namespace(
            **dict.fromkeys(("layers", "resolution", "threads", "out", "popsize", "steps", "groups", "group_size"))
        ),
    )
    for name in (
        *("popsize", "bucket", "steps", "rows", "repeats", "forward_repeats", "threads", "layers"),
        *("groups", "group_size"),
    ):
        _check_positive(name, getattr(given, name))
    for popsize in given.popsizes:
        _check_positive("popsizes", popsize)
    least = 2 if members_of(given.model) == "cfg" else 1
    if given.rows < least:
        raise UserError(f"--rows is {given.rows}; a picture of {given.model} takes {least}, one a member.")
    _check_model(given.model, given.layers, given.resolution)
    if given.order and "float32" not in given.precision:
        raise UserError(
            f"--order compares with float32, but --precision is {' '.join(given.precision)}. Name float32, too, or "
            "leave --order out."
        )
    if given.order and len(set(given.precision)) == 1 and not given.compile:
        raise UserError(
            "--order compares other ways of computing with eager float32, and there is none. Add --compile or another "
            "--precision, or leave --order out."
        )
    _check_training(given)
    scaling = read_options(given)
    if given.out is not None and not given.out.parent.is_dir():
        raise UserError(f"--out is {given.out}; the folder {given.out.parent} does not exist. Make it first.")
    return Options(
        model=given.model,
        num_blocks=given.layers,
        resolution=given.resolution or _RESOLUTION,
        precisions=tuple(dict.fromkeys(given.precision)),
        compile=given.compile,
        popsize=given.popsize or (_POPSIZE if scaling is None else POPSIZE),
        bucket=given.bucket,
        num_steps=given.steps or (_TRAINING_STEPS if given.train else _STEPS),
        rows=given.rows,
        repeats=given.repeats,
        forward_repeats=given.forward_repeats,
        order=given.order,
        popsizes=tuple(sorted(set(given.popsizes))),
        train=given.train,
        num_groups=given.groups or _GROUPS,
        group_size=given.group_size or _GROUP_SIZE,
        device=find_device(given.device),
        threads=given.threads,
        out=given.out,
        scaling=scaling,
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="calibri_lightning bench",
        description="Measures the evaluation loop on this machine, against the loop that one would write first.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    unset = argparse.SUPPRESS  # the help would call the default None
    add("--model", default="shapes", choices=MODELS, metavar="NAME", help=f"{', '.join(MODELS)}; random but for shapes")
    add("--layers", type=int, default=unset, help="blocks of a random model (default: as released)")
    add("--resolution", type=int, default=unset, help=f"of a random model's pictures, pixels (default: {_RESOLUTION})")
    add(
        "--precision",
        nargs="+",
        default=["float32"],
        choices=PRECISIONS,
        help="of the batched loop, one or more; the straightforward loop runs in the first",
    )
    add("--compile", action="store_true", help="measure each precision with compiled blocks, too")
    add("--popsize", type=int, default=unset, help=f"candidates (default: {_POPSIZE}, {POPSIZE} with --scaling)")
    add("--bucket", type=int, default=16, help="prompts")
    add("--steps", type=int, default=unset, help=f"sampling steps (default: {_STEPS}, {_TRAINING_STEPS} with --train)")
    add("--rows", type=int, default=128, help="most rows of one forward")
    add("--repeats", type=int, default=3, help="interleaved repetitions of the loops")
    add("--forward-repeats", type=int, default=20, help="interleaved repetitions of single forwards")
    add("--order", action="store_true", help="check that 64 candidates keep their float32 order")
    add("--popsizes", type=int, nargs="+", default=[], metavar="N", help="time and memory also for these popsizes")
    add("--train", action="store_true", help="measure training steps of Flow-GRPO instead of the evaluation loops")
    add("--groups", type=int, default=unset, help=f"with --train, prompts of a step (default: {_GROUPS})")
    add("--group-size", type=int, default=unset, help=f"with --train, pictures of a prompt (default: {_GROUP_SIZE})")
    add_options(parser)
    add("--threads", type=int, default=unset, help="CPU threads (default: torch's own)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add(
        "--out",
        type=Path,
        default=unset,
        help="write the report as JSON; --popsizes, --scaling: also a plot",
    )
    return parser


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def _check_training(given: argparse.Namespace) -> None:
    if not given.train:
        alone = next((name for name in ("groups", "group_size") if getattr(given, name) is not None), None)
        if alone is not None:
            raise UserError(f"--{alone.replace('_', '-')} is for --train. Add that, or leave it out.")
        return
    for name, asked in (("order", given.order), ("popsizes", given.popsizes), ("compile", given.compile)):
        if asked:
            raise UserError(f"--{name} is for the evaluation loops, which --train leaves out. Run them apart.")
    if len(set(given.precision)) > 1:
        raise UserError(f"--train takes one precision, but --precision is {' '.join(given.precision)}. Name one.")
    if given.group_size == 1:
        raise UserError("--group-size is 1; it must be at least 2: advantages compare the pictures of one prompt.")
    if given.steps is not None and given.steps < _LEAST_TRAINING_STEPS:
        raise UserError(
            f"--steps is {given.steps}; --train takes at least {_LEAST_TRAINING_STEPS}: a window of {WINDOW} and the "
            "last one, which has no noise."
        )


def _check_model(model: str, layers: int | None, resolution: int | None) -> None:
    if model == "shapes" and (layers is not None or resolution is not None):
        given = "--layers" if layers is not None else "--resolution"
        raise UserError(f"{given} is for random models; shapes is trained as it is. Leave it out.")
    released = None if model == "shapes" else sum(RANDOM_MODELS[model].blocks.values())
    if layers is not None and released is not None and layers > released:
        raise UserError(f"--layers is {layers}; {model} has {released} blocks, of which a slice is taken.")
    if resolution is not None and (resolution < _MULTIPLE or resolution % _MULTIPLE):
        nearest = max(round(resolution / _MULTIPLE), 1) * _MULTIPLE
        raise UserError(f"--resolution is {resolution}; it must be a multiple of {_MULTIPLE}, such as {nearest}.")
