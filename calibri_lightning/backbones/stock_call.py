"""One picture by a stock pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import first_line
from calibri_lightning.backbones.stock_checks import call_parameters
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Argument = bool | int | float | str
"""A further argument of a pipeline's call."""


@dataclass(frozen=True)
class StockCall:
    """A pipeline and what every call of it has in common."""

    pipe: DiffusionPipeline
    image_size: tuple[int, int]
    """Height and width, pixels."""
    num_frames: int | None
    """Frames of a video; None for the pipeline's default, and for pictures."""
    arguments: Mapping[str, Argument]
    """Further arguments."""

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(call_parameters(self.pipe))

    @property
    def guidance_argument(self) -> str | None:
        """The argument that sets classifier-free guidance; None if the call has none."""
        return next((name for name in ("true_cfg_scale", "guidance_scale") if name in self._parameters), None)

    def picture(self, text: str, negative: str, seed: int, num_steps: int, guidance: float | None) -> Tensor:
        """Draws one picture.

        Args:
            text: The prompt.
            negative: The negative prompt; not used without guidance.
            seed: Seed of the noise.
            num_steps: Number of steps.
            guidance: Guidance scale; None leaves it to the pipeline and `arguments`.

        Returns:
            float32 [1, 3, H, W] in 0..1, or [1, F, 3, H, W].

        Raises:
            UserError: If the pipeline refuses the call, or makes another size.
        """
        picture = self.run(text, negative, seed, num_steps, guidance, "pt").float()
        name, (height, width) = type(self.pipe).__name__, picture.shape[-2:]
        if (height, width) != self.image_size:
            raise UserError(
                f"Pictures of {self.image_size[0]} x {self.image_size[1]} pixels were asked for, but {name} makes them "
                f"{height} x {width}. Set height to {height} and width to {width}."
            )
        asked, made = self.num_frames, picture.shape[1]
        if asked not in (None, made):
            raise UserError(f"{asked} frames were asked for, but {name} makes {made}. Set num_frames to {made}.")
        return picture

    def run(
        self,
        text: str,
        negative: str,
        seed: int,
        num_steps: int,
        guidance: float | None,
        output_type: str = "latent",
    ) -> Tensor:
        """Calls the pipeline.

        Args:
            text: The prompt.
            negative: The negative prompt; not used without guidance.
            seed: Seed of the noise.
            num_steps: Number of steps.
            guidance: Guidance scale; None leaves it to the pipeline and `arguments`.
            output_type: "latent", or "pt" for pictures.

        Returns:
            What the pipeline returns, one picture of it.

        Raises:
            UserError: If the pipeline refuses the call.
        """
        arguments: dict[str, Any] = dict(self.arguments)
        if self.num_frames is not None:
            arguments["num_frames"] = self.num_frames
        if guidance is not None:
            arguments[str(self.guidance_argument)] = guidance
            if "negative_prompt" in self._parameters:
                arguments["negative_prompt"] = negative
            elif negative:
                raise UserError(
                    f"The negative prompt is {negative!r}, but {type(self.pipe).__name__} takes none. Leave negative "
                    "prompts out of the data."
                )
        try:
            output = self.pipe(
                prompt=text,
                height=self.image_size[0],
                width=self.image_size[1],
                num_inference_steps=num_steps,
                generator=torch.Generator().manual_seed(seed),
                output_type=output_type,
                **arguments,
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{type(self.pipe).__name__} refuses its call ({first_line(error)}). Correct height, width, num_frames "
                "or arguments."
            ) from error
        return output[0]


def remember_embeddings(pipe: DiffusionPipeline) -> None:
    """Makes a pipeline encode each text once: its calls ask `encode_prompt` again for every picture.

    Args:
        pipe: The pipeline, changed in place. What it remembers is on the CPU.
    """
    stock = getattr(pipe, "encode_prompt", None)
    if stock is None:
        return
    known: dict[str, object] = {}

    def encode_prompt(*args: object, **kwargs: object) -> object:
        if not _is_plain((*args, *kwargs.values())):
            return stock(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            known[key] = _copied(stock(*args, **kwargs), torch.device("cpu"))
        return _copied(known[key], pipe.transformer.device)

    pipe.encode_prompt = encode_prompt


def _is_plain(value: object) -> bool:
    """Whether a value is told by its `repr`."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | torch.device | torch.dtype)


def _copied(value: object, device: torch.device) -> object:
    """Copies tensors: a pipeline may change its embeddings in place."""
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, device) for item in value)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
