"""A calibration on the stock diffusers pipeline: `load_calibration(pipe, path)`, then call `pipe` as always.

The stock pipeline batches [negative, prompt] and combines them as u + g (c - u). Scaling the transformer's
outputs to c' = (w0 / g) c and u' = (w1 / (1 - g)) u makes that w0 c + w1 u, whatever the guidance g > 1 it is
called with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from calibri_lightning.calibration.attach import Attachment, attach
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.files import read_calibration
from calibri_lightning.calibration.fold import check_foldable, fold, scale_rows
from calibri_lightning.calibration.restore import layout_for
from calibri_lightning.calibration.scales import Layout
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

Pipeline = TypeVar("Pipeline", bound="StableDiffusion3Pipeline")

_LOADED = "_calibri_loaded"
# Arguments of the transformer that carry the batch, for ensembles: each row is repeated once a member.
_BATCHED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")


def load_calibration(pipe: Pipeline, path: str | Path) -> Pipeline:
    """Calibrates a stock Stable Diffusion 3 pipeline, with hooks; the weights stay as they are.

    A single calibration works with any guidance. A guided one (members: cfg) brings its own guidance in its
    weights: call the pipeline with any `guidance_scale` above 1 and the pictures are the same. An ensemble
    runs each image once a member.

    Args:
        pipe: A `StableDiffusion3Pipeline`. Load before any `torch.compile`.
        path: A `calibration.json`.

    Returns:
        The same pipeline.

    Raises:
        UserError: If the pipeline is of another class or calibrated already, or the file is bad or of another
            model.
    """
    from diffusers import StableDiffusion3Pipeline

    if not isinstance(pipe, StableDiffusion3Pipeline):
        raise UserError(
            f"load_calibration was given a {type(pipe).__name__}. It knows how StableDiffusion3Pipeline "
            "batches and combines prompts, and no other pipeline. Load the model as a "
            "StableDiffusion3Pipeline."
        )
    if hasattr(pipe, _LOADED):
        raise UserError(
            "This pipeline has a calibration already. One acts at a time: call unload_calibration(pipe) first."
        )
    file = read_calibration(path)
    layout = layout_for(file, pipe.transformer)
    setattr(pipe, _LOADED, _Loaded(pipe, layout, file))
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

    Inference then costs nothing extra. The result is an ordinary pipeline (`save_pretrained` works) that no
    longer knows that it is calibrated.

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
    weight = loaded.weights[0].item()
    if weight != 1.0:
        # The member's weight multiplies the velocity, and proj_out is the last linear map before it.
        check_foldable(pipe.transformer, "proj_out")
    # Folding under live hooks is safe, as nothing runs until they are gone; a refused fold leaves them.
    fold(pipe.transformer, loaded.layout.sites, loaded.scales[0])
    if weight != 1.0:
        scale_rows(pipe.transformer.proj_out, weight)
    return unload_calibration(pipe)


class _Loaded:
    """The hooks of one calibration on one pipeline."""

    def __init__(self, pipe: StableDiffusion3Pipeline, layout: Layout, file: CalibrationFile) -> None:
        self.layout = layout
        rows = layout.rows(torch.tensor([file.values], dtype=torch.float64))
        self.scales, self.weights = rows.scales[0], rows.weights[0]
        prompts = {member.prompt for member in layout.members}
        if prompts != {"prompt"} and not layout.is_cfg:
            raise UserError(
                f"This calibration has the members {', '.join(member.prompt for member in layout.members)}. "
                "The stock pipeline can run members that all see the prompt, or the pair (prompt, negative). "
                "Use calibri_lightning's own sampler."
            )
        self._exact_weights = _exact_weights(layout, file)
        self._pipe = pipe
        self._current: tuple[int, torch.device] | None = None
        self._attachment: Attachment = attach(pipe.transformer, layout.sites)
        self._handles = [
            pipe.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            pipe.transformer.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._attachment.detach()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.layout.is_cfg:
            self._check_guided(kwargs)
        repeats = 1 if self.layout.is_cfg else len(self.layout.members)
        if repeats > 1:
            kwargs = {
                k: v.repeat_interleave(repeats, 0) if k in _BATCHED and v is not None else v for k, v in kwargs.items()
            }
        self._set_rows(kwargs["hidden_states"])
        return args, kwargs

    def _check_guided(self, kwargs: dict[str, Any]) -> None:
        if not self._pipe.do_classifier_free_guidance:
            raise UserError(
                f"The pipeline was called with guidance_scale {self._pipe.guidance_scale:g}, which switches "
                "guidance off, but this calibration is a guided pair: it needs the negative prompt's pass. "
                "Call the pipeline with any guidance_scale above 1 (the calibration's own weights set the "
                "strength), or unload_calibration(pipe)."
            )
        if kwargs.get("skip_layers") is not None:
            raise UserError(
                "The pipeline was called with skip_guidance_layers, a third pass that a guided calibration "
                "has no weight for. Leave skip_guidance_layers out, or unload_calibration(pipe)."
            )

    def _set_rows(self, hidden_states: Tensor) -> None:
        """Gives each row its member's scales: halves [negative, prompt] for a pair, else members in turn."""
        batch = len(hidden_states)
        if (batch, hidden_states.device) == self._current:
            return  # the rows of the previous step still stand
        if self.layout.is_cfg:
            rows = self.scales.flip(0).repeat_interleave(batch // 2, 0)
        else:
            rows = self.scales.repeat(batch // len(self.scales), 1)
        self._attachment.set_rows(rows)
        self._current = (batch, hidden_states.device)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        sample = output[0]
        combined = self._combine(sample)
        if combined is sample:
            return output
        return (combined, *output[1:]) if isinstance(output, tuple) else type(output)(sample=combined)

    def _combine(self, sample: Tensor) -> Tensor:
        """Brings the members' weights in; returns `sample` itself where they change nothing."""
        if self.layout.is_cfg:
            guidance = self._pipe.guidance_scale
            prompt, negative = self._exact_weights
            # The pipeline checked that guidance is above 1, so that neither divisor is 0.
            factors = (negative / (1.0 - guidance), prompt / guidance)
            if factors == (1.0, 1.0):
                return sample
            halves = [half * factor for half, factor in zip(sample.chunk(2), factors, strict=True)]
            return torch.cat(halves)
        if self._exact_weights == (1.0,):
            return sample
        weights = self.weights.to(sample.device).view(1, -1, *[1] * (sample.ndim - 1))
        return (sample.unflatten(0, (-1, len(self.weights))) * weights).sum(1).to(sample.dtype)


def _exact_weights(layout: Layout, file: CalibrationFile) -> tuple[float, ...]:
    """The members' weights in float64, so that an untouched pair gives factors of exactly 1."""
    values = dict(zip(file.names, file.values, strict=True))
    if layout.weight_mode == "raw":
        return tuple(values[f"member{m}/weight"] for m in range(len(layout.members)))
    if layout.weight_mode == "guidance":
        return values["strength"] * values["guidance"], values["strength"] * (1.0 - values["guidance"])
    return tuple(member.weight for member in layout.members)


def _loaded(pipe: StableDiffusion3Pipeline, caller: str) -> _Loaded:
    loaded = getattr(pipe, _LOADED, None)
    if not isinstance(loaded, _Loaded):
        raise UserError(
            f"{caller} was called on a pipeline without a calibration. Call load_calibration(pipe, path) first."
        )
    return loaded
