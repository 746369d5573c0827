"""Adapters in peft's format: peft reads ours and we read peft's, alpha and all; what does not fit is refused whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import disturb, outputs
from calibration_models import hooked, tiny_flux, tiny_sd3
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibri_lightning.adapters import (
    LoraOptions,
    Policy,
    adapter_digest,
    add_lora,
    load_adapter,
    load_transformer,
    write_adapter,
    write_transformer,
)
from calibri_lightning.adapters.lora import lora_layers, lora_parameters
from calibri_lightning.calibration import find_sites, fold
from calibri_lightning.errors import UserError

FLOW_GRPO_TARGETS = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]


def by_peft(folder: Path, model: nn.Module | None = None, **options: Any) -> Tensor:
    """An adapter as Flow-GRPO's training script saves it, by peft itself; returns the outputs of its model."""
    from peft import LoraConfig, get_peft_model

    model = tiny_sd3() if model is None else model
    chosen = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian", "target_modules": FLOW_GRPO_TARGETS} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        wrapped = get_peft_model(model, LoraConfig(**chosen)).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return outputs(wrapped.get_base_model())


def unchanged(model: nn.Module) -> bool:
    plain = tiny_sd3()
    return list(model.state_dict()) == list(plain.state_dict()) and torch.equal(outputs(model), outputs(plain))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 3}, "alpha_pattern": {"attn.to_v": 5}},
        {"target_modules": r".*\.0\.attn2?\.to_[qv]"},
        {"target_modules": "all-linear"},
        {"lora_dropout": 0.5},
    ],
)
def test_what_peft_saved_gives_the_same_outputs(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = by_peft(tmp_path, **options)
    model = tiny_sd3()
    record = load_adapter(model, tmp_path)
    assert torch.equal(outputs(model), expected)
    assert not torch.allclose(outputs(tiny_sd3()), expected, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters()), "fixed until it is trained"
    assert not any(module.training for module in model.modules())
    assert not any(isinstance(m, nn.Dropout) for layer in lora_layers(model).values() for m in layer.lora_dropout)
    assert record.sha256 == adapter_digest(tmp_path) == adapter_digest(model)
    assert (record.source, record.merged) == (str(tmp_path), False)


def test_without_its_alpha_the_adapter_would_be_another_one(tmp_path: Path) -> None:
    """diffusers' own loader, given the numbers alone, takes alpha / rank for 1: the loss that we guard against."""
    expected = by_peft(tmp_path)
    model = tiny_sd3()
    model.load_lora_adapter(load_file(tmp_path / "adapter_model.safetensors"), prefix="base_model.model")
    assert {layer.scaling["default_0"] for layer in lora_layers(model).values()} == {1.0}
    assert not torch.allclose(outputs(model), expected, atol=1e-3)
    ours = tiny_sd3()
    load_adapter(ours, tmp_path)
    assert {layer.scaling["default"] for layer in lora_layers(ours).values()} == {2.0}


@pytest.mark.parametrize("inside", ["", "adapter", "lora"])
def test_the_files_are_found_in_the_folders_of_runs(tmp_path: Path, inside: str) -> None:
    expected = by_peft(tmp_path / "run" / inside)
    model = tiny_sd3()
    load_adapter(model, str(tmp_path / "run"))
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
@torch.no_grad()
def test_merged_the_outputs_stay_and_the_model_is_plain_again(tmp_path: Path, build) -> None:
    expected = by_peft(tmp_path, build(), r=4, lora_alpha=8)
    model, plain = build(), build()
    assert load_adapter(model, tmp_path, merge=True).merged
    assert torch.allclose(outputs(model), expected, atol=1e-6)
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not hasattr(model, "peft_config")


@torch.no_grad()
def test_scales_fold_into_a_merged_model(tmp_path: Path) -> None:
    by_peft(tmp_path, r=2, target_modules=["to_q", "norm1.linear", "ff.net.2"])
    model, apart = tiny_sd3(), tiny_sd3()
    load_adapter(model, tmp_path, merge=True)
    load_adapter(apart, tmp_path)
    sites = find_sites(model)
    scales = torch.linspace(0.5, 1.5, len(sites))
    attachment = hooked(apart)
    with attachment.rows(scales.expand(2, -1)):
        expected = outputs(apart)
    fold(model, sites, scales)
    assert torch.allclose(outputs(model), expected, atol=2e-6)


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("targets", [None, ["transformer_blocks.0.*"]])
def test_peft_reads_what_was_written(tmp_path: Path, build, targets) -> None:
    from peft import PeftModel

    model = build()
    add_lora(model, LoraOptions(rank=3, alpha=5.0, targets=targets), seed=0)
    disturb(model)
    digest = write_adapter(tmp_path / "run" / "adapter", model, base_model="owner/name")
    assert digest == adapter_digest(model) == adapter_digest(tmp_path / "run" / "adapter")
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight" in held
    document = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (document["r"], document["lora_alpha"], document["base_model_name_or_path"]) == (3, 5.0, "owner/name")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "run" / "adapter").eval()
    assert torch.equal(outputs(theirs.get_base_model()), outputs(model))
    ours = build()
    load_adapter(ours, tmp_path / "run")
    assert torch.equal(outputs(ours), outputs(model))
    before = [path.read_bytes() for path in sorted((tmp_path / "run" / "adapter").iterdir())]
    write_adapter(tmp_path / "again", ours, base_model="owner/name")
    # What is loaded and written again is the same adapter; how it began is no part of it.
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == before[1]
    assert len(before) == 2, "and nothing temporary is left"


def test_a_copy_is_written_instead_of_the_live_numbers(tmp_path: Path) -> None:
    model = tiny_sd3()
    add_lora(model, LoraOptions(rank=2), seed=0)
    disturb(model)
    policy = Policy(nn.Parameter(torch.ones(2, dtype=torch.float64)), model, "both", torch.ones(2))
    policy.keep("best")
    best = outputs(model)
    disturb(model, seed=9)
    live = outputs(model)
    write_adapter(tmp_path, model, policy.tensors("best"))
    loaded = tiny_sd3()
    load_adapter(loaded, tmp_path)
    assert torch.equal(outputs(loaded), best)
    assert torch.equal(outputs(model), live)
    with pytest.raises(UserError, match=r"has no transformer_blocks\."):
        write_adapter(tmp_path, model, {})
    with pytest.raises(UserError, match="has no adapters"):
        write_adapter(tmp_path, tiny_sd3())


def test_the_digest_tells_numbers_and_strength_apart_and_nothing_else(tmp_path: Path) -> None:
    def digest(alpha: float = 4.0, seed: int = 3, dtype: torch.dtype = torch.float32) -> str:
        model = tiny_sd3(dtype=dtype)
        add_lora(model, LoraOptions(rank=2, alpha=alpha), seed=0)
        disturb(model, seed)
        return adapter_digest(model)

    assert digest() == digest() == digest(dtype=torch.bfloat16)
    assert len({digest(), digest(alpha=5.0), digest(seed=4)}) == 3


def test_on_a_half_precision_base_the_adapter_is_float32(tmp_path: Path) -> None:
    by_peft(tmp_path)
    model = tiny_sd3(dtype=torch.bfloat16)
    load_adapter(model, tmp_path)
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
    assert outputs(model).dtype == torch.bfloat16


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def tensors_edited(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shorten(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_it(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")


FIRST = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json.*alpha"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: edit(f, lora_alpha=...), "lora_alpha None"),
        (lambda f: edit(f, lora_alpha="a"), "lora_alpha 'a'"),
        (lambda f: edit(f, r=...), "has r None"),
        (lambda f: edit(f, r=7), "lora_A.weight is 2 x 16, and this SD3Transformer2DModel takes 7 x 16"),
        (lambda f: edit(f, peft_type="IA3"), "type 'IA3'"),
        (lambda f: edit(f, use_dora=True), "use_dora: True"),
        (lambda f: edit(f, bias="all"), "bias: 'all'"),
        (lambda f: edit(f, modules_to_save=["proj_out"]), "modules_to_save"),
        (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights: 'pissa'"),
        (lambda f: edit(f, of_a_later_peft=True), "of_a_later_peft"),
        (lambda f: edit(f, target_modules=["0.attn.to_q"]), "does not target the layer of its transformer_blocks.1"),
        (lambda f: edit(f, target_modules=["attn.to_q", "attn.to_k"]), "lacks transformer_blocks.*to_k"),
        (lambda f: edit(f, target_modules=["attn.to_q", "attn"]), "does not fit this SD3"),
        (pickle_it, "adapter_model.bin, a pickle.*never opened"),
        (shorten, "not a complete safetensors"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), "holds no tensor"),
        (lambda f: tensors_edited(f, lambda t: t.pop(FIRST)), "lacks transformer_blocks.0.attn.to_q.lora_A"),
        (
            lambda f: tensors_edited(f, lambda t: t.update({FIRST: torch.zeros(2, 5)})),
            "another model: its transformer_blocks.0.attn.to_q.lora_A.weight is 2 x 5",
        ),
        (
            lambda f: tensors_edited(f, lambda t: t.update({FIRST.replace("to_q", "to_z"): t.pop(FIRST)})),
            "1 not in this SD3Transformer2DModel, for example transformer_blocks.0.attn.to_z",
        ),
        (
            lambda f: tensors_edited(f, lambda t: t.update({FIRST.replace("lora_A", "lora_C"): t.pop(FIRST)})),
            "does not agree with its adapter_config.json",
        ),
    ],
)
def test_a_spoilt_adapter_is_refused_and_the_model_untouched(tmp_path: Path, spoil, message: str) -> None:
    by_peft(tmp_path, r=2, lora_alpha=4, target_modules=["attn.to_q"])
    spoil(tmp_path)
    model = tiny_sd3()
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)
    assert unchanged(model)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path / "flux", tiny_flux(), r=2, target_modules=["single_transformer_blocks.0.attn.to_q"])
    by_peft(tmp_path / "deep", tiny_sd3(num_layers=5), r=2, target_modules=["attn.to_q"])
    model = tiny_sd3()
    for source, message in (("flux", "of its 1 layers, none in this SD3"), ("deep", "2 not in.*blocks.3.attn.to_q")):
        with pytest.raises(UserError, match=message):
            load_adapter(model, tmp_path / source)
        assert unchanged(model)
    add_lora(model, LoraOptions(rank=1), seed=0)
    with pytest.raises(UserError, match="has a LoRA already"):
        load_adapter(model, tmp_path / "deep")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def fetch(source: str, allow_patterns: list[str]) -> str:
        asked.append((source, sorted(allow_patterns)))
        by_peft(tmp_path / "fetched")
        return str(tmp_path / "fetched")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    expected = by_peft(tmp_path / "owner" / "name", r=2)
    model = tiny_sd3()
    load_adapter(model, "owner/name")
    assert torch.equal(outputs(model), expected)
    assert not asked, "folders come first"
    assert load_adapter(tiny_sd3(), "owner/other").source == "owner/other"
    assert asked == [("owner/other", ["adapter_config.json", "adapter_model.safetensors"])]

    def offline(source: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("offline mode is on\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"not a folder here, and could not be fetched.*\(offline mode is on\)"):
        load_adapter(tiny_sd3(), "owner/other")
    with pytest.raises(UserError, match="neither an existing folder nor a Hub id"):
        load_adapter(tiny_sd3(), "/nowhere/at/all")
    with pytest.raises(UserError, match="is a file"):
        load_adapter(tiny_sd3(), "owner/name/adapter_config.json")
    (tmp_path / "empty" / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty/adapter has no adapter_config\.json"):
        load_adapter(tiny_sd3(), "empty")


def test_all_weights_are_written_and_read_as_a_model_of_diffusers(tmp_path: Path) -> None:
    model = tiny_sd3()
    policy = Policy(nn.Parameter(torch.ones(2, dtype=torch.float64)), model, "full", torch.ones(2))
    policy.keep("best")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    live = outputs(model)
    for folder, tensors, expected in (
        ("live", None, live),
        ("best", policy.tensors("best"), outputs(tiny_sd3())),
        ("best", None, live),  # over the one before
    ):
        write_transformer(tmp_path / folder / "transformer", model, tensors)
        theirs = type(model).from_pretrained(tmp_path / folder / "transformer").eval()
        assert torch.equal(outputs(theirs), expected)
        ours = tiny_sd3()
        load_transformer(ours, tmp_path / folder / "transformer")
        assert torch.equal(outputs(ours), expected)
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["transformer"]
    assert torch.equal(outputs(model), live)
    for other, message in (
        (tiny_flux(), "holds SD3Transformer2DModel; the rule is a Flux"),
        (tiny_sd3(2), "another size"),
    ):
        with pytest.raises(UserError, match=message):
            load_transformer(other, tmp_path / "live" / "transformer")
    with pytest.raises(UserError, match="holds no model of diffusers"):
        load_transformer(tiny_sd3(), tmp_path)
    next((tmp_path / "live" / "transformer").glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(UserError, match="could not be loaded"):
        load_transformer(tiny_sd3(), tmp_path / "live" / "transformer")
    add_lora(model, LoraOptions(rank=1), seed=0)
    with pytest.raises(UserError, match="has a LoRA"):
        write_transformer(tmp_path / "transformer", model)
