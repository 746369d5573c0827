"""How long a search runs: generations, images, seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.checks import check_at_least, check_positive


@dataclass(frozen=True)
class StopRules:
    """When a search ends before `trainer.max_steps`."""

    max_images: int | None = None
    """Most training images; the last generation that fits is the last one."""
    max_seconds: float | None = None
    """Most seconds of training, over all resumed parts."""
    patience: int | None = None
    """Validations in a row without a better score."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: If one is not positive.
        """
        check_at_least("max_images", self.max_images, 1, "it is a number of images")
        check_positive("max_seconds", self.max_seconds)
        check_at_least("patience", self.patience, 1, "it counts validations")

    @property
    def any(self) -> bool:
        """Whether any rule is set."""
        return any(rule is not None for rule in (self.max_images, self.max_seconds, self.patience))


class SearchBudget:
    """The generations that a search may take, and its clock.

    Args:
        rules: Stop rules.
        max_steps: `trainer.max_steps`; -1 for none.
        num_cells: Images of a generation.
        has_other_rule: Whether something else may end the search.
        step: What a training step is called.

    Raises:
        UserError: If nothing ends the search or not one generation fits.
    """

    def __init__(
        self, rules: StopRules, max_steps: int, num_cells: int, has_other_rule: bool = False, step: str = "generation"
    ) -> None:
        self.step = step
        self.rules, self.num_cells = rules, num_cells
        self.elapsed = 0.0
        self._since: float | None = None
        limits = [max_steps] if max_steps >= 0 else []
        if rules.max_images is not None:
            if rules.max_images < num_cells:
                raise UserError(
                    f"max_images is {rules.max_images}, but one {step} takes {num_cells} images; at "
                    f"least one must fit. "
                    f"Raise max_images or make a {step} smaller."
                )
            limits.append(rules.max_images // num_cells)
        if not (limits or rules.any or has_other_rule):
            raise UserError(
                "The run has no end: trainer.max_steps is -1 and no stop rule is set. "
                f"Set trainer.max_steps ({step}s), max_images, max_seconds or patience."
            )
        self.total_generations = min(limits) if limits else None

    @property
    def total_images(self) -> int | None:
        """Images of the whole budget, where it is a number of generations."""
        return None if self.total_generations is None else self.total_generations * self.num_cells

    def start_clock(self) -> None:
        """Starts to count seconds on top of `elapsed`."""
        self._since = time.monotonic()

    def stop_clock(self) -> None:
        """Stops counting; what was counted stays in `elapsed`."""
        self.elapsed, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds of training, over all resumed parts."""
        return self.elapsed + (time.monotonic() - self._since if self._since is not None else 0.0)

    def progress(self, generation: int) -> float:
        """Used share of the budget.

        Args:
            generation: Generations told.

        Returns:
            0 .. 1. Only without any number of generations does the clock count: it makes a run unrepeatable.
        """
        if self.total_generations is not None:
            return min(1.0, generation / max(1, self.total_generations))
        return min(1.0, self.seconds / self.rules.max_seconds) if self.rules.max_seconds is not None else 0.0

    def over(self, images: int) -> str | None:
        """Says whether to end.

        Args:
            images: Images judged so far.

        Returns:
            The reason; None to go on.
        """
        rules = self.rules
        if rules.max_images is not None and images + self.num_cells > rules.max_images:
            return f"another {self.step} would exceed max_images = {rules.max_images}"
        if rules.max_seconds is not None and self.seconds >= rules.max_seconds:
            return f"max_seconds = {rules.max_seconds:g} are over"
        return None
