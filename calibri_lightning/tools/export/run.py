"""Exports a run: reads and checks it, writes one new folder, whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from calibri_lightning.atomic import making
from calibri_lightning.calibration.conventions import Convention, convention_of
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import read_prompts
from calibri_lightning.tools.export.base import BaseModel, find_base, pipeline_names
from calibri_lightning.tools.export.card import PICTURES, Card
from calibri_lightning.tools.export.folded import check_foldable_run, write_folded
from calibri_lightning.tools.export.licences import licence_of
from calibri_lightning.tools.export.parts import write_parts
from calibri_lightning.tools.export.usage import PARTS, Form, Usage
from calibri_lightning.tools.finished import FinishedRun, read_finished
from calibri_lightning.tools.lineage import origin

Choice = Literal["auto", "folder", "calibration"]
_SHOWN = 5
"""Prompts that a card shows."""
CARD = "README.md"


@dataclass(frozen=True)
class Options:
    """What to export."""

    run: Path
    out: Path
    form: Choice = "auto"
    """As what: "auto" is a folder where one set of weights holds the answer."""
    base: str | None = None
    """A folder or Hub id of the base model, where it is not (any more) where the run found it."""
    repo_id: str | None = None
    """The repository that the folder goes to; for its card."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    form: Form
    name: str
    """What the run was called."""


def export(options: Options) -> Exported:
    """Exports a run.

    Args:
        options: What to export.

    Returns:
        What was written.

    Raises:
        UserError: If the run is not whole, is of another model or cannot be folded, or the folder exists or cannot be
            written; nothing is left behind then.
    """
    _check_out(options)
    run = read_finished(options.run)
    form = _form(run, options.form)
    if form == "folder":
        check_foldable_run(run)
    elif options.base is not None:
        raise UserError(
            f"--base {options.base} is for a folded folder, and the run {run.folder} is exported as its calibration: "
            "the base model is not part of that. Leave it out."
        )
    base = find_base(run.settings, options.base) if form == "folder" else None
    if base is not None:
        _check_outside(options.out, base.folder, "its base model")
    try:
        with making(options.out) as folder:
            if base is not None:
                write_folded(folder, run, base)
            has_parts = base is not None and run.transformer is None
            if base is None or has_parts:
                parts = folder if base is None else folder / PARTS
                parts.mkdir(exist_ok=True)
                write_parts(parts, run)
            pictures = _copy_pictures(run, folder)
            usage = Usage(run, form, _convention(run, base), options.repo_id, has_parts)
            card = _card(usage, base, pictures)
            (folder / CARD).write_text(card.render(), encoding="utf-8")
            for path in folder.rglob("*"):  # safetensors writes for its maker alone
                path.chmod(0o755 if path.is_dir() else 0o644)
    except (OSError, SafetensorError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(
            f"The folder {options.out} cannot be written ({why}). Free space, or choose a place "
            "that you may write to with --out."
        ) from error
    return Exported(options.out, form, run.settings.name)


def _check_out(options: Options) -> None:
    out = options.out
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists, and an export makes a new folder. Give another name, or remove it first.")
    _check_outside(out, options.run, "the run")


def _check_outside(out: Path, folder: Path, what: str) -> None:
    """A folder that is copied from must not be written into: it is a record, and the copy would copy itself."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} is inside the folder of {what}, {folder}. Choose a place outside of it.")


def _form(run: FinishedRun, choice: Choice) -> Form:
    if choice != "auto":
        return choice
    return "folder" if len(run.calibration.members) == 1 else "calibration"


def _copy_pictures(run: FinishedRun, folder: Path) -> tuple[str, ...]:
    found = tuple(name for name in PICTURES if (run.folder / name).is_file())
    for name in found:
        shutil.copyfile(run.folder / name, folder / name)
    return found


def _convention(run: FinishedRun, base: BaseModel | None) -> Convention | None:
    """How the pipeline guides; without the model at hand, as far as the run's backbone tells."""
    if base is not None:
        return convention_of(base.pipeline)
    import diffusers

    names = pipeline_names(run.settings)
    return convention_of(getattr(diffusers, names[0])) if names else None


def _card(usage: Usage, base: BaseModel | None, pictures: tuple[str, ...]) -> Card:
    run = usage.run
    local = Path(run.settings.pretrained)
    folder = base.folder if base is not None else (local if local.is_dir() else None)
    return Card(
        run,
        usage.form,
        usage,
        licence_of(run.settings, folder),
        _first_prompts(run.settings.prompts.get("test")),
        pictures,
        None if base is None else base.commit,
        () if base is None else tuple(path.name for path in base.terms),
        origin(run),
    )


def _first_prompts(source: str | None) -> tuple[str, ...]:
    # Prompts of the Hub are not fetched.
    if source is None or not (source.startswith("shapes:") or Path(source).is_file()):
        return ()
    try:
        return tuple(prompt.text for prompt in read_prompts(source, "keep")[:_SHOWN])
    except UserError:  # a file that is gone, or another one by now, is no reason to refuse
        return ()
