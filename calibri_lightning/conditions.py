"""What a test compares: the base at equal and at full cost, where the run began, learned weights alone, the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibri_lightning.adapters.policy import BASE
from calibri_lightning.arrays import Floats
from calibri_lightning.evaluation import Condition, Role
from calibri_lightning.stacking import Start
from calibri_lightning.strategies.base import Candidate

if TYPE_CHECKING:
    from calibri_lightning.module import CalibriModule
    from calibri_lightning.prompts import PromptBatch


@dataclass(frozen=True)
class Way:
    """One way to make the test pictures."""

    name: str
    """What the table calls it."""
    role: Role
    """What of the calibration is on."""
    candidate: Candidate
    """Scales and network weights."""
    num_steps: int
    """Sampling steps."""


def base_name(module: CalibriModule) -> str:
    """What the model is called with no LoRA and no scales of its own.

    Args:
        module: The module.

    Returns:
        "base", unless its weights come from init_from: all of them, or a merged adapter, which cannot be taken off.
    """
    merged = module.adapter is not None and module.adapter.merged
    return "start (weights of init_from)" if merged or module.starts_from.transformer is not None else "base"


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
        """Base, start, answer and the learned member weights alone at the module's steps, and the base at full cost.

        Args:
            module: The module; its answer is what is tested.

        Returns:
            The conditions; base alone where the answer is the untouched model.
        """
        answer, base = module.answer, Candidate(module.layout.start, BASE)
        few, full, name = module.num_steps, module.full_num_steps, base_name(module)
        ways = [Way(f"{name} @ {few} steps", "base", base, few)]
        if full and full != few:
            ways.append(Way(f"{name} @ {full} steps", "base", base, full))
        start = module.start
        # A new LoRA changes nothing yet.
        has_start = module.starts_from != Start()
        if has_start and not (module.same(start, base) or module.same(start, answer)):
            ways.append(Way(f"start @ {few} steps", "start", start, few))
        # The weights stand behind the scales; guidance alone explains part of many a gain.
        num_scales = len(module.layout.members) * len(module.layout.scale_names)
        theta = np.concatenate([base.theta[:num_scales], answer.theta[num_scales:]])
        if not (np.array_equal(theta, base.theta) or np.array_equal(theta, answer.theta)):
            kind = "guidance" if module.layout.weight_mode == "guidance" else "weights"
            # With the answer's network: what the answer is more than this is due to the scales.
            has_network = not module.policy.same(answer.weights, BASE)
            name = f"answer without scales @ {few} steps" if has_network else f"{kind} alone @ {few} steps"
            ways.append(Way(name, "weights", Candidate(theta, answer.weights), few))
        if not module.same(answer, base):
            ways.append(Way(f"{module.strategy.words.done} @ {few} steps", "calibrated", answer, few))
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
            thetas, weights = way.candidate.theta[None], way.candidate.weights
            answer = module.evaluate(
                thetas, batch.prompts, seeds, num_steps=way.num_steps, weights=weights, held_out=True
            )
            for name, values in answer.per_reward.items():
                rewards.setdefault(name, []).append(values[0])
            # The sum is a row of its own, unless it is the one reward there is.
            if module.reward_name not in answer.per_reward:
                rewards.setdefault(module.reward_name, []).append(answer.rewards[0])

    def results(self, module: CalibriModule) -> list[Condition]:
        """The conditions with all their rewards.

        Normalised rewards are added in units of the first condition, the base: its mean counts 0, its standard
        deviation over the test prompts 1.

        Args:
            module: The module.

        Returns:
            One `Condition` each.
        """
        every = [{name: np.concatenate(parts) for name, parts in rewards.items()} for rewards in self._rewards]
        if module.blend.changes_units:
            reference = module.blend.scale_of(every[0])
            every = [rewards | {module.reward_name: module.blend.judge(rewards, reference)} for rewards in every]
        num_members = len(module.layout.members)
        return [
            Condition(way.name, way.role, way.num_steps, way.num_steps * num_members, rewards)
            for way, rewards in zip(self.ways, every, strict=True)
        ]
