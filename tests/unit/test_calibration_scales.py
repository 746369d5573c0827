from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_models import tiny_sd3

from calibri_lightning.calibration import Layout, Member, build_layout, find_sites
from calibri_lightning.errors import UserError

SITES = find_sites(tiny_sd3())


def test_names_follow_the_granularity() -> None:
    gate = build_layout(SITES, "gate", "single", weight_mode="fixed")
    layer = build_layout(SITES, "layer", "single", weight_mode="fixed")
    block = build_layout(SITES, "block", "single", weight_mode="fixed")
    assert gate.names == tuple(f"member0/{site.name}" for site in SITES)
    assert layer.names[:3] == tuple(f"member0/transformer_blocks.0.{layer}" for layer in ("attn", "mlp", "attn2"))
    assert block.names == tuple(f"member0/transformer_blocks.{i}" for i in range(3))


@pytest.mark.parametrize("granularity", ["block", "layer", "gate"])
@pytest.mark.parametrize(
    ("members", "mode"),
    [("single", "raw"), ("cfg", "raw"), ("cfg", "guidance"), ("cfg", "fixed"), (3, "raw")],
)
def test_each_site_reads_the_entry_that_bears_its_name(granularity, members, mode) -> None:
    layout = build_layout(SITES, granularity, members, guidance_scale=4.0, weight_mode=mode)
    theta = torch.arange(2 * layout.num_parameters, dtype=torch.float64).view(2, -1) / 100
    rows = layout.rows(theta)
    value = dict(zip(layout.names, theta[1].tolist(), strict=True))
    for m in range(len(layout.members)):
        for s, site in enumerate(SITES):
            assert rows.scales[1, m, s].item() == pytest.approx(value[f"member{m}/{layout.scale_name(site)}"])
    if mode == "raw":
        expected = [value[f"member{m}/weight"] for m in range(len(layout.members))]
    elif mode == "guidance":
        g = value["guidance"]
        expected = [value["strength"] * g, value["strength"] * (1 - g)]
    else:
        expected = [4.0, -3.0]
    assert rows.weights[1].tolist() == pytest.approx(expected)
    assert rows.scales.dtype == rows.weights.dtype == torch.float32
    assert rows.scales.shape == (2, len(layout.members), len(SITES))


@pytest.mark.parametrize(
    ("members", "mode", "weights"),
    [("single", "raw", [1]), ("cfg", "raw", [7, -6]), ("cfg", "guidance", [7, -6]), (3, "raw", [1, 0, 0])],
)
def test_the_start_is_the_untouched_model(members, mode, weights: list[float]) -> None:
    layout = build_layout(SITES, "layer", members, guidance_scale=7.0, weight_mode=mode)
    rows = layout.rows(torch.from_numpy(layout.start.copy())[None])
    assert (rows.scales == 1).all()
    assert rows.weights[0].tolist() == weights
    assert (layout.lower <= layout.start).all()
    assert (layout.start <= layout.upper).all()
    assert len(layout.start) == len(layout.lower) == len(layout.upper) == len(layout.stds) == layout.num_parameters
    assert layout.start.dtype == np.float64


def test_bounds_and_step_sizes_by_kind() -> None:
    raw = build_layout(SITES, "block", "cfg", guidance_scale=4.0)
    assert raw.names[-2:] == ("member0/weight", "member1/weight")
    assert list(zip(raw.lower, raw.upper, raw.stds, strict=True))[-3:] == [
        (-1, 2, 1),
        (-10, 10, 0.2),
        (-10, 10, 0.2),
    ]
    guidance = build_layout(SITES, "block", "cfg", guidance_scale=4.0, weight_mode="guidance")
    assert guidance.names[-2:] == ("strength", "guidance")
    assert list(zip(guidance.lower, guidance.upper, guidance.stds, strict=True))[-2:] == [
        (0.5, 1.5, 0.3),
        (0, 20, 5),
    ]


@pytest.mark.parametrize("mode", ["raw", "guidance"])
def test_rows_are_differentiable_in_theta(mode) -> None:
    layout = build_layout(SITES, "layer", "cfg", guidance_scale=4.0, weight_mode=mode)
    theta = torch.from_numpy(layout.start.copy())[None].requires_grad_()
    rows = layout.rows(theta)
    (rows.scales.sum() + (rows.weights * torch.tensor([2.0, 3.0])).sum()).backward()
    sharing = [sum(layout.scale_name(site) == name for site in SITES) for name in layout.scale_names]
    # d/dstrength of 2 s g + 3 s (1 - g) is 2 g + 3 (1 - g) = -1; d/dguidance is 2 s - 3 s = -1.
    weights = [2, 3] if mode == "raw" else [-1, -1]
    assert theta.grad is not None
    assert theta.grad[0].tolist() == pytest.approx([*sharing, *sharing, *weights])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"members": "pair"}, r"members is 'pair'.*'single', 'cfg'"),
        ({"members": 0}, r"members is 0"),
        ({"members": True}, r"members is True"),
        (
            {"members": "cfg", "guidance_scale": 12.0},
            r"member0/weight is 12, outside .*\[-10, 10\].*Lower guid",
        ),
        ({"members": "cfg", "guidance_scale": float("nan")}, r"guidance_scale is nan"),
        ({"members": 2, "weight_mode": "guidance"}, r"weight_mode: guidance .* 2 member\(s\).*members: cfg"),
        ({"members": 2, "weight_mode": "fixed"}, r"members: 2 .*weight 0.*no effect.*weight_mode: raw"),
        ({"members": "single", "granularity": "head"}, r"granularity is 'head'.*'block', 'layer', 'gate'"),
        ({"members": "single", "weight_mode": "learned"}, r"weight_mode is 'learned'"),
    ],
)
def test_bad_words_are_refused(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_layout(SITES, **{"granularity": "gate", **arguments})


def test_rows_refuse_a_theta_of_another_length() -> None:
    layout = build_layout(SITES, "gate", "single")
    with pytest.raises(UserError, match=r"theta has shape \(12,\).*\[candidates, 12\].*theta\[None\]"):
        layout.rows(torch.ones(12))


def test_a_layout_needs_members_it_can_name() -> None:
    with pytest.raises(UserError, match="no member"):
        Layout(SITES, "gate", (), "raw")
    with pytest.raises(UserError, match="prompt of a member is 'image'"):
        Layout(SITES, "gate", (Member("image", 1.0),), "raw")
