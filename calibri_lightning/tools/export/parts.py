"""A run as files for `load_calibration`: its calibration.json, and whatever that was found on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from calibri_lightning.adapters.files import ADAPTER, AdapterRecord
from calibri_lightning.adapters.full import TRANSFORMER
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.files import CALIBRATION, write_calibration
from calibri_lightning.tools.export.copying import copy_public, public_name
from calibri_lightning.tools.finished import FinishedRun

MERGED = "merged_adapter"
"""Folder of an adapter that has to be merged into the weights before the calibration is loaded."""


def write_parts(folder: Path, run: FinishedRun) -> None:
    """Writes the files; paths of this machine are left out of them.

    Args:
        folder: Where to; it exists.
        run: The run.

    Raises:
        UserError: If the calibration cannot be written.
        OSError: If another file cannot.
    """
    for source, name in ((run.adapter, ADAPTER), (run.merged, MERGED), (run.transformer, TRANSFORMER)):
        if source is not None:
            (folder / name).mkdir()
            for path in (path for pattern in ("*.json", "*.safetensors") for path in source.glob(pattern)):
                copy_public(path, folder / name / path.name)
    write_calibration(folder / CALIBRATION, _shared(run))


def _shared(run: FinishedRun) -> CalibrationFile:
    """The calibration, speaking of the files that go with it instead of those of this machine."""
    file = run.calibration
    adapter, weights = file.adapter, file.weights
    if adapter is not None:
        source = ADAPTER if run.adapter is not None else (MERGED if run.merged is not None else adapter.source)
        adapter = AdapterRecord(public_name(source), adapter.sha256, adapter.merged)
    if weights is not None:
        weights = replace(
            weights,
            transformer=TRANSFORMER if run.transformer is not None else "",
            merged=MERGED if run.merged is not None else "",
        )
    return replace(file, model=replace(file.model, name=public_name(file.model.name)), adapter=adapter, weights=weights)
