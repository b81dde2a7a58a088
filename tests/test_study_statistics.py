"""Slopes, ratios and tests over few models, against closed forms, scipy and simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from saefeat.study.statistics import (
    cluster_bootstrap,
    contrast,
    equivalence,
    exponential,
    lack_of_fit,
    mean,
    permutation_test,
    ratio,
    slope,
    slope_weights,
)

A, B = np.array([1.0, 1.2, 0.9, 1.1]), np.array([2.3, 2.0, 1.9, 2.6])
WIDTHS = np.log([34.0, 48.0, 68.0, 96.0])


def test_the_slope_through_two_shapes_is_the_welch_interval_of_their_difference() -> None:
    found = slope(np.log([48.0, 96.0]), [A, B])
    expected = stats.ttest_ind(B, A, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx((B.mean() - A.mean()) / math.log(2))
    assert (found.low, found.high) == pytest.approx(
        (interval.low / math.log(2), interval.high / math.log(2))
    )


def test_the_slope_through_four_shapes_is_that_of_least_squares() -> None:
    groups = [np.random.default_rng(i).normal(x, 0.1, 5) for i, x in enumerate(WIDTHS)]
    line = stats.linregress(np.repeat(WIDTHS, 5), np.concatenate(groups))
    assert slope(WIDTHS, groups).value == pytest.approx(line.slope)


def test_the_mean_has_students_interval() -> None:
    low, high = stats.t.interval(0.95, 3, A.mean(), stats.sem(A))
    found = mean(A)
    assert (found.value, found.low, found.high) == pytest.approx((A.mean(), low, high))


def test_counts_that_may_be_off_together_widen_the_interval_by_a_normal_law() -> None:
    constant = [np.full(4, 1.0), np.full(4, 2.0)]
    found = contrast(constant, np.array([-1.0, 1.0]), count_sds=np.array([0.3, 0.4]))
    assert (found.low, found.high) == pytest.approx(
        (1 - 1.95996 * 0.5, 1 + 1.95996 * 0.5), abs=1e-4
    )
    exact = contrast(constant, np.array([-1.0, 1.0]))
    assert exact.low == exact.high == exact.value == 1


def test_a_ratio_is_of_geometric_means() -> None:
    found = ratio(A, B)
    assert found.value == pytest.approx(stats.gmean(B) / stats.gmean(A))
    assert found.low < found.value < found.high
    logs = contrast([np.log(A), np.log(B)], np.array([-1.0, 1.0]))
    assert exponential(logs) == found
    with pytest.raises(ValueError, match="above 0"):
        ratio(np.array([0.0, 1.0]), B)


@pytest.mark.parametrize("groups", [[A, B[:1]], [A, np.array([1.0, math.nan])]])
def test_one_replicate_or_a_number_that_is_none_has_no_interval(groups) -> None:
    with pytest.raises(ValueError, match="2 replicates at least, finite"):
        contrast(groups, np.array([-1.0, 1.0]))


def test_one_width_has_no_slope() -> None:
    with pytest.raises(ValueError, match="two widths"):
        slope_weights(np.log([48.0, 48.0]))


# The permutation test.


def test_four_against_four_that_do_not_overlap_have_p_of_2_in_70() -> None:
    found = permutation_test(A, B)
    assert found.p_value == pytest.approx(2 / 70)
    assert found.least_p_value == pytest.approx(2 / 70)
    assert round(found.p_value, 3) == 0.029


def test_equal_replicates_have_p_of_1() -> None:
    assert permutation_test(A, A[::-1].copy()).p_value == 1


def test_the_permutation_test_rejects_an_equality_no_more_often_than_it_says() -> None:
    generator = np.random.default_rng(0)
    p_values = [permutation_test(*generator.normal(size=(2, 4))).p_value for _ in range(700)]
    assert 0.01 < np.mean(np.array(p_values) <= 0.03) < 0.05


# Equivalence.


def test_equivalence_is_two_one_sided_t_tests() -> None:
    values = np.array([0.02, -0.05, 0.08, 0.01])
    found = equivalence(values, 0.32)
    upper = stats.ttest_1samp(values, 0.32, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -0.32, alternative="greater").pvalue
    assert found.p_value == pytest.approx(max(upper, lower))
    assert found.is_equivalent
    low, high = stats.t.interval(0.90, 3, values.mean(), stats.sem(values))
    assert (found.estimate.low, found.estimate.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("values", "error", "is_equivalent"),
    [
        ([0.5, 0.52, 0.49, 0.51], None, False),
        ([0.5, -0.5, 0.4, -0.3], None, False),
        ([0.1], 0.05, True),
        ([0.3], 0.05, False),
    ],
)
def test_what_differs_or_varies_is_not_equivalent(values, error, is_equivalent) -> None:
    found = equivalence(np.array(values), 0.32, standard_error=error)
    assert found.is_equivalent is is_equivalent
    assert found.is_equivalent == (found.estimate.low > -0.32 and found.estimate.high < 0.32), (
        "the interval and the p-value say the same"
    )


def test_a_difference_at_the_margin_is_called_equivalent_in_5_percent_of_draws() -> None:
    generator = np.random.default_rng(0)
    called = [equivalence(generator.normal(0.32, 0.05, 4), 0.32).is_equivalent for _ in range(2000)]
    assert 0.035 < np.mean(called) < 0.065


# Fit, and the coverage of intervals.


def test_points_on_a_line_fit_and_points_off_it_do_not() -> None:
    noise = np.random.default_rng(0).normal(0, 0.03, (4, 5))
    on = [2 - x + noise[i] for i, x in enumerate(WIDTHS)]
    assert lack_of_fit(WIDTHS, on) > 0.05
    bent = [one + 0.2 * (i in (1, 2)) for i, one in enumerate(on)]
    assert lack_of_fit(WIDTHS, bent) < 1e-4
    assert lack_of_fit(WIDTHS, bent, count_sds=np.full(4, 0.2)) > 0.05
    assert lack_of_fit(WIDTHS[:2], on[:2]) is None


def test_lack_of_fit_is_found_in_5_percent_of_lines() -> None:
    generator = np.random.default_rng(0)
    found = [
        lack_of_fit(WIDTHS, list(generator.normal(WIDTHS[:, None], 0.05, (4, 5)))) < 0.05
        for _ in range(2000)
    ]
    assert 0.035 < np.mean(found) < 0.065


@pytest.mark.parametrize(
    ("widths", "n_replicates"), [((48.0, 96.0), 4), ((34.0, 48.0, 68.0, 96.0), 5)]
)
@pytest.mark.parametrize("wider_spread", [1, 2.5])
def test_intervals_hold_the_slope_as_often_as_they_say(widths, n_replicates, wider_spread) -> None:
    """Also where models of the widest shape vary more than the others."""
    generator = np.random.default_rng(0)
    x = np.log(widths)
    spreads = np.where(x == x.max(), 0.04 * wider_spread, 0.04)
    held = {"welch": 0, "percentile": 0}
    n_studies = 3000
    for _ in range(n_studies):
        groups = list(generator.normal(x[:, None], spreads[:, None], (len(x), n_replicates)))
        exact = slope(x, groups)
        held["welch"] += exact.low <= 1 <= exact.high
    for _ in range(600):
        groups = list(generator.normal(x[:, None], spreads[:, None], (len(x), n_replicates)))
        drawn = cluster_bootstrap(groups, slope_weights(x), n_resamples=400, seed=1)
        held["percentile"] += drawn.low <= 1 <= drawn.high
    assert 0.93 <= held["welch"] / n_studies <= 0.975
    assert held["percentile"] / 600 < 0.91, "why it does not decide"
