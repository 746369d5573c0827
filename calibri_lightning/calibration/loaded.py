"""The hooks of one calibration on one stock pipeline.

A guided pair brings its own guidance. Once both forwards of a step are known, their outputs are replaced, both of them,
by the calibration's combined velocity v: then u + g (c - u) and c + g (c - u) are v for any g, and rescaling a guided
velocity to the length of c leaves v alone. So it does not matter which guidance scale the pipeline is called with, nor
whether it can be known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from calibri_lightning.calibration.attach import Attachment, attach
from calibri_lightning.calibration.conventions import Convention
from calibri_lightning.calibration.document import CalibrationFile
from calibri_lightning.calibration.scales import Layout
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Turn = Literal["both", "prompt", "negative"]
"""What a forward of a guided pair computes."""


class Loaded:
    """One calibration on one pipeline, until `remove`."""

    def __init__(
        self, pipe: DiffusionPipeline, convention: Convention | None, layout: Layout, file: CalibrationFile
    ) -> None:
        """Installs the hooks.

        Args:
            pipe: The pipeline.
            convention: How it guides; None where that is not known.
            layout: The meaning of the calibration's values.
            file: The calibration.

        Raises:
            UserError: If the pipeline cannot run the members.
        """
        check_members(pipe, convention, layout, file)
        self.layout, self.weights = layout, layout.member_weights(file.values)
        self.scales = layout.rows(torch.tensor([file.values], dtype=torch.float64)).scales[0]
        self._pipe, self._known_convention = pipe, convention
        self._names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]
        self._turns = _Turns(pipe)
        self._turn: Turn = "both"
        self._prompt_output: Tensor | None = None
        self._current: tuple[Turn, int, torch.device] | None = None
        self._attachment: Attachment = attach(pipe.transformer, layout.sites)
        self._handles = [
            pipe.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            pipe.transformer.register_forward_hook(self._after),
        ]

    @property
    def _convention(self) -> Convention:
        """How the pipeline guides: known wherever there is more than one member of weight 1."""
        assert self._known_convention is not None, "checked when the calibration was loaded"
        return self._known_convention

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._attachment.detach()

    @torch.compiler.disable
    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if self.layout.is_cfg:
            self._turn = self._next_turn(given)
        elif len(self.layout.members) > 1:
            batched, times = self._convention.batched, len(self.layout.members)
            given = {name: _repeated(value, times) if name in batched else value for name, value in given.items()}
        self._set_rows(given[self._names[0]])
        return (), given

    def _next_turn(self, given: Mapping[str, Any]) -> Turn:
        """Finds out what the forward of a guided pair computes, and refuses calls that are not guided."""
        pipe, convention = self._pipe, self._convention
        if convention.says_guidance and not pipe.do_classifier_free_guidance:
            raise UserError(_unguided(f"was called with guidance_scale {pipe.guidance_scale:g}", convention))
        convention.check(pipe, given)
        if convention.negative != "second pass":
            return "both"
        if not convention.says_guidance and len(pipe.scheduler.timesteps) == 1:
            raise UserError(
                f"{type(pipe).__name__} was called with one step. This calibration is a guided pair, and whether the "
                "negative prompt runs shows in the second step only. Call the pipeline with num_inference_steps of 2 "
                "or more, or unload_calibration(pipe)."
            )
        turn = self._turns.next()
        if turn is None:
            raise UserError(_unguided("ran a step without the negative prompt", convention))
        return turn

    def _set_rows(self, latents: Any) -> None:
        """Gives each row its member's scales."""
        device = latents[0].device
        if (self._turn, len(latents), device) == self._current:
            return  # the rows of the forward before still stand
        if not self.layout.is_cfg:
            rows = self.scales.repeat(len(latents) // len(self.scales), 1)
        elif self._turn == "both":
            halves = self.scales if self._convention.negative == "second half" else self.scales.flip(0)
            rows = halves.repeat_interleave(len(latents) // 2, 0)
        else:
            rows = self.scales[int(self._turn == "negative")].expand(len(latents), -1)
        self._attachment.set_rows(rows)
        self._current = (self._turn, len(latents), device)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        sample = output[0]
        changed = self._changed(torch.stack(sample) if isinstance(sample, list) else sample)
        if changed is None:
            return output
        first: Any = list(changed) if isinstance(sample, list) else changed
        return (first, *output[1:]) if isinstance(output, tuple) else type(output)(sample=first)

    def _changed(self, sample: Tensor) -> Tensor | None:
        """Brings the members' weights in; None where they change nothing."""
        if self.layout.is_cfg:
            return None if self._keeps_guidance() else self._changed_pair(sample)
        if self.weights == (1.0,):
            return None
        return self._combined(sample.unflatten(0, (-1, len(self.weights))))

    def _changed_pair(self, sample: Tensor) -> Tensor | None:
        if self._turn == "both":
            first, second = sample.chunk(2)
            pair = (first, second) if self._convention.negative == "second half" else (second, first)
            return self._combined(torch.stack(pair, dim=1)).repeat(2, *[1] * (sample.ndim - 1))
        if self._turn == "prompt":
            self._prompt_output = sample
            return None
        assert self._prompt_output is not None, "the prompt's forward comes first"
        velocity = self._combined(torch.stack((self._prompt_output, sample), dim=1))
        # The pipeline holds the prompt's output and reads it after this forward.
        self._prompt_output.copy_(velocity)
        self._prompt_output = None
        return velocity

    def _keeps_guidance(self) -> bool:
        """Whether the pipeline's own guidance is the calibration's: untouched values then change no bit."""
        convention = self._convention
        if not convention.says_guidance:
            return False
        plain = convention.plain_guidance(self._pipe.guidance_scale)
        return self.weights == (plain, 1.0 - plain)

    def _combined(self, velocities: Tensor) -> Tensor:
        """Combines velocities [B, M, ...] of the members, in float32."""
        weights = torch.tensor(self.weights, dtype=torch.float32, device=velocities.device)
        guided = self._convention.guide(velocities.float(), weights.expand(len(velocities), -1))
        return guided.to(velocities.dtype)


class _Turns:
    """Tells the prompt's forward from the negative prompt's, where every step runs one after the other.

    Each call of a pipeline makes new timesteps, and each step raises the scheduler's index, so a call that was broken
    off leaves no trace.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = pipe
        self._timesteps: Tensor | None = None
        self._step: int | None = None
        self._last: Turn = "negative"

    def next(self) -> Turn | None:
        """The turn of the forward that begins; None if the step before ran no negative prompt."""
        scheduler = self._pipe.scheduler
        same_call = scheduler.timesteps is self._timesteps
        same_step = same_call and scheduler.step_index == self._step
        skipped = same_call and not same_step and self._last == "prompt"
        self._timesteps, self._step = scheduler.timesteps, scheduler.step_index
        self._last = "negative" if same_step and self._last == "prompt" else "prompt"
        return None if skipped else self._last


def check_members(
    pipe: DiffusionPipeline, convention: Convention | None, layout: Layout, file: CalibrationFile
) -> None:
    """Refuses members that a stock pipeline cannot run.

    Args:
        pipe: The pipeline.
        convention: How it guides; None where that is not known.
        layout: The meaning of the calibration's values.
        file: The calibration.

    Raises:
        UserError: If the pipeline cannot run the members.
    """
    name, seen = type(pipe).__name__, [member.prompt for member in layout.members]
    if set(seen) != {"prompt"} and not layout.is_cfg:
        raise UserError(
            f"This calibration has the members {', '.join(seen)}. "
            "The stock pipeline can run members that all see the prompt, or the pair (prompt, negative). "
            "Use calibri_lightning's own sampler."
        )
    if convention is None and layout.member_weights(file.values) != (1.0,):
        raise UserError(
            f"This calibration has {len(seen)} member(s) with weights of their own, and load_calibration does not know "
            f"how {name} batches and combines prompts. It takes a calibration of one member of weight 1 there. Draw "
            "with `python -m calibri_lightning predict` and the Stock backbone, or calibrate with members: single and "
            "weight_mode: fixed."
        )
    if layout.is_cfg and convention is not None and convention.never_guides(pipe):
        raise UserError(
            f"This calibration is a guided pair (prompt and negative prompt), but this {name} is guidance-distilled: "
            "it has no pass for a negative prompt. Use a calibration with members: single, or the base model."
        )


def _unguided(what: str, convention: Convention) -> str:
    return (
        f"The pipeline {what}, which switches guidance off, but this calibration is a guided pair: it needs the "
        f"negative prompt's pass in each step. Call the pipeline with {convention.switch} (the calibration's own "
        "weights set the strength), or unload_calibration(pipe)."
    )


def _repeated(value: Any, times: int) -> Any:
    """Repeats each row of a tensor, or entry of a list, in place; None stays None."""
    if isinstance(value, list):
        return [entry for entry in value for _ in range(times)]
    return value if value is None else value.repeat_interleave(times, 0)
