"""Stochastic steps: densities against torch's, marginals against closed forms, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jsonargparse import ArgumentParser
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE, Kernel, Transition, euler_step
from calibri_lightning.sampling.schedule import flow_sigmas

KERNELS: list[Kernel] = [FlowSDE(), DanceSDE(), CPS()]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
TARGET_STD = 0.5


def sd35_sigmas(num_steps: int) -> Tensor:
    """The schedule of Stable Diffusion 3.5, whose scheduler shifts its last levels twice."""
    return flow_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps, 16)


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - data | x] where data is normal with mean 0 and TARGET_STD: linear regression of both on x."""
    data_variance = (1 - sigma) ** 2 * TARGET_STD**2
    return x * (sigma - data_variance / (1 - sigma if sigma < 1 else 1)) / (data_variance + sigma**2)


def take(kernel: Kernel | None, sigmas: Tensor, step: int, x: Tensor) -> Transition:
    """A step of a kernel, or of the ODE, on the Gaussian target."""
    velocity, now, following = gaussian_velocity(x, sigmas[step]), sigmas[step], sigmas[step + 1]
    if kernel is None:
        return Transition(euler_step(x, velocity, now, following), torch.zeros_like(now))
    return kernel.transition(x, velocity, now, following, sigmas[1])


def final_std(kernel: Kernel | None, sigmas: Tensor, stochastic: Collection[int] | None = None) -> float:
    """Standard deviation of what a sampler makes: steps are linear in x, so variances propagate exactly."""
    sigmas = sigmas.double()
    variance = torch.ones((), dtype=torch.float64)
    for step in range(len(sigmas) - 1):
        used = kernel if stochastic is None or step in stochastic else None
        mean, std = take(used, sigmas, step, torch.ones(1, dtype=torch.float64))
        variance = mean[0] ** 2 * variance + std**2
    return float(variance.sqrt())


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE()])
def test_log_probs_of_sdes_are_the_normal_density_averaged_over_dimensions(kernel: Kernel) -> None:
    sigmas, x, velocity = sd35_sigmas(10), latents(3, 4, 5, 6), latents(3, 4, 5, 6, seed=1)
    for step in range(10):
        transition = kernel.transition(x, velocity, sigmas[step], sigmas[step + 1], sigmas[1])
        x_next = transition.mean + transition.std * latents(3, 4, 5, 6, seed=2)
        density = torch.distributions.Normal(transition.mean, transition.std).log_prob(x_next)
        torch.testing.assert_close(kernel.log_prob(x_next, transition), density.mean(dim=(1, 2, 3)))


def test_log_probs_of_cps_are_the_normal_density_without_its_variance_and_constant() -> None:
    kernel, sigmas, x, velocity = CPS(), sd35_sigmas(10), latents(3, 4, 5), latents(3, 4, 5, seed=1)
    for step in range(9):
        transition = kernel.transition(x, velocity, sigmas[step], sigmas[step + 1], sigmas[1])
        x_next = transition.mean + transition.std * latents(3, 4, 5, seed=2)
        density = torch.distributions.Normal(transition.mean, transition.std).log_prob(x_next).mean(dim=(1, 2))
        constant = transition.std.log() + math.log(2 * math.pi) / 2
        torch.testing.assert_close(kernel.log_prob(x_next, transition), 2 * transition.std**2 * (density + constant))


@every_kernel
def test_rows_do_not_mix(kernel: Kernel) -> None:
    sigmas, x, velocity, outcome = sd35_sigmas(4), *(latents(4, 2, 3, seed=seed) for seed in range(3))
    order = torch.tensor([2, 0, 3, 1])
    both = [
        kernel.log_prob(outcome[rows], kernel.transition(x[rows], velocity[rows], sigmas[1], sigmas[2], sigmas[1]))
        for rows in (torch.arange(4), order)
    ]
    assert torch.equal(both[0][order], both[1])
    assert len(set(both[0].tolist())) == 4


def test_dance_is_flow_with_a_constant_diffusion_and_equals_the_published_form() -> None:
    class Constant(FlowSDE):
        def _diffusion(self, sigma: Tensor, sigma_second: Tensor) -> Tensor:
            return torch.full_like(sigma, 0.3)

    sigmas, x, v = sd35_sigmas(10).double(), latents(2, 7, dtype=torch.float64), latents(2, 7, seed=1).double()
    for step in range(10):
        levels = (sigmas[step], sigmas[step + 1], sigmas[1])
        ours, flow = DanceSDE(0.3).transition(x, v, *levels), Constant().transition(x, v, *levels)
        assert torch.equal(ours.mean, flow.mean)
        assert torch.equal(ours.std, flow.std)
        sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
        data = x - sigma * v
        published = x + (v + 0.5 * 0.3**2 * (x - (1 - sigma) * data) / sigma**2) * dt
        torch.testing.assert_close(ours.mean, published)
        torch.testing.assert_close(ours.std, 0.3 * (-dt).sqrt())


def test_flow_sde_and_cps_equal_their_published_forms() -> None:
    sigmas, x, v = sd35_sigmas(10).double(), latents(2, 7, dtype=torch.float64), latents(2, 7, seed=1).double()
    for step in range(10):
        sigma, following, dt = sigmas[step], sigmas[step + 1], sigmas[step + 1] - sigmas[step]
        s = 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if step == 0 else sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        ours = FlowSDE(0.7).transition(x, v, sigma, following, sigmas[1])
        torch.testing.assert_close(ours.mean, mean)
        torch.testing.assert_close(ours.std, s * (-dt).sqrt())
        std = following * math.sin(0.8 * math.pi / 2)
        kept = (following**2 - std**2).sqrt()
        ours = CPS(0.8).transition(x, v, sigma, following, sigmas[1])
        torch.testing.assert_close(ours.mean, (1 - following) * (x - sigma * v) + kept * (x + (1 - sigma) * v))
        torch.testing.assert_close(ours.std, std)


def test_noise_of_flow_sde_on_the_schedule_of_sd35() -> None:
    sigmas = sd35_sigmas(10)
    measured = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089, 0]
    torch.testing.assert_close(sigmas, torch.tensor(measured), rtol=0, atol=6e-4)
    stds = torch.stack([FlowSDE(0.7).std(sigmas[i], sigmas[i + 1], sigmas[1]) for i in range(10)])
    expected = torch.tensor([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063])
    torch.testing.assert_close(stds, expected, rtol=0, atol=6e-4)
    assert CPS().std(sigmas[9], sigmas[10], sigmas[1]) == 0


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(10, (0.360, 0.421, 0.377, 0.308)), (40, (0.465, 0.480, 0.469, 0.371))]
)
def test_spread_of_each_sampler_on_a_gaussian_target(num_steps: int, expected: tuple[float, ...]) -> None:
    sigmas = sd35_sigmas(num_steps)
    for kernel, std in zip([None, *KERNELS], expected, strict=True):
        assert final_std(kernel, sigmas) == pytest.approx(std, abs=1e-3), kernel


def test_cps_in_the_first_steps_keeps_the_spread_of_the_ode() -> None:
    for num_steps in (10, 40):
        sigmas = sd35_sigmas(num_steps)
        assert final_std(CPS(), sigmas, {0, 1, 2}) == pytest.approx(final_std(None, sigmas), abs=1e-3)


def errors(kernel: Kernel | None) -> list[float]:
    return [TARGET_STD - final_std(kernel, torch.linspace(1, 0, n + 1)) for n in (400, 800, 1600)]


@pytest.mark.parametrize("kernel", [None, DanceSDE()])
def test_euler_steps_converge_to_the_target_with_order_one(kernel: Kernel | None) -> None:
    found = errors(kernel)
    for coarse, fine in zip(found[:-1], found[1:], strict=True):
        assert coarse / fine == pytest.approx(2, rel=0.01)
    assert abs(found[-1]) < 5e-4


def test_flow_sde_converges_more_slowly_and_cps_does_not() -> None:
    """The first step of Flow-SDE adds noise of std a however short it is; later steps forget it, as a power."""
    found = errors(FlowSDE())
    assert all(0 > fine > 0.9 * coarse for coarse, fine in zip(found[:-1], found[1:], strict=True))
    assert abs(found[-1]) < 8e-4
    assert TARGET_STD - final_std(CPS(), torch.linspace(1, 0, 801)) > 0.05


@every_kernel
def test_samples_have_the_spread_that_variances_propagate_to(kernel: Kernel) -> None:
    sigmas, generator = sd35_sigmas(10), torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 1, generator=generator)
    for step in range(10):
        mean, std = take(kernel, sigmas, step, x)
        x = mean + std * torch.randn(x.shape, generator=generator)
    # The standard error of a standard deviation is std / sqrt(2 N) = 0.16 % of it.
    assert float(x.std()) == pytest.approx(final_std(kernel, sigmas), rel=0.008)
    assert abs(float(x.mean())) < 5 * float(x.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("make", [FlowSDE, DanceSDE, CPS])
def test_little_noise_is_an_euler_step(make: Callable[[float], Kernel]) -> None:
    sigmas, x, v = sd35_sigmas(10).double(), latents(2, 5).double(), latents(2, 5, seed=1).double()
    for step in range(9):
        mean, std = make(1e-6).transition(x, v, sigmas[step], sigmas[step + 1], sigmas[1])
        torch.testing.assert_close(mean, euler_step(x, v, sigmas[step], sigmas[step + 1]), rtol=0, atol=1e-9)
        assert float(std) < 1e-4


@every_kernel
def test_everything_stays_in_float32_and_finite_from_the_first_level_on(kernel: Kernel) -> None:
    sigmas = sd35_sigmas(10)
    assert sigmas[0] == 1
    for step in range(9):
        transition = kernel.transition(latents(2, 3), latents(2, 3, seed=1), sigmas[step], sigmas[step + 1], sigmas[1])
        log_prob = kernel.log_prob(latents(2, 3, seed=2), transition)
        for value in (*transition, log_prob):
            assert value.dtype == torch.float32
            assert value.isfinite().all()
        assert transition.std.shape == ()
        assert log_prob.shape == (2,)


@pytest.mark.parametrize("make", [FlowSDE, DanceSDE, CPS])
@pytest.mark.parametrize("level", [0, -0.1, float("nan"), float("inf")])
def test_a_level_without_noise_is_refused(make: Callable[[float], Kernel], level: float) -> None:
    with pytest.raises(UserError, match=rf"noise_level of {make.__name__} is {level:g}.*a number above 0"):
        make(level)


def test_cps_takes_no_more_than_all_noise() -> None:
    assert float(CPS(1.0).std(torch.tensor(0.5), torch.tensor(0.4), torch.tensor(0.9))) == pytest.approx(0.4)
    with pytest.raises(UserError, match=r"noise_level of CPS is 1\.2"):
        CPS(1.2)


def test_kernels_come_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kernel", type=Kernel)
    config: dict[str, Any] = {"class_path": "DanceSDE", "init_args": {"noise_level": 0.5}}
    assert parser.instantiate(parser.parse_object({"kernel": config})).kernel == DanceSDE(0.5)
    assert parser.instantiate(parser.parse_object({"kernel": "CPS"})).kernel == CPS(0.8)
