"""What an ablation draws: every part at every level, in one group."""

from __future__ import annotations

from pathlib import Path

from calibri_lightning.adapters.policy import BASE
from calibri_lightning.calibration import Granularity, fingerprint
from calibri_lightning.module import CalibriModule
from calibri_lightning.strategies.base import Candidate
from calibri_lightning.strategies.sensitivity import Sensitivity, write_sensitivity
from calibri_lightning.tools.ablate.conditions import ablated, conditions, part_scales
from calibri_lightning.tools.ablate.results import Results, distances_per_unit, write_results
from calibri_lightning.tools.drawing import Group, PictureStudy, Plan
from calibri_lightning.tools.pictures import Scores
from calibri_lightning.tools.unfold import unfold

SENSITIVITY = "sensitivity.json"
"""Name of the file that `CMAES(sigma_from=...)` reads."""


class Ablation(PictureStudy):
    """An ablation as a study.

    Args:
        folder: Where the results go.
        by: What is removed at a time.
        levels: What its output is multiplied by.
        of_answer: Whether the run's answer is studied, or the model without scales and adapter.
    """

    def __init__(self, folder: Path, by: Granularity, levels: tuple[float, ...], of_answer: bool) -> None:
        super().__init__(folder)
        self._by, self._levels, self._of_answer = by, levels, of_answer

    def plan(self, module: CalibriModule) -> Plan:
        """Makes the candidates.

        Args:
            module: The module.

        Returns:
            The plan.
        """
        candidate = module.answer if self._of_answer else Candidate(module.layout.start, BASE)
        layout, theta = unfold(module.layout, candidate.theta)
        self.points = conditions(layout, self._by, self._levels)
        self._scales = part_scales(layout, theta, self._by)
        thetas = ablated(layout, theta, self._by, self.points)
        print(
            f"Ablating {module.backbone.name}: {len(self.points)} pictures a prompt (by {self._by}, levels "
            f"{', '.join(f'{level:g}' for level in self._levels)}). Folder: {self.folder}",
            flush=True,
        )
        return Plan(
            about={"study": "ablate", "by": self._by},
            layout=layout,
            groups=(Group(thetas, module.num_steps, candidate.weights),),
            columns=("site", "level"),
            rows=tuple((point.site, f"{point.level:g}") for point in self.points),
            with_distances=True,
        )

    def write(self, module: CalibriModule, scores: Scores) -> None:
        """Writes the tables and the plots.

        Args:
            module: The module.
            scores: Numbers of all conditions on all prompts.
        """
        num_prompts = len(scores.clusters)
        model = fingerprint(module.backbone.transformer, module.backbone.name)
        distances = distances_per_unit(self.points, scores, self._scales)
        write_sensitivity(
            self.folder / SENSITIVITY, Sensitivity(model, self._by, module.num_steps, num_prompts, distances)
        )
        title = f"{module.backbone.name} by {self._by}, {num_prompts} prompts, {module.num_steps} steps"
        write_results(self.folder, Results.of(self.points, scores, module.reward_name), title)
