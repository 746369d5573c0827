"""The operating points of a sweep, what they scored, and the one to recommend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibri_lightning.evaluation.bootstrap import Interval, mean_interval, paired_interval
from calibri_lightning.tools.pictures import Scores

Which = Literal["base", "answer"]


@dataclass(frozen=True)
class Point:
    """One way to draw."""

    which: Which
    """The model alone, or with the run's scales and adapter."""
    num_steps: int
    """Sampling steps."""
    guidance: float | None
    """Guidance as the stock pipeline's call counts it; None where it is that of the model or the run."""
    num_forwards: int
    """Transformer forwards of one picture in use: steps x members; without guidance, steps alone."""

    @property
    def label(self) -> str:
        """The point in words."""
        guided = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"{self.which} @ {self.num_steps} steps{guided}"


@dataclass(frozen=True)
class Finding:
    """What a point scored."""

    point: Point
    """The point."""
    reward: Interval
    """Mean reward."""
    difference: Interval
    """Its reward less that of the base's best point, on the same prompts and noise."""

    @property
    def reaches(self) -> bool:
        """Whether the interval reaches the base's best: its upper end is not below it."""
        return self.difference.high >= 0.0

    @property
    def proven(self) -> bool:
        """Whether the whole interval does: its lower end is not below the base's best, either."""
        return self.difference.low >= 0.0


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep.

    The base's best is the base's point with the highest mean reward, the one of fewest forwards among equals. A point
    reaches it if the bootstrap interval of the paired difference, point less base's best, has an upper end of at least
    0: the data do not say that it is worse. Among the points of the answer that do (of the base, where there is no
    answer), the recommended one takes the fewest forwards, and of several with as many has the highest mean. With few
    prompts intervals are wide and reach far, so `proven` names the fewest forwards of which the lower end reaches it.
    The best of several means is itself lucky on the prompts it was chosen on, which makes both careful.
    """

    findings: tuple[Finding, ...]
    """In the order of the points."""
    best: Finding
    """The base's best."""
    recommended: Finding | None
    """The point of fewest forwards that reaches the base's best; None where none does."""
    proven: Finding | None
    """The point of fewest forwards of which the whole interval reaches it; None where none does."""

    @classmethod
    def of(cls, points: Sequence[Point], scores: Scores, reward: str) -> Sweep:
        """Computes intervals and chooses.

        Args:
            points: The K points; at least one is of the base.
            scores: Their numbers.
            reward: The reward to choose by.

        Returns:
            The sweep.
        """
        values, clusters = scores.values[reward], scores.clusters
        means = [mean_interval(row, clusters) for row in values]
        own = [i for i, point in enumerate(points) if point.which == "base"]
        known = [i for i in own if np.isfinite(means[i].mean)] or own
        best = min(known, key=lambda i: (-means[i].mean, points[i].num_forwards))
        found = tuple(
            Finding(point, mean, paired_interval(row, values[best], clusters))
            for point, mean, row in zip(points, means, values, strict=True)
        )
        mine = _candidates(found)
        return cls(
            found,
            found[best],
            _fewest([finding for finding in mine if finding.reaches]),
            _fewest([finding for finding in mine if finding.proven]),
        )

    @property
    def candidates(self) -> tuple[Finding, ...]:
        """The points to choose from: the answer's, or the base's where there is no answer."""
        return _candidates(self.findings)


def _candidates(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    answers = tuple(finding for finding in findings if finding.point.which == "answer")
    return answers or findings


def _fewest(findings: Sequence[Finding]) -> Finding | None:
    return min(findings, key=lambda f: (f.point.num_forwards, -f.reward.mean), default=None)
