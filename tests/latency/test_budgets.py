"""Sessions summarised and judged: nothing that was not measured passes."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gate.errors import MeasurementError
from gate.latency.bounds import equal_parts
from gate.latency.budgets import (
    budget_findings,
    clock_of,
    doubted,
    pooled_regions,
    regression_finding,
    samples_needed,
    speedup_finding,
    summarise,
    throughputs,
)
from gate.latency.config import PERCENTILES, Cell, LatencySpec, SpeedupSpec
from gate.latency.measurement import CellTimes, MemoryUse, SessionTimes, SubjectTimes
from gate.latency.ratio import estimate
from gate.verdict import Evidence, Finding, Interval, Limit, Status

ONE = Cell(batch=1)
LEAST = {"p50_ms": 7, "p90_ms": 44, "p95_ms": 90, "p99_ms": 459, "p99_9_ms": 4603}


def session(durations, *, span_ns=10**9, warm_up=2, **regions):
    return SubjectTimes(regions={"host_wall": durations, **regions}, leg=10, warm_up=warm_up, span_ns=span_ns)


def split(durations, count=5):
    """The durations in sessions, one after another."""
    return [session(tuple(part.tolist())) for part in np.array_split(np.asarray(durations), count)]


def in_equal_parts(duration, n):
    """So many inferences in sessions of which none is cut: five alike, and one with the rest."""
    parts = [[duration] * (n // 5)] * 5 + [[duration] * (n % 5)]
    return [session(tuple(part)) for part in parts if part]


def summary(sessions, *, cell=ONE, spec=None, **more):
    return summarise(sessions, cell=cell, spec=spec or LatencySpec(p50_ms=1.0), clock="perf_counter_ns", **more)


def judged(sessions, /, *, cell=ONE, **budgets):
    found = budget_findings(sessions, cell=cell, spec=LatencySpec(**budgets), evidence=Evidence.HOST)
    return {finding.check: finding for finding in found}


@given(st.lists(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), min_size=1, max_size=6))
def test_percentiles_are_nearest_rank_over_equal_parts_of_all_sessions(values):
    metrics = summary([session(tuple(each)) for each in values])
    parts = sorted(equal_parts(values).tolist())
    for per_mille, name in ((500, "p50_ms"), (900, "p90_ms"), (950, "p95_ms"), (990, "p99_ms"), (999, "p99_9_ms")):
        assert getattr(metrics, name) == parts[-(-per_mille * len(parts) // 1000) - 1] / 1e6
    ordered = sorted(value for each in values for value in each)
    n = len(ordered)
    assert metrics.max_ms == ordered[-1] / 1e6
    assert metrics.mean_ms == pytest.approx(sum(ordered) / n / 1e6)
    assert metrics.durations_ns == tuple(value for each in values for value in each)
    assert metrics.session_sizes == tuple(map(len, values))
    assert (metrics.n, metrics.sessions, metrics.warm_up) == (n, len(values), 2 * len(values))


def test_a_summary_says_how_it_was_measured():
    spec = LatencySpec(timed="latency", wait="block", p50_ms=1.0)
    regions = {"latency": (9, 9), "h2d": (2, 2), "gpu_compute": (5, 6), "d2h": (1, 1)}
    cell = Cell(batch=8, axes={"height": 320}, name="batch=8,height=320")
    metrics = summary(
        [session((20, 30), **regions)], cell=cell, spec=spec, seconds=3.0, stopped="decided", cuda_graph=True
    )
    assert (metrics.name, metrics.batch, metrics.axes) == ("batch=8,height=320", 8, {"height": 320})
    assert (metrics.timed, metrics.transfers, metrics.wait, metrics.cuda_graph) == ("latency", True, "block", True)
    assert metrics.durations_ns == (9, 9)
    assert list(metrics.regions) == ["host_wall", "latency", "h2d", "gpu_compute", "d2h"]
    assert metrics.regions["gpu_compute"].mean_ms == pytest.approx(5.5e-6)
    assert (metrics.seconds, metrics.stopped, metrics.clock) == (3.0, "decided", "perf_counter_ns")


def test_an_engine_on_the_cpu_copies_nothing_to_a_gpu():
    assert summary([session((5,))]).transfers is False


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        ((), "no inference was timed"),
        ((1.5,), "whole nanoseconds"),
        ((math.nan, 3.0), "whole nanoseconds"),
        ((5, 0, 3), "inference 1 took 0 ns"),
        ((5, 4, -3), "inference 2 took -3 ns"),
        (((5, 4),), "no inference was timed"),
        ((True,), "whole nanoseconds"),
        (("5",), "whole nanoseconds"),
    ],
)
def test_what_is_no_duration_is_an_error_in_whichever_session(durations, message):
    for sessions in ([session(durations)], [session((5, 5)), session(durations)]):
        with pytest.raises(MeasurementError, match=message):
            summary(sessions)
        with pytest.raises(MeasurementError, match=message):
            judged(sessions, p50_ms=1.0)


def test_no_session_is_an_error():
    with pytest.raises(MeasurementError, match="no session was measured"):
        summary([])
    with pytest.raises(MeasurementError, match="no session was measured"):
        judged([], p50_ms=1.0)


def test_sessions_with_other_regions_are_an_error():
    with pytest.raises(MeasurementError, match="session 1 timed host_wall, enqueue, the first host_wall"):
        pooled_regions([session((5,)), session((5,), enqueue=(1,))])


def test_a_region_that_was_cut_short_is_an_error():
    with pytest.raises(MeasurementError, match="different lengths: host_wall 2, enqueue 1"):
        pooled_regions([session((5, 6), enqueue=(1,))])


def test_a_region_that_was_not_timed_is_an_error():
    spec = LatencySpec(timed="gpu_compute", p50_ms=1.0)
    with pytest.raises(MeasurementError, match='timed = "gpu_compute" was asked for, and the engine gave host_wall'):
        summary([session((5,))], spec=spec)
    with pytest.raises(MeasurementError, match='"gpu_compute" was asked for, and was not measured'):
        judged([session((5,))], timed="gpu_compute", p50_ms=1.0)


def test_without_a_budget_there_is_no_finding():
    assert judged(split([5] * 100)) == {}


def test_throughput_is_batch_over_mean_latency_of_each_session():
    sessions = [session((1_000_000, 3_000_000)), session((4_000_000, 4_000_000))]
    spec, cell = LatencySpec(p50_ms=1.0), Cell(batch=8)
    assert throughputs(sessions, cell=cell, spec=spec) == pytest.approx([4000.0, 2000.0])
    assert summary(sessions, cell=cell).throughput == pytest.approx(3000.0)


def test_throughput_of_several_streams_is_all_of_them_over_the_time_that_they_took():
    spec = LatencySpec(streams=4, throughput_at_least=1.0)
    found = throughputs([session((1_000_000,) * 40, span_ns=20_000_000)], cell=Cell(batch=2), spec=spec)
    assert found == pytest.approx([4000.0])


@pytest.mark.parametrize("span_ns", [0, -5])
def test_a_span_that_is_not_positive_is_an_error(span_ns):
    spec = LatencySpec(streams=4, throughput_at_least=1.0)
    with pytest.raises(MeasurementError, match=f"took {span_ns} ns in all"):
        throughputs([session((5,), span_ns=span_ns)], cell=ONE, spec=spec)


def test_too_few_samples_are_inconclusive_however_fast():
    finding = judged(split([1000] * 300), p99_ms=1000.0)["latency.p99_ms"]
    assert finding.status is Status.INCONCLUSIVE
    assert finding.interval.upper == math.inf
    assert finding.detail == "p99 needs at least 459 samples, has 300; raise samples or max_time_s"


@pytest.mark.parametrize(("key", "least"), LEAST.items())
def test_the_least_number_of_samples_passes(key, least):
    check = f"latency.{key}"
    assert judged(in_equal_parts(1_000_000, least), **{key: 1.0})[check].status is Status.PASSED
    few = judged(in_equal_parts(1_000_000, least - 1), **{key: 1.0})[check]
    assert few.status is Status.INCONCLUSIVE
    name = key.removesuffix("_ms").replace("_", ".")
    assert few.detail.startswith(f"{name} needs at least {least} samples, has {least - 1}")
    assert judged(in_equal_parts(1_000_001, least), **{key: 1.0})[check].status is Status.FAILED


@pytest.mark.parametrize("count", [1, 4])
def test_few_sessions_do_not_pass_however_many_samples(count):
    found = judged(split([1_000_000] * 5000, count), p99_ms=2.0, throughput_at_least=1.0)
    for name, words in (("latency.p99_ms", "p99"), ("latency.throughput", "throughput")):
        assert found[name].status is Status.INCONCLUSIVE
        sessions = "1 session" if count == 1 else f"{count} sessions"
        assert found[name].detail == f"{words} needs more processes, has {sessions}; raise max_time_s"


def test_few_sessions_do_not_fail_either():
    found = judged(split([5_000_000] * 1000, 4), p50_ms=2.0, p99_ms=2.0, throughput_at_least=1e6)
    assert [each.status for each in found.values()] == [Status.INCONCLUSIVE] * 3


def test_more_sessions_are_needed_where_the_spec_asks_for_them():
    sessions = split([1_000_000] * 1000, 7)
    assert judged(sessions, p50_ms=2.0, sessions=8)["latency.p50_ms"].status is Status.INCONCLUSIVE
    assert judged(sessions, p50_ms=2.0, sessions=7)["latency.p50_ms"].status is Status.PASSED


def test_a_budget_that_is_missed_fails_and_says_by_how_many():
    finding = judged(split(([1_000_000] * 9 + [9_000_000]) * 100), p95_ms=2.0)["latency.p95_ms"]
    assert finding.status is Status.FAILED
    assert finding.detail == "100 of 1000 inferences are over the budget, slowest 9 ms"
    assert (finding.unit, finding.estimate, finding.n) == ("ms", 9.0, 1000)


def test_a_budget_that_is_near_is_inconclusive():
    durations = ([1_000_000] * 19 + [9_000_000]) * 50
    finding = judged(split(durations), p95_ms=2.0)["latency.p95_ms"]
    assert finding.status is Status.INCONCLUSIVE
    said = "50 of 1000 inferences are over the budget, p95 of the 5 sessions is 1 to 1 ms; more sessions would decide"
    assert finding.detail == said
    finding = judged(split(([1_000_000] * 99 + [9_000_000]) * 10), p99_ms=2.0)["latency.p99_ms"]
    assert finding.detail == "10 of 1000 inferences are over the budget; more samples would decide"


@pytest.mark.parametrize("slow", [0, 4])
def test_an_engine_that_is_slow_in_one_process_of_five_does_not_pass_because_the_others_had_time_for_more(slow):
    sizes = [32 if index == slow else 200 for index in range(5)]
    sessions = [session((60_000_000 if size == 32 else 5_000_000,) * size) for size in sizes]
    finding = judged(sessions, p90_ms=10.0)["latency.p90_ms"]
    assert finding.n == 5 * 32
    assert finding.status is not Status.PASSED
    assert "32 of 160 inferences are over the budget" in finding.detail


def test_processes_that_differ_are_not_decided_by_how_many_inferences_each_has():
    own = [9.8, 9.9, 10.1, 9.7, 10.0, 9.9, 9.8, 10.0]
    sessions = [session(tuple(int(each * 1e6) + offset for offset in range(500))) for each in own]
    assert judged(sessions, p50_ms=9.95)["latency.p50_ms"].status is Status.INCONCLUSIVE
    assert judged(sessions, p50_ms=10.5)["latency.p50_ms"].status is Status.PASSED
    assert judged(sessions, p50_ms=9.5)["latency.p50_ms"].status is Status.FAILED


def test_a_session_that_was_cut_short_is_named_where_the_samples_are_too_few():
    sessions = [session((1_000_000,) * size) for size in (16, 400, 400, 400, 400)]
    found = judged(sessions, p99_ms=2.0)["latency.p99_ms"]
    assert found.detail == (
        "p99 needs at least 459 samples, has 80, as many of each session as the shortest has, 16; raise samples or max_time_s"
    )


def test_several_budgets_give_a_finding_each_by_the_name_of_the_cell():
    cell = Cell(batch=8, name="batch=8")
    found = judged(split([1_000_000] * 1000), cell=cell, p50_ms=1.0, p99_ms=0.5, throughput_at_least=10.0)
    assert {check: each.status for check, each in found.items()} == {
        "latency.p50_ms[batch=8]": Status.PASSED,
        "latency.p99_ms[batch=8]": Status.FAILED,
        "latency.throughput[batch=8]": Status.PASSED,
    }


def test_throughput_is_bounded_by_a_students_t_interval_over_sessions():
    sessions = [session((1_000_000 + 1000 * offset,) * 50) for offset in (-20, -10, 0, 10, 20, 5)]
    values = [1e9 / each.regions["host_wall"][0] for each in sessions]
    finding = judged(sessions, throughput_at_least=900.0)["latency.throughput"]
    assert finding.estimate == pytest.approx(np.mean(values))
    expected = stats.t.interval(1 - 2 * 0.01 / 4, 5, loc=np.mean(values), scale=stats.sem(values))
    assert (finding.interval.lower, finding.interval.upper) == pytest.approx(expected)
    assert (finding.status, finding.unit, finding.n) == (Status.PASSED, "1/s", 300)
    assert judged(sessions, throughput_at_least=1100.0)["latency.throughput"].status is Status.FAILED
    near = judged(sessions, throughput_at_least=1000.0)["latency.throughput"]
    assert near.status is Status.INCONCLUSIVE
    assert near.detail == "throughput varies too much between 6 sessions; more would decide"


def test_samples_needed():
    assert samples_needed(LatencySpec(p50_ms=1.0)) == 1000
    assert samples_needed(LatencySpec(p50_ms=1.0, p99_ms=1.0)) == 1000
    assert samples_needed(LatencySpec(p99_9_ms=1.0)) == 2 * 4603
    assert samples_needed(LatencySpec(throughput_at_least=1.0, sessions=8)) == 1600
    assert samples_needed(LatencySpec(p99_ms=1.0, samples=12)) == 12


@given(
    st.lists(st.tuples(*[st.integers(1, 10**7)] * 5), min_size=1, max_size=120),
    st.sampled_from([*PERCENTILES]),
    st.floats(1e-3, 10.0),
)
def test_a_finding_follows_the_binomial_rule_and_up_to_p95_takes_more_than_that(rows, key, budget):
    values = [value for session in zip(*rows, strict=True) for value in session]
    p = PERCENTILES[key]
    over = sum(value / 1e6 > budget for value in values)
    status = judged(split(values), **{key: budget})[f"latency.{key}"].status
    passes = stats.binom.cdf(over, len(values), 1 - p) <= 0.01
    fails = stats.binom.sf(over - 1, len(values), 1 - p) <= 0.01
    if p > 0.95:
        assert (status is Status.PASSED, status is Status.FAILED) == (passes, fails)
    else:
        assert passes or status is not Status.PASSED
        assert fails or status is not Status.FAILED


def ratio_of(percents, jitter=0.0005):
    """The estimate from one session for each number: so many percent slower."""
    return estimate([math.log1p(each / 100) + jitter * (-1) ** index for index, each in enumerate(percents)])


def regression(percents, limit=3.0, **more):
    return regression_finding(
        ratio_of(percents, **more),
        "p50",
        cell=ONE,
        limit_percent=limit,
        against="the baseline",
        n=1000,
        evidence=Evidence.HOST,
    )


@pytest.mark.parametrize(
    ("percent", "status", "detail"),
    [
        (0.0, Status.PASSED, "p50 against the baseline: decided after 5 sessions, they vary by"),
        (6.0, Status.FAILED, "p50 against the baseline: decided after 5 sessions, they vary by"),
        (3.0, Status.INCONCLUSIVE, "p50 against the baseline: not decided after 5 sessions, they vary by"),
    ],
)
def test_a_regression_is_how_much_slower_in_percent(percent, status, detail):
    finding = regression([percent] * 5)
    assert finding.status is status
    assert finding.estimate == pytest.approx(percent, abs=0.1)
    assert (finding.check, finding.unit, finding.limit.value) == ("latency.regression_p50", "%", 3.0)
    assert finding.interval.lower < finding.estimate < finding.interval.upper
    assert finding.detail.startswith(detail)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("percent", [-50.0, 50.0])
def test_fewer_sessions_than_the_rule_takes_decide_nothing(count, percent):
    finding = regression([percent] * count)
    assert finding.status is Status.INCONCLUSIVE
    assert f"{count} session{'s' * (count > 1)}, the rule takes at least 5; raise max_time_s" in finding.detail


def speedup(percents, at_least):
    return speedup_finding(
        ratio_of(percents),
        SpeedupSpec(at_least=at_least),
        cell=Cell(batch=8, name="batch=8"),
        against="PyTorch",
        n=1000,
        evidence=Evidence.HOST,
    )


@pytest.mark.parametrize(
    ("at_least", "status"), [(1.5, Status.PASSED), (2.5, Status.FAILED), (2.0, Status.INCONCLUSIVE)]
)
def test_a_speedup_is_how_many_times_faster(at_least, status):
    finding = speedup([-50.0] * 5, at_least)
    assert finding.status is status
    assert finding.estimate == pytest.approx(2.0, rel=1e-2)
    assert finding.check == "latency.speedup[batch=8]"
    assert finding.interval.lower < finding.estimate < finding.interval.upper
    assert finding.detail.startswith("p50 of PyTorch: ")


def test_a_speedup_of_few_sessions_is_open_on_both_sides():
    finding = speedup([-50.0] * 4, 1.5)
    assert finding.interval == Interval(0.0, math.inf)
    assert finding.status is Status.INCONCLUSIVE


def finding_of(kind, lower, upper, limit, estimate=None):
    return Finding(
        check="latency.p50_ms",
        estimate=(lower + upper) / 2 if estimate is None else estimate,
        interval=Interval(lower, upper),
        limit=Limit(kind, limit),
        n=1000,
        evidence=Evidence.HOST,
    )


@pytest.mark.parametrize(
    ("kind", "limit", "status", "opened"),
    [
        ("at_most", 3.0, Status.PASSED, Interval(1.0, math.inf)),
        ("at_most", 0.5, Status.FAILED, Interval(-math.inf, 2.0)),
        ("at_least", 0.5, Status.PASSED, Interval(-math.inf, 2.0)),
        ("at_least", 3.0, Status.FAILED, Interval(1.0, math.inf)),
    ],
)
def test_a_doubt_opens_the_side_that_decided(kind, limit, status, opened):
    finding = finding_of(kind, 1.0, 2.0, limit)
    assert finding.status is status
    doubtful = doubted(finding, ("clocks differ", "it was hot"), blocks=(status,))
    assert (doubtful.status, doubtful.interval) == (Status.INCONCLUSIVE, opened)
    assert doubtful.detail == "clocks differ; it was hot"
    other = Status.FAILED if status is Status.PASSED else Status.PASSED
    assert doubted(finding, ("clocks differ",), blocks=(other,)) == finding
    assert doubted(finding, (), blocks=(status,)) == finding


@given(
    kind=st.sampled_from(["at_most", "at_least"]),
    bounds=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
    limit=st.floats(-1e3, 1e3),
    reasons=st.lists(st.text(max_size=5), max_size=2),
    blocks=st.lists(st.sampled_from(Status), max_size=3),
)
def test_a_doubt_never_makes_a_pass(kind, bounds, limit, reasons, blocks):
    finding = finding_of(kind, min(bounds), max(bounds), limit)
    doubtful = doubted(finding, reasons, blocks=blocks)
    if finding.status is not Status.PASSED:
        assert doubtful.status is not Status.PASSED
    if reasons and finding.status in blocks:
        assert doubtful.status is Status.INCONCLUSIVE


def test_sessions_of_different_clocks_are_an_error():
    cells = (CellTimes(subjects=(session((5,)),)),)
    first = SessionTimes(cells=cells, clock="perf_counter_ns", resolution_ns=1, memory=MemoryUse())
    assert clock_of([first, first]) == "perf_counter_ns"
    with pytest.raises(MeasurementError, match="timed by perf_counter_ns, time_ns; one clock"):
        clock_of([first, msgspec.structs.replace(first, clock="time_ns")])
    with pytest.raises(MeasurementError, match="timed by no clock"):
        clock_of([])
