"""Randomly initialised models of real proportions: what a forward costs does not depend on what was learned.

Transformer and autoencoder have the released sizes, texts the released lengths and widths. There are no text encoders:
embeddings are random numbers that cost nothing, which flatters the straightforward loop, since it encodes prompts for
each candidate.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Conditioning, Krea2, Lumina2, QwenImage, ZImage
from calibri_lightning.backbones.loading import DType
from calibri_lightning.backbones.native import Native

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NEGATIVE_TOKENS = 8
"""Tokens of the empty text, for models whose texts differ in length."""


class RandomText(Native):
    """A backbone without text encoders."""

    embedding_shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor of a text's conditioning, without the batch dimension."""
    texts_vary: bool
    """Whether texts differ in length; "prompt" [T, ...] is that of the longest."""

    def encode_text(self, text: str) -> Conditioning:
        """Makes up an embedding that depends on the text.

        Args:
            text: A prompt or negative prompt.

        Returns:
            A conditioning of one row.
        """
        shift = zlib.crc32(text.encode())
        tensors = {
            name: self._noise(name).roll(shift % shape[0], dims=1) for name, shape in self.embedding_shapes.items()
        }
        if not self.texts_vary:
            return Conditioning(tensors)
        length = tensors["prompt"].shape[1] if text else NEGATIVE_TOKENS
        return Conditioning.of_text(tensors["prompt"][:, :length])

    def _noise(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.constant(
            name, lambda: torch.randn(1, *self.embedding_shapes[name], generator=generator).to(self.dtype)
        )


class RandomSD3(RandomText, SD3):
    """Stable Diffusion 3 with a T5 prompt."""

    def _adopt(self, pipe: DiffusionPipeline, height: int | None, width: int | None) -> None:
        super()._adopt(pipe, height, width)
        # No encoder would mean 256 equal tokens, which run as one; the released models have a T5.
        self._collapse = False


class RandomFLUX1(RandomText, FLUX1):
    """FLUX.1."""


class RandomFLUX2(RandomText, FLUX2):
    """FLUX.2."""


class RandomQwenImage(RandomText, QwenImage):
    """Qwen-Image."""


class RandomZImage(RandomText, ZImage):
    """Z-Image."""


class RandomLumina2(RandomText, Lumina2):
    """Lumina-Image 2."""


class RandomKrea2(RandomText, Krea2):
    """Krea 2."""


@dataclass(frozen=True)
class RandomModel:
    """A recipe; the configurations are arguments of diffusers' constructors."""

    backbone: type[RandomText]
    pipeline: str
    """Class in diffusers."""
    transformer: str
    """Class in diffusers."""
    config: Mapping[str, Any]
    """Of the transformer, without the numbers of blocks."""
    blocks: Mapping[str, int]
    """Arguments of the transformer that count blocks."""
    autoencoder: str
    """Class in diffusers."""
    autoencoder_config: Mapping[str, Any]
    text_shapes: Mapping[str, tuple[int, ...]]
    """See `RandomText`."""
    texts_vary: bool = False
    members: Literal["single", "cfg"] = "cfg"
    """How the model is guided: by a negative prompt, or not at all."""
    pipeline_config: Mapping[str, Any] = field(default_factory=dict)

    def slice(self, num_blocks: int | None) -> dict[str, int]:
        """Numbers of blocks of a model with fewer of them, in the released proportion.

        Args:
            num_blocks: Blocks together; as released by default.

        Returns:
            Arguments of the transformer.
        """
        if num_blocks is None:
            return dict(self.blocks)
        left, total, cut = num_blocks, sum(self.blocks.values()), dict[str, int]()
        for name, count in self.blocks.items():
            # Rounded up, so that the first kind is never the one that is left out.
            cut[name] = min(left, -(-left * count // total))
            left, total = left - cut[name], total - count
        return cut


def build_random(
    model: RandomModel, dtype: DType, device: torch.device, num_blocks: int | None, resolution: int
) -> Native:
    """Builds a model with random weights, always the same.

    Args:
        model: The recipe.
        dtype: Type of weights and activations.
        device: Where to build it.
        num_blocks: Transformer blocks; as released by default.
        resolution: Height and width of the pictures, pixels.

    Returns:
        The backbone.

    Raises:
        UserError: If the model makes no pictures of that size.
    """
    import diffusers

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device), _default_dtype(getattr(torch, dtype)):
        torch.manual_seed(0)
        transformer = getattr(diffusers, model.transformer)(**model.config, **model.slice(num_blocks))
        vae = getattr(diffusers, model.autoencoder)(**model.autoencoder_config)
    cls = getattr(diffusers, model.pipeline)
    parts = {"transformer": transformer, "vae": vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is inspect.Parameter.empty]
    pipe = cls(**(dict.fromkeys(needed) | parts), **model.pipeline_config)
    pipe.set_progress_bar_config(disable=True)
    backbone = model.backbone.of(pipe, resolution, resolution)
    backbone.embedding_shapes, backbone.texts_vary = model.text_shapes, model.texts_vary
    return backbone


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Builds weights in a type: in float32 first, the largest models would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
