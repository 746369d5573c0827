"""What older servers are sent: pictures as files, and what is known of prompts as plain data."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.wire import Batch
from calibri_lightning.serving.pictures import pack

_DEPTH = 16


def pictures(batch: Batch) -> list[NDArray[np.uint8]]:
    """Takes a batch apart.

    Args:
        batch: The pictures.

    Returns:
        uint8 [H, W, 3] each.

    Raises:
        UserError: If it holds videos or floats, which these servers do not take.
    """
    pixels = batch.pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise UserError(
            f"A batch of type {pixels.dtype} and shape {list(pixels.shape)} cannot be sent on this wire; the rule is "
            "pictures uint8 [B, H, W, 3]. Videos and float pictures need a server of `calibri_lightning serve`."
        )
    return list(pixels)


def jpegs(batch: Batch, quality: int) -> list[bytes]:
    """Packs pictures as JPEG files, for servers that read nothing else.

    Args:
        batch: The pictures.
        quality: Pillow's, 1..95; colours are sampled at half resolution, as is Pillow's rule.

    Returns:
        A file each.
    """
    return [_jpeg(picture, quality) for picture in pictures(batch)]


def pngs(batch: Batch) -> list[str]:
    """Packs pictures as PNG files.

    Args:
        batch: The pictures.

    Returns:
        The base64 of a file each.
    """
    return [pack(picture, "png").data for picture in pictures(batch)]


def texts(prompts: Sequence[Prompt]) -> list[str]:
    """Takes the texts of prompts.

    Args:
        prompts: The prompts.

    Returns:
        Their texts.
    """
    return [prompt.text for prompt in prompts]


def plain_metadata(prompt: Prompt) -> dict[str, Any]:
    """Copies what is known of a prompt as plain data, which both JSON and pickles hold.

    Args:
        prompt: The prompt.

    Returns:
        Its metadata, of None, bool, int, float, str, list and dict alone.

    Raises:
        UserError: If it holds anything else.
    """
    return {str(key): _plain(value, prompt, str(key)) for key, value in prompt.metadata.items()}


def _plain(value: object, prompt: Prompt, key: str, depth: int = 0) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if depth < _DEPTH and isinstance(value, Mapping):
        return {str(name): _plain(inside, prompt, key, depth + 1) for name, inside in value.items()}
    if depth < _DEPTH and isinstance(value, list | tuple):
        return [_plain(inside, prompt, key, depth + 1) for inside in value]
    what = value if isinstance(value, float) else f"a {type(value).__module__}.{type(value).__qualname__}"
    raise UserError(
        f"The metadata {key!r} of the prompt {prompt.text!r} hold {what}, which cannot be sent; the rule is null, "
        "bool, finite numbers, str, and lists and dicts of them, not too deep. Correct the file of prompts."
    )


def _jpeg(picture: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
