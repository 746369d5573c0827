"""The course of a run: what each generation and each validation showed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibri_lightning.evaluation.progress import GenerationStats

if TYPE_CHECKING:
    from calibri_lightning.strategies.rounds import GenerationReport


@dataclass
class Trace:
    """The course of a run, for the convergence plot; part of every checkpoint."""

    images: list[float] = field(default_factory=list)
    """Training images up to the end of each generation."""
    train: list[float] = field(default_factory=list)
    """Mean reward of each generation."""
    sigma: list[float] = field(default_factory=list)
    """Step size after each generation."""
    validation_images: list[float] = field(default_factory=list)
    """Training images at each validation."""
    validation: list[float] = field(default_factory=list)
    """Validation score of the search's mean."""
    base: float = math.nan
    """Validation score of the start."""

    def add_generation(self, report: GenerationReport) -> None:
        """Adds what a generation showed.

        Args:
            report: What the strategy tells of it.
        """
        self.images.append(float(report.images))
        self.train.append(report.reward_mean)
        self.sigma.append(report.sigma)

    def add_validation(self, scores: Mapping[str, float]) -> None:
        """Adds what a validation showed.

        Args:
            scores: Score by vector.
        """
        self.base = scores.get("start", self.base)
        if "mean" in scores:
            self.validation_images.append(self.images_at(len(self.images)))
            self.validation.append(scores["mean"])

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
        report.sigma,
        report.images,
        images / max(seconds, 1e-9),
        None if total is None else (total - report.generation) * seconds,
        reward,
    )
