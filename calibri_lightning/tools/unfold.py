"""Writes any calibration as one with a scale for every site and a weight for every member.

A study moves sites and guidance whatever a run has learned: with the scales of whole blocks, and with weights that are
fixed. This layout can express all of them, and draws the same pictures, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration import Layout


def unfold(layout: Layout, theta: Floats) -> tuple[Layout, Floats]:
    """Spreads a theta over the finest layout.

    Args:
        layout: The meaning of theta.
        theta: float64 [n].

    Returns:
        The layout of the same sites and members with granularity gate and raw weights, and theta in it.
    """
    finest = replace(layout, granularity="gate", weight_mode="raw")
    position = {name: i for i, name in enumerate(layout.scale_names)}
    of_site = {site.name: position[layout.scale_name(site)] for site in layout.sites}
    index = np.array([of_site[name] for name in finest.scale_names])
    num_members = len(layout.members)
    scales = theta[: num_members * len(position)].reshape(num_members, -1)
    return finest, np.concatenate([scales[:, index].ravel(), layout.member_weights(theta)])


def at_guidance(theta: Floats, guidance: float) -> Floats:
    """Sets the guidance of a guided pair and leaves its strength, the sum of its weights.

    The velocity s (u + g (c - u)) of strength s and guidance g has the weights s g and s (1 - g), for c and u the
    velocities of prompt and negative prompt.

    Args:
        theta: float64 [n] of an unfolded layout whose members are (prompt, negative).
        guidance: g.

    Returns:
        A new theta.
    """
    strength = theta[-2] + theta[-1]
    return np.concatenate([theta[:-2], [strength * guidance, strength * (1.0 - guidance)]])
