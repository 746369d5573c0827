"""A new LoRA: what it trains, what it starts from, and that it changes nothing until it is trained."""

from __future__ import annotations

import re

import pytest
import torch
from adapter_tools import disturb
from calibration_models import hooked, inputs, random_scales, run, tiny_flux, tiny_sd3
from tiny_families import CASES
from torch import nn

from calibri_lightning.adapters import LoraOptions, add_lora
from calibri_lightning.adapters.lora import lora_layers, lora_parameters, remove_lora, without_lora
from calibri_lightning.adapters.targets import default_targets
from calibri_lightning.calibration import find_sites, fingerprint, weights_digest
from calibri_lightning.errors import UserError
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

SMALL = LoraOptions(rank=2)


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lora_parameters(model).items()}


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_new_lora_changes_no_bit_and_switched_off_neither_does_a_trained_one(build, dtype: torch.dtype) -> None:
    model, plain = build(dtype=dtype), build(dtype=dtype)
    given = inputs(model, 2)
    expected = run(plain, given)
    add_lora(model, SMALL, seed=0)
    assert torch.equal(run(model, given), expected)
    disturb(model)
    with without_lora(model):
        assert torch.equal(run(model, given), expected)
    assert not torch.allclose(run(model, given), expected, atol=1e-2)
    assert run(model, given).dtype == dtype
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}


def test_only_the_lora_wants_gradients_and_switching_it_off_does_not_change_that() -> None:
    """peft's own switch makes every adapter want gradients that it switches on again."""
    model = tiny_sd3()
    add_lora(model, SMALL, seed=0)

    def wanting() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert wanting() == set(lora_parameters(model))
    with without_lora(model):
        pass
    assert wanting() == set(lora_parameters(model))
    model.requires_grad_(False)
    with pytest.raises(KeyError), without_lora(model):
        raise KeyError
    assert wanting() == set()
    assert not any(layer.disable_adapters for layer in lora_layers(model).values())


def test_the_start_is_a_function_of_the_seed_and_the_layer_alone() -> None:
    def start(seed: int, draws: int, model: nn.Module | None = None, **options) -> dict[str, torch.Tensor]:
        model = model or tiny_sd3()
        torch.manual_seed(draws)
        torch.rand(draws)
        add_lora(model, LoraOptions(rank=2, **options), seed)
        return numbers(model)

    one, same, other = start(5, 1), start(5, 2), start(6, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) != (".lora_A." in name) for name in one)
    # Neither the other layers nor the type of the base matter.
    fewer = start(5, 3, targets=["attn.to_v"])
    half = start(5, 4, tiny_sd3(dtype=torch.bfloat16))
    assert all(torch.equal(one[name], fewer[name]) for name in fewer)
    assert all(torch.equal(one[name], half[name]) for name in half)
    first = [tensor for name, tensor in one.items() if ".lora_A." in name]
    assert len({tuple(tensor.flatten().tolist()) for tensor in first}) == len(first), "each layer has its own"


def test_the_global_random_numbers_do_not_move() -> None:
    state = torch.get_rng_state()
    add_lora(tiny_sd3(), SMALL, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_starts_with_deviation_one_over_the_rank_and_b_with_zero() -> None:
    model = nn.Module()
    model.to_q = nn.Linear(2000, 8)
    add_lora(model, LoraOptions(rank=10, targets=["to_q"]), seed=0)
    drawn = numbers(model)
    assert drawn["to_q.lora_A.default.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    assert drawn["to_q.lora_B.default.weight"].abs().max() == 0
    assert model.to_q.scaling["default"] == 2.0, "alpha is twice the rank"


@pytest.mark.parametrize("alpha", [None, 1.0, 3.0])
@torch.no_grad()
def test_the_update_is_alpha_over_rank_times_b_a(alpha: float | None) -> None:
    model = nn.Module()
    model.to_q = nn.Linear(5, 4)
    x, before = torch.ones(1, 5), model.to_q(torch.ones(1, 5))
    add_lora(model, LoraOptions(rank=2, alpha=alpha, targets=["to_q"]), seed=0)
    disturb(model)
    a, b = (model.get_parameter(f"to_q.lora_{which}.default.weight") for which in "AB")
    assert torch.allclose(model.to_q(x), before + (alpha or 4.0) / 2 * x @ a.T @ b.T, atol=1e-6)


def test_no_dropout_is_active_in_any_mode() -> None:
    model = tiny_sd3()
    add_lora(model, SMALL, seed=0)
    disturb(model)
    assert not any(module.training for module in model.modules())
    given = inputs(model, 2)
    with torch.no_grad():
        still = run(model, given)
        for layer in lora_layers(model).values():
            layer.train()
        assert torch.equal(run(model, given), still)
    inner = [module for layer in lora_layers(model).values() for module in layer.modules()]
    assert not any(isinstance(module, nn.Dropout) for module in inner)


@pytest.mark.parametrize(
    ("build", "pattern", "near"),
    [
        (lambda: CASES["qwen-image"].pipe().transformer, "img_mlp.net.2.proj", "img_mlp.net.2"),
        (tiny_sd3, "attn.to_qq", "attn.to_q"),
        (tiny_sd3, "attn", "transformer_blocks.0.attn.to_q"),
        (tiny_sd3, "o_q", "to_q"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(build, pattern: str, near: str) -> None:
    """Flow-Factory's pattern for Qwen-Image left the MLPs' output projections untrained, silently."""
    model = build()
    keys = set(model.state_dict())
    with pytest.raises(UserError, match=f"'{re.escape(pattern)}', which matches no.*{re.escape(near)}[,.;]"):
        add_lora(model, LoraOptions(targets=["attn.to_k", pattern]), seed=0)
    assert set(model.state_dict()) == keys, "nothing was injected"


def test_patterns_are_ends_of_names_and_take_wildcards() -> None:
    def layers(*targets: str) -> set[str]:
        model = tiny_sd3()
        add_lora(model, LoraOptions(rank=1, targets=list(targets)), seed=0)
        return set(lora_layers(model))

    assert layers("attn.to_q") == {f"transformer_blocks.{i}.attn.to_q" for i in range(3)}, "and not attn2"
    assert layers("attn*.to_q") == layers("to_q") == layers("attn.to_q") | {"transformer_blocks.0.attn2.to_q"}
    assert layers("transformer_blocks.1.attn.to_v") == {"transformer_blocks.1.attn.to_v"}
    # "ff" ends the name of a module, too, which peft would refuse.
    assert layers("transformer_blocks.0.*.linear") == {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
    }


FLOW_GRPO = {
    "qwen-image": 8 + 4,
    "flux1-dev": 8 + 4,
}


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_default_targets_that_reach_the_output(name: str) -> None:
    case = CASES[name]
    backbone = case.make()
    model = backbone.transformer
    before = backbone.probe_forward(1)
    patterns = default_targets(model)
    if name in FLOW_GRPO:
        assert len(patterns) == FLOW_GRPO[name]
    add_lora(model, LoraOptions(rank=1), seed=0)
    assert torch.equal(backbone.probe_forward(1), before)
    attention = {n.rpartition(".")[2] for n in lora_layers(model) if "attn" in n or "attention" in n}
    assert {"to_q", "to_k", "to_v"} <= attention
    disturb(model)
    assert not torch.allclose(backbone.probe_forward(1), before, atol=1e-4)


def test_sd3_trains_what_flow_grpo_trains() -> None:
    model = tiny_sd3()
    add_lora(model, SMALL, seed=0)
    ends = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    every = {f"transformer_blocks.{i}.attn.{end}" for i in range(3) for end in ends}
    assert set(lora_layers(model)) == every - {"transformer_blocks.2.attn.to_add_out"}, "the last block has no text"


NATIVE = [pytest.param(case.pipe, id=name) for name, case in CASES.items()]
NATIVE.append(pytest.param(lambda: build_pipeline(TINY), id="sd3"))


@pytest.mark.parametrize("pipe", NATIVE)
def test_sites_and_fingerprints_are_those_of_the_model_under_a_lora_on_every_layer(pipe) -> None:
    model = pipe().transformer
    model.requires_grad_(False)
    sites, made, digest = find_sites(model), fingerprint(model), weights_digest(model)
    add_lora(model, LoraOptions(rank=1, targets=["*"]), seed=0)
    assert find_sites(model) == sites
    assert not any("base_layer" in site.name for site in sites)
    assert fingerprint(model) == made
    assert weights_digest(model) == digest
    fixed = weights_digest(model, with_adapter=True)
    assert fixed != digest
    for wants in (True, False):
        for parameter in lora_parameters(model).values():
            parameter.requires_grad_(wants)
        assert weights_digest(model) == digest
        assert weights_digest(model, with_adapter=True) == fixed, "whether it wants gradients does not matter"
        trained = weights_digest(model, with_adapter=True, trained=tuple(lora_parameters(model)))
        assert trained == digest, "a LoRA that is trained does not count"
    disturb(model)
    assert weights_digest(model, with_adapter=True) != fixed
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if ".base_layer.weight" in name).mul_(2)
    assert weights_digest(model) != digest


def test_a_model_of_which_all_is_trained_has_a_digest() -> None:
    model = tiny_sd3()
    names = [name for name, _ in model.named_parameters()]
    fixed, trained = weights_digest(model), weights_digest(model, trained=names)
    assert trained != fixed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert weights_digest(model) != fixed
    assert weights_digest(model, trained=names) == trained


def test_a_list_of_layers_under_a_lora_is_no_unknown_block() -> None:
    model = tiny_sd3()
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    sites = find_sites(model)
    add_lora(model, LoraOptions(rank=1, targets=["extra.0"]), seed=0)
    assert find_sites(model) == sites


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("targets", [None, ["*"]])
def test_scales_and_lora_compose_and_gradients_reach_both(build, targets) -> None:
    """Against finite differences (norms inside compute in float32); with targets *, hooked layers are LoRA layers."""
    model = build(dtype=torch.float64)
    add_lora(model, LoraOptions(rank=2, targets=targets), seed=0)
    disturb(model)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.double()
    attachment = hooked(model)
    given = inputs(model, 2)
    scales = random_scales(1, len(attachment.sites), torch.float64).requires_grad_()

    def loss() -> torch.Tensor:
        with attachment.rows(scales.expand(2, -1)):
            return run(model, given).square().mean()

    loss().backward()
    name = next(n for n in lora_parameters(model) if n.startswith("transformer_blocks.0.attn.to_v.lora_B"))
    for tensor in (scales, model.get_parameter(name)):
        assert tensor.grad is not None
        place = int(tensor.grad.abs().argmax())
        moved, step = tensor.data.view(-1), 1e-3
        with torch.no_grad():
            moved[place] += step
            above = loss().item()
            moved[place] -= 2 * step
            below = loss().item()
            moved[place] += step
        assert tensor.grad.view(-1)[place].item() == pytest.approx((above - below) / (2 * step), rel=1e-3)


@torch.no_grad()
def test_removing_gives_the_model_back_and_merging_keeps_the_outputs() -> None:
    model = tiny_sd3()
    keys, given = list(model.state_dict()), inputs(model, 2)
    plain = run(model, given)
    for merge in (False, True):
        add_lora(model, SMALL, seed=0)
        disturb(model)
        trained = run(model, given)
        remove_lora(model, merge)
        assert list(model.state_dict()) == keys
        assert not hasattr(model, "peft_config")
        expected = trained if merge else plain
        assert torch.allclose(run(model, given), expected, atol=1e-6, rtol=0 if not merge else 1e-6)
    assert type(model.transformer_blocks[0].attn.to_q) is nn.Linear


def test_a_second_lora_and_senseless_numbers_are_refused() -> None:
    model = tiny_sd3()
    add_lora(model, SMALL, seed=0)
    with pytest.raises(UserError, match="has a LoRA already"):
        add_lora(model, SMALL, seed=0)
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"alpha": -1.0}):
        with pytest.raises(UserError, match="rank is at least 1"):
            LoraOptions(**wrong)
    with pytest.raises(UserError, match="empty list"):
        add_lora(tiny_sd3(), LoraOptions(targets=[]), seed=0)
    with pytest.raises(UserError, match="No attention was found"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), LoraOptions(), seed=0)
