"""Draws and scores all contenders on one loaded model: same prompts, same noises, one set of weights at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.adapters.full import load_transformer
from calibri_lightning.adapters.loading import load_adapter
from calibri_lightning.adapters.lora import remove_lora
from calibri_lightning.adapters.swap import overwrite
from calibri_lightning.arrays import Floats
from calibri_lightning.backbones import Backbone
from calibri_lightning.calibration import attach
from calibri_lightning.calibration.restore import check_adapter, layout_for
from calibri_lightning.calibration.weights import check_weights
from calibri_lightning.engine import Engine
from calibri_lightning.evaluation.diversity import Diversity, measure_diversity, thumbnails
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.noise import TEST_STEP, noise_seed
from calibri_lightning.tools.compare.contenders import Scored
from calibri_lightning.tools.compare.gallery import GalleryPrompt, Picture, encode
from calibri_lightning.tools.compare.runs import BASE_LABEL, LabelledRun


@dataclass(frozen=True)
class Task:
    """What every contender draws."""

    prompts: tuple[Prompt, ...]
    num_steps: tuple[int, ...]
    headline_steps: int
    samples: int
    """Samples of a prompt that diversity is measured on."""
    num_diversity_prompts: int
    num_gallery_prompts: int
    rows: int | None
    """Most rows of a forward; None finds them."""
    seed: int

    def seeds(self, prompts: Sequence[Prompt]) -> list[int]:
        """The noises of some prompts, those of a run's own test.

        Args:
            prompts: The prompts; one that stands there several times has a noise each time.

        Returns:
            A seed each.
        """
        batch = PromptBatch(TEST_STEP, tuple(prompts))
        return [noise_seed(self.seed, batch.step, p.index, n) for p, n in zip(prompts, batch.occurrences, strict=True)]


@dataclass(frozen=True)
class Drawn:
    """What was drawn of all contenders."""

    scored: tuple[Scored, ...]
    gallery: tuple[GalleryPrompt, ...]


def draw_all(
    backbone: Backbone, runs: Sequence[LabelledRun], rewards: RewardSet, task: Task, say: Callable[[str], None] = print
) -> Drawn:
    """Scores the base and every run at every number of steps.

    Args:
        backbone: The untouched model on its device; untouched again afterwards.
        runs: Runs of this model.
        rewards: What scores.
        task: What to draw.
        say: Told what is being done.

    Returns:
        Scores and pictures.

    Raises:
        UserError: If a run does not fit the model, or a reward fails.
    """
    scored: list[Scored] = []
    shown: list[list[Picture]] = []
    for run in (None, *runs):
        cells, pictures = _draw_one(backbone, run, runs[0], rewards, task, say)
        scored += cells
        shown.append(pictures)
    prompts = task.prompts[: task.num_gallery_prompts]
    gallery = [
        GalleryPrompt(prompt.text, tuple(row)) for prompt, row in zip(prompts, zip(*shown, strict=True), strict=True)
    ]
    return Drawn(tuple(scored), tuple(gallery))


def _draw_one(
    backbone: Backbone,
    run: LabelledRun | None,
    first: LabelledRun,
    rewards: RewardSet,
    task: Task,
    say: Callable[[str], None],
) -> tuple[list[Scored], list[Picture]]:
    """One contender; the base is guided as the first run was when it began."""
    transformer, label = backbone.transformer, BASE_LABEL if run is None else run.label
    file = (run or first).calibration
    with nullcontext() if run is None else dressed(backbone, run):
        layout = layout_for(file, transformer)
        attachment = attach(transformer, layout.sites)
        try:
            engine = Engine(backbone, attachment, layout, rewards, task.rows or "auto")
            with torch.inference_mode():
                engine.start(task.prompts, nullcontext, lambda rows: rows)
                theta = layout.start if run is None else np.asarray(file.values, dtype=np.float64)
                return _score(engine, theta[None], label, rewards, task, say)
        finally:
            attachment.detach()


def _score(
    engine: Engine, thetas: Floats, label: str, rewards: RewardSet, task: Task, say: Callable[[str], None]
) -> tuple[list[Scored], list[Picture]]:
    cells, pictures = [], []
    seeds = task.seeds(task.prompts)
    for steps in task.num_steps:
        say(f"{label}: {len(task.prompts)} pictures at {steps} steps")
        answer = engine.evaluator.evaluate(thetas, task.prompts, seeds, steps, held_out=True)
        values = {name: each[0] for name, each in answer.per_reward.items()}
        diversity = None
        if steps == task.headline_steps:
            diversity = _diversity(engine, thetas, rewards, task)
            pictures = _pictures(engine, thetas, label, values[rewards.entries[0].reward.name], task)
        cells.append(Scored(label, steps, values, diversity))
    return cells, pictures


def _pictures(engine: Engine, thetas: Floats, label: str, scores: Floats, task: Task) -> list[Picture]:
    prompts = task.prompts[: task.num_gallery_prompts]
    found = {
        cell.slot: encode(image, label, float(scores[cell.slot]))
        for unit, images in engine.evaluator.images(thetas, prompts, task.seeds(prompts), task.headline_steps)
        for cell, image in zip(unit, images, strict=True)
    }
    return [found[slot] for slot in range(len(prompts))]


def _diversity(engine: Engine, thetas: Floats, rewards: RewardSet, task: Task) -> Diversity | None:
    chosen = task.prompts[: task.num_diversity_prompts]
    if not chosen or task.samples < 2:
        return None
    prompts = [prompt for prompt in chosen for _ in range(task.samples)]
    pixels: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}
    name = ""
    # Unit by unit, so that no more pictures are kept.
    for unit, images in engine.evaluator.images(thetas, prompts, task.seeds(prompts), task.headline_steps):
        slots = [cell.slot for cell in unit]
        pixels.update(zip(slots, thumbnails(images).cpu(), strict=True))
        described = rewards.features(images.nan_to_num(0.0), [prompts[slot] for slot in slots])
        if described is not None:
            features.update(zip(slots, described.values.cpu(), strict=True))
            name = described.reward

    def stacked(rows: dict[int, Tensor]) -> Tensor:
        return torch.stack([rows[slot] for slot in range(len(prompts))]).unflatten(0, (-1, task.samples))

    return (
        measure_diversity(stacked(pixels), stacked(features), name) if features else measure_diversity(stacked(pixels))
    )


@contextmanager
def dressed(backbone: Backbone, run: LabelledRun) -> Iterator[None]:
    """Gives a model the weights and the adapter that a run drew with, and takes them off again, bit for bit.

    Args:
        backbone: The untouched model.
        run: The run.

    Yields:
        Nothing; meanwhile the model is the run's.

    Raises:
        UserError: If weights or adapter are missing or do not fit.
    """
    transformer = backbone.transformer
    changes = run.transformer is not None or run.merged is not None
    # Other weights stand in the same tensors; a copy on the CPU costs no memory where pictures are drawn.
    before = {name: p.detach().cpu().clone() for name, p in transformer.named_parameters()} if changes else {}
    try:
        if run.transformer is not None:
            load_transformer(transformer, run.transformer)
        if run.merged is not None:
            load_adapter(transformer, run.merged, merge=True)
        check_weights(run.calibration.weights, transformer, run.folder)
        if run.adapter is not None:
            load_adapter(transformer, run.adapter)
        check_adapter(run.calibration, transformer)
        transformer.requires_grad_(False)
        yield
    finally:
        remove_lora(transformer)
        if changes:
            overwrite(dict(transformer.named_parameters()), before)
