"""Pictures on the wire: what goes out comes back, and what lies about itself is refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibri_lightning.errors import UserError
from calibri_lightning.serving.pictures import LOSSLESS, TooLargeError, pack, unpack
from calibri_lightning.serving.protocol import Codec, Picture, PromptText, content_hash


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (48, 48, 3)])
def test_lossless_codecs_give_back_the_same_pixels(codec: Codec, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    back = unpack(Picture.model_validate_json(pack(pixels, codec).model_dump_json()), 48 * 48)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 4, 5, 3)])
def test_raw_floats_keep_their_bits(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    back = unpack(pack(pixels, "raw"), 40)
    assert back.dtype == np.float32
    assert back.tobytes() == pixels.tobytes()
    assert back.flags.writeable


def test_jpeg_loses_something_and_must_be_allowed() -> None:
    pixels = noise(16, 16, 3)
    packed = pack(pixels, "jpeg")
    with pytest.raises(UserError, match="codec 'jpeg' is not taken here; taken are raw, png, webp-lossless"):
        unpack(packed, 256)
    assert (unpack(packed, 256, ["jpeg"]) != pixels).any()


def bomb() -> Picture:
    """A file that claims fewer pixels on the outside than it has inside."""
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(buffer, "PNG")
    return Picture(codec="png", shape=[2, 2, 3], data=base64.b64encode(buffer.getvalue()).decode())


def grey() -> Picture:
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG")
    return Picture(codec="png", shape=[2, 2, 3], data=base64.b64encode(buffer.getvalue()).decode())


def raw(values: Any, dtype: str = "<f4", shape: tuple[int, ...] = (1, 1, 3)) -> Picture:
    data = np.asarray(values, dtype=dtype).tobytes()
    kind = "float32" if dtype == "<f4" else "uint8"
    return Picture(codec="raw", dtype=kind, shape=list(shape), data=base64.b64encode(data).decode())


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (bomb(), "3000 x 3000 pixels, but 2 x 2 RGB was announced"),
        (grey(), "PNG picture is L of 2 x 2"),
        (Picture(codec="png", shape=[2, 2, 3], data=""), "no readable PNG file"),
        (Picture(codec="webp-lossless", shape=[2, 2, 3], data="AAAA"), "no readable WEBP file"),
        (Picture(codec="raw", shape=[2, 2, 3], data="é"), "not base64"),
        (Picture(codec="raw", shape=[2, 2, 3], data="AAAA"), "has 12 bytes, but 3 came"),
        (raw([0, 0, 0], "u1", (1, 3, 1)), "the rule is"),
        (raw([0.0, 1.5, 0.0]), "not within 0..1"),
        (raw([0.0, -0.1, 0.0]), "not within 0..1"),
        (raw([0.0, float("nan"), 0.0]), "not within 0..1"),
        (Picture(codec="png", dtype="float32", shape=[2, 2, 3], data=""), "raw for float32"),
        (Picture(codec="png", shape=[1, 2, 2, 3], data=""), "raw for float32 and for videos"),
    ],
)
def test_pictures_that_are_not_what_they_say_are_refused(picture: Picture, message: str) -> None:
    with pytest.raises(UserError, match=message):
        unpack(picture, 10_000)


def test_too_large_a_picture_is_refused_by_its_shape_alone() -> None:
    with pytest.raises(TooLargeError, match="has 1000000000000 pixels; at most 4"):
        unpack(Picture(codec="raw", shape=[10**6, 10**6, 3], data=""), 4)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2, 3), np.uint8)])
def test_only_pictures_are_packed(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="cannot be sent"):
        pack(pixels, "raw")


def test_floats_are_not_rounded_on_the_way() -> None:
    with pytest.raises(UserError, match="use raw"):
        pack(np.zeros((2, 2, 3), np.float32), "png")


def test_the_hash_names_content_and_not_the_way_it_travelled() -> None:
    pixels, prompt = noise(4, 4, 3), PromptText(text="a", metadata={"x": 1, "y": [2]})
    first = content_hash("r", "1", unpack(pack(pixels, "png"), 16), prompt)
    same = PromptText.model_validate_json('{"text": "a", "metadata": {"y": [2], "x": 1}}')
    assert first == content_hash("r", "1", unpack(pack(pixels, "webp-lossless"), 16), same)
    others = [
        content_hash("s", "1", pixels, prompt),
        content_hash("r", "2", pixels, prompt),
        content_hash("r", "1", pixels.reshape(2, 8, 3), prompt),
        content_hash("r", "1", pixels ^ 1, prompt),
        content_hash("r", "1", pixels, PromptText(text="b", metadata=prompt.metadata)),
        content_hash("r", "1", pixels, PromptText(text="a")),
    ]
    assert len({first, *others}) == 7
