"""What one search without gradients defines beyond its core: costs, settings, space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from calibri_lightning.strategies.history import Settings
from calibri_lightning.strategies.search import SearchCore, SearchSpace

if TYPE_CHECKING:
    from calibri_lightning.strategies.base import CalibratedModule


class SearchPlan(ABC):
    """The choices that turn a user's arguments into a search."""

    @abstractmethod
    def num_cells(self, num_parameters: int) -> int:
        """Counts the images of a generation.

        Args:
            num_parameters: Number n of parameters.

        Returns:
            Images.
        """

    def round_sizes(self, num_parameters: int) -> tuple[int, ...]:
        """Counts the images of each round of a generation; a round waits for the rewards of the one before.

        Args:
            num_parameters: Number n of parameters.

        Returns:
            Images of each, `num_cells` together; one round by default.
        """
        return (self.num_cells(num_parameters),)

    @abstractmethod
    def resolve(self, num_parameters: int, total_images: int | None, earlier: Settings) -> Settings:
        """Fixes the settings that were left open.

        Args:
            num_parameters: Number n of parameters.
            total_images: Images of the budget, where known.
            earlier: Settings of the checkpoint that is resumed; empty for a new run.

        Returns:
            All settings of the search.
        """

    @abstractmethod
    def space(self, module: CalibratedModule) -> SearchSpace:
        """Gives the search space.

        Args:
            module: The module that is trained.

        Returns:
            Start, bounds and relative step sizes.
        """

    @abstractmethod
    def build_core(self, space: SearchSpace, seed: int, settings: Settings) -> SearchCore:
        """Makes the core.

        Args:
            space: Start, bounds and relative step sizes.
            seed: Seed of the run.
            settings: What `resolve` gave.

        Returns:
            A core that was told nothing.
        """

    def plateau(self, sigmas: list[float]) -> str | None:
        """Says whether the step size has stopped moving.

        Args:
            sigmas: sigma after each generation.

        Returns:
            The reason to stop; None to go on.
        """
        return None

    @property
    def has_other_rule(self) -> bool:
        """Whether something other than the budget ends the search."""
        return False
