"""The runs that a comparison is of: read and checked before anything is loaded."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from calibri_lightning.adapters.files import ADAPTER, WEIGHTS
from calibri_lightning.adapters.full import TRANSFORMER
from calibri_lightning.errors import UserError
from calibri_lightning.tools.compare.contenders import Contender, Course, Scales
from calibri_lightning.tools.compare.history import read_run
from calibri_lightning.tools.finished import FinishedRun, read_finished
from calibri_lightning.tools.lineage import Source, origin

_STILL = 1e-6
"""A value that is no further from its start has not moved."""
METRICS = "metrics.csv"
BASE_LABEL = "base"
"""What the untouched model is called."""


@dataclass(frozen=True)
class LabelledRun(FinishedRun):
    """A finished run by the name that the report gives it."""

    label: str

    @property
    def has_moved(self) -> bool:
        """Whether it changed a scale, or a weight of its members."""
        members = self.calibration.members
        start = {f"member{m}/weight": member.weight for m, member in enumerate(members)}
        start["guidance"] = members[0].weight  # the pair (g, 1 - g); its strength starts at 1
        values = zip(self.calibration.names, self.calibration.values, strict=True)
        # Up to rounding: a guidance that was never moved may have been through float32.
        return any(abs(value - start.get(name, 1.0)) > _STILL for name, value in values)

    @property
    def num_trained(self) -> int:
        """Numbers that this run trained itself: scales that moved, a LoRA or all weights."""
        file = self.calibration
        count = len(file.values) if self.has_moved else 0
        if file.adapter is not None and file.adapter.source == ADAPTER:
            count += _numbers(self.folder / ADAPTER / WEIGHTS)
        if file.weights is not None and file.weights.transformer == TRANSFORMER:
            count += sum(map(_numbers, sorted((self.folder / TRANSFORMER).glob("*.safetensors"))))
        return count

    def contender(self, runs: Sequence[LabelledRun]) -> Contender:
        """What the report says of it.

        Args:
            runs: All that are compared, which it may have started from.

        Returns:
            The contender.
        """
        start = origin(self, runs)
        names = [] if start is None else [_name(source) for source in start.sources]
        file = self.calibration
        return Contender(
            label=self.label,
            method=file.obtained_by.strategy,
            folder=str(self.folder),
            num_trained=self.num_trained,
            num_members=len(file.members),
            budget=self.budget,
            stacked_on=" and ".join(names),
            inherited=None if start is None else start.budget,
            scales=Scales(
                file.names,
                file.values,
                tuple(f"{m.prompt} (member {i})" for i, m in enumerate(file.members)),
                self.has_moved,
            ),
            course=_course(self.label, self.folder, 0 if start is None else start.images),
        )


def read_runs(arguments: Sequence[str]) -> tuple[LabelledRun, ...]:
    """Reads the runs that a command names.

    Args:
        arguments: FOLDER or LABEL=FOLDER each.

    Returns:
        The runs.

    Raises:
        UserError: If there is none, one is no finished run or lacks a file, or labels repeat.
    """
    if not arguments:
        raise UserError("No run is given. Name the folders of finished runs, such as runs/quickstart/version_0.")
    runs = tuple(_read(*_split(argument)) for argument in arguments)
    labels = [run.label for run in runs]
    odd = next((label for label in labels if not label.isprintable()), None)
    if odd is not None:
        raise UserError(f"The name {odd!r} of a run has characters that cannot be printed. Give another: LABEL=FOLDER.")
    repeated = next((label for label in labels if labels.count(label) > 1 or label == BASE_LABEL), None)
    if repeated is not None:
        raise UserError(
            f"{repeated!r} names more than one contender ({BASE_LABEL!r} is the untouched model). Give each run a name "
            "of its own: LABEL=FOLDER."
        )
    return runs


def _split(argument: str) -> tuple[str, Path]:
    """A folder may have an equals sign in its name; where it is there, all of the argument is its path."""
    label, equals, folder = argument.partition("=")
    if not equals or _exists(argument):
        path = Path(argument)
        # runs/cma/version_0 is called cma
        own = path.resolve()
        return (own.parent.name if own.name.startswith("version_") else own.name), path
    if not label or not folder:
        raise UserError(f"{argument!r} is neither a folder nor of the form LABEL=FOLDER, such as CMA-ES=runs/cma.")
    return label, Path(folder)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or no name at all
        return False


def _read(label: str, folder: Path) -> LabelledRun:
    try:
        return LabelledRun(**vars(read_finished(folder)), label=label)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


def _name(source: Source) -> str:
    """Its label where it is compared, too; its folder where it is another run."""
    run = source.run
    if isinstance(run, LabelledRun):
        return run.label
    return source.name if run is None else str(run.folder)


def _course(label: str, folder: Path, images_before: int) -> Course | None:
    """Only runs that logged CSV and validated have one; that of a stacked run goes on where its start ended."""
    path = folder / METRICS
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n") or "step" not in text.partition("\n")[0].split(","):
            raise ValueError("no header, or no end of the last line")
        curve = read_run(label, folder).current
    except UserError:  # nothing was validated
        return None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{label}: {path} is cut or was edited ({error!r:.200}). Copy the run again, or remove the "
            "file: the report then has no curve of the run."
        ) from error
    return Course(tuple(float(x) + images_before for x in curve.images), tuple(map(float, curve.scores)))


def _numbers(path: Path) -> int:
    """Numbers in a file of tensors, from its header."""
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut ({error}). Copy the whole folder of the run again.") from error
