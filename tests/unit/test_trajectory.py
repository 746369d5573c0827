"""Roll-outs and replays: equal bits on every family, gradients through hooks and checkpoints, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import fields
from functools import cache

import pytest
import torch
from sampling_tools import candidates, denoising, trainable
from tiny_families import CASES, NEGATIVES, PROMPTS, SEEDS
from torch import Tensor

from calibri_lightning.backbones import Stock
from calibri_lightning.backbones.native import Native
from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration.scales import Layout, Rows, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE, Kernel, euler_step
from calibri_lightning.sampling.noise import noise_seed, step_noise_seed
from calibri_lightning.sampling.rollout import sample
from calibri_lightning.sampling.trajectory import Trajectory, replay, roll_out
from calibri_lightning.sampling.windows import AllSteps, RandomWindow, SlidingWindow
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

KERNELS: list[Kernel] = [FlowSDE(), DanceSDE(), CPS()]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
FAMILIES = ["sd3", *CASES]
# One of each backbone and of each way to guide: the others differ in the guidance embedding and the schedule alone.
CLASSES = [name for name in FAMILIES if name not in ("flux1-schnell", "krea2-turbo")]
GUIDED = ["sd3", *(name for name, case in CASES.items() if case.guidance)]


@cache
def _pristine() -> SD3:
    return SD3.of(build_pipeline(TINY))


def family(name: str, dtype: torch.dtype = torch.float32) -> Native:
    """A tiny backbone with fresh weights."""
    if name == "sd3":
        pipe, make = copy.deepcopy(_pristine().pipeline), SD3.of
    else:
        case = CASES[name]
        pipe, make = case.pipe(), lambda pipe: case.backbone.of(pipe, *case.size)
    if dtype != torch.float32:
        pipe.transformer.to(dtype)
    return make(pipe)


def layout_of(backbone: Native, members: str = "single") -> Layout:
    return build_layout(find_sites(backbone.transformer), "gate", members, 3.0)


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3.of(copy.deepcopy(_pristine().pipeline))


@pytest.fixture
def denoiser(backbone: SD3) -> Iterator[Denoiser]:
    """Three pictures of two members, four steps."""
    layout = layout_of(backbone, "cfg")
    with denoising(backbone, layout, candidates(layout, 3), PROMPTS, NEGATIVES) as denoiser:
        yield denoiser


def equal(one: Trajectory, other: Trajectory) -> bool:
    """Whether every field has the same bits."""
    for field in fields(Trajectory):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if not (torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) else a == b):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_replay_with_gradients_equals_its_roll_out_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    backbone = family(name, dtype)
    transformer = backbone.transformer.requires_grad_(True)
    for members in ("single", "cfg") if name in GUIDED else ("single",):
        layout = layout_of(backbone, members)
        with denoising(backbone, layout, trainable(candidates(layout, 3)), PROMPTS, NEGATIVES, 3) as denoiser:
            assert denoiser.levels[0] == 1
            for kernel in KERNELS:
                transformer.eval().disable_gradient_checkpointing()
                rolled = roll_out(denoiser, backbone.noise(SEEDS), kernel, (0, 1), SEEDS, keep_means=True)
                assert rolled.log_probs.dtype == torch.float32
                assert rolled.log_probs.isfinite().all()
                assert not rolled.log_probs.requires_grad
                assert len(set(rolled.log_probs.flatten().tolist())) == 6
                check_replays(denoiser, rolled, kernel)
                # Training mode changes nothing either: no family has an active dropout.
                transformer.train().enable_gradient_checkpointing()
                check_replays(denoiser, rolled, kernel)


def check_replays(denoiser: Denoiser, rolled: Trajectory, kernel: Kernel) -> None:
    for index in range(len(rolled.steps)):
        with denoiser.attached():
            again = replay(denoiser, rolled, index, kernel)
        assert again.log_prob.requires_grad
        assert torch.equal(again.log_prob, rolled.log_probs[index])
        assert torch.equal((again.log_prob - rolled.log_probs[index]).exp(), torch.ones(3))
        assert torch.equal(again.mean, rolled.means[index])


@pytest.mark.parametrize("name", CLASSES)
def test_checkpointing_gives_the_same_gradients_through_both_members(name: str) -> None:
    """Recomputing a block in the backward reads its scales once more: of scales, weights and parameters."""
    backbone = family(name)
    layout = layout_of(backbone, "cfg" if name in GUIDED else "single")
    rows, kernel = candidates(layout, 3), FlowSDE()
    backbone.transformer.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        backbone.transformer.zero_grad()
        leaves = trainable(rows)
        with denoising(backbone, layout, leaves, PROMPTS, NEGATIVES, 3) as denoiser:
            rolled = roll_out(denoiser, backbone.noise(SEEDS), kernel, (0, 1), SEEDS)
            for index in range(2):
                with denoiser.attached():
                    replay(denoiser, rolled, index, kernel).log_prob.sum().backward()
        parameters = [p.grad for p in backbone.transformer.parameters() if p.grad is not None]
        gradients.append([leaves.scales.grad, leaves.weights.grad, *parameters])
    plain, checkpointed = gradients
    assert len(plain) == len(checkpointed) > 3
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
    assert (plain[0].abs().amax(dim=(0, 2)) > 0).all(), "each member's scales have a gradient"
    assert (plain[1].abs() > 0).all(), "each weight has a gradient"


def test_leaving_the_denoiser_before_a_checkpointed_backward_is_an_error(backbone: SD3) -> None:
    own = family("sd3")
    layout = layout_of(own)
    own.transformer.requires_grad_(True)
    own.transformer.enable_gradient_checkpointing()
    with denoising(own, layout, trainable(candidates(layout, 2)), PROMPTS[:2]) as denoiser:
        rolled = roll_out(denoiser, own.noise(SEEDS[:2]), FlowSDE(), (0,), SEEDS[:2])
        with denoiser.attached():
            log_prob = replay(denoiser, rolled, 0, FlowSDE()).log_prob
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            log_prob.sum().backward()


@every_kernel
@pytest.mark.parametrize("members", ["single", "cfg"])
def test_gradients_of_theta_agree_with_finite_differences(kernel: Kernel, members: str) -> None:
    own = family("sd3")
    with torch.no_grad():
        own.transformer.proj_out.weight.mul_(20)  # theta matters little to the output of an untrained network
    layout = layout_of(own, members)
    theta = torch.from_numpy(layout.start.copy())
    with denoising(own, layout, layout.rows(theta.expand(3, -1)), PROMPTS, NEGATIVES) as denoiser:
        rolled = roll_out(denoiser, own.noise(SEEDS), kernel, (1,), SEEDS)

        def log_prob(at: Tensor) -> Tensor:
            moved = denoiser.with_rows(layout.rows(at.expand(3, -1)))
            with moved.attached():
                return replay(moved, rolled, 0, kernel).log_prob.sum()

        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(leaf), leaf)
        generator, size = torch.Generator().manual_seed(1), 2e-3
        for _ in range(8):
            direction = torch.randn(len(theta), generator=generator, dtype=torch.float64) / len(theta) ** 0.5
            with torch.no_grad():
                change = log_prob(theta + size * direction) - log_prob(theta - size * direction)
            # The slope along a random direction is about |gradient| / sqrt(n), n = 12 and 24.
            assert abs(float(change) / (2 * size) - float(gradient @ direction)) < 0.01 * float(gradient.norm())


def test_gradients_flow_through_both_branches_of_guidance(denoiser: Denoiser) -> None:
    """d v / d omega is each branch's own velocity: neither is detached."""
    layout_rows = trainable(denoiser.rows)
    moved = denoiser.with_rows(layout_rows)
    x, upstream = denoiser.backbone.noise(SEEDS), denoiser.backbone.noise([7, 8, 9])
    with moved.attached():
        moved.velocity(x, 1).backward(upstream)
    for member in range(2):
        alone = torch.zeros(3, 2)
        alone[:, member] = 1
        one = Denoiser(
            denoiser.backbone,
            denoiser.attachment,
            Rows(denoiser.rows.scales, alone),
            layout_of(denoiser.backbone, "cfg").members,
            denoiser.backbone.encode(PROMPTS),
            denoiser.backbone.encode(NEGATIVES, negative=True),
            4,
            all_members=True,
        )
        with one.attached(), torch.no_grad():
            expected = (one.velocity(x, 1) * upstream).flatten(1).sum(dim=1)
        torch.testing.assert_close(layout_rows.weights.grad[:, member], expected, rtol=1e-4, atol=1e-4)


def test_a_weight_of_zero_has_a_gradient_where_all_members_run(backbone: SD3) -> None:
    layout = build_layout(find_sites(backbone.transformer), "block", 2)
    rows = trainable(candidates(layout, 2, spread=0.0))
    with denoising(backbone, layout, rows, PROMPTS[:2]) as few:
        assert few.num_rows == 2
    with denoising(backbone, layout, rows, PROMPTS[:2], all_members=True) as every:
        assert every.num_rows == 4
        rolled = roll_out(every, backbone.noise(SEEDS[:2]), FlowSDE(), (0,), SEEDS[:2])
        assert rolled.num_forwards == 4 * 4
        with every.attached():
            replay(every, rolled, 0, FlowSDE()).log_prob.sum().backward()
    assert (rows.weights.grad[:, 1].abs() > 0).all()


@every_kernel
def test_a_trajectory_is_what_the_network_saw_and_what_the_kernel_says(
    denoiser: Denoiser, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, fed, levels = denoiser.backbone, [], []
    velocity = backbone.velocity

    def watched(x: Tensor, sigma: Tensor, *others: object) -> Tensor:
        fed.append(x.clone())
        levels.append(sigma.clone())
        return velocity(x, sigma, *others)

    monkeypatch.setattr(backbone, "velocity", watched)
    noise, sigmas = backbone.noise(SEEDS), denoiser.sigmas
    rolled = roll_out(denoiser, noise, kernel, (1, 2), SEEDS, keep_means=True)
    assert rolled.num_forwards == len(fed) * len(fed[0]) == 4 * 3 * 2
    assert rolled.steps == (1, 2)
    assert torch.equal(torch.stack(levels), backbone.schedule(4)[:4, None].expand(4, 6))
    for index, step in enumerate(rolled.steps):
        assert torch.equal(fed[step], rolled.x[index].repeat_interleave(2, dim=0))
        assert torch.equal(fed[step + 1], rolled.x_next[index].repeat_interleave(2, dim=0))
    monkeypatch.undo()
    # The same by a plain loop.
    x = noise
    with torch.no_grad(), denoiser.attached():
        for step in range(4):
            v = denoiser.velocity(x, step)
            if step in (1, 2):
                mean, std = kernel.transition(x, v, sigmas[step], sigmas[step + 1], sigmas[1])
                draw = torch.cat(
                    [
                        torch.randn(
                            (1, *noise.shape[1:]),
                            generator=torch.Generator().manual_seed(step_noise_seed(seed, step)),
                        )
                        for seed in SEEDS
                    ]
                )
                x = mean + std * draw
                assert torch.equal(rolled.means[step - 1], mean)
                assert torch.equal(rolled.x_next[step - 1], x)
                # The noise that is seen in the outcome is the noise that was drawn.
                torch.testing.assert_close((rolled.x_next[step - 1] - mean) / std, draw, rtol=0, atol=5e-4)
            else:
                x = euler_step(x, v, sigmas[step], sigmas[step + 1])
    assert torch.equal(rolled.latents, x)


@pytest.mark.parametrize("name", CLASSES)
def test_the_ode_sampler_keeps_its_bits(name: str) -> None:
    """`sample`, a roll-out without stochastic steps, and the loop as it was before they shared code."""
    backbone = family(name)
    layout = layout_of(backbone, "cfg" if name in GUIDED else "single")
    rows, count, num_steps = candidates(layout, 3), len(layout.members), 3
    prompts, negatives = backbone.encode(PROMPTS), backbone.encode(NEGATIVES, negative=True)
    noise, sigmas = backbone.noise(SEEDS), backbone.schedule(num_steps)
    both = (prompts, negatives)[:count]
    order = [member * 3 + row for row in range(3) for member in range(count)]
    conditioning = type(prompts).cat(both).take(order)
    with denoising(backbone, layout, rows, PROMPTS, NEGATIVES, num_steps) as denoiser, torch.no_grad():
        attachment, x = denoiser.attachment, noise
        with attachment.rows(rows.scales.flatten(0, 1)):
            for step in range(num_steps):
                v = backbone.velocity(x.repeat_interleave(count, dim=0), sigmas[step].expand(3 * count), conditioning)
                guided = backbone.guide(v.unflatten(0, (3, count)), rows.weights)
                x = x + (sigmas[step + 1] - sigmas[step]) * guided
        drawn = sample(backbone, attachment, rows, layout.members, prompts, negatives, noise, num_steps)
        rolled = roll_out(denoiser, noise, FlowSDE(), (), SEEDS, keep_means=True)
    assert torch.equal(drawn.latents, x)
    assert torch.equal(rolled.latents, x)
    assert drawn.num_forwards == rolled.num_forwards == 3 * count * num_steps
    assert rolled.x.shape == rolled.means.shape == (0, *noise.shape)
    assert rolled.log_probs.shape == (0, 3)


def test_steps_outside_of_the_window_follow_the_ode(denoiser: Denoiser) -> None:
    noise = denoiser.backbone.noise(SEEDS)
    ode = roll_out(denoiser, noise, FlowSDE(), (), SEEDS)
    late = roll_out(denoiser, noise, FlowSDE(), (2,), SEEDS)
    x = noise
    with torch.no_grad(), denoiser.attached():
        for step in range(2):
            x = euler_step(x, denoiser.velocity(x, step), denoiser.sigmas[step], denoiser.sigmas[step + 1])
    assert torch.equal(late.x[0], x)
    assert (late.latents - ode.latents).abs().max() > 1e-2


def test_noise_of_a_step_is_a_function_of_picture_and_step(denoiser: Denoiser, untouched_rng: None) -> None:
    arguments = [(seed, step) for seed in (0, 1, 2**62, *SEEDS) for step in range(50)]
    seeds = {pair: step_noise_seed(*pair) for pair in arguments}
    assert len({seed % 2**32 for seed in seeds.values()}) == len(set(arguments))
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert not set(seeds.values()) & {noise_seed(s, t, 0, 0) for s in range(3) for t in range(50)}
    # Known forever: a change would change every resumed run.
    assert step_noise_seed(0, 0) == 264921484827343897
    # One picture's noise changes with its own seed alone.
    noise = denoiser.backbone.noise(SEEDS)
    one = roll_out(denoiser, noise, FlowSDE(), (0, 1), SEEDS)
    other = roll_out(denoiser, noise, FlowSDE(), (0, 1), [SEEDS[0], SEEDS[1], 99])
    assert torch.equal(one.x_next[0, :2], other.x_next[0, :2])
    assert not torch.equal(one.x_next[0, 2], other.x_next[0, 2])
    assert equal(one, roll_out(denoiser, noise, FlowSDE(), (0, 1), SEEDS))


@every_kernel
def test_units_of_the_same_composition_give_the_same_bits_and_others_close_ones(backbone: SD3, kernel: Kernel) -> None:
    layout = layout_of(backbone, "cfg")
    rows = candidates(layout, 3)
    part = [2, 0]
    with denoising(backbone, layout, rows, PROMPTS, NEGATIVES) as whole:
        trajectory = roll_out(whole, backbone.noise(SEEDS), kernel, (0, 1), SEEDS)
    few = Rows(rows.scales[part], rows.weights[part])
    texts, others, seeds = ([values[i] for i in part] for values in (PROMPTS, NEGATIVES, SEEDS))
    rolled = []
    for _ in range(2):
        with denoising(backbone, layout, few, texts, others) as chunk:
            rolled.append(roll_out(chunk, backbone.noise(seeds), kernel, (0, 1), seeds))
    assert equal(*rolled)
    torch.testing.assert_close(rolled[0].log_probs, trajectory.log_probs[:, part], rtol=0, atol=1e-5)
    torch.testing.assert_close(rolled[0].latents, trajectory.latents[part], rtol=0, atol=1e-4)


@every_kernel
def test_offloading_changes_no_bit(denoiser: Denoiser, kernel: Kernel) -> None:
    noise = denoiser.backbone.noise(SEEDS)
    kept, offloaded = (
        roll_out(denoiser, noise, kernel, (0, 2), SEEDS, keep_means=True, offload=offload) for offload in (False, True)
    )
    assert equal(kept, offloaded)
    assert offloaded.x.device == offloaded.x_next.device == offloaded.means.device == torch.device("cpu")
    with denoiser.attached():
        for index in range(2):
            assert torch.equal(replay(denoiser, offloaded, index, kernel).log_prob, kept.log_probs[index])
    assert roll_out(denoiser, noise, kernel, (0,), SEEDS).means is None


def test_other_scales_change_the_ratio_and_the_same_ones_do_not(denoiser: Denoiser) -> None:
    kernel = FlowSDE()
    rolled = roll_out(denoiser, denoiser.backbone.noise(SEEDS), kernel, (0,), SEEDS)
    rows = denoiser.rows
    for scales, same in ((rows.scales.clone(), True), (rows.scales + 0.1, False)):
        other = denoiser.with_rows(Rows(scales, rows.weights))
        with torch.no_grad(), other.attached():
            assert torch.equal(replay(other, rolled, 0, kernel).log_prob, rolled.log_probs[0]) == same


def test_steps_without_a_log_probability_are_refused(denoiser: Denoiser) -> None:
    noise = denoiser.backbone.noise(SEEDS)
    with pytest.raises(UserError, match=r"CPS adds no noise in step 3 of 4, from sigma 0\.\d+ to 0"):
        roll_out(denoiser, noise, CPS(), AllSteps(drop_last=False).steps(0, 0, 4), SEEDS)
    for kernel in KERNELS:
        assert roll_out(denoiser, noise, kernel, AllSteps().steps(0, 0, 4), SEEDS).log_probs.isfinite().all()
    last = roll_out(denoiser, noise, FlowSDE(), AllSteps(drop_last=False).steps(0, 0, 4), SEEDS)
    assert last.log_probs.isfinite().all()
    for steps in ((1, 4), (-1,), (2, 1), (1, 1)):
        with pytest.raises(UserError, match="They must rise and lie in 0 .. 3"):
            roll_out(denoiser, noise, FlowSDE(), steps, SEEDS)


@pytest.mark.parametrize("window", [AllSteps(), RandomWindow(2), SlidingWindow(2, stay=1)])
def test_windows_and_roll_outs_fit(denoiser: Denoiser, window: AllSteps | RandomWindow | SlidingWindow) -> None:
    steps = window.steps(0, 1, 4)
    rolled = roll_out(denoiser, denoiser.backbone.noise(SEEDS), DanceSDE(), steps, SEEDS)
    assert rolled.steps == steps
    assert len(rolled.x) == len(rolled.x_next) == len(rolled.log_probs) == len(steps)
    assert rolled.means is None
    assert math.isfinite(float(rolled.latents.sum()))


def test_velocities_outside_of_attached_are_an_error(denoiser: Denoiser) -> None:
    x = denoiser.backbone.noise(SEEDS)
    with pytest.raises(RuntimeError, match="outside of `with denoiser.attached"):
        denoiser.velocity(x, 0)
    with denoiser.attached(), pytest.raises(RuntimeError, match="attached already"), denoiser.attached():
        pass
    with denoiser.attached():
        denoiser.velocity(x, 0)


def test_each_picture_may_have_its_own_noise_level(denoiser: Denoiser) -> None:
    x = denoiser.backbone.noise(SEEDS)
    with torch.no_grad(), denoiser.attached():
        mixed = denoiser.velocity_at(x, denoiser.sigmas[[2, 0, 1]])
        for row, step in enumerate([2, 0, 1]):
            torch.testing.assert_close(mixed[row], denoiser.velocity(x, step)[row], rtol=0, atol=1e-5)


def test_stock_backbones_have_no_velocities(backbone: SD3) -> None:
    layout = layout_of(backbone)
    stock = Stock.of(copy.deepcopy(backbone.pipeline))
    with (
        pytest.raises(UserError, match="Use a native backbone"),
        denoising(stock, layout, candidates(layout, 1), PROMPTS[:1]),
    ):
        pass
