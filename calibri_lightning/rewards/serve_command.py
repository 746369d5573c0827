"""The command `serve`: rewards of this package for other processes and machines."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from calibri_lightning.commandline import OneLineParser, exit_code
from calibri_lightning.errors import UserError
from calibri_lightning.rewards.finding import BUILT_IN, find_reward
from calibri_lightning.rewards.served import RewardScorer


def run_serve(arguments: Sequence[str]) -> int:
    """Runs the command until SIGTERM or SIGINT.

    Args:
        arguments: What follows the word serve.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return exit_code(lambda: _serve(arguments))


def _serve(arguments: Sequence[str]) -> None:
    _check_extra()
    from calibri_lightning.serving.options import read_options
    from calibri_lightning.serving.run import serve

    given = _parser().parse_args(list(arguments))
    serve(make_scorers(given.reward, given.options, getattr(given, "device", [])), read_options(given))


def make_scorers(names: Sequence[str], options: str, devices: Sequence[str]) -> list[RewardScorer]:
    """Makes the rewards that a command line names.

    Args:
        names: Built-in names or import paths.
        options: JSON: the arguments of each reward's class, by name.
        devices: One for all rewards, or one for each; empty for the first GPU, or the CPU without one.

    Returns:
        The rewards, not loaded yet.

    Raises:
        UserError: If a reward or device cannot be found, or options are given for none.
    """
    given = _read_json(options)
    devices = devices or ["cuda:0" if torch.cuda.is_available() else "cpu"]
    if len(devices) not in (1, len(names)):
        raise UserError(
            f"--device is given {len(devices)} times for {len(names)} rewards. Give it once for all, or once for each, "
            "in their order."
        )
    unused = [name for name in given if name not in names]
    if unused:
        raise UserError(f"--options has {unused[0]!r}, which no --reward names; there are {', '.join(names)}.")
    each = list(devices) * len(names) if len(devices) == 1 else list(devices)
    return [RewardScorer(find_reward(name, given.get(name)), device) for name, device in zip(names, each, strict=True)]


def _read_json(text: str) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(
            f"--options is {text!r}; it must be JSON, an object of options for each reward, such as "
            '\'{"pickscore": {"dtype": "bfloat16"}}\'.'
        )
    return found


def _parser() -> argparse.ArgumentParser:
    from calibri_lightning.serving.options import add_arguments
    from calibri_lightning.serving.run import Defaults

    parser = OneLineParser(
        prog="calibri_lightning serve",
        description="Serves rewards to runs in other processes and on other machines, until SIGTERM or Ctrl+C.",
        formatter_class=Defaults,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--reward",
        action="append",
        required=True,
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"what to serve, once for each reward: {', '.join(BUILT_IN)}, or package.module:name",
    )
    add(
        "--options",
        default="{}",
        metavar="JSON",
        help='arguments of each, such as {"pickscore": {"dtype": "bfloat16"}}',
    )
    add(
        "--device",
        action="append",
        default=argparse.SUPPRESS,
        metavar="DEVICE",
        help="cpu, cuda or cuda:N, once for all rewards or once for each (default: the first GPU, or the CPU)",
    )
    add_arguments(parser)
    return parser


def _check_extra() -> None:
    try:
        for name in ("fastapi", "prometheus_client", "uvicorn"):
            import_module(name)
    except ImportError as error:
        raise UserError(
            f"`serve` needs {error.name}, which is not installed: pip install 'calibri-lightning[serve]'."
        ) from error
