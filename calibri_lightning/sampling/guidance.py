"""How the velocities of members become one; classifier-free guidance is the pair of weights (g, 1 - g)."""

from __future__ import annotations

import torch
from torch import Tensor


def combined(velocities: Tensor, weights: Tensor) -> Tensor:
    """Sums the members' velocities by weight (Calibri, eq. 6).

    Args:
        velocities: [B, M, ...].
        weights: omega [B, M], float32.

    Returns:
        sum over m of omega_m v_m, shaped [B, ...].
    """
    return (velocities * weights.reshape(*weights.shape, *[1] * (velocities.dim() - 2))).sum(dim=1)


def rescaled(velocities: Tensor, weights: Tensor) -> Tensor:
    """Combines the members' velocities and gives the sum the length of the first member's, times the strength.

    Guidance lengthens velocities. The pipelines of Qwen-Image and Lumina 2 scale the guided velocity back to the length
    of the prompt's, token by token (Qwen-Image) or row of the latent picture by row (Lumina 2).

    The strength is |sum of omega|, 1 for classifier-free guidance, which is then that of the stock pipelines. Its
    effect is theirs too: multiplying the outputs of both passes by s multiplies their guided velocity by |s|.

    Args:
        velocities: [B, M, ..., D]; lengths are taken over the last dimension.
        weights: omega [B, M], float32.

    Returns:
        [B, ..., D].
    """
    strength = weights.sum(dim=1).abs().reshape(len(weights), *[1] * (velocities.dim() - 2))
    guided = combined(velocities, weights)
    length = velocities[:, 0].norm(dim=-1, keepdim=True)
    # A velocity of length 0 has no direction; it stays 0.
    own = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    return guided * (strength * (length / own))
