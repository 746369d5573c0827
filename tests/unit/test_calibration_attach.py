"""What attached scales do: one factor a row and site, differentiable, and nothing where they are 1."""

from __future__ import annotations

import pytest
import torch
from calibration_models import MODELS, hooked, inputs, random_scales, row, run, tiny_flux, tiny_sd3
from torch import Tensor

from calibri_lightning.calibration import attach, find_sites
from calibri_lightning.errors import UserError


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_one_and_no_scales_change_no_bit(build, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    arguments = inputs(model, 3)
    before = run(model, arguments)
    attachment = hooked(model)
    assert torch.equal(run(model, arguments), before)
    with attachment.rows(torch.ones(3, len(attachment.sites))):
        assert torch.equal(run(model, arguments), before)
    attachment.detach()
    assert torch.equal(run(model, arguments), before)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_a_loop_over_samples(build, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    arguments = inputs(model, 4)
    attachment = hooked(model)
    scales = random_scales(4, len(attachment.sites))
    with attachment.rows(scales):
        together = run(model, arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for b in range(4):
        with attachment.rows(scales[b : b + 1]):
            alone = run(model, row(arguments, b))
        assert torch.allclose(together[b : b + 1].float(), alone.float(), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(together, run(model, arguments), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("transformer_blocks.0.attn.image", "attn.to_out.0"),
        ("transformer_blocks.0.attn2.image", "attn2.to_out.0"),
        ("transformer_blocks.0.mlp.image", "ff.net.2"),
        ("transformer_blocks.0.attn.text", "attn.to_add_out"),
        ("transformer_blocks.0.mlp.text", "ff_context.net.2"),
    ],
)
def test_a_site_scales_the_branch_that_its_name_says(name: str, branch: str) -> None:
    model = tiny_sd3()
    arguments = inputs(model, 2)
    attachment = hooked(model)
    scales = torch.ones(2, len(attachment.sites))
    scales[:, [site.name for site in attachment.sites].index(name)] = 0.3
    with attachment.rows(scales):
        by_site = run(model, arguments)
    projection = model.get_submodule(f"transformer_blocks.0.{branch}")
    projection.weight.mul_(0.3)
    projection.bias.mul_(0.3)
    assert torch.allclose(by_site, run(model, arguments), atol=1e-5)


@MODELS
def test_gradients_equal_finite_differences(build) -> None:
    model = build(dtype=torch.float64)
    arguments = inputs(model, 2)
    attachment = hooked(model)
    scales = random_scales(2, len(attachment.sites), torch.float64)
    probe_vector = torch.randn(run(model, arguments).shape, generator=torch.Generator().manual_seed(3))

    def loss(values: Tensor) -> Tensor:
        with attachment.rows(values):
            return (run(model, arguments) * probe_vector).sum()

    leaf = scales.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    step = 1e-2  # RMSNorm works in float32 even in a float64 model: a smaller step only measures its rounding
    for b in range(2):
        for site in range(len(attachment.sites)):
            up, down = scales.clone(), scales.clone()
            up[b, site] += step
            down[b, site] -= step
            difference = (loss(up) - loss(down)) / (2 * step)
            assert leaf.grad[b, site].item() == pytest.approx(difference.item(), rel=1e-4, abs=1e-5)


def test_gradients_reach_float32_scales_through_a_bfloat16_model() -> None:
    model = tiny_sd3(dtype=torch.bfloat16)
    attachment = hooked(model)
    scales = torch.ones(2, len(attachment.sites), requires_grad=True)
    with attachment.rows(scales):
        run(model, inputs(model, 2)).float().square().sum().backward()
    assert scales.grad is not None
    assert scales.grad.dtype == torch.float32
    assert (scales.grad != 0).all()


def test_scales_keep_the_digits_that_bfloat16_would_round_away() -> None:
    model = tiny_sd3(dtype=torch.bfloat16)
    attachment = hooked(model)
    arguments = inputs(model, 2)
    # Both round to 1.5 in bfloat16, which has 8 bits of mantissa.
    with attachment.rows(torch.full((2, len(attachment.sites)), 1.5)):
        first = run(model, arguments)
    with attachment.rows(torch.full((2, len(attachment.sites)), 1.503)):
        second = run(model, arguments)
    assert not torch.equal(first, second)


def test_the_order_of_the_sites_is_the_order_of_the_columns() -> None:
    model = tiny_sd3()
    sites = find_sites(model)
    scales = random_scales(2, len(sites))
    attachment = attach(model, sites)
    with attachment.rows(scales):
        expected = run(model, inputs(model, 2))
    attachment.detach()
    order = torch.randperm(len(sites), generator=torch.Generator().manual_seed(4)).tolist()
    shuffled = attach(model, tuple(sites[i] for i in order))
    with shuffled.rows(scales[:, order]):
        assert torch.equal(run(model, inputs(model, 2)), expected)


def test_wrong_uses_are_refused() -> None:
    model = tiny_sd3()
    sites = find_sites(model)
    attachment = attach(model, sites)
    with pytest.raises(UserError, match="has calibration hooks already"):
        attach(model, sites)
    with pytest.raises(UserError, match=r"shape \(2, 3\).*\[rows of the batch, 11\]"):
        attachment.set_rows(torch.ones(2, 3))
    with pytest.raises(UserError, match="bfloat16"):
        attachment.set_rows(torch.ones(2, len(sites), dtype=torch.bfloat16))
    with (
        attachment.rows(torch.ones(2, len(sites))),
        pytest.raises(ValueError, match="of 2 rows.*has 3"),
    ):
        run(model, inputs(model, 3))
    attachment.detach()
    attachment.detach()
    with pytest.raises(UserError, match="listed twice"):
        attach(model, (*sites, sites[0]))
    with pytest.raises(UserError, match="no module 'single_transformer_blocks.0.norm'"):
        attach(model, find_sites(tiny_flux()))
    assert attach(model, sites).sites == sites


def test_rows_are_unset_after_an_error_inside_with() -> None:
    model = tiny_sd3()
    attachment = hooked(model)
    before = run(model, inputs(model, 1))
    with pytest.raises(RuntimeError), attachment.rows(torch.zeros(1, len(attachment.sites))):
        raise RuntimeError
    assert torch.equal(run(model, inputs(model, 1)), before)
