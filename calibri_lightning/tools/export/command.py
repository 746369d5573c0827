"""The command line of `export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from calibri_lightning.commandline import OneLineParser, cleaning_up_when_terminated, exit_code
from calibri_lightning.errors import UserError
from calibri_lightning.quiet import hide_progress_bars
from calibri_lightning.tools.export.push import Target, check_target, push
from calibri_lightning.tools.export.run import Choice, Exported, Options, export


def run_export(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the word export.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    return exit_code(lambda: _export(arguments))


def _export(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(list(arguments))
    target = _target(given)
    hide_progress_bars()
    options = Options(given.run, given.out, given.form, given.base, None if target is None else target.repo_id)
    with cleaning_up_when_terminated():
        if target is None:
            _report(export(options))
        else:
            _export_and_push(options, target)


def _export_and_push(options: Options, target: Target) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    check_target(target, api)
    exported = export(options)
    _report(exported)
    address = push(exported.folder, target, api, f"{exported.name}, exported by calibri_lightning")
    print(f"Pushed to {address} ({'public' if target.public else 'private'})")


def _report(exported: Exported) -> None:
    how = (
        f'DiffusionPipeline.from_pretrained("{exported.folder}")'
        if exported.form == "folder"
        else f'load_calibration(pipe, "{exported.folder}"), on the base model'
    )
    print(f"Exported to {exported.folder}\nLoad it with {how}\nIts card: {exported.folder / 'README.md'}")


def _target(given: argparse.Namespace) -> Target | None:
    if given.push is not None:
        return Target(given.push, given.public)
    if given.public:
        raise UserError("--public is for --push, which makes a private repository without it. Add --push OWNER/NAME.")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="calibri_lightning export",
        description=(
            "Turns a run into files that others can use. A calibration of one member and LoRAs are folded into an "
            "ordinary diffusers folder; a guided pair or an ensemble becomes files for load_calibration."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/name/version_0")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the new folder")
    add(
        "--form",
        choices=get_args(Choice),
        default="auto",
        help="folder: the folded model; calibration: scales and adapters for load_calibration; auto (default): the "
        "first where one set of weights holds the answer",
    )
    add("--base", metavar="MODEL", help="folder or Hub id of the base model, where it is not where the run found it")
    add("--push", metavar="OWNER/NAME", help="upload the folder to a new repository of the Hub, a private one")
    add("--public", action="store_true", help="make that repository public")
    return parser
