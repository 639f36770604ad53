"""Starts a session in a fresh process, ends one that hangs, and believes nothing of its answer unchecked."""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from gate import atomic, errors
from gate.errors import GateError, MeasurementError
from gate.latency.measurement import LEAST_NS, CellTimes, SessionTimes, SubjectTimes
from gate.sessions.job import FAILED, JOB, PHASE, STDERR, STDOUT, TIMES, CellJob, Failure, Job, bytes_from_job
from gate.tensors import NamedArrays

_LAST_LINES = 3
_LAST_BYTES = 1 << 16
_LINE_CHARACTERS = 300
_AFTER_KILL_S = 10.0
_LONGEST_POLL_S = 86_400.0

_START = """import sys; sys.path[:] = {path!r}
import ctypes, os
sys.platform == "linux" and ctypes.CDLL(None).prctl(1, 9)
os.getppid() == {parent} or os._exit(1)
from gate.sessions.child import run; run({folder!r})"""
"""What the process begins with: the same search path as here (`-c` would put the working folder first, and a torch.py
in it before torch), and then, before anything heavy is imported, the wish to be ended with the process that waits for
it: a GPU would stay busy otherwise. That one may be gone already.

Source: linux/prctl.h, PR_SET_PDEATHSIG = 1; SIGKILL = 9."""


def run_session(job: Job, *, timeout_s: float, folder: Path | None = None) -> SessionTimes:
    """Measure in a fresh process that imports the same `gate` as this one, in the same environment.

    Args:
        job: What is asked for. Its paths start from the working folder.
        timeout_s: The process and all that it started are ended after this long.
        folder: For the job's files, which stay; None: a temporary one.

    What the process leaves in its folder for temporary files goes with it: that is its own.

    Raises:
        GateError: What the process raised, as the same class.
        MeasurementError: The job contradicts itself; the process crashed, hung or ended without times; or its times are
            not what was asked for.
    """
    require_job(job)
    if not 0.0 < timeout_s < math.inf:
        raise MeasurementError(f"a session's time limit is above 0 s, got {timeout_s:g} s")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gate-session-", ignore_cleanup_errors=True) as temporary:
        return _run(job, timeout_s, folder or Path(temporary), scratch=Path(temporary) / "tmp")


def write_feeds(path: Path, batches: Sequence[NamedArrays]) -> None:
    """Write batches for a session: tensors `<index>/<input>`.

    Args:
        path: A safetensors file. Its folder is made.
        batches: At least one, all of the same inputs and shapes.

    Raises:
        MeasurementError: There is none, one has no inputs, or the file cannot be written.
    """
    from safetensors.numpy import save

    if not batches or not all(batches):
        raise MeasurementError("there is no batch to run, so nothing would be timed")
    # safetensors writes the memory as it lies, so the order must be C.
    arrays = {
        f"{index}/{name}": np.asarray(array, order="C")
        for index, batch in enumerate(batches)
        for name, array in batch.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(arrays))
    except OSError as err:
        raise MeasurementError(f"the inputs cannot be written: {err.strerror or err}", where=str(path)) from err


def times_from_bytes(data: bytes, job: Job, *, seconds: float = math.inf) -> SessionTimes:
    """What a session wrote, held against what it was asked for.

    Args:
        data: JSON.
        job: What was asked for.
        seconds: How long its process ran: fewer inferences than asked are taken only where its time was over.

    Raises:
        MeasurementError: It is damaged, or has other numbers of cells, engines or inferences than asked, a duration
            that is not above 0, or inferences that took longer than all of them together.
    """
    try:
        times = msgspec.json.decode(data, type=SessionTimes)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise MeasurementError(f"the session's times cannot be read: {err}", where=TIMES) from err
    if wrong := next(_wrong(times, job, seconds), None):
        raise MeasurementError(f"the session's times are not what was asked for: {wrong}", where=TIMES)
    return times


def error_from_bytes(data: bytes) -> GateError:
    """What a session's process raised, from what it wrote; a MeasurementError where its class is none of gate.errors."""
    try:
        told = msgspec.json.decode(data, type=Failure)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return MeasurementError("the session failed, and its reason cannot be read", where=FAILED)
    kind = getattr(errors, told.error, None)
    if not (isinstance(kind, type) and issubclass(kind, GateError)):
        kind = MeasurementError
    return kind(told.message, where=told.where, hint=told.hint)


def require_job(job: Job) -> None:
    """Refuse a job that contradicts itself.

    Raises:
        MeasurementError: It does; says where.
    """
    if wrong := next(_contradictions(job), None):
        raise MeasurementError(f"the session's job contradicts itself: {wrong}")


def _contradictions(job: Job) -> Iterator[str]:
    if not job.subjects:
        yield "it has no engine"
    if job.leg < 1 or job.discard < 0 or job.streams < 1 or job.warm_up_calls < 1:
        yield f"leg = {job.leg}, discard = {job.discard}, streams = {job.streams}, warm_up_calls = {job.warm_up_calls}"
    if not 0.0 <= job.warm_up_s < math.inf or not 0.0 <= job.usage_s < math.inf:
        yield f"warm_up_s = {job.warm_up_s:g}, usage_s = {job.usage_s:g}"
    if job.max_s is not None and not 0.0 < job.max_s < math.inf:
        yield f"max_s = {job.max_s:g}"
    if job.usage_s > 0.0 and job.usage_feeds is None:
        yield "usage_s is given without usage_feeds"
    if not job.cells and job.usage_feeds is None:
        yield "it has neither cells nor usage_feeds, so nothing would run"
    for index, cell in enumerate(job.cells):
        known = all(0 <= each < len(job.subjects) for each in cell.subjects)
        if not known or len(cell.subjects) not in (1, 2) or len(set(cell.subjects)) != len(cell.subjects):
            yield f"cell {index} times the engines {list(cell.subjects)} of {len(job.subjects)}"
        if cell.kept < job.streams:
            yield f"cell {index} keeps {cell.kept} inferences of {job.streams} streams"
        if job.streams > 1 and len(cell.subjects) > 1:
            yield f"cell {index} times two engines in turn in {job.streams} streams"


def _run(job: Job, timeout_s: float, folder: Path, *, scratch: Path) -> SessionTimes:
    for name in (TIMES, FAILED, PHASE):
        (folder / name).unlink(missing_ok=True)
    atomic.write_bytes(folder / JOB, bytes_from_job(job))
    scratch.mkdir()
    started = time.perf_counter()
    with (folder / STDOUT).open("wb") as out, (folder / STDERR).open("wb") as err:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", start_code(folder, parent=os.getpid())],
                env=_environment(scratch),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as failure:
            raise MeasurementError(f"a session's process cannot be started: {failure}") from failure
    try:
        code_or_none = _wait(process, timeout_s)
    finally:
        _end(process)
    seconds = time.perf_counter() - started
    if (folder / FAILED).is_file():
        raise error_from_bytes((folder / FAILED).read_bytes())
    if code_or_none is None:
        raise MeasurementError(
            f"the session timed out after {timeout_s:g} s while {_phase(folder)}{_last_said(folder)}",
            hint="Set session_timeout_s higher where the engine does not hang.",
        )
    if code_or_none != 0 or not (folder / TIMES).is_file():
        raise _died(code_or_none, folder)
    times = times_from_bytes((folder / TIMES).read_bytes(), job, seconds=seconds)
    return msgspec.structs.replace(times, seconds=seconds)


def start_code(folder: Path, *, parent: int) -> str:
    """What the process of a session runs.

    Args:
        folder: Of its job.
        parent: Number of the process that waits for it.
    """
    # Whatever somebody put there: Python skips what is no text.
    given: Sequence[object] = sys.path
    path = [each for each in given if isinstance(each, str)]
    return _START.format(path=path, parent=parent, folder=str(folder))


def _environment(scratch: Path) -> dict[str, str]:
    """This process's, with another folder for temporary files.

    What PyTorch compiled stays where it was, since every session would compile it again.

    Source: torch/_inductor/runtime/cache_dir_utils.py, default_cache_dir.
    """
    found = {**os.environ, "TMPDIR": str(scratch)}
    if "TORCHINDUCTOR_CACHE_DIR" not in found:
        try:
            user = getpass.getuser()
        except (KeyError, ModuleNotFoundError, OSError):
            user = f"uid_{os.getuid()}"
        name = re.sub(r'[\\/:*?"<>|]', "_", user)
        found["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"torchinductor_{name}")
    return found


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The exit code of a process, minus the signal that ended it; None where it still runs after so long.

    It sleeps until then: `Popen.wait` with a timeout wakes up 20 times a second, beside what is timed.
    """
    pidfd_open = getattr(os, "pidfd_open", None)
    if pidfd_open is not None:
        with contextlib.suppress(OSError):
            file = pidfd_open(process.pid)
            try:
                poll = select.poll()
                poll.register(file, select.POLLIN)
                deadline = time.monotonic() + timeout_s
                # In slices: the system counts the milliseconds of one in 32 bits.
                while not poll.poll(1000.0 * max(min(deadline - time.monotonic(), _LONGEST_POLL_S), 0.0)):
                    if time.monotonic() >= deadline:
                        return None
            finally:
                os.close(file)
            # What it started and left behind goes before its number can be another's.
            _kill(process)
            return process.wait()
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and all that it started."""
    if process.returncode is None:
        _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_AFTER_KILL_S)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the group of a process that was not waited for yet, so that the number is still its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _died(code: int, folder: Path) -> MeasurementError:
    hint = None
    if code < 0:
        try:
            how = f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was ended by signal {-code}"
        if -code == signal.SIGKILL:
            hint = "Linux ends a process so when memory runs out: see `dmesg`, or measure fewer engines at once."
    else:
        how = f"ended with code {code} and without times"
    return MeasurementError(f"the session's process {how} while {_phase(folder)}{_last_said(folder)}", hint=hint)


def _phase(folder: Path) -> str:
    """What the process did last."""
    try:
        text = (folder / PHASE).read_bytes().decode(errors="replace").strip(" \0\n")
    except OSError:
        text = ""
    return text or "starting"


def _last_said(folder: Path) -> str:
    """The last lines of its stderr, for the end of a sentence."""
    try:
        with (folder / STDERR).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _LAST_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip()[:_LINE_CHARACTERS] for line in text.splitlines() if line.strip()]
    return f"; its last lines: {' · '.join(lines[-_LAST_LINES:])}" if lines else ""


def _wrong(times: SessionTimes, job: Job, seconds: float) -> Iterator[str]:
    if len(times.cells) != len(job.cells):
        yield f"{len(times.cells)} cells of {len(job.cells)}"
        return
    for index, (cell, asked) in enumerate(zip(times.cells, job.cells, strict=True)):
        for reason in _wrong_in_cell(cell, asked, job, seconds):
            yield f"cell {index}: {reason}"
    expected = len(job.subjects) if job.usage_s > 0.0 else 0
    if len(times.usage) != expected:
        yield f"usage of {len(times.usage)} engines of {expected}"
    for usage in times.usage:
        if usage.inferences < 1 or not usage.seconds > 0.0:
            yield f"{usage.inferences} inferences in {usage.seconds:g} s"
        yield from _below_zero(msgspec.to_builtins(usage))
    yield from _below_zero(msgspec.to_builtins(times.memory))
    if times.resolution_ns < 1 or not times.clock:
        yield f"clock {times.clock!r} with steps of {times.resolution_ns} ns"


def _wrong_in_cell(cell: CellTimes, asked: CellJob, job: Job, seconds: float) -> Iterator[str]:
    if len(cell.subjects) != len(asked.subjects):
        yield f"{len(cell.subjects)} engines of {len(asked.subjects)}"
        return
    leg = job.leg if job.streams == 1 else asked.kept
    kept = _kept(cell, asked, job, seconds)
    for turn, times in enumerate(cell.subjects):
        name = job.subjects[asked.subjects[turn]].name
        for reason in _wrong_in_subject(times, kept=kept, leg=leg, streams=job.streams):
            yield f"{name!r}: {reason}"
    if strange := [each.subject for each in cell.readings if not 0 <= each.subject < len(cell.subjects)]:
        yield f"a reading of engine {strange[0]} of {len(cell.subjects)}"


def _kept(cell: CellTimes, asked: CellJob, job: Job, seconds: float) -> int:
    """How many inferences of each engine there must be: as many as asked for, unless the job's time was over.

    Then it is what the first engine has, where that is two legs or more and whole turns. No turn begins that would not
    end in time, so half of a cell's share of the time is over at the least. Where more are kept, they are whole turns, too.
    """
    found = len(cell.subjects[0].regions.get("host_wall", ()))
    if job.streams == 1 and asked.kept < found <= asked.most and (found % (2 * job.leg) == 0 or found == asked.most):
        return found
    if job.max_s is None or seconds < job.max_s / len(job.cells) / 2.0:
        return asked.kept
    if job.streams > 1:
        return found if 2 * job.streams <= found < asked.kept else asked.kept
    return found if 0 < found < asked.kept and found % (2 * job.leg) == 0 else asked.kept


def _wrong_in_subject(times: SubjectTimes, *, kept: int, leg: int, streams: int) -> Iterator[str]:
    if "host_wall" not in times.regions:
        yield "no host_wall"
        return
    for region, durations in times.regions.items():
        if len(durations) != kept:
            yield f"{len(durations)} inferences of {kept} in {region}"
        elif (least := min(durations)) < LEAST_NS[region]:
            bound = "above 0" if LEAST_NS[region] else "not below 0"
            yield f"inference {durations.index(least)} took {least} ns in {region}; a duration is {bound}"
    if times.leg != leg:
        yield f"legs of {times.leg} inferences, asked for {leg}"
    if times.warm_up < 1:
        yield f"{times.warm_up} inferences to warm up"
    if times.span_ns * streams < (wall := sum(times.regions["host_wall"])):
        yield f"inferences of {wall} ns together were done in {times.span_ns} ns on {streams} stream(s)"


def _below_zero(values: Mapping[str, float | None]) -> Iterator[str]:
    for name, value in values.items():
        if value is not None and not 0.0 <= value < math.inf:
            yield f"{name} = {value:g}"
