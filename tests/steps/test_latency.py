"""Sessions, looks, time and doubts, on a machine that is simulated: no process is started, and the clock is its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from gate.errors import BaselineError, MeasurementError
from gate.latency.config import LatencySpec, RegressionSpec, SpeedupSpec, UsageSpec
from gate.latency.measurement import CellTimes, MemoryUse, Reading, SessionTimes, SubjectTimes, Usage
from gate.latency.ratio import LEAST_KEPT
from gate.sessions.job import Job, Subject
from gate.spec import EngineSpec
from gate.steps.latency import LEG, Rival, Timing, measured_latency, measured_usage
from gate.verdict import Evidence, Failure, Finding, Status

PASSED, FAILED, INCONCLUSIVE = Status.PASSED, Status.FAILED, Status.INCONCLUSIVE


@dataclass
class Machine:
    """Does jobs: keeps as many inferences as a session would, in a time of its own.

    Args:
        ms: Median of an inference, by the name of the engine.
        noise: Standard deviation of the logarithm between inferences.
        between: Likewise between sessions, of one engine against the other.
        loading_s: Of a session; the first may take longer.
        reading: What the GPU says after each leg of an engine; None: there is none.
        regions: What an engine says beside the host's clock.
        fails: By the number of the session, what it raises.
    """

    ms: dict[str, float] = field(default_factory=lambda: {"a": 1.0, "b": 1.0})
    noise: float = 0.02
    between: float = 0.001
    loading_s: float = 0.5
    first_loading_s: float | None = None
    reading: Callable[[int], Reading] | None = None
    regions: tuple[str, ...] = ()
    fails: dict[int, MeasurementError] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def session(self, job: Job, timeout_s: float) -> SessionTimes:
        """One session."""
        self.jobs.append(job)
        self.timeouts.append(timeout_s)
        number = len(self.jobs)
        began = self.now
        self.now += self.loading_s if number > 1 or self.first_loading_s is None else self.first_loading_s
        if number in self.fails:
            raise self.fails[number]
        cells = []
        for index, cell in enumerate(job.cells):
            names = [job.subjects[each].name for each in cell.subjects]
            left = math.inf if job.max_s is None else (began + job.max_s - self.now) / (len(job.cells) - index)
            turn_s = sum(2 * (LEG + job.discard) * self.ms[name] * cell.cell.batch / 1e3 for name in names)
            turns = max(1, math.floor(left / turn_s)) if left < math.inf else cell.kept
            kept = min(cell.kept, 2 * LEG * turns)
            self.now += turn_s * kept / (2 * LEG)
            subjects = [self._subject(name, kept, cell.cell.batch, turn_s * kept / (2 * LEG)) for name in names]
            readings = () if self.reading is None else tuple(map(self.reading, range(len(names)))) * 4
            cells.append(CellTimes(subjects=tuple(subjects), readings=readings))
        usage = tuple(Usage(seconds=job.usage_s, inferences=10, cpu_percent=99.0) for _ in job.subjects)
        return SessionTimes(
            cells=tuple(cells),
            usage=usage if job.usage_s > 0.0 else (),
            memory=MemoryUse(),
            clock="perf_counter_ns",
            resolution_ns=1,
        )

    def _subject(self, name: str, kept: int, batch: int, span_s: float) -> SubjectTimes:
        shift = self.generator.normal(0.0, self.between)
        values = np.exp(self.generator.normal(shift, self.noise, kept)) * self.ms[name] * batch * 1e6
        durations = tuple(np.maximum(values, 1.0).astype(int).tolist())
        regions = {"host_wall": durations, **dict.fromkeys(self.regions, durations)}
        return SubjectTimes(regions=regions, leg=LEG, warm_up=200, span_ns=max(int(span_s * 1e9), sum(durations)))


class Batches:
    """One batch of ones."""

    def batches(self, cell):
        """As `gate.steps.feeds.Feeds`."""
        return [{"input": np.ones((cell.batch, 4), np.float32)}]


def subject(name):
    return Subject(name=name, spec=Path("gate.toml"))


def rival(against):
    return Rival(against, f"engine {against}", subject(against))


def measured(machine, latency, *, max_time_s=None, rival=rival, evidence=Evidence.HOST):
    engine = EngineSpec(name="a", backend="onnxruntime", precision="fp32", latency=latency)
    timing = Timing(
        file=None,
        engine=engine,
        subject=subject("a"),
        evidence=evidence,
        rival=rival,
        feeds=Batches(),
        advance=lambda: None,
        max_time_s=max_time_s,
        session=machine.session,
        clock=machine.clock,
    )
    found = measured_latency(timing)
    return found, {each.check: each for each in found.findings}


def against_b(**more):
    return LatencySpec(regression=RegressionSpec(against="b", p50=3.0), **more)


def test_equal_engines_pass_and_a_slower_one_fails_at_the_first_look():
    for ms, status in ((1.0, PASSED), (1.1, FAILED)):
        machine = Machine(ms={"a": ms, "b": 1.0})
        found, findings = measured(machine, against_b())
        assert findings["latency.regression_p50"].status is status
        assert len(machine.jobs) == 5
        (latency,) = found.latencies
        assert latency.stopped == "decided after 5 sessions"
        (comparison,) = latency.comparisons
        assert comparison.checks == ("latency.regression_p50",)
        assert len(comparison.pairs) == comparison.sessions == 5
        assert all(len(each.a_ns) == len(each.b_ns) == LEAST_KEPT for each in comparison.pairs)


def test_who_begins_alternates_between_sessions():
    machine = Machine()
    measured(machine, against_b())
    assert [job.order for job in machine.jobs] == [0, 1, 0, 1, 0]


def test_what_lies_at_its_limit_is_looked_at_again_and_never_decided():
    machine = Machine(ms={"a": 1.03, "b": 1.0}, between=0.01)
    found, findings = measured(machine, against_b(max_time_s=1e4))
    finding = findings["latency.regression_p50"]
    assert finding.status is INCONCLUSIVE
    assert "not decided after 20 sessions" in finding.detail
    assert len(machine.jobs) == 20
    assert found.latencies[0].stopped == "not decided after 20 sessions, which are the most"


@pytest.mark.parametrize("seed", range(8))
def test_rule_stops_at_its_looks_alone(seed):
    machine = Machine(ms={"a": 1.015, "b": 1.0}, between=0.01)
    machine.generator = np.random.default_rng(seed)
    measured(machine, against_b(max_time_s=1e4))
    assert len(machine.jobs) in (5, 8, 12, 20)


def test_a_cell_that_is_decided_is_not_measured_on():
    class OneIsNoisy(Machine):
        def _subject(self, name, kept, batch, span_s):
            self.between = 0.1 if batch == 4 else 0.0001
            return super()._subject(name, kept, batch, span_s)

    machine = OneIsNoisy()
    found, findings = measured(machine, against_b(batch=(1, 4), max_time_s=1e4))
    assert findings["latency.regression_p50[batch=1]"].status is PASSED
    assert findings["latency.regression_p50[batch=4]"].status is INCONCLUSIVE
    assert [len(job.cells) for job in machine.jobs] == [2] * 5 + [1] * 15
    assert [each.sessions for each in found.latencies] == [5, 20]
    assert [each.name for each in found.latencies] == ["batch=1", "batch=4"]


@pytest.mark.parametrize(
    ("latency", "kept"),
    [
        (LatencySpec(p50_ms=5.0), 200),
        (LatencySpec(p99_ms=5.0), 200),
        (LatencySpec(p99_9_ms=5.0), 1848),
        (LatencySpec(p50_ms=5.0, samples=3000), 600),
        (LatencySpec(regression=RegressionSpec(against="b")), 400),
        (LatencySpec(p99_9_ms=5.0, regression=RegressionSpec(against="b")), 1848),
        (LatencySpec(p50_ms=5.0, sessions=10), 200),
    ],
)
def test_a_session_keeps_what_the_first_look_needs(latency, kept):
    machine = Machine()
    measured(machine, latency)
    assert {job.cells[0].kept for job in machine.jobs} == {kept}
    assert len(machine.jobs) == latency.sessions


def test_a_budget_that_is_not_decided_keeps_more_in_later_sessions():
    machine = Machine(noise=0.1)
    _, findings = measured(machine, LatencySpec(p50_ms=1.0))
    assert findings["latency.p50_ms"].status is INCONCLUSIVE
    assert [job.cells[0].kept for job in machine.jobs] == [200] * 5 + [600] * 15


def test_budget_and_throughput_are_judged_over_all_sessions():
    found, findings = measured(Machine(), LatencySpec(p50_ms=2.0, p99_ms=0.5, throughput_at_least=500.0))
    assert {name: each.status for name, each in findings.items()} == {
        "latency.p50_ms": PASSED,
        "latency.p99_ms": FAILED,
        "latency.throughput": PASSED,
    }
    assert found.latencies[0].session_sizes == (200,) * 5


def test_without_a_limit_numbers_come_and_nothing_is_decided():
    found, findings = measured(Machine(), LatencySpec())
    assert not findings
    assert found.latencies[0].n == 1000
    assert found.latencies[0].stopped == "nothing to decide, measured after 5 sessions"


def test_time_is_kept_to_by_keeping_fewer_inferences():
    machine = Machine(ms={"a": 100.0})
    found, findings = measured(machine, LatencySpec(p50_ms=500.0, max_time_s=60.0))
    assert findings["latency.p50_ms"].status is PASSED
    assert machine.now - 1000.0 <= 66.0
    assert len(machine.jobs) == 5
    assert min(found.latencies[0].session_sizes) >= 2 * LEG


def test_fewer_inferences_than_the_spec_asks_for_are_no_pass():
    _, findings = measured(Machine(ms={"a": 100.0}), LatencySpec(p50_ms=500.0, samples=1000, max_time_s=60.0))
    finding = findings["latency.p50_ms"]
    assert finding.status is INCONCLUSIVE
    assert "of the 1000 samples that are asked for; raise max_time_s" in finding.detail


def test_comparison_that_has_no_time_stops_after_a_session_and_says_how_long_it_takes():
    machine = Machine(ms={"a": 100.0, "b": 100.0})
    found, findings = measured(machine, against_b(max_time_s=60.0))
    assert findings["latency.regression_p50"].status is INCONCLUSIVE
    assert len(machine.jobs) == 1
    assert found.latencies[0].stopped.startswith("max_time_s = 60 s is too short, stopped after 1 session: 5 sessions")
    assert "take about 266 s" in found.latencies[0].stopped


def test_comparison_is_decided_in_the_time_that_was_said():
    machine = Machine(ms={"a": 100.0, "b": 100.0})
    _, findings = measured(machine, against_b(max_time_s=290.0))
    assert findings["latency.regression_p50"].status is PASSED
    assert machine.now - 1000.0 <= 290.0


def test_comparison_beside_a_budget_goes_on_for_the_budget_and_does_not_decide_itself():
    machine = Machine(ms={"a": 100.0, "b": 100.0})
    _, findings = measured(machine, against_b(p50_ms=500.0, max_time_s=60.0))
    assert findings["latency.p50_ms"].status is PASSED
    finding = findings["latency.regression_p50"]
    assert finding.status is INCONCLUSIVE
    assert "the rule takes at least 200; raise max_time_s" in finding.detail


def test_sessions_after_one_that_loaded_long_make_up_for_it():
    machine = Machine(ms={"a": 5.0, "b": 5.0}, first_loading_s=14.0)
    _, findings = measured(machine, against_b(max_time_s=80.0))
    assert findings["latency.regression_p50"].status is PASSED
    assert len(machine.jobs) == 5
    assert machine.jobs[1].cells[0].kept > LEAST_KEPT


def test_measuring_ends_when_its_time_is_over_between_looks():
    machine = Machine(ms={"a": 1.03, "b": 1.0}, between=0.01)
    found, findings = measured(machine, against_b(max_time_s=8.0))
    assert findings["latency.regression_p50"].status is INCONCLUSIVE
    assert found.latencies[0].stopped.startswith("max_time_s = 8 s was over after")
    assert machine.now - 1000.0 <= 8.0
    assert 5 < len(machine.jobs) < 20


def test_one_session_is_measured_however_short_the_time():
    machine = Machine(loading_s=5.0)
    found, findings = measured(machine, LatencySpec(p50_ms=5.0), max_time_s=0.5)
    assert len(machine.jobs) == 1
    assert findings["latency.p50_ms"].status is INCONCLUSIVE
    assert (
        "needs at least" in findings["latency.p50_ms"].detail or "more processes" in findings["latency.p50_ms"].detail
    )
    assert found.latencies[0].stopped == "max_time_s = 0.5 s was over after 1 session"


def test_slow_session_is_told_to_end_before_it_counts_as_one_that_hangs():
    machine = Machine(ms={"a": 100.0})
    measured(machine, LatencySpec(p50_ms=500.0, max_time_s=1e4, session_timeout_s=20.0))
    assert set(machine.timeouts) == {20.0}
    assert max(job.max_s for job in machine.jobs) <= 16.0


def test_tables_of_an_engine_share_the_time_that_is_given_for_it():
    machine = Machine(ms={"a": 100.0})
    tables = (LatencySpec(p50_ms=500.0), LatencySpec(batch=2, p50_ms=500.0), LatencySpec(batch=3, p50_ms=500.0))
    found, findings = measured(machine, tables, max_time_s=90.0)
    assert [each.name for each in found.latencies] == ["batch=1", "batch=2", "batch=3"]
    assert machine.now - 1000.0 <= 100.0
    assert all(each.status is PASSED for each in findings.values())


def test_two_rivals_are_timed_one_after_the_other_and_share_the_time():
    machine = Machine(ms={"a": 1.0, "b": 1.0, "reference": 3.0})
    latency = LatencySpec(
        p50_ms=5.0, regression=RegressionSpec(against="b", p50=3.0), speedup=SpeedupSpec(at_least=2.0), max_time_s=60.0
    )
    found, findings = measured(machine, latency)
    assert {name: each.status for name, each in findings.items()} == {
        "latency.p50_ms": PASSED,
        "latency.regression_p50": PASSED,
        "latency.speedup": PASSED,
    }
    assert [job.subjects[1].name for job in machine.jobs] == ["b"] * 5 + ["reference"] * 5
    b, reference = found.latencies[0].comparisons
    assert b.checks == ("latency.regression_p50",)
    assert reference.checks == ("latency.speedup",)
    assert findings["latency.speedup"].estimate == pytest.approx(3.0, rel=0.02)


def test_second_rival_is_measured_when_the_first_takes_all_its_time():
    machine = Machine(ms={"a": 1.03, "b": 1.0, "reference": 3.0}, between=0.01)
    latency = LatencySpec(
        regression=RegressionSpec(against="b", p50=3.0), speedup=SpeedupSpec(at_least=2.0), max_time_s=16.0
    )
    _, findings = measured(machine, latency)
    assert findings["latency.regression_p50"].status is INCONCLUSIVE
    assert findings["latency.speedup"].status is PASSED


def test_missing_rival_fails_its_checks_and_leaves_the_others():
    def missing(against):
        if against == "baseline":
            raise BaselineError("there is no accepted baseline", where="baselines/m/a/cpu.json", hint="accept one")
        return rival(against)

    latency = LatencySpec(p50_ms=5.0, regression=RegressionSpec(), speedup=SpeedupSpec(at_least=0.5, against="b"))
    _, findings = measured(Machine(), latency, rival=missing)
    for name in ("latency.regression_p50", "latency.regression_p95"):
        assert isinstance(findings[name], Failure)
        assert findings[name].status is FAILED
        assert "there is no accepted baseline" in findings[name].message
    assert findings["latency.p50_ms"].status is findings["latency.speedup"].status is PASSED


def test_session_that_fails_fails_every_check_of_its_table_and_says_which_it_was():
    machine = Machine(fails={3: MeasurementError("the session's process was ended by SIGSEGV", where="timing 'a'")})
    tables = (against_b(p50_ms=5.0), LatencySpec(batch=2, p50_ms=5.0))
    found, findings = measured(machine, tables)
    for name in ("latency.p50_ms[batch=1]", "latency.regression_p50[batch=1]"):
        assert isinstance(findings[name], Failure)
        assert "session 3: the session's process was ended by SIGSEGV" in findings[name].message
    assert findings["latency.p50_ms[batch=2]"].status is PASSED
    assert [each.name for each in found.latencies] == ["batch=2"]


def test_engine_that_does_not_time_what_is_judged_fails():
    latency = LatencySpec(timed="gpu_compute", p50_ms=5.0)
    machine = Machine()
    _, findings = measured(machine, latency, evidence=Evidence.DEVICE)
    assert isinstance(findings["latency.p50_ms"], Failure)
    assert "'a' gave host_wall alone" in findings["latency.p50_ms"].message
    assert len(machine.jobs) == 1


def test_region_that_is_asked_for_is_what_is_compared():
    machine = Machine(regions=("enqueue", "gpu_compute"))
    latency = LatencySpec(timed="gpu_compute", regression=RegressionSpec(against="b", p50=3.0))
    found, findings = measured(machine, latency, evidence=Evidence.DEVICE)
    assert findings["latency.regression_p50"].status is PASSED
    assert found.latencies[0].timed == "gpu_compute"
    assert not machine.jobs[0].transfers


def test_gpu_is_looked_at_where_either_engine_runs_on_it():
    on_gpu = Rival("b", "engine b", subject("b"), on_gpu=True)
    for other, evidence, looked in (
        (on_gpu, Evidence.HOST, True),
        (rival("b"), Evidence.HOST, False),
        (rival("b"), Evidence.DEVICE, True),
    ):
        machine = Machine()
        measured(machine, against_b(), rival=lambda _, other=other: other, evidence=evidence)
        assert {job.on_gpu for job in machine.jobs} == {looked}


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        (
            lambda turn: Reading(subject=turn, sm_clock_mhz=1500, slowdowns=(), others=2),
            "on? to? the GPU in 5 of 5|the GPU in",
        ),
        (lambda turn: Reading(subject=turn, sm_clock_mhz=1500 - 200 * turn, slowdowns=(), others=0), "clocks differed"),
        (
            lambda turn: Reading(subject=turn, sm_clock_mhz=1500, slowdowns=("power cap",) if turn else (), others=0),
            "the GPU slowed down",
        ),
    ],
    ids=["shared", "clocks", "slowdowns"],
)
@pytest.mark.parametrize("ms", [1.0, 1.3])
def test_gpu_that_is_shared_or_slows_down_decides_no_comparison(reading, reason, ms):
    machine = Machine(ms={"a": ms, "b": 1.0}, reading=reading)
    _, findings = measured(machine, against_b(max_time_s=1e4), evidence=Evidence.DEVICE)
    finding = findings["latency.regression_p50"]
    assert finding.status is INCONCLUSIVE
    assert any(part in finding.detail for part in reason.split("|")), finding.detail


def test_gpu_that_is_shared_decides_no_budget_whether_it_is_kept_or_not():
    def shared(turn):
        return Reading(subject=turn, sm_clock_mhz=1500, slowdowns=(), others=1)

    for budget in (5.0, 0.5):
        _, findings = measured(Machine(reading=shared), LatencySpec(p50_ms=budget), evidence=Evidence.DEVICE)
        assert findings["latency.p50_ms"].status is INCONCLUSIVE
        assert "another process came to the GPU" in findings["latency.p50_ms"].detail


def test_limits_of_cells_are_judged_by_their_own_numbers():
    _, findings = measured(Machine(), LatencySpec(batch=(1, 4), p50_ms=2.0))
    assert findings["latency.p50_ms[batch=1]"].status is PASSED
    assert findings["latency.p50_ms[batch=4]"].status is FAILED


def test_every_check_that_is_asked_for_has_a_finding():
    latency = LatencySpec(batch=(1, 2), p50_ms=5.0, throughput_at_least=1.0, regression=RegressionSpec(against="b"))
    found, _ = measured(Machine(noise=0.001), latency)
    names = [each.check for each in found.findings]
    assert len(names) == len(set(names)) == 8
    assert all(isinstance(each, Finding) for each in found.findings)


def test_usage_is_measured_in_sessions_of_the_first_look():
    machine = Machine()
    timing = Timing(
        file=None,
        engine=EngineSpec(name="a", backend="onnxruntime", precision="fp32"),
        subject=subject("a"),
        evidence=Evidence.HOST,
        rival=rival,
        feeds=Batches(),
        advance=lambda: None,
        session=machine.session,
    )
    metrics, findings = measured_usage(timing, UsageSpec(cpu_percent_at_most=150.0))
    assert metrics is not None
    assert metrics.sessions == len(machine.jobs) == 5
    assert [each.status for each in findings] == [PASSED]
    machine.fails = {7: MeasurementError("the session timed out")}
    metrics, (failure,) = measured_usage(timing, UsageSpec(cpu_percent_at_most=150.0))
    assert metrics is None
    assert failure.status is FAILED
    assert "session 2: the session timed out" in failure.message
