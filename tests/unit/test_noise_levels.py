"""Noise levels that pictures are trained on: permutations of their own, evenly spread, independent of the batch."""

from __future__ import annotations

import pytest
import torch

from calibri_lightning.sampling.noise import forward_noise_seed, levels_seed, noise_seed, step_noise_seed
from calibri_lightning.strategies.noise_levels import NoiseLevels

SEEDS = range(6)
SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.4, 0.1, 0.0])


@pytest.mark.usefixtures("untouched_rng")
def test_levels_of_a_picture_are_a_permutation_of_its_own() -> None:
    drawn = NoiseLevels().draw(SIGMAS, SEEDS)
    assert drawn.shape == (5, 6)
    for column_of in drawn.T:
        assert sorted(column_of.tolist(), reverse=True) == SIGMAS[:-1].tolist()
    assert len({tuple(column_of.tolist()) for column_of in drawn.T}) > 1, "not one order for all"
    for place, seed in enumerate(SEEDS):
        assert torch.equal(NoiseLevels().draw(SIGMAS, [seed])[:, 0], drawn[:, place]), "whoever else is in the batch"
    fewer = NoiseLevels(num_timesteps=2).draw(SIGMAS, SEEDS)
    assert torch.equal(fewer, drawn[:2]), "a part of the same order"


def test_over_many_pictures_every_level_comes_as_often_in_every_place() -> None:
    drawn = NoiseLevels(num_timesteps=2).draw(SIGMAS, range(4000))
    for place in drawn:
        counts = torch.stack([(place == level).sum() for level in SIGMAS[:-1]]).double()
        assert (counts - 800).abs().max() < 5 * (4000 * 0.2 * 0.8) ** 0.5


def test_the_noisiest_levels_alone() -> None:
    half = NoiseLevels(noisiest=0.4)
    assert half.count(5) == 2
    assert set(half.draw(SIGMAS, range(20)).flatten().tolist()) == set(SIGMAS[:2].tolist())


@pytest.mark.parametrize("noisiest", [1.0, 0.25])
def test_uniform_levels_fill_their_range_evenly(noisiest: float) -> None:
    drawn = NoiseLevels("uniform", 8, noisiest).draw(SIGMAS, range(500))
    assert drawn.shape == (8, 500)
    share = (1 - drawn) / noisiest
    assert ((share >= 0) & (share <= 1 + 1e-6)).all()
    assert torch.equal((share * 8 - 1e-4).floor().clamp(min=0).sort(dim=0).values[:, 0], torch.arange(8.0))
    # A place alone is uniform: mean 1/2, variance 1/12.
    assert float(share[0].mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 500) ** 0.5)
    assert float(share[0].var()) == pytest.approx(1 / 12, rel=0.2)


def test_seeds_of_training_are_no_seeds_of_sampling() -> None:
    seed = noise_seed(0, 0, 0, 0)
    others = {seed, *(step_noise_seed(seed, step) for step in range(9)), levels_seed(seed)}
    assert others.isdisjoint(forward_noise_seed(seed, number) for number in range(9))
    assert len(others) == 11
    assert all(0 <= other < 2**63 for other in others)
