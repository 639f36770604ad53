"""The order of steps, nothing else: check, seal what passed, record the reference."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from gate.data.samples import Batch, DataDigest, DigestedSource, SampleSource, digest_of, open_source, require_disjoint
from gate.engines import backend as backend_named
from gate.engines.interface import Backend, BuildRecord, Runner
from gate.errors import (
    BackendUnavailable,
    BuildError,
    DataError,
    GateError,
    MeasurementError,
    ReferenceMismatch,
    RunError,
)
from gate.manifest import sha256_hex
from gate.metamorphic import applicable_checks, metamorphic_findings
from gate.reference import (
    ModelIdentity,
    RecordedGraph,
    Recording,
    ReferenceModel,
    batch_size,
    file_digest,
    onnx_digest,
    read_recording,
    recorded_graph,
    run_filled,
    write_recording,
)
from gate.reference import (
    record as record_reference,
)
from gate.results import CheckRun, EngineResult, OutputMetrics, Provenance, TaskMetrics
from gate.spec import EngineSpec, LatencySpec, SpecFile
from gate.tensors import Array, mismatches
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Status, Verdict

if TYPE_CHECKING:
    from gate.cache import Cache, Entry

DIAGNOSED_ROWS = 256


class Observer(Protocol):
    """Told what happens while it happens; a terminal shows progress, a test nothing."""

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:
        """A stage begins: `samples`, `reference`, `export`, `lower`, `build`, `compare`, `metamorphic`, `latency`.

        `total` is the number of steps where it is known (batches); it ends when the next begins or on `done`.
        """
        ...

    def advance(self, steps: int = 1) -> None:
        """So many steps of the current stage are done."""
        ...

    def note(self, text: str) -> None:
        """Something a reader should know: what was reused, a cache entry that was rebuilt."""
        ...

    def done(self) -> None:
        """The last stage ended."""
        ...


class Silence:
    """An observer that shows nothing."""

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class CheckOptions:
    """How to check.

    Args:
        engines: Only these, in the spec's order; empty: all.
        cache: Folder of the cache; None: no cache, everything is made anew in a temporary folder.
        baselines: Folder of the accepted baselines.
        reference: A folder made by `gate record`, for a host without PyTorch.
    """

    engines: tuple[str, ...] = ()
    cache: Path | None = field(default_factory=lambda: Path(".gate/cache"))
    baselines: Path = Path("baselines")
    reference: Path | None = None


@dataclass(frozen=True)
class Sealed:
    """What became of an engine when a run was sealed.

    Args:
        engine: Its name.
        path: Of the bundle; None where it was not sealed.
        reason: Why not; None where it was.
    """

    engine: str
    path: Path | None
    reason: str | None


class _Context:
    """What all engines of a run share: opened once, lazily where not every engine needs it."""

    def __init__(self, file: SpecFile, options: CheckOptions, observer: Observer) -> None:
        from gate.cache import Cache

        self.file = file
        self.spec = file.spec
        self.options = options
        self.observer = observer
        self.cache: Cache = Cache(options.cache, on_rebuild=observer.note)
        self.seconds: dict[str, float] = {}
        self.model = ReferenceModel(file, self.cache)
        self.source: SampleSource
        self.digest: DataDigest
        self.identity: ModelIdentity
        self.recording: Recording
        self._calibration: tuple[SampleSource, DataDigest] | None = None
        self._onnx: _Exported | None = None

    @contextmanager
    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> Iterator[None]:
        """Show a stage and add its wall time to `seconds`."""
        self.observer.stage(name, engine=engine, total=total)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def open_samples(self) -> None:
        """Read, check and digest every evaluation sample."""
        data = self.spec.data
        with self.stage("samples"):
            self.source = open_source(self.file, data.source, needed=data.samples, key="source")
            self.digest = digest_of(
                self.source,
                inputs=self.spec.inputs,
                batch=batch_size(self.file),
                where=f"[data] source = {data.source!r}",
            )
            where = f"[data] source = {data.source!r}"
            self.source = DigestedSource(self.source, self.digest, where)
            labels = np.frombuffer(self.digest.labels, "<i8")
            if self.spec.task is not None and len(labels) > 1 and labels.min() == labels.max():
                raise DataError(
                    f"all {len(labels)} labels are {labels[0]}, so an engine that always gives one answer would be right",
                    where=where,
                )
            if data.calibration is not None:
                self.calibration()

    def calibration(self) -> tuple[SampleSource, DataDigest]:
        """The calibration samples, checked against the evaluation samples."""
        if self._calibration is None:
            data = self.spec.data
            if data.calibration is None:
                raise DataError("[data] names no calibration samples", where=str(self.file.path))
            source = open_source(self.file, data.calibration, needed=data.calibration_samples, key="calibration")
            source = _First(source, data.calibration_samples)
            where = f"[data] calibration = {data.calibration!r}"
            digest = digest_of(source, inputs=self.spec.inputs, batch=batch_size(self.file), where=where)
            require_disjoint(self.digest, digest)
            self._calibration = (DigestedSource(source, digest, where), digest)
        return self._calibration

    def open_reference(self) -> None:
        """Record the reference, or read its recording."""
        batches = -(-len(self.source) // batch_size(self.file))
        with self.stage("reference", total=batches):
            if self.options.reference is not None:
                self.recording, self.identity = read_recording(
                    self.options.reference, file=self.file, digest=self.digest
                )
            else:
                self.identity = self.model.identity()
                self.recording = record_reference(
                    self.model,
                    file=self.file,
                    source=self.source,
                    digest=self.digest,
                    cache=self.cache,
                    advance=self.observer.advance,
                )

    def exported(self) -> _Exported:
        """The model as FP32 ONNX: exported once and compared with PyTorch before anything else is blamed."""
        if self._onnx is None:
            with self.stage("export"):
                self._onnx = _export(self)
        return self._onnx

    def pairs(self) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """Each batch of samples with the reference's outputs for it."""
        outputs = self.recording.batches()
        firsts = iter(self.recording.firsts)
        for batch in self.source.batches(batch_size(self.file)):
            first = next(firsts, None)
            if first != batch.first:
                raise MeasurementError(f"the recorded reference has no batch that starts at sample {batch.first}")
            yield batch, next(outputs)
        if next(firsts, None) is not None:
            raise MeasurementError("the recorded reference holds more samples than the data source gave")


@dataclass(frozen=True)
class _First:
    """The first so many samples of a source."""

    source: SampleSource
    count: int

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        """As `SampleSource.batches`."""
        for batch in self.source.batches(size):
            left = self.count - batch.first
            if left <= 0:
                return
            if batch.size <= left:
                yield batch
                continue
            labels = None if batch.labels is None else batch.labels[:left]
            yield Batch(batch.first, {name: values[:left] for name, values in batch.inputs.items()}, labels)


@dataclass(frozen=True)
class _Exported:
    path: Path
    sha256: str
    opset: int
    reused: bool


@contextmanager
def _not_ended_by_user_code() -> Iterator[None]:
    """A `sys.exit()` in the project's own code is an error: its status 0 would look like a pass."""
    try:
        yield
    except SystemExit as err:
        raise RunError(
            f"the project's own code ended the program with sys.exit({err.code!r}), so there is no verdict",
            hint="Look at what runs when the factory's and the data's modules are imported and called.",
        ) from err


@_not_ended_by_user_code()
def check(file: SpecFile, options: CheckOptions | None = None, observer: Observer | None = None) -> CheckRun:
    """Run a spec and judge it.

    Args:
        file: From `read_spec`.
        options: How; left out: all engines, the cache and the baselines of the current folder.
        observer: Told of progress; left out: nobody.

    One engine that cannot be built or run is a Failure of that engine, and the others go on. What concerns all of
    them is raised.

    Raises:
        SpecError: An engine that was asked for is not in the spec, or a file that it names is missing.
        DataError: The samples cannot be used, are too few, or are calibrated on.
        BackendUnavailable: A backend is not installed and its engine is not optional.
        ExportError: PyTorch to ONNX failed.
        ReferenceMismatch: The reference misses what training reported.
        MeasurementError: No engine ran.
    """
    from gate import __version__
    from gate.device import fingerprint, git_revision

    options = options or CheckOptions()
    observer = observer or Silence()
    started = time.perf_counter()
    chosen = [file.engine(name) for name in options.engines] or list(file.spec.engines)
    usable = {engine.name: _usable(engine, file) for engine in chosen}
    if all(isinstance(each, str) for each in usable.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in usable.items())
        raise MeasurementError(f"no engine can run here, so there is nothing to pass ({reasons})", where=str(file.path))
    run = _Context(file, options, observer)
    run.open_samples()
    run.open_reference()
    _require_reference_is_right(run)
    results: list[EngineResult] = []
    for engine in chosen:
        backend = usable[engine.name]
        if isinstance(backend, str):
            results.append(
                EngineResult(
                    name=engine.name, backend=engine.backend, precision=engine.precision, verdict=None, not_run=backend
                )
            )
            continue
        results.append(_check_engine(run, engine, backend))
    observer.done()
    run.seconds["total"] = time.perf_counter() - started
    gpu = any(result.evidence is Evidence.DEVICE for result in results)
    return CheckRun(
        gate_version=__version__,
        spec_path=str(file.path),
        model_id=file.spec.model.id,
        samples=len(run.source),
        created=dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        device=fingerprint(for_gpu=gpu),
        provenance=Provenance(
            spec_sha256=sha256_hex(file.text.encode()),
            data_sha256=run.digest.data_sha256,
            reference_sha256=run.recording.sha256,
            reference=f"{run.identity.title} (recorded {run.recording.sha256[:4]}…"
            f"{', reused' if run.recording.reused else ''})",
            weights_sha256=run.identity.weights_sha256,
            git=git_revision(file.folder),
            seed=file.spec.data.seed,
        ),
        profile=profile_of(file),
        engines=tuple(results),
        seconds={name: round(value, 4) for name, value in run.seconds.items()},
        reused=("reference",) if run.recording.reused else (),
    )


def profile_of(file: SpecFile) -> dict[str, dict[str, list[int]]]:
    """Per input its min, opt and max shapes."""
    return {
        name: {"min": list(each.sized("min")), "opt": list(each.sized("opt")), "max": list(each.sized("max"))}
        for name, each in file.spec.inputs.items()
    }


def _usable(engine: EngineSpec, file: SpecFile) -> Backend | str:
    """The engine's backend, or why an optional engine is not run.

    Raises:
        BackendUnavailable: It cannot be used here, and the engine is not optional.
    """
    try:
        backend = backend_named(engine.backend)
        backend.version()
        needed = Evidence(engine.required_evidence)
        here = backend.runs_here()
        if needed is not Evidence.PREFLIGHT and (here is None or here.rank < needed.rank):
            raise BackendUnavailable(
                f"engine {engine.name!r} asks for evidence {needed.value!r}, and backend {engine.backend!r} "
                f"{'can only compile' if here is None else f'gives {here.value!r}'} on this machine",
                where=file.engine_location(engine.name, "evidence"),
                hint="Run it on a machine with that device, set optional = true to list it as NOT RUN here, "
                'or evidence = "preflight" to compile only.',
            )
    except BackendUnavailable as err:
        if engine.optional:
            return err.message
        raise
    return backend


def not_run_reason(engine: EngineSpec, file: SpecFile) -> str | None:
    """Why an optional engine is NOT RUN on this machine; None where it can be run.

    Raises:
        BackendUnavailable: It cannot be run, and is not optional.
    """
    usable = _usable(engine, file)
    return usable if isinstance(usable, str) else None


def _require_reference_is_right(run: _Context) -> None:
    """A reference that misses what training reported says nothing about an engine.

    Raises:
        ReferenceMismatch: It does.
        DataError: There are no labels to measure it by.
    """
    from gate.metrics.classification import reference_accuracy, stated_metrics

    stated = run.spec.model.metrics
    if stated is None:
        return
    where = run.file.location("model", "metrics")
    expected = stated_metrics(stated, run.file.folder, where=where)
    if run.spec.task is None:
        return
    output = _scores_output(run)
    measured = reference_accuracy((batch.labels, outputs[output]) for batch, outputs in run.pairs())
    for name, value in expected.items():
        if name not in measured:
            raise ReferenceMismatch(
                f"[model] metrics has {name!r}, which [task] does not measure; it measures {', '.join(measured)}",
                where=where,
            )
        got = measured[name]
        if not got.upper_bound >= value:
            raise ReferenceMismatch(
                f"the reference itself is wrong: {name} {got.value:.4g}, training said {value:.4g}",
                where=where,
                hint="No engine was judged. Look at the weights, the preprocessing and the order of the labels.",
            )


def _scores_output(run: _Context) -> str:
    """The output with the class scores: the spec's, or the only one.

    Raises:
        DataError: There is none, or several.
    """
    names = list(run.recording.outputs)
    asked = run.spec.task.output if run.spec.task is not None else None
    if asked is not None:
        if asked not in names:
            raise DataError(
                f"[task] output = {asked!r}, the reference has {', '.join(map(repr, names))}",
                where=run.file.location("task", "output"),
            )
        return asked
    if len(names) == 1:
        return names[0]
    raise DataError(
        f"[task] must say which output holds the class scores: {', '.join(map(repr, names))}",
        where=run.file.location("task"),
        hint=f'output = "{names[0]}"',
    )


def _export(run: _Context) -> _Exported:
    """The FP32 ONNX of the reference: the team's own file, a recording's, or the gate's export from PyTorch."""
    spec, file = run.spec, run.file
    if run.options.reference is not None:
        graph = recorded_graph(run.options.reference, "fp32")
        return _Exported(graph.path, onnx_digest(graph.path), graph.opset, reused=True)
    if spec.model.onnx is not None:
        path = file.folder / spec.model.onnx
        return _Exported(path, onnx_digest(path), _opset(path), reused=False)
    from gate.export import exporter_version, onnx_from_torch, verify_export

    key = run.cache.entry_key(
        model=run.identity.sha256,
        inputs={name: msgspec.to_builtins(each) for name, each in spec.inputs.items()},
        opset=spec.model.opset,
        exporter=list(spec.model.exporter),
        names=list(spec.model.output_names),
        simplify=spec.model.simplify,
        tools=exporter_version(),
    )
    entry = run.cache.get("export", key)
    reused = entry is not None
    if entry is None:
        meta: dict[str, object] = {}

        def make(folder: Path) -> None:
            path = folder / "model.onnx"
            feeds = _export_feeds(run)
            made = onnx_from_torch(run.model.module, spec=spec, out=path, feeds=feeds)
            verify_export(path, run.model.module, spec=spec, feeds=feeds)
            meta.update(msgspec.to_builtins(made))

        entry = run.cache.put("export", key, make, meta)
    path = entry.path("model.onnx")
    return _Exported(path, _graph_digest(entry), int(entry.meta["opset"]), reused=reused)


def _export_feeds(run: _Context) -> tuple[dict[str, Array], ...]:
    """Sample inputs at the smallest batch and at the gate's own: real data, taken cyclically where it is short."""
    batch = next(run.source.batches(batch_size(run.file)))
    first = next(iter(run.spec.inputs.values()))
    sizes = {first.sized("min")[0], first.sized("opt")[0], min(first.sized("max")[0], batch_size(run.file))}
    return tuple(
        {name: np.ascontiguousarray(values[np.arange(size) % len(values)]) for name, values in batch.inputs.items()}
        for size in sorted(sizes)
    )


def _graph_digest(entry: Entry) -> str:
    """sha256 of a cached graph: of the file, or of it and the external data beside it, which holds the weights."""
    digests = {name: each.sha256 for name, each in entry.files.items()}
    return digests["model.onnx"] if len(digests) == 1 else sha256_hex(repr(sorted(digests.items())).encode())


def _opset(path: Path) -> int:
    import onnx

    graph = onnx.load(path, load_external_data=False)
    return max((each.version for each in graph.opset_import if each.domain in ("", "ai.onnx")), default=0)


@dataclass(frozen=True)
class _Made:
    """An engine's file and how it came about."""

    path: Path
    sha256: str
    build: BuildRecord
    opset: int | None
    calibration_sha256: str | None
    reused: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _check_engine(run: _Context, engine: EngineSpec, backend: Backend) -> EngineResult:
    """Build, run and judge one engine. What goes wrong in it is a Failure of its own."""
    preflight = engine.required_evidence == "preflight"
    evidence = Evidence.PREFLIGHT if preflight else backend.runs_here() or Evidence.PREFLIGHT
    result = EngineResult(
        name=engine.name, backend=engine.backend, precision=engine.precision, verdict=None, evidence=evidence
    )
    findings: list[Finding | Failure] = []
    try:
        made = _make_engine(run, engine, backend)
    except GateError as err:
        return _judged(run, engine, result, [_failure("build", err, Evidence.PREFLIGHT)])
    size = made.path.stat().st_size
    result = msgspec.structs.replace(
        result,
        size_bytes=size,
        build=made.build,
        engine_sha256=made.sha256,
        engine_path=str(made.path),
        onnx_opset=made.opset,
        calibration_sha256=made.calibration_sha256,
        reused=made.reused,
        notes=made.notes,
    )
    findings.extend(_build_findings(engine, made, size, file=run.file))
    if not preflight:
        try:
            with backend_open(backend, made.path, run, engine) as runner:
                result = _run_engine(run, engine, runner, result, findings=findings)
        except GateError as err:
            findings.append(_failure("run", err, evidence))
    return _judged(run, engine, result, findings)


@contextmanager
def backend_open(backend: Backend, path: Path, run: _Context, engine: EngineSpec) -> Iterator[Runner]:
    """The engine, loaded; closed in the end."""
    runner = backend.open(path, spec=run.spec, engine=engine)
    try:
        yield runner
    finally:
        runner.close()


def _judged(run: _Context, engine: EngineSpec, result: EngineResult, findings: list[Finding | Failure]) -> EngineResult:
    """The result with its verdict; a check that the spec asked for and that has no finding is a Failure."""
    names = {finding.check for finding in findings}
    failed = any(isinstance(finding, Failure) for finding in findings)
    required = required_checks(engine, run)
    for name in required:
        if name not in names and not any(each.startswith(f"{name}[") for each in names) and not failed:
            findings.append(
                Failure(
                    check=name,
                    error="MeasurementError",
                    message=f"{name} was asked for and nothing was measured",
                    evidence=result.evidence or Evidence.PREFLIGHT,
                    hint="Nothing compared is not a pass.",
                )
            )
    return msgspec.structs.replace(result, verdict=Verdict(findings=tuple(findings)))


def required_checks(engine: EngineSpec, run: _Context) -> tuple[str, ...]:
    """Names of the checks that must have a finding; one of several outputs stands for all of them."""
    names: list[str] = (
        [] if engine.plan is not None and engine.backend != "onnxruntime" else ["build.delivered_precision"]
    )
    if engine.required_evidence == "preflight":
        return tuple(names)
    names.extend(applicable_checks(engine, run.spec.inputs))
    if engine.parity is not None:
        names.append("parity.nonfinite")
    if engine.task is not None:
        asked = {key: getattr(engine.task, key) for key in engine.task.__struct_fields__}
        wanted = [key for key, value in asked.items() if value is not None] or ["top1_drop_at_most_pp"]
        names.extend("task." + key.replace("_drop_at_most_pp", "_drop_pp").replace("_at_least", "") for key in wanted)
    if engine.latency is not None:
        names.extend(
            f"latency.{key}" for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms") if getattr(engine.latency, key)
        )
        if engine.latency.throughput_at_least is not None:
            names.append("latency.throughput")
    if engine.memory is not None:
        names.extend(f"memory.{key}" for key in ("engine_mib", "host_peak_mib") if getattr(engine.memory, key))
    return tuple(names)


def _failure(check: str, err: GateError, evidence: Evidence) -> Failure:
    text = str(err) if isinstance(err, BuildError) else f"{err.where}: {err.message}" if err.where else err.message
    return Failure(check=check, error=type(err).__name__, message=text, evidence=evidence, hint=err.hint or "")


def _make_engine(run: _Context, engine: EngineSpec, backend: Backend) -> _Made:
    """The engine's file: lowered and built, or the team's own."""
    if engine.plan is not None:
        path = run.file.folder / engine.plan
        _require_file(path, run, engine, "plan")
        if engine.backend == "onnxruntime":
            onnx_digest(path)  # refuses what is no ONNX file
            return _Made(path, file_digest(path), backend_record_of_plan(backend, engine, run), _opset(path), None, ())
        note = f"precision {engine.precision} is what the spec says of this plan; its layers were not listed"
        return _Made(path, file_digest(path), backend_record_of_plan(backend, engine, run), None, None, (), (note,))
    reused: list[str] = []
    calibration_sha256: str | None = None
    notes: tuple[str, ...] = ()
    if engine.onnx is not None:
        path = run.file.folder / engine.onnx
        _require_file(path, run, engine, "onnx")
        lowered_path, lowered_sha256, opset = path, onnx_digest(path), _opset(path)
    else:
        exported = run.exported()
        if exported.reused:
            reused.append("export")
        lowered = _lower(run, engine.precision, exported)
        if lowered.reused:
            reused.append("lowered")
        lowered_path, lowered_sha256, opset = lowered.path, lowered.sha256, lowered.opset
        calibration_sha256, notes = lowered.calibration_sha256, lowered.notes
    with run.stage("build", engine=engine.name):
        key = run.cache.entry_key(
            lowered=lowered_sha256,
            backend=engine.backend,
            version=backend.version(),
            precision=engine.precision,
            options=msgspec.to_builtins(engine.options),
            inputs={name: msgspec.to_builtins(each) for name, each in run.spec.inputs.items()},
            cast_io=engine.cast_io,
            device=_device_key(backend),
        )
        entry: Entry | None = run.cache.get("engine", key)
        if entry is not None:
            reused.append("engine")
        else:
            meta: dict[str, object] = {}

            def make(folder: Path) -> None:
                record = backend.build(
                    onnx=lowered_path, out=folder / backend.file_name(), spec=run.spec, engine=engine
                )
                meta["build"] = msgspec.to_builtins(record)

            entry = run.cache.put("engine", key, make, meta)
        record = msgspec.convert(entry.meta["build"], BuildRecord)
    name = backend.file_name()
    return _Made(
        path=entry.path(name),
        sha256=entry.sha256(name),
        build=record,
        opset=opset,
        calibration_sha256=calibration_sha256,
        reused=tuple(reused),
        notes=notes,
    )


def _device_key(backend: Backend) -> str:
    """What a compiled engine depends on beside its inputs: the GPU where there is one."""
    from gate.device import fingerprint

    if backend.runs_here() is not Evidence.DEVICE:
        return "host"
    device = fingerprint(for_gpu=True)
    return f"{device.name} {device.compute_capability} {device.driver}"


def _require_file(path: Path, run: _Context, engine: EngineSpec, key: str) -> None:
    if not path.is_file():
        raise BuildError(f"there is no {path}", where=run.file.engine_location(engine.name, key))


def backend_record_of_plan(backend: Backend, engine: EngineSpec, run: _Context) -> BuildRecord:
    """What is known of a plan that the gate did not build: what the spec says of it."""
    record = BuildRecord(
        backend=engine.backend,
        backend_version=backend.version(),
        precision=engine.precision,
        options={},
        profile=profile_of(run.file),
        layers_source="not listed: the plan was not built here",
    )
    if engine.plan is None or engine.backend != "onnxruntime":
        return record
    import onnx

    from gate.engines.graph import layers_of

    graph = onnx.load(run.file.folder / engine.plan, load_external_data=False)
    return msgspec.structs.replace(record, layers=layers_of(graph), layers_source="graph")


@dataclass(frozen=True)
class _Lowered:
    """The exported graph in an engine's precision."""

    path: Path
    sha256: str
    opset: int
    calibration_sha256: str | None
    reused: bool
    notes: tuple[str, ...] = ()


def _lower(run: _Context, precision: str, exported: _Exported) -> _Lowered:
    """The exported graph in a precision: from the recording, from the cache, or made now."""
    if run.options.reference is not None:
        graph = recorded_graph(run.options.reference, precision)
        return _Lowered(graph.path, onnx_digest(graph.path), graph.opset, graph.calibration_sha256, reused=True)
    from gate.lower import lower, tool_version

    calibration_sha256: str | None = None
    with run.stage("lower", engine=precision):
        calibrated = precision == "int8"
        if calibrated:
            calibration_sha256 = run.calibration()[1].inputs_sha256
        key = run.cache.entry_key(
            onnx=exported.sha256,
            precision=precision,
            calibration=calibration_sha256,
            batch=batch_size(run.file) if calibrated else None,
            tool=tool_version(precision),
        )
        entry = run.cache.get("lowered", key)
        reused = entry is not None
        if entry is None:
            meta: dict[str, object] = {}

            def make(folder: Path) -> None:
                batches = (
                    (batch.inputs for batch in run.calibration()[0].batches(batch_size(run.file)))
                    if calibrated
                    else None
                )
                path = folder / "model.onnx"
                record = lower(exported.path, precision=precision, out=path, calibration=batches)
                meta.update(msgspec.to_builtins(record))
                meta["opset"] = _opset(path)

            entry = run.cache.put("lowered", key, make, meta)
    return _Lowered(
        path=entry.path("model.onnx"),
        sha256=_graph_digest(entry),
        opset=int(entry.meta["opset"]),
        calibration_sha256=calibration_sha256,
        reused=reused,
    )


def _build_findings(engine: EngineSpec, made: _Made, size_bytes: int, *, file: SpecFile) -> Iterator[Finding | Failure]:
    from gate.precision import check_delivered_precision

    if engine.plan is None or made.build.layers:
        yield check_delivered_precision(made.build, evidence=Evidence.PREFLIGHT)
    if engine.memory is not None and engine.memory.engine_mib is not None:
        mib = size_bytes / 2**20
        yield Finding(
            check="memory.engine_mib",
            estimate=mib,
            interval=Interval(mib, mib),
            limit=Limit(
                "at_most", engine.memory.engine_mib, "spec", file.engine_location(engine.name, "memory", "engine_mib")
            ),
            unit="MiB",
            n=1,
            evidence=Evidence.PREFLIGHT,
            hint="docs/findings.md#memory-engine_mib",
        )


def _run_engine(
    run: _Context, engine: EngineSpec, runner: Runner, result: EngineResult, *, findings: list[Finding | Failure]
) -> EngineResult:
    """Everything that needs the engine to run; findings are appended as they are made, so that none is lost."""
    from gate.memory import host_peak

    evidence = result.evidence or Evidence.PREFLIGHT
    with host_peak() as peak:
        compared = _compare(run, engine, runner, evidence, findings)
        if compared is None:
            return result
        result = msgspec.structs.replace(
            result, outputs=compared.outputs, task=compared.task, notes=(*result.notes, *compared.notes)
        )
        _metamorphic(run, engine, runner, evidence, findings)
        if engine.latency is not None:
            result = _latency(run, engine, runner, result, findings=findings)
    result = msgspec.structs.replace(result, host_peak_mib=peak.mib)
    if engine.memory is not None and engine.memory.host_peak_mib is not None:
        findings.append(
            Finding(
                check="memory.host_peak_mib",
                estimate=peak.mib if peak.mib is not None else float("nan"),
                interval=Interval(peak.mib or 0.0, peak.mib if peak.mib is not None else float("nan")),
                limit=Limit(
                    "at_most",
                    engine.memory.host_peak_mib,
                    "spec",
                    run.file.engine_location(engine.name, "memory", "host_peak_mib"),
                ),
                unit="MiB",
                n=1,
                evidence=evidence,
                hint="docs/findings.md#memory-host_peak_mib",
            )
        )
    if engine.baseline is not None:
        result = _against_baseline(run, engine, result, evidence, findings)
    return result


@dataclass(frozen=True)
class _Compared:
    outputs: tuple[OutputMetrics, ...]
    task: TaskMetrics | None
    notes: tuple[str, ...]


def _compare(
    run: _Context, engine: EngineSpec, runner: Runner, evidence: Evidence, findings: list[Finding | Failure]
) -> _Compared | None:
    """Run every sample through the engine beside the recorded reference. None where outputs cannot be paired."""
    from gate.compare import OutputAccumulator
    from gate.diagnosis import diagnose
    from gate.metrics.classification import ClassificationAccumulator, task_findings
    from gate.tolerances import allclose_tolerances, parity_findings

    recording = run.recording
    scores = _scores_output(run) if run.spec.task is not None else None
    accumulators: dict[str, OutputAccumulator] = {}
    task = ClassificationAccumulator() if scores is not None else None
    labels: list[Array] = []
    kept: dict[str, tuple[list[Array], list[Array]]] = {}
    kept_rows = 0
    with run.stage("compare", engine=engine.name, total=len(recording.files)):
        for batch, reference in run.pairs():
            candidate = run_batch(runner, batch, engine=engine, run=run)
            wrong = mismatches(reference, candidate, cast_io=engine.cast_io)
            if wrong:
                findings.append(
                    Failure(
                        check="parity.outputs",
                        error="RunError",
                        message="; ".join(dict.fromkeys(map(str, wrong))),
                        evidence=evidence,
                        hint=_output_hint(recording),
                    )
                )
                return None
            for name, values in reference.items():
                if name not in accumulators:
                    scale = recording.outputs[name]
                    atol, rtol = allclose_tolerances(engine, rms=scale.rms)
                    accumulators[name] = OutputAccumulator(
                        name,
                        dtype=values.dtype,
                        atol=atol,
                        rtol=rtol,
                        center=scale.center,
                        batch_axis=scale.batch_axis,
                    )
                accumulators[name].add(values, candidate[name], first_sample=batch.first)
            if task is not None and scores is not None:
                if batch.labels is None:
                    raise DataError(
                        "[task] needs labels, and the samples have none",
                        where=f"[data] source = {run.spec.data.source!r}",
                    )
                task.add(reference[scores], candidate[scores], batch.labels, first_sample=batch.first)
                labels.append(batch.labels)
            if kept_rows < DIAGNOSED_ROWS:
                for name, values in reference.items():
                    pair = kept.setdefault(name, ([], []))
                    pair[0].append(values)
                    pair[1].append(candidate[name])
                kept_rows += batch.size
            run.observer.advance()
    outputs = tuple(each.metrics() for each in accumulators.values())
    notes: list[str] = []
    if engine.parity is not None:
        parity = parity_findings(outputs, engine=engine, file=run.file, evidence=evidence)
        findings.extend(parity)
        if any(finding.status is not Status.PASSED for finding in parity):
            for metrics in outputs:
                pair = kept[metrics.output]
                alike = len({each.shape[1:] for each in pair[0]}) == 1
                if recording.outputs[metrics.output].batch_axis and metrics.kind == "float" and alike:
                    notes.extend(diagnose(metrics, np.concatenate(pair[0]), np.concatenate(pair[1])))
    counted = None
    if task is not None:
        counted = task.metrics()
        if engine.task is not None:
            findings.extend(
                task_findings(counted, engine=engine, file=run.file, evidence=evidence, labels=np.concatenate(labels))
            )
    if scores is not None and any(finding.status is not Status.PASSED for finding in findings):
        notes.extend(_worst_answer(run, engine, runner, scores, outputs))
    return _Compared(outputs=outputs, task=counted, notes=tuple(dict.fromkeys(notes)))


def _worst_answer(
    run: _Context, engine: EngineSpec, runner: Runner, scores: str, outputs: tuple[OutputMetrics, ...]
) -> Iterator[str]:
    """What reference and engine say of the worst sample, for a reader who has to look at it."""
    worst = next((each.worst_samples[0][0] for each in outputs if each.output == scores and each.worst_samples), None)
    if worst is None:
        return
    for batch, reference in run.pairs():
        row = worst - batch.first
        if not 0 <= row < batch.size:
            continue
        theirs = np.asarray(reference[scores][row], dtype=np.float64)
        ours = np.asarray(run_batch(runner, batch, engine=engine, run=run)[scores][row], dtype=np.float64)
        label = "" if batch.labels is None else f"label {batch.labels[row]}, "
        margin = np.sort(theirs)[-1] - np.sort(theirs)[-2] if theirs.size > 1 else np.inf
        answer = f"engine {int(ours.argmax())}" if np.isfinite(ours).all() else "engine NaN or Inf"
        yield f"worst sample {worst}: {label}reference {int(theirs.argmax())} by {margin:.2g}, {answer}"
        return


def _output_hint(recording: Recording) -> str:
    names = ", ".join(f'"{name}"' for name in recording.outputs)
    return (
        f'Re-export with output_names = [{names}], or map them: outputs = {{ {next(iter(recording.outputs))} = "…" }}.'
    )


def run_batch(runner: Runner, batch: Batch, *, engine: EngineSpec, run: _Context) -> dict[str, Array]:
    """The engine's outputs for a batch, under the reference's names.

    A batch smaller than the profile allows is filled up with its last sample, and the outputs cut again.
    """
    started = time.perf_counter()
    outputs = run_filled(runner, batch, inputs=run.spec.inputs)
    run.seconds["inside_engines"] = run.seconds.get("inside_engines", 0.0) + time.perf_counter() - started
    return _renamed(outputs, engine.outputs)


def _renamed(outputs: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    """The engine's outputs under the reference's names.

    Raises:
        RunError: An output that the spec names is not there, is named twice, or takes the name of another.
    """
    for ours, theirs in names.items():
        if theirs not in outputs:
            raise RunError(f"outputs = {{ {ours} = {theirs!r} }}: the engine has {', '.join(map(repr, outputs))}")
    if len(set(names.values())) != len(names):
        raise RunError(f"outputs names one output of the engine twice: {', '.join(map(repr, names.values()))}")
    renamed = {theirs: ours for ours, theirs in names.items()}
    given = [renamed.get(name, name) for name in outputs]
    if twice := [name for name in dict.fromkeys(given) if given.count(name) > 1]:
        raise RunError(
            f"outputs maps {names[twice[0]]!r} to {twice[0]!r}, and the engine has an output {twice[0]!r} of its own"
        )
    return dict(zip(given, outputs.values(), strict=True))


def _metamorphic(
    run: _Context, engine: EngineSpec, runner: Runner, evidence: Evidence, findings: list[Finding | Failure]
) -> None:
    from gate.tolerances import METAMORPHIC

    if not applicable_checks(engine, run.spec.inputs):
        return
    asked = engine.metamorphic.rel_rmse
    limit = (
        Limit("at_most", METAMORPHIC[engine.precision], "default")
        if asked is None
        else Limit("at_most", asked, "spec", run.file.engine_location(engine.name, "metamorphic", "rel_rmse"))
    )
    with run.stage("metamorphic", engine=engine.name):
        samples = next(run.source.batches(batch_size(run.file))).inputs
        findings.extend(
            metamorphic_findings(
                runner,
                samples,
                engine=engine,
                inputs=run.spec.inputs,
                limit=limit,
                evidence=evidence,
                without_batch=[
                    engine.outputs.get(name, name)
                    for name, scale in run.recording.outputs.items()
                    if not scale.batch_axis
                ],
            )
        )


def _latency(
    run: _Context, engine: EngineSpec, runner: Runner, result: EngineResult, *, findings: list[Finding | Failure]
) -> EngineResult:
    from gate.latency import latency_findings, samples_needed, summarise
    from gate.timing import sample

    asked = engine.latency or LatencySpec()
    evidence = result.evidence or Evidence.PREFLIGHT
    count = asked.samples or samples_needed(asked)
    with run.stage("latency", engine=engine.name, total=count):
        try:
            batch = next(run.source.batches(asked.batch))
            rows = np.arange(asked.batch) % batch.size
            feed = {name: np.ascontiguousarray(values[rows]) for name, values in batch.inputs.items()}
            raw = sample(
                runner.timed(feed),
                samples=count,
                warm_up_s=asked.warm_up_s,
                max_time_s=asked.max_time_s,
                observer=run.observer,
            )
            metrics = summarise(
                raw.durations_ns,
                batch=asked.batch,
                sessions=1,
                warm_up=raw.warm_up,
                clock=raw.clock,
                timed="host_wall",
            )
            findings.extend(latency_findings(metrics, engine=engine, file=run.file, evidence=evidence))
        except GateError as err:
            findings.append(_failure("latency", err, evidence))
            return result
    return msgspec.structs.replace(result, latency=metrics)


def _against_baseline(
    run: _Context,
    engine: EngineSpec,
    result: EngineResult,
    evidence: Evidence,
    findings: list[Finding | Failure],
) -> EngineResult:
    from gate.baseline import check_against_baseline

    compared = check_against_baseline(
        result,
        engine=engine,
        file=run.file,
        root=run.options.baselines,
        samples=len(run.source),
        data_sha256=run.digest.data_sha256,
        evidence=evidence,
    )
    findings.extend(compared.findings)
    return msgspec.structs.replace(result, baseline_sha256=compared.sha256)


def seal_passed(file: SpecFile, run: CheckRun, out: Path, *, baselines: Path = Path("baselines")) -> tuple[Sealed, ...]:
    """Seal every engine of a run that passed, each into `out/<model>/<engine>`.

    Raises:
        BundleError: A bundle cannot be written.
        DigestMismatch: An engine's file is not the one that was checked.
    """
    from gate.baseline import baseline_bytes
    from gate.store import seal

    least = Evidence(file.spec.policy.seal_evidence)
    sealed: list[Sealed] = []
    for result in run.engines:
        reason = None
        if result.verdict is None:
            reason = f"NOT RUN: {result.not_run}"
        elif result.verdict.status is not Status.PASSED:
            reason = result.verdict.status.value
        elif result.evidence is None or result.evidence.rank < least.rank:
            reason = (
                f"evidence {result.evidence.value if result.evidence else 'none'}, the policy asks for {least.value}"
            )
        elif result.engine_path is None:
            reason = "its file is not at hand; run the check again"
        if reason is not None or result.verdict is None or result.engine_path is None:
            sealed.append(Sealed(result.name, None, reason))
            continue
        extra = {"policy/gate.toml": file.text.encode()}
        if result.baseline_sha256 is not None:
            extra["baseline/baseline.json"] = baseline_bytes(result, run=run, root=baselines)
        path = out / run.model_id / result.name
        seal(
            result.verdict.require_passed(),
            run=run,
            result=result,
            engine_file=Path(result.engine_path),
            extra=extra,
            out=path,
            replace=True,
        )
        sealed.append(Sealed(result.name, path, None))
    return tuple(sealed)


@_not_ended_by_user_code()
def record(file: SpecFile, out: Path, options: CheckOptions, observer: Observer) -> Path:
    """Record the reference and the graphs of all engines into a folder, for a host without PyTorch.

    Raises:
        As `check`.
    """
    from gate.atomic import folder

    run = _Context(file, replace(options, reference=None), observer)
    run.open_samples()
    run.open_reference()
    _require_reference_is_right(run)
    exported = run.exported()
    graphs = {"fp32": RecordedGraph(exported.path, exported.opset)}
    for engine in file.spec.engines:
        if engine.onnx is None and engine.plan is None and engine.precision not in graphs:
            lowered = _lower(run, engine.precision, exported)
            graphs[engine.precision] = RecordedGraph(lowered.path, lowered.opset, lowered.calibration_sha256)
    with folder(out, existing="replace") as made:
        write_recording(run.recording, made, file=file, identity=run.identity, digest=run.digest, graphs=graphs)
    observer.done()
    return out
