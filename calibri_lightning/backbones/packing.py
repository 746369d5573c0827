"""Latents as sequences of tokens, one for each square of 2 x 2 latent pixels (FLUX.1, Qwen-Image, Krea 2)."""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Cuts latents into tokens, row by row; a token lists channel by channel its four latent pixels.

    Args:
        latents: [..., C, h, w].

    Returns:
        [..., (h / 2) (w / 2), 4 C].
    """
    squares = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [..., C, h/2, 2, w/2, 2]
    return squares.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Puts tokens back where `pack` took them from.

    Args:
        tokens: [..., (height / 2) (width / 2), 4 C].
        height: Height of the latents, latent pixels.
        width: Width of the latents.

    Returns:
        [..., C, height, width].
    """
    squares = tokens.unflatten(-1, (-1, 2, 2)).unflatten(-4, (height // 2, width // 2))  # [..., h/2, w/2, C, 2, 2]
    return squares.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)
