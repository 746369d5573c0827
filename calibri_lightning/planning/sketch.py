"""A pipeline whose networks have shapes and types but no numbers: built from configurations, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.loading import (
    DType,
    assemble_pipeline,
    check_folder,
    find_folder,
    first_line,
    network_class,
    torch_dtype,
)
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_T5_NORM = "encoder.final_layer_norm.weight"
"""The one tensor whose values decide how SD3 is run: zero where its T5 encoder is silent."""

_LARGE_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.png", "*.jpg")
"""What a plan does not read of a model on the Hub."""


def sketch_pipeline(
    class_names: Sequence[str], pretrained: str, dtype: DType, revision: str | None
) -> DiffusionPipeline:
    """Builds a pipeline without its weights; they need not even be there.

    Args:
        class_names: Pipeline classes of diffusers of which the folder must hold one; none for any.
        pretrained: "shapes", a folder, or a Hub id whose small files are in the local cache.
        dtype: Type of all networks.
        revision: Branch, tag or commit of a Hub repository.

    Returns:
        The pipeline; its networks are on the meta device, with the types that loading would give them.

    Raises:
        UserError: If the pipeline is absent, incomplete or of another class.
    """
    number_type = torch_dtype(dtype)
    folder = find_folder(class_names, pretrained, revision, _cached)
    class_name, index = check_folder(folder, class_names, weights=False)
    networks = {
        name: _sketch_network(folder, name, network, number_type)
        for name, entry in index.items()
        if (network := network_class(entry)) is not None
    }
    return assemble_pipeline(folder, class_name, index, networks)


def _cached(pretrained: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(pretrained, "model_index.json", revision=revision)
    if not isinstance(found, str):
        raise UserError(
            f"The model {pretrained!r} is not in the local cache, and a plan downloads nothing. Its small files are "
            # One --exclude takes one pattern.
            f"enough: hf download {pretrained} {' '.join(f'--exclude {pattern!r}' for pattern in _LARGE_FILES)}."
        )
    return Path(found).parent


def _sketch_network(folder: Path, name: str, network: Any, dtype: torch.dtype) -> nn.Module:
    try:
        with torch.device("meta"), _default_dtype(dtype):
            if hasattr(network, "load_config"):  # diffusers
                made: nn.Module = network.from_config(network.load_config(str(folder), subfolder=name))
            else:
                made = network(network.config_class.from_pretrained(str(folder), subfolder=name))
                made.tie_weights()  # type: ignore[operator]
    # A configuration that its class refuses surfaces as many classes of two libraries.
    except Exception as error:
        raise UserError(
            f"The component {name!r} of {folder} could not be built from its config.json ({first_line(error)}). "
            "Download the folder again."
        ) from error
    _set_types(made, dtype)
    if name == "text_encoder_3":
        _fill_t5_norm(made, folder / name)
    return made


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _set_types(network: Any, dtype: torch.dtype) -> None:
    """Does what loading does: all that is in the files gets the type, but for modules that stay in float32."""
    # In bfloat16 transformers keeps the second list alone; diffusers has the first alone.
    kept = network._keep_in_fp32_modules if hasattr(network, "load_config") else network._keep_in_fp32_modules_strict
    for path, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            stays = any(name in path.split(".") for name in kept or ())
            tensor.data = tensor.data.to(torch.float32 if stays else dtype)


def _fill_t5_norm(encoder: nn.Module, folder: Path) -> None:
    norm: Any = encoder.get_submodule(_T5_NORM.rpartition(".")[0])
    # Without its weights it counts as one that speaks, as all released ones do.
    found = _read(folder, _T5_NORM)
    values = torch.ones(norm.weight.shape) if found is None else found
    norm.weight = nn.Parameter(values.to(norm.weight.dtype), requires_grad=False)


def _read(folder: Path, key: str) -> Tensor | None:
    """One tensor of a component, where its weights are there; no other is read."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118 - no mapping
                tensor: Tensor = file.get_tensor(key)
                return tensor
    return None
