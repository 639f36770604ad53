from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.latency.config import LatencySpec, RegressionSpec, SpeedupSpec, StagesSpec, UsageSpec, latency_checks
from gate.latency.stages import stage_checks
from gate.latency.usage import usage_checks
from gate.spec import MEMORY_BUDGETS, ParityLimits
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Status
from gate.wording import (
    FINDINGS_PAGE,
    advice,
    anchor,
    belongs,
    finding_sentence,
    limit_number,
    milliseconds,
    number,
    observed_and_limit,
    size_text,
)


def finding(estimate, limit, *, kind="at_most", lower=None, upper=None, n=5, unit="", **more):
    return Finding(
        check="parity.rel_rmse",
        estimate=estimate,
        interval=Interval(estimate if lower is None else lower, estimate if upper is None else upper),
        limit=Limit(kind, limit, "spec", "gate.toml:41"),
        n=n,
        evidence=Evidence.HOST,
        unit=unit,
        **more,
    )


def test_a_failure_by_a_hair_shows_enough_digits_to_see_it():
    assert finding_sentence(finding(0.00500001, 0.005)) == "parity.rel_rmse: 5.00001e-03 > 5.00000e-03 (gate.toml:41)"


def test_an_accuracy_below_its_floor_reads_as_such():
    sentence = finding_sentence(finding(0.98, 0.99, kind="at_least", lower=0.97, upper=0.985))
    assert sentence == "parity.rel_rmse: 0.98 [0.97 to 0.985] < 0.99 (gate.toml:41)"


def test_a_nan_never_reads_as_within_its_limit():
    assert finding_sentence(finding(math.nan, 0.005)) == "parity.rel_rmse: NaN, limit <= 5.0e-03 (gate.toml:41)"


def test_no_sample_reads_as_nothing_measured():
    assert "nothing was measured" in finding_sentence(finding(0.0, 1.0, n=0))


def test_a_failure_is_its_first_line():
    failure = Failure(check="build", error="BuildError", message="refused\n | log", evidence=Evidence.HOST)
    assert finding_sentence(failure) == "build: refused"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (512, "512"),
        (0.2134, "0.21"),
        (0.9925, "0.9925"),
        (0.97, "0.97"),
        (9.7e-3, "9.7e-03"),
        (math.inf, "inf"),
    ],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


def test_a_limit_reads_as_it_was_set():
    assert [limit_number(value) for value in (0.9999, 2e-3, 20.0, 0.5)] == ["0.9999", "2.0e-03", "20", "0.50"]


@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=1e-12, max_value=1e9),
    st.floats(allow_nan=False, allow_infinity=False, min_value=1e-12, max_value=1e9),
)
def test_a_failed_number_is_never_shown_as_its_limit(estimate, limit):
    found = finding(estimate, limit)
    if found.status is Status.FAILED:
        observed, allowed = observed_and_limit(found)
        assert float(observed) > float(allowed)


@pytest.mark.parametrize(
    ("check", "group", "expected"),
    [
        ("parity.rel_rmse[boxes]", "parity", True),
        ("latency", "latency.p99_ms", True),
        ("task.top1_drop_pp", "task.top1", False),
        ("task.top1", "task.top1_drop_pp", False),
        ("build", "build", True),
        ("run", "parity", False),
    ],
)
def test_findings_belong_by_whole_words(check, group, expected):
    assert belongs(check, group) is expected


def test_every_check_has_its_page():
    assert anchor("parity.rel_rmse[boxes]") == "docs/findings.md#parity-rel_rmse"
    assert anchor("latency.p99_ms") == "docs/findings.md#latency"
    assert advice(finding(1.0, 0.5, hint="docs/findings.md#parity-rel_rmse")) == ""


@pytest.mark.parametrize(
    ("check", "heading"),
    [
        ("task.top1", "task-top1"),
        ("task.top5_drop_pp", "task-top5_drop_pp"),
        ("task.mean_ap", "task-value"),
        ("task.mean_ap_drop", "task-drop"),
        ("task.rmse_rise", "task-rise"),
        ("task.mean_iou_ratio", "task-ratio"),
        ("task.top1_agreement", "task-value"),
        ("task.ap_of.cat [grey]_drop", "task-drop"),
        ("task.tiled_mean_ap", "task-value"),
        ("task.tiled_mean_ap_gain", "task-gain"),
        ("task.tiled", "task-tiled"),
        ("baseline", "baseline"),
        ("baseline.mean_ap_drop", "baseline-drop"),
        ("baseline.rmse_rise", "baseline-rise"),
        ("baseline.task", "baseline-task"),
        ("baseline.top1_drop_pp", "baseline-top1_drop_pp"),
        ("baseline.rel_rmse_ratio[scores]", "baseline-rel_rmse_ratio"),
    ],
)
def test_checks_of_any_tasks_values_share_headings_that_there_are(check, heading):
    assert anchor(check) == f"{FINDINGS_PAGE}#{heading}"
    assert heading in _slugs((Path(__file__).parents[1] / FINDINGS_PAGE).read_text())


def test_every_check_of_latency_stages_usage_and_memory_has_a_heading():
    every = LatencySpec(batch=(1, 8), p99_9_ms=1.0, regression=RegressionSpec(), speedup=SpeedupSpec(at_least=2.0))
    checks = {
        "latency": latency_checks(every),
        "stages": stage_checks(StagesSpec(p95_ms={"decode": 1.0, "total": 2.0})),
        "usage": usage_checks(UsageSpec(power_w=1.0, cpu_percent_at_most=1.0)),
    }
    slugs = _slugs((Path(__file__).parents[1] / FINDINGS_PAGE).read_text())
    for group, names in checks.items():
        assert len(names) >= 2
        assert {anchor(name) for name in (group, *names)} == {f"{FINDINGS_PAGE}#{group}"}
        assert group in slugs
    assert {"memory", *(f"memory-{budget}" for budget in MEMORY_BUDGETS)} <= slugs


def test_sizes_have_units():
    assert [size_text(size) for size in (None, 12, 87040, 5 * 2**20)] == ["-", "12 B", "85 KiB", "5.0 MiB"]


def test_a_short_time_has_no_exponent():
    assert milliseconds(0.00789) == "0.0079"
    assert milliseconds(0.34) == "0.34"


def _slugs(page):
    """The anchors of a page. Source: GitHub's rule: lower case, spaces to hyphens, other punctuation dropped."""
    headings = [line.lstrip("#").strip() for line in page.splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_check_that_the_gate_names_has_a_heading():
    root = Path(__file__).parents[1]
    slugs = _slugs((root / FINDINGS_PAGE).read_text())
    source = "".join(path.read_text() for path in sorted((root / "gate").rglob("*.py")))
    groups = "build|run|parity|metamorphic|task|latency|stages|usage|memory|baseline"
    named = set(re.findall(rf"failure\(\s*\"((?:{groups})[a-z0-9_.]*)\"", source))
    named |= set(re.findall(rf"check=f?\"((?:{groups})[a-z0-9_.]*)[\"\[{{]", source))
    named |= {f"parity.{name.removesuffix('_at_least')}" for name in ParityLimits.__struct_fields__}
    assert len(named) > 15
    known = {name for name in named if not name.endswith(".")}
    assert {name for name in known if anchor(name).partition("#")[2] not in slugs} == set()
    linked = set(re.findall(r"docs/findings\.md#([a-z0-9_-]*[a-z0-9])(?![a-z0-9_{-])", source))
    assert linked <= slugs
