"""Faults of what is timed, met through the command and its fresh processes: none may pass, and none may be sealed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from gate.errors import MeasurementError, RunError
from gate.latency.config import LatencySpec, RegressionSpec, SpeedupSpec, UsageSpec
from gate.latency.measurement import CellTimes, MemoryUse, Reading, SessionTimes, SubjectTimes, Usage
from gate.manifest import sha256_hex
from gate.results import LatencyMetrics
from gate.sessions.job import Job, Subject
from gate.sessions.run import run_session, times_from_bytes
from gate.spec import EngineSpec, read_spec
from gate.steps.latency import Rival, Timing, measured_latency, measured_usage
from gate.verdict import Evidence, Failure, Finding, Status
from tests.withstand.conftest import Outcome
from tests.withstand.latency_project import LatencyProject

PASSED, FAILED, INCONCLUSIVE = Status.PASSED, Status.FAILED, Status.INCONCLUSIVE

LIMITS = """  p50_ms = 1000.0
  throughput_at_least = 0.001
  regression = { against = "rival", p50 = "900 %" }
  speedup = { against = "rival", at_least = 0.01 }
"""
"""What the sound engine keeps by far: only the fault can keep it from passing."""

LATENCY = f"  [engine.latency]\n  warm_up_s = 0.0\n{LIMITS}"
USAGE = "  [engine.usage]\n  seconds = 0.05\n  cpu_percent_at_most = 100000.0\n"
LATENCY_CHECKS = {"latency.p50_ms", "latency.throughput", "latency.regression_p50", "latency.speedup"}


@pytest.fixture
def project(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> LatencyProject:
    """The folder; each test writes its spec."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return LatencyProject(tmp_path, tmp_path / "cache", capsys)


def reasons(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """Status and reason of each check that did not pass."""
    return {
        check: (finding["status"], finding.get("message") or finding.get("detail", ""))
        for check, finding in outcome.failing.items()
    }


def engine_status(outcome: Outcome) -> str:
    """The engine's verdict in the report."""
    assert outcome.report is not None, outcome.text
    (engine,) = outcome.report["engines"]
    return str(engine["verdict"]["status"])


def require_blocked(project: LatencyProject, outcome: Outcome, status: Status = FAILED) -> None:
    """No passing exit code, no passing report, no bundle."""
    assert outcome.code == {FAILED: 1, INCONCLUSIVE: 3}[status], outcome.text
    assert engine_status(outcome) == status.value
    assert not project.sealed


def test_sound_engine_passes_and_is_sealed_whatever_its_library_prints(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(LATENCY + USAGE, rival=True)
    project.fault(monkeypatch, "printing", "1,2,3,4,5,6,7,8,9,10")
    outcome = project.sealing()
    assert outcome.code == 0, outcome.text
    assert outcome.failing == {}
    assert project.sealed
    assert project.sessions() == 10


@pytest.mark.parametrize(
    ("fault", "reason", "in_usage"),
    [
        ("killed", "the session's process was ended by SIGKILL while timing 'candidate'", "was ended by SIGKILL"),
        ("ending well", "ended with code 0 and without times while timing 'candidate'", "without times"),
        ("failing", "ONNX Runtime failed: CUDA error: an illegal memory access", "illegal memory access"),
        ("clock back", "the clock perf_counter_ns went back by", "went back by"),
        ("negative", "ns in host_wall; a duration is above 0", "inferences in -1 s"),
        ("NaN", "the session's times cannot be read", "cannot be read"),
        ("truncated", "the session's times cannot be read: Input data was truncated", "truncated"),
        ("garbage", "the session's times cannot be read", "cannot be read"),
    ],
)
def test_fault_in_one_session_fails_every_check_that_rests_on_it(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str, in_usage: str
) -> None:
    project.write(LATENCY + USAGE, rival=True)
    project.fault(monkeypatch, fault, "3,5")
    outcome = project.sealing()
    require_blocked(project, outcome)
    found = reasons(outcome)
    for check in LATENCY_CHECKS:
        status, text = found[check]
        assert status == "FAILED"
        assert "session 3" in text
        assert reason in text
    (usage,) = (text for check, (_, text) in found.items() if check.startswith("usage"))
    assert "session 2" in usage
    assert in_usage in usage
    assert project.sessions() == 5
    assert "session 3" in outcome.text, "the screen says why"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hanging", "session 2: the session timed out after 3 s while timing '"),
        ("clock frozen", "took 0 ns in host_wall; a duration is above 0"),
        ("one too few", "inferences of 200 in host_wall"),
        ("full disk", "cannot be written: File too large"),
    ],
)
def test_fault_while_inferences_are_timed_fails_every_check_of_the_table(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    project.write(LATENCY + ("  session_timeout_s = 3.0\n" if fault == "hanging" else ""), rival=True)
    project.fault(monkeypatch, fault, "2" if fault == "hanging" else "3")
    outcome = project.sealing()
    require_blocked(project, outcome)
    found = reasons(outcome)
    assert set(found) == LATENCY_CHECKS
    for status, text in found.values():
        assert status == "FAILED"
        assert reason in text


def test_engine_that_dies_is_a_failing_exit_of_gate_latency_too(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("", rival=True)
    project.fault(monkeypatch, "killed", "1")
    given_ = ("--p50", "1000", "--against", "rival", "--tolerance", "900", "--cache", str(project.cache))
    outcome = project.gate("latency", f"{project.spec}::candidate", *given_)
    assert outcome.code == 1, outcome.text
    assert "session 1: the session's process was ended by SIGKILL" in outcome.text
    assert "PASSED" not in outcome.text


DYING_REFERENCE = """
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch


class Reference(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.weights = torch.nn.ParameterList(torch.tensor(each) for each in np.load("weights.npy"))

    def forward(self, x):
        self.calls += 1
        if self.calls == 40 and "gate.sessions.child" in sys.modules:
            if Path("one-session").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            Path("one-session").touch()
        for weight in self.weights:
            x = x @ weight
        return x


def load():
    return Reference().eval()
"""


def test_reference_that_kills_its_process_in_a_later_session_decides_nothing(project: LatencyProject) -> None:
    project.write(LATENCY.replace('"rival"', '"reference"'))
    weights = [numpy_helper.to_array(each) for each in onnx.load(project.folder / "reference.onnx").graph.initializer]
    np.save(project.folder / "weights.npy", np.stack(weights))
    (project.folder / "dying.py").write_text(DYING_REFERENCE)
    project.edit(('onnx = "reference.onnx"', 'factory = "dying:load"\noutput_names = ["y"]'))
    outcome = project.sealing()
    require_blocked(project, outcome)
    found = reasons(outcome)
    assert set(found) == LATENCY_CHECKS
    for _, text in found.values():
        assert "session 2: the session's process was ended by SIGKILL" in text
        assert "'candidate'" not in text, "who died is named, and it was the reference"


def test_too_little_time_decides_nothing_and_says_what_is_missing(project: LatencyProject) -> None:
    project.write(LATENCY + "  max_time_s = 0.01\n  p99_ms = 1000.0\n", rival=True)
    outcome = project.sealing()
    require_blocked(project, outcome, INCONCLUSIVE)
    found = reasons(outcome)
    assert set(found) == {*LATENCY_CHECKS, "latency.p99_ms"}
    assert {status for status, _ in found.values()} == {"INCONCLUSIVE"}
    assert "p50 needs more processes, has 1 session; raise max_time_s" in found["latency.p50_ms"][1]
    assert "p99 needs at least 459 samples, has 16" in found["latency.p99_ms"][1]
    assert "throughput needs more processes, has 1 session" in found["latency.throughput"][1]
    for check in ("latency.regression_p50", "latency.speedup"):
        assert "at least 5" in found[check][1] or "at least 200" in found[check][1]


def test_fewer_samples_than_asked_for_are_no_pass(project: LatencyProject) -> None:
    limits = "  p50_ms = 1000.0\n  throughput_at_least = 0.001\n"
    project.write(f"  [engine.latency]\n  warm_up_s = 0.0\n  samples = 100000000\n  max_time_s = 5.0\n{limits}")
    outcome = project.sealing()
    require_blocked(project, outcome, INCONCLUSIVE)
    found = reasons(outcome)
    assert set(found) == {"latency.p50_ms", "latency.throughput"}
    for _, text in found.values():
        # On a machine that is busy with something else, the fifth session has no time either.
        assert re.search(r"of the 100000000 samples that are asked for|needs more processes, has \d sessions", text)
        assert text.endswith("raise max_time_s")


def test_gpu_that_was_busy_before_decides_nothing(project: LatencyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write(LATENCY + "  max_time_s = 5.0\n", rival=True)
    project.fault(monkeypatch, "busy GPU", ",".join(map(str, range(1, 21))))
    outcome = project.sealing()
    require_blocked(project, outcome, INCONCLUSIVE)
    found = reasons(outcome)
    assert {"latency.regression_p50", "latency.speedup", "latency.p50_ms", "latency.throughput"} <= set(found)
    for _, text in found.values():
        assert "the GPU was busy before" in text
        assert "up to 97 %" in text


def test_folder_for_temporary_files_that_is_gone_is_no_pass(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(LATENCY + USAGE, rival=True)
    monkeypatch.setattr(tempfile, "tempdir", str(project.folder / "gone"))
    outcome = project.sealing()
    assert not project.sealed
    require_blocked(project, outcome)
    assert "gone" in outcome.text


def test_engine_that_is_really_slower_fails_all_that_it_breaks(project: LatencyProject) -> None:
    tables = (
        LATENCY.replace("p50_ms = 1000.0", "p50_ms = 0.00001")
        .replace("= 0.001", "= 1e9")
        .replace("900 %", "30 %")
        .replace("at_least = 0.01", "at_least = 0.8")
    )
    project.write(tables, rival=True, extra=2)
    outcome = project.sealing()
    require_blocked(project, outcome)
    found = reasons(outcome)
    assert set(found) == LATENCY_CHECKS, "its answers are right: only its time is wrong"
    assert {status for status, _ in found.values()} == {"FAILED"}
    assert "inferences are over the budget" in found["latency.p50_ms"][1]
    for check in ("latency.regression_p50", "latency.speedup"):
        assert "decided after" in found[check][1]
    assert outcome.failing["latency.regression_p50"]["estimate"] > 100.0
    assert outcome.failing["latency.speedup"]["estimate"] < 0.5


def test_only_the_batch_size_that_is_too_slow_fails(project: LatencyProject) -> None:
    project.write(
        "  [engine.latency]\n  warm_up_s = 0.0\n  samples = 100\n  batch = [1, 512]\n  p50_ms = 1.0\n", extra=1
    )
    outcome = project.sealing()
    require_blocked(project, outcome)
    assert outcome.report is not None
    (engine,) = outcome.report["engines"]
    latency = {
        each["check"]: each["status"] for each in engine["verdict"]["findings"] if each["check"].startswith("latency.")
    }
    assert latency == {"latency.p50_ms[batch=1]": "PASSED", "latency.p50_ms[batch=512]": "FAILED"}


STAGES = """  [engine.stages]
  samples = 60
  p50_ms = { total = 1000.0 }
  p95_ms = { inference = 1000.0 }
"""


def test_stages_of_too_few_samples_are_not_decided(project: LatencyProject) -> None:
    project.write(STAGES.replace("60", "6"))
    outcome = project.sealing()
    require_blocked(project, outcome, INCONCLUSIVE)
    found = reasons(outcome)
    assert "p50 needs at least 7 samples, has 6; raise samples" in found["stages.p50_ms[total]"][1]
    assert "p95 needs at least 90 samples, has 6; raise samples" in found["stages.p95_ms[inference]"][1]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("clock back", r"stage inference: inference \d+ took -\d+ ns; a duration is above 0"),
        ("clock frozen", r"stage inference: inference \d+ took 0 ns; a duration is above 0"),
        ("failing", r"ONNX Runtime failed: CUDA error: an illegal memory access"),
    ],
)
def test_fault_while_stages_are_timed_fails_each_of_their_budgets(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    project.write(STAGES)
    project.fault(monkeypatch, fault, "check")
    done = project.sealing_in_a_process()
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((project.folder / "report" / "report.json").read_bytes())
    outcome = Outcome(done.returncode, done.stdout, report)
    require_blocked(project, outcome)
    found = reasons(outcome)
    for check in ("stages.p50_ms[total]", "stages.p95_ms[inference]"):
        assert found[check][0] == "FAILED"
        assert re.search(reason, found[check][1]), found


def test_check_that_is_killed_while_stages_are_timed_leaves_no_report_and_no_bundle(
    project: LatencyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(STAGES)
    project.fault(monkeypatch, "killed", "check")
    done = project.sealing_in_a_process()
    assert done.returncode == -9
    assert not (project.folder / "report" / "report.json").exists()
    assert not project.sealed


def subject(name: str) -> Subject:
    """An engine that nothing loads."""
    return Subject(name=name, spec=Path("gate.toml"))


class OneBatch:
    """As `gate.steps.feeds.Feeds`."""

    def batches(self, cell: object) -> list[dict[str, np.ndarray]]:
        """A batch of ones."""
        return [{"input": np.ones((1, 4), np.float32)}]


@dataclass
class Sessions:
    """Answers jobs as a session would, of engines `a` and `b`, and holds each answer against its job as the gate does.

    A session has time for all that is asked, so that one with fewer inferences has lost some, unless `keeps` says other.

    Args:
        ms: What an inference takes, by the engine's name.
        reading: What the GPU says after a leg of an engine.
        busy_percent: Of the GPU before.
        usage: What each engine takes.
        spoil: What becomes of the answer of a session, by its number from 1; it may raise.
        takes_s: Seconds that a session takes of the time of all.
        keeps: Inferences for which a session has time.
        others: Which engine took turns with `a` in each session; None: none.
    """

    ms: dict[str, float] = field(default_factory=lambda: {"a": 1.0, "b": 1.0})
    reading: Callable[[int], Reading] | None = None
    busy_percent: int | None = None
    usage: Usage | None = None
    spoil: Callable[[int, bytes], bytes] = lambda _, data: data
    takes_s: float = 1.0
    keeps: int | None = None
    others: list[str | None] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)

    def clock(self) -> float:
        """Seconds."""
        return self.takes_s * self.done

    def session(self, job: Job, timeout_s: float) -> SessionTimes:
        """One session."""
        self.done += 1
        self.others.append(job.subjects[1].name if len(job.subjects) > 1 else None)
        cells = []
        for cell in job.cells:
            names = [job.subjects[each].name for each in cell.subjects]
            leg = job.leg if job.streams == 1 else cell.kept
            kept = cell.kept if self.keeps is None else min(cell.kept, self.keeps)
            readings = () if self.reading is None else tuple(map(self.reading, range(len(names)))) * 4
            cells.append(CellTimes(subjects=tuple(self._times(name, kept, leg) for name in names), readings=readings))
        times = SessionTimes(
            cells=tuple(cells),
            usage=(self.usage,) * len(job.subjects) if self.usage is not None and job.usage_s > 0.0 else (),
            memory=MemoryUse(),
            clock="perf_counter_ns",
            resolution_ns=1,
            busy_percent=self.busy_percent,
        )
        seconds = 0.0 if self.keeps is None else timeout_s
        return times_from_bytes(self.spoil(self.done, msgspec.json.encode(times)), job, seconds=seconds)

    def _times(self, name: str, kept: int, leg: int) -> SubjectTimes:
        values = (self.ms[name] * 1e6 * np.exp(self.random.normal(0.0, 0.002, kept))).astype(int).tolist()
        return SubjectTimes(regions={"host_wall": tuple(values)}, leg=leg, warm_up=200, span_ns=sum(values))

    def timing(self, latency: LatencySpec | None = None) -> Timing:
        """The judging step on these sessions."""
        engine = EngineSpec(name="a", backend="onnxruntime", precision="fp32", latency=latency)
        return Timing(
            file=None,
            engine=engine,
            subject=subject("a"),
            evidence=Evidence.DEVICE,
            rival=lambda against: Rival(against, f"engine {against}", subject(against), on_gpu=True),
            feeds=OneBatch(),
            advance=lambda: None,
            session=self.session,
            clock=self.clock,
        )

    def measured(self, latency: LatencySpec) -> dict[str, Finding | Failure]:
        """Findings by check."""
        return {each.check: each for each in measured_latency(self.timing(latency)).findings}


def reading(turn: int, **more: object) -> Reading:
    """A GPU at its clock, by itself."""
    return msgspec.structs.replace(Reading(subject=turn, sm_clock_mhz=1500, slowdowns=(), others=0), **more)


DISTURBED = {
    "another process": ({"reading": lambda turn: reading(turn, others=1)}, "another process came to the GPU in"),
    "busy before": ({"busy_percent": 90}, "the GPU was busy before"),
    "throttled": ({"reading": lambda turn: reading(turn, slowdowns=("power cap",))}, "the GPU slowed down in 100 %"),
}
UNEQUAL = {
    **{name: DISTURBED[name] for name in ("another process", "busy before")},
    "clocks": ({"reading": lambda turn: reading(turn, sm_clock_mhz=1500 - 180 * turn)}, "clocks differed by 12 %"),
    "one throttled": (
        {"reading": lambda turn: reading(turn, slowdowns=("heat",) if turn else ())},
        "the GPU slowed down (heat) in 0 % of A's legs and 100 % of B's",
    ),
}
COMPARED = LatencySpec(
    regression=RegressionSpec(against="b", p50=10.0), speedup=SpeedupSpec(against="b", at_least=0.9), max_time_s=1e4
)
BUDGETS = LatencySpec(p50_ms=2.0, p99_ms=2.0, throughput_at_least=500.0, max_time_s=1e4)


@pytest.mark.parametrize("disturbance", UNEQUAL)
@pytest.mark.parametrize("slower", [0.95, 1.0, 1.3])
def test_comparison_on_a_gpu_that_treats_engines_differently_is_not_decided(disturbance: str, slower: float) -> None:
    undisturbed = Sessions(ms={"a": slower, "b": 1.0}, reading=reading, busy_percent=0).measured(COMPARED)
    assert {each.status for each in undisturbed.values()} == {FAILED if slower > 1.0 else PASSED}
    more, reason = UNEQUAL[disturbance]
    found = Sessions(ms={"a": slower, "b": 1.0}, **{"reading": reading, **more}).measured(COMPARED)
    assert set(found) == {"latency.regression_p50", "latency.speedup"}
    for finding in found.values():
        assert finding.status is INCONCLUSIVE
        assert reason in finding.detail


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_budget_that_a_disturbed_gpu_breaks_is_not_decided(disturbance: str) -> None:
    more, reason = DISTURBED[disturbance]
    found = Sessions(ms={"a": 3.0}, **{"reading": reading, **more}).measured(BUDGETS)
    assert set(found) == {"latency.p50_ms", "latency.p99_ms", "latency.throughput"}
    for finding in found.values():
        assert finding.status is INCONCLUSIVE
        assert reason in finding.detail


@pytest.mark.parametrize(
    "limits",
    [{"gpu_percent_at_least": 80.0}, {"power_w": 100.0}, {"energy_mj": 1.0}],
    ids=lambda each: next(iter(each)),
)
def test_usage_of_a_gpu_that_another_process_loads_is_not_decided(limits: dict[str, float]) -> None:
    """The driver's utilisation, power and energy are of the whole GPU, so they are the other process's, too."""
    took = Usage(seconds=1.0, inferences=100, energy_mj=400_000.0, power_w=400.0, gpu_percent=99.0, cpu_percent=100.0)
    _, (alone,) = measured_usage(Sessions(usage=took, busy_percent=0).timing(), UsageSpec(**limits))
    assert alone.status is (PASSED if "gpu_percent_at_least" in limits else FAILED)
    _, (finding,) = measured_usage(Sessions(usage=took, busy_percent=90).timing(), UsageSpec(**limits))
    assert isinstance(finding, Finding)
    assert finding.status is INCONCLUSIVE
    assert "the GPU was busy before" in finding.detail


def test_cpu_time_is_decided_whatever_the_gpu_does() -> None:
    took = Usage(seconds=1.0, inferences=100, cpu_percent=100.0)
    for limit, status in ((150.0, PASSED), (50.0, FAILED)):
        _, (finding,) = measured_usage(
            Sessions(usage=took, busy_percent=90).timing(), UsageSpec(cpu_percent_at_most=limit)
        )
        assert finding.status is status


def test_sessions_timed_by_different_clocks_decide_nothing() -> None:
    def other_clock(number: int, data: bytes) -> bytes:
        return data.replace(b"perf_counter_ns", b"monotonic_ns") if number == 3 else data

    for asked in (BUDGETS, COMPARED):
        for finding in Sessions(spoil=other_clock).measured(asked).values():
            assert isinstance(finding, Failure)
            assert "sessions were timed by perf_counter_ns, monotonic_ns; one clock times them all" in finding.message


@pytest.mark.parametrize("name", ["power_w", "energy_mj", "gpu_percent", "cpu_percent"])
def test_usage_that_one_session_does_not_know_fails(name: str) -> None:
    known = {"energy_mj": 100.0, "power_w": 1.0, "gpu_percent": 99.0, "cpu_percent": 1.0}
    good = Usage(seconds=1.0, inferences=100, **known)
    key = {"gpu_percent": "gpu_percent_at_least", "cpu_percent": "cpu_percent_at_most"}.get(name, name)
    limit = UsageSpec(**{key: 50.0})

    def lost(number: int, data: bytes) -> bytes:
        text = f'"{name}":{known[name]}'.encode()
        assert text in data
        return data.replace(text, f'"{name}":null'.encode()) if number == 3 else data

    _, (sound,) = measured_usage(Sessions(usage=good).timing(), limit)
    assert sound.status is PASSED
    _, (finding,) = measured_usage(Sessions(usage=good, spoil=lost).timing(), limit)
    assert finding.status is FAILED
    assert "the system does not say what it is" in finding.detail


def test_usage_of_an_engine_that_hangs_fails(project: LatencyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write(USAGE)
    project.fault(monkeypatch, "hanging", "1")
    file = read_spec(project.spec)
    path = project.folder / "engine.onnx"
    engine = Subject(
        name="candidate",
        spec=project.spec,
        engine=file.engine("candidate"),
        file=path,
        sha256=sha256_hex(path.read_bytes()),
    )

    class Rows(OneBatch):
        def batches(self, cell: object) -> list[dict[str, np.ndarray]]:
            return [{"x": np.ones((1, 64), np.float32)}]

    timing = replace(
        Sessions().timing(),
        subject=engine,
        feeds=Rows(),
        evidence=Evidence.HOST,
        session=lambda job, _: run_session(job, timeout_s=3.0),
    )
    metrics, (failure,) = measured_usage(timing, UsageSpec(seconds=0.05, cpu_percent_at_most=1e5))
    assert metrics is None
    assert isinstance(failure, Failure)
    assert "session 1: the session timed out after 3 s while measuring what 'candidate' takes" in failure.message


def _without(key: str) -> Callable[[bytes], bytes]:
    def cut(data: bytes) -> bytes:
        raw = msgspec.json.decode(data)
        del raw[key]
        return msgspec.json.encode(raw)

    return cut


def _in_subjects(change: Callable[[dict[str, object]], None], *, last: bool = False) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        raw = msgspec.json.decode(data)
        change(raw["cells"][-1]["subjects"][-1 if last else 0])
        return msgspec.json.encode(raw)

    return changed


def _at(index: int, value: object) -> Callable[[dict[str, object]], None]:
    def change(times: dict[str, object]) -> None:
        walls = times["regions"]["host_wall"]  # type: ignore[index]
        walls[index % len(walls)] = value

    return change


def _shorter(by: int) -> Callable[[dict[str, object]], None]:
    def change(times: dict[str, object]) -> None:
        del times["regions"]["host_wall"][-by:]  # type: ignore[index]

    return change


def _raising(error: Exception) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        raise error

    return spoil


SPOILED = st.one_of(
    st.integers(0, 1000).map(lambda length: lambda data: data[: min(length, len(data) - 1)]),
    st.sampled_from(["cells", "clock", "memory", "resolution_ns"]).map(_without),
    st.tuples(
        st.integers(0, 10**6), st.sampled_from([0, -1, -(10**12), None, 1.5, "1", True, 2**80]), st.booleans()
    ).map(lambda each: _in_subjects(_at(each[0], each[1]), last=each[2])),
    st.tuples(st.integers(1, 300), st.booleans()).map(lambda each: _in_subjects(_shorter(each[0]), last=each[1])),
    st.sampled_from(
        [
            lambda data: b"",
            lambda data: data.replace(b'"host_wall"', b'"gpu_compute"'),
            lambda data: data.replace(b'"span_ns":', b'"span_ns":-'),
            lambda data: data.replace(b'"warm_up":200', b'"warm_up":0'),
            lambda data: data.replace(b'"leg":', b'"leg":1'),
            _in_subjects(lambda times: times.update(span_ns=1)),
            _in_subjects(lambda times: times["regions"].update(d2h=[1])),  # type: ignore[attr-defined]
            _in_subjects(lambda times: times.update(regions={})),
            _raising(MeasurementError("the session timed out after 300 s")),
            _raising(RunError("out of memory")),
        ]
    ),
)
"""What may become of an answer."""

ASKED = st.sampled_from(
    [
        LatencySpec(p50_ms=2.0, p95_ms=2.0, p99_9_ms=2.0),
        LatencySpec(p99_ms=2.0, throughput_at_least=100.0, samples=2500),
        LatencySpec(throughput_at_least=100.0, p50_ms=2.0, streams=2),
        LatencySpec(regression=RegressionSpec(against="b", p50=20.0)),
        LatencySpec(speedup=SpeedupSpec(against="b", at_least=0.5), batch=(1, 8)),
        LatencySpec(p90_ms=2.0, regression=RegressionSpec(against="b", p50=20.0), speedup=SpeedupSpec(at_least=0.5)),
    ]
)


@settings(max_examples=150)
@given(
    asked=ASKED,
    spoiled=st.dictionaries(st.integers(1, 10), SPOILED, max_size=2),
    most=st.one_of(st.integers(1, 6), st.just(100)),
    keeps=st.one_of(st.none(), st.integers(1, 40).map(lambda turns: 16 * turns)),
)
def test_nothing_passes_when_an_answer_is_spoiled_or_missing(
    asked: LatencySpec, spoiled: dict[int, Callable[[bytes], bytes]], most: int, keeps: int | None
) -> None:
    reached: list[int] = []

    def spoil(number: int, data: bytes) -> bytes:
        # What lost some inferences cannot be told from what had time for fewer.
        if keeps is not None or number not in spoiled:
            return data
        reached.append(number)
        return spoiled[number](data)

    sessions = Sessions(ms={"a": 1.0, "b": 1.0, "reference": 1.0}, spoil=spoil, keeps=keeps)
    spec = msgspec.structs.replace(asked, max_time_s=most + 0.5, warm_up_s=0.0)
    made = measured_latency(sessions.timing(spec))
    assert made.findings
    broken = [sessions.others[number - 1] for number in reached]
    assert len(set(broken)) == len(broken), "what fails ends its sessions"
    for finding in made.findings:
        if rests_on(finding, spec) in broken:
            event("an answer was spoiled")
            assert isinstance(finding, Failure)
            assert "session " in finding.message
            continue
        assert isinstance(finding, Finding)
        (latency,) = (each for each in made.latencies if f"[{each.name}]" in finding.check or not each.name)
        missing = is_missing(finding, latency, spec)
        event("data are missing" if missing else "nothing is missing")
        assert (finding.status is PASSED) != missing, finding
        assert not missing or finding.detail


def rests_on(finding: Finding | Failure, spec: LatencySpec) -> str | None:
    """Which other engine took turns in the sessions that a finding rests on."""
    if "latency.regression" in finding.check and spec.regression is not None:
        return spec.regression.against
    if "latency.speedup" in finding.check and spec.speedup is not None:
        return spec.speedup.against
    return spec.rivals[0] if spec.rivals else None


def is_missing(finding: Finding, latency: LatencyMetrics, spec: LatencySpec) -> bool:
    """Whether there is less than the documentation says that it takes to pass."""
    for comparison in latency.comparisons:
        if finding.check in comparison.checks:
            kept = sum(len(each.a_ns) for each in comparison.pairs)
            return comparison.sessions < 5 or kept < 200 * comparison.sessions
    name = finding.check.removeprefix("latency.").partition("[")[0]
    least = {"p50_ms": 7, "p90_ms": 44, "p95_ms": 90, "p99_ms": 459, "p99_9_ms": 4603}.get(name, 1)
    return latency.sessions < 5 or latency.n < max(least, spec.samples or 0)


LOAD = """
import sys
import torch
a = torch.randn(8192, 8192, device="cuda")
b = a @ a
torch.cuda.synchronize()
print("loading", flush=True)
while True:
    for _ in range(20):
        b = a @ a
    torch.cuda.synchronize()
"""

ON_GPU = """
import torch


def load():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))).eval()
"""


@pytest.mark.gpu
def test_gpu_that_a_second_process_loads_decides_no_comparison_and_fails_no_budget(
    project: LatencyProject,
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA here")
    project.write("")
    (project.folder / "on_gpu.py").write_text(ON_GPU)
    project.edit(('onnx = "reference.onnx"', 'factory = "on_gpu:load"\ndevice = "cuda"'))

    class Rows(OneBatch):
        def batches(self, cell: object) -> list[dict[str, np.ndarray]]:
            return [{"x": np.full((1, 64), index, np.float32)} for index in range(4)]

    def measured(latency: LatencySpec) -> dict[str, Finding | Failure]:
        reference = Subject(name="reference", spec=project.spec)
        timing = replace(
            Sessions().timing(latency),
            subject=reference,
            feeds=Rows(),
            session=lambda job, timeout_s: run_session(job, timeout_s=timeout_s),
            clock=time.monotonic,
            rival=lambda against: Rival(against, "the same", reference, on_gpu=True),
        )
        return {each.check: each for each in measured_latency(timing).findings}

    compared = LatencySpec(
        warm_up_s=0.1,
        max_time_s=90.0,
        p50_ms=1e-6,
        regression=RegressionSpec(against="b", p50=900.0),
        speedup=SpeedupSpec(against="b", at_least=0.1),
    )
    with subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True) as load:
        try:
            assert load.stdout is not None
            assert load.stdout.readline() == "loading\n"
            found = measured(compared)
            assert load.poll() is None, "it was there all the time"
        finally:
            load.kill()
    for finding in found.values():
        assert isinstance(finding, Finding), finding
        assert finding.status is INCONCLUSIVE
        assert "the GPU was busy before" in finding.detail or "another process came to the GPU" in finding.detail
    alone = measured(compared)
    assert alone["latency.p50_ms"].status is FAILED
    assert alone["latency.regression_p50"].status is PASSED, alone
    assert alone["latency.speedup"].status is PASSED, alone
