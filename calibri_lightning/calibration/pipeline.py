"""A calibration on a stock diffusers pipeline: `load_calibration(pipe, path)`, then call `pipe` as always."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from calibri_lightning.calibration.conventions import convention_of
from calibri_lightning.calibration.files import read_calibration
from calibri_lightning.calibration.fold import check_foldable, fold, scale_rows
from calibri_lightning.calibration.loaded import Loaded
from calibri_lightning.calibration.restore import layout_for
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pipeline = TypeVar("Pipeline", bound="DiffusionPipeline")

_LOADED = "_calibri_loaded"
_FUSED = "_calibri_fused"


def load_calibration(pipe: Pipeline, path: str | Path) -> Pipeline:
    """Calibrates a stock pipeline, with hooks; the weights stay as they are.

    A single calibration works with any guidance. A guided one (members: cfg) brings its own guidance in its
    weights: call the pipeline with any guidance that is on and the pictures are the same. An ensemble runs each image
    once a member. The two latter need a pipeline of a native backbone; a single calibration of weight 1 works with any
    that has one transformer.

    Args:
        pipe: A text-to-image or text-to-video pipeline. Load before any `torch.compile`.
        path: A `calibration.json`.

    Returns:
        The same pipeline.

    Raises:
        UserError: If the pipeline has no single transformer, cannot run the members or is calibrated already (with
            hooks or fused), or the file is bad or of another model.
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
    file = read_calibration(path)
    layout = layout_for(file, pipe.transformer)
    setattr(pipe, _LOADED, Loaded(pipe, convention_of(pipe), layout, file))
    return pipe


def unload_calibration(pipe: Pipeline) -> Pipeline:
    """Takes a loaded calibration off again; the pipeline is then the stock one.

    Args:
        pipe: The calibrated pipeline.

    Returns:
        The same pipeline.

    Raises:
        UserError: If no calibration is loaded.
    """
    _loaded(pipe, "unload_calibration").remove()
    delattr(pipe, _LOADED)
    return pipe


def fuse(pipe: Pipeline) -> Pipeline:
    """Folds a loaded single-member calibration into the weights and removes the hooks.

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
    weight, last = loaded.weights[0], []
    if weight != 1.0:
        # The member's weight multiplies the velocity, and this is the last linear map before it.
        convention = convention_of(pipe)
        assert convention is not None, "without one, a calibration has weight 1"
        names = (name for name, _ in pipe.transformer.named_modules() if fnmatch(name, convention.last))
        last = [check_foldable(pipe.transformer, name) for name in names]
    # Folding under live hooks is safe, as nothing runs until they are gone; a refused fold leaves them.
    fold(pipe.transformer, loaded.layout.sites, loaded.scales[0])
    for linear in last:
        scale_rows(linear, weight)
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
