from __future__ import annotations

import pytest
import torch
from calibration_models import MODELS, inputs, random_scales, relative, run, tiny_sd3
from torch import Tensor, nn

from calibri_lightning.calibration import Site, attach, find_sites, fold
from calibri_lightning.calibration.sites import OutputProjection, PostNormWeight, WholeOutput
from calibri_lightning.errors import UserError


@MODELS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-13)]
)
def test_folded_equals_hooked(build, dtype: torch.dtype, tolerance: float) -> None:
    model = build(dtype=dtype)
    arguments = inputs(model, 2)
    plain = run(model, arguments)
    attachment = attach(model, find_sites(model))
    scales = random_scales(1, len(attachment.sites), torch.float64)
    with attachment.rows(scales.expand(2, -1)):
        hooked = run(model, arguments)
    attachment.detach()
    fold(model, attachment.sites, scales[0])
    assert relative(run(model, arguments).double(), hooked.double()) < tolerance
    assert relative(plain.double(), hooked.double()) > 3 * tolerance


def test_a_fold_of_ones_changes_no_bit_and_no_key() -> None:
    model = tiny_sd3(dtype=torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = find_sites(model)
    fold(model, sites, torch.ones(len(sites)))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_output_projection_and_post_norm_folds() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        block[1].bias.data.normal_()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    inner, outer = block[0](x), block(x)
    model = nn.ModuleDict({"block": block})
    site = Site("block", "mlp", "image", WholeOutput("0"), OutputProjection("0"))
    fold(model, [site], torch.tensor([0.4]))
    assert torch.allclose(block[0](x), 0.4 * inner)
    fold(model, [site], torch.tensor([2.5]))
    fold(model, [Site("block", "mlp", "image", WholeOutput("1"), PostNormWeight("1"))], torch.tensor([-0.5]))
    assert torch.allclose(block(x), -0.5 * outer, atol=1e-6)


def assert_refused_untouched(model: nn.Module, sites: list[Site], scales: Tensor, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        fold(model, sites, scales)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_refusals_leave_every_weight_as_it_was() -> None:
    model = tiny_sd3()
    sites = list(find_sites(model))
    half = torch.full((len(sites),), 0.5)
    last = sites[-1]
    unfoldable = Site(last.block, last.layer, last.stream, last.hook, None)
    assert_refused_untouched(model, [*sites[:-1], unfoldable], half, r"2\.mlp\.image cannot be folded.*Keep")
    assert_refused_untouched(model, [*sites[:-1], sites[0]], half, "same weights")
    assert_refused_untouched(model, sites, half[:-1], r"shape \(10,\), for 11 sites")
    assert_refused_untouched(model, sites, half.clone().fill_(float("nan")), "finite")
    model.transformer_blocks[2].norm1.to(torch.float8_e4m3fn)
    assert_refused_untouched(model, sites, half, r"float8_e4m3fn: quantised or sharded.*before quantising")


def test_an_unmerged_lora_on_a_folded_layer_is_refused_and_merging_makes_it_right() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_sd3()
    sites = find_sites(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["norm1.linear", "to_q"], init_lora_weights=False)
        wrapped = get_peft_model(model, config).requires_grad_(False).eval()
    scales = random_scales(1, len(sites))
    attachment = attach(wrapped, sites)
    with attachment.rows(scales.expand(2, -1)):
        hooked = run(wrapped, inputs(model, 2))
    attachment.detach()
    assert_refused_untouched(wrapped, list(sites), scales[0], r"norm1\.linear' is under a LoRA.*[Mm]erge")
    merged = wrapped.merge_and_unload()
    fold(merged, sites, scales[0])
    assert relative(run(merged, inputs(model, 2)), hooked) < 1e-5
