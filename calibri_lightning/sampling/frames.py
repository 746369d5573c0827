"""Videos among pictures: [B, F, 3, H, W] where pictures are [B, 3, H, W]."""

from __future__ import annotations

from torch import Tensor


def middle_frame(images: Tensor) -> Tensor:
    """Takes one picture of each video, for what looks at single pictures.

    Args:
        images: Pictures [B, 3, H, W], or videos [B, F, 3, H, W].

    Returns:
        [B, 3, H, W]: frame F // 2 of each video; pictures as they are.
    """
    return images[:, images.shape[1] // 2] if images.dim() == 5 else images
