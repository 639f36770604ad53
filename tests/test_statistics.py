"""Intervals against SciPy, and the rules they stand for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gate.errors import MeasurementError
from gate.statistics import (
    ExactSum,
    agresti_min_difference,
    binomial_cdf,
    clopper_pearson,
    is_among_best,
    least_samples,
    least_samples_for_proportion,
    mcnemar_exact,
    percentile_interval,
    samples_to_resolve,
    student_t_quantile,
)

sizes = st.integers(1, 100_000)
probabilities = st.floats(1e-9, 1 - 1e-9)


@given(n=sizes, p=probabilities, z=st.floats(-6, 6))
def test_binomial_cdf_equals_scipy(n, p, z):
    k = int(np.clip(round(n * p + z * math.sqrt(n * p * (1 - p))), 0, n))
    assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9, abs=1e-300)


def test_binomial_cdf_outside_its_range():
    assert binomial_cdf(-1, 10, 0.5) == 0.0
    assert binomial_cdf(10, 10, 0.5) == 1.0
    assert binomial_cdf(0, 0, 0.5) == 1.0
    assert binomial_cdf(3, 10, 0.0) == 1.0
    assert binomial_cdf(3, 10, 1.0) == 0.0


@pytest.mark.parametrize(("n", "p"), [(-1, 0.5), (3, 1.5), (3, -0.1), (3, math.nan)])
def test_binomial_cdf_of_no_distribution_is_an_error(n, p):
    with pytest.raises(MeasurementError, match="not a binomial"):
        binomial_cdf(0, n, p)


@given(n=st.integers(1, 60_000), part=st.floats(0, 1), alpha=st.sampled_from([0.01, 0.025, 0.05]))
def test_clopper_pearson_equals_scipy(n, part, alpha):
    k = round(part * n)
    found = clopper_pearson(k, n, alpha=alpha)
    exact = stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact")
    assert found.lower == pytest.approx(exact.low, rel=1e-9, abs=1e-12)
    assert found.upper == pytest.approx(exact.high, rel=1e-9, abs=1e-12)
    assert 0.0 <= found.lower <= k / n <= found.upper <= 1.0


def test_a_proportion_of_nothing_is_an_error():
    with pytest.raises(MeasurementError, match="no samples"):
        clopper_pearson(0, 0)
    with pytest.raises(MeasurementError, match="5 of 4"):
        clopper_pearson(5, 4)


def test_zero_disagreements_need_299_598_or_2995_samples():
    assert [least_samples_for_proportion(0, floor) for floor in (0.99, 0.995, 0.999)] == [299, 598, 2995]
    assert least_samples_for_proportion(0, 1.0) is None


@given(wrong=st.integers(0, 30), floor=st.floats(0.5, 0.999))
def test_least_samples_for_a_proportion_is_the_least(wrong, floor):
    n = least_samples_for_proportion(wrong, floor)
    assert clopper_pearson(n - wrong, n).lower >= floor
    if n - 1 >= max(1, wrong):
        assert clopper_pearson(n - 1 - wrong, n - 1).lower < floor


def test_agresti_min_by_hand():
    found = agresti_min_difference(5, 2, 100)
    change, half = -3 / 102, 1.645 * math.sqrt(8 - 9 / 102) / 102
    assert found.lower == pytest.approx(change - half)
    assert found.upper == pytest.approx(change + half)


@given(n=st.integers(1, 5000), b=st.integers(0, 5000), c=st.integers(0, 5000))
def test_agresti_min_mirrors_when_the_sides_are_exchanged(n, b, c):
    if b + c > n:
        with pytest.raises(MeasurementError, match="do not fit"):
            agresti_min_difference(b, c, n)
        return
    one, other = agresti_min_difference(b, c, n), agresti_min_difference(c, b, n)
    assert one.lower == -other.upper
    assert one.upper == -other.lower
    assert one.lower <= one.upper


def test_no_samples_have_no_accuracy():
    with pytest.raises(MeasurementError, match="no samples"):
        agresti_min_difference(0, 0, 0)


def test_agresti_min_covers_the_true_change():
    rng = np.random.default_rng(0)
    n, p_b, p_c, repeats = 500, 0.03, 0.02, 4000
    cells = rng.multinomial(n, [p_b, p_c, 1 - p_b - p_c], size=repeats)
    missed = sum(agresti_min_difference(int(b), int(c), n).lower > p_c - p_b for b, c, _ in cells)
    assert missed / repeats < 0.065


@given(b=st.integers(0, 300), c=st.integers(0, 300))
def test_mcnemar_equals_scipy(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_negative_counts_is_an_error():
    with pytest.raises(MeasurementError, match="negative"):
        mcnemar_exact(-1, 0)


@given(delta=st.floats(1e-4, 0.5))
def test_samples_to_resolve_is_the_least(delta):
    n = samples_to_resolve(delta)
    assert agresti_min_difference(0, 0, n).lower >= -delta
    assert n == 1 or agresti_min_difference(0, 0, n - 1).lower < -delta


def test_samples_to_resolve_known_values():
    assert samples_to_resolve(0.001) == 1643
    assert samples_to_resolve(0.005) == 327


@pytest.mark.parametrize("delta", [0.0, -0.1, math.nan])
def test_no_number_of_samples_resolves_nothing(delta):
    with pytest.raises(MeasurementError, match="no number of samples"):
        samples_to_resolve(delta)


def test_least_samples_of_the_percentiles():
    assert [least_samples(p) for p in (0.9, 0.95, 0.99, 0.999)] == [44, 90, 459, 4603]


durations = st.lists(st.integers(1, 40), min_size=1, max_size=700)
percentiles = st.sampled_from([0.5, 0.9, 0.95, 0.99])


@given(values=durations, p=percentiles, budget=st.integers(0, 41), repeat=st.integers(1, 4))
def test_percentile_interval_is_the_rule_of_loadgen(values, p, budget, repeat):
    values = sorted(values * repeat)
    n, over = len(values), sum(value > budget for value in values)
    passes = stats.binom.cdf(over, n, 1 - p) <= 0.01
    fails = stats.binom.sf(over - 1, n, 1 - p) <= 0.01
    found = percentile_interval(values, p)
    assert (found.upper <= budget) == passes
    assert (found.lower > budget) == fails
    assert found.lower <= found.upper


@pytest.mark.parametrize("p", [0.9, 0.95, 0.99])
def test_one_sample_less_than_the_least_cannot_pass(p):
    least = least_samples(p)
    assert percentile_interval([1] * least, p).upper == 1
    assert percentile_interval([1] * (least - 1), p).upper == math.inf


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(MeasurementError, match="no values"):
        percentile_interval([], 0.5)
    with pytest.raises(MeasurementError, match="between 0 and 1"):
        percentile_interval([1], 1.0)
    with pytest.raises(MeasurementError, match="between 0 and 1"):
        least_samples(0.0)


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(values=st.lists(finite, max_size=60), data=st.data())
def test_exact_sum_is_fsum_in_any_order_and_grouping(values, data):
    order = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    one, other = ExactSum(), ExactSum()
    one.add(np.array(order[:cut], dtype=np.float64))
    other.add(np.array(order[cut:], dtype=np.float64))
    one.merge(other)
    try:
        expected = math.fsum(values)
    except OverflowError:
        return
    assert one.value == expected


def test_exact_sum_keeps_what_float64_loses():
    total = ExactSum()
    total.add(np.array([1e308, 1.0, 5e-324, -1e308]))
    assert total.value == 1.0
    total.add(np.array([-1.0]))
    assert total.value == 5e-324


def test_exact_sum_of_what_is_not_finite_is_infinite_for_good():
    total = ExactSum()
    total.add(np.array([1.0, math.nan]))
    total.add(np.array([2.0]))
    assert total.value == math.inf


def test_exact_sum_beyond_float64_is_infinite():
    total = ExactSum()
    total.add(np.array([1.7e308, 1.7e308]))
    assert total.value == math.inf
    assert total.over(2) == 1.7e308


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=12),
    k=st.integers(1, 7),
    data=st.data(),
)
def test_among_the_best_breaks_ties_by_the_lower_index(scores, k, data):
    rows = np.array(scores, dtype=np.float32)
    chosen = np.array([data.draw(st.integers(0, 6)) for _ in rows])
    order = np.argsort(-rows, axis=1, kind="stable")[:, :k]
    assert is_among_best(rows, chosen, k).tolist() == [each in best for each, best in zip(chosen, order, strict=True)]


@pytest.mark.parametrize("degrees", [1, 2, 4, 7, 11, 19, 100])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.9975, 0.9999])
def test_students_quantile_is_that_of_scipy(p, degrees):
    assert student_t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("p", "degrees"), [(0.4, 4), (1.0, 4), (math.nan, 4), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_an_error(p, degrees):
    with pytest.raises(MeasurementError, match="no quantile"):
        student_t_quantile(p, degrees)
