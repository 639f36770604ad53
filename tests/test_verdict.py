"""The one place that decides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, PassedVerdict, Status, Verdict, status_of

ANY = st.floats(allow_nan=True, allow_infinity=True)


def finding(
    estimate: float = 1.0,
    lower: float = 1.0,
    upper: float = 1.0,
    limit: float = 2.0,
    kind: str = "at_most",
    n: int = 10,
    check: str = "parity.x",
) -> Finding:
    return Finding(
        check=check,
        estimate=estimate,
        interval=Interval(lower, upper),
        limit=Limit(kind, limit),  # type: ignore[arg-type]
        n=n,
        evidence=Evidence.HOST,
    )


@pytest.mark.parametrize(
    ("kind", "lower", "upper", "limit", "status"),
    [
        ("at_most", 1.0, 2.0, 2.0, Status.PASSED),
        ("at_most", 2.0, 3.0, 2.0, Status.INCONCLUSIVE),
        ("at_most", 2.1, 3.0, 2.0, Status.FAILED),
        ("at_least", 2.0, 3.0, 2.0, Status.PASSED),
        ("at_least", 1.0, 2.0, 2.0, Status.INCONCLUSIVE),
        ("at_least", 1.0, 1.9, 2.0, Status.FAILED),
        ("at_most", 0.0, math.inf, 2.0, Status.INCONCLUSIVE),
        ("at_most", 0.0, math.inf, math.inf, Status.PASSED),
    ],
)
def test_status_follows_from_interval_and_limit(
    kind: str, lower: float, upper: float, limit: float, status: Status
) -> None:
    assert finding(lower, lower, upper, limit, kind).status is status


@given(
    estimate=ANY, lower=ANY, upper=ANY, limit=ANY, kind=st.sampled_from(["at_most", "at_least"]), n=st.integers(-1, 5)
)
def test_a_pass_needs_numbers_samples_and_an_interval_that_keeps_the_limit(
    estimate: float, lower: float, upper: float, limit: float, kind: str, n: int
) -> None:
    if finding(estimate, lower, upper, limit, kind, n).status is Status.PASSED:
        assert n > 0
        assert not any(math.isnan(x) for x in (estimate, lower, upper, limit))
        assert upper <= limit if kind == "at_most" else lower >= limit


@pytest.mark.parametrize("place", ["estimate", "lower", "upper", "limit"])
def test_nan_fails_wherever_it_stands(place: str) -> None:
    assert finding(**{place: math.nan}).status is Status.FAILED


def test_no_samples_fail() -> None:
    assert finding(n=0).status is Status.FAILED


def test_an_interval_the_wrong_way_round_fails() -> None:
    assert finding(lower=1.5, upper=0.5).status is Status.FAILED


def test_nothing_is_not_a_pass() -> None:
    with pytest.raises(MeasurementError, match="nothing was checked"):
        status_of([])
    with pytest.raises(MeasurementError, match="nothing was checked"):
        Verdict(())


def test_the_worst_status_counts() -> None:
    assert status_of([Status.PASSED, Status.INCONCLUSIVE]) is Status.INCONCLUSIVE
    assert status_of([Status.INCONCLUSIVE, Status.FAILED, Status.PASSED]) is Status.FAILED


def test_a_required_check_without_a_finding_is_an_error() -> None:
    with pytest.raises(MeasurementError, match=r"required checks have no finding: task\.top1"):
        Verdict((finding(),), required=("parity.x", "task.top1"))


def test_two_findings_of_one_name_are_an_error() -> None:
    with pytest.raises(MeasurementError, match="two findings for one check: parity.x"):
        Verdict((finding(), finding()))


def test_only_a_passed_verdict_can_be_made_into_one_that_can_be_sealed() -> None:
    assert Verdict((finding(),)).require_passed().verdict.status is Status.PASSED
    failed = Verdict((finding(), Failure(check="run", error="RunError", message="m", evidence=Evidence.HOST)))
    with pytest.raises(MeasurementError, match="only what passed can be sealed; FAILED: run"):
        failed.require_passed()
    with pytest.raises(MeasurementError, match="INCONCLUSIVE: parity.x"):
        PassedVerdict(Verdict((finding(lower=1.0, upper=3.0),)))


def test_the_strongest_evidence_is_the_verdicts() -> None:
    weak = Failure(check="build", error="BuildError", message="m", evidence=Evidence.PREFLIGHT)
    assert Verdict((weak, finding())).evidence is Evidence.HOST


def test_a_required_check_is_covered_by_its_outputs_or_its_group() -> None:
    found = (finding(check="parity.nonfinite[boxes]"), finding(check="baseline.rel_rmse_ratio"))
    assert Verdict(found, required=("parity.nonfinite", "baseline")).status is Status.PASSED
    with pytest.raises(MeasurementError, match="no finding: parity.non$"):
        Verdict(found, required=("parity.non",))
