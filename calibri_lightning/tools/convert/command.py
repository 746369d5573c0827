"""The command `convert`: an official Calibri checkpoint to a calibration.json, or the other way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from calibri_lightning.adapters.files import AdapterRecord, adapter_digest
from calibri_lightning.adapters.loading import adapter_folder
from calibri_lightning.calibration import Granularity, read_calibration, write_calibration
from calibri_lightning.commandline import OneLineParser, exit_code
from calibri_lightning.errors import UserError
from calibri_lightning.tools.convert.models import NAMES, find_model, model_of
from calibri_lightning.tools.convert.official import is_calibration, read_official, write_official
from calibri_lightning.tools.convert.translate import from_official, to_official


def run_convert(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the word convert.

    Returns:
        Exit code: 0, or 2 for a user's mistake.
    """
    return exit_code(lambda: _convert(arguments))


def _convert(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(list(arguments))
    for line in convert(Path(given.file), Path(given.out), given.model, given.granularity, given.adapter):
        print(line)


def convert(
    file: Path, out: Path, model: str | None, granularity: Granularity | None, adapter: str | None
) -> list[str]:
    """Converts a file; its content says which way.

    Args:
        file: An official checkpoint, or a calibration.json.
        out: Where to write; nothing is overwritten.
        model: Name, Hub id or folder of the model; needed for an official checkpoint.
        granularity: What the official checkpoint is to have.
        adapter: Folder or Hub id of the LoRA that an official checkpoint was found on.

    Returns:
        What was done, and what one should know, in lines.

    Raises:
        UserError: If the file is bad or does not fit the model, or out cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists already. Nothing is overwritten: choose another name, or remove it.")
    if is_calibration(file):
        if granularity is not None or adapter is not None:
            raise UserError(
                f"{file} is a calibration.json, which says its granularity and adapter itself. Leave --granularity and "
                "--adapter out."
            )
        ours = read_calibration(file)
        found = model_of(ours.model) if model is None else find_model(model)
        back = to_official(ours, found.transformer)
        write_official(out, back.checkpoint)
        return [f"{out}: official checkpoint of {len(back.checkpoint.solution)} numbers", *_bullets(back.notes)]
    checkpoint = read_official(file)
    if model is None:
        raise UserError(
            f"{file} is an official checkpoint, and does not know its model. Give --model: one of {', '.join(NAMES)}, "
            "or a local folder of the model."
        )
    found = find_model(model)
    record = None if adapter is None else AdapterRecord(adapter, adapter_digest(adapter_folder(adapter)), merged=True)
    made = from_official(checkpoint, found.transformer, found.name, granularity, record)
    write_calibration(out, made.file)
    what = f"{len(made.file.values)} values, granularity {made.file.granularity}, {len(made.file.members)} member(s)"
    return [f"{out}: calibration of {found.name}, {what}", *_bullets(made.notes)]


def _bullets(notes: Sequence[str]) -> list[str]:
    return [f"* {note}" for note in notes]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="calibri_lightning convert",
        description="Converts a checkpoint of the official Calibri trainer (cmaes_step_*.json) into a "
        "calibration.json, or a calibration.json into such a checkpoint; the file says which way. Nothing is "
        "downloaded but what --adapter names.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="official checkpoint, or calibration.json")
    add("--out", required=True, metavar="PATH", help="where to write; must not exist")
    add(
        "--model",
        metavar="NAME",
        help=f"{', '.join(NAMES)}, or a local folder of a diffusers model. An official checkpoint does not know its "
        "model; for a calibration.json it is needed where it is none of these",
    )
    add(
        "--granularity",
        choices=("block", "layer", "gate"),
        help="check that the official checkpoint has this one (its shapes say which it has)",
    )
    add(
        "--adapter",
        metavar="FOLDER",
        help="LoRA, a folder or Hub id, that was merged into the model of the official checkpoint, such as that of "
        "Flow-GRPO; the calibration will ask for it",
    )
    return parser
