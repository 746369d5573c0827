"""The two loops that the benchmark compares, and the cost of a forward in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibri_lightning.backbones import Backbone, Conditioning
from calibri_lightning.calibration import Attachment, Layout, attach
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.kernels import euler_step

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """What both loops do: score every candidate on every prompt."""

    thetas: Floats
    """Candidates, float64 [K, n]."""
    prompts: tuple[Prompt, ...]
    """The S prompts of the bucket."""
    seeds: tuple[int, ...]
    """Noise seed of each prompt, shared by all candidates."""
    num_steps: int
    """Sampling steps."""

    @property
    def num_images(self) -> int:
        """Pictures of one pass: K x S."""
        return len(self.thetas) * len(self.prompts)

    def num_forwards(self, layout: Layout) -> int:
        """Transformer rows of one pass: pictures x members x steps."""
        return self.num_images * len(layout.members) * self.num_steps


@torch.no_grad()
def straightforward(backbone: Backbone, layout: Layout, rewards: RewardSet, job: Job) -> Floats:
    """The loop that one would write first, which is that of the published trainer.

    One candidate at a time; its prompts are encoded anew; members one after another; hooks come and go with each
    forward. The bucket is one batch.

    Args:
        backbone: A model without hooks.
        layout: The meaning of theta.
        rewards: What scores the pictures.
        job: The work.

    Returns:
        Rewards [K, S].
    """
    found = np.empty((len(job.thetas), len(job.prompts)))
    sigmas = backbone.schedule(job.num_steps).to(backbone.device)
    for number, theta in enumerate(job.thetas):
        rows = layout.rows(torch.from_numpy(theta)[None])
        texts = {"prompt": [p.text for p in job.prompts], "negative": [p.negative for p in job.prompts]}
        seen = {kind: _encode(backbone, texts[kind]) for kind in dict.fromkeys(m.prompt for m in layout.members)}
        x = backbone.noise(job.seeds)
        for step in range(job.num_steps):
            sigma, velocity = sigmas[step].expand(len(x)), torch.zeros_like(x)
            for index, member in enumerate(layout.members):
                attachment = attach(backbone.transformer, layout.sites)
                with attachment.rows(rows.scales[0, index].expand(len(x), -1)):
                    velocity += rows.weights[0, index].item() * backbone.velocity(x, sigma, seen[member.prompt])
                attachment.detach()
            x = euler_step(x, velocity, sigmas[step], sigmas[step + 1])
        found[number] = rewards.score(backbone.decode(x), job.prompts).total.cpu().double().numpy()
    return found


def _encode(backbone: Backbone, texts: Sequence[str]) -> Conditioning:
    """Encodes each text that differs, without the backbone's cache."""
    encoded = {text: backbone.encode_text(text) for text in dict.fromkeys(texts)}
    return Conditioning.cat([encoded[text] for text in texts]).to(backbone.device)


def batched(
    backbone: Backbone, attachment: Attachment, layout: Layout, rewards: RewardSet, job: Job, rows: int
) -> Floats:
    """This package's loop: candidates, members and prompts are rows of one batch, prompts are encoded once.

    Args:
        backbone: The model.
        attachment: Its hooks.
        layout: The meaning of theta.
        rewards: What scores the pictures.
        job: The work.
        rows: Most rows of one forward.

    Returns:
        Rewards [K, S].
    """
    evaluator = Evaluator(backbone, attachment, layout, rewards, rows)
    return evaluator.evaluate(job.thetas, job.prompts, job.seeds, job.num_steps).rewards


@torch.no_grad()
def flops_per_row(backbone: Backbone, rows: int = 2) -> float:
    """Counts the floating-point operations of one row of a forward: multiplications and additions of matrix products.

    Args:
        backbone: The model, not compiled.
        rows: Rows of the counted forward.

    Returns:
        FLOP.
    """
    x, seen = backbone.noise(range(rows)), backbone.encode([""] * rows)
    sigma = backbone.schedule(2)[1].to(x).expand(rows)
    # The counter knows matrix products; fused attention kernels hide theirs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone.velocity(x, sigma, seen)
    return counter.get_total_flops() / rows


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation of two series.

    Args:
        a: [K].
        b: [K].

    Returns:
        Spearman's rho.
    """
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
