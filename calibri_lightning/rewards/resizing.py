"""Brings pictures to the size that a model sees, on the device where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from calibri_lightning.errors import UserError

Resize = Literal["pillow", "torch"]
"""Who resizes: Pillow on the CPU, to the bits of published scores; or torch where the pictures are, a level off."""


def checked_resize(reward: str, resize: Resize) -> Resize:
    """Checks an option.

    Args:
        reward: The reward's name, for messages.
        resize: Who resizes.

    Returns:
        The same.

    Raises:
        UserError: If it is neither.
    """
    if resize not in get_args(Resize):
        raise UserError(f"resize of the reward {reward!r} is {resize!r}; it must be pillow or torch.")
    return resize


def rounded(images: Tensor) -> Tensor:
    """Rounds pictures to 8 bits, as a file would.

    Args:
        images: float32 [B, 3, H, W] in 0..1.

    Returns:
        float32 of the same shape, on the same device: multiples of 1 / 255.
    """
    return (images * 255).round().clamp(0, 255) / 255


def crop_centre(images: Tensor, processor: Any) -> Tensor:
    """Does what an image processor of CLIP does, with torch: shorter side to size (bicubic), centre, normalise.

    Pixels differ from Pillow's by one level here and there, for it computes with integers.

    Args:
        images: float32 [B, 3, H, W] in 0..1; they are rounded to 8 bits first.
        processor: The image processor, for its sizes, mean and std.

    Returns:
        float32 [B, 3, crop height, crop width], normalised.

    Raises:
        UserError: If pictures would have to be padded.
    """
    side, (height, width) = int(processor.size["shortest_edge"]), images.shape[-2:]
    # As transformers: the longer side is rounded down.
    tall, wide = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    # Columns, then rows, with 8 bits in between: Pillow's way (but for very long pictures), which cuts off what
    # overshoots 0..1 twice.
    resized = rounded(resize(rounded(resize(rounded(images), height, wide)), tall, wide))
    crop = (int(processor.crop_size["height"]), int(processor.crop_size["width"]))
    if crop[0] > tall or crop[1] > wide:
        raise UserError(
            f"resize: torch crops the centre out of pictures, but this model's crop of {crop[0]} x {crop[1]} pixels is "
            f"larger than its shortest_edge of {side}, so pictures would have to be padded. Use resize: pillow."
        )
    top, left = (tall - crop[0]) // 2, (wide - crop[1]) // 2
    return normalised(
        resized[..., top : top + crop[0], left : left + crop[1]], processor.image_mean, processor.image_std
    )


def fit_longest_side(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Brings pictures to a model's size as HPSv2 does: whole, on black.

    Its `create_model_and_transforms(light_augmentation=True)` makes a tensor of the picture, resizes its longest side
    (bicubic; antialiased since torchvision 0.17), pads the other one with zeros, and normalises the result (package
    hpsv2 1.2.0, src/open_clip/{factory,transform}.py). It forgets to pad pictures that have the model's size on their
    longest side already, and fails on those that become thinner than half a pixel; here they become one pixel thin.

    Args:
        images: float32 [B, 3, H, W] in 0..1; they are rounded to 8 bits first.
        size: Side of the pictures that the model sees.
        mean: Of each channel, for normalising.
        std: Of each channel.

    Returns:
        float32 [B, 3, size, size], normalised.
    """
    scale = size / max(images.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    fitted = resize(rounded(images), height, width)
    left, top = (size - width) // 2, (size - height) // 2
    padded = torch.nn.functional.pad(fitted, (left, size - width - left, top, size - height - top))
    return normalised(padded, mean, std)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtracts a mean and divides by a standard deviation.

    Args:
        images: [B, 3, H, W].
        mean: Of each channel.
        std: Of each channel.

    Returns:
        The same shape.
    """
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - shift) / scale


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes, bicubic and antialiased, as Pillow but without its rounding.

    Args:
        images: float32 [B, 3, H, W].
        height: Rows wanted.
        width: Columns wanted.

    Returns:
        float32 [B, 3, height, width].
    """
    if (height, width) == tuple(images.shape[-2:]):
        return images
    if width == 1:
        # torch 2.13 resizes to a single column wrongly on the CPU, by up to the whole range; not to a single row.
        return resize(images.mT, width, height).mT
    return torch.nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
