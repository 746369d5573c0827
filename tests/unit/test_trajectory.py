"""Roll-outs: what they keep, the noise of their steps, the ODE elsewhere, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from rollout_families import CLASSES, GUIDED, KERNELS, every_kernel, family, layout_of
from sampling_tools import candidates, denoising
from tiny_families import NEGATIVES, PROMPTS, SEEDS
from torch import Tensor

from calibri_lightning.backbones import Stock
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration.scales import Rows
from calibri_lightning.errors import UserError
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE, Kernel, euler_step
from calibri_lightning.sampling.noise import noise_seed, step_noise_seed
from calibri_lightning.sampling.rollout import sample
from calibri_lightning.sampling.trajectory import Trajectory, replay, roll_out
from calibri_lightning.sampling.windows import AllSteps, RandomWindow, SlidingWindow


@pytest.fixture(scope="module")
def backbone() -> Native:
    return family("sd3")


@pytest.fixture
def denoiser(backbone: Native) -> Iterator[Denoiser]:
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
def test_units_of_the_same_composition_give_the_same_bits_others_close_ones(backbone: Native, kernel: Kernel) -> None:
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


def test_stock_backbones_have_no_velocities(backbone: Native) -> None:
    layout = layout_of(backbone)
    stock = Stock.of(copy.deepcopy(backbone.pipeline))
    with (
        pytest.raises(UserError, match="Use a native backbone"),
        denoising(stock, layout, candidates(layout, 1), PROMPTS[:1]),
    ):
        pass
