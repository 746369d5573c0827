"""Those that are compared, the base and the runs, and what they scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from calibri_lightning.arrays import Floats
from calibri_lightning.evaluation.diversity import Diversity
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.tools.lineage import total


@dataclass(frozen=True)
class Scales:
    """The values of a calibration, by the names of its layout."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    members: tuple[str, ...]
    """What the members are called, in order."""
    moved: bool = True
    """Whether the run changed any."""


@dataclass(frozen=True)
class Course:
    """Validation reward of a run over what it had cost by then; vectors of one length."""

    images: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        label: What tables and plots call it; different for each.
        method: How it was obtained, such as "CMAES"; empty for the base.
        folder: Where the run is; empty for the base.
        num_trained: Numbers that were trained; 0 for the base.
        num_members: Transformer forwards of one sampling step.
        budget: What the run itself cost; None where that is unknown, and for the base.
        scales: Its calibration; None for the base.
        course: How its validation reward rose; None where no metrics are left.
        stacked_on: What it started from: another run, or an adapter; empty where that is the published model.
        inherited: What that had cost before; None where it is unknown, and where there is nothing.
    """

    label: str
    method: str = ""
    folder: str = ""
    num_trained: int = 0
    num_members: int = 1
    budget: Budget | None = None
    scales: Scales | None = None
    course: Course | None = None
    stacked_on: str = ""
    inherited: Budget | None = None

    @property
    def is_base(self) -> bool:
        """Whether this is the untouched model."""
        return not self.folder

    @property
    def whole_budget(self) -> Budget | None:
        """What the run cost together with all that it was stacked on, as far as that is known."""
        return None if self.budget is None else total([self.budget, *([self.inherited] if self.inherited else [])])

    @property
    def is_budget_whole(self) -> bool:
        """Whether nothing is missing in `whole_budget`."""
        return self.budget is not None and (not self.stacked_on or self.inherited is not None)


@dataclass(frozen=True, eq=False)
class Scored:
    """One contender at one number of steps.

    Attributes:
        contender: Its label.
        num_steps: Sampling steps.
        rewards: Reward name to float64 [P], one value a picture, NaN where a reward failed; all hold the same (prompt,
            seed) pairs in the same order.
        diversity: How different its samples of one prompt are; None where that was not measured.
    """

    contender: str
    num_steps: int
    rewards: Mapping[str, Floats]
    diversity: Diversity | None = None
