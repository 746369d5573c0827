"""Steps of a sampler: pure functions of latents, velocity and two neighbouring noise levels."""

from __future__ import annotations

from torch import Tensor


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Explicit Euler step of the probability-flow ODE dx / d sigma = v.

    Args:
        x: Latents [B, ...] at sigma, float32.
        velocity: Predicted velocity, shaped as x.
        sigma: Present noise level, a scalar tensor on the same device.
        sigma_next: Next, smaller noise level.

    Returns:
        Latents at sigma_next.
    """
    return x + (sigma_next - sigma) * velocity
