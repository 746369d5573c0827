"""The picture of the scales and the convergence plot."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from calibri_lightning.evaluation import Convergence, plot_convergence, plot_scales
from calibri_lightning.evaluation.convergence import _running_mean
from calibri_lightning.evaluation.figure import apart, heading, save
from calibri_lightning.evaluation.scale_grid import bands, scale_grids


def sd3_names(num_blocks: int = 4, num_dual: int = 2, num_members: int = 2) -> list[str]:
    """Names as SD3.5-M has them: dual attention first, a last block without text outputs."""
    names = []
    for member in range(num_members):
        for block in range(num_blocks):
            rows = ["attn.image", "mlp.image"] if block == num_blocks - 1 else []
            rows = rows or ["attn.image", "attn.text", "mlp.image", "mlp.text"]
            rows += ["attn2.image"] if block < num_dual else []
            names += [f"member{member}/transformer_blocks.{block}.{row}" for row in rows]
        names.append(f"member{member}/weight")
    return names


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def test_dollar_signs_are_no_mathematics(tmp_path):
    """Labels and prompts are text: half of a formula would raise, a whole one would be set as such."""

    def written(text: str, name: str) -> np.ndarray:
        figure = Figure(figsize=(3, 1), facecolor="white")
        heading(figure, text, "a$b^{c$", 3, 1)
        save(figure, tmp_path / name)
        return pixels(tmp_path / name)

    assert (written("$5 and $6", "price.png") != written("5and6", "formula.png")).any()
    assert (written("$x$", "dollars.png") < 128).sum() > (written("x", "letter.png") < 128).sum()


def test_every_scale_stands_in_its_cell():
    names = sd3_names()
    values = np.arange(len(names)) / 100
    first, second = scale_grids(names, values)
    assert first.rows == ("attn image", "attn text", "attn2 image", "mlp image", "mlp text")
    assert first.columns == tuple(f"transformer_blocks.{i}" for i in range(4))
    assert second.others == (("weight", values[-1]),)
    for grid in (first, second):
        for r, row in enumerate(grid.rows):
            for c, column in enumerate(grid.columns):
                name = f"{grid.member}/{column}.{row.replace(' ', '.')}"
                expected = values[names.index(name)] if name in names else np.nan
                np.testing.assert_equal(grid.values[r, c], expected)


@pytest.mark.parametrize(("tail", "row"), [("", "block"), (".mlp", "mlp"), (".fused.joint", "fused joint")])
def test_coarser_granularities_have_fewer_rows(tail, row):
    (grid,) = scale_grids([f"member0/blocks.{i}{tail}" for i in range(3)], [0.9, 1.0, 1.1])
    assert grid.rows == (row,)
    assert grid.columns == ("blocks.0", "blocks.1", "blocks.2")
    np.testing.assert_array_equal(grid.values, [[0.9, 1.0, 1.1]])


def test_shared_guidance_belongs_to_no_member():
    grids = scale_grids(["member0/blocks.0.attn", "strength", "guidance"], [1.1, 1.0, 7.0])
    assert [g.others for g in grids] == [()]


def test_bands_hold_every_value_once_and_one_kind_of_block():
    names = [f"member0/transformer_blocks.{i}.{row}" for i in range(19) for row in ("attn", "mlp")]
    names += [f"member0/single_transformer_blocks.{i}.fused" for i in range(38)]
    values = np.arange(len(names)) + 1.0
    (grid,) = scale_grids(names, values)
    parts = bands(grid, 16)
    assert [len(p.columns) for p in parts] == [10, 9, 13, 13, 12]
    assert [p.rows for p in parts] == [("attn", "mlp")] * 2 + [("fused",)] * 3
    assert sum((p.columns for p in parts), start=()) == grid.columns
    found = np.concatenate([p.values.ravel() for p in parts])
    np.testing.assert_array_equal(np.sort(found), values)


def test_scale_picture_has_its_size_and_its_colours(tmp_path):
    path = tmp_path / "scales.png"
    names = [f"member0/blocks.{i}.attn" for i in range(12)]
    plot_scales(path, names, [0.5] * 6 + [1.5] * 6)
    image = pixels(path)
    # Inches at 150 dpi: margins .95 + .85 and 12 cells of .46; .75 + .5 and one row of .3.
    assert image.shape[1::-1] == pytest.approx((150 * (1.8 + 12 * 0.46), 150 * 1.55), abs=1)
    red_minus_blue = image[..., 0] - image[..., 2]
    middle = int(150 * (0.95 + 6 * 0.46))
    cells = slice(int(150 * 0.75), int(150 * 1.05))
    assert (red_minus_blue[cells, 150:middle].mean() < -80) & (red_minus_blue[cells, middle:-150].mean() > 80)


def test_unchanged_scales_are_grey(tmp_path):
    path = tmp_path / "scales.png"
    plot_scales(path, [f"member0/blocks.{i}.attn" for i in range(6)], [1.0] * 6)
    cells = pixels(path)[int(150 * 0.75) : int(150 * 1.05), 150 : int(150 * 3.7)]
    assert np.ptp(cells, axis=2).max() < 20
    assert cells.std() > 1  # the numbers are there


def test_a_panel_for_each_member_makes_a_taller_picture(tmp_path):
    sizes = []
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.png"
        names = sd3_names(num_members=count)
        plot_scales(path, names, np.linspace(0.5, 1.5, len(names)), ("prompt", "negative", "other")[:count])
        sizes.append(pixels(path).shape[0])
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=1)
    assert sizes[1] - sizes[0] == pytest.approx(150 * (0.75 + 5 * 0.3), abs=1)


def test_no_scale_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of the 2 names"):
        plot_scales(tmp_path / "a.png", ["strength", "guidance"], [1.0, 7.0])


def run(num_generations: int = 50, **changes) -> Convergence:
    images = 64 * np.arange(1, num_generations + 1)
    train = 0.5 + 0.01 * np.sin(np.arange(num_generations))
    return Convergence(images, train, 0.2 * 0.98 ** np.arange(num_generations), **changes)


def test_convergence_plot_has_its_size_and_shows_what_it_got(tmp_path):
    plain, full = tmp_path / "plain.png", tmp_path / "full.png"
    plot_convergence(plain, run())
    plot_convergence(
        full,
        run(validation_images=[640, 3200], validation=[0.52, 0.55], base=0.5, chosen=(3200, 0.55)),
    )
    images = [pixels(path) for path in (plain, full)]
    assert all(image.shape == (690, 1080, 3) for image in images)
    assert all(image.std() > 10 for image in images)
    orange, green = ((213, 94, 0), (0, 158, 115))
    for colour in (orange, green):
        shown = [(np.abs(image - colour).max(axis=2) < 10).sum() for image in images]
        assert shown[0] == 0
        assert shown[1] > 100


@pytest.mark.parametrize(
    "given",
    [
        Convergence([64], [0.5], [0.1]),
        Convergence([64, 128], [np.nan, np.nan], [0.1, 0.1]),
        Convergence([], [], []),
        run(validation_images=[64], validation=[np.nan], base=float("nan"), chosen=(64, float("nan"))),
    ],
)
def test_short_and_failed_runs_can_be_drawn(tmp_path, given):
    plot_convergence(tmp_path / "a.png", given)
    assert pixels(tmp_path / "a.png").shape == (690, 1080, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Convergence([64, 128], [0.5], [0.1]), "one of each a generation"),
        (run(validation=[0.1]), "one of each a validation"),
    ],
)
def test_lengths_must_agree(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        plot_convergence(tmp_path / "a.png", given)


def test_running_mean_keeps_constants_and_averages_noise():
    np.testing.assert_allclose(_running_mean(np.full(37, 2.5)), 2.5)
    values = np.random.default_rng(0).normal(size=200)
    smooth = _running_mean(values)
    assert smooth[100] == pytest.approx(values[90:111].mean())
    assert smooth[0] == pytest.approx(values[:11].mean())


def test_labels_do_not_cover_each_other():
    placed = apart([(0.5, "b", ""), (0.5, "a\na", ""), (0.51, "c", ""), (2.0, "d", "")], 0.1)
    centres = {name: y for y, name, _ in placed}
    assert centres["d"] == 2.0
    ordered = sorted(placed)
    for (low, first, _), (high, second, _) in zip(ordered, ordered[1:], strict=False):
        room = 0.05 * (2 + first.count("\n") + second.count("\n"))
        assert high - low >= room - 1e-12


def test_pyplot_state_is_untouched(tmp_path):
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    plot_convergence(tmp_path / "a.png", run())
    plot_scales(tmp_path / "b.png", sd3_names(), np.ones(len(sd3_names())))
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
