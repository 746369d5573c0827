"""What a strategy must be able to do for others to take turns with it inside one fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from calibri_lightning.strategies.base import Strategy

if TYPE_CHECKING:
    from calibri_lightning.arrays import Floats
    from calibri_lightning.strategies.base import CalibratedModule
    from calibri_lightning.strategies.rounds import GenerationReport
    from calibri_lightning.strategies.selection import Selection


class TurnStrategy(Strategy, ABC):
    """A strategy that can be interrupted between two steps while another one changes the same variables."""

    report: GenerationReport | None = None
    """What its last step showed."""
    stop_reason: str | None = None
    """Why it ends, once one of its own rules says so."""

    @property
    @abstractmethod
    def selection(self) -> Selection:
        """Its validated candidates."""

    @property
    def mean(self) -> Floats | None:
        """Where a search stands, float64 [n]; None before its first step, and where theta is trained in place."""
        return None

    @abstractmethod
    def take_turn(self, module: CalibratedModule, moved: bool) -> None:
        """Goes on from theta and the network as they are; calling it again before the next step changes nothing.

        Args:
            module: The module that is trained.
            moved: Whether another strategy may have changed what this one trains since its own last step.
        """

    @abstractmethod
    def end_turn(self) -> None:
        """Pauses, so that the others' time does not count."""
