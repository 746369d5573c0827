"""The part of a test that measures diversity: several samples of a few prompts, under every condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibri_lightning.errors import EchoError
from calibri_lightning.evaluation.diversity import THUMBNAIL, Diversity, measure_diversity, thumbnails
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.sampling.noise import TEST_STEP

if TYPE_CHECKING:
    from calibri_lightning.conditions import Way
    from calibri_lightning.module import CalibriModule

SAMPLES = 8
"""Samples of a prompt."""


def diversities(
    module: CalibriModule, ways: Sequence[Way], prompts: Sequence[Prompt], samples: int = SAMPLES
) -> tuple[Diversity, ...]:
    """Draws each prompt several times under each condition and measures how different the pictures are.

    All conditions see the same noises; a prompt's first sample is the one that the test scores. All ranks call this,
    draw a share each and get the same answer.

    Args:
        module: A module in its test stage.
        ways: The conditions.
        prompts: The prompts; each is measured on its own.
        samples: Pictures of a prompt.

    Returns:
        One `Diversity` a condition; none without prompts.

    Raises:
        UserError: If the features of a reward fail, here or on another rank (`EchoError`).
    """
    if not prompts:
        return ()
    batch = PromptBatch(TEST_STEP, tuple(prompt for prompt in prompts for _ in range(samples)))
    return tuple(_measure(module, way, batch, samples) for way in ways)


def _measure(module: CalibriModule, way: Way, batch: PromptBatch, samples: int) -> Diversity:
    # A rank that draws nothing must know, too, how many features there are.
    blank = torch.zeros(1, 3, *module.backbone.image_size, device=module.device)
    known = module.rewards.features(blank, batch.prompts[:1])
    num_pixels = 3 * THUMBNAIL**2
    columns = num_pixels + (known.values.shape[1] if known else 0)
    table = torch.zeros(len(batch.prompts), columns, device=module.device)
    failure: Exception | None = None
    try:
        _describe(module, way, batch, table)
    except Exception as error:
        if module.engine.lockstep.is_lost:
            raise
        # The other ranks wait for this one: they are told before it stops.
        failure = error
    failures = _sum(module, torch.tensor([float(failure is not None)], device=module.device))
    if failure is not None:
        raise failure
    if failures.item():
        raise EchoError("Measuring diversity failed on another rank, whose own message says why.")
    # Each row was made by one rank and is 0 on the others.
    table = _sum(module, table).reshape(-1, samples, columns)
    pictures, features = table[..., :num_pixels], table[..., num_pixels:]
    return measure_diversity(pictures, features, known.reward) if known else measure_diversity(pictures)


def _describe(module: CalibriModule, way: Way, batch: PromptBatch, table: Tensor) -> None:
    """Draws this rank's units and writes their rows, unit by unit, so that no more pictures are kept."""
    ranks = (module.trainer.global_rank, module.trainer.world_size)
    seeds = module.noise_seeds(batch)
    # Outside of its steps the trainer does not set up a mixed precision, in which the scored pictures were drawn.
    candidate, late = way.candidate, module.engine.lockstep.late()
    with module.trainer.precision_plugin.forward_context(), module.policy.using(candidate.weights):
        for cells, images in module.engine.evaluator.images(
            candidate.theta[None], batch.prompts, seeds, way.num_steps, None, *ranks, module.pulse.note
        ):
            if late.is_there:
                continue
            slots = [cell.slot for cell in cells]
            parts = [thumbnails(images)]
            with late.kept():
                described = module.rewards.features(images.nan_to_num(0.0), [batch.prompts[slot] for slot in slots])
                if described is not None:
                    parts.append(described.values)
                table[slots] = torch.cat(parts, dim=1).to(table)
    late.raise_it()


def _sum(module: CalibriModule, values: Tensor) -> Tensor:
    summed = module.trainer.strategy.reduce(values, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed
