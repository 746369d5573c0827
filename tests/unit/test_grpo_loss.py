"""The clipped loss: closed forms of loss and gradient, clips, KL, guard, statistics that add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from calibri_lightning.errors import UserError
from calibri_lightning.strategies import grpo_loss as losses
from calibri_lightning.strategies.grpo_loss import (
    GRPOOptions,
    LossStats,
    StepNoise,
    StepPrediction,
    grpo_loss,
)

SHAPE = (6, 3, 4, 4)
DT = -0.08
S = 0.7
N = S * math.sqrt(-DT)
NOISE = StepNoise(torch.tensor(N, dtype=torch.float64), torch.tensor(S, dtype=torch.float64), torch.tensor(DT))
A = torch.tensor([1.5, -0.5, 0.25, -2.0, 0.75, 3.0], dtype=torch.float64)
ALL = torch.ones(6, dtype=torch.bool)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_log_prob(x: Tensor, mean: Tensor, std: Tensor | float = N) -> Tensor:
    return Normal(mean, std).log_prob(x).flatten(1).mean(1)


class Samples:
    """Steps that the old policy drew, and a new policy whose mean is off by `shift`."""

    def __init__(self, shift: float = 0.0, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> None:
        self.old_mean, self.z = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
        self.x = self.old_mean + N * self.z
        self.delta = shift * randn(*shape, seed=seed + 2)
        self.mean = (self.old_mean + self.delta).requires_grad_()
        self.old = StepPrediction(mean_log_prob(self.x, self.old_mean), self.old_mean, self.old_mean)
        self.new = StepPrediction(mean_log_prob(self.x, self.mean), self.mean, self.mean)


def of_ratios(ratios: list[float]) -> tuple[StepPrediction, StepPrediction, Tensor]:
    log_prob = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    return StepPrediction(log_prob), StepPrediction(torch.zeros_like(log_prob)), log_prob


@pytest.mark.parametrize("guard", ["off", "ratio"])
def test_ratio_one_gives_minus_the_advantages_and_the_policy_gradient(guard: str) -> None:
    s = Samples()
    loss, stats = grpo_loss(s.new, s.old, None, A, ALL, NOISE, GRPOOptions(guard=guard))
    assert loss.item() == pytest.approx(-A.sum().item(), rel=1e-14)
    loss.backward()
    dims = s.z[0].numel()
    # d/dmu of -A mean_d log N(x; mu, n^2) = -A z / (n D); the guard's exponent lacks the 1 / n.
    expected = -A.view(-1, 1, 1, 1) * s.z / (dims * (N if guard == "off" else 1))
    torch.testing.assert_close(s.mean.grad, expected, rtol=1e-10, atol=1e-15)
    assert stats.deviation_max == 0
    assert stats.ratio_max == 1
    assert stats.as_metrics()["ratio_mean"] == 1
    assert stats.old_kl_sum == 0


def test_no_gradient_reaches_the_old_policy() -> None:
    new, _, log_prob = of_ratios([1.0, 1.0])
    loss, _ = grpo_loss(new, new, None, A[:2], ALL[:2], NOISE, GRPOOptions())
    loss.backward()  # with the gradient of both it would vanish
    torch.testing.assert_close(log_prob.grad, -A[:2])


@pytest.mark.parametrize(
    ("advantage", "ratio", "alive"),
    [
        (1.0, 1.03, False),  # good and already too likely
        (1.0, 1.01, True),
        (1.0, 0.5, True),  # good but unlikely: must be pulled back whatever the ratio
        (-1.0, 0.93, False),  # bad and already unlikely enough
        (-1.0, 0.97, True),
        (-1.0, 2.0, True),  # bad but likely
    ],
)
def test_clips_end_the_gradient_on_one_side_for_each_sign(advantage: float, ratio: float, alive: bool) -> None:
    new, old, log_prob = of_ratios([ratio])
    options = GRPOOptions(clip_low=0.05, clip_high=0.02)  # the bounds are apart: 0.95 and 1.02
    loss, stats = grpo_loss(new, old, None, torch.tensor([advantage]), ALL[:1], NOISE, options)
    loss.backward()
    assert log_prob.grad.item() == pytest.approx(-advantage * ratio if alive else 0.0)
    bound = ratio if alive else (1.02 if advantage > 0 else 0.95)
    assert loss.item() == pytest.approx(-advantage * bound)
    assert stats.clipped_high_sum == float(not alive and advantage > 0)
    assert stats.clipped_low_sum == float(not alive and advantage < 0)


@pytest.mark.parametrize("guard", ["off", "ratio", "ratio_and_reweight"])
@pytest.mark.parametrize("kl", ["none", "mean", "velocity"])
def test_gradient_agrees_with_finite_differences(guard: str, kl: str) -> None:
    s = Samples(shift=0.02, shape=(3, 2, 2))
    reference = StepPrediction(s.old.log_prob, s.old_mean + 0.1, s.old_mean - 0.2)
    options = GRPOOptions(0.3, 0.3, kl, 0.04, guard)

    def loss(mean: Tensor) -> Tensor:
        new = StepPrediction(mean_log_prob(s.x, mean), mean, mean)
        return grpo_loss(new, s.old, reference, A[:3], ALL[:3], NOISE, options)[0]

    assert torch.autograd.gradcheck(loss, (s.mean,))


def test_kl_between_means_is_the_gaussian_kl_times_minus_dt() -> None:
    s = Samples(shift=0.3)
    reference = StepPrediction(s.old.log_prob, s.old_mean)
    each = losses.kl_divergence(s.new, reference, NOISE, "mean")
    gaussian = kl_divergence(Independent(Normal(s.mean, N), 3), Independent(Normal(s.old_mean, N), 3))
    torch.testing.assert_close(each, gaussian / s.z[0].numel() * -DT, check_dtype=False, rtol=1e-7, atol=0)


def test_kl_of_velocities_is_their_mean_square() -> None:
    s = Samples(shift=0.3)
    each = losses.kl_divergence(s.new, StepPrediction(s.old.log_prob, velocity=s.old_mean), NOISE, "velocity")
    torch.testing.assert_close(each, s.delta.pow(2).mean((1, 2, 3)))


@pytest.mark.parametrize("kl", ["mean", "velocity"])
def test_kl_is_zero_at_the_reference_and_pulls_back_from_elsewhere(kl: str) -> None:
    options = GRPOOptions(kl=kl, kl_weight=0.04)
    for shift in (0.0, 0.1):
        s = Samples(shift)
        anchor = s.old_mean.clone().requires_grad_()  # as if it had been computed with gradient by mistake
        reference = StepPrediction(s.old.log_prob, anchor, anchor)
        loss, stats = grpo_loss(s.new, s.old, reference, torch.zeros(6), ALL, NOISE, options)
        loss.backward()
        assert anchor.grad is None
        if shift == 0:
            assert stats.kl_sum == 0
            assert not s.mean.grad.any()
        else:
            assert loss.item() == pytest.approx(0.04 * stats.kl_sum.item())
            assert stats.kl_sum > 0
            factor = 1 / S**2 if kl == "mean" else 2
            torch.testing.assert_close(s.mean.grad, 0.04 * factor * s.delta / s.z[0].numel(), rtol=1e-6, atol=1e-12)


def guard_exponent(s: Samples, noise: StepNoise = NOISE) -> Tensor:
    new = StepPrediction(mean_log_prob(s.x, s.mean, noise.std.view(-1, *(1,) * 3)), s.mean)
    old = StepPrediction(mean_log_prob(s.x, s.old_mean, noise.std.view(-1, *(1,) * 3)), s.old_mean)
    return losses._log_ratio(new, old, noise, "ratio").detach()


def test_guard_exponent_is_the_mean_of_noise_times_shift_for_each_sample() -> None:
    s = Samples(shift=0.05)
    torch.testing.assert_close(guard_exponent(s), (s.z * s.delta).mean((1, 2, 3)), rtol=1e-9, atol=1e-12)


def test_guard_exponent_does_not_depend_on_the_noise_of_the_step() -> None:
    s = Samples(shift=0.05)
    stds = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    s.x = s.old_mean + stds.view(-1, 1, 1, 1) * s.z
    noise = StepNoise(stds, stds, torch.full((6,), DT))
    torch.testing.assert_close(guard_exponent(s, noise), (s.z * s.delta).mean((1, 2, 3)), rtol=1e-8, atol=1e-12)


def test_guard_takes_the_bias_out_of_the_ratio() -> None:
    # 4000 draws of one step whose mean moved by d standard deviations: E[log r] = -d^2 / 2 without the guard.
    d, dims = 0.5, 16
    s = Samples(shape=(4000, 1, 4, 4))
    s.delta = torch.full((1, 1, 4, 4), d * N, dtype=torch.float64)
    s.mean = s.old_mean + s.delta
    plain = (mean_log_prob(s.x, s.mean) - mean_log_prob(s.x, s.old_mean)).mean().item()
    spread = d / math.sqrt(dims * 4000)
    assert plain == pytest.approx(-(d**2) / 2, abs=4 * spread)
    assert plain < -10 * spread
    guarded = guard_exponent(s)
    assert guarded.mean().item() == pytest.approx(0, abs=4 * spread * N)
    assert guarded.std().item() == pytest.approx(d * N / math.sqrt(dims), rel=0.05)


def test_guard_reweights_the_clipped_term_alone() -> None:
    s = Samples(shift=0.01)
    dt = torch.linspace(-0.02, -0.2, 6, dtype=torch.float64)
    noise = StepNoise(NOISE.std, NOISE.coefficient, dt)
    reference = StepPrediction(s.old.log_prob, s.old_mean)
    weights = {"clip_low": 0.2, "clip_high": 0.2, "kl": "mean", "kl_weight": 0.04}
    _, plain = grpo_loss(s.new, s.old, reference, A, ALL, noise, GRPOOptions(**weights, guard="ratio"))
    _, weighted = grpo_loss(s.new, s.old, reference, A, ALL, noise, GRPOOptions(**weights, guard="ratio_and_reweight"))
    ratios = guard_exponent(s).exp()
    assert plain.policy_sum.item() == pytest.approx((-A * ratios).sum().item())
    assert weighted.policy_sum.item() == pytest.approx((-A * ratios / -dt).sum().item())
    assert weighted.kl_sum == plain.kl_sum


@pytest.mark.parametrize("guard", ["off", "ratio", "ratio_and_reweight"])
def test_samples_do_not_see_each_other(guard: str) -> None:
    options = GRPOOptions(0.01, 0.02, "mean", 0.04, guard)
    s = Samples(shift=0.1)
    std = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    noise = StepNoise(std, std * 3, -std / 10)
    mask = torch.tensor([True, True, False, True, True, True])
    ref = StepPrediction(s.old.log_prob, s.old_mean - 0.1)

    def run(rows: Tensor) -> tuple[Tensor, LossStats, Tensor]:
        mean = s.mean.detach()[rows].requires_grad_()
        wide = std[rows].view(-1, 1, 1, 1)
        new = StepPrediction(mean_log_prob(s.x[rows], mean, wide), mean)
        old = StepPrediction(mean_log_prob(s.x[rows], s.old_mean[rows], wide), s.old_mean[rows])
        part = StepNoise(noise.std[rows], noise.coefficient[rows], noise.dt[rows])
        reference = StepPrediction(ref.log_prob[rows], ref.mean[rows])
        loss, stats = grpo_loss(new, old, reference, A[rows], mask[rows], part, options)
        loss.backward()
        return loss.detach(), stats, mean.grad

    loss, stats, gradient = run(torch.arange(6))
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    shuffled_loss, shuffled_stats, shuffled_gradient = run(order)
    torch.testing.assert_close(shuffled_loss, loss)
    torch.testing.assert_close(shuffled_gradient, gradient[order])
    parts = [run(torch.tensor([i])) for i in range(6)]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), gradient)
    added = parts[0][1]
    for part in parts[1:]:
        added = added + part[1]
    for one in (added, shuffled_stats):
        assert one.as_metrics() == pytest.approx(stats.as_metrics())
    assert stats.count == 5


def test_masked_samples_count_nowhere() -> None:
    s = Samples(shift=0.05)
    log_prob = s.new.log_prob.detach().clone()
    log_prob[2] = math.nan
    mask = torch.tensor([True, True, False, True, True, True])
    bad = A.clone()
    bad[2] = math.nan
    mean = s.mean.detach().clone().requires_grad_()
    new = StepPrediction(log_prob.requires_grad_(), mean)
    reference = StepPrediction(s.old.log_prob, s.old_mean)
    options = GRPOOptions(kl="mean", kl_weight=1.0)
    loss, stats = grpo_loss(new, s.old, reference, bad, mask, NOISE, options)
    loss.backward()
    assert all(math.isfinite(value) for value in stats.as_metrics().values())
    assert log_prob.grad[2] == 0
    assert not mean.grad[2].any()
    assert mean.grad[[0, 1, 3, 4, 5]].flatten(1).any(1).all()


def test_a_fully_masked_batch_is_neutral() -> None:
    s = Samples(shift=0.3)
    options = GRPOOptions(guard="ratio_and_reweight")
    loss, empty = grpo_loss(s.new, s.old, None, A, ~ALL, NOISE, options)
    loss.backward()
    assert loss == 0
    assert not s.mean.grad.any()
    s = Samples(shift=0.3)
    _, stats = grpo_loss(s.new, s.old, None, A, ALL, NOISE, options)
    assert (stats + empty).as_metrics() == stats.as_metrics()


def test_statistics_pack_and_unpack() -> None:
    s = Samples(shift=0.1)
    _, stats = grpo_loss(s.new, s.old, None, A, ALL, NOISE, GRPOOptions())
    sums, maxima = stats.packed()
    assert (len(sums), len(maxima)) == (9, 2)
    assert LossStats.unpacked(sums, maxima) == stats
    ratios = (s.new.log_prob - s.old.log_prob).exp()
    metrics = stats.as_metrics()
    assert metrics["ratio_mean"] == pytest.approx(ratios.mean().item())
    assert metrics["ratio_max"] == ratios.max()
    assert metrics["ratio_deviation_max"] == (ratios - 1).abs().max()
    assert metrics["log_ratio_mean"] == pytest.approx(ratios.log().mean().item())
    assert metrics["old_kl"] == pytest.approx((ratios - 1 - ratios.log()).mean().item())
    clipped = ((A > 0) & (ratios > 1.0001)) | ((A < 0) & (ratios < 0.9999))
    assert metrics["clip_fraction"] == pytest.approx(clipped.double().mean().item())


def test_what_is_missing_or_misshapen_is_refused() -> None:
    s = Samples()
    bare = StepPrediction(s.new.log_prob)
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(s.new, s.old, None, A, ALL, NOISE, GRPOOptions(kl="mean"))
    with pytest.raises(ValueError, match="were not given"):
        grpo_loss(bare, s.old, None, A, ALL, NOISE, GRPOOptions(guard="ratio"))
    with pytest.raises(ValueError, match="One number a sample"):
        grpo_loss(s.new, s.old, None, A[:, None], ALL, NOISE, GRPOOptions())
    with pytest.raises(UserError, match="kl is 'both'"):
        GRPOOptions(kl="both")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="clip_low is 0"):
        GRPOOptions(clip_low=0)
