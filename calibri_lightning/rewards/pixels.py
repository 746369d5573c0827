"""Pictures as files hold them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Rounds pictures to 8 bits, as a file would.

    Args:
        images: float32 [B, 3, H, W] in 0..1, on any device.

    Returns:
        uint8 [B, H, W, 3].
    """
    rounded = (images * 255).round().clamp(0, 255).to(torch.uint8)
    pixels: NDArray[np.uint8] = rounded.permute(0, 2, 3, 1).cpu().numpy()
    return pixels
