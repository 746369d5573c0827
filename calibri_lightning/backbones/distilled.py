"""Guidance-distilled models: one forward, with the guidance scale among its inputs (FLUX.1-dev, FLUX.2-dev)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from calibri_lightning.backbones.loading import DType
from calibri_lightning.backbones.memory import MemoryOptions
from calibri_lightning.backbones.native import Native
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Distilled(Native):
    """A native backbone whose transformer may take an embedded guidance scale."""

    stock_guidance: ClassVar[float]
    """Embedded guidance of the stock pipeline's call."""
    embedded_guidance: float
    """What the transformer is told; without effect on a model that has no embedding for it."""

    def __init__(
        self,
        pretrained: str,
        dtype: DType = "bfloat16",
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        embedded_guidance: float | None = None,
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008 - read, never changed; jsonargparse wants it
    ) -> None:
        """Loads a pipeline.

        Args:
            pretrained: A diffusers folder, or a Hub id "owner/name".
            dtype: Type of weights and activations.
            revision: Branch, tag or commit of a Hub repository.
            height: Height of the pictures, pixels; by default the model's own.
            width: Width of the pictures, pixels; by default the model's own.
            embedded_guidance: Guidance scale that a guidance-distilled transformer takes as an input (the stock
                pipeline's guidance_scale); by default the stock pipeline's own.
            memory: Where text encoders and embeddings are kept, and how the autoencoder and attention run.

        Raises:
            UserError: If the model cannot be loaded, cannot make pictures of that size, cannot keep to `memory`, or
                takes no embedded guidance though one is given.
        """
        super().__init__(pretrained, dtype, revision, height, width, memory)
        if embedded_guidance is not None:
            if not self.takes_guidance:
                raise UserError(
                    f"embedded_guidance is {embedded_guidance:g}, but {pretrained} is not guidance-distilled: its "
                    "transformer takes no guidance scale. Leave embedded_guidance out."
                )
            self.embedded_guidance = embedded_guidance

    def _adopt(self, pipe: DiffusionPipeline, height: int | None, width: int | None) -> None:
        super()._adopt(pipe, height, width)
        self.embedded_guidance = self.stock_guidance

    @property
    def takes_guidance(self) -> bool:
        """Whether the transformer has an embedding of the guidance scale."""
        return bool(self.transformer.config.guidance_embeds)

    def guidance(self, x: Tensor) -> Tensor | None:
        """The transformer's guidance input.

        Args:
            x: Latents [B, ...].

        Returns:
            float32 [B]; None where the transformer takes none.
        """
        return torch.full((len(x),), self.embedded_guidance, device=x.device) if self.takes_guidance else None
