"""CMA-ES core: agrees with plain pycma, honours its settings, survives bad rewards, leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path

import cma
import numpy as np
import pytest

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.cma_core import CMACore, official_popsize
from calibri_lightning.strategies.search import FAILED, SearchSpace, generation_stream

N = 6


def make_space(n: int = N, start: float = 1.0, stds: Floats | None = None) -> SearchSpace:
    return SearchSpace(np.full(n, start), np.full(n, -1.0), np.full(n, 2.0), np.ones(n) if stds is None else stds)


def make_core(space: SearchSpace | None = None, **changes: object) -> CMACore:
    settings = {"seed": 3, "sigma0": 0.2, "popsize": 12, "rounds": (1,)} | changes
    return CMACore(space or make_space(), **settings)


def column(values: Floats) -> Floats:
    return np.asarray(values, dtype=np.float64)[:, None]


def sphere(thetas: Floats) -> Floats:
    return -((thetas - 0.3) ** 2).sum(axis=1)


def run(core: CMACore, generations: int, reward=sphere) -> CMACore:
    for generation in range(core_generation(core), core_generation(core) + generations):
        core.tell(column(reward(core.ask(generation))))
    return core


def core_generation(core: CMACore) -> int:
    return core.es.countiter


def test_equals_plain_pycma_given_the_same_stream() -> None:
    stds = np.array([1, 1, 1, 1, 0.5, 0.2])
    space = make_space(stds=stds)
    core = make_core(space)
    stream = [generation_stream(3, 0)]
    plain = cma.CMAEvolutionStrategy(
        space.start,
        0.2,
        {
            "popsize": 12,
            "CMA_stds": stds,
            "bounds": [[-1.0] * N, [2.0] * N],
            "randn": lambda *shape: stream[0].standard_normal(shape),
            "seed": math.nan,
            "verbose": -9,
            "signals_filename": "",
        },
    )
    for generation in range(40):
        stream[0] = generation_stream(3, generation)
        expected = np.array(plain.ask())
        thetas = core.ask(generation)
        np.testing.assert_array_equal(thetas, expected)
        plain.tell(list(expected), (-sphere(expected)).tolist())  # values, not ranks: pycma minimises
        core.tell(column(sphere(thetas)))
    np.testing.assert_array_equal(core.mean, plain.result.xfavorite)
    assert core.sigma == plain.sigma


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_converges_on_sphere_and_ellipsoid(condition: float) -> None:
    scales = np.logspace(0, np.log10(condition), N)
    core = run(make_core(), 150, lambda x: -(scales * (x - 0.3) ** 2).sum(axis=1))
    np.testing.assert_allclose(core.mean, 0.3, atol=1e-4)
    assert core.sigma < 0.01


@pytest.mark.parametrize(("n", "popsize"), [(2, 6), (57, 16), (58, 16), (77, 17), (115, 18), (216, 20)])
def test_official_popsize(n: int, popsize: int) -> None:
    assert official_popsize(n) == popsize


def test_standard_deviations_of_coordinates_follow_stds() -> None:
    stds = np.array([1.0, 1.0, 0.2, 0.2, 0.05, 0.05])
    thetas = make_core(make_space(start=0.5, stds=stds), sigma0=0.1, popsize=4000).ask(0)
    np.testing.assert_allclose((thetas - 0.5).std(axis=0), 0.1 * stds, rtol=0.05)


def test_candidates_and_mean_stay_within_bounds() -> None:
    core = make_core(make_space(start=1.95), sigma0=0.8)
    for generation in range(20):
        thetas = core.ask(generation)
        assert (thetas >= -1).all()
        assert (thetas <= 2).all()
        core.tell(column(thetas.sum(axis=1)))
    assert (core.mean <= 2).all()
    assert (core.mean > 1.8).all()


def test_annealed_cmean_reaches_the_parameters_in_use_and_shortens_the_step() -> None:
    moves = {}
    for progress in (0.0, 0.5, 1.0):
        core = make_core(cmean_final=0.3)
        thetas = core.ask(0, progress)
        assert core.es.sp.cmean == pytest.approx(1 - 0.7 * progress)
        core.tell(column(sphere(thetas)))
        moves[progress] = core.mean - 1.0
    np.testing.assert_allclose(moves[1.0], 0.3 * moves[0.0], rtol=1e-9)
    np.testing.assert_allclose(moves[0.5], 0.65 * moves[0.0], rtol=1e-9)


def test_annealing_keeps_the_negative_weights_and_rates() -> None:
    core, plain = make_core(cmean_final=0.3), make_core()
    for generation in range(5):
        core.ask(generation, 0.5)
        plain.ask(generation)
        core.tell(column(np.arange(12.0)))
        plain.tell(column(np.arange(12.0)))
    assert list(core.es.sp.weights) == list(plain.es.sp.weights)
    assert core.es.sp.c1 == plain.es.sp.c1


def test_halving_asks_for_256_of_512_cells_in_three_rounds() -> None:
    core = make_core(popsize=32, rounds=(4, 4, 8))
    quality = np.random.default_rng(0).permutation(32).astype(float)
    core.ask(0)
    rewards = np.full((32, 16), np.nan)
    counts = []
    while (cells := core.next_cells(rewards)).any():
        counts.append(int(cells.sum()))
        assert np.isnan(rewards[cells]).all()
        rewards[cells] = np.broadcast_to(quality[:, None], rewards.shape)[cells]
    assert counts == [32 * 4, 16 * 4, 8 * 8]
    assert sum(counts) == core.num_cells == 256
    # The best half and the best quarter went on, over exactly the slots of their rounds.
    done = ~np.isnan(rewards)
    np.testing.assert_array_equal(done[:, :4].sum(axis=1), 4)
    np.testing.assert_array_equal(done[:, 4:8].all(axis=1), quality >= 16)
    np.testing.assert_array_equal(done[:, 8:].all(axis=1), quality >= 24)
    assert core.ranking(rewards) == np.argsort(-quality).tolist()
    assert core.rejection(rewards) is None


def test_halving_ranks_a_later_round_before_an_earlier_one_whatever_the_means() -> None:
    core = make_core(popsize=4, rounds=(1, 1))
    rewards = np.array([[3.0, -9.0], [2.0, -8.0], [1.0, np.nan], [0.0, np.nan]])
    # Means of the finalists are -3 and -3: equal, so that the better of the first round stays first.
    assert core.ranking(rewards) == [0, 1, 2, 3]
    rewards[1, 1] = 5.0
    assert core.ranking(rewards) == [1, 0, 2, 3]


def test_unfinished_cells_of_a_round_are_the_only_ones_asked_again() -> None:
    core = make_core(popsize=8, rounds=(2, 2))
    rewards = np.full((8, 4), np.nan)
    rewards[:, :2] = np.arange(8.0)[:, None]
    rewards[3, 1] = np.nan
    np.testing.assert_array_equal(np.argwhere(core.next_cells(rewards)), [[3, 1]])


def test_failed_candidate_is_the_worst_not_the_median() -> None:
    core = make_core(popsize=6, rounds=(2,))
    rewards = np.tile(np.arange(6.0)[:, None], (1, 2))
    rewards[5, 1] = FAILED  # the best but for this
    assert core.ranking(rewards) == [4, 3, 2, 1, 0, 5]
    assert core.rejection(rewards) is None


def test_failed_finalist_falls_behind_those_that_were_halved_away() -> None:
    core = make_core(popsize=4, rounds=(1, 1))
    rewards = np.array([[3.0, FAILED], [2.0, 2.0], [1.0, np.nan], [0.0, np.nan]])
    assert core.ranking(rewards) == [1, 2, 3, 0]


def test_failed_column_is_dropped_for_all_candidates() -> None:
    core = make_core(popsize=6, rounds=(4,))
    good = np.random.default_rng(1).normal(size=(6, 4))
    broken = good.copy()
    broken[:, 2] = FAILED
    assert core.rejection(broken) is None
    assert core.ranking(broken) == np.argsort(-good[:, [0, 1, 3]].mean(axis=1)).tolist()
    np.testing.assert_allclose(core.fitness(broken), good[:, [0, 1, 3]].mean(axis=1))
    broken[:, 1] = FAILED
    assert "only 2 of 4 prompts" in str(core.rejection(broken))


def test_generation_in_which_most_candidates_failed_is_rejected() -> None:
    core = make_core(popsize=8, rounds=(4,))
    rewards = np.random.default_rng(2).normal(size=(8, 4))
    rewards[:4, 0] = FAILED
    assert core.rejection(rewards) is None
    rewards[4, 1] = FAILED  # every prompt still has rewards, but three candidates of eight are whole
    assert "only 3 of 8 candidates" in str(core.rejection(rewards))


@pytest.mark.parametrize("value", [FAILED, 0.25])
def test_dead_or_flat_generation_is_rejected(value: float) -> None:
    core = make_core(popsize=6, rounds=(2,))
    assert core.rejection(np.full((6, 2), np.nan)) is None  # nothing evaluated yet
    assert core.rejection(np.full((6, 2), value)) is not None
    lonely = np.full((6, 2), FAILED)
    lonely[0] = 1.0
    assert core.rejection(lonely) is not None  # one candidate alone tells nothing


def test_replay_is_bit_exact_and_needs_no_generator_state() -> None:
    first = make_core(popsize=16, rounds=(2, 2), cmean_final=0.3)
    told = []
    for generation in range(25):
        thetas = first.ask(generation, generation / 30)
        rewards = np.full((16, 4), np.nan)
        while (cells := first.next_cells(rewards)).any():
            rewards[cells] = np.tile(sphere(thetas)[:, None], (1, 4))[cells]
        first.tell(rewards)
        told.append(rewards)
    second = make_core(popsize=16, rounds=(2, 2), cmean_final=0.3)
    for generation, rewards in enumerate(told):
        second.ask(generation, generation / 30)
        second.tell(rewards)
    assert first.ask(25).tobytes() == second.ask(25).tobytes()
    assert first.es.sm.C.tobytes() == second.es.sm.C.tobytes()
    assert first.tail_mean().tobytes() == second.tail_mean().tobytes()


def test_asking_twice_gives_the_same_candidates_and_no_other_search() -> None:
    core, once = make_core(), make_core()
    np.testing.assert_array_equal(core.ask(0), core.ask(0))
    core.tell(column(sphere(core.ask(0))))
    once.tell(column(sphere(once.ask(0))))
    np.testing.assert_array_equal(core.ask(1), once.ask(1))


def test_ranks_are_all_that_counts() -> None:
    core, warped = make_core(), make_core()
    run(core, 10)
    run(warped, 10, lambda x: np.exp(3 * sphere(x)))
    np.testing.assert_array_equal(core.mean, warped.mean)


def test_tail_mean_averages_the_last_quarter() -> None:
    core = make_core()
    np.testing.assert_allclose(core.tail_mean(), 1.0)
    means = []
    for _ in range(10):
        run(core, 1)
        means.append(core.mean)
    np.testing.assert_allclose(core.tail_mean(), np.mean(means[-3:], axis=0))  # ceil(10 / 4) = 3


def test_global_random_state_is_untouched() -> None:
    before = np.random.get_state()
    run(make_core(), 5)
    after = np.random.get_state()
    assert before[2] == after[2]
    np.testing.assert_array_equal(before[1], after[1])


def test_no_files_are_written_and_the_signals_file_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0, 'CMA_cmean': 0.001}")
    core = run(make_core(), 5)
    assert core.es.stop() == {}
    assert core.es.sp.cmean == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]


@pytest.mark.parametrize("popsize", [1, 3])
def test_too_few_candidates_are_refused(popsize: int) -> None:
    with pytest.raises(UserError, match=f"popsize is {popsize}.*at least 4.*Set"):
        make_core(popsize=popsize)


def test_one_parameter_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        make_core(make_space(1))


@pytest.mark.parametrize("start", [2.5, -1.01, math.nan])
def test_bounds_that_exclude_the_start_are_refused(start: float) -> None:
    with pytest.raises(UserError, match="Parameter 0 starts at .* with bounds .*Widen"):
        make_space(start=start)


def test_useless_step_sizes_and_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="step size"):
        make_space(stds=np.array([1, 1, 1, 1, 1, 0.0]))
    with pytest.raises(UserError, match="equally long"):
        make_space(stds=np.ones(2))
