"""Replays: the bits of their roll-outs on every family, gradients through hooks, guidance and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rollout_families import CLASSES, FAMILIES, GUIDED, KERNELS, every_kernel, family, layout_of
from sampling_tools import candidates, denoising, trainable
from tiny_families import NEGATIVES, PROMPTS, SEEDS
from torch import Tensor

from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration.scales import Rows, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.kernels import FlowSDE, Kernel
from calibri_lightning.sampling.trajectory import Trajectory, replay, roll_out


@pytest.fixture(scope="module")
def backbone() -> Native:
    return family("sd3")


@pytest.fixture
def denoiser(backbone: Native) -> Iterator[Denoiser]:
    """Three pictures of two members, four steps."""
    layout = layout_of(backbone, "cfg")
    with denoising(backbone, layout, candidates(layout, 3), PROMPTS, NEGATIVES) as denoiser:
        yield denoiser


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


def test_leaving_the_denoiser_before_a_checkpointed_backward_is_an_error() -> None:
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


def test_a_weight_of_zero_has_a_gradient_where_all_members_run(backbone: Native) -> None:
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


def test_other_scales_change_the_ratio_and_the_same_ones_do_not(denoiser: Denoiser) -> None:
    kernel = FlowSDE()
    rolled = roll_out(denoiser, denoiser.backbone.noise(SEEDS), kernel, (0,), SEEDS)
    rows = denoiser.rows
    for scales, same in ((rows.scales.clone(), True), (rows.scales + 0.1, False)):
        other = denoiser.with_rows(Rows(scales, rows.weights))
        with torch.no_grad(), other.attached():
            assert torch.equal(replay(other, rolled, 0, kernel).log_prob, rolled.log_probs[0]) == same
