"""A calibration on a stock diffusers pipeline: `load_calibration(pipe, path)`, then call `pipe` as always."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from calibri_lightning.adapters.files import ADAPTER, adapter_digest
from calibri_lightning.adapters.loading import load_adapter
from calibri_lightning.adapters.lora import lora_layers, remove_lora
from calibri_lightning.calibration.conventions import convention_of
from calibri_lightning.calibration.files import CALIBRATION, read_calibration
from calibri_lightning.calibration.fold import fold_member
from calibri_lightning.calibration.loaded import Loaded
from calibri_lightning.calibration.restore import check_adapter as require_adapter
from calibri_lightning.calibration.restore import layout_for
from calibri_lightning.calibration.weights import check_weights
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pipeline = TypeVar("Pipeline", bound="DiffusionPipeline")

_LOADED = "_calibri_loaded"
_FUSED = "_calibri_fused"
_BROUGHT = "_calibri_brought_adapter"
"""Set on a pipeline whose adapter came with its calibration, and goes with it."""


def load_calibration(pipe: Pipeline, path: str | Path, check_adapter: bool = True) -> Pipeline:
    """Calibrates a stock pipeline, with hooks; the weights stay as they are.

    The folder of a run that trained an adapter, too, brings both: calibration.json and adapter/. All weights, where
    those were trained (transformer/), are to be loaded first: `adapters.load_transformer`.

    A single calibration works with any guidance. A guided one (members: cfg) brings its own guidance in its
    weights: call the pipeline with any guidance that is on and the pictures are the same. An ensemble runs each image
    once a member. The two latter need a pipeline of a native backbone; a single calibration of weight 1 works with any
    that has one transformer.

    Args:
        pipe: A text-to-image or text-to-video pipeline. Load before any `torch.compile`.
        path: A `calibration.json`, or the folder of a run.
        check_adapter: Refuse a calibration that was found on an adapter, or on trained weights, which the pipeline
            lacks. False if its weights hold them in a form that the check does not know.

    Returns:
        The same pipeline.

    Raises:
        UserError: If the pipeline has no single transformer, cannot run the members or is calibrated already (with
            hooks or fused), the file is bad or of another model, or its adapter or weights are missing.
    """
    if getattr(pipe, "transformer", None) is None or getattr(pipe, "transformer_2", None) is not None:
        raise UserError(
            f"load_calibration was given a {type(pipe).__name__}. It takes a whole diffusers pipeline with one "
            "diffusion transformer: load the model with `DiffusionPipeline.from_pretrained`."
        )
    if hasattr(pipe, _LOADED):
        raise UserError(
            "This pipeline has a calibration already. One acts at a time: call unload_calibration(pipe) first."
        )
    if hasattr(pipe, _FUSED):
        raise UserError(
            "This pipeline's weights hold a fused calibration; the scales of a second one would multiply with its. "
            "Load the model anew with from_pretrained."
        )
    path = Path(path)
    file = read_calibration(path / CALIBRATION if path.is_dir() else path)
    brought = _bring_adapter(pipe, path)
    try:
        layout = layout_for(file, pipe.transformer)
        if check_adapter:
            check_weights(file.weights, pipe.transformer, path if path.is_dir() else path.parent)
            require_adapter(file, pipe.transformer)
        setattr(pipe, _LOADED, Loaded(pipe, convention_of(type(pipe)), layout, file))
    except BaseException:
        if brought:
            remove_lora(pipe.transformer)
        raise
    if brought:
        setattr(pipe, _BROUGHT, True)
    return pipe


def _bring_adapter(pipe: DiffusionPipeline, path: Path) -> bool:
    """Loads the adapter of a run's folder; says whether it did. A pipeline that has it already keeps its own."""
    if not (path / ADAPTER).is_dir():
        return False
    if not lora_layers(pipe.transformer):
        load_adapter(pipe.transformer, path / ADAPTER)
        return True
    if adapter_digest(pipe.transformer) != adapter_digest(path / ADAPTER):
        raise UserError(
            f"{path} holds an adapter, and the pipeline has another one. One acts at a time: load the model anew with "
            "from_pretrained, or give the calibration.json alone."
        )
    return False


def unload_calibration(pipe: Pipeline) -> Pipeline:
    """Takes a loaded calibration off again, and the adapter that came with it; the pipeline is then the stock one.

    Args:
        pipe: The calibrated pipeline.

    Returns:
        The same pipeline.

    Raises:
        UserError: If no calibration is loaded.
    """
    _loaded(pipe, "unload_calibration").remove()
    delattr(pipe, _LOADED)
    if hasattr(pipe, _BROUGHT):
        remove_lora(pipe.transformer)
        delattr(pipe, _BROUGHT)
    return pipe


def fuse(pipe: Pipeline) -> Pipeline:
    """Folds a loaded single-member calibration into the weights and removes the hooks.

    An adapter that came with the calibration is merged first.

    Inference then costs nothing extra. It is for good: the result is an ordinary pipeline (`save_pretrained` works)
    whose original weights are gone.

    Args:
        pipe: The calibrated pipeline.

    Returns:
        The same pipeline.

    Raises:
        UserError: If no calibration is loaded, it has several members, or the weights cannot be folded into.
    """
    loaded = _loaded(pipe, "fuse")
    members = loaded.layout.members
    if len(members) > 1:
        kind = "a guided pair (prompt and negative prompt)" if loaded.layout.is_cfg else "an ensemble"
        raise UserError(
            f"This calibration is {kind} of {len(members)} members, each with its own scales. One set of "
            "weights holds one member's scales. Keep the hooks of load_calibration, which give exactly this "
            "calibration, or calibrate with members: single to fuse."
        )
    transformer, weight = pipe.transformer, loaded.weights[0]
    last: tuple[str, ...] = ()
    if weight != 1.0:
        convention = convention_of(type(pipe))
        assert convention is not None, "without one, a calibration has weight 1"
        last = convention.last_layers(transformer)
    # Folding under live hooks is safe, as nothing runs until they are gone.
    fold_member(transformer, loaded.layout.sites, loaded.scales[0], weight, last, hasattr(pipe, _BROUGHT))
    setattr(pipe, _FUSED, True)
    return unload_calibration(pipe)


def _loaded(pipe: DiffusionPipeline, caller: str) -> Loaded:
    loaded = getattr(pipe, _LOADED, None)
    if not isinstance(loaded, Loaded):
        if hasattr(pipe, _FUSED):
            raise UserError(
                f"{caller} was called on a pipeline whose calibration is fused into its weights, for good. Load "
                "the model anew with from_pretrained."
            )
        raise UserError(
            f"{caller} was called on a pipeline without a calibration. Call load_calibration(pipe, path) first."
        )
    return loaded
