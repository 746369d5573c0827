"""Samplers as the tests of backbones and of roll-outs share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.backbones import Backbone
from calibri_lightning.calibration.attach import attach
from calibri_lightning.calibration.scales import Layout, Member, Rows
from calibri_lightning.sampling.denoiser import Denoiser
from calibri_lightning.sampling.rollout import Samples


class NoHooks:
    """An attachment without sites."""

    sites = ()

    @contextmanager
    def rows(self, scales: Tensor | None) -> Iterator[None]:
        yield

    def set_rows(self, scales: Tensor | None) -> None:
        return


def draw(
    backbone: Backbone,
    seeds: Sequence[int],
    prompts: Sequence[str],
    negatives: Sequence[str] = (),
    weights: Sequence[Sequence[float]] = (),
    num_steps: int = 3,
) -> Samples:
    """Samples one picture a seed; without weights each has the prompt alone, else [prompt, negative] weights."""
    members = [Member("prompt", 1.0)]
    if weights:
        members = [Member("prompt", weights[0][0]), Member("negative", weights[0][1])]
    matrix = torch.tensor(weights) if weights else torch.ones(len(seeds), 1)
    attachment: Any = NoHooks()
    return backbone.sample(
        attachment,
        Rows(torch.ones(len(seeds), len(members), 0), matrix),
        members,
        backbone.encode(prompts),
        backbone.encode(negatives, negative=True) if weights else None,
        backbone.noise(seeds),
        num_steps,
    )


@contextmanager
def denoising(
    backbone: Backbone,
    layout: Layout,
    rows: Rows,
    prompts: Sequence[str],
    negatives: Sequence[str] = (),
    num_steps: int = 4,
    all_members: bool = False,
) -> Iterator[Denoiser]:
    """A denoiser of one picture a prompt, with hooks on the layout's sites."""
    attachment = attach(backbone.transformer, layout.sites)
    try:
        yield Denoiser(
            backbone,
            attachment,
            rows,
            layout.members,
            backbone.encode(prompts),
            backbone.encode(negatives, negative=True) if layout.is_cfg else None,
            num_steps,
            all_members,
        )
    finally:
        attachment.detach()


def candidates(layout: Layout, count: int, spread: float = 0.3) -> Rows:
    """Rows of candidates around the start, another for each picture."""
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((count, layout.num_parameters))
    return layout.rows(torch.from_numpy(layout.start + spread * layout.stds * noise))


def trainable(rows: Rows) -> Rows:
    """Leaves of the same values that require gradients."""
    return Rows(*(part.detach().clone().requires_grad_() for part in rows))
