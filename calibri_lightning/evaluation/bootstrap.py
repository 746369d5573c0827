"""Bootstrap confidence intervals for rewards: means, paired differences and win rates.

Every condition is scored on the same (prompt, seed) pairs, so the difference between two of them is taken
pair by pair: the luck of a prompt or of a noise then cancels and the interval is much narrower than that of
two separate means.

Several samples of one prompt are not independent. They form a cluster, and clusters are drawn, never single
samples (Davison and Hinkley 1997, section 3.8); the mean of a resample is then a ratio, sum of rewards over
number of samples.

Why BCa is the default (Efron 1987, "Better bootstrap confidence intervals"): rare strict hits and file sizes
are skewed, and there it shares the misses between the two sides where plain percentiles do not: for 384
lognormal values the truth lay below / above the nominal 95 % interval in 2.4 / 3.6 % of 800 trials with BCa
and in 1.1 / 5.0 % with percentiles (both cover 94 %; on symmetric differences the two agree). It costs one
jackknife, which for a mean is a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Method = Literal["bca", "percentile"]
FloatArray = NDArray[np.float64]

NUM_RESAMPLES = 10_000
_MAX_INDICES = 1 << 20  # drawn at a time: 8 MB of indices, whatever the number of prompts
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: The sample mean; NaN when there was no finite value.
        low: Lower end; NaN when there were fewer than two prompts, for which no interval exists.
        high: Upper end; NaN like `low`.
        count: Number of finite values (or pairs) that were used.
        dropped: Number of values (or pairs) left out because one was not finite.
    """

    mean: float
    low: float
    high: float
    count: int
    dropped: int = 0

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside the interval; False when there is no interval."""
        return self.low > value or self.high < value


@dataclass(frozen=True)
class WinRate:
    """How often the first of two conditions had the higher reward, pair by pair."""

    wins: int
    ties: int
    losses: int

    @property
    def count(self) -> int:
        """Number of pairs."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """Wins plus half the ties, over all pairs: 0.5 is no difference, NaN means no pairs."""
        return (self.wins + 0.5 * self.ties) / self.count if self.count else float("nan")


def mean_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Bootstrap interval of a mean.

    Args:
        values: float[P] rewards; those that are not finite are left out and counted in `dropped`.
        clusters: int[P], the prompt of each value; None takes every value for a prompt of its own.
        level: Confidence, between 0 and 1.
        num_resamples: Number of bootstrap resamples.
        seed: Key of the Philox generator: the same seed gives the same interval.
        method: `bca` (bias-corrected and accelerated) or `percentile`.

    Returns:
        The mean over all finite values and its interval.

    Raises:
        ValueError: If `values` is not a vector, `clusters` has another length or `level` is not between 0 and
            1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a confidence level lies between 0 and 1, e.g. 0.95")
    rewards = np.asarray(values, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"values has shape {rewards.shape}; give one reward a sample, as a vector")
    finite = np.isfinite(rewards)
    sums, sizes = _cluster(rewards, finite, clusters)
    count, dropped = int(finite.sum()), int((~finite).sum())
    mean = float(sums.sum() / count) if count else float("nan")
    if len(sums) < 2:
        return Interval(mean, float("nan"), float("nan"), count, dropped)
    if np.ptp(sums / sizes) == 0:  # every resample has the same mean, and BCa would divide by zero
        return Interval(mean, mean, mean, count, dropped)
    means = _resampled_means(sums, sizes, num_resamples, seed)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca_tails(tails, means, mean, sums, sizes)
    low, high = np.quantile(means, tails)
    return Interval(mean, float(low), float(high), count, dropped)


def paired_interval(
    first: ArrayLike,
    second: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Bootstrap interval of the mean of `first - second`, pair by pair.

    Args:
        first: float[P] rewards of one condition.
        second: float[P] rewards of the other on the same prompts and noises, in the same order.
        clusters: int[P], the prompt of each pair; None takes every pair for a prompt of its own.
        level: Confidence, between 0 and 1.
        num_resamples: Number of bootstrap resamples.
        seed: Key of the Philox generator.
        method: `bca` or `percentile`.

    Returns:
        The mean difference and its interval, over pairs with two finite rewards.

    Raises:
        ValueError: If the two differ in shape.
    """
    a, b = _pair(first, second)
    both = np.isfinite(a) & np.isfinite(b)
    difference = np.where(both, np.where(both, a, 0.0) - np.where(both, b, 0.0), np.nan)
    return mean_interval(difference, clusters, level=level, num_resamples=num_resamples, seed=seed, method=method)


def win_rate(first: ArrayLike, second: ArrayLike, tolerance: float = 0.0) -> WinRate:
    """Count the pairs that `first` wins, ties and loses.

    Args:
        first: float[P] rewards of one condition.
        second: float[P] rewards of the other, in the same order.
        tolerance: Differences of at most this size are ties. 0 is right for strict scores and for rewards
            that give equal pictures equal values; judges with coarse answers may want more.

    Returns:
        Counts over the pairs with two finite rewards.

    Raises:
        ValueError: If the two differ in shape.
    """
    a, b = _pair(first, second)
    both = np.isfinite(a) & np.isfinite(b)
    difference = a[both] - b[both]
    wins, losses = int((difference > tolerance).sum()), int((difference < -tolerance).sum())
    return WinRate(wins, len(difference) - wins - losses, losses)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ; pairs need the same prompts and noises in both")
    return a, b


def _cluster(
    rewards: FloatArray, finite: NDArray[np.bool_], clusters: ArrayLike | None
) -> tuple[FloatArray, FloatArray]:
    """Sums and numbers of the finite rewards of each prompt; prompts without any are left out."""
    labels = np.arange(len(rewards)) if clusters is None else np.asarray(clusters)
    if labels.shape != rewards.shape:
        raise ValueError(f"clusters has shape {labels.shape}, values {rewards.shape}; give one prompt index a value")
    _, index = np.unique(labels[finite], return_inverse=True)
    sums = np.bincount(index, weights=rewards[finite]).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def _resampled_means(sums: FloatArray, sizes: FloatArray, num_resamples: int, seed: int) -> FloatArray:
    """float64[num_resamples] means, each of as many prompts, drawn with replacement, as there are."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    num_clusters = len(sums)
    chunk = max(1, _MAX_INDICES // num_clusters)
    equal_sizes = np.ptp(sizes) == 0
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, chunk):
        stop = min(start + chunk, num_resamples)
        drawn = rng.integers(0, num_clusters, (stop - start, num_clusters))
        total = num_clusters * sizes[0] if equal_sizes else sizes[drawn].sum(axis=1)
        means[start:stop] = sums[drawn].sum(axis=1) / total
    return means


def _bca_tails(tails: FloatArray, means: FloatArray, mean: float, sums: FloatArray, sizes: FloatArray) -> FloatArray:
    """The percentiles that BCa reads instead of `tails` (Efron 1987, bias z0 and acceleration a)."""
    # Half of the ties count as below: with 0/1 rewards many resamples equal the mean, up to rounding.
    slack = 1e-9 * float(np.ptp(means))
    below = float(((means < mean - slack).mean() + (means <= mean + slack).mean()) / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    jackknife = (sums.sum() - sums) / (sizes.sum() - sizes)
    spread = jackknife.mean() - jackknife
    size = float((spread**2).sum() ** 1.5)
    # Values that differ by rounding alone can have equal jackknife means, which are not skewed.
    acceleration = float((spread**3).sum()) / (6 * size) if size else 0.0
    quantiles = [_NORMAL.inv_cdf(float(tail)) for tail in tails]
    adjusted = [bias + (bias + z) / (1 - acceleration * (bias + z)) for z in quantiles]
    return np.array([_NORMAL.cdf(z) for z in adjusted])
