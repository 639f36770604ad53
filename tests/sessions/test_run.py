"""Sessions as fresh processes: what they bring home, and what becomes of one that crashes, hangs or lies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gate.errors import DigestMismatch, MeasurementError, RunError, SpecError
from gate.latency.config import Cell
from gate.latency.measurement import CellTimes, MemoryUse, SessionTimes, SubjectTimes, Usage
from gate.sessions.job import JOB, TIMES, CellJob, Job, bytes_from_job, job_from_bytes
from gate.sessions.run import (
    _environment,
    error_from_bytes,
    require_job,
    run_session,
    start_code,
    times_from_bytes,
    write_feeds,
)

LIMIT_S = 120.0


def test_session_of_one_engine_brings_home_every_inference(project):
    times = run_session(project.job(project.ort()), timeout_s=LIMIT_S)
    (subject,) = times.cells[0].subjects
    assert list(subject.regions) == ["host_wall"]
    assert len(subject.regions["host_wall"]) == 20
    assert min(subject.regions["host_wall"]) > 0
    assert subject.warm_up == 5
    assert subject.leg == 8
    assert subject.span_ns >= sum(subject.regions["host_wall"])
    assert times.clock == "perf_counter_ns"
    assert times.resolution_ns >= 1
    assert times.seconds > 0.0
    assert times.usage == ()
    assert times.busy_percent is None
    assert times.cells[0].readings == ()


def test_two_engines_and_a_reference_in_pytorch_take_turns(project):
    job = project.job(project.ort(), project.torch(), cells=(project.cell(subjects=(1, 0)),))
    (cell,) = run_session(job, timeout_s=LIMIT_S).cells
    assert [len(each.regions["host_wall"]) for each in cell.subjects] == [20, 20]


def test_reference_in_onnx_is_timed_too(project):
    subject = msgspec.structs.replace(project.ort(), engine=None, file=None, sha256=None)
    (cell,) = run_session(project.job(subject), timeout_s=LIMIT_S).cells
    assert len(cell.subjects[0].regions["host_wall"]) == 20


def test_every_cell_has_its_own_batch(project):
    cells = (project.cell(batch=1, kept=5), project.cell(batch=8, kept=7))
    times = run_session(project.job(project.ort(), cells=cells), timeout_s=LIMIT_S)
    assert [len(each.subjects[0].regions["host_wall"]) for each in times.cells] == [5, 7]


def test_streams_share_the_inferences(project):
    job = project.job(project.ort(), cells=(project.cell(kept=400),), streams=2)
    (cell,) = run_session(job, timeout_s=LIMIT_S).cells
    (subject,) = cell.subjects
    assert len(subject.regions["host_wall"]) == 400
    assert subject.leg == 400
    assert subject.warm_up == 10
    assert subject.span_ns * 2 >= sum(subject.regions["host_wall"])


def test_usage_and_memory_without_a_cell(project):
    job = project.job(project.ort(), cells=(), usage_s=0.05, usage_feeds=project.feeds())
    times = run_session(job, timeout_s=LIMIT_S)
    assert times.cells == ()
    (usage,) = times.usage
    assert usage.inferences >= 1
    assert usage.seconds >= 0.05
    assert usage.cpu_percent is not None
    assert usage.energy_mj is None
    assert times.memory.host_steady_mib is not None


def test_child_of_an_engine_on_onnx_runtime_loads_neither_torch_nor_onnx(project, monkeypatch):
    blocked = project.folder / "blocked"
    blocked.mkdir()
    for name in ("torch", "onnx"):
        (blocked / f"{name}.py").write_text("raise SystemExit('heavy')")
    monkeypatch.setattr(sys, "path", [str(blocked), *sys.path])
    assert run_session(project.job(project.ort()), timeout_s=LIMIT_S).cells


def test_folder_keeps_the_files_and_old_answers_are_not_taken(project):
    folder = project.folder / "job"
    run_session(project.job(project.ort()), timeout_s=LIMIT_S, folder=folder)
    assert {JOB, TIMES} <= {each.name for each in folder.iterdir()}
    with pytest.raises(MeasurementError, match="ended with code 0 and without times"):
        run_session(project.job(project.torch("ending_well")), timeout_s=LIMIT_S, folder=folder)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("killed", r"was ended by SIGKILL while (timing|warming up) 'killed' at batch=2"),
        ("crashing", r"ended by SIGSEGV while .* 'crashing' .*its last lines: .*the driver said something"),
        ("ending", r"ended with code 3 and without times while .* 'ending'"),
        ("ending_well", r"ended with code 0 and without times while .* 'ending_well'"),
        ("exiting", r"'exiting' at batch=2: the model's own code ended the process with sys.exit\(5\)"),
        ("exiting_when_made", r"loading 'exiting_when_made': the model's own code .*sys.exit\(6\)"),
    ],
)
def test_process_that_ends_early_says_how_and_where(project, function, message):
    with pytest.raises(MeasurementError, match=message):
        run_session(project.job(project.torch(function)), timeout_s=LIMIT_S)


def test_engine_that_hangs_is_ended(project):
    started = time.perf_counter()
    with pytest.raises(MeasurementError, match=r"timed out after 8 s while \w+( up)? 'hanging'"):
        run_session(project.job(project.torch("hanging")), timeout_s=8.0)
    assert time.perf_counter() - started < 30.0


def test_interrupt_ends_the_process_and_passes(project, monkeypatch):
    written = project.folder / "pid"
    monkeypatch.setenv("TEST_PID_FILE", str(written))

    def press(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    watcher = threading.Thread(target=_press_when, args=(written,))
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_session(project.job(project.torch("hanging")), timeout_s=LIMIT_S)
    finally:
        watcher.join()
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def _press_when(path):
    """Send this process an alarm once the engine hangs."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGALRM)


def alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def gone(pid, *, within_s):
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def started_by(pid):
    """The first process that a process started."""
    deadline = time.monotonic() + LIMIT_S
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while time.monotonic() < deadline:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.001)
    raise AssertionError("no session began")


WAITING = """
import sys
from pathlib import Path
from gate.sessions.job import job_from_bytes
from gate.sessions.run import run_session

run_session(job_from_bytes(Path(sys.argv[1]).read_bytes()), timeout_s=120.0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process is ended with its parent on Linux")
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.5])
def test_process_does_not_outlive_the_gate_that_was_killed(project, after_s):
    job = project.folder / "waiting.json"
    job.write_bytes(bytes_from_job(project.job(project.torch("hanging"))))
    gate = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(job)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(project.folder)},
    )
    session = started_by(gate.pid)
    time.sleep(after_s)
    gate.kill()
    gate.wait()
    assert gone(session, within_s=5.0)


def test_process_whose_gate_is_gone_ends_before_it_imports_anything(project):
    job = project.job(project.ort())
    (project.folder / JOB).write_bytes(bytes_from_job(job))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", start_code(project.folder, parent=os.getpid() + 1)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "gate" not in [line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()]
    assert not (project.folder / TIMES).exists()


def test_search_path_with_what_is_no_text_is_passed_without_it(project, monkeypatch):
    monkeypatch.setattr(sys, "path", [Path("/somewhere"), *sys.path])
    assert run_session(project.job(project.ort()), timeout_s=LIMIT_S).cells


@pytest.mark.parametrize("timeout_s", [2.2e6, 1e12, 1e300])
def test_time_limit_beyond_what_the_system_counts_in_is_kept(project, timeout_s):
    assert run_session(project.job(project.ort()), timeout_s=timeout_s).cells


def test_time_limit_holds_over_several_slices(project, monkeypatch):
    monkeypatch.setattr("gate.sessions.run._LONGEST_POLL_S", 0.5)
    started = time.perf_counter()
    with pytest.raises(MeasurementError, match="timed out after 2 s"):
        run_session(project.job(project.torch("hanging")), timeout_s=2.0)
    assert 2.0 <= time.perf_counter() - started < 10.0


@pytest.mark.parametrize(
    ("function", "is_kept"), [("littering", False), ("littering", True), ("littering_hang", False)]
)
def test_nothing_is_left_in_the_folder_for_temporary_files(project, tmp_path, monkeypatch, function, is_kept):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    folder = project.folder / "kept" if is_kept else None
    job = project.job(project.torch(function))
    if function == "littering":
        assert run_session(job, timeout_s=LIMIT_S, folder=folder).cells
    else:
        with pytest.raises(MeasurementError, match="timed out"):
            run_session(job, timeout_s=8.0, folder=folder)
    # What PyTorch compiles is kept for other processes.
    assert [each.name for each in temporary.iterdir() if not each.name.startswith("torchinductor_")] == []
    assert folder is None or not [each for each in folder.iterdir() if each.name.startswith("litter")]


def test_what_pytorch_compiled_stays_where_it_was(monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert _environment(tmp_path)["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert _environment(tmp_path)["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_an_engine_that_crashes_when_it_is_closed_has_its_times(project):
    (cell,) = run_session(project.job(project.torch("crashing_when_closed")), timeout_s=LIMIT_S).cells
    assert len(cell.subjects[0].regions["host_wall"]) == 20


def test_error_of_the_model_is_raised_again_as_the_same_class(project):
    with pytest.raises(RunError, match="no such luck") as caught:
        run_session(project.job(project.torch("failing")), timeout_s=LIMIT_S)
    assert type(caught.value) is RunError


def test_changed_engine_file_is_refused_before_it_is_loaded(project):
    subject = project.ort()
    project.engine_file.write_bytes(b"something else")
    with pytest.raises(DigestMismatch, match="the file of 'ort' changed"):
        run_session(project.job(subject), timeout_s=LIMIT_S)


def test_engine_file_without_a_digest_or_missing_is_refused(project):
    with pytest.raises(MeasurementError, match="gives no sha256 for the file of 'ort'"):
        run_session(project.job(project.ort(sha256=None)), timeout_s=LIMIT_S)
    with pytest.raises(DigestMismatch, match="cannot be read"):
        run_session(project.job(project.ort(file=project.folder / "absent")), timeout_s=LIMIT_S)


def test_spec_that_is_missing_is_an_error_of_the_spec(project):
    subject = msgspec.structs.replace(project.ort(), spec=project.folder / "absent.toml")
    with pytest.raises(SpecError, match=r"absent\.toml"):
        run_session(project.job(subject), timeout_s=LIMIT_S)


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_missing_truncated_or_empty_feeds_are_an_error(project, content):
    path = project.folder / "other.safetensors"
    if content is not None:
        path.write_bytes(content)
    job = project.job(project.ort(), cells=(project.cell(feeds=path),))
    with pytest.raises(MeasurementError, match=r"cannot be read|holds no batch"):
        run_session(job, timeout_s=LIMIT_S)


def test_batches_of_another_size_than_the_cell_are_an_error(project):
    job = project.job(project.ort(), cells=(project.cell(batch=4, feeds=project.feeds(batch=2)),))
    with pytest.raises(MeasurementError, match=r"'x' has shape \[2, 3\], the batch is to be 4"):
        run_session(job, timeout_s=LIMIT_S)


def test_no_batch_to_write_is_an_error(tmp_path):
    for batches in ([], [{}], [{"x": np.ones(1)}, {}]):
        with pytest.raises(MeasurementError, match="no batch"):
            write_feeds(tmp_path / "feeds", batches)


def test_job_survives_its_file(project):
    job = project.job(project.ort(), project.torch(), usage_feeds=project.feeds(), order=1)
    assert job_from_bytes(bytes_from_job(job)) == job


@pytest.mark.parametrize("data", [b"", b"{}", b'{"subjects": 1}'])
def test_damaged_job_is_an_error(data):
    with pytest.raises(MeasurementError, match="is no session's job"):
        job_from_bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": ()}, "it has no engine"),
        ({"cells": ()}, "neither cells nor usage_feeds"),
        ({"leg": 0}, "leg = 0"),
        ({"streams": 0}, "streams = 0"),
        ({"warm_up_s": float("nan")}, "warm_up_s = nan"),
        ({"usage_s": 1.0}, "without usage_feeds"),
        ({"streams": 30}, "keeps 20 inferences of 30 streams"),
    ],
)
def test_job_that_contradicts_itself_is_refused(project, changes, message):
    job = msgspec.structs.replace(project.job(project.ort()), **changes)
    with pytest.raises(MeasurementError, match=message):
        run_session(job, timeout_s=LIMIT_S)


@pytest.mark.parametrize("subjects", [(), (1,), (-1,), (0, 0)])
def test_cell_of_engines_that_are_not_there_is_refused(project, subjects):
    with pytest.raises(MeasurementError, match="times the engines"):
        require_job(project.job(project.ort(), cells=(project.cell(subjects=subjects),)))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_time_limit_that_is_none_is_refused(project, timeout_s):
    with pytest.raises(MeasurementError, match="time limit is above 0 s"):
        run_session(project.job(project.ort()), timeout_s=timeout_s)


class Answers:
    """A job that was never run, and a good answer to it, to be spoiled."""

    job = Job(
        subjects=(),
        cells=(CellJob(cell=Cell(batch=1), feeds=__file__, kept=3, subjects=(0,)),),
        leg=2,
    )

    def __init__(self, project) -> None:
        self.job = msgspec.structs.replace(self.job, subjects=(project.ort(),))
        self.subject = SubjectTimes(regions={"host_wall": (5, 6, 7)}, leg=2, warm_up=1, span_ns=20)
        self.times = SessionTimes(
            cells=(CellTimes(subjects=(self.subject,)),), clock="c", resolution_ns=1, memory=MemoryUse()
        )

    def with_subject(self, **changes):
        subject = msgspec.structs.replace(self.subject, **changes)
        return msgspec.structs.replace(self.times, cells=(CellTimes(subjects=(subject,)),))


@pytest.fixture
def answers(project):
    return Answers(project)


def test_good_answer_is_taken(answers):
    assert times_from_bytes(msgspec.json.encode(answers.times), answers.job) == answers.times


@pytest.mark.parametrize("region", ["h2d", "d2h", "enqueue"])
def test_copies_and_launches_that_took_less_than_a_step_of_the_clock_are_taken(answers, region):
    found = answers.with_subject(regions={"host_wall": (5, 6, 7), region: (0, 1, 0)})
    assert times_from_bytes(msgspec.json.encode(found), answers.job) == found


def test_every_truncation_of_an_answer_is_an_error(answers):
    text = msgspec.json.encode(answers.times)
    for length in range(len(text)):
        with pytest.raises(MeasurementError, match=r"cannot be read"):
            times_from_bytes(text[:length], answers.job)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"[5,6,7]", b"[5,NaN,7]"), (b"[5,6,7]", b"[5,6.5,7]"), (b"[5,6,7]", b"[5,null,7]"), (b"host_wall", b"wall")],
)
def test_answer_with_what_is_no_duration_is_an_error(answers, old, new):
    text = msgspec.json.encode(answers.times)
    assert old in text
    with pytest.raises(MeasurementError, match="cannot be read"):
        times_from_bytes(text.replace(old, new), answers.job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": {}}, "no host_wall"),
        ({"regions": {"gpu_compute": (1, 1, 1)}}, "no host_wall"),
        ({"regions": {"host_wall": ()}}, "0 inferences of 3"),
        ({"regions": {"host_wall": (5, 6)}}, "2 inferences of 3"),
        ({"regions": {"host_wall": (5, 6, 7, 8)}}, "4 inferences of 3"),
        ({"regions": {"host_wall": (5, 0, 7)}}, "inference 1 took 0 ns in host_wall"),
        ({"regions": {"host_wall": (5, 6, -7)}}, "inference 2 took -7 ns in host_wall"),
        ({"regions": {"host_wall": (5, 6, 7), "h2d": (1, 1)}}, "2 inferences of 3 in h2d"),
        ({"regions": {"host_wall": (5, 6, 7), "h2d": (1, 1, -1)}}, "took -1 ns in h2d"),
        (
            {"regions": {"host_wall": (5, 6, 7), "enqueue": (1, -2, 1)}},
            "took -2 ns in enqueue; a duration is not below 0",
        ),
        ({"regions": {"host_wall": (5, 6, 7), "gpu_compute": (1, 1, 0)}}, "took 0 ns in gpu_compute; .* is above 0"),
        ({"regions": {"host_wall": (5, 6, 7), "latency": (1, 0, 1)}}, "took 0 ns in latency; a duration is above 0"),
        ({"leg": 3}, "legs of 3 inferences, asked for 2"),
        ({"warm_up": 0}, "0 inferences to warm up"),
        ({"span_ns": 17}, "inferences of 18 ns together were done in 17 ns"),
    ],
)
def test_answer_that_is_not_what_was_asked_for_is_an_error(answers, changes, message):
    with pytest.raises(MeasurementError, match=message):
        times_from_bytes(msgspec.json.encode(answers.with_subject(**changes)), answers.job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": ()}, "0 cells of 1"),
        ({"cells": (CellTimes(subjects=()),)}, "0 engines of 1"),
        ({"usage": (Usage(seconds=1.0, inferences=1),)}, "usage of 1 engines of 0"),
        ({"memory": MemoryUse(host_peak_mib=-1.0)}, "host_peak_mib = -1"),
        ({"resolution_ns": 0}, "steps of 0 ns"),
        ({"clock": ""}, "clock ''"),
    ],
)
def test_answer_with_other_parts_than_asked_for_is_an_error(answers, changes, message):
    times = msgspec.structs.replace(answers.times, **changes)
    with pytest.raises(MeasurementError, match=message):
        times_from_bytes(msgspec.json.encode(times), answers.job)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its reason cannot be read"),
        (b'{"error": "RunError"', "its reason cannot be read"),
        (b'{"error": "ExitCode", "message": "odd"}', "odd"),
        (b'{"error": "NoSuchClass", "message": "odd"}', "odd"),
    ],
)
def test_failure_of_no_known_class_or_damaged_is_an_error(data, message):
    raised = error_from_bytes(data)
    assert type(raised) is MeasurementError
    assert message in str(raised)


def test_session_keeps_fewer_when_its_time_is_over(project):
    both = project.job(project.ort("A"), project.ort("B"), max_s=1e-3)
    cell = project.cell(subjects=(0, 1), kept=5000)
    (times,) = run_session(msgspec.structs.replace(both, cells=(cell,)), timeout_s=LIMIT_S).cells
    assert [len(each.regions["host_wall"]) for each in times.subjects] == [16, 16]


def test_short_engines_are_timed_for_longer(project):
    both = project.job(project.ort("A"), project.ort("B"))
    cell = msgspec.structs.replace(project.cell(subjects=(0, 1), kept=16), least_s=0.3, most=100_000)
    (times,) = run_session(msgspec.structs.replace(both, cells=(cell,)), timeout_s=LIMIT_S).cells
    a, b = (len(each.regions["host_wall"]) for each in times.subjects)
    assert a == b > 16
    assert max(each.span_ns for each in times.subjects) > 0.2e9


@pytest.mark.parametrize(
    ("most", "kept", "taken"), [(80, 48, True), (75, 75, True), (80, 50, False), (40, 48, False), (0, 48, False)]
)
def test_more_inferences_than_asked_are_taken_only_in_whole_turns_and_up_to_the_most(answers, most, kept, taken):
    (cell,) = answers.job.cells
    cell = msgspec.structs.replace(cell, kept=40, least_s=1.0, most=most)
    job = msgspec.structs.replace(answers.job, cells=(cell,), leg=8)
    times = answers.with_subject(regions={"host_wall": (5,) * kept}, leg=8, span_ns=1000)
    if taken:
        assert times_from_bytes(msgspec.json.encode(times), job, seconds=5.0) == times
    else:
        with pytest.raises(MeasurementError, match=f"{kept} inferences of 40"):
            times_from_bytes(msgspec.json.encode(times), job, seconds=5.0)


def test_cells_share_the_time_of_a_session(project):
    cells = tuple(project.cell(batch=batch, kept=10**7) for batch in (1, 8))
    job = project.job(project.ort(), cells=cells, max_s=2.0)
    times = run_session(job, timeout_s=LIMIT_S)
    kept = [len(each.subjects[0].regions["host_wall"]) for each in times.cells]
    assert all(100 < each < 10**7 and each % 16 == 0 for each in kept)
    assert 1.0 < times.seconds < 10.0


def test_streams_keep_fewer_when_their_time_is_over(project):
    job = project.job(project.ort(), cells=(project.cell(kept=10**7),), streams=2, max_s=1e-3)
    (cell,) = run_session(job, timeout_s=LIMIT_S).cells
    assert len(cell.subjects[0].regions["host_wall"]) == 4


@pytest.mark.parametrize(
    ("max_s", "seconds", "kept", "taken"),
    [
        (10.0, 20.0, 16, True),
        (10.0, 20.0, 32, True),
        (10.0, 20.0, 40, True),
        (None, 20.0, 16, False),
        (10.0, 4.0, 16, False),
        (10.0, 20.0, 17, False),
        (10.0, 20.0, 8, False),
        (10.0, 20.0, 48, False),
    ],
)
def test_fewer_inferences_than_asked_are_taken_only_in_whole_turns_when_time_was_over(
    answers, max_s, seconds, kept, taken
):
    (cell,) = answers.job.cells
    job = msgspec.structs.replace(answers.job, cells=(msgspec.structs.replace(cell, kept=40),), leg=8, max_s=max_s)
    times = answers.with_subject(regions={"host_wall": (5,) * kept}, leg=8, span_ns=1000)
    data = msgspec.json.encode(times)
    if taken:
        assert times_from_bytes(data, job, seconds=seconds) == times
    else:
        with pytest.raises(MeasurementError, match=f"{kept} inferences of 40"):
            times_from_bytes(data, job, seconds=seconds)


def test_engines_that_kept_different_numbers_are_an_error(answers):
    subjects = (answers.job.subjects[0], msgspec.structs.replace(answers.job.subjects[0], name="other"))
    (cell,) = answers.job.cells
    cell = msgspec.structs.replace(cell, kept=40, subjects=(0, 1))
    job = msgspec.structs.replace(answers.job, subjects=subjects, cells=(cell,), leg=8, max_s=1.0)
    sizes = [SubjectTimes(regions={"host_wall": (5,) * kept}, leg=8, warm_up=1, span_ns=1000) for kept in (16, 32)]
    times = msgspec.structs.replace(answers.times, cells=(CellTimes(subjects=tuple(sizes)),))
    with pytest.raises(MeasurementError, match="'other': 32 inferences of 16"):
        times_from_bytes(msgspec.json.encode(times), job, seconds=5.0)


@pytest.mark.gpu
def test_regions_of_an_engine_on_the_gpu(project):
    subject = project.torch_on_gpu()
    for transfers in (True, False):
        job = project.job(subject, on_gpu=True, transfers=transfers)
        times = run_session(job, timeout_s=LIMIT_S)
        (cell,) = times.cells
        regions = cell.subjects[0].regions
        assert set(regions) >= {"host_wall", "enqueue", "gpu_compute"}
        assert ("latency" in regions) == transfers
        assert len(cell.readings) == 3
