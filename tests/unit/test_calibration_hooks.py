"""The hooks themselves: every kind of them, and beside casts, compilation, LoRA and checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calibration_models import hooked, inputs, random_scales, run, tiny_sd3
from torch import Tensor, nn

from calibri_lightning.calibration import Site, attach, find_sites
from calibri_lightning.calibration.sites import ArgumentChunk, Chunk, TupleElement, WholeOutput
from calibri_lightning.errors import UserError


class Toy(nn.Module):
    """A block with one branch for every kind of hook."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(4, 12)
        self.branch = nn.Linear(4, 4)
        self.pair = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        a, b, c = self.modulation(x).chunk(3, dim=-1)
        return a, b, c, self.branch(x), *self.pair(x), *shared.chunk(2, dim=-1)


@pytest.mark.parametrize("by_name", [True, False])
def test_each_kind_of_hook_scales_its_tensor_and_no_other(by_name: bool) -> None:
    hooks = {
        1: Chunk("modulation", 3, 1),
        2: Chunk("modulation", 3, 2),
        3: WholeOutput("branch"),
        5: TupleElement("pair", 1),
        7: ArgumentChunk("shared", 2, 1),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"block": Toy()})
    x, shared = torch.ones(2, 4), torch.ones(2, 6)

    def forward() -> tuple[Tensor, ...]:
        return model["block"](x, shared=shared) if by_name else model["block"](x, shared)

    plain = forward()
    attachment = attach(model, tuple(Site("block", "mlp", "image", hook, None) for hook in hooks.values()))
    scales = random_scales(2, len(hooks))
    with attachment.rows(scales):
        scaled = forward()
    for output in range(8):
        factor = scales[:, list(hooks).index(output)] if output in hooks else torch.ones(2)
        assert torch.allclose(scaled[output], plain[output] * factor[:, None])


def test_rows_that_hook_one_module_in_two_ways_are_refused() -> None:
    sites = tuple(Site("b", "mlp", "image", hook, None) for hook in (WholeOutput("branch"), Chunk("branch", 2, 0)))
    with pytest.raises(UserError, match="exclude each other"):
        attach(nn.ModuleDict({"b": Toy()}), sites)


def test_scales_are_no_state_that_ddp_or_a_cast_could_overwrite() -> None:
    model = tiny_sd3()
    keys, buffers, parameters = (
        set(model.state_dict()),
        dict(model.named_buffers()),
        dict(model.named_parameters()),
    )
    attachment = hooked(model)
    scales = random_scales(2, len(attachment.sites))
    with attachment.rows(scales):
        assert set(model.state_dict()) == keys
        assert dict(model.named_buffers()).keys() == buffers.keys()
        assert dict(model.named_parameters()).keys() == parameters.keys()
        model.to(torch.bfloat16)
        held = [m._calibri_rows for m in model.modules() if getattr(m, "_calibri_rows", None) is not None]
        assert torch.equal(torch.cat(held, dim=1), scales)


def test_the_hooks_are_persistent_and_the_same_object_between_candidates() -> None:
    model = tiny_sd3()
    attachment = hooked(model)
    hooks = {name: dict(module._forward_hooks) for name, module in model.named_modules() if module._forward_hooks}
    assert hooks
    assert len({id(h) for held in hooks.values() for h in held.values()}) == 2  # with and without dual attention
    for scale in (0.5, 2.0):
        with attachment.rows(torch.full((1, len(attachment.sites)), scale)):
            run(model, inputs(model, 1))
    after = {name: dict(module._forward_hooks) for name, module in model.named_modules() if module._forward_hooks}
    assert after == hooks


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_blocks_are_shared_and_not_recompiled_by_new_candidates() -> None:
    from torch._dynamo.testing import CompileCounter

    model = tiny_sd3(num_layers=12, dual=(0, 1, 2, 3))
    arguments = inputs(model, 2)
    attachment = hooked(model)
    candidates = [random_scales(2, len(attachment.sites)) + shift for shift in (0.0, 0.1, 0.2)]
    eager = []
    for scales in candidates:
        with attachment.rows(scales):
            eager.append(run(model, arguments))
    counter = CompileCounter()
    for block in model.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    counts = []
    for scales, expected in zip(candidates, eager, strict=True):
        attachment.set_rows(scales)
        assert torch.allclose(run(model, arguments), expected, atol=1e-6)
        counts.append(counter.frame_count)
    # One graph each for dual, plain and last blocks; 12 of them would hit dynamo's recompile limit of 8.
    assert counts == [3, 3, 3]


@pytest.mark.usefixtures("fresh_dynamo")
def test_attaching_to_a_compiled_model_is_refused() -> None:
    model = tiny_sd3()
    sites = find_sites(model)
    with pytest.raises(UserError, match=r"compiled already.*Attach the calibration first"):
        attach(torch.compile(model, backend="eager"), sites)
    model.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(UserError, match=r"compiled already \(at 'transformer_blocks\.1'\)"):
        attach(model, sites)


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["norm1.linear", "ff.net.2"]])
def test_attaching_before_or_after_a_lora_is_the_same(targets: list[str]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)

    def add_lora(model: nn.Module) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model.add_adapter(config)

    before, after = tiny_sd3(), tiny_sd3()
    arguments = inputs(before, 2)
    plain = run(before, arguments)
    first = hooked(before)
    add_lora(before)
    add_lora(after)
    second = hooked(after)
    scales = random_scales(2, len(first.sites))
    with torch.no_grad(), first.rows(scales), second.rows(scales):
        assert torch.equal(run(before, arguments), run(after, arguments))
    with torch.no_grad():
        assert not torch.allclose(run(after, arguments), plain)


def test_a_hooked_module_that_was_replaced_is_an_error_and_not_a_silent_no_op() -> None:
    model = tiny_sd3()
    attachment = hooked(model)
    model.transformer_blocks[1].norm1 = tiny_sd3().transformer_blocks[1].norm1
    with pytest.raises(UserError, match=r"'transformer_blocks\.1\.norm1' was replaced.*attach again"):
        attachment.set_rows(torch.ones(1, len(attachment.sites)))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = tiny_sd3()
    attachment = hooked(model)
    arguments = inputs(model, 2)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        scales = random_scales(2, len(attachment.sites)).requires_grad_()
        with attachment.rows(scales):
            run(model, arguments).square().sum().backward()
        gradients.append(scales.grad)
    assert torch.equal(gradients[0], gradients[1])
