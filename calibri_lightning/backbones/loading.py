"""Loads a diffusers pipeline, or says in one sentence why it cannot be loaded."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from calibri_lightning.backbones.alignment import align
from calibri_lightning.backbones.quantisation import Quantization, quantization_config
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Component = tuple[str | None, str | None]
"""Library and class of a component, as model_index.json names them."""
DType = Literal["float32", "bfloat16"]
Fetch = Callable[[str, str | None], Path]

SHAPES_FOLDER = Path(__file__).parents[1] / "shapes" / "weights"
"""The embedded pipeline, an ordinary diffusers folder."""

BACKBONE_OF: dict[str, str] = {}
"""Pipeline class to the backbone of its family; filled by `Native`."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def load_pipeline(
    class_names: Sequence[str],
    pretrained: str,
    dtype: DType,
    revision: str | None,
    quantization: Quantization | None = None,
) -> DiffusionPipeline:
    """Loads a pipeline from a folder, the Hub or the package; never from pickle, only from safetensors.

    Args:
        class_names: Pipeline classes of diffusers of which the folder must hold one; none for any.
        pretrained: "shapes", a folder, or a Hub id "owner/name".
        dtype: Type of all networks.
        revision: Branch, tag or commit of a Hub repository.
        quantization: How the transformer is quantised; by default it is not.

    Returns:
        The pipeline on the CPU, all networks frozen and in evaluation mode.

    Raises:
        UserError: If dtype is unknown, the pipeline is absent, incomplete, damaged or of another class, or the package
            that quantises is missing.
    """
    number_type = torch_dtype(dtype)
    quantized = None if quantization is None else quantization_config(quantization, number_type)
    folder = find_folder(class_names, pretrained, revision)
    class_name, index = check_folder(folder, class_names)
    networks = {
        name: load_network(folder, name, network, number_type, quantized if name == "transformer" else None)
        for name, entry in index.items()
        if (network := network_class(entry)) is not None
    }
    return assemble_pipeline(folder, class_name, index, networks)


def torch_dtype(dtype: DType) -> torch.dtype:
    """Turns the name of a type into the type.

    Args:
        dtype: The name.

    Returns:
        The type.

    Raises:
        UserError: If it is not one of those that networks are loaded in.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; it must be 'float32' or 'bfloat16'.")
    found: torch.dtype = getattr(torch, dtype)
    return found


def assemble_pipeline(
    folder: Path, class_name: str, index: Mapping[str, Component], networks: Mapping[str, torch.nn.Module]
) -> DiffusionPipeline:
    """Makes a pipeline of networks that exist already and of what else its folder holds.

    Args:
        folder: A diffusers folder.
        class_name: The pipeline's class.
        index: Its components, as `check_folder` gives them.
        networks: Those that are networks.

    Returns:
        The pipeline, all networks frozen and in evaluation mode.

    Raises:
        UserError: If its parts do not belong together.
    """
    cls = pipeline_class(class_name, folder)
    # Of some components that a pipeline does without, from_pretrained (0.42.1) wants to be told.
    absent = dict.fromkeys(name for name, (library, _) in index.items() if library is None)
    try:
        pipe = cls.from_pretrained(str(folder), **networks, **absent)
    # A damaged file surfaces as one of a dozen exception classes of six libraries.
    except Exception as error:
        raise UserError(
            f"The model folder {folder} could not be loaded ({first_line(error)}). "
            "Check that its files belong together and are complete."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    freeze(pipe)
    return pipe


def pipeline_class(name: str, folder: Path) -> type[DiffusionPipeline]:
    """Finds the class of a pipeline.

    Args:
        name: Its name.
        folder: The model's folder, which names it.

    Returns:
        The class.

    Raises:
        UserError: If diffusers has no such pipeline.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(
            f"The model folder {folder} holds a {name}, which diffusers {diffusers.__version__} does not have; code "
            "that comes with a model is never run. Choose a model of a class that diffusers has."
        )
    return found


def find_folder(class_names: Sequence[str], pretrained: str, revision: str | None, fetch: Fetch | None = None) -> Path:
    """Finds the folder of a model.

    Args:
        class_names: Pipeline classes of diffusers that are acceptable; none for any.
        pretrained: "shapes", a folder, or a Hub id "owner/name".
        revision: Branch, tag or commit of a Hub repository.
        fetch: Gives the folder of a Hub id and a revision; by default they are downloaded.

    Returns:
        The folder.

    Raises:
        UserError: If there is none.
    """
    if pretrained == "shapes":
        if not SHAPES_FOLDER.is_dir():
            raise UserError(
                f"The embedded model's folder {SHAPES_FOLDER} is absent; the package ships it. "
                "Reinstall the package, or make it with `python -m calibri_lightning.shapes.train`."
            )
        return SHAPES_FOLDER
    if Path(pretrained).is_dir():
        return Path(pretrained)
    if not _HUB_ID.fullmatch(pretrained):
        raise UserError(
            f"pretrained is {pretrained!r}, which is neither an existing folder nor a Hub id 'owner/name' "
            "nor 'shapes'. Check the path."
        )
    if fetch is not None:
        return fetch(pretrained, revision)
    import diffusers

    # A class of its own knows its optional components; where several are allowed, the model's index decides.
    cls = getattr(diffusers, class_names[0]) if len(class_names) == 1 else diffusers.DiffusionPipeline
    try:
        return Path(cls.download(pretrained, revision=revision, use_safetensors=True))
    except Exception as error:
        raise UserError(
            f"The model {pretrained!r} could not be fetched from the Hub ({first_line(error)}). Check its name, "
            "your network and, for a gated model, `hf auth login`; or give a local folder."
        ) from error


def network_class(entry: Component) -> Any:
    """Finds the class of a component.

    Args:
        entry: Library and class, as model_index.json names them.

    Returns:
        The class, if it is a network of diffusers or transformers; else None.
    """
    library, name = entry
    if library not in ("diffusers", "transformers") or name is None:
        return None
    found = getattr(importlib.import_module(library), name, None)
    return found if isinstance(found, type) and issubclass(found, torch.nn.Module) else None


def load_network(folder: Path, name: str, network: Any, dtype: torch.dtype, quantized: Any = None) -> torch.nn.Module:
    """Loads one network; a tensor that the files lack would otherwise be drawn at random, with a warning.

    Args:
        folder: A diffusers folder.
        name: The component.
        network: Its class.
        dtype: The type of its numbers.
        quantized: diffusers' configuration of a quantisation; none by default.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: If it cannot be loaded whole.
    """
    fix = "Download the model again, or copy the component from the original folder."
    options = {} if quantized is None else {"quantization_config": quantized}
    try:
        loaded, report = network.from_pretrained(
            str(folder), subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:
        if quantized is not None:
            fix = "If the model loads without memory.quantization, it is the quantisation that does not work here."
        raise UserError(
            f"The component {name!r} of {folder} could not be loaded ({first_line(error)}). {fix}"
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        raise UserError(
            f"The weights of component {name!r} of {folder} lack {len(wrong)} tensor(s) of its "
            "config.json, or have "
            f"them in another shape: {', '.join(wrong[:3])}. {fix}"
        )
    align(loaded)
    return loaded


def freeze(pipe: DiffusionPipeline) -> None:
    """Puts all networks of a pipeline into evaluation mode, without gradients.

    Text encoders that were built rather than loaded start in train mode, where T5's dropout changes every
    embedding.

    Args:
        pipe: The pipeline, changed in place.
    """
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()


def check_folder(folder: Path, class_names: Sequence[str], weights: bool = True) -> tuple[str, dict[str, Component]]:
    """Checks that a diffusers folder is complete before anything is loaded.

    Args:
        folder: The folder.
        class_names: Pipeline classes of which it must hold one; none for any.
        weights: Whether the weights must be there.

    Returns:
        Pipeline class, and library and class of each component; (None, None) for one that the pipeline does without.

    Raises:
        UserError: If model_index.json is absent, unreadable or names another class, or if a component is
            missing.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"The model folder {folder} has no model_index.json; a diffusers pipeline folder has one at its top. "
            "Give the folder that `save_pretrained` wrote."
        )
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        found = str(entries["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index} is not a diffusers model index ({error!r}). Restore the file or download the model again."
        ) from error
    if class_names and found not in class_names:
        own = BACKBONE_OF.get(found)
        fix = f"{own}, the backbone of that family" if own else "Stock, which runs any flow-matching pipeline"
        raise UserError(
            f"The model folder {folder} holds a {found}; this backbone needs a {' or '.join(class_names)}. Use {fix}."
        )
    # Other lists, of layer numbers for instance, are settings of the pipeline.
    pairs = {name: e for name, e in entries.items() if isinstance(e, list) and len(e) == 2}
    components = {name: (e[0], e[1]) for name, e in pairs.items() if all(isinstance(x, str | None) for x in e)}
    for name, (library, _) in components.items():
        if library is not None:
            _check_component(folder, name, weights)
    return found, components


def _check_component(folder: Path, name: str, weights: bool) -> None:
    part = folder / name
    fix = "Download the model again, or copy the component from the original folder."
    if not part.is_dir() or not any(part.iterdir()):
        raise UserError(
            f"The model folder {folder} lacks its component {name!r}: model_index.json lists it, {part} is "
            f"absent or empty. {fix}"
        )
    if not weights:
        return
    # A network has a config.json; tokenizers, schedulers and processors are configured otherwise.
    if (part / "config.json").is_file() and not any(file for pattern in _WEIGHTS for file in part.glob(pattern)):
        raise UserError(f"The component {name!r} of {folder} has no weights: {part} holds no .safetensors file. {fix}")
    for file in part.glob("*.safetensors"):
        _check_weights(file, name)


def _check_weights(file: Path, name: str) -> None:
    """Reads a safetensors file's header, which finds truncated and foreign files without reading tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The weights of component {name!r} are damaged: {file} is not a complete safetensors file "
            f"({error}). "
            "Download or copy that file again."
        ) from error


def first_line(error: Exception) -> str:
    """Says what went wrong, without what a library writes below it.

    Args:
        error: Any exception.

    Returns:
        Its class and the first line of its message.
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
