"""What several runs are worth on the same prompts and noises: means, paired differences, diversity, costs.

A contender is the base or a run; it is scored once at each number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.summary import DiversityIntervals
from calibri_lightning.tools.compare.contenders import Contender
from calibri_lightning.tools.compare.gallery import GalleryPrompt

Against = Literal["equal NFE", "full NFE", "each other"]
LEVEL = 0.95
"""Confidence of all intervals."""


@dataclass(frozen=True)
class Row:
    """A contender at a number of steps, in numbers."""

    contender: str
    num_steps: int
    nfe: int
    """Transformer forwards an image: steps times members."""
    means: Mapping[str, Interval]
    diversity: DiversityIntervals | None


@dataclass(frozen=True)
class Pair:
    """Two contenders in one reward, pair by pair over the same prompts and noises."""

    contender: str
    num_steps: int
    other: str
    other_steps: int
    against: Against
    reward: str
    difference: Interval
    """The first minus the other."""
    wins: Interval
    """The share of pairs in which the first scored higher; ties count half."""


@dataclass(frozen=True)
class DiversityPair:
    """The diversity of a run against that of the base of equal NFE, prompt by prompt."""

    contender: str
    num_steps: int
    differences: DiversityIntervals
    """Means of the run minus the base."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows; made by `compare`.

    Attributes:
        title: Heading.
        model: What all runs calibrate.
        command: What made this.
        prompts: The prompts, without repetitions.
        num_pictures: Pictures that each row's means are over.
        rewards: Names, the one that decides first.
        num_steps: Numbers of steps, ascending.
        headline_steps: The number of steps at which the verdict is given.
        contenders: The base, then the runs as given.
        rows: One for each contender and number of steps.
        pairs: All paired comparisons.
        diversity_pairs: Each run's diversity against the base's; empty where it was not measured.
        gallery: Some prompts with the pictures of all contenders at the headline's number of steps.
        level: Confidence of all intervals.
        samples: Samples of a prompt that diversity was measured on; 0 where it was not.
        features: What the Vendi score compares; empty where it was not measured.
        notes: How runs were drawn that were trained in different ways.
    """

    title: str
    model: str
    command: str
    prompts: tuple[str, ...]
    num_pictures: int
    rewards: tuple[str, ...]
    num_steps: tuple[int, ...]
    headline_steps: int
    contenders: tuple[Contender, ...]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    gallery: tuple[GalleryPrompt, ...] = ()
    diversity_pairs: tuple[DiversityPair, ...] = ()
    level: float = LEVEL
    samples: int = 0
    features: str = ""
    notes: tuple[str, ...] = ()

    @property
    def reward(self) -> str:
        """The reward that decides."""
        return self.rewards[0]

    @property
    def base(self) -> Contender:
        """The untouched model."""
        return next(c for c in self.contenders if c.is_base)

    @property
    def runs(self) -> tuple[Contender, ...]:
        """All but the base."""
        return tuple(c for c in self.contenders if not c.is_base)

    def row(self, contender: str, num_steps: int) -> Row:
        """Finds a row.

        Args:
            contender: A label.
            num_steps: A number of steps that was scored.

        Returns:
            Its numbers.
        """
        return next(row for row in self.rows if (row.contender, row.num_steps) == (contender, num_steps))

    def pair(self, contender: str, num_steps: int, against: Against, reward: str, other: str = "") -> Pair | None:
        """Finds a comparison.

        Args:
            contender: Label of the first.
            num_steps: Its number of steps.
            against: The kind.
            reward: A reward.
            other: Label of the other; by default any.

        Returns:
            The comparison, or None where there is none, as of the base with itself.
        """
        wanted = (contender, num_steps, against, reward)
        found = (p for p in self.pairs if (p.contender, p.num_steps, p.against, p.reward) == wanted)
        return next((p for p in found if not other or p.other == other), None)
