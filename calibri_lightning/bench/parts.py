"""What the loops do besides forwards: encoding, decoding, scoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibri_lightning.backbones import Backbone
from calibri_lightning.bench.loops import Job, encode_anew
from calibri_lightning.bench.measure import interleave
from calibri_lightning.calibration import Layout, attach
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator


@dataclass(frozen=True)
class Parts:
    """Seconds of each part, at the median."""

    encode: float
    """All prompts of a bucket, once."""
    decode: float
    """One picture."""
    score: float
    """One picture."""


@torch.no_grad()
def measure_parts(backbone: Backbone, layout: Layout, rewards: RewardSet, job: Job, rows: int, repeats: int) -> Parts:
    """Times the parts on a batch of pictures that the model draws.

    Args:
        backbone: A model without hooks.
        layout: The meaning of theta.
        rewards: What scores the pictures.
        job: Candidates, prompts and seeds.
        rows: Most rows of one forward, which decides how many pictures are decoded and scored at once.
        repeats: Repetitions.

    Returns:
        The times.
    """
    attachment = attach(backbone.transformer, layout.sites)
    evaluator = Evaluator(backbone, attachment, layout, rewards, rows)
    cells, images = next(evaluator.images(job.thetas, job.prompts, job.seeds, job.num_steps))
    attachment.detach()
    latents, prompts = backbone.noise(range(len(cells))), [job.prompts[cell.slot] for cell in cells]
    variants: dict[str, Callable[[], object]] = {
        "encode": lambda: encode_anew(backbone, layout, job.prompts),
        "decode": lambda: backbone.decode(latents),
        "score": lambda: rewards.score(images, prompts).total.cpu(),
    }
    timings = interleave(variants, repeats, backbone.device)
    return Parts(timings["encode"].median, timings["decode"].median / len(cells), timings["score"].median / len(cells))
