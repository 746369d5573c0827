"""The two loops that the benchmark compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.backbones import Backbone, Conditioning
from calibri_lightning.calibration import Attachment, Layout, attach
from calibri_lightning.calibration.scales import Rows
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
        """Pictures: K x S."""
        return len(self.thetas) * len(self.prompts)

    def num_forwards(self, layout: Layout) -> int:
        """Transformer forwards, counted in rows: pictures x members x steps.

        Args:
            layout: The meaning of theta.

        Returns:
            Their number.
        """
        return self.num_images * len(layout.members) * self.num_steps


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
def straightforward(backbone: Backbone, layout: Layout, rewards: RewardSet, job: Job, rows: int) -> Floats:
    """The loop that one would write first, which is that of the published trainer.

    One candidate at a time; its prompts are encoded anew; members one after another; hooks come and go with each
    forward. The bucket is one batch.

    Args:
        backbone: A model without hooks.
        layout: The meaning of theta.
        rewards: What scores the pictures.
        job: The work.
        rows: Most rows of one forward; a larger bucket is cut.

    Returns:
        Rewards [K, S].
    """
    found = np.empty((len(job.thetas), len(job.prompts)))
    for number, theta in enumerate(job.thetas):
        own = layout.rows(torch.from_numpy(theta)[None])
        for first in range(0, len(job.prompts), rows):
            part = slice(first, first + rows)
            seen = encode_anew(backbone, layout, job.prompts[part])
            images = backbone.decode(_sample(backbone, layout, own, seen, job.seeds[part], job.num_steps))
            found[number, part] = rewards.score(images, job.prompts[part]).total.cpu().double().numpy()
    return found


def encode_anew(backbone: Backbone, layout: Layout, prompts: Sequence[Prompt]) -> list[Conditioning]:
    """Encodes what each member sees of some prompts, without the backbone's cache; equal texts once.

    Args:
        backbone: The model.
        layout: Says what members see.
        prompts: The prompts.

    Returns:
        A conditioning of as many rows for each member.
    """
    encoded: dict[str, Conditioning] = {}
    seen = []
    for member in layout.members:
        negative = member.prompt == "negative"
        texts = [backbone.phrase(prompt.negative if negative else prompt.text, negative) for prompt in prompts]
        for text in texts:
            if text not in encoded:
                encoded[text] = backbone.encode_text(text)
        seen.append(Conditioning.cat([encoded[text] for text in texts]).to(backbone.device))
    return seen


def _sample(
    backbone: Backbone, layout: Layout, own: Rows, seen: Sequence[Conditioning], seeds: Sequence[int], num_steps: int
) -> Tensor:
    """Latents of one candidate."""
    sigmas = backbone.schedule(num_steps).to(backbone.device)
    x = backbone.noise(seeds)
    weights = own.weights.expand(len(x), -1).to(x.device)
    for step in range(num_steps):
        velocities = []
        for scales, conditioning in zip(own.scales[0], seen, strict=True):
            attachment = attach(backbone.transformer, layout.sites)
            with attachment.rows(scales.expand(len(x), -1)):
                velocities.append(backbone.velocity(x, sigmas[step].expand(len(x)), conditioning))
            attachment.detach()
        x = euler_step(x, backbone.guide(torch.stack(velocities, dim=1), weights), sigmas[step], sigmas[step + 1])
    return x
