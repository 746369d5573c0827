"""Draws and scores the pictures of a study: the same prompts and noise under all of its conditions.

Conditions that differ in scales alone are a group, whose pictures are rows of the same batches. As many prompts are
drawn at a time as fill a batch, always the same ones together, so that a study that was cut off and goes on has the
last bits of one that was not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.arrays import Floats
from calibri_lightning.calibration import Layout
from calibri_lightning.module import CalibriModule
from calibri_lightning.prompts import Prompt
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.grid import Cell
from calibri_lightning.tools.pictures import DISTANCE, PictureLog, Scores
from calibri_lightning.tools.request import request_of


@dataclass(frozen=True)
class Group:
    """Conditions that are drawn together."""

    thetas: Floats
    """Candidates, float64 [k, n]."""
    num_steps: int
    """Sampling steps."""
    weights: str
    """The copy of the network's weights that draws them."""


@dataclass(frozen=True)
class Plan:
    """What a study draws."""

    about: Mapping[str, object]
    """The study's own settings, as plain values for JSON."""
    layout: Layout
    """The meaning of the candidates."""
    groups: tuple[Group, ...]
    """All conditions, group by group; K together."""
    columns: tuple[str, ...]
    """What names a condition in the CSV of the pictures."""
    rows: tuple[tuple[str, ...], ...]
    """The K conditions, each with one text for each of the columns."""
    reference: int = 0
    """The condition whose spread is the unit of normalised rewards."""
    with_distances: bool = False
    """Whether pictures are compared with those of the first condition; there is one group then."""


class PictureStudy(ABC):
    """A study of pictures.

    Args:
        folder: Where the results go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asked: list[tuple[Prompt, int]] = []
        self._waiting: list[tuple[Prompt, int]] = []

    @abstractmethod
    def plan(self, module: CalibriModule) -> Plan:
        """Says what is to be drawn.

        Args:
            module: The module; it has its device, its weights and its answer.

        Returns:
            The plan.
        """

    @abstractmethod
    def write(self, module: CalibriModule, scores: Scores) -> None:
        """Writes what was found.

        Args:
            module: The module.
            scores: Numbers of all conditions on all prompts.
        """

    def start(self, module: CalibriModule) -> None:
        """Prepares, and looks for what is known of an earlier attempt.

        Args:
            module: The module.
        """
        self._plan = plan = self.plan(module)
        engine = module.engine
        assert engine.rows_per_forward is not None, "settled when the stage started"
        rows, overlap = engine.rows_per_forward, engine.evaluator.overlap_scoring
        self._evaluator = Evaluator(
            module.backbone, engine.attachment, plan.layout, module.rewards, rows, overlap_scoring=overlap
        )
        self._at_a_time = max(1, self._evaluator.cells_per_unit // max(len(group.thetas) for group in plan.groups))
        names = tuple(dict.fromkeys((module.rewards.title, *module.rewards.names)))
        values = (*names, DISTANCE) if plan.with_distances else names
        thetas, weights = [group.thetas for group in plan.groups], [group.weights for group in plan.groups]
        request = {**plan.about, **request_of(module, thetas, weights)}
        self._log = PictureLog(self.folder, plan.columns, plan.rows, values, request)

    def add(self, module: CalibriModule, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Takes prompts, and draws as soon as they fill a batch.

        Args:
            module: The module.
            prompts: The prompts.
            seeds: Seed of the noise of each.
        """
        self._waiting += zip(prompts, seeds, strict=True)
        while len(self._waiting) >= self._at_a_time:
            self._draw(module)

    def finish(self, module: CalibriModule) -> None:
        """Draws what is left, and writes what was found.

        Args:
            module: The module.
        """
        while self._waiting:
            self._draw(module)
        self.write(module, self._in_one_unit(module, self._log.scores(self._asked)))

    def _draw(self, module: CalibriModule) -> None:
        """Draws the next prompts, unless an earlier attempt did; what it knew of some of them stays as it is."""
        part, self._waiting = self._waiting[: self._at_a_time], self._waiting[self._at_a_time :]
        self._asked += part
        if all(self._log.knows(prompt, seed) for prompt, seed in part):
            return
        numbers = self._numbers(module, part)
        for slot, (prompt, seed) in enumerate(part):
            if not self._log.knows(prompt, seed):
                self._log.put(prompt, seed, {name: values[:, slot] for name, values in numbers.items()})

    def _numbers(self, module: CalibriModule, part: Sequence[tuple[Prompt, int]]) -> dict[str, Floats]:
        """All numbers of some prompts, float64 [K, S] by name."""
        prompts, seeds = [prompt for prompt, _ in part], [seed for _, seed in part]
        found: dict[str, list[Floats]] = {}
        for group in self._plan.groups:
            distances = Distances(len(group.thetas), len(part)) if self._plan.with_distances else None
            with module.policy.using(group.weights):
                answer = self._evaluator.evaluate(
                    group.thetas, prompts, seeds, group.num_steps, held_out=True, seen=distances
                )
            numbers = {module.rewards.title: answer.rewards} | dict(answer.per_reward)
            if distances is not None:
                numbers[DISTANCE] = distances.values.numpy()
            for name, values in numbers.items():
                found.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in found.items()}

    def _in_one_unit(self, module: CalibriModule, scores: Scores) -> Scores:
        """Normalised rewards are added in units of the reference, as in a test (`Conditions.results`)."""
        if not module.blend.changes_units:
            return scores
        each = [{name: scores.values[name][row] for name in module.blend.names} for row in range(len(self._plan.rows))]
        reference = module.blend.scale_of(each[self._plan.reference])
        total = np.stack([module.blend.judge(rewards, reference) for rewards in each])
        plain = {name: values for name, values in scores.values.items() if name != module.rewards.title}
        return Scores({module.reward_name: total, **plain}, scores.clusters)


class Distances:
    """Root mean square difference of each picture from the first condition's, over all pixels and colours, 0 to 1.

    Args:
        count: Number of conditions K.
        num_prompts: Number of prompts S.
    """

    def __init__(self, count: int, num_prompts: int = 1) -> None:
        self.values = torch.full((count, num_prompts), torch.nan, dtype=torch.float64)
        self._references: dict[int, Tensor] = {}

    def __call__(self, cells: tuple[Cell, ...], images: Tensor) -> None:
        """Takes a unit's pictures; the reference of a prompt is the first of its pictures.

        Args:
            cells: Where they belong.
            images: float32 [B, 3, H, W] in 0..1, or videos [B, F, 3, H, W].
        """
        for cell, image in zip(cells, images, strict=True):
            if cell.candidate == 0:
                self._references = {cell.slot: image.clone()}  # that of the prompt before is done with
            squared = (image.double() - self._references[cell.slot].double()).square().mean()
            self.values[cell.candidate, cell.slot] = squared.sqrt().cpu()
