"""Samples with a backbone whose transformer has no hooks: what the tests of backbones share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from calibri_lightning.backbones import Backbone
from calibri_lightning.calibration.scales import Member, Rows
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
