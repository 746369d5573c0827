"""Named copies of what is trained: swapped in bitwise, restored bitwise, stored and restored whole."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from adapter_tools import disturb
from calibration_models import hooked, inputs, run, tiny_sd3
from torch import Tensor, nn

from calibri_lightning.adapters import LoraOptions, Policy, Trains, add_lora
from calibri_lightning.adapters.lora import lora_parameters
from calibri_lightning.errors import UserError

EVERY: tuple[Trains, ...] = ("scales", "lora", "both", "full")
LORA: tuple[Trains, ...] = ("scales", "lora", "both")
START = [1.0, 2.0, 3.0]


def made(trains: Trains, dtype: torch.dtype = torch.float32, with_lora: bool = True) -> Policy:
    model = tiny_sd3(num_layers=2, dtype=dtype)
    if trains != "full" and with_lora:
        add_lora(model, LoraOptions(rank=2), seed=0)
        disturb(model)
    theta = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    return Policy(theta, model, trains, torch.ones(3, dtype=torch.float64))


def train(policy: Policy, seed: int = 0) -> None:
    """Changes everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))


def everything(policy: Policy) -> dict[str, Tensor]:
    own = {f"transformer/{name}": p for name, p in policy.transformer.named_parameters()} | {"theta": policy.theta}
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("trains", EVERY)
def test_exactly_what_is_trained_wants_gradients(trains: Trains) -> None:
    policy = made(trains)
    network = dict(policy.transformer.named_parameters())
    lora = set(lora_parameters(policy.transformer))
    expected = {"scales": set(), "lora": lora, "both": lora, "full": set(network)}[trains]
    assert {name for name, parameter in network.items() if parameter.requires_grad} == expected
    assert set(policy.network_names) == expected
    assert policy.theta.requires_grad, "always: DDP and checkpoints want a parameter"
    assert ("theta" in policy.parameters()) == (trains in ("scales", "both"))
    assert list(policy.parameters())[:1] == (["theta"] if policy.trains_theta else list(policy.network_names)[:1])
    assert all(policy.parameters()[name] is network[name] for name in policy.network_names)


@pytest.mark.parametrize("trains", ["scales", "lora", "both", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_used_bitwise_and_all_is_as_it_was_afterwards(trains: Trains, dtype: torch.dtype) -> None:
    policy = made(trains, dtype)
    at_start = everything(policy)
    policy.keep("start")
    train(policy)
    trained, wanted = everything(policy), {n: p.requires_grad for n, p in policy.transformer.named_parameters()}
    assert not same(trained, at_start)
    places = {name: p.data_ptr() for name, p in policy.parameters().items()}
    with policy.using("start"):
        assert same(everything(policy), at_start)
        assert {name: p.data_ptr() for name, p in policy.parameters().items()} == places, "in place"
    assert same(everything(policy), trained)
    assert {n: p.requires_grad for n, p in policy.transformer.named_parameters()} == wanted
    with pytest.raises(KeyError), policy.using("start"):
        raise KeyError
    assert same(everything(policy), trained)
    with policy.using("live"):
        assert same(everything(policy), trained)


@pytest.mark.parametrize("trains", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_base_is_the_model_without_its_lora_bit_for_bit(trains: Trains, dtype: torch.dtype) -> None:
    """A fixed LoRA is switched off, too; theta goes to the untouched model's where it is trained."""
    policy = made(trains, dtype)
    given = inputs(policy.transformer, 2)
    expected = run(tiny_sd3(num_layers=2, dtype=dtype), given)
    train(policy)
    trained, output = everything(policy), run(policy.transformer, given)
    assert not torch.equal(output, expected)
    with policy.using("base"):
        assert torch.equal(run(policy.transformer, given), expected)
        assert torch.equal(policy.theta, torch.ones(3) if policy.trains_theta else torch.tensor(START).double())
    assert same(everything(policy), trained)
    assert torch.equal(run(policy.transformer, given), output)
    assert policy.theta_of("base").tolist() == [1.0, 1.0, 1.0]


def test_theta_of_a_copy_is_its_own_where_theta_is_trained() -> None:
    for trains, expected in (("both", START), ("scales", START), ("lora", [5.0, 6.0, 7.0])):
        policy = made(trains)
        policy.keep("start")
        policy.theta.data.copy_(torch.tensor([5.0, 6.0, 7.0]))
        found = policy.theta_of("start")
        assert found.dtype == np.float64
        assert found.tolist() == expected
        assert policy.theta_of("live").tolist() == [5.0, 6.0, 7.0]
        found[:] = 0  # a copy, not a view
        policy.theta_of("base")[:] = 0
        assert policy.theta.tolist() == [5.0, 6.0, 7.0]
        assert policy.theta_of("base").tolist() == [1.0, 1.0, 1.0]


def test_inside_itself_a_copy_changes_nothing_and_another_is_refused() -> None:
    policy = made("both")
    policy.keep("old")
    train(policy)
    policy.keep("ema", {name: 2 * tensor for name, tensor in policy.tensors("live").items()})
    before = everything(policy)
    with policy.using("old"):
        inside = everything(policy)
        with policy.using("old"):
            assert same(everything(policy), inside)
        assert same(everything(policy), inside), "the inner block does not end the outer one"
        for other in ("ema", "base", "live"):
            with pytest.raises(RuntimeError, match="'old' is in use"), policy.using(other):
                pass
        assert same(everything(policy), inside)
        # What is kept and stored meanwhile is the live policy, not the one in use.
        policy.keep("meanwhile")
        assert policy.theta_of("live").tolist() == before["theta"].tolist()
        assert torch.equal(policy.state_dict()["network"][policy.network_names[0]],
                           before[f"transformer/{policy.network_names[0]}"])  # fmt: skip
        with pytest.raises(RuntimeError, match="in use"):
            policy.load_state_dict(policy.state_dict())
    assert same(everything(policy), before)
    assert torch.equal(policy.tensors("meanwhile")["theta"], policy.theta)


@pytest.mark.parametrize("other", ["old", "base"])
def test_a_graph_built_before_is_walked_back_rightly_after_a_copy_was_used(other: str) -> None:
    """A loss with a reference: forward live, forward under another copy, backward."""

    def gradients(between: bool) -> Iterator[Tensor]:
        policy = made("lora")
        policy.keep("old")
        train(policy)
        loss = run(policy.transformer, inputs(policy.transformer, 2)).square().mean()
        if between:
            with policy.using(other), torch.no_grad():
                run(policy.transformer, inputs(policy.transformer, 2))
        loss.backward()
        yield from (parameter.grad for parameter in policy.parameters().values())

    pairs = list(zip(gradients(False), gradients(True), strict=True))
    assert all(torch.equal(plain, swapped) for plain, swapped in pairs)
    assert any(plain.abs().max() > 0 for plain, _ in pairs)


def test_a_copy_does_not_follow_what_it_was_made_of() -> None:
    policy = made("both")
    given = {name: tensor.detach().clone() for name, tensor in policy.parameters().items()}
    policy.keep("mine", given)
    for tensor in given.values():
        tensor.zero_()
    assert policy.tensors("mine")["theta"].tolist() == START
    policy.keep("live copy")
    train(policy)
    assert policy.tensors("live copy")["theta"].tolist() == START
    policy.forget("mine")
    assert policy.copies == ("live copy",)
    with pytest.raises(UserError, match="no copy 'mine'.*live copy"):
        policy.using("mine").__enter__()
    with pytest.raises(UserError, match="no copy 'mine'"):
        policy.forget("mine")


@pytest.mark.parametrize("trains", EVERY)
def test_stored_and_restored_it_is_the_same_policy(trains: Trains) -> None:
    policy = made(trains)
    policy.keep("start")
    train(policy, 1)
    policy.keep("ema")
    train(policy, 2)
    stream = io.BytesIO()
    torch.save(policy.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    held = everything(policy)
    train(policy, 3)

    other = made(trains)
    other.keep("of another run")
    other.load_state_dict(state)
    other.theta.data.copy_(held["theta"])  # the module's own
    assert same(everything(other), held)
    assert other.copies == policy.copies
    for name in policy.copies:
        assert same(dict(other.tensors(name)), dict(policy.tensors(name)))
        with other.using(name), policy.using(name):
            assert all(torch.equal(p, policy.parameters()[n]) for n, p in other.parameters().items())


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    policy = made("both")
    policy.keep("start")
    before = everything(policy)
    state = policy.state_dict()
    name = policy.network_names[0]
    train(policy)
    trained = everything(policy)
    with pytest.raises(UserError, match="trains: both, and this one has trains: lora"):
        made("lora").load_state_dict(state)
    missing = {**state, "network": {n: t for n, t in state["network"].items() if n != name}}
    reshaped = {**state, "network": {**state["network"], name: torch.zeros(1, 1)}}
    bad_copy = {**state, "copies": {"start": {**state["copies"]["start"], "theta": torch.zeros(4)}}}
    for wrong, what in ((missing, name), (reshaped, name), (bad_copy, "theta")):
        with pytest.raises(UserError, match=f"does not fit what this run trains.*{what}"):
            policy.load_state_dict(wrong)
        assert same(everything(policy), trained)
    policy.load_state_dict(state)
    assert same({n: t for n, t in everything(policy).items() if n != "theta"},
                {n: t for n, t in before.items() if n != "theta"})  # fmt: skip


def test_what_cannot_be_trained_and_names_that_are_taken_are_refused() -> None:
    for trains in ("lora", "both"):
        with pytest.raises(UserError, match="has no LoRA"):
            made(trains, with_lora=False)
    model = tiny_sd3(num_layers=2)
    add_lora(model, LoraOptions(rank=1), seed=0)
    with pytest.raises(UserError, match="trains is full, but the transformer has a LoRA"):
        Policy(nn.Parameter(torch.ones(1)), model, "full", torch.ones(1))
    quantised = tiny_sd3(num_layers=2)
    quantised.hf_quantizer = object()
    with pytest.raises(UserError, match="trains is full, but the transformer is quantised"):
        Policy(nn.Parameter(torch.ones(1)), quantised, "full", torch.ones(1))
    with pytest.raises(UserError, match="trains is 'all'. It is one of scales, lora, both, full"):
        Policy(nn.Parameter(torch.ones(1)), quantised, "all", torch.ones(1))
    policy = made("both")
    for name in ("live", "base"):
        with pytest.raises(UserError, match=f"cannot be called '{name}'"):
            policy.keep(name)
    full = made("full")
    with pytest.raises(UserError, match="cannot be called 'base'"):
        full.keep("base")
    with pytest.raises(UserError, match="no copy 'base'"):
        full.forget("base")


def test_copies_act_under_the_hooks_of_a_calibration() -> None:
    policy = made("lora")
    attachment = hooked(policy.transformer)
    given = inputs(policy.transformer, 2)
    rows = torch.full((2, len(attachment.sites)), 1.5)
    plain = tiny_sd3(num_layers=2)
    with torch.no_grad(), attachment.rows(rows), hooked(plain).rows(rows), policy.using("base"):
        assert torch.equal(run(policy.transformer, given), run(plain, given))
