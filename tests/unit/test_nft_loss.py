"""DiffusionNFT: an independent loop, the closed-form first gradient, where descent leads, schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.nft_loss import (
    NFTOptions,
    NFTStats,
    NoisedPictures,
    OldPolicyDecay,
    Velocities,
    nft_loss,
    nft_weights,
)

SHAPE = (5, 2, 3, 3)
A = torch.tensor([1.0, -2.0, 7.0, 0.0, -9.0], dtype=torch.float64)
T = torch.tensor([0.9, 0.5, 0.2, 0.7, 1.0], dtype=torch.float64)
ALL = torch.ones(5, dtype=torch.bool)


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures() -> NoisedPictures:
    x0, noise, t = randn(0), randn(1), T.view(-1, 1, 1, 1)
    return NoisedPictures(x0, (1 - t) * x0 + t * noise, T)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_agrees_with_a_loop_in_numpy(beta: float) -> None:
    made, v, v_old, v_ref = pictures(), randn(2), randn(3), randn(4)
    options = NFTOptions(beta=beta, advantage_max=5.0, kl_weight=0.01)
    loss, stats = nft_loss(Velocities(v, v_old, v_ref), made, A, ALL, options)
    x0, x_t, new, old, ref = (x.numpy() for x in (made.x0, made.x_t, v, v_old, v_ref))
    total = kl = 0.0
    for b in range(5):
        w = min(max(A[b].item() / 5.0, -1.0), 1.0) / 2 + 0.5
        errors = []
        for sign in (1, -1):
            implicit = old[b] + sign * beta * (new[b] - old[b])
            e = x_t[b] - T[b].item() * implicit - x0[b]
            errors.append(np.mean(e**2) / np.mean(np.abs(e)))
        total += 5.0 * (w * errors[0] / beta + (1 - w) * errors[1] / beta)
        kl += np.mean((new[b] - ref[b]) ** 2)
    assert stats.policy_sum.item() == pytest.approx(total, rel=1e-12)
    assert stats.kl_sum.item() == pytest.approx(kl, rel=1e-12)
    assert loss.item() == pytest.approx(total + 0.01 * kl, rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_first_gradient_is_the_advantage_times_that_of_the_error(beta: float) -> None:
    made, v_old = pictures(), randn(3)
    v = v_old.clone().requires_grad_()
    loss, _ = nft_loss(Velocities(v, v_old), made, A, ALL, NFTOptions(beta=beta, kl_weight=0.0))
    loss.backward()
    t = T.view(-1, 1, 1, 1)
    error = made.x_t - t * v_old - made.x0
    scale = error.abs().mean((1, 2, 3), keepdim=True)
    cut = A.clamp(-5, 5).view(-1, 1, 1, 1)
    torch.testing.assert_close(v.grad, cut * -2 * t * error / (error[0].numel() * scale))
    assert not v.grad[3].any()  # no advantage, no pull


def test_adaptive_weights_carry_no_gradient() -> None:
    made, v_old = pictures(), randn(3)
    v = randn(2).requires_grad_()
    nft_loss(Velocities(v, v_old), made, torch.full((5,), 5.0), ALL, NFTOptions(kl_weight=0.0))[0].backward()
    # w = 1, beta = 1: 5 mean(e^2) / scale with e of v itself; differentiating the scale too would add a term.
    t = T.view(-1, 1, 1, 1)
    error = (made.x_t - t * v - made.x0).detach()
    scale = error.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(v.grad, 5 * -2 * t * error / (error[0].numel() * scale))


def test_descent_leads_to_the_good_picture_and_from_the_bad_one() -> None:
    # One velocity for two pictures whose noised latents coincide; what moves it is the advantage alone.
    x0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    x_t = torch.zeros_like(x0)
    good = (x_t - x0)[0] / t  # velocity that leads to the good picture
    for signs, target in (((1.0, -1.0), good), ((-1.0, 1.0), -good)):
        v_old = torch.zeros(1, dtype=torch.float64)
        v = v_old.clone().requires_grad_()
        for _ in range(50):
            (gradient,) = torch.autograd.grad(
                nft_loss(
                    Velocities(v.expand(2, 1), v_old.expand(2, 1)),
                    NoisedPictures(x0, x_t, t),
                    torch.tensor(signs, dtype=torch.float64) * 5,
                    ALL[:2],
                    NFTOptions(kl_weight=0.0),
                )[0],
                v,
            )
            v = (v - 0.02 * gradient).detach().requires_grad_()
        assert (v - target).abs() < 0.5 * (v_old - target).abs()


def test_reference_pulls_and_old_and_reference_get_no_gradient() -> None:
    made = pictures()
    v, v_old, v_ref = (randn(k).requires_grad_() for k in (2, 3, 4))
    options = NFTOptions(kl_weight=0.5)
    loss, stats = nft_loss(Velocities(v, v_old, v_ref), made, A, ALL, options)
    without, _ = nft_loss(Velocities(v, v_old), made, A, ALL, NFTOptions(kl_weight=0.0))
    (gradient,) = torch.autograd.grad(loss - without, v, retain_graph=True)
    torch.testing.assert_close(gradient, 0.5 * 2 * (v - v_ref).detach() / v[0].numel())
    loss.backward()
    assert v_old.grad is None
    assert v_ref.grad is None
    _, at_reference = nft_loss(Velocities(v, v_old, v.detach()), made, A, ALL, options)
    assert at_reference.kl_sum == 0
    assert stats.kl_sum > 0


def test_batches_add_up_in_any_order_and_masked_samples_count_nowhere() -> None:
    made, v, v_old, v_ref = pictures(), randn(2), randn(3), randn(4)
    mask = torch.tensor([True, True, False, True, True])
    advantages = A.clone()
    advantages[2] = torch.nan
    options = NFTOptions(beta=0.5, kl_weight=0.1)

    def run(rows: list[int]) -> tuple[Tensor, NFTStats]:
        part = NoisedPictures(made.x0[rows], made.x_t[rows], made.t[rows])
        return nft_loss(Velocities(v[rows], v_old[rows], v_ref[rows]), part, advantages[rows], mask[rows], options)

    loss, stats = run([0, 1, 2, 3, 4])
    first, second = run([4, 2]), run([3, 0, 1])
    torch.testing.assert_close(first[0] + second[0], loss)
    assert (first[1] + second[1]).as_metrics() == pytest.approx(stats.as_metrics())
    assert stats.count == 4
    kept = run([0, 1, 3, 4])
    torch.testing.assert_close(kept[0], loss)
    assert kept[1].as_metrics() == pytest.approx(stats.as_metrics())


def test_weights_map_advantages_to_probabilities() -> None:
    weights = nft_weights(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0)
    assert weights.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_old_policy_decays_as_published() -> None:
    gradual = OldPolicyDecay()
    assert [gradual.at(step) for step in (0, 1, 100, 500, 5000)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    delayed = OldPolicyDecay(slope=0.0075, maximum=0.999, flat_steps=75)
    assert [delayed.at(step) for step in (0, 75, 76, 115, 1000)] == pytest.approx([0, 0, 0.0075, 0.3, 0.999])
    assert OldPolicyDecay(start=0.2, slope=0.0).at(7) == 0.2


def test_bad_input_is_refused() -> None:
    made, v = pictures(), randn(2)
    with pytest.raises(ValueError, match="reference"):
        nft_loss(Velocities(v, v), made, A, ALL, NFTOptions())
    with pytest.raises(ValueError, match="One number a sample"):
        nft_loss(Velocities(v, v), made, A[:, None], ALL, NFTOptions(kl_weight=0.0))
    with pytest.raises(UserError, match="maximum is 1.5"):
        OldPolicyDecay(maximum=1.5)
    with pytest.raises(UserError, match="beta is 0"):
        NFTOptions(beta=0.0)
