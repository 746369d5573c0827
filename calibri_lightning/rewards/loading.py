"""Loads the parts of a reward's model from a folder, a file or the Hub, or says in one sentence why it cannot.

Weights are read from safetensors. Where only a .pt or .pth file was published, torch reads it without running anything
in it (`weights_only`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import first_line
from calibri_lightning.errors import UserError

UNKNOWN = "unknown"
"""Revision of weights that do not come from the Hub."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")
_Part = TypeVar("_Part")


def load_part(
    reward: str,
    what: str,
    place: str,
    load: Callable[[str], _Part],
    option: str = "pretrained",
    kind: Literal["folder", "file or folder"] = "folder",
) -> _Part:
    """Loads one part of a reward's model.

    Args:
        reward: The reward's name, for messages.
        what: What is loaded, for messages: "weights", "tokenizer".
        place: Where it is: on this machine, or a Hub id "owner/name".
        load: Loads it from there; raises anything.
        option: The option of the reward that names the place.
        kind: What a place on this machine may be.

    Returns:
        What `load` returns.

    Raises:
        UserError: If there is no such place, or loading failed.
    """
    fix = (
        "With the network at hand, nothing needs to be set; without it, download the repository and give its "
        f"folder: rewards: {{{reward}: {{weight: 1.0, options: {{{option}: FOLDER}}}}}}."
    )
    here = Path(place).is_dir() if kind == "folder" else Path(place).exists()
    if not here and not _HUB_ID.fullmatch(place):
        raise UserError(
            f"The {what} of the reward {reward!r} cannot be found: {place!r} is neither an existing {kind} nor a "
            f"Hub id 'owner/name'. {fix}"
        )
    try:
        return load(place)
    # The Hub client, safetensors and transformers raise dozens of unrelated classes.
    except Exception as error:
        raise UserError(
            f"The {what} of the reward {reward!r} could not be loaded from {place!r} ({first_line(error)}). {fix}"
        ) from error


def find_file(place: str, file: str, revision: str | None = None) -> Path:
    """Finds one file, and downloads it if it is on the Hub.

    Args:
        place: The file itself, a folder that holds it, or a Hub id.
        file: Its name in the folder or the repository.
        revision: Branch, tag or commit of the repository.

    Returns:
        Where it is on this machine.

    Raises:
        FileNotFoundError: If the folder does not hold it.
    """
    if Path(place).is_file():
        return Path(place)
    if not Path(place).is_dir():
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(place, file, revision=revision))
    found = Path(place) / file
    if not found.is_file():
        raise FileNotFoundError(f"there is no {file} in this folder")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of named tensors; nothing in it is ever run.

    Args:
        path: A safetensors file, or one that torch saved: of a mapping of tensors, or of one that has it as
            "state_dict".

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: If it holds something else.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    # An UnpicklingError that advises to load the file without this protection.
    except Exception as error:
        raise ValueError(
            f"{path.name} is damaged, or holds more than tensors, which could run code when it is read"
        ) from error
    tensors = saved.get("state_dict", saved) if isinstance(saved, Mapping) else saved
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path.name} does not hold named tensors")
    return {str(name): value for name, value in tensors.items()}


def check_names(found: set[str], expected: set[str], what: str) -> None:
    """Refuses weights that are not those of a model.

    Args:
        found: Names of the tensors of a file.
        expected: Names of the tensors of the model.
        what: The model, for messages.

    Raises:
        ValueError: If one is missing or too many; the message names the first.
    """
    for wrong, verdict in ((expected - found, "absent"), (found - expected, "unknown")):
        if wrong:
            raise ValueError(
                f"these are not the weights of {what}: {len(wrong)} tensors are {verdict}, {min(wrong)} first"
            )


def name_of(place: str) -> str:
    """Names what was loaded from a place, without saying where on a machine it lies.

    Args:
        place: A file, a folder, or a Hub id.

    Returns:
        The Hub id, or the last part of the path.
    """
    return Path(place).name if Path(place).exists() else place


def commit_of(place: str, revision: str | None = None, file: str = "config.json") -> str:
    """Says which commit was loaded, without asking the Hub.

    Args:
        place: A file, a folder, or a Hub id of which `file` has been downloaded.
        revision: What was asked for.
        file: A file of the repository.

    Returns:
        The commit, also for a snapshot in the folder of the Hub's cache; else `UNKNOWN`.
    """
    path: object = place
    if not Path(place).exists():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(place, file, revision=revision)
    # Not resolved: the files of a snapshot are links out of it.
    found = _SNAPSHOT.search(Path(path).absolute().as_posix()) if isinstance(path, str) else None
    return found[1] if found else UNKNOWN


def checked_batch_size(reward: str, batch_size: int) -> int:
    """Checks an option that all rewards with a model have.

    Args:
        reward: The reward's name, for messages.
        batch_size: Pictures of one forward.

    Returns:
        The same.

    Raises:
        UserError: If it is not a number from 1 up.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size of the reward {reward!r} is {batch_size!r}; it must be a number from 1 up.")
    return batch_size


def checked_device(reward: str, device: str | None) -> torch.device | None:
    """Checks an option that all rewards with a model have.

    Args:
        reward: The reward's name, for messages.
        device: Where to score; None where the pictures are.

    Returns:
        The device, if one was given.

    Raises:
        UserError: If torch knows no such device.
    """
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise UserError(
            f"device of the reward {reward!r} is {device!r} ({first_line(error)}). Use cpu, cuda or cuda:1, or "
            "leave it out to score where the pictures are."
        ) from error
