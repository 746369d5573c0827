from __future__ import annotations

from collections import Counter

import pytest
import torch
from calibration_models import MODELS, tiny_sd3
from torch import nn

from calibri_lightning.calibration import Granularity, build_layout, find_sites
from calibri_lightning.errors import UserError


def flux_dev() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def sd35(num_layers: int, dual: tuple[int, ...]) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        num_layers=num_layers,
        num_attention_heads=num_layers,
        caption_projection_dim=64 * num_layers,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )


@pytest.mark.parametrize(
    ("build", "counts", "billions"),
    [
        (flux_dev, (57, 76, 114), 11.9),
        (lambda: sd35(24, tuple(range(13))), (24, 61, 107), 2.24),
        (lambda: sd35(38, ()), (38, 76, 150), 8.06),
    ],
    ids=["FLUX.1-dev", "SD3.5-M", "SD3.5-L"],
)
def test_counts_of_the_released_models(build, counts: tuple[int, int, int], billions: float) -> None:
    with torch.device("meta"):
        model = build()
    # That it is the released model and not one of my making: the published number of parameters.
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)
    sites = find_sites(model)
    granularities: tuple[Granularity, ...] = ("block", "layer", "gate")
    found = tuple(len(build_layout(sites, granularity, "single").scale_names) for granularity in granularities)
    assert found == counts
    assert len(sites) == counts[2]


def test_sd3_blocks_have_exactly_their_branches() -> None:
    names = [site.name for site in find_sites(tiny_sd3())]
    assert names == [
        "transformer_blocks.0.attn.image",
        "transformer_blocks.0.mlp.image",
        "transformer_blocks.0.attn2.image",
        "transformer_blocks.0.attn.text",
        "transformer_blocks.0.mlp.text",
        "transformer_blocks.1.attn.image",
        "transformer_blocks.1.mlp.image",
        "transformer_blocks.1.attn.text",
        "transformer_blocks.1.mlp.text",
        "transformer_blocks.2.attn.image",
        "transformer_blocks.2.mlp.image",
    ]


@MODELS
def test_no_two_sites_share_a_name_a_hook_or_a_fold(build) -> None:
    sites = find_sites(build())
    for attribute in ("hook", "fold"):
        assert max(Counter((site.block, getattr(site, attribute)) for site in sites).values()) == 1
    assert max(Counter(site.name for site in sites).values()) == 1


def test_an_unknown_block_class_is_refused_with_a_hint() -> None:
    class StrangeBlock(nn.Module):
        pass

    class StrangeTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedders = nn.ModuleList([nn.Linear(2, 2)])  # a list of plain layers is no list of blocks
            self.transformer_blocks = nn.ModuleList([StrangeBlock()])

    with pytest.raises(UserError) as error:
        find_sites(StrangeTransformer())
    for part in (
        "StrangeBlock",
        "transformer_blocks.0",
        "JointTransformerBlock",
        "@register('StrangeBlock')",
        "Row(",
    ):
        assert part in str(error.value)


def test_a_module_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential has no transformer block.*pipe\.transformer"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


def test_names_do_not_change_under_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_sd3()
    before = find_sites(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "ff.net.2", "norm1.linear"]))
    assert find_sites(wrapped) == before
