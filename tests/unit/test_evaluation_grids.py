"""Before/after grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from calibri_lightning.evaluation import Panel, draw_grid, save_grid
from calibri_lightning.evaluation.grids import _font, _wrap, to_uint8

RED, BLUE = (220, 0, 0), (0, 0, 220)


def flat(colours, height: int = 8, width: int = 8) -> torch.Tensor:
    """uint8[B, 3, height, width] of one colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, height, width)


def boxes(image: Image.Image, colour) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of a colour."""
    ys, xs = np.nonzero((np.asarray(image) == colour).all(axis=2))
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def test_base_stands_left_of_calibrated_and_the_caption_below():
    image = draw_grid([Panel("base", flat([RED])), Panel("calibrated", flat([BLUE]))], ["a red circle"], side=64)
    base, calibrated = boxes(image, RED), boxes(image, BLUE)
    assert base[2] < calibrated[0]
    assert (base[1], base[3]) == (calibrated[1], calibrated[3])
    assert base[2] - base[0] + 1 == 64 - 2  # inside its frame
    array = np.asarray(image).astype(int)
    assert array[base[3] + 3 :].min() < 100  # dark letters below
    assert array[: base[1] - 1].min() < 150  # and above
    assert image.size[0] == 2 * 24 + 2 * 64 + 6


def test_prompts_fill_rows_in_order():
    colours = [(10 + i, 200, 30) for i in range(5)]
    image = draw_grid([Panel("", flat(colours))], ["x"] * 5, columns=2, side=32)
    found = [boxes(image, colour)[:2] for colour in colours]
    xs, ys = zip(*found, strict=True)
    assert len(set(xs)) == 2
    assert xs[0] == xs[2] == xs[4] < xs[1] == xs[3]
    assert ys[0] == ys[1] < ys[2] == ys[3] < ys[4]


def test_same_number_of_columns_whatever_is_asked_for_few_prompts():
    few = draw_grid([Panel("", flat([RED]))], ["x"], columns=7, side=32)
    one = draw_grid([Panel("", flat([RED]))], ["x"], columns=1, side=32)
    assert few.size == one.size


def test_floats_and_bytes_give_the_same_pixels():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    np.testing.assert_array_equal(to_uint8(levels), to_uint8(levels.float() / 255))
    np.testing.assert_array_equal(to_uint8(levels), to_uint8(levels.numpy()))
    np.testing.assert_array_equal(to_uint8(levels), levels.permute(0, 2, 3, 1).numpy())
    assert to_uint8((levels.float() / 255).bfloat16()).dtype == np.uint8


def test_values_outside_the_range_are_clipped():
    image = torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 3, 1, 1)
    assert to_uint8(image).tolist() == [[[[0, 128, 255]]]]
    assert to_uint8(torch.full((1, 3, 1, 1), float("nan"))).tolist() == [[[[0, 0, 0]]]]


def test_nearest_shows_pixels_and_lanczos_blends_them():
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4).expand(1, 3, 8, 8)
    inside = (slice(24 + 4, 24 + 60), slice(24 + 4, 24 + 60))
    sharp = np.asarray(draw_grid([Panel("", board)], [""], side=64, upscale="nearest"))[inside]
    smooth = np.asarray(draw_grid([Panel("", board)], [""], side=64, upscale="lanczos"))[inside]
    assert set(np.unique(sharp)) == {0, 255}
    assert len(np.unique(smooth)) > 20


def test_large_pictures_shrink_and_keep_their_shape():
    image = draw_grid([Panel("", flat([RED], 300, 600))], ["x"], side=120)
    left, top, right, bottom = boxes(image, RED)
    assert (right - left + 3, bottom - top + 3) == (120, 60)


def test_scores_mark_the_better_picture_only():
    def accent(scores) -> list[bool]:
        panels = [Panel("", flat([RED]), [scores[0]]), Panel("", flat([RED]), [scores[1]])]
        array = np.asarray(draw_grid(panels, [""], side=64)).astype(int)
        halves = array[24 + 64 :, : 24 + 64 + 3], array[24 + 64 :, 24 + 64 + 3 :]
        return [bool((np.abs(half - (0xB3, 0x47, 0)).max(axis=2) < 12).any()) for half in halves]

    assert accent([0.2, 0.8]) == [False, True]
    assert accent([0.8, 0.2]) == [True, False]
    assert accent([0.5, 0.5]) == [False, False]
    assert accent([float("nan"), 0.5]) == [False, False]


def test_captions_wrap_inside_their_width():
    font = _font(13)
    text = "a very long prompt about a red circle above a blue square"
    lines = _wrap(text, 200, font)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 200 for line in lines)
    cut = _wrap(text * 5, 200, font)
    assert len(cut) == 3
    assert cut[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in cut)
    assert "".join(_wrap("x" * 40, 150, font)) == "x" * 40
    assert _wrap("   ", 100, font) == ()


def test_saved_file_is_the_drawn_picture(tmp_path):
    panels = [Panel("base", flat([RED, BLUE])), Panel("calibrated", flat([BLUE, RED]))]
    captions = ["ein größerer Kreis", "красный круг"]
    save_grid(tmp_path / "grid.png", panels, captions, title="Before and after")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(draw_grid(panels, captions, title="Before and after"))
        )


@pytest.mark.parametrize(
    ("panels", "captions", "message"),
    [
        ([], ["x"], "at least one"),
        ([Panel("", flat([RED])[:0])], [], "at least one"),
        ([Panel("base", flat([RED]))], ["x", "y"], "1 images"),
        ([Panel("base", flat([RED]), [0.1, 0.2])], ["x"], "2 scores"),
        ([Panel("base", flat([RED])[0])], ["x"], "shape"),
    ],
)
def test_what_does_not_fit_is_refused(panels, captions, message):
    with pytest.raises(ValueError, match=message):
        draw_grid(panels, captions)
