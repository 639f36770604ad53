"""What an engine takes: nothing that the system does not say passes."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gate.errors import MeasurementError
from gate.latency.config import UsageSpec
from gate.latency.measurement import Usage
from gate.latency.usage import usage_checks, usage_findings, usage_metrics
from gate.verdict import Evidence, Status

BUDGETS = {
    "power_w": "power_w",
    "energy_mj": "energy_mj",
    "gpu_percent_at_least": "gpu_percent",
    "cpu_percent_at_most": "cpu_percent",
}


def ran(value=100.0, **more):
    """A second in which 10 inferences took so much of everything."""
    known = {"energy_mj": 10 * value, "power_w": value, "gpu_percent": value, "cpu_percent": value}
    return Usage(seconds=1.0, inferences=10, **known | more)


def judged(sessions, **budgets):
    return usage_findings(sessions, UsageSpec(**budgets), evidence=Evidence.DEVICE)


def test_checks_are_those_that_have_a_budget():
    assert usage_checks(None) == ()
    assert usage_checks(UsageSpec()) == ()
    assert usage_checks(UsageSpec(power_w=1.0, cpu_percent_at_most=1.0)) == (
        "usage.power_w",
        "usage.cpu_percent_at_most",
    )


def test_metrics_are_means_over_sessions_and_energy_is_of_one_inference():
    metrics = usage_metrics([ran(90.0), ran(110.0, energy_mj=2200.0)], batch=4)
    assert (metrics.batch, metrics.sessions) == (4, 2)
    assert (metrics.power_w, metrics.gpu_percent, metrics.cpu_percent) == (100.0, 100.0, 100.0)
    assert metrics.energy_mj == pytest.approx((90.0 + 220.0) / 2)


def test_what_one_session_does_not_know_has_no_mean():
    metrics = usage_metrics([ran(), ran(power_w=None)], batch=1)
    assert metrics.power_w is None
    assert metrics.cpu_percent == 100.0


@pytest.mark.parametrize("key", BUDGETS)
def test_a_budget_is_judged_by_a_students_t_interval_over_sessions(key):
    values = [99.0, 101.0, 100.0, 98.0, 102.0]
    at_most = not key.endswith("_at_least")
    generous, strict = (1000.0, 10.0) if at_most else (10.0, 1000.0)
    (passed,) = judged([ran(value) for value in values], **{key: generous})
    assert (passed.check, passed.status, passed.n) == (f"usage.{key}", Status.PASSED, 50)
    expected = stats.t.interval(0.98, 4, loc=100.0, scale=stats.sem(values))
    assert (passed.interval.lower, passed.interval.upper) == pytest.approx(expected)
    (failed,) = judged([ran(value) for value in values], **{key: strict})
    assert failed.status is Status.FAILED
    (near,) = judged([ran(value) for value in values], **{key: 100.0})
    assert near.status is Status.INCONCLUSIVE
    assert near.detail == "it varies too much between 5 sessions"


@pytest.mark.parametrize("key", BUDGETS)
@pytest.mark.parametrize("value", [None, math.nan])
def test_what_the_system_does_not_say_fails(key, value):
    for sessions in ([ran(**{BUDGETS[key]: value})] * 5, [ran()] * 4 + [ran(**{BUDGETS[key]: value})]):
        for limit in (1e-9, 1e9):
            (finding,) = judged(sessions, **{key: limit})
            assert finding.status is Status.FAILED
            assert finding.detail == "the system does not say what it is"


def test_one_session_decides_nothing():
    (finding,) = judged([ran()], power_w=1e9)
    assert finding.status is Status.INCONCLUSIVE


def test_a_number_that_is_not_finite_is_an_error():
    with pytest.raises(MeasurementError, match="an interval needs numbers, got inf, 100.0"):
        judged([ran(power_w=math.inf), ran()], power_w=1.0)


def test_no_session_is_an_error():
    with pytest.raises(MeasurementError, match="no session was measured, so there is no usage"):
        judged([], power_w=1.0)
    with pytest.raises(MeasurementError, match="no session was measured, so there is no usage"):
        usage_metrics([], batch=1)


@pytest.mark.parametrize("changes", [{"inferences": 0}, {"seconds": 0.0}, {"seconds": -1.0}, {"seconds": math.nan}])
def test_a_session_that_ran_nothing_is_an_error(changes):
    idle = msgspec.structs.replace(ran(), **changes)
    for measured in (usage_metrics, None):
        with pytest.raises(MeasurementError, match="session 1 ran"):
            judged([ran(), idle], power_w=1.0) if measured is None else measured([ran(), idle], batch=1)


@given(st.lists(st.floats(0.1, 1e4), min_size=2, max_size=8), st.floats(0.1, 1e4))
def test_what_is_on_average_over_its_budget_never_passes(values, limit):
    sessions = [ran(value) for value in values]
    (most,) = judged(sessions, power_w=limit)
    (least,) = judged(sessions, gpu_percent_at_least=limit)
    if math.fsum(values) / len(values) > limit:
        assert most.status is not Status.PASSED
    if math.fsum(values) / len(values) < limit:
        assert least.status is not Status.PASSED
