"""What `Stock` asks of a pipeline, checked before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")
"""Arguments without which Stock cannot call a pipeline."""
_GIVEN = (
    *_NEEDED,
    *("negative_prompt", "num_frames", "latents", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"),
)
"""Arguments that Stock gives itself, or leaves to the pipeline on purpose."""


def call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """Lists the arguments of a pipeline's call.

    Args:
        pipe: The pipeline.

    Returns:
        The arguments by name.
    """
    return inspect.signature(pipe.__call__).parameters


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Refuses pipelines that Stock cannot steer.

    Args:
        pipe: The pipeline.

    Raises:
        UserError: If it does not make pictures from text with one transformer and deterministic flow matching.
    """
    name, parameters = type(pipe).__name__, call_parameters(pipe)
    lacking = [needed for needed in _NEEDED if needed not in parameters]
    if lacking or getattr(pipe, "transformer", None) is None:
        raise UserError(
            f"{name} does not make pictures from text with a transformer: it lacks "
            f"{', '.join(lacking) or 'a transformer'}. Choose a text-to-image or text-to-video pipeline of a "
            "diffusion transformer."
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise UserError(
            f"This {name} has two transformers, one for high and one for low noise; a calibration is of one. Choose a "
            "model with one."
        )
    scheduler = pipe.scheduler
    kind, config = type(scheduler).__name__, scheduler.config
    flow = kind.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    stochastic = config.get("stochastic_sampling", False) or kind == "FlowMatchLCMScheduler"
    if not flow or stochastic or scheduler.order != 1:
        raise UserError(
            f"The model's scheduler is {kind}; Stock takes deterministic flow matching with one forward a step "
            "(FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas). Choose a flow-matching model."
        )


def check_arguments(pipe: DiffusionPipeline, arguments: Iterable[str], num_frames: int | None) -> None:
    """Refuses arguments that the pipeline's call does not have, and those that are not the user's to give.

    Args:
        pipe: The pipeline.
        arguments: Names of the further arguments.
        num_frames: Frames of a video, where given.

    Raises:
        UserError: If one is refused.
    """
    name, parameters = type(pipe).__name__, call_parameters(pipe)
    for argument in arguments:
        if argument in _GIVEN or argument not in parameters:
            why = "Stock sees to that one itself" if argument in _GIVEN else f"{name} has no such argument"
            raise UserError(f"arguments holds {argument!r}; {why}. Remove it.")
    if num_frames is not None and "num_frames" not in parameters:
        raise UserError(f"num_frames is {num_frames}, but {name} makes pictures. Leave num_frames out.")


def side(pipe: DiffusionPipeline, name: str, given: int | None) -> int:
    """Height or width of the pictures.

    Args:
        pipe: The pipeline.
        name: "height" or "width".
        given: What the user asks for; None for the pipeline's default.

    Returns:
        Pixels.

    Raises:
        UserError: If there is no default, or the autoencoder cannot make that size.
    """
    size = given
    if size is None:
        samples = getattr(pipe, "default_sample_size", None) or pipe.transformer.config.get("sample_size")
        factor = getattr(pipe, "vae_scale_factor", None)
        computed = samples * factor if isinstance(samples, int) and factor else None
        size = call_parameters(pipe)[name].default or computed
    if size is None:
        raise UserError(f"{type(pipe).__name__} does not say which {name} its pictures have. Give height and width.")
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    multiple = 1 if processor is None else processor.config.vae_scale_factor
    if size < multiple or size % multiple:
        raise UserError(
            f"{name} is {size}; this model makes pictures whose sides are multiples of {multiple}. Set {name} to "
            f"{max(round(size / multiple), 1) * multiple}."
        )
    return int(size)
