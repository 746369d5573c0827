"""The course of a run: what each generation and each validation showed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibri_lightning.evaluation.progress import GenerationStats

if TYPE_CHECKING:
    from calibri_lightning.strategies.rounds import GenerationReport


CURRENT = ("mean", "policy")
"""What strategies call the candidate that shows where they are."""


@dataclass
class Trace:
    """The course of a run, for the convergence plot; part of every checkpoint."""

    images: list[float] = field(default_factory=list)
    """Training images up to the end of each generation."""
    train: list[float] = field(default_factory=list)
    """Mean reward of each generation."""
    pace: list[float] = field(default_factory=list)
    """How fast the run moved: a search's step size, for example."""
    validation_images: list[float] = field(default_factory=list)
    """Training images at each validation."""
    validation: list[float] = field(default_factory=list)
    """Validation score of the search's mean, or of the policy as it is."""
    base: float = math.nan
    """Validation score of the start."""
    pace_name: str = "sigma"
    """What the pace is."""

    def add_generation(self, report: GenerationReport) -> None:
        """Adds what a generation showed.

        Args:
            report: What the strategy tells of it.
        """
        self.images.append(float(report.images))
        self.train.append(report.reward_mean)
        if not self.pace:
            self.pace_name = report.pace_name
        # Step sizes and gradient norms share no axis: where strategies alternate, the pace is that of the first one.
        self.pace.append(report.pace if report.pace_name == self.pace_name else math.nan)

    def add_validation(self, scores: Mapping[str, float]) -> None:
        """Adds what a validation showed.

        Args:
            scores: Score by vector.
        """
        self.base = scores.get("start", self.base)
        current = next((scores[name] for name in CURRENT if name in scores), None)
        if current is not None:
            self.validation_images.append(self.images_at(len(self.images)))
            self.validation.append(current)

    def images_at(self, generation: int) -> float:
        """Training images up to the end of a generation.

        Args:
            generation: Its number, 1 for the first.

        Returns:
            The images; 0 before the first.
        """
        return self.images[generation - 1] if generation else 0.0

    def state(self) -> dict[str, Any]:
        """The trace as plain lists, which `torch.load(weights_only=True)` reads.

        Returns:
            What `Trace(**state)` takes.
        """
        return {name: list(v) if isinstance(v, list) else v for name, v in vars(self).items()}


def stats_of(report: GenerationReport, reward: str, images: int, seconds: float) -> GenerationStats:
    """What the progress line shows of a generation.

    Args:
        report: What the strategy tells of it.
        reward: Name of the optimised number.
        images: Pictures made in this generation.
        seconds: How long it took.

    Returns:
        The numbers, the speed and an estimate of the time left.
    """
    total = report.total_generations
    return GenerationStats(
        report.generation,
        total,
        report.reward_mean,
        report.reward_best,
        report.pace,
        report.images,
        images / max(seconds, 1e-9),
        None if total is None else (total - report.generation) * seconds,
        reward,
        report.pace_name,
        report.step_name,
    )
