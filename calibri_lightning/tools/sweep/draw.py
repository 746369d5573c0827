"""What a sweep draws: base and answer with every number of steps, the guidances of each in one group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from calibri_lightning.adapters.policy import BASE
from calibri_lightning.errors import UserError
from calibri_lightning.module import CalibriModule
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.tools.drawing import Group, PictureStudy, Plan
from calibri_lightning.tools.pictures import Scores
from calibri_lightning.tools.sweep.points import Point, Sweep, Which
from calibri_lightning.tools.sweep.results import write_sweep
from calibri_lightning.tools.unfold import at_guidance, unfold


class SweepStudy(PictureStudy):
    """A sweep as a study.

    Args:
        folder: Where the results go.
        steps: Numbers of sampling steps.
        guidances: Guidance scales as the stock pipeline's call counts them; none leaves guidance alone.
    """

    def __init__(self, folder: Path, steps: Sequence[int], guidances: Sequence[float]) -> None:
        super().__init__(folder)
        self._steps, self._guidances = tuple(steps), tuple(guidances)

    def plan(self, module: CalibriModule) -> Plan:
        """Makes the candidates.

        Args:
            module: The module.

        Returns:
            The plan.

        Raises:
            UserError: If guidance is to be swept and the model draws without a negative prompt.
        """
        if self._guidances and not module.layout.is_cfg:
            seen = ", ".join(member.prompt for member in module.layout.members)
            raise UserError(
                f"--guidance was given, but the members of this run see {seen}. Guidance is swept for the "
                "pair (prompt, negative prompt), members: cfg. Leave --guidance out."
            )
        base = Candidate(module.layout.start, BASE)
        candidates: dict[Which, Candidate] = {"base": base}
        if not module.same(module.answer, base):
            candidates["answer"] = module.answer
        guidances = self._guidances or (None,)
        points: list[Point] = []
        groups: list[Group] = []
        for (which, candidate), steps in product(candidates.items(), self._steps):
            layout, theta = unfold(module.layout, candidate.theta)
            moved = [at_guidance(theta, module.backbone.plain_guidance(g)) for g in self._guidances]
            groups.append(Group(np.stack(moved or [theta]), steps, candidate.weights))
            points += [Point(which, steps, g, steps * self._forwards(module, g)) for g in guidances]
        self.points = tuple(points)
        # The base at its dearest: with few steps a reward may hardly vary, and would have no unit.
        dearest = max((p for p in points if p.which == "base"), key=lambda p: p.num_forwards)
        print(f"Sweeping {module.backbone.name}: {len(points)} points. Folder: {self.folder}", flush=True)
        return Plan(
            about={"study": "sweep"},
            layout=layout,
            groups=tuple(groups),
            columns=("which", "steps", "guidance"),
            reference=points.index(dearest),
            rows=tuple((p.which, str(p.num_steps), "" if p.guidance is None else f"{p.guidance:g}") for p in points),
        )

    @staticmethod
    def _forwards(module: CalibriModule, guidance: float | None) -> int:
        """Forwards of a step: a member of weight 0 is not run, as in the stock pipeline without guidance."""
        unguided = guidance is not None and module.backbone.plain_guidance(guidance) == 1.0
        return 1 if unguided else len(module.layout.members)

    def write(self, module: CalibriModule, scores: Scores) -> None:
        """Writes the table and the plot.

        Args:
            module: The module.
            scores: Numbers of all points on all prompts.
        """
        sweeps = {name: Sweep.of(self.points, scores, name) for name in scores.rewards}
        title = f"{module.backbone.name}, {len(scores.clusters)} prompts"
        write_sweep(self.folder, sweeps, module.reward_name, title)
