"""Names, bounds and layout of a calibration: the map between one flat vector theta and the rows of a batch.

theta holds, in this order, the scales of member 0, 1, ..., and then what is learned about the members'
weights. The velocity of an image is the sum over members of weight x velocity (Calibri, eq. 6);
classifier-free guidance with scale g is the pair ("prompt", g), ("negative", 1 - g).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration.sites import Granularity, Site, SiteOptions, options_of
from calibri_lightning.errors import UserError

WeightMode = Literal["fixed", "raw", "guidance"]
"""What is learned about the weights: nothing, one number a member, or strength and guidance of a cfg pair."""
MemberSpec = Literal["single", "cfg"] | int
"""One member, a guided pair, or the number of members of an ensemble."""

_BOUNDS = {"scale": (-1.0, 2.0), "weight": (-10.0, 10.0), "strength": (0.5, 1.5), "guidance": (0.0, 20.0)}
# Step sizes relative to that of the scales: a useful change of a guidance of 7 is far larger than that of a
# scale of 1.
_STDS = {"scale": 1.0, "weight": 0.2, "strength": 0.3, "guidance": 5.0}


@dataclass(frozen=True)
class Member:
    """One copy of the scales, the prompt that it sees and its weight in the velocity."""

    prompt: Literal["prompt", "negative"]
    weight: float
    """Weight at the start; also the weight throughout where weights are fixed."""


class Rows(NamedTuple):
    """What K candidates of M members ask of the transformer."""

    scales: Tensor
    """float32 [K, M, sites]."""
    weights: Tensor
    """float32 [K, M]."""


@dataclass(frozen=True)
class Layout:
    """The meaning of each entry of theta."""

    sites: tuple[Site, ...]
    granularity: Granularity
    members: tuple[Member, ...]
    weight_mode: WeightMode

    def __post_init__(self) -> None:
        """Checks that the parts fit together.

        Raises:
            UserError: If they do not.
        """
        choose("granularity", self.granularity, ("block", "layer", "gate"))
        choose("weight_mode", self.weight_mode, ("fixed", "raw", "guidance"))
        if not self.sites:
            raise UserError(
                "There is no site to scale. A layout needs at least one; take them from find_sites(transformer)."
            )
        if not self.members:
            raise UserError("A calibration has no member. The rule is at least one; use members: single.")
        for member in self.members:
            choose("prompt of a member", member.prompt, ("prompt", "negative"))
        if self.weight_mode == "guidance" and not self.is_cfg:
            raise UserError(
                f"weight_mode: guidance was given for {len(self.members)} member(s) seeing "
                f"{', '.join(member.prompt for member in self.members)}. It learns strength and guidance of "
                "a pair (prompt, negative). Use members: cfg, or weight_mode: raw."
            )

    def check_start(self) -> None:
        """Checks that a search can begin at the untouched model.

        Raises:
            UserError: If the start lies outside of the bounds.
        """
        for name, start, lower, upper in zip(self.names, self.start, self.lower, self.upper, strict=True):
            if not lower <= start <= upper:
                raise UserError(
                    f"The start of {name} is {start:g}, outside of its bounds [{lower:g}, {upper:g}]. The "
                    "search starts inside of the bounds. Lower guidance_scale, or use weight_mode: fixed."
                )

    @property
    def is_cfg(self) -> bool:
        """True for the guided pair: a member with the prompt, then one with the negative prompt."""
        return tuple(member.prompt for member in self.members) == ("prompt", "negative")

    @cached_property
    def site_options(self) -> SiteOptions:
        """What the sites were found with; not in the names where a whole block shares one scale."""
        return options_of(self.sites)

    @cached_property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the scales of one member, in the order of the sites."""
        return tuple(dict.fromkeys(self.scale_name(site) for site in self.sites))

    def scale_name(self, site: Site) -> str:
        """Returns the name of the scale that a site listens to; sites that share a name share a scale."""
        return scale_name(site, self.granularity)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of theta's entries, e.g. "member0/transformer_blocks.3.attn.image" or "member1/weight"."""
        scales = tuple(f"member{m}/{name}" for m in range(len(self.members)) for name in self.scale_names)
        if self.weight_mode == "raw":
            return (*scales, *(f"member{m}/weight" for m in range(len(self.members))))
        return (*scales, "strength", "guidance") if self.weight_mode == "guidance" else scales

    @property
    def num_parameters(self) -> int:
        """Length of theta."""
        return len(self.names)

    @cached_property
    def start(self) -> NDArray[np.float64]:
        """float64 [n], read-only: the untouched model."""
        scales = [1.0] * (len(self.members) * len(self.scale_names))
        if self.weight_mode == "raw":
            scales += [member.weight for member in self.members]
        elif self.weight_mode == "guidance":
            scales += [1.0, self.members[0].weight]
        return _constant(scales)

    @cached_property
    def lower(self) -> NDArray[np.float64]:
        """float64 [n], read-only: lower bounds (scales and weights as in Calibri's trainer)."""
        return _constant(_BOUNDS[kind][0] for kind in self._kinds)

    @cached_property
    def upper(self) -> NDArray[np.float64]:
        """float64 [n], read-only: upper bounds."""
        return _constant(_BOUNDS[kind][1] for kind in self._kinds)

    @cached_property
    def stds(self) -> NDArray[np.float64]:
        """float64 [n], read-only: step sizes relative to that of a scale."""
        return _constant(_STDS[kind] for kind in self._kinds)

    @property
    def _kinds(self) -> tuple[str, ...]:
        num_weights = self.num_parameters - len(self.members) * len(self.scale_names)
        weights = ("strength", "guidance") if self.weight_mode == "guidance" else ("weight",) * num_weights
        return ("scale",) * (self.num_parameters - num_weights) + weights

    @cached_property
    def _index(self) -> Tensor:
        """int64 [M, sites]: the entry of theta that each site of each member reads."""
        position = {name: i for i, name in enumerate(self.scale_names)}
        one = torch.tensor([position[self.scale_name(site)] for site in self.sites])
        return one + len(position) * torch.arange(len(self.members))[:, None]

    def rows(self, theta: Tensor) -> Rows:
        """Spreads candidates over members and sites; differentiable in theta.

        Args:
            theta: [K, n] candidates, float32 or float64.

        Returns:
            float32 scales [K, M, sites] and weights [K, M], on theta's device.

        Raises:
            UserError: If theta has another shape.
        """
        if theta.ndim != 2 or theta.shape[1] != self.num_parameters:
            raise UserError(
                f"theta has shape {tuple(theta.shape)}. This layout takes [candidates, "
                f"{self.num_parameters}]; give a single vector as theta[None]."
            )
        scales = theta[:, self._index.to(theta.device)].float()
        num_members = len(self.members)
        if self.weight_mode == "raw":
            return Rows(scales, theta[:, -num_members:].float())
        if self.weight_mode == "guidance":
            strength, guidance = theta[:, -2], theta[:, -1]
            return Rows(scales, torch.stack((strength * guidance, strength * (1 - guidance)), dim=1).float())
        fixed = torch.tensor([member.weight for member in self.members], device=theta.device)
        return Rows(scales, fixed.expand(len(theta), num_members))

    def member_weights(self, theta: Sequence[float] | Floats) -> tuple[float, ...]:
        """The weights of one candidate in float64, so that an untouched pair has exactly those of its guidance scale.

        Args:
            theta: [n], in the order of `names`.

        Returns:
            One weight a member.
        """
        if self.weight_mode == "raw":
            return tuple(float(value) for value in theta[-len(self.members) :])
        if self.weight_mode == "guidance":
            strength, guidance = (float(value) for value in theta[-2:])
            return strength * guidance, strength * (1.0 - guidance)
        return tuple(member.weight for member in self.members)


def build_layout(
    sites: Sequence[Site],
    granularity: Granularity,
    members: MemberSpec,
    guidance_scale: float = 1.0,
    weight_mode: WeightMode = "raw",
) -> Layout:
    """Builds the layout of a calibration from the words of a configuration.

    Args:
        sites: Sites of the transformer, from `find_sites`.
        granularity: How sites share scales.
        members: "single" (one member of weight 1), "cfg" (the prompt with weight g and the negative prompt
            with weight 1 - g), or a number N of prompt members with weights (1, 0, ..., 0).
        guidance_scale: Guidance g at the start; read for "cfg" alone.
        weight_mode: What is learned about the weights.

    Returns:
        The layout.

    Raises:
        UserError: If an argument is none of these, or the start lies outside of the bounds.
    """
    if members == "single":
        chosen: tuple[Member, ...] = (Member("prompt", 1.0),)
    elif members == "cfg":
        if not np.isfinite(guidance_scale):
            raise UserError(f"guidance_scale is {guidance_scale}. It must be a finite number, for instance 4.5.")
        chosen = (Member("prompt", float(guidance_scale)), Member("negative", 1.0 - float(guidance_scale)))
    elif isinstance(members, int) and not isinstance(members, bool) and members >= 1:
        if members > 1 and weight_mode == "fixed":
            raise UserError(
                f"members: {members} was given with weight_mode: fixed. Members after the first start with weight 0 "
                "and would keep it, so that their scales have no effect. Use weight_mode: raw, or members: single."
            )
        chosen = tuple(Member("prompt", float(m == 0)) for m in range(members))
    else:
        raise UserError(f"members is {members!r}. It must be 'single', 'cfg' or a number of members from 1 up.")
    layout = Layout(tuple(sites), granularity, chosen, weight_mode)
    layout.check_start()
    return layout


def scale_name(site: Site, granularity: Granularity) -> str:
    """Names the scale that a site listens to; sites that share a name share a scale.

    Args:
        site: The site.
        granularity: How sites share scales.

    Returns:
        The name, without the member.
    """
    if granularity == "gate":
        return site.name
    return f"{site.block}.{site.layer}" if granularity == "layer" else site.block


def choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Checks a choice.

    Args:
        name: What is chosen, for the message.
        value: The value given.
        allowed: The values to choose from.

    Raises:
        UserError: If the value is none of them.
    """
    if value not in allowed:
        raise UserError(f"{name} is {value!r}. It must be one of {', '.join(map(repr, allowed))}.")


def _constant(values: Iterable[float]) -> NDArray[np.float64]:
    array = np.array(list(values), dtype=np.float64)
    array.flags.writeable = False
    return array
