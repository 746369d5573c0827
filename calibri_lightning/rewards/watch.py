"""The alarm against reward hacking: what is optimised rises while what is watched falls.

The candidates of a validation are compared with the start, picture by picture on the same prompts and noise. A
difference counts where its mean is at least two standard errors from 0. Of the training pictures of a prompt, which
policy gradients draw in groups, the distance between them is watched as well: an answer that always draws the same good
picture has gained a reward and lost a model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibri_lightning.arrays import ROUNDING, Floats

STANDARD_ERRORS = 2.0
"""A mean difference of so many standard errors counts."""
START = "start"
"""The candidate that others are compared with."""
WINDOW = 10
"""Training steps whose diversity is averaged: the first so many, and the last."""
LEAST_DIVERSITY = 0.8
"""Share of the diversity of the first steps below which it has fallen."""

_log = logging.getLogger(__name__)


@dataclass
class Watch:
    """Compares validations with the start; part of every checkpoint."""

    start_total: list[float] = field(default_factory=list)
    """What is optimised, of the start's pictures."""
    start_each: dict[str, list[float]] = field(default_factory=dict)
    """What is watched, of the start's pictures."""
    diversity: list[float] = field(default_factory=list)
    """Distance between the pictures of a prompt, of each training step."""
    num_alarms: int = 0
    """Things that fell while the optimised reward rose, in the last validation that compared any."""

    @property
    def is_watching(self) -> bool:
        """Whether there is anything that could be seen to fall."""
        return bool(self.start_total) and (bool(self.start_each) or len(self.diversity) >= 2 * WINDOW)

    def lacks(self, watched: Sequence[str]) -> bool:
        """Whether the start's scores are still needed: of a run that begins, or of a reward that is watched since then.

        Args:
            watched: Names of those that play no part in what is optimised.

        Returns:
            Whether they are.
        """
        return bool(watched) and (not self.start_total or any(name not in self.start_each for name in watched))

    def trained(self, diversity: float) -> None:
        """Takes note of a training step.

        Args:
            diversity: Distance between its pictures of one prompt; NaN if there was none.
        """
        if math.isfinite(diversity):
            self.diversity.append(diversity)

    def validated(
        self, totals: Mapping[str, Floats], each: Mapping[str, Mapping[str, Floats]], watched: Sequence[str]
    ) -> tuple[str, ...]:
        """Compares the candidates of a validation with the start, and warns.

        Args:
            totals: What is optimised, [P] by candidate; "start" in the first validation of a run.
            each: Every reward [P] by candidate.
            watched: Names of those that play no part in what is optimised.

        Returns:
            What is alarming, a sentence each.
        """
        if START in totals:
            self._begin(totals[START], each[START], watched)
        others = [name for name in totals if name != START]
        if not others or not self.start_total:
            return ()
        alarms: dict[str, str] = {}
        for name in others:
            gain, error = _paired(totals[name], self.start_total)
            if not _counts(gain, error, self.start_total):
                continue
            # Another run may have watched others.
            for reward in (reward for reward in watched if reward in self.start_each):
                start = self.start_each[reward]
                change, spread = _paired(each[name][reward], start)
                if _counts(-change, spread, start):
                    alarms[reward] = (
                        f"{name} gained {gain:+.4g} +- {error:.2g} of what is optimised over the start and lost "
                        f"{change:+.4g} +- {spread:.2g} of {reward}"
                    )
            before, now = self._diversities()
            if now < LEAST_DIVERSITY * before:
                alarms["diversity"] = (
                    f"{name} gained {gain:+.4g} +- {error:.2g} of what is optimised over the start, and pictures of "
                    f"one prompt differ less: {now:.4g}, in the first {WINDOW} steps {before:.4g}"
                )
        self.num_alarms = len(alarms)
        for alarm in alarms.values():
            _log.warning(
                "Reward hacking? %s (validation prompts, mean +- standard error). Look at the pictures; a cap on the "
                "reward, a second reward, or more KL to the base (policy gradients) holds against it.",
                alarm,
            )
        return tuple(alarms.values())

    def _begin(self, total: Floats, each: Mapping[str, Floats], watched: Sequence[str]) -> None:
        """Takes the start's scores, where they are not known yet and there are any."""
        if not self.start_total and np.isfinite(total).any():
            self.start_total = total.tolist()
        for name in watched:
            if name not in self.start_each and np.isfinite(each[name]).any():
                self.start_each[name] = each[name].tolist()

    def state(self) -> dict[str, Any]:
        """The watch as plain lists and numbers.

        Returns:
            What `Watch(**state)` takes.
        """
        return {
            "start_total": list(self.start_total),
            "start_each": {name: list(values) for name, values in self.start_each.items()},
            "diversity": list(self.diversity),
            "num_alarms": self.num_alarms,
        }

    def _diversities(self) -> tuple[float, float]:
        """Of the first steps and of the last; NaN while they are the same."""
        if len(self.diversity) < 2 * WINDOW:
            return math.nan, math.nan
        return float(np.mean(self.diversity[:WINDOW])), float(np.mean(self.diversity[-WINDOW:]))


def _counts(rise: float, error: float, start: Sequence[float]) -> bool:
    """Whether a difference is more than chance and more than rounding; False where there is none."""
    return rise > STANDARD_ERRORS * error + ROUNDING * float(np.nanmax(np.abs(start)))


def _paired(values: Floats, start: Sequence[float]) -> tuple[float, float]:
    """Mean difference and its standard error over the pictures that both have; NaN with fewer than two."""
    differences = values - np.asarray(start)
    finite = differences[np.isfinite(differences)]
    if len(finite) < 2:
        return math.nan, math.nan
    return float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(len(finite)))
