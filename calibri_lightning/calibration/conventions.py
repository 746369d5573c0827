"""How stock pipelines run prompt and negative prompt, and what their guidance scale means.

What is the same for all: an Euler step of a velocity that is linear in the outputs of the prompt's and the negative
prompt's forward, up to a rescaling that leaves it alone where both outputs are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.guidance import combined, rescaled

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Negative = Literal["nowhere", "first half", "second half", "second pass"]
"""Where the negative prompt runs: not at all, in the first or second half of the prompt's batch, or in a forward that
follows the prompt's."""


@dataclass(frozen=True)
class Convention:
    """One family of pipelines."""

    negative: Negative
    switch: str
    """What turns guidance on, in words."""
    batched: tuple[str, ...]
    """Arguments of the transformer that have a row, or an entry, for each picture."""
    last: str
    """Path of the Linear layer that makes the velocity, with * for any name."""
    says_guidance: bool = True
    """Whether the pipeline's guidance_scale is that of the negative prompt; elsewhere the call keeps it to itself."""
    plain_offset: float = 0.0
    """Plain guidance, g of u + g (c - u), minus the guidance scale of the call."""
    guide: Callable[[Tensor, Tensor], Tensor] = combined
    """Combines velocities [B, M, ...] with weights [B, M]."""
    guides_when_distilled: bool = True
    """Whether a pipeline that says that its model is distilled takes a guidance scale all the same."""
    check: Callable[[DiffusionPipeline, Mapping[str, Any]], None] = lambda pipe, given: None
    """Refuses what a guided pair has no weight for, given the transformer's arguments."""

    def never_guides(self, pipe: DiffusionPipeline) -> bool:
        """Says whether a pipeline has no pass for a negative prompt, however it is called.

        Args:
            pipe: A pipeline of this family.

        Returns:
            Whether it has none.
        """
        distilled = bool(pipe.config.get("is_distilled", False))
        return self.negative == "nowhere" or (distilled and not self.guides_when_distilled)

    def plain_guidance(self, guidance_scale: float) -> float:
        """Translates the guidance scale of a call.

        Args:
            guidance_scale: The number as users of the pipeline know it.

        Returns:
            g of u + g (c - u), with c and u the velocities of prompt and negative prompt.
        """
        return self.plain_offset + guidance_scale

    def last_layers(self, transformer: nn.Module) -> tuple[str, ...]:
        """Finds the layers that make the velocity.

        Args:
            transformer: A transformer of this family.

        Returns:
            Their paths.
        """
        return tuple(name for name, _ in transformer.named_modules() if fnmatch(name, self.last))

    def own_guidance(self, plain: float) -> float:
        """Translates back.

        Args:
            plain: Plain guidance.

        Returns:
            The guidance scale of the call.
        """
        return plain - self.plain_offset


def convention_of(pipeline: type[DiffusionPipeline]) -> Convention | None:
    """Finds the convention of a class of pipelines.

    Args:
        pipeline: The class.

    Returns:
        The convention; None for a class that is in no list.
    """
    names = (cls.__name__ for cls in pipeline.__mro__)
    return next((CONVENTIONS[name] for name in names if name in CONVENTIONS), None)


def _no_third_pass(pipe: DiffusionPipeline, given: Mapping[str, Any]) -> None:
    if given.get("skip_layers") is not None:
        raise UserError(
            "The pipeline was called with skip_guidance_layers, a third pass that a guided calibration "
            "has no weight for. Leave skip_guidance_layers out, or unload_calibration(pipe)."
        )


def _no_truncation(pipe: Any, given: Mapping[str, Any]) -> None:
    truncation = pipe._cfg_truncation
    if truncation is not None and float(truncation) < 1:
        raise UserError(
            f"The pipeline was called with cfg_truncation {truncation}, which switches guidance off in its last steps; "
            "a guided calibration guides in all. Leave cfg_truncation out, or unload_calibration(pipe)."
        )


_BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")
_MASKED = (*_BATCHED, "encoder_attention_mask")
_ABOVE_1 = "any guidance_scale above 1"
_ABOVE_0 = "any guidance_scale above 0"
_TRUE_CFG = "any true_cfg_scale above 1 and a negative_prompt (an empty one will do)"

CONVENTIONS: Mapping[str, Convention] = {
    "StableDiffusion3Pipeline": Convention(
        "first half", _ABOVE_1, (*_BATCHED, "pooled_projections"), "proj_out", check=_no_third_pass
    ),
    "FluxPipeline": Convention(
        "second pass", _TRUE_CFG, (*_BATCHED, "pooled_projections", "guidance"), "proj_out", says_guidance=False
    ),
    "QwenImagePipeline": Convention(
        "second pass",
        _TRUE_CFG,
        (*_BATCHED, "encoder_hidden_states_mask", "guidance", "img_shapes"),
        "proj_out",
        says_guidance=False,
        guide=rescaled,
    ),
    "Flux2Pipeline": Convention("nowhere", "", (*_BATCHED, "guidance"), "proj_out"),
    "Flux2KleinPipeline": Convention("second pass", _ABOVE_1, _BATCHED, "proj_out", guides_when_distilled=False),
    "ZImagePipeline": Convention(
        "second half",
        _ABOVE_0,
        ("x", "t", "cap_feats"),
        "all_final_layer.*.linear",
        plain_offset=1.0,
        check=_no_truncation,
    ),
    "Lumina2Pipeline": Convention("second pass", _ABOVE_1, _MASKED, "norm_out.linear_2", guide=rescaled),
    "Krea2Pipeline": Convention("second pass", _ABOVE_0, _MASKED, "final_layer.linear", plain_offset=1.0),
}
"""By pipeline class; subclasses count as their parents."""
