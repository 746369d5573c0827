"""Antithetic pairs: their geometry, their gradient, Adam's step, and what bad rewards do."""

from __future__ import annotations

import numpy as np
import pytest

from calibri_lightning.arrays import Floats
from calibri_lightning.strategies.pair_core import PairCore
from calibri_lightning.strategies.search import FAILED, SearchSpace, generation_stream

N = 5
STDS = np.array([1.0, 1.0, 1.0, 0.2, 0.2])


def make_core(start: float = 1.0, **changes: object) -> PairCore:
    space = SearchSpace(np.full(N, start), np.full(N, -1.0), np.full(N, 2.0), STDS)
    settings = {
        "seed": 4,
        "sigma0": 0.15,
        "num_pairs": 8,
        "prompts_per_pair": 3,
        "lr": 0.03,
        "betas": (0.9, 0.99),
        "final_lr_fraction": 0.05,
    }
    return PairCore(space, **(settings | changes))


def fill(core: PairCore, values: Floats, difficulty: Floats | None = None) -> Floats:
    rewards = np.full((core.popsize, core.num_slots), np.nan)
    cells = core.next_cells(rewards)
    full = np.broadcast_to(values[:, None] + (0 if difficulty is None else difficulty), rewards.shape)
    rewards[cells] = full[cells]
    return rewards


def test_pairs_mirror_each_other_about_the_mean_with_the_given_widths() -> None:
    core = make_core(num_pairs=3000)
    thetas = core.ask(0)
    np.testing.assert_allclose((thetas[0::2] + thetas[1::2]) / 2, 1.0, atol=1e-12)
    np.testing.assert_allclose(thetas.std(axis=0), 0.15 * STDS, rtol=0.05)


def test_each_pair_has_slots_of_its_own() -> None:
    core = make_core()
    cells = core.next_cells(np.full((16, 24), np.nan))
    assert cells.sum() == core.num_cells == 2 * 8 * 3
    np.testing.assert_array_equal(cells.sum(axis=0), 2)  # every slot is seen by one pair alone
    for i in range(8):
        np.testing.assert_array_equal(np.flatnonzero(cells[2 * i]), [3 * i, 3 * i + 1, 3 * i + 2])
        np.testing.assert_array_equal(cells[2 * i], cells[2 * i + 1])
    rewards = fill(core, np.arange(16.0))
    assert not core.next_cells(rewards).any()
    rewards[5, 7] = np.nan
    np.testing.assert_array_equal(np.argwhere(core.next_cells(rewards)), [[5, 7]])


def test_step_is_adams_on_the_antithetic_gradient() -> None:
    core = make_core()
    mean, first, second = np.full(N, 1.0), np.zeros(N), np.zeros(N)
    noise = np.random.default_rng(0)
    for generation in range(5):
        thetas = core.ask(generation, generation / 10)
        values = noise.normal(size=16)
        core.tell(fill(core, values))
        z = generation_stream(4, generation).standard_normal((8, N))
        np.testing.assert_allclose(thetas[0::2], np.clip(mean + 0.15 * STDS * z, -1, 2))
        gradient = sum((values[2 * i] - values[2 * i + 1]) / 2 * z[i] for i in range(8)) / 8
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        t = generation + 1
        lr = 0.03 * (1 - 0.95 * generation / 10)
        mean = mean + STDS * lr * (first / (1 - 0.9**t)) / np.sqrt(second / (1 - 0.99**t))
        np.testing.assert_allclose(core.mean, mean, rtol=1e-9)


def test_first_step_has_the_length_of_lr_in_units_of_the_relative_step_size() -> None:
    core = make_core()
    core.tell(fill(core, core.ask(0)[:, 0]))
    np.testing.assert_allclose(np.abs(core.mean - 1.0), 0.03 * STDS, rtol=1e-6)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.525), (1.0, 0.05)])
def test_learning_rate_falls_linearly(progress: float, share: float) -> None:
    core = make_core()
    core.tell(fill(core, core.ask(0, progress)[:, 0]))
    np.testing.assert_allclose(np.abs(core.mean - 1.0), 0.03 * share * STDS, rtol=1e-6)


def test_difficulty_of_prompts_cancels() -> None:
    easy, hard = make_core(), make_core()
    for generation in range(5):
        values = np.sin(easy.ask(generation)).sum(axis=1)
        hard.ask(generation)
        easy.tell(fill(easy, values))
        hard.tell(fill(hard, values, np.random.default_rng(generation).normal(0, 50, 24)))
    np.testing.assert_allclose(hard.mean, easy.mean, rtol=1e-6)


def test_converges_on_a_noisy_quadratic() -> None:
    core = make_core()
    noise = np.random.default_rng(5)
    target = np.array([0.5, 1.3, 1.0, 0.9, 1.1])
    for generation in range(200):
        thetas = core.ask(generation, generation / 200)
        values = -(((thetas - target) / STDS) ** 2).sum(axis=1)
        core.tell(fill(core, values) + noise.normal(0, 0.02, (16, 24)))
    np.testing.assert_allclose(core.mean, target, atol=0.05)


def test_candidates_and_mean_stay_within_bounds() -> None:
    core = make_core(start=1.99, sigma0=0.5, lr=0.5)
    for generation in range(10):
        thetas = core.ask(generation)
        assert (thetas <= 2).all()
        assert (thetas >= -1).all()
        core.tell(fill(core, thetas.sum(axis=1)))
    assert (core.mean <= 2).all()


def test_prompt_that_failed_for_both_changes_nothing() -> None:
    reference, broken = make_core(prompts_per_pair=2), make_core(prompts_per_pair=4)
    values = reference.ask(0)[:, 0]
    broken.ask(0)
    rewards = fill(broken, values)
    for i in range(8):
        rewards[2 * i : 2 * i + 2, 4 * i] = FAILED
    assert broken.rejection(rewards) is None  # three quarters are left
    reference.tell(fill(reference, values))
    broken.tell(rewards)
    np.testing.assert_array_equal(broken.mean, reference.mean)


def test_candidate_that_failed_alone_counts_as_the_worst() -> None:
    core, expected = make_core(prompts_per_pair=1), make_core(prompts_per_pair=1)
    values = np.arange(16.0)
    core.ask(0)
    expected.ask(0)
    rewards = fill(core, values)
    rewards[9, 4] = FAILED  # its partner stands
    values[9] = 0.0
    core.tell(rewards)
    expected.tell(fill(expected, values))
    np.testing.assert_array_equal(core.mean, expected.mean)


@pytest.mark.parametrize("value", [FAILED, 0.5])
def test_dead_or_flat_generation_is_rejected(value: float) -> None:
    core = make_core()
    core.ask(0)
    assert core.rejection(fill(core, np.full(16, value))) is not None
    # Prompts differ, candidates do not: still nothing to learn.
    assert (core.rejection(fill(core, np.full(16, value), np.arange(24.0)))) is not None


def test_replay_is_bit_exact() -> None:
    first, second = make_core(), make_core()
    told = []
    for generation in range(10):
        told.append(fill(first, np.cos(first.ask(generation, generation / 10)).sum(axis=1)))
        first.tell(told[-1])
    for generation, rewards in enumerate(told):
        second.ask(generation, generation / 10)
        second.tell(rewards)
    assert first.ask(10).tobytes() == second.ask(10).tobytes()
