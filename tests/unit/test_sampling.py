"""The sampler: noise without history, batches equal to loops, exact schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from calibri_lightning.backbones import repeated_tokens
from calibri_lightning.backbones.base import Conditioning
from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration.attach import Attachment, attach
from calibri_lightning.calibration.scales import Layout, Rows, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.sampling.kernels import euler_step
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.sampling.rollout import sample
from calibri_lightning.shapes.pipeline import TINY, build_pipeline


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3.of(build_pipeline(TINY))


@pytest.fixture
def attachment(backbone: SD3) -> Iterator[Attachment]:
    attachment = attach(backbone.transformer, find_sites(backbone.transformer))
    yield attachment
    attachment.detach()


def candidates(layout: Layout, count: int) -> Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(layout.start + 0.3 * layout.stds * rng.standard_normal((count, layout.num_parameters)))


def test_noise_seeds_are_a_pure_function_and_differ() -> None:
    arguments = [(s, t, p, i) for s in (0, 1) for t in (-2, -1, 0, 1, 12) for p in (0, 1, 2, 12) for i in range(3)]
    seeds = {a: noise_seed(*a) for a in arguments}
    assert seeds == {a: noise_seed(*a) for a in reversed(arguments)}
    assert len(set(seeds.values())) == len(arguments)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    # torch's CPU generator reads the low 32 bits of a seed: those must differ as well.
    assert len({seed % 2**32 for seed in seeds.values()}) == len(arguments)
    # Known forever: a change would change every picture of every recorded run.
    assert noise_seed(0, 0, 0, 0) == 7010924146999214918


def test_euler_steps_integrate_a_linear_ode_exactly_where_it_is_straight() -> None:
    data, noise = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    x, sigmas = noise, torch.tensor([1.0, 0.7, 0.2, 0.0])
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = euler_step(x, noise - data, sigma, following)
        torch.testing.assert_close(x, (1 - following) * data + following * noise)


@pytest.mark.parametrize(("members", "guidance"), [("single", 1.0), ("cfg", 3.0), (3, 1.0)])
def test_a_batch_of_candidates_and_members_equals_loops_over_them(
    backbone: SD3, attachment: Attachment, members: str | int, guidance: float
) -> None:
    layout = build_layout(attachment.sites, "gate", members, guidance)
    rows = layout.rows(candidates(layout, 3))
    noise = backbone.noise([1, 2, 3])
    prompts = backbone.encode(["a red circle", "two blue squares", "a red circle"])
    negatives = backbone.encode(["", "", "a pink square"])
    batch = sample(backbone, attachment, rows, layout.members, prompts, negatives, noise, 3)
    sigmas = backbone.schedule(3)
    for k in range(3):
        x = noise[k : k + 1]
        for step in range(3):
            guided = torch.zeros_like(x)
            for m, member in enumerate(layout.members):
                seen = (prompts if member.prompt == "prompt" else negatives).take([k])
                with attachment.rows(rows.scales[k, m][None]):
                    guided += rows.weights[k, m] * backbone.velocity(x, sigmas[step][None], seen)
            x = x + (sigmas[step + 1] - sigmas[step]) * guided
        torch.testing.assert_close(batch.latents[k], x[0], rtol=0, atol=1e-5)
    assert (batch.latents[0] - batch.latents[2]).abs().max() > 1e-2
    assert batch.num_forwards == 3 * 3 * len(layout.members)
    assert not batch.latents.requires_grad


def test_a_member_without_weight_is_not_run(backbone: SD3, attachment: Attachment) -> None:
    layout = build_layout(attachment.sites, "block", "cfg", 1.0)
    rows = layout.rows(torch.from_numpy(layout.start.copy())[None].expand(2, -1))
    seen: list[int] = []
    handle = backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    text = backbone.encode(["a red circle", "a red circle"])
    result = sample(
        backbone, attachment, rows, layout.members, text, backbone.encode(["", ""]), backbone.noise([1, 2]), 2
    )
    mixed = Rows(rows.scales, torch.tensor([[1.0, 0.0], [1.5, -0.5]]))
    sample(
        backbone,
        attachment,
        mixed,
        layout.members,
        text,
        backbone.encode(["", ""]),
        backbone.noise([1, 2]),
        2,
    )
    handle.remove()
    assert seen == [2, 2, 4, 4]
    assert result.num_forwards == 4
    alone = build_layout(attachment.sites, "block", "single")
    ones = alone.rows(torch.ones(2, alone.num_parameters, dtype=torch.float64))
    expected = sample(backbone, attachment, ones, alone.members, text, None, backbone.noise([1, 2]), 2)
    assert torch.equal(result.latents, expected.latents)


def test_scales_of_one_leave_every_bit(backbone: SD3, attachment: Attachment) -> None:
    attachment.detach()
    untouched = SD3.of(copy.deepcopy(backbone.pipeline))
    attachment = attach(backbone.transformer, attachment.sites)
    layout = build_layout(attachment.sites, "gate", "cfg", 4.0)
    rows = layout.rows(torch.from_numpy(layout.start.copy())[None])
    text, negative, noise = backbone.encode(["a red circle"]), backbone.encode([""]), backbone.noise([1])
    hooked = sample(backbone, attachment, rows, layout.members, text, negative, noise, 2).latents
    attachment.detach()
    sigmas, x = untouched.schedule(2), noise
    for step in range(2):
        both = untouched.velocity(x.repeat(2, 1, 1, 1), sigmas[step].expand(2), Conditioning.cat([text, negative]))
        x = x + (sigmas[step + 1] - sigmas[step]) * untouched.guide(both[None], rows.weights)
    assert torch.equal(hooked, x)


def test_the_loop_never_waits_for_the_device(
    backbone: SD3, attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step reads a tensor's value: everything that would is forbidden while steps run."""
    layout = build_layout(attachment.sites, "gate", "cfg", 4.0)
    rows = layout.rows(candidates(layout, 2))
    text, negative = backbone.encode(["a red circle"] * 2), backbone.encode(["", ""])
    original = backbone.velocity
    inside = False

    def velocity(*arguments: object) -> Tensor:
        nonlocal inside
        inside = True
        return original(*arguments)

    def forbid(name: str) -> None:
        method = getattr(Tensor, name)

        def guarded(self: Tensor, *arguments: object, **options: object) -> object:
            assert not inside, f"Tensor.{name} inside of the loop"
            return method(self, *arguments, **options)

        monkeypatch.setattr(Tensor, name, guarded)

    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "nonzero",
    ):
        forbid(name)
    monkeypatch.setattr(backbone, "velocity", velocity)
    sample(backbone, attachment, rows, layout.members, text, negative, backbone.noise([1, 2]), 3)


def test_conditionings_take_and_join_rows() -> None:
    one = Conditioning({"a": torch.arange(6).reshape(3, 2), "b": torch.arange(3)})
    joined = Conditioning.cat([one, one.take([2, 0])])
    assert len(joined) == 5
    assert joined.tensors["b"].tolist() == [0, 1, 2, 2, 0]
    assert joined.take(torch.tensor([4, 4])).tensors["a"].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("repeats", [1, 2, 256])
def test_one_biased_token_stands_for_equal_ones_in_output_and_gradient(repeats: int) -> None:
    transformer = copy.deepcopy(build_pipeline(TINY).transformer).double()
    generator = torch.Generator().manual_seed(0)
    width = transformer.config.joint_attention_dim
    x = torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 6, width, generator=generator, dtype=torch.float64)
    pooled = torch.randn(2, transformer.config.pooled_projection_dim, generator=generator, dtype=torch.float64)

    def run(tokens: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        transformer.zero_grad()
        output = transformer(
            hidden_states=x,
            timestep=torch.tensor([100.0, 900.0], dtype=torch.float64),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
            **options,
        )[0]
        output.square().sum().backward()
        gradients = [p.grad.flatten() for p in transformer.parameters() if p.grad is not None]
        return output.detach(), torch.cat(gradients)

    repeated = torch.cat([text, text[:, -1:].expand(-1, repeats - 1, -1)], dim=1)
    expected = run(repeated)
    repeated_tokens.install(transformer)
    same = run(repeated)
    assert torch.equal(same[0], expected[0])
    bias = repeated_tokens.key_bias(4, 6, repeats, torch.device("cpu")).double()
    assert bias[0, 0, 0].tolist() == [0.0] * 9 + [pytest.approx(math.log(repeats), abs=1e-7)]
    bias[..., -1] = math.log(repeats)
    collapsed = run(text, joint_attention_kwargs={"key_bias": bias})
    torch.testing.assert_close(collapsed[0], expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(collapsed[1], expected[1], rtol=1e-8, atol=1e-9)
