"""How well a picture compresses: rewards without a model, for tests and sanity checks (DDPO, section 5.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward
from calibri_lightning.rewards.pixels import to_pixels

_QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Sizes of pictures as JPEG files of quality 95.

    Args:
        images: float32 [B, 3, H, W] in 0..1.

    Returns:
        float32 [B] in units of 1000 bytes, on the CPU.
    """
    from PIL import Image

    sizes = []
    for picture in to_pixels(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


class JpegIncompressibility(Reward):
    """The more kilobytes, the better: rewards detail and noise."""

    name = "jpeg_incompressibility"
    pixels = "uint8"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: Unused.

        Returns:
            JPEG sizes in kilobytes [B].
        """
        return jpeg_kilobytes(images)


class JpegCompressibility(Reward):
    """The fewer kilobytes, the better: rewards smooth pictures."""

    name = "jpeg_compressibility"
    pixels = "uint8"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: Unused.

        Returns:
            Negative JPEG sizes in kilobytes [B].
        """
        return -jpeg_kilobytes(images)
