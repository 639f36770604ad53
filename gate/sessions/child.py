"""The fresh process of a session: loads the engines, times them, and writes raw durations."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from gate import atomic
from gate.cache import Cache
from gate.engines import backend as backend_named
from gate.engines.interface import RegionTimed, Renewable, Resources, Runner
from gate.errors import BackendUnavailable, DigestMismatch, GateError, MeasurementError
from gate.latency.config import Cell
from gate.latency.measurement import CellTimes, MemoryUse, Reading, SessionTimes, SubjectTimes, Usage
from gate.reference import ReferenceModel, file_digest
from gate.sessions.job import FAILED, JOB, PHASE, TIMES, CellJob, Failure, Job, Subject, job_from_bytes
from gate.sessions.telemetry import SETTLE_S, GpuWatch, MemoryMarks, measured_usage, open_watch
from gate.spec import EngineSpec, SpecFile, read_spec
from gate.tensors import Array, NamedArrays
from gate.timing import Call, concurrent, interleave, resolution_ns, warm_up

_PHASE_BYTES = 512

_BINDING_SHARE = 0.1
"""Of a cell's time, at the most, for one inference on each of its batches when they are bound."""

_BINDING_S = 5.0
"""For that in a session, in seconds, where its time has no limit."""

_LEAST_BATCHES = 2
"""That take turns whatever it costs: one alone would be in the cache."""


def main(folder: Path, stack: contextlib.ExitStack) -> int:
    """Do the job of a folder; write `times.json` there, or `failed.json`.

    Args:
        folder: Of the job.
        stack: As for `measure`. It is not closed here, so that no engine is before its times are written.

    Returns:
        The exit code: 0, or 1 where it failed.
    """
    phase = _Phase(folder / PHASE)
    try:
        job = job_from_bytes((folder / JOB).read_bytes())
        times = measure(job, folder=folder, tell=phase.tell, stack=stack)
        atomic.write_bytes(folder / TIMES, msgspec.json.encode(times))
    except BaseException as err:  # noqa: BLE001 - whatever ends a session is what its gate must hear
        traceback.print_exc()
        atomic.write_bytes(folder / FAILED, msgspec.json.encode(_failure(err, phase.text)))
        return 1
    return 0


def measure(job: Job, *, folder: Path, tell: Callable[[str], None], stack: contextlib.ExitStack) -> SessionTimes:
    """Load all engines, time every cell, and see what each engine takes.

    Args:
        job: What is asked for.
        folder: For temporary files.
        tell: Told what is being done, outside timed regions.
        stack: Keeps the engines; closing it closes them.

    Raises:
        GateError: An engine's file is another, or an engine or its inputs cannot be used.
        MeasurementError: There is no batch to run, or the clock went back.
    """
    began = time.perf_counter()
    tell("looking at the GPU")
    watch = open_watch() if job.on_gpu else None
    busy = None if watch is None else watch.busy_percent(settle_s=SETTLE_S)
    session = _Session(job, folder=folder, tell=tell, watch=watch, stack=stack)
    deadline = math.inf if job.max_s is None else began + job.max_s
    return SessionTimes(
        cells=tuple(
            session.cell(each, until=_share_until(deadline, len(job.cells) - index))
            for index, each in enumerate(job.cells)
        ),
        usage=session.usage(),
        memory=session.memory(),
        clock="perf_counter_ns",
        resolution_ns=resolution_ns(),
        busy_percent=busy,
    )


@dataclass(frozen=True)
class _Loaded:
    """An engine that is ready.

    Args:
        runners: One a stream.
        file: Its spec.
        switch: Sets what is shared by the engines of a process as this one needs it.
    """

    subject: Subject
    file: SpecFile
    runners: tuple[Runner, ...]
    switch: Callable[[], None] | None


class _Session:
    """All engines of the job, loaded and run once."""

    def __init__(
        self,
        job: Job,
        *,
        folder: Path,
        tell: Callable[[str], None],
        watch: GpuWatch | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self._job = job
        self._tell = tell
        self._watch = watch
        tell("reading the inputs")
        self._feeds = {path: read_feeds(path) for path in _feed_files(job)}
        files = {path: read_spec(path) for path in dict.fromkeys(each.spec for each in job.subjects)}
        cache = Cache(folder / "cache")
        models = {path: ReferenceModel(file, cache) for path, file in files.items()}
        for cell in job.cells:
            for index in cell.subjects:
                subject = job.subjects[index]
                _require_batch(self._feeds[cell.feeds], cell.cell, file=files[subject.spec], where=str(cell.feeds))
        _require_one_compiled(job)
        for subject in job.subjects:
            _require_digest(subject)
        if job.on_gpu:
            from gate.device import open_context

            open_context()
        marks = MemoryMarks(watch)
        self._marks = marks
        switches = _switches(job)
        self._loaded: list[_Loaded] = []
        for index, subject in enumerate(job.subjects):
            tell(f"loading {subject.name!r}")
            runners = _opened(
                subject,
                file=files[subject.spec],
                model=models[subject.spec],
                feeds=self._feeds_of(index),
                streams=job.streams,
                stack=stack,
            )
            self._loaded.append(_Loaded(subject, files[subject.spec], runners, switches.get(index)))
        self._seconds: dict[tuple[int, Path], float] = {}
        for index, loaded in enumerate(self._loaded):
            self._enter(index, "running", "once")
            path = self._feed_file_of(index)
            for runner in loaded.runners:
                self._run(index, runner, path)
        marks.steady()

    def cell(self, asked: CellJob, *, until: float = math.inf) -> CellTimes:
        """One batch size and shape; no more legs begin when `time.perf_counter` shows `until`.

        An engine runs once on each batch when it is bound, untimed. So of the batches only the first take turns where
        all would take over a tenth of the time until then (without a limit, a session's 5 seconds): the same of every
        engine, and two at the least.
        """
        at = f"at {asked.cell.name or f'batch={asked.cell.batch}'}"
        feeds = self._bound(asked.feeds, asked.subjects, within=_binding_s(until, len(self._job.cells)), at=at)
        if self._job.streams > 1:
            return self._streams(asked, feeds, at, until)
        job = self._job
        calls: list[Call] = []
        warm: list[int] = []
        for index in asked.subjects:
            self._enter(index, "warming up", at)
            calls.append(self._call(index, 0, feeds))
            warm.append(warm_up(calls[-1], seconds=job.warm_up_s, calls=job.warm_up_calls))
        readings: list[Reading] = []
        watch = self._watch
        times = interleave(
            calls,
            kept=asked.kept,
            least_s=asked.least_s,
            most=asked.most,
            leg=job.leg,
            discard=job.discard,
            order=job.order,
            before=lambda turn: self._enter(asked.subjects[turn], "timing", at),
            between=None if watch is None else lambda turn: readings.append(watch.read(turn)),
            max_s=until - time.perf_counter(),
        )
        return CellTimes(
            subjects=tuple(
                SubjectTimes(regions=each.regions, leg=job.leg, warm_up=calls_before, span_ns=each.span_ns)
                for each, calls_before in zip(times, warm, strict=True)
            ),
            readings=tuple(readings),
        )

    def _streams(self, asked: CellJob, feeds: Sequence[NamedArrays], at: str, until: float) -> CellTimes:
        """One leg of several streams at once."""
        job, index = self._job, asked.subjects[0]
        self._enter(index, "timing", f"{at} in {job.streams} streams")
        found = concurrent(
            [self._call(index, stream, feeds) for stream in range(job.streams)],
            kept=asked.kept,
            discard=job.discard,
            warm_up_s=job.warm_up_s,
            warm_up_calls=job.warm_up_calls,
            max_s=until - time.perf_counter(),
        )
        times = SubjectTimes(
            regions=found.times.regions, leg=asked.kept, warm_up=found.warm_up, span_ns=found.times.span_ns
        )
        return CellTimes(subjects=(times,), readings=() if self._watch is None else (self._watch.read(0),))

    def usage(self) -> tuple[Usage, ...]:
        """What each engine takes while it runs without a pause; empty where it was not asked for."""
        job = self._job
        if not job.usage_s > 0.0 or job.usage_feeds is None:
            return ()
        found = []
        for index in range(len(job.subjects)):
            self._enter(index, "measuring what", "takes")
            feeds = self._bound(job.usage_feeds, (index,), within=_BINDING_S / len(job.subjects), at="on its inputs")
            call = self._call(index, 0, feeds)
            warm_up(call, seconds=job.warm_up_s, calls=job.warm_up_calls)
            found.append(measured_usage(call, job.usage_s, self._watch))
        return tuple(found)

    def memory(self) -> MemoryUse:
        """Of all engines together."""
        return self._marks.use()

    def _enter(self, index: int, doing: str, rest: str) -> None:
        loaded = self._loaded[index]
        self._tell(f"{doing} {loaded.subject.name!r} {rest}")
        if loaded.switch is not None:
            loaded.switch()

    def _bound(self, path: Path, subjects: Sequence[int], *, within: float, at: str) -> tuple[NamedArrays, ...]:
        """The batches that these engines can be bound to in so many seconds, and two at the least."""
        feeds = self._feeds[path]
        for index in subjects:
            # The first inference of a shape may load and allocate; one that seems slow has a second chance.
            for _ in range(1 if (index, path) in self._seconds else 2):
                if self._room(path, subjects=[index], within=within) >= len(feeds):
                    break
                self._enter(index, "running", at)
                self._run(index, self._loaded[index].runners[0], path)
        return feeds[: max(_LEAST_BATCHES, int(self._room(path, subjects=subjects, within=within)))]

    def _room(self, path: Path, *, subjects: Sequence[int], within: float) -> float:
        """How many batches of a file these engines run once, one after another, in so many seconds; at most all."""
        seconds = self._job.streams * sum(self._seconds.get((index, path), math.inf) for index in subjects)
        count = len(self._feeds[path])
        return count if seconds * count <= within else within / seconds

    def _run(self, index: int, runner: Runner, path: Path) -> None:
        """One inference on the first batch of a file; the shortest is remembered."""
        begin = time.perf_counter()
        runner.run(self._feeds[path][0])
        took = time.perf_counter() - begin
        self._seconds[index, path] = min(took, self._seconds.get((index, path), math.inf))

    def _feeds_of(self, index: int) -> tuple[NamedArrays, ...]:
        """Batches that an engine is loaded and first run with.

        Raises:
            MeasurementError: It has none.
        """
        return self._feeds[self._feed_file_of(index)]

    def _feed_file_of(self, index: int) -> Path:
        """The file of these batches.

        Raises:
            MeasurementError: It has none.
        """
        job = self._job
        paths = [each.feeds for each in job.cells if index in each.subjects]
        paths += [job.usage_feeds] if job.usage_feeds is not None else []
        if not paths:
            raise MeasurementError(f"there is no batch to run {job.subjects[index].name!r} on")
        return paths[0]

    def _call(self, index: int, stream: int, feeds: Sequence[NamedArrays]) -> Call:
        """An inference by its number; the batches take turns, so that no cache holds the input.

        An engine on a GPU that nothing gives events for is timed as a whole, where the job is of the whole.
        """
        loaded, job, count = self._loaded[index], self._job, len(feeds)
        runner = loaded.runners[stream]
        whole = job.transfers and job.wait == "spin"
        if isinstance(runner, RegionTimed):
            try:
                regions = runner.region_timed(feeds, transfers=job.transfers, wait=job.wait)
            except BackendUnavailable:
                if not whole:
                    raise
            else:
                return lambda number: regions(number % count)
        elif _on_gpu(loaded) and not whole:
            raise MeasurementError(
                f"{loaded.subject.name!r} runs on the GPU and cannot be timed with transfers = "
                f"{str(job.transfers).lower()} and wait = {job.wait!r}",
                hint='Time it with transfers and wait = "spin".',
            )
        timed = [runner.timed(feed) for feed in feeds]

        def once(number: int) -> None:
            timed[number % count]()

        return once


class _Phase:
    """What the process does, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self.text = ""

    def tell(self, text: str) -> None:
        """Put it in the place of what was told before."""
        self.text = text
        os.pwrite(self._file, text.encode(errors="replace")[:_PHASE_BYTES].ljust(_PHASE_BYTES), 0)


def read_feeds(path: Path) -> tuple[dict[str, Array], ...]:
    """The batches of a file of tensors `<index>/<input>`, by their index.

    Raises:
        MeasurementError: It cannot be read, is empty, lacks an index, or its batches differ in inputs or shapes.
    """
    from safetensors.numpy import load_file

    where = str(path)
    try:
        stored = load_file(path)
    except Exception as err:
        raise MeasurementError(f"the inputs cannot be read: {type(err).__name__}: {err}", where=where) from err
    batches: dict[str, dict[str, Array]] = {}
    for key, array in stored.items():
        index, found, name = key.partition("/")
        if not found or not name or not index.isdecimal():
            raise MeasurementError(f"a tensor is called `<index>/<input>`, got {key!r}", where=where)
        batches.setdefault(index, {})[name] = cast("Array", array)
    if not batches:
        raise MeasurementError("holds no batch, so there is nothing to run", where=where)
    if missing := [str(index) for index in range(len(batches)) if str(index) not in batches]:
        raise MeasurementError(f"has {len(batches)} batches and none with index {missing[0]}", where=where)
    ordered = tuple(batches[str(index)] for index in range(len(batches)))
    shapes = [{name: (each.dtype, each.shape) for name, each in batch.items()} for batch in ordered]
    for number, each in enumerate(shapes):
        if each != shapes[0]:
            raise MeasurementError(f"batch {number} has other inputs or shapes than batch 0", where=where)
    return ordered


def _binding_s(until: float, cells: int) -> float:
    """Seconds in which a cell's batches are to be bound."""
    return max(_BINDING_SHARE * (until - time.perf_counter()), 0.0) if until < math.inf else _BINDING_S / cells


def _share_until(deadline: float, cells: int) -> float:
    """When the first of so many cells has had its share of the time that is left."""
    now = time.perf_counter()
    return now + (deadline - now) / cells


def _feed_files(job: Job) -> list[Path]:
    more = [job.usage_feeds] if job.usage_feeds is not None else []
    return list(dict.fromkeys([*(cell.feeds for cell in job.cells), *more]))


def _require_batch(feeds: Sequence[NamedArrays], cell: Cell, *, file: SpecFile, where: str) -> None:
    """Hold the sizes of the batches against the cell's.

    Raises:
        MeasurementError: They differ.
    """
    first = next(iter(file.spec.inputs))
    for name, given in file.spec.inputs.items():
        array = feeds[0].get(name)
        if array is None:
            raise MeasurementError(f"there is no input {name!r}, the batch is to be {cell.batch}", where=where)
        if name == first and (array.ndim == 0 or array.shape[0] != cell.batch):
            raise MeasurementError(
                f"input {name!r} has shape {list(array.shape)}, the batch is to be {cell.batch}", where=where
            )
        for axis, size in zip(given.shape, array.shape, strict=False):
            if isinstance(axis, str) and cell.axes.get(axis, size) != size:
                raise MeasurementError(
                    f"input {name!r} has shape {list(array.shape)}, axis {axis!r} is to be {cell.axes[axis]}",
                    where=where,
                )


def _require_digest(subject: Subject) -> None:
    """Hold an engine's file against its digest, before anything of it is loaded.

    Raises:
        DigestMismatch: It is missing or another.
        MeasurementError: The job does not say which it must be.
    """
    if subject.file is None:
        return
    if subject.sha256 is None:
        raise MeasurementError(f"the job gives no sha256 for the file of {subject.name!r}", where=str(subject.file))
    try:
        digest = file_digest(subject.file)
    except OSError as err:
        raise DigestMismatch(
            f"the file of {subject.name!r} cannot be read: {err.strerror}", where=str(subject.file)
        ) from err
    if digest != subject.sha256:
        raise DigestMismatch(
            f"the file of {subject.name!r} changed: sha256 {digest[:12]}…, expected {subject.sha256[:12]}…",
            where=str(subject.file),
        )


def _require_one_compiled(job: Job) -> None:
    """Refuse what torch.compile cannot do: opening an engine drops the code that was compiled before it.

    Raises:
        MeasurementError: More than one would be open.
    """
    compiled = [each.name for each in job.subjects if each.engine is not None and each.engine.options.mode == "compile"]
    if len(compiled) * job.streams > 1:
        names = " and ".join(map(repr, compiled))
        raise MeasurementError(
            f'mode = "compile" keeps one engine a process, and {names} would need {len(compiled) * job.streams}',
            hint='Package the engines with mode = "aotinductor" to time them together.',
        )


def _switches(job: Job) -> dict[int, Callable[[], None]]:
    """By index, for engines in PyTorch that differ in TF32: its switches are of the whole process."""
    tf32: dict[int, bool] = {}
    for index, subject in enumerate(job.subjects):
        if subject.engine is None or subject.engine.backend == "torch":
            tf32[index] = subject.engine is not None and subject.engine.precision == "tf32"
    if len(set(tf32.values())) < 2:
        return {}
    from gate.engines.torch import arithmetic

    def setting(value: bool) -> Callable[[], None]:
        def switch() -> None:
            arithmetic.deployed(tf32=value)

        return switch

    return {index: setting(value) for index, value in tf32.items()}


def _opened(
    subject: Subject,
    *,
    file: SpecFile,
    model: ReferenceModel,
    feeds: tuple[NamedArrays, ...],
    streams: int,
    stack: contextlib.ExitStack,
) -> tuple[Runner, ...]:
    """The engine's runners, one a stream; they are closed with the stack."""
    runners: list[Runner] = []
    for _ in range(streams):
        if runners and isinstance(runners[0], Renewable):
            runner = runners[0].fresh()
        elif subject.engine is None:
            runner = _reference(model, file=file, feeds=feeds)
        else:
            runner = _engine(subject, subject.engine, file=file, model=model, feeds=feeds)
        runners.append(stack.enter_context(cast("Any", runner)))
    return tuple(runners)


def _engine(
    subject: Subject, engine: EngineSpec, *, file: SpecFile, model: ReferenceModel, feeds: tuple[NamedArrays, ...]
) -> Runner:
    if subject.file is None:
        raise MeasurementError(f"the job names no file for {subject.name!r}")
    resources = Resources(
        model=(lambda: model.module) if model.kind == "factory" else None,
        feeds=lambda: tuple(dict(feed) for feed in feeds),
    )
    return backend_named(engine.backend).open(subject.file, spec=file.spec, engine=engine, resources=resources)


def _reference(model: ReferenceModel, *, file: SpecFile, feeds: tuple[NamedArrays, ...]) -> Runner:
    """PyTorch as it is deployed, in eager mode; a reference in ONNX on ONNX Runtime with all its optimisations.

    Raises:
        MeasurementError: It is stored outputs, which take no time.
        RunError: It cannot be loaded.
    """
    if model.kind == "outputs":
        raise MeasurementError("the reference is stored outputs, so it has no latency", where=str(file.path))
    if model.kind == "onnx":
        # Not `model.runner()`, which leaves the graph as it is to compare answers with: nobody deploys it so.
        deployed = EngineSpec(name="reference", backend="onnxruntime", precision="fp32")
        path = file.folder / str(file.spec.model.onnx)
        return backend_named(deployed.backend).open(path, spec=file.spec, engine=deployed)
    from gate.engines.torch.engine import CudaTorchEngineRunner, TorchEngineRunner
    from gate.engines.torch.module import engine_module, trace_feed

    on_gpu = file.spec.model.device == "cuda"
    engine = EngineSpec(name="reference", backend="torch", precision="fp32", evidence="device" if on_gpu else "host")
    made = engine_module(model.module, spec=file.spec, engine=engine, feed=trace_feed(file.spec, feeds))
    kind = CudaTorchEngineRunner if on_gpu else TorchEngineRunner
    return kind(
        made.core,
        spec=file.spec,
        mode="eager",
        dtypes=made.dtypes,
        tf32=False,
        where=f"the reference of {file.path}",
    )


def _on_gpu(loaded: _Loaded) -> bool:
    engine = loaded.subject.engine
    return loaded.file.spec.model.device == "cuda" if engine is None else engine.required_evidence == "device"


def _failure(err: BaseException, phase: str) -> Failure:
    """What the gate raises again."""
    if isinstance(err, GateError):
        # Not `str`: a subclass that shows more puts its message first.
        return Failure(error=type(err).__name__, message=err.message, where=err.where or phase or None, hint=err.hint)
    if isinstance(err, SystemExit):
        said = f"the model's own code ended the process with sys.exit({err.code!r})"
    else:
        said = " ".join(f"{type(err).__name__}: {err}".split())
    return Failure(error="MeasurementError", message=said, where=phase or None)


def run(folder: str) -> None:
    """Do the job of a folder and end the process, past what libraries do when a process ends: it may crash or hang.

    The engines are not closed either: the times are written by then, and the system takes all back.
    """
    stack = contextlib.ExitStack()
    code = main(Path(folder), stack)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run(sys.argv[1])
