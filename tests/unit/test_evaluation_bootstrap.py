"""Bootstrap intervals against theory, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from calibri_lightning.evaluation import mean_interval, paired_interval, win_rate


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_coverage_of_normal_means_is_near_the_nominal_level(method):
    rng = np.random.default_rng(0)
    trials = 300
    hits = 0
    for trial in range(trials):
        interval = mean_interval(rng.normal(0.3, 2.0, 60), num_resamples=600, seed=trial, method=method)
        hits += interval.low <= 0.3 <= interval.high
    # A bootstrap of 60 values covers about 94.4 %; three standard errors of 300 trials are 4 points.
    assert 0.90 <= hits / trials <= 0.985


def test_coverage_follows_the_level():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(size=60), level=0.5, num_resamples=500, seed=i) for i in range(300)]
    assert 0.40 <= np.mean([i.low <= 0 <= i.high for i in intervals]) <= 0.60


def test_normal_interval_agrees_with_the_t_interval():
    values = np.random.default_rng(2).normal(5.0, 1.0, 400)
    interval = mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 399, values.mean(), scipy.stats.sem(values))
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    assert interval.low == pytest.approx(low, abs=0.04 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.04 * (high - low))


@pytest.mark.parametrize(("method", "name"), [("bca", "BCa"), ("percentile", "percentile")])
@pytest.mark.parametrize("kind", ["lognormal", "strict"])
def test_agrees_with_scipy_on_skewed_values(method, name, kind):
    rng = np.random.default_rng(3)
    values = rng.lognormal(0, 1, 40) if kind == "lognormal" else (rng.random(150) < 0.06).astype(float)
    ours = mean_interval(values, method=method, num_resamples=4000, seed=6)
    # scipy draws its resamples as we do (1.17 does), so one generator must give one interval.
    rng = np.random.Generator(np.random.Philox(key=6))
    theirs = scipy.stats.bootstrap((values,), np.mean, method=name, n_resamples=4000, rng=rng)
    low, high = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-9)


def test_bca_moves_towards_the_long_tail():
    values = np.random.default_rng(5).lognormal(0, 1, 60)
    bca, percentile = mean_interval(values), mean_interval(values, method="percentile")
    assert bca.low > percentile.low
    assert bca.high > percentile.high
    mirrored = mean_interval(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-bca.high, -bca.low), abs=1e-9)


def test_interval_moves_and_stretches_with_the_values():
    values = np.random.default_rng(6).gamma(2.0, size=80)
    plain, moved = mean_interval(values), mean_interval(3.0 + 10.0 * values)
    assert (moved.low, moved.high) == pytest.approx((3 + 10 * plain.low, 3 + 10 * plain.high))


def test_paired_interval_is_narrower_than_the_difference_of_independent_means():
    rng = np.random.default_rng(7)
    luck = rng.normal(0, 1.0, 300)  # of the prompt and the noise, shared
    base, calibrated = luck + 0.2 * rng.normal(size=300), luck + 0.05 + 0.2 * rng.normal(size=300)
    paired = paired_interval(calibrated, base)
    unpaired = paired_interval(rng.permutation(calibrated), base)
    # Theory: variances .08 against 2.08, so a fifth of the width.
    ratio = (paired.high - paired.low) / (unpaired.high - unpaired.low)
    assert ratio == pytest.approx(np.sqrt(0.08 / 2.08), rel=0.2)
    assert paired.excludes(0.0)
    assert not unpaired.excludes(0.0)


def test_paired_interval_of_swapped_conditions_is_mirrored():
    first, second = np.random.default_rng(8).normal(size=(2, 50))
    forward, backward = paired_interval(first, second), paired_interval(second, first)
    assert (forward.mean, forward.low, forward.high) == pytest.approx((-backward.mean, -backward.high, -backward.low))


def test_copies_of_a_prompt_add_no_certainty():
    values = np.random.default_rng(9).normal(size=50)
    once = mean_interval(values)
    four = mean_interval(np.repeat(values, 4), np.repeat(np.arange(50), 4))
    assert (four.mean, four.low, four.high) == pytest.approx((once.mean, once.low, once.high))
    assert four.count == 200
    ignored = mean_interval(np.repeat(values, 4))
    assert ignored.high - ignored.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


def test_clusters_need_not_be_sorted_or_of_one_size():
    rng = np.random.default_rng(10)
    clusters = rng.integers(0, 30, 100)
    values = rng.normal(size=100) + clusters / 10
    order = rng.permutation(100)
    one, other = mean_interval(values, clusters), mean_interval(values[order], clusters[order])
    assert one.mean == pytest.approx(values.mean())
    assert (one.low, one.high) == pytest.approx((other.low, other.high))
    assert one.low < values.mean() < one.high


def test_coverage_of_clustered_means_holds_where_single_draws_fail():
    rng = np.random.default_rng(11)
    clusters = np.repeat(np.arange(60), 4)
    clustered = single = 0
    for trial in range(200):
        values = np.repeat(rng.normal(size=60), 4) + 0.3 * rng.normal(size=240)
        a = mean_interval(values, clusters, num_resamples=500, seed=trial)
        b = mean_interval(values, num_resamples=500, seed=trial)
        clustered += a.low <= 0 <= a.high
        single += b.low <= 0 <= b.high
    assert clustered / 200 > 0.88
    assert single / 200 < 0.80


def test_failed_rewards_drop_their_pair():
    first, second = np.array([1.0, np.nan, 3.0, 5.0, np.inf]), np.array([0.0, 1.0, np.nan, 2.0, np.inf])
    interval = paired_interval(first, second)
    assert (interval.mean, interval.count, interval.dropped) == (2.0, 2, 3)
    wins = win_rate(first, second)
    assert (wins.wins, wins.ties, wins.losses) == (2, 0, 0)


def test_degenerate_samples_have_plain_answers():
    constant = mean_interval(np.full(30, 0.7))
    assert (constant.low, constant.mean, constant.high) == pytest.approx((0.7, 0.7, 0.7))
    lone = mean_interval([0.7])
    assert lone.mean == 0.7
    assert np.isnan([lone.low, lone.high]).all()
    assert not lone.excludes(0.0)
    assert np.isnan(mean_interval([np.nan, np.nan]).mean)
    one_prompt = mean_interval([0.1, 0.9, 0.5], [4, 4, 4])
    assert np.isnan(one_prompt.low)


@pytest.mark.usefixtures("untouched_rng")
def test_same_seed_same_interval_and_global_generators_stay_untouched():
    values = np.random.default_rng(12).normal(size=40)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    values = np.random.default_rng(13).normal(size=37)
    whole = mean_interval(values)
    monkeypatch.setattr("calibri_lightning.evaluation.bootstrap._MAX_INDICES", 1000)
    assert mean_interval(values) == whole


def test_win_rate_closed_form():
    wins = win_rate([1.0, 2.0, 3.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0, 5.0])
    assert (wins.wins, wins.ties, wins.losses, wins.count) == (2, 2, 1, 5)
    assert wins.rate == pytest.approx((2 + 0.5 * 2) / 5)
    swapped = win_rate([0.0, 2.0, 1.0, 4.0, 5.0], [1.0, 2.0, 3.0, 0.0, 5.0])
    assert swapped.rate == pytest.approx(1 - wins.rate)
    assert win_rate([1.0, 2.0], [1.05, 1.0], tolerance=0.1).ties == 1
    assert np.isnan(win_rate([], []).rate)


def test_win_rate_of_equal_normals_and_of_a_shift():
    rng = np.random.default_rng(14)
    base, calibrated = rng.normal(size=(2, 20_000))
    # P(N(1/2, 2) > 0) = Phi(0.5 / sqrt 2)
    assert win_rate(calibrated + 0.5, base).rate == pytest.approx(scipy.stats.norm.cdf(0.5 / np.sqrt(2)), abs=0.015)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: mean_interval([[1.0, 2.0]]), "shape"),
        (lambda: mean_interval([1.0, 2.0], [0]), "clusters"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "differ"),
        (lambda: win_rate([1.0, 2.0], [1.0]), "differ"),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_differences_that_are_equal_up_to_rounding_have_an_interval() -> None:
    noise = np.random.Generator(np.random.Philox(key=3)).normal(0.5, 0.1, 40)
    interval = paired_interval(noise + 0.1, noise)
    assert (interval.low, interval.high) == (pytest.approx(0.1), pytest.approx(0.1))
