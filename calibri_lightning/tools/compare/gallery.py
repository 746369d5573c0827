"""The pictures that a report shows: small WebP files, whose size is bounded whatever the model draws."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from torch import Tensor

from calibri_lightning.evaluation.grids import to_uint8

SIDE = 384
"""Longest side of a picture in a report, pixels."""
SMALLEST = 192
"""Smaller pictures are enlarged, each pixel to a square, for a browser would blur them."""
MOST_BYTES = 60_000
"""Most bytes of one picture; quality falls until it fits."""
_QUALITIES = (85, 70, 50, 30, 10)


@dataclass(frozen=True)
class Picture:
    """One contender's picture of a prompt."""

    contender: str
    """Its label."""
    webp: bytes
    width: int
    height: int
    score: float
    """The reward that decides; NaN where it failed."""

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode('ascii')}"


@dataclass(frozen=True)
class GalleryPrompt:
    """A prompt and what each contender made of it, from the same noise."""

    prompt: str
    pictures: tuple[Picture, ...]


def encode(image: Tensor, contender: str, score: float) -> Picture:
    """Makes a picture small enough to be one of many in a page.

    Args:
        image: [3, H, W] in 0..1.
        contender: Whose it is.
        score: What the deciding reward said.

    Returns:
        The picture, at most `SIDE` pixels and `MOST_BYTES` bytes.
    """
    from PIL import Image

    picture = Image.fromarray(to_uint8(image[None])[0])
    longest = max(picture.size)
    if longest > SIDE:
        size = (max(round(picture.width * SIDE / longest), 1), max(round(picture.height * SIDE / longest), 1))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    elif longest < SMALLEST:
        factor = -(-SMALLEST // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    data = b""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        picture.save(stream, format="WEBP", quality=quality, method=4)
        data = stream.getvalue()
        if len(data) <= MOST_BYTES:
            break
    return Picture(contender, data, picture.width, picture.height, score)
