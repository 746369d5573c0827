"""Options of the sites: what they add, what refuses them, and that files carry them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_models import tiny_flux, tiny_sd3
from site_models import CASES
from torch import nn

from calibri_lightning import CalibrationConfig
from calibri_lightning.assembly import assemble
from calibri_lightning.calibration import (
    CalibrationFile,
    FixedWeights,
    Granularity,
    Layout,
    SiteOptions,
    attach,
    build_layout,
    find_sites,
    fingerprint,
    fold,
    layout_for,
    load_start,
    read_calibration,
    write_calibration,
)
from calibri_lightning.calibration.sites import WITHOUT_SITES, ColumnBlock, InputColumns, Site
from calibri_lightning.errors import UserError
from calibri_lightning.resume import describe, require_same

SPLIT = SiteOptions(split_fused=True)
MODELS = {case.name: case for case in CASES}


def tiny(name: str) -> nn.Module:
    return MODELS[name].tiny().transformer


def split_file(granularity: Granularity) -> tuple[CalibrationFile, Layout]:
    model = tiny_flux()
    layout = build_layout(find_sites(model, SPLIT), granularity, "single", weight_mode="fixed")
    values = tuple(1 + i / 10 for i in range(layout.num_parameters))
    file = CalibrationFile(
        layout.names,
        values,
        granularity,
        layout.members,
        "fixed",
        fingerprint(model),
        site_options=layout.site_options,
    )
    return file, layout


def test_names_with_and_without_options() -> None:
    def names(model: nn.Module, options: SiteOptions, block: str) -> list[str]:
        return [site.name.removeprefix(f"{block}.") for site in find_sites(model, options) if site.block == block]

    single = "single_transformer_blocks.0"
    assert names(tiny_flux(), SiteOptions(), single) == ["fused.joint"]
    assert names(tiny_flux(), SPLIT, single) == ["attn.joint", "mlp.joint"]
    assert names(tiny("wan"), SiteOptions(), "blocks.1") == ["attn.image", "mlp.image"]
    both = ["attn.image", "xattn.image", "mlp.image"]
    assert names(tiny("wan"), SiteOptions(cross_attention=True), "blocks.1") == both


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SiteOptions(cross_attention=True), "cross_attention: true.*SD3Transformer2DModel has no cross-attention"),
        (SPLIT, "split_fused: true.*SD3Transformer2DModel has no block that fuses.*Leave split_fused out"),
    ],
)
def test_an_option_without_use_is_refused(options: SiteOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_sites(tiny_sd3(), options)


def test_the_configuration_reaches_the_sites() -> None:
    backbone: Any = SimpleNamespace(transformer=tiny_sd3(), check_members=lambda *_: None)
    with pytest.raises(UserError, match="cross_attention: true"):
        assemble(backbone, CalibrationConfig(cross_attention=True))
    with pytest.raises(UserError, match="split_fused: true"):
        assemble(backbone, CalibrationConfig(split_fused=True))


@pytest.mark.parametrize("granularity", ["gate", "layer", "block"])
def test_a_file_rebuilds_its_layout_without_being_told_the_options(tmp_path: Path, granularity: Granularity) -> None:
    file, layout = split_file(granularity)
    write_calibration(tmp_path / "calibration.json", file)
    read = read_calibration(tmp_path / "calibration.json")
    assert read == file
    assert layout_for(read, tiny_flux()) == layout
    # A whole block's scale has the same name either way, but acts elsewhere: on the columns, not on the gate.
    default = replace(file, site_options=SiteOptions())
    if granularity == "block":
        assert layout_for(default, tiny_flux()).names == layout.names
        assert layout_for(default, tiny_flux()).sites != layout.sites
    else:
        with pytest.raises(UserError, match="imply"):
            layout_for(default, tiny_flux())


def test_a_file_from_before_there_were_options_has_none(tmp_path: Path) -> None:
    model = tiny_sd3()
    layout = build_layout(find_sites(model), "gate", "single")
    file = CalibrationFile(
        layout.names, tuple(layout.start.tolist()), "gate", layout.members, "raw", fingerprint(model)
    )
    path = tmp_path / "calibration.json"
    write_calibration(path, file)
    document = json.loads(path.read_text())
    del document["site_options"]
    path.write_text(json.dumps(document))
    assert read_calibration(path) == file


@pytest.mark.parametrize("options", [[], {"split_fused": 1}, {"split_fuse": True}, None])
def test_bad_options_in_a_file_are_refused(tmp_path: Path, options: object) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, split_file("block")[0])
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "site_options": options}))
    with pytest.raises(UserError, match=r"calibration\.json: The site_options are .*true or false"):
        read_calibration(path)


def test_neither_a_start_nor_a_checkpoint_mixes_options(tmp_path: Path) -> None:
    model = tiny_flux()
    file, split = split_file("block")
    write_calibration(tmp_path / "calibration.json", file)
    fused = build_layout(find_sites(model), "block", "single", weight_mode="fixed")
    assert load_start(str(tmp_path), split, model).tolist() == list(file.values)
    with pytest.raises(UserError, match="made with cross_attention false, split_fused true"):
        load_start(str(tmp_path), fused, model)
    trained = nn.ParameterDict({"theta": nn.Parameter(torch.ones(4))})
    weights = FixedWeights.of(model, ())
    checkpoint = {
        "calibri_lightning": {"describes": describe(trained, split, model, weights)},
        "state_dict": dict(trained),
    }
    require_same(describe(trained, split, model, weights), checkpoint)
    with pytest.raises(UserError, match=r"act on other sites \(cross_attention, split_fused\)"):
        require_same(describe(trained, fused, model, weights), checkpoint)
    # A checkpoint from before there were options had the default ones.
    old = describe(trained, fused, model, weights)
    del old["site_options"]
    require_same(describe(trained, fused, model, weights), {**checkpoint, "calibri_lightning": {"describes": old}})


def test_halves_of_a_fused_block_are_the_halves_of_its_product() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(10, 4)
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": linear})})
    halves = tuple(
        Site("block", layer, "joint", InputColumns("proj", a, b), ColumnBlock("proj", a, b))
        for layer, a, b in (("attn", 0, 4), ("mlp", 4, 10))
    )
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([[0.3, -2.0], [1.5, 1.0]])
    with torch.no_grad():
        attention, mlp = x[..., :4] @ linear.weight[:, :4].T, x[..., 4:] @ linear.weight[:, 4:].T
        expected = scales[:, 0, None, None] * attention + scales[:, 1, None, None] * mlp + linear.bias
        attachment = attach(model, halves)
        with attachment.rows(scales):
            assert torch.allclose(linear(x), expected, atol=1e-6)
            with pytest.raises(ValueError, match="of 2 rows, but the forward has 1"):
                linear(x[:1])
        attachment.detach()
        second = attach(model, halves[1:])  # what is left when the probe drops a half
        with second.rows(scales[:, 1:]):
            assert torch.allclose(linear(x), attention + scales[:, 1, None, None] * mlp + linear.bias, atol=1e-6)
        second.detach()
        fold(model, halves, scales[0])
        assert torch.allclose(linear(x)[0], expected[0], atol=1e-6)


def test_folding_into_quantised_weights_is_refused() -> None:
    class Packed(nn.Parameter):
        """As of bitsandbytes: a parameter of a class of its own, whose numbers are not the weights."""

    model = tiny_flux()
    sites = find_sites(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    linear = model.transformer_blocks[1].norm1.linear
    original = linear.weight
    for weight in (
        Packed(original.data.clone(), requires_grad=False),
        nn.Parameter(original.data.to(torch.int8), requires_grad=False),
    ):
        linear.weight = weight
        with pytest.raises(UserError, match="quantised or sharded.*keep the hooks, which work with both"):
            fold(model, sites, torch.full((len(sites),), 0.5))
    linear.weight = original
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_block_that_is_neither_pixart_nor_dit_is_refused() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(8, 2, 4)
    with pytest.raises(UserError, match="norm_type 'layer_norm'.*UNets"):
        find_sites(nn.ModuleDict({"blocks": nn.ModuleList([block])}))


def test_what_is_passed_over_has_no_sites_and_its_siblings_stay_refused() -> None:
    class TextProjection(nn.Module):
        pass

    class OtherProjection(nn.Module):
        pass

    assert "TextProjection" in WITHOUT_SITES
    model = nn.ModuleDict({"blocks": tiny_flux().transformer_blocks, "text": nn.ModuleList([TextProjection()])})
    assert {site.block for site in find_sites(model)} == {"blocks.0", "blocks.1"}
    model["text"].append(OtherProjection())
    with pytest.raises(UserError, match=r"class OtherProjection at 'text\.1'"):
        find_sites(model)


def test_options_and_names_are_the_same_under_a_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_flux()
    before = find_sites(model, SPLIT)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["proj_out", "to_q"]))
    assert find_sites(wrapped, SPLIT) == before
    with pytest.raises(UserError, match=r"proj_out' is under a LoRA.*Merge"):
        fold(wrapped, before, torch.ones(len(before)))
