"""What sessions say of a percentile and of throughput."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gate.errors import MeasurementError
from gate.latency.bounds import equal_parts, held_by_session, percentile_bounds, throughput_bounds, throughput_of
from gate.latency.ratio import MOST_NS, nearest_rank
from gate.statistics import percentile_interval
from gate.verdict import Interval

durations = st.lists(st.integers(1, 10**9), min_size=1, max_size=80)
sessions_of = st.lists(durations, min_size=1, max_size=12)


@given(sessions_of)
def test_the_first_five_sessions_count_alike_and_so_do_the_later_ones(sessions):
    first, later = sessions[:5], sessions[5:]
    parts = [each[: min(map(len, group))] for group in (first, later) for each in group]
    assert equal_parts(sessions).tolist() == [value for part in parts for value in part]


@given(st.lists(durations, min_size=5, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_bounds_are_never_narrower_than_loadgens(sessions, p):
    found, by_inference = percentile_bounds(sessions, p), percentile_interval(np.sort(equal_parts(sessions)), p)
    assert found.lower <= by_inference.lower
    assert found.upper >= by_inference.upper
    if not held_by_session(sessions, p):
        assert found == by_inference


@pytest.mark.parametrize(("kept", "held"), [(600, False), (999, False), (1000, True), (4000, True)])
def test_a_session_with_ten_inferences_above_p99_tells_it(kept, held):
    centres = [980_000, 1_010_000, 1_000_000, 990_000, 1_030_000]
    sessions = [[centre + 10 * offset for offset in range(kept)] for centre in centres]
    assert held_by_session(sessions, 0.99) is held
    alone = percentile_interval(np.sort(equal_parts(sessions)), 0.99)
    assert (percentile_bounds(sessions, 0.99) != alone) is held
    assert held_by_session([*sessions, [1_000_000] * 16], 0.99) is False
    assert held_by_session(sessions, 0.5)


def test_up_to_p95_the_bounds_are_those_of_the_sessions_where_they_differ():
    centres = [980_000, 1_010_000, 1_000_000, 990_000, 1_030_000]
    sessions = [[centre + offset for offset in range(1000)] for centre in centres]
    logs = np.log([nearest_rank(each, 0.5) for each in sessions])
    half = stats.t.ppf(1 - 0.01 / 4, 4) * logs.std(ddof=1) / math.sqrt(5)
    found = percentile_bounds(sessions, 0.5)
    assert found.lower == pytest.approx(math.exp(logs.mean() - half), rel=1e-9)
    assert found.upper == pytest.approx(math.exp(logs.mean() + half), rel=1e-9)
    assert percentile_interval(np.sort(equal_parts(sessions)), 0.5).upper < found.upper


@given(st.lists(durations, min_size=1, max_size=4), st.sampled_from([0.5, 0.99]))
def test_fewer_than_five_sessions_bound_nothing(sessions, p):
    assert percentile_bounds(sessions, p) == Interval(-math.inf, math.inf)
    assert throughput_bounds([throughput_of(each, batch=1) for each in sessions]) == Interval(0.0, math.inf)


@pytest.mark.parametrize(
    ("sessions", "message"),
    [
        ([], "no session was measured"),
        ([[5], []], "no inference was timed"),
        ([[5], [5, 0]], "inference 1 took 0 ns"),
        ([[5], [-5]], "inference 0 took -5 ns"),
        ([[5], [math.nan]], "whole nanoseconds"),
        ([[MOST_NS + 1]], f"and no more than {MOST_NS} ns"),
        ([[2**63]], "took 9223372036854775808 ns"),
    ],
)
def test_what_is_no_duration_is_an_error(sessions, message):
    with pytest.raises(MeasurementError, match=message):
        percentile_bounds(sessions, 0.5)


def test_throughput_is_of_the_durations_or_of_the_time_that_all_streams_took():
    assert throughput_of([1_000_000, 3_000_000], batch=8) == pytest.approx(8 * 2 / 0.004)
    assert throughput_of([1_000_000] * 40, batch=2, span_ns=20_000_000) == pytest.approx(4000.0)
    with pytest.raises(MeasurementError, match="took 0 ns in all"):
        throughput_of([5], batch=1, span_ns=0)


def test_throughput_is_bounded_by_students_t_at_a_quarter_of_one_percent():
    values = [900.0, 1000.0, 1100.0, 1000.0, 1000.0]
    half = stats.t.ppf(1 - 0.01 / 4, 4) * stats.sem(values)
    found = throughput_bounds(values)
    assert (found.lower, found.upper) == pytest.approx((1000.0 - half, 1000.0 + half))
    assert throughput_bounds([1.0, 1000.0, 1.0, 1.0, 1.0]).lower == 0.0
    with pytest.raises(MeasurementError, match="an interval needs numbers"):
        throughput_bounds([1.0, math.nan])
