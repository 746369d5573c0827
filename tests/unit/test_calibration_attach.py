from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calibration_models import inputs, random_scales, row, run, tiny_flux, tiny_sd3
from torch import Tensor, nn

from calibri_lightning.calibration import Attachment, Site, attach, find_sites, probe
from calibri_lightning.calibration.sites import ArgumentChunk, Chunk, TupleElement, WholeOutput
from calibri_lightning.errors import UserError

MODELS = pytest.mark.parametrize("build", [tiny_sd3, tiny_flux])


def hooked(model: nn.Module) -> Attachment:
    return attach(model, find_sites(model))


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


@MODELS
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_probe_finds_no_dead_site_in_a_sound_model(build, batch: int) -> None:
    model = build()
    arguments = inputs(model, batch)
    assert probe(hooked(model), lambda: run(model, arguments)) == ()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_probe_finds_exactly_the_dead_sites(batch: int) -> None:
    model = tiny_sd3()
    for name in ("ff_context.net.2", "attn2.to_out.0"):
        projection = model.get_submodule(f"transformer_blocks.0.{name}")
        projection.weight.zero_()
        projection.bias.zero_()
    attachment = hooked(model)
    arguments = inputs(model, batch)
    dead = probe(attachment, lambda: run(model, arguments))
    assert [site.name for site in dead] == [
        "transformer_blocks.0.attn2.image",
        "transformer_blocks.0.mlp.text",
    ]
    # A branch that nothing reads (the text side of Qwen-Image's last block) is dead too: here, every branch.
    attachment.detach()
    attachment = hooked(model)
    assert set(probe(attachment, lambda: run(model, arguments)[:, :, :0])) == set(attachment.sites)


def test_the_probe_refuses_a_model_that_returns_nan() -> None:
    model = tiny_sd3()
    attachment = hooked(model)
    with pytest.raises(UserError, match="NaN or infinity"):
        probe(attachment, lambda: torch.full((2, 3), float("nan")))


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
