"""Classifier-free guidance that keeps the length of the prompt's velocity (Qwen-Image, Lumina 2).

Guidance lengthens velocities. These pipelines scale the guided velocity back to the length of the prompt's, token by
token (Qwen-Image) or row of the latent picture by row (Lumina 2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rescaled(velocities: Tensor, weights: Tensor) -> Tensor:
    """Combines the members' velocities and gives the sum the length of the first member's, times the strength.

    The strength is |sum of omega|, 1 for classifier-free guidance, which is then that of the stock pipelines. Its
    effect is theirs too: multiplying the outputs of both passes by s multiplies their guided velocity by |s|.

    Args:
        velocities: [B, M, ..., D]; lengths are taken over the last dimension.
        weights: omega [B, M], float32.

    Returns:
        [B, ..., D].
    """
    shape = (*weights.shape, *[1] * (velocities.dim() - 2))
    combined = (velocities * weights.reshape(shape)).sum(dim=1)
    strength = weights.sum(dim=1).abs().reshape(len(weights), *shape[2:])
    length = velocities[:, 0].norm(dim=-1, keepdim=True)
    # A velocity of length 0 has no direction; it stays 0.
    own = combined.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(combined.dtype).tiny)
    return combined * (strength * (length / own))
