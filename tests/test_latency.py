"""Durations summarised and judged: nothing that was not measured passes."""

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gate.errors import MeasurementError
from gate.latency import _GROUPS, _T_GROUPS, latency_findings, samples_needed, summarise
from gate.spec import LatencySpec, spec_from_text
from gate.verdict import Evidence, Status

SPEC = """schema = 1
[model]
id = "m"
onnx = "m.onnx"
[inputs.x]
dtype = "float32"
shape = [1, 4]
[data]
source = "data.npz"
samples = 10
[[engine]]
name = "e"
backend = "onnxruntime"
precision = "fp32"
[engine.latency]
"""


def summary(durations, **settings):
    settings = {"batch": 1, "sessions": 1, "warm_up": 5, "clock": "perf_counter_ns", "timed": "host_wall", **settings}
    return summarise(durations, **settings)


def judged(durations, budgets, **settings):
    file = spec_from_text(SPEC + budgets, path=Path("gate.toml"))
    metrics = summary(durations, **settings)
    found = latency_findings(metrics, engine=file.spec.engines[0], file=file, evidence=Evidence.HOST)
    return {finding.check: finding for finding in found}


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=300))
def test_percentiles_are_nearest_rank(values):
    metrics = summary(values)
    ordered = sorted(values)
    n = len(values)
    for percent in (50, 90, 95, 99):
        rank = -(-percent * n // 100)
        assert getattr(metrics, f"p{percent}_ms") == ordered[rank - 1] / 1e6
    assert metrics.max_ms == max(values) / 1e6
    assert metrics.durations_ns == tuple(values)
    assert metrics.mean_ms == pytest.approx(np.mean(values) / 1e6)


def test_throughput_is_batch_over_mean_latency():
    assert summary([1_000_000, 3_000_000], batch=8).throughput == pytest.approx(4000.0)


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        ([], "no inference was timed"),
        ([1.5], "whole nanoseconds"),
        ([math.nan, 3.0], "whole nanoseconds"),
        ([5, 0, 3], "inference 1 took 0 ns"),
        ([5, 4, -3], "inference 2 took -3 ns"),
        ([[5, 4]], "no inference was timed"),
        ([True], "whole nanoseconds"),
        (["5"], "whole nanoseconds"),
    ],
)
def test_what_is_no_duration_is_an_error(durations, message):
    with pytest.raises(MeasurementError, match=message):
        summary(durations)


@pytest.mark.parametrize("settings", [{"batch": 0}, {"sessions": 0}, {"warm_up": -1}])
def test_what_was_not_measured_is_an_error(settings):
    with pytest.raises(MeasurementError, match="was not measured"):
        summary([1, 2], **settings)


def test_too_few_samples_are_inconclusive_however_fast():
    finding = judged([1000] * 300, "p99_ms = 1000.0")["latency.p99_ms"]
    assert finding.status is Status.INCONCLUSIVE
    assert finding.interval.upper == math.inf
    assert finding.detail == "p99 needs at least 459 samples, has 300; raise samples or max_time_s"
    assert finding.limit.location == "gate.toml:16"


@pytest.mark.parametrize(("key", "least"), [("p90_ms", 44), ("p95_ms", 90), ("p99_ms", 459)])
def test_the_least_number_of_samples_passes(key, least):
    check = f"latency.{key}"
    assert judged([1_000_000] * least, f"{key} = 1.0")[check].status is Status.PASSED
    assert judged([1_000_000] * (least - 1), f"{key} = 1.0")[check].status is Status.INCONCLUSIVE
    assert judged([1_000_001] * least, f"{key} = 1.0")[check].status is Status.FAILED


def test_a_budget_that_is_missed_fails_and_says_by_how_many():
    finding = judged([1_000_000] * 900 + [9_000_000] * 100, "p95_ms = 2.0")["latency.p95_ms"]
    assert finding.status is Status.FAILED
    assert finding.detail == "100 of 1000 inferences are over the budget, slowest 9 ms"
    assert (finding.unit, finding.estimate, finding.n) == ("ms", 9.0, 1000)


def test_a_budget_that_is_near_is_inconclusive():
    finding = judged([1_000_000] * 950 + [9_000_000] * 50, "p95_ms = 2.0")["latency.p95_ms"]
    assert finding.status is Status.INCONCLUSIVE
    assert finding.detail == "50 of 1000 inferences are over the budget; more samples would decide"


def test_several_budgets_give_a_finding_each():
    found = judged([1_000_000] * 1000, "p50_ms = 1.0\np99_ms = 0.5\nthroughput_at_least = 10.0")
    assert {check: each.status for check, each in found.items()} == {
        "latency.p50_ms": Status.PASSED, "latency.p99_ms": Status.FAILED, "latency.throughput": Status.PASSED,
    }  # fmt: skip


def test_throughput_is_bounded_by_the_means_of_groups():
    rng = np.random.default_rng(0)
    durations = rng.normal(1e6, 1e5, 1000).astype(np.int64)
    finding = judged(durations, "throughput_at_least = 990.0")["latency.throughput"]
    assert finding.status is Status.PASSED
    assert 980 < finding.interval.lower < finding.estimate < finding.interval.upper < 1020
    assert judged(durations, "throughput_at_least = 1020.0")["latency.throughput"].status is Status.FAILED
    near = judged(durations, f"throughput_at_least = {finding.estimate}")["latency.throughput"]
    assert near.status is Status.INCONCLUSIVE
    assert near.limit.location == "gate.toml:16"


def test_a_drift_within_the_run_widens_throughput():
    steady = np.full(1000, 1_000_000)
    drifting = np.linspace(500_000, 1_500_000, 1000).astype(np.int64)
    assert judged(steady, "throughput_at_least = 950.0")["latency.throughput"].status is Status.PASSED
    assert judged(drifting, "throughput_at_least = 950.0")["latency.throughput"].status is Status.INCONCLUSIVE


def test_throughput_of_too_few_samples_is_inconclusive():
    finding = judged([1] * 39, "throughput_at_least = 1.0")["latency.throughput"]
    assert finding.status is Status.INCONCLUSIVE
    assert "needs at least 40 samples, has 39" in finding.detail


def test_the_quantile_is_students():
    assert pytest.approx(stats.t.ppf(0.99, _GROUPS - 1), rel=1e-9) == _T_GROUPS


def test_without_raw_durations_there_is_nothing_to_judge():
    file = spec_from_text(SPEC + "p50_ms = 1.0", path=Path("gate.toml"))
    metrics = summary([1] * 100)
    for broken, message in (
        (msgspec.structs.replace(metrics, durations_ns=()), "no inference was timed"),
        (msgspec.structs.replace(metrics, durations_ns=(1, 2)), "100 inferences were timed, 2 durations are here"),
        (msgspec.structs.replace(metrics, batch=2), "measured at batch 2, the budget is for batch 1"),
    ):
        with pytest.raises(MeasurementError, match=message):
            latency_findings(broken, engine=file.spec.engines[0], file=file, evidence=Evidence.HOST)


def test_samples_needed():
    assert samples_needed(LatencySpec(p50_ms=1.0)) == 200
    assert samples_needed(LatencySpec(p50_ms=1.0, p99_ms=1.0)) == 918
    assert samples_needed(LatencySpec(throughput_at_least=1.0)) == 200
    assert samples_needed(LatencySpec(p99_ms=1.0, samples=12)) == 12


@given(
    st.lists(st.integers(1, 10**7), min_size=1, max_size=600),
    st.sampled_from(["p50_ms", "p90_ms", "p95_ms", "p99_ms"]),
    st.floats(1e-3, 10.0),
)
def test_a_finding_follows_the_binomial_rule(values, key, budget):
    p = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99}[key]
    over = sum(value / 1e6 > budget for value in values)
    status = judged(values, f"{key} = {budget!r}")[f"latency.{key}"].status
    assert (status is Status.PASSED) == (stats.binom.cdf(over, len(values), 1 - p) <= 0.01)
    assert (status is Status.FAILED) == (stats.binom.sf(over - 1, len(values), 1 - p) <= 0.01)
