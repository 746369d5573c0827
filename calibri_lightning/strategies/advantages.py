"""Rewards of groups of pictures into advantages (numpy, float64).

P = prompts of a step, G = pictures of a prompt. Group p is row p of a matrix [P, G], whatever its prompt says: a prompt
that is drawn twice makes two groups. NaN marks a picture that failed.

Sources: group-relative advantages, DeepSeekMath (arXiv 2402.03300), section 4.1.2, and Flow-GRPO (arXiv 2505.05470);
without division by the std, Dr. GRPO (arXiv 2503.20783); several rewards, GDPO (arXiv 2601.05242).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from calibri_lightning.arrays import ROUNDING, Cells, Floats
from calibri_lightning.strategies.checks import check_at_least, check_choice, check_positive

Combine = Literal["sum", "normalised_sum", "gdpo"]
"""How several rewards become one advantage."""
Spread = Literal["group", "global", "none"]
"""Which standard deviation a centred group is divided by."""


@dataclass(frozen=True)
class AdvantageOptions:
    """How rewards become advantages.

    Attributes:
        combine: `sum`: weighted sum, then each group is normalised. `normalised_sum`: each reward is first brought to
            mean 0 and std 1 over the batch, so that weights mean the same for every reward. `gdpo`: each reward is
            normalised in each group, the weighted sum of these is whitened over the batch.
        std: What a centred group is divided by: its own std, the std of all pictures of the step, or nothing.
        clip: Advantages are cut to plus and minus this.
        damping: Added to every std that is divided by, in units of the reward, as in Flow-GRPO's code.
        min_std: A group whose std is at most this, plus 2.4e-7 of the size of its rewards, counts as flat: its
            differences are rounding, its advantages 0.
    """

    combine: Combine = "sum"
    std: Spread = "group"
    clip: float = 5.0
    damping: float = 1e-4
    min_std: float = 1e-6

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_choice("combine", self.combine, get_args(Combine))
        check_choice("std", self.std, get_args(Spread))
        check_positive("clip", self.clip)
        check_at_least("damping", self.damping, 0, "it is added to a standard deviation")
        check_at_least("min_std", self.min_std, 0, "it is compared with a standard deviation")


@dataclass(frozen=True)
class Advantages:
    """What the pictures of a step are worth."""

    values: Floats
    """float64 [P, G], cut to the options' clip; 0 where `mask` is False."""
    mask: Cells
    """bool [P, G]: pictures that count. Failed ones do not, nor flat groups, nor groups of under 2 usable pictures."""
    zero_std_share: float
    """Flat groups as a share of the groups with at least 2 usable pictures; 0 where there are none."""
    std: float
    """Standard deviation of the advantages that count; 0 where there are none."""


@dataclass(frozen=True)
class _Matrix:
    """One reward, or a sum of rewards, of a step's pictures."""

    values: Floats  # [P, G]; cells that are not usable hold 0
    size: Floats  # [P], magnitude of what went into a group: the scale of its rounding errors
    usable: Cells  # [P, G]

    def flat(self, options: AdvantageOptions) -> Cells:
        """Which groups [P] differ by rounding alone."""
        return self._std(axis=1)[:, 0] <= options.min_std + ROUNDING * self.size

    def group_normalised(self, options: AdvantageOptions) -> _Matrix:
        """Centres each group and divides it as the options say; flat groups become exactly 0."""
        flat = self.flat(options)[:, None]
        if options.std == "none":
            divisor = np.ones_like(flat, dtype=np.float64)
        else:
            # Global: about the mean of the step, so prompts of different difficulty widen it (Flow-GRPO's code).
            std = self._std(axis=1 if options.std == "group" else None)
            divisor = np.where(flat, 1.0, std + options.damping)
        values = np.where(flat, 0.0, self._centred(axis=1) / divisor)
        return _Matrix(values, np.where(flat, 0.0, self.size[:, None] / divisor)[:, 0], self.usable)

    def batch_normalised(self, options: AdvantageOptions) -> _Matrix:
        """Brings the usable pictures to mean 0 and std 1 over the step; exactly 0 if they differ by rounding alone."""
        std = self._std(axis=None).item()
        if std <= options.min_std + ROUNDING * self.size.max(initial=0.0):
            return _Matrix(np.zeros_like(self.values), np.zeros_like(self.size), self.usable)
        divisor = std + options.damping
        return _Matrix(self._centred(axis=None) / divisor, self.size / divisor, self.usable)

    def _centred(self, axis: int | None) -> Floats:
        count = np.maximum(self.usable.sum(axis=axis, keepdims=True), 1)
        mean = self.values.sum(axis=axis, keepdims=True) / count
        return np.where(self.usable, self.values - mean, 0.0)

    def _std(self, axis: int | None) -> Floats:
        # Two passes: E[x^2] - E[x]^2 loses all digits where rewards share a large offset.
        count = np.maximum(self.usable.sum(axis=axis, keepdims=True), 1)
        return np.sqrt((self._centred(axis) ** 2).sum(axis=axis, keepdims=True) / count)


def advantages(rewards: Mapping[str, Floats], weights: Mapping[str, float], options: AdvantageOptions) -> Advantages:
    """Turns rewards into group-relative advantages.

    Args:
        rewards: Reward by name, float [P, G]; not finite = the picture failed. Rewards without a weight, or of weight
            0, play no part.
        weights: Weight by name.
        options: How.

    Returns:
        Values, mask and statistics. Nothing is dropped: every group keeps its shape.

    Raises:
        ValueError: If a reward with a weight is missing, none has a weight, or shapes differ.
    """
    total = _weighted_sum(_weighted(rewards, weights), options)
    flat = total.flat(options)  # groups of fewer than two usable pictures are, too
    mask = total.usable & ~flat[:, None]
    if options.combine == "gdpo":
        # GDPO whitens over the whole batch. Pictures outside the mask take no part in mean and std here: counted as
        # zeros they would blow up the few groups that are left when most are flat.
        kept = _Matrix(np.where(mask, total.values, 0.0), total.size, mask)
        normalised = kept.batch_normalised(options)
    else:
        # Flow-GRPO, advantage of a group: A = (R - mean_group R) / std.
        normalised = total.group_normalised(options)
    groups = total.usable.sum(axis=1) >= 2
    values = np.where(mask, np.clip(normalised.values, -options.clip, options.clip), 0.0)
    return Advantages(
        values,
        mask,
        zero_std_share=float(flat[groups].mean()) if groups.any() else 0.0,
        std=float(values[mask].std()) if mask.any() else 0.0,
    )


def _weighted(rewards: Mapping[str, Floats], weights: Mapping[str, float]) -> list[tuple[float, _Matrix]]:
    names = [name for name, weight in weights.items() if weight]
    if not names or any(name not in rewards for name in names):
        raise ValueError(f"Rewards with a weight are {names}, rewards that were measured {list(rewards)}.")
    arrays = [np.asarray(rewards[name], dtype=np.float64) for name in names]
    if any(array.ndim != 2 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"Rewards must share one shape [P, G], not {[array.shape for array in arrays]}.")
    # A picture without one of its rewards has no advantage: its sum would be of other things than its neighbours'.
    usable = np.logical_and.reduce([np.isfinite(array) for array in arrays])
    filled = [np.where(usable, array, 0.0) for array in arrays]
    parts = [_Matrix(array, np.abs(array).max(axis=1, initial=0.0), usable) for array in filled]
    return [(weights[name], part) for name, part in zip(names, parts, strict=True)]


def _weighted_sum(weighted: list[tuple[float, _Matrix]], options: AdvantageOptions) -> _Matrix:
    if options.combine == "normalised_sum":
        weighted = [(weight, part.batch_normalised(options)) for weight, part in weighted]
    elif options.combine == "gdpo":
        # GDPO: A_k = (r_k - mean_group r_k) / std_group r_k for every reward k, then A = sum_k w_k A_k.
        weighted = [(weight, part.group_normalised(options)) for weight, part in weighted]
    return _Matrix(
        np.sum([weight * part.values for weight, part in weighted], axis=0),
        np.sum([abs(weight) * part.size for weight, part in weighted], axis=0),
        weighted[0][1].usable,
    )
