"""What a test compares: the base at equal and at full cost, the learned weights alone, and the calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.evaluation import Condition, Role

if TYPE_CHECKING:
    from calibri_lightning.module import CalibriModule
    from calibri_lightning.prompts import PromptBatch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """One way to make the test pictures."""

    name: str
    """What the table calls it."""
    role: Role
    """What of the calibration is on."""
    theta: Floats
    """Parameters, float64 [n]."""
    num_steps: int
    """Sampling steps."""


class Conditions:
    """The conditions of a test and their scores so far.

    Args:
        ways: How each condition makes its pictures.
    """

    def __init__(self, ways: tuple[Way, ...]) -> None:
        self.ways = ways
        self._rewards: list[dict[str, list[Floats]]] = [{} for _ in ways]

    @classmethod
    def of(cls, module: CalibriModule) -> Conditions:
        """Base, calibrated and the learned member weights alone at the module's steps, and the base at full cost.

        Args:
            module: The module; its theta is what is tested.

        Returns:
            The conditions; base alone where theta is the untouched model.
        """
        theta, base = module.answer, module.layout.start
        few, full = module.num_steps, module.full_num_steps
        ways = [Way(f"base @ {few} steps", "base", base, few)]
        if full and full != few:
            ways.append(Way(f"base @ {full} steps", "base", base, full))
        # The weights stand behind the scales; guidance alone explains part of many a gain.
        num_scales = len(module.layout.members) * len(module.layout.scale_names)
        weights = np.concatenate([base[:num_scales], theta[num_scales:]])
        if not (np.array_equal(weights, base) or np.array_equal(weights, theta)):
            name = "guidance" if module.layout.weight_mode == "guidance" else "weights"
            ways.append(Way(f"{name} alone @ {few} steps", "weights", weights, few))
        if not np.array_equal(theta, base):
            ways.append(Way(f"calibrated @ {few} steps", "calibrated", theta, few))
        return cls(tuple(ways))

    @property
    def has_calibrated(self) -> bool:
        """Whether there is more than the base."""
        return any(way.role == "calibrated" for way in self.ways)

    def score(self, module: CalibriModule, batch: PromptBatch) -> None:
        """Scores a batch under every condition, with the same noise.

        Args:
            module: The module.
            batch: The prompts.
        """
        seeds = module.noise_seeds(batch)
        for way, rewards in zip(self.ways, self._rewards, strict=True):
            answer = module.evaluate(way.theta[None], batch.prompts, seeds, num_steps=way.num_steps)
            for name, values in answer.per_reward.items():
                rewards.setdefault(name, []).append(values[0])
            # The sum is a row of its own, unless it is the one reward there is.
            if module.reward_name not in answer.per_reward:
                rewards.setdefault(module.reward_name, []).append(answer.rewards[0])

    def results(self, num_members: int) -> list[Condition]:
        """The conditions with all their rewards.

        Args:
            num_members: Forwards of a sampling step.

        Returns:
            One `Condition` each.
        """
        return [
            Condition(
                way.name,
                way.role,
                way.num_steps,
                way.num_steps * num_members,
                {name: np.concatenate(parts) for name, parts in rewards.items()},
            )
            for way, rewards in zip(self.ways, self._rewards, strict=True)
        ]
