"""Pictures as other people's loops have them: uint8 or floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from calibri_lightning.errors import UserError


def to_float(images: Tensor, videos: bool = False) -> Tensor:
    """Brings pictures to the form that rewards take.

    Args:
        images: [B, 3, H, W], uint8 or floating point in 0..1; a picture with a pixel that is not finite is let through.
        videos: Whether [B, F, 3, H, W] are taken as well.

    Returns:
        float32 of the same shape, in 0..1.

    Raises:
        UserError: If they are no pictures.
    """
    rule = "the rule is [B, 3, H, W]" + (" or [B, F, 3, H, W]" if videos else "") + ", uint8 or floats in 0..1."
    if not isinstance(images, Tensor):
        raise UserError(f"The pictures are a {type(images).__name__}, not a tensor; {rule}")
    kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    if images.ndim not in ((4, 5) if videos else (4,)) or images.shape[-3] != 3:
        raise UserError(f"The pictures are {kind}; {rule}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise UserError(f"The pictures are {kind}; {rule}")
    values = images.detach().float()
    finite = values[values.isfinite()]
    if ((finite < 0) | (finite > 1)).any():
        raise UserError(
            f"The pictures have values from {finite.min():g} to {finite.max():g}; {rule} From -1..1 they come there by "
            "(images + 1) / 2, and clamp(0, 1) cuts what is over."
        )
    return values


def to_bytes(images: Tensor) -> Tensor:
    """Rounds pictures to 8 bits, as a file would.

    Args:
        images: Floating point in 0..1.

    Returns:
        uint8 of the same shape.
    """
    return (images * 255).round().to(torch.uint8)
