"""Metrics on two processes give what one process gives, whoever had how many pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from metric_tools import RedReward, centre, flat, on_ranks
from torch import Tensor

from calibri_lightning.metrics import FeatureNetwork, KernelDistance, PictureChange, RewardMetric, frechet_distance

pytestmark = pytest.mark.distributed

SHARES = ([slice(0, 4), slice(4, 5)], [slice(5, 7)])
"""Batches of each rank: five pictures in two, and two in one."""
ALL_OR_NOTHING: tuple[list[slice], list[slice]] = ([slice(0, 4), slice(4, 7)], [])
NUM_PICTURES = 7


def colours(seed: int) -> Tensor:
    return torch.rand(NUM_PICTURES, 3, generator=torch.Generator().manual_seed(seed))


def reward(parts: list[slice]) -> Any:
    metric = RewardMetric(RedReward(), extras=True)
    texts = ["nan" if number in (1, 6) else "a" for number in range(NUM_PICTURES)]
    for part in parts:
        metric.update(flat(colours(0)[part]), texts[part])
    return {name: float(value) for name, value in metric.compute().items()}


def change(parts: list[slice]) -> Any:
    metric = PictureChange()
    for part in parts:
        metric.update(flat(colours(0)[part]), flat(colours(1)[part]))
    return float(metric.compute())


def frechet(parts: list[slice]) -> Any:
    metric = frechet_distance(FeatureNetwork(centre, 3))
    for part in parts:
        metric.update(flat(colours(0)[part], 4), real=True)
        metric.update(flat(colours(1)[part], 4), real=False)
    return float(metric.compute())


def kernel(parts: list[slice]) -> Any:
    metric = KernelDistance(FeatureNetwork(centre, 3), subsets=4, subset_size=3)
    for part in parts:
        metric.update(flat(colours(0)[part], 4), real=True)
        metric.update(flat(colours(1)[part], 4), real=False)
    return [float(value) for value in metric.compute()]


@pytest.mark.parametrize("shares", [SHARES, ALL_OR_NOTHING], ids=["uneven", "one has none"])
@pytest.mark.parametrize("measure", [reward, change, frechet, kernel])
def test_two_ranks_find_what_one_finds(measure: Any, shares: tuple[list[slice], list[slice]]) -> None:
    alone = measure([slice(0, NUM_PICTURES)])
    first, second = on_ranks(lambda rank: measure(shares[rank]))
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)


def test_failures_of_all_ranks_are_counted() -> None:
    assert reward([slice(0, NUM_PICTURES)])["red_failed"] == 2
