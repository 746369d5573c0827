"""Rewards of different units as one number: closed forms, what fails, and what a checkpoint keeps."""

from __future__ import annotations

import numpy as np
import pytest

from calibri_lightning.arrays import means
from calibri_lightning.errors import UserError
from calibri_lightning.rewards import RewardConfig, RewardSet
from calibri_lightning.rewards.base import FunctionReward
from calibri_lightning.rewards.blend import Blend, Moments, Normalise

RNG = np.random.default_rng(0)
PARTS = np.stack([RNG.normal(3, 0.1, (5, 4)), RNG.normal(-200, 50, (5, 4))])


def blend(normalise: Normalise, *configs: RewardConfig) -> Blend:
    configs = configs or (RewardConfig(1.0), RewardConfig(-0.5))
    entries = list(RewardSet({f"tiny_rewards:{n}": c for n, c in zip(NAMES, configs, strict=True)}).entries)
    return Blend(entries, normalise)


NAMES = ("redness", "constant")


def test_no_normalising_is_the_weighted_sum() -> None:
    np.testing.assert_array_equal(blend("none").total(PARTS), PARTS[0] - 0.5 * PARTS[1])


def test_z_scores_are_those_of_each_column() -> None:
    z = (PARTS - PARTS.mean(axis=1, keepdims=True)) / PARTS.std(axis=1, keepdims=True)
    np.testing.assert_allclose(blend("z_score").total(PARTS), z[0] - 0.5 * z[1], rtol=1e-12)


def test_ranks_run_from_minus_one_to_one_and_ties_share_theirs() -> None:
    parts = np.array([[[1.0], [5.0], [5.0], [900.0], [7.0]], [[0.0]] * 5])
    np.testing.assert_allclose(blend("rank").total(parts)[:, 0], [-1, -0.25, -0.25, 1, 0.5])


@pytest.mark.parametrize("normalise", ["z_score", "rank"])
def test_units_and_offsets_of_a_reward_do_not_matter(normalise: Normalise) -> None:
    other = np.stack([1e3 * PARTS[0] + 7, 0.01 * PARTS[1] - 3])
    np.testing.assert_allclose(blend(normalise).total(PARTS), blend(normalise).total(other), atol=1e-9)


@pytest.mark.parametrize("normalise", ["none", "z_score", "rank"])
def test_a_picture_without_one_of_its_rewards_takes_no_part(normalise: Normalise) -> None:
    parts = PARTS.copy()
    parts[1, 2, 0] = np.nan
    total = blend(normalise).total(parts)
    assert np.isnan(total[2, 0])
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(total[others, 0], blend(normalise).total(PARTS[:, others])[:, 0], rtol=1e-12)
    np.testing.assert_array_equal(total[:, 1:], blend(normalise).total(PARTS)[:, 1:])


@pytest.mark.parametrize("normalise", ["z_score", "rank"])
def test_columns_that_are_flat_or_alone_or_empty(normalise: Normalise) -> None:
    parts = np.full((2, 3, 3), np.nan)
    parts[:, :, 0] = 0.1  # flat, up to rounding
    parts[:, 0, 0] += 1e-9
    parts[:, 1, 1] = 4.0  # alone
    total = blend(normalise).total(parts)
    if normalise == "z_score":
        np.testing.assert_array_equal(total[:, 0], 0.0)
    np.testing.assert_array_equal(total[:, 1], [np.nan, 0.0, np.nan])
    np.testing.assert_array_equal(total[:, 2], np.nan)


def test_running_uses_all_pictures_of_the_steps_before() -> None:
    made = blend("running")
    steps = [PARTS, PARTS[:, :2] * 1.1, PARTS[:, :, :1] - 3]
    first = made.scale(steps[0])
    assert first is not None
    np.testing.assert_allclose(first.mean, PARTS.mean(axis=(1, 2)))  # there is no step before the first
    for step in steps[:2]:
        made.learn(step)
    seen = np.concatenate([step.reshape(2, -1) for step in steps[:2]], axis=1)
    scale = made.scale(steps[2])
    assert scale is not None
    np.testing.assert_allclose(scale.mean, seen.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(scale.std, seen.std(axis=1), rtol=1e-12)
    z = (steps[2] - seen.mean(axis=1)[:, None, None]) / seen.std(axis=1)[:, None, None]
    np.testing.assert_allclose(made.total(steps[2], scale), z[0] - 0.5 * z[1], rtol=1e-10)


def test_moments_of_huge_offsets_keep_their_digits_and_skip_failures() -> None:
    values = 1e6 + RNG.normal(0, 1, (1, 1000))
    moments = Moments.none(1)
    for part in np.split(values, 10, axis=1):
        moments = moments.plus(np.concatenate([part, [[np.nan, np.inf]]], axis=1))
    np.testing.assert_allclose(moments.scale.std, values.std(), rtol=1e-8)
    assert moments.count == [1000]


def test_a_reward_that_never_varies_keeps_its_unit() -> None:
    np.testing.assert_array_equal(Moments.none(1).plus(np.full((1, 9), 0.3)).scale.std, [1.0])


def test_limits_cut_what_is_optimised_and_nothing_that_is_reported() -> None:
    made = blend("none", RewardConfig(2.0, floor=0.0, cap=1.0), RewardConfig(1.0))
    each = {"tiny_rewards:redness": np.array([-3.0, 0.4, 9.0, np.nan]), "tiny_rewards:constant": np.ones(4)}
    np.testing.assert_array_equal(made.total(made.parts(each)[:, :, None])[:, 0], [1.0, 1.8, 3.0, np.nan])
    assert each["tiny_rewards:redness"][2] == 9.0


def test_validations_of_a_run_share_the_scale_of_its_start() -> None:
    made = blend("rank")
    start = dict(zip(made.names, PARTS[:, :, 0], strict=True))
    better = {name: values + values.std() for name, values in start.items()}
    assert made.lacks_reference
    reference = made.reference(start)
    assert not made.lacks_reference
    np.testing.assert_allclose(made.judge(start, reference).mean(), 0, atol=1e-12)
    np.testing.assert_allclose(made.judge(better, reference).mean(), 1.0 - 0.5)
    assert made.reference(better) is reference


def test_a_checkpoint_brings_everything_back() -> None:
    made, again = blend("running"), blend("running")
    made.learn(PARTS)
    made.reference(dict(zip(made.names, PARTS[:, :, 0], strict=True)))
    again.load_state(made.state())
    assert again.state() == made.state()
    one, other = made.scale(PARTS), again.scale(PARTS)
    assert one is not None
    assert other is not None
    assert one.mean.tobytes() == other.mean.tobytes()
    assert not again.lacks_reference


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(UserError, match="model.normalise is 'zscore'; it is one of none, running, z_score, rank"):
        blend("zscore")  # type: ignore[arg-type]


def test_each_reward_counts_the_same_whatever_its_unit() -> None:
    """The order of candidates under z-scores: one reward in thousands must not drown another in hundredths."""
    small, large = np.array([[0.00], [0.01], [0.02]]), np.array([[1500.0], [1000.0], [500.0]])
    parts = np.stack([small, large])
    made = blend("z_score", RewardConfig(2.0), RewardConfig(1.0))
    assert made.total(parts)[:, 0].argmax() == 2
    plain = blend("none", RewardConfig(2.0), RewardConfig(1.0))
    assert plain.total(parts)[:, 0].argmax() == 0


def test_a_function_reward_keeps_its_name() -> None:
    assert FunctionReward("a", lambda images, prompts: images).name == "a"


def test_means_of_what_is_finite() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.inf, -np.inf, np.nan]])
    np.testing.assert_array_equal(means(values, axis=1), [2.0, np.nan])
    assert means(values) == 2.0


def test_a_reward_that_failed_at_the_start_has_no_unit_until_it_has_scores() -> None:
    made = blend("running")
    broken = PARTS.copy()
    broken[1] = np.nan
    start = dict(zip(made.names, broken[:, :, 0], strict=True))
    assert np.isnan(made.judge(start, made.reference(start))).all()
    assert made.lacks_reference
    assert np.isnan(made.reference(None).mean).all()
    made.learn(broken)
    scale = made.scale(PARTS)
    assert scale is not None
    np.testing.assert_allclose(scale.mean, PARTS.mean(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(scale.std, PARTS.std(axis=(1, 2)), rtol=1e-12)
