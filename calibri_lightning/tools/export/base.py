"""The model that a run was made on: its folder, its class, and what its transformer is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from calibri_lightning.backbones.loading import (
    Component,
    DType,
    check_folder,
    find_folder,
    load_network,
    network_class,
    pipeline_class,
    torch_dtype,
)
from calibri_lightning.errors import UserError
from calibri_lightning.tools.export.licences import TERMS
from calibri_lightning.tools.finished import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TRANSFORMER = "transformer"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseModel:
    """A diffusers folder that a run can be folded into."""

    folder: Path
    pipeline: type[DiffusionPipeline]
    index: Mapping[str, Component]
    """Library and class of each component."""

    @property
    def commit(self) -> str | None:
        """The commit of the Hub's repository; None for a local folder."""
        return self.folder.name if _COMMIT.fullmatch(self.folder.name) else None

    @property
    def terms(self) -> tuple[Path, ...]:
        """The files that say its licence; they go along."""
        found = (path for pattern in TERMS for path in self.folder.glob(pattern))
        return tuple(sorted(path for path in found if path.is_file()))


def find_base(settings: Settings, other: str | None) -> BaseModel:
    """Finds the model of a run, checked as far as that goes without loading it.

    Args:
        settings: The run's settings.
        other: A folder or Hub id to take instead of the one in its config.yaml.

    Returns:
        The model.

    Raises:
        UserError: If it is absent, incomplete, of another family, quantised, or has no single transformer.
    """
    pretrained, revision = (other, None) if other is not None else (settings.pretrained, settings.revision)
    names = pipeline_names(settings)
    folder = find_folder(names, pretrained, revision)
    class_name, index = check_folder(folder, names)
    library, _ = index.get(TRANSFORMER, (None, None))
    if library != "diffusers" or index.get("transformer_2", (None, None))[0] is not None:
        raise UserError(
            f"The model {pretrained} is a {class_name}, which has not one diffusion transformer of diffusers. "
            "Calibrations belong to one: export with --form calibration."
        )
    _check_plain(folder / TRANSFORMER / "config.json", pretrained)
    return BaseModel(folder, pipeline_class(class_name, folder), index)


def pipeline_names(settings: Settings) -> tuple[str, ...]:
    """Finds the classes of pipelines that a run's backbone takes.

    Args:
        settings: The run's settings.

    Returns:
        Their names; none where it takes any.

    Raises:
        UserError: If the class of the backbone cannot be imported.
    """
    module, _, name = settings.backbone.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The run's backbone {settings.backbone} cannot be imported ({error}). Export where the run was made: with "
            "the same packages, from the same folder."
        ) from error
    return tuple(getattr(found, "pipelines", ()))


def load_transformer_of(base: BaseModel, dtype: str) -> Any:
    """Loads the transformer, and nothing else.

    Args:
        base: The model.
        dtype: The type of its numbers, as in the run.

    Returns:
        The transformer, on the CPU.

    Raises:
        UserError: If it cannot be loaded.
    """
    network = network_class(base.index[TRANSFORMER])
    if network is None:
        raise UserError(
            f"The model {base.folder} has a transformer of the class {base.index[TRANSFORMER][1]}, which this "
            "diffusers does not have. Install the version that the run was made with."
        )
    transformer = load_network(base.folder, TRANSFORMER, network, torch_dtype(cast(DType, dtype)))
    return transformer.requires_grad_(False).eval()


def _check_plain(config: Path, pretrained: str) -> None:
    """Refuses a model that is stored quantised."""
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read ({error}). Download or copy it again.") from error
    if isinstance(document, dict) and document.get("quantization_config"):
        raise UserError(
            f"The transformer of {pretrained} is stored quantised, and scales need whole float weights to be folded "
            "into. Give the model that it was quantised from with --base, or export with --form calibration, which "
            "works on quantised models."
        )
