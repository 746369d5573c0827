"""Advantages: against loops of their own, flat groups, failed pictures, duplicates, large offsets."""

from __future__ import annotations

import numpy as np
import pytest

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.advantages import AdvantageOptions, Combine, advantages

ONE = {"a": 1.0}
TWO = {"a": 1.0, "b": 0.5}
EXACT = AdvantageOptions(damping=0.0)


def draw(shape: tuple[int, int] = (6, 8), seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Floats:
    return offset + scale * np.random.default_rng(seed).standard_normal(shape)


def test_group_std_gives_each_group_mean_zero_and_std_one() -> None:
    rewards = draw(scale=3.0, offset=7.0)
    answer = advantages({"a": rewards}, ONE, EXACT)
    reference = [[(r - np.mean(row)) / np.std(row) for r in row] for row in rewards]
    np.testing.assert_allclose(answer.values, reference, rtol=1e-12)
    assert answer.mask.all()
    assert answer.zero_std_share == 0
    assert answer.std == pytest.approx(1)


def test_global_std_divides_every_group_by_the_spread_of_the_step() -> None:
    rewards = draw() + np.arange(6)[:, None] * 2.0
    answer = advantages({"a": rewards}, ONE, AdvantageOptions(std="global", damping=0.01))
    expected = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.reshape(-1).std() + 0.01)
    np.testing.assert_allclose(answer.values, expected, rtol=1e-12)


def test_no_std_leaves_centred_rewards() -> None:
    rewards = draw(scale=0.3)
    answer = advantages({"a": rewards}, ONE, AdvantageOptions(std="none"))
    np.testing.assert_allclose(answer.values, rewards - rewards.mean(axis=1, keepdims=True), atol=1e-15)


def test_damping_is_added_to_the_std() -> None:
    answer = advantages({"a": np.array([[0.0, 2e-4]])}, ONE, AdvantageOptions())
    np.testing.assert_allclose(answer.values, [[-0.5, 0.5]], rtol=1e-9)  # deviation 1e-4 over std 1e-4 + 1e-4


def test_large_offsets_do_not_cost_digits() -> None:
    base = np.round(draw(), 3)
    near = advantages({"a": base}, ONE, EXACT).values
    # Exact in float64; in float32, or by E[x^2] - E[x]^2, nothing would be left.
    far = base + 1e6
    np.testing.assert_allclose(advantages({"a": far}, ONE, EXACT).values, near, rtol=1e-6, atol=1e-8)
    for std in ("group", "global"):
        answer = advantages({"a": far}, ONE, AdvantageOptions(std=std)).values
        spread = far.std(axis=1, keepdims=True) if std == "group" else far.std()
        np.testing.assert_allclose(answer, (far - far.mean(axis=1, keepdims=True)) / (spread + 1e-4), rtol=1e-12)


@pytest.mark.parametrize("combine", ["sum", "normalised_sum", "gdpo"])
@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("level", [0.0, 1.0, 21.7, -300.0])
def test_flat_groups_have_exactly_no_advantage_even_with_jitter(combine: Combine, std: str, level: float) -> None:
    rewards = draw((5, 6))
    rewards[1] = level
    rewards[3] = np.float32(level) + 1e-7 * np.random.default_rng(1).uniform(-1, 1, 6)
    rewards[4] = [level, np.nextafter(np.float32(level), np.float32(1e9)), level, level, level, level]
    answer = advantages({"a": rewards}, ONE, AdvantageOptions(combine=combine, std=std))
    assert not answer.values[[1, 3, 4]].any()
    assert not answer.mask[[1, 3, 4]].any()
    assert answer.mask[[0, 2]].all()
    assert answer.values[[0, 2]].all()
    assert answer.zero_std_share == pytest.approx(3 / 5)
    assert answer.values.shape == (5, 6)  # masked, not dropped


def test_differences_above_the_threshold_are_not_flat() -> None:
    rewards = np.array([[1.0, 1.0 + 1e-5]])
    assert advantages({"a": rewards}, ONE, AdvantageOptions()).mask.all()
    assert not advantages({"a": rewards}, ONE, AdvantageOptions(min_std=1e-4)).mask.any()


@pytest.mark.parametrize("combine", ["sum", "normalised_sum", "gdpo"])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_all_flat_is_finite(combine: Combine, level: float) -> None:
    rewards = {"a": np.full((3, 4), level), "b": np.zeros((3, 4))}
    answer = advantages(rewards, TWO, AdvantageOptions(combine=combine, damping=0.0, min_std=0.0))
    assert not answer.values.any()
    assert not answer.mask.any()
    assert (answer.zero_std_share, answer.std) == (1.0, 0.0)


@pytest.mark.parametrize("combine", ["sum", "normalised_sum", "gdpo"])
def test_failed_pictures_are_masked_and_do_not_move_the_others(combine: Combine) -> None:
    options = AdvantageOptions(combine=combine)
    first, second = draw(), draw(seed=1, scale=10)
    full = {"a": first[:, :6], "b": second[:, :6]}
    holed = {"a": first.copy(), "b": second.copy()}
    holed["a"][:, 6], holed["b"][:, 6] = np.nan, 1e9  # one of two rewards failed: the other must not count either
    holed["a"][:, 7], holed["b"][:, 7] = 0.0, np.inf
    answer, reference = advantages(holed, TWO, options), advantages(full, TWO, options)
    np.testing.assert_allclose(answer.values[:, :6], reference.values, rtol=1e-10, atol=1e-12)
    assert not answer.mask[:, 6:].any()
    assert not answer.values[:, 6:].any()
    assert answer.mask[:, :6].all()


def test_groups_of_fewer_than_two_usable_pictures_are_masked() -> None:
    rewards = draw((4, 3))
    rewards[0] = np.nan
    rewards[1, 1:] = np.nan
    rewards[2, 0] = np.nan
    answer = advantages({"a": rewards}, ONE, AdvantageOptions())
    np.testing.assert_array_equal(answer.mask.sum(axis=1), [0, 0, 2, 3])
    assert answer.zero_std_share == 0  # they are lost, not flat
    assert np.isfinite(answer.values).all()
    alone = advantages({"a": np.ones((2, 1))}, ONE, AdvantageOptions())
    assert not alone.mask.any()
    assert alone.zero_std_share == 0


def test_groups_are_kept_apart_by_position() -> None:
    # The same prompt twice: one row is easy noise, one is hard; merged, each would be mostly its offset.
    rows = draw((2, 8))
    rows[1] += 100
    both = advantages({"a": rows}, ONE, AdvantageOptions()).values
    for i in range(2):
        alone = advantages({"a": rows[i : i + 1]}, ONE, AdvantageOptions()).values
        np.testing.assert_array_equal(both[i], alone[0])
    same = advantages({"a": np.stack([rows[0], rows[0]])}, ONE, AdvantageOptions()).values
    np.testing.assert_array_equal(same[0], same[1])


@pytest.mark.parametrize("combine", ["sum", "normalised_sum", "gdpo"])
def test_order_of_groups_and_pictures_does_not_matter(combine: Combine) -> None:
    rng = np.random.default_rng(5)
    rewards = {"a": draw(), "b": draw(seed=2, scale=4)}
    rows, columns = rng.permutation(6), rng.permutation(8)
    shuffled = {name: value[rows][:, columns] for name, value in rewards.items()}
    options = AdvantageOptions(combine=combine)
    expected = advantages(rewards, TWO, options).values[rows][:, columns]
    np.testing.assert_allclose(advantages(shuffled, TWO, options).values, expected, rtol=1e-10, atol=1e-13)


def test_sum_weights_raw_rewards() -> None:
    first, second = draw(), draw(seed=1, scale=10)
    combined = advantages({"a": first, "b": second, "unused": draw() * np.nan}, TWO | {"unused": 0.0}, EXACT)
    np.testing.assert_allclose(combined.values, advantages({"a": first + 0.5 * second}, ONE, EXACT).values, rtol=1e-10)


def test_normalised_sum_does_not_depend_on_the_scale_of_a_reward() -> None:
    first, second = draw(), draw(seed=1)
    options = AdvantageOptions(combine="normalised_sum", damping=0.0)
    small = advantages({"a": first, "b": second}, TWO, options).values
    large = advantages({"a": first, "b": 1000 * second - 50}, TWO, options).values
    np.testing.assert_allclose(small, large, rtol=1e-9, atol=1e-11)
    by_hand = (first - first.mean()) / first.std() + 0.5 * (second - second.mean()) / second.std()
    np.testing.assert_allclose(small, advantages({"a": by_hand}, ONE, EXACT).values, rtol=1e-10)


def test_gdpo_agrees_with_a_loop() -> None:
    rewards = {"a": draw(), "b": draw(seed=1, scale=100)}
    rewards["b"][2] = 4.0  # flat for one reward alone
    rewards["a"][4], rewards["b"][4] = 1.0, 1.0  # flat for both
    rewards["a"][0, 3] = np.nan
    totals: dict[tuple[int, int], float] = {}
    for p in range(6):
        usable = [g for g in range(8) if np.isfinite(rewards["a"][p, g])]
        for g in usable if p != 4 else []:
            totals[p, g] = 0.0
            for name, weight in TWO.items():
                group = [rewards[name][p, k] for k in usable]
                if np.std(group) > 1e-3:
                    totals[p, g] += weight * (rewards[name][p, g] - np.mean(group)) / (np.std(group) + 1e-4)
    mean, std = np.mean(list(totals.values())), np.std(list(totals.values()))
    expected = np.zeros((6, 8))
    for (p, g), total in totals.items():
        expected[p, g] = (total - mean) / (std + 1e-4)
    answer = advantages(rewards, TWO, AdvantageOptions(combine="gdpo"))
    np.testing.assert_allclose(answer.values, expected, rtol=1e-10, atol=1e-14)
    assert {(int(p), int(g)) for p, g in np.argwhere(answer.mask)} == set(totals)
    assert answer.zero_std_share == pytest.approx(1 / 6)


def test_gdpo_tells_apart_what_the_sum_does_not() -> None:
    # The GDPO paper's example: two binary rewards, group (0, 0), (1, 0) against group (0, 0), (1, 1).
    rewards = {"a": np.array([[0.0, 1.0], [0.0, 1.0]]), "b": np.array([[0.0, 0.0], [0.0, 1.0]])}
    weights = {"a": 1.0, "b": 1.0}
    summed = advantages(rewards, weights, EXACT).values
    np.testing.assert_allclose(summed[0], summed[1])
    apart = advantages(rewards, weights, AdvantageOptions(combine="gdpo")).values
    assert apart[1, 1] == pytest.approx(2 * apart[0, 1])


def test_rounding_counts_by_the_size_of_what_was_added() -> None:
    # In a sum of 1000 and -1000 the rounding of either remains; so it does under a negative weight.
    jitter = np.array([[0.0, 6e-5, 0.0, 0.0]])
    for rewards, weights in (
        ({"a": 1000 + jitter, "b": np.full((1, 4), 1000.0)}, {"a": 1.0, "b": -1.0}),
        ({"a": 1000 + jitter}, {"a": -1.0}),
    ):
        assert not advantages(rewards, weights, AdvantageOptions()).mask.any()
    assert advantages({"a": jitter}, ONE, AdvantageOptions()).mask.all()


def test_rewards_that_cancel_are_flat() -> None:
    rewards = {"a": draw(offset=50), "b": draw(offset=50)}
    for combine in ("sum", "normalised_sum", "gdpo"):
        answer = advantages(rewards, {"a": 1.0, "b": -1.0}, AdvantageOptions(combine=combine))
        assert not answer.mask.any()
        assert not answer.values.any()


def test_clip_bounds_both_sides() -> None:
    rewards = np.zeros((2, 100))
    rewards[0, 0], rewards[1, 0] = 1.0, -1.0  # about 9.95 standard deviations
    values = advantages({"a": rewards}, ONE, AdvantageOptions()).values
    assert (values.max(), values.min()) == (5.0, -5.0)
    assert advantages({"a": rewards}, ONE, AdvantageOptions(clip=0.05)).values.min() == -0.05


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match=r"combine is 'mean'; it must be one of sum"):
        AdvantageOptions(combine="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="clip is 0"):
        AdvantageOptions(clip=0)
    with pytest.raises(ValueError, match="that were measured"):
        advantages({"b": draw()}, ONE, EXACT)
    with pytest.raises(ValueError, match="shape"):
        advantages({"a": draw(), "b": draw((6, 7))}, TWO, EXACT)
