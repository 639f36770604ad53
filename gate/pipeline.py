"""The order of steps, nothing else: check, seal what passed, record the reference."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gate.engines import backend as backend_named
from gate.engines.feed import profile_of
from gate.engines.interface import CALIBRATION_NAME, Backend
from gate.errors import BackendUnavailable, DataError, MeasurementError, ReferenceMismatch, RunError, SpecError
from gate.manifest import sha256_hex
from gate.metrics.interface import MetricKind
from gate.reference import RECORDING, RecordedGraph, external_data, file_digest, onnx_digest, write_recording
from gate.results import CheckRun, EngineResult, Provenance
from gate.spec import EngineSpec, SpecFile
from gate.steps.context import CheckOptions, Context, Observer, Silence, scores_output
from gate.steps.judge import check_engine
from gate.steps.make import exported_graph, graph_name, lowered_graph
from gate.steps.task import reference_values, require_task, task_kind
from gate.utc import utc_now
from gate.verdict import Evidence, Status

if TYPE_CHECKING:
    from gate.store import Release

__all__ = [
    "CheckOptions",
    "Observer",
    "Sealed",
    "Silence",
    "check",
    "not_run_reason",
    "record",
    "seal_passed",
]


_STATED_SLACK = 0.01
"""How far a reference may miss what training said of it, as a share of that: other versions, another machine."""


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
        BackendUnavailable: A backend is not installed or cannot be used here, or needs the model where there is a
            recording, and its engine is not optional.
        ExportError: PyTorch to ONNX failed.
        ReferenceMismatch: The reference misses what training reported.
        MeasurementError: No engine ran.
    """
    options = options or CheckOptions()
    observer = observer or Silence()
    started = time.perf_counter()
    chosen = [file.engine(name) for name in options.engines] or list(file.spec.engines)
    usable = {engine.name: _usable(engine, file, recorded=options.reference is not None) for engine in chosen}
    reasons = {name: reason for name, reason in usable.items() if isinstance(reason, str)}
    if len(reasons) == len(usable):
        raise MeasurementError(
            f"no engine can run here, so there is nothing to pass\n{_by_reason(reasons)}",
            where=str(file.path),
            hint=f"next: gate doctor --spec {shlex.quote(str(file.path))}",
        )
    run = Context(file, options, observer)
    try:
        return _checked(run, chosen, usable, started=started)
    finally:
        run.close()


def _checked(
    run: Context, chosen: Sequence[EngineSpec], usable: Mapping[str, Backend | str], *, started: float
) -> CheckRun:
    """Every engine checked in turn against one reference."""
    from gate import __version__
    from gate.device import fingerprint, git_revision

    file, observer = run.file, run.observer
    task_kind(run)
    run.open_samples()
    require_task(run)
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
        results.append(check_engine(run, engine, backend))
    observer.done()
    run.seconds["total"] = time.perf_counter() - started
    gpu = any(result.evidence is Evidence.DEVICE for result in results)
    return CheckRun(
        gate_version=__version__,
        spec_path=str(file.path),
        model_id=file.spec.model.id,
        samples=len(run.source),
        created=utc_now(),
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
        profile=profile_of(file.spec),
        engines=tuple(results),
        seconds={name: round(value, 4) for name, value in run.seconds.items()},
        reused=("reference",) if run.recording.reused else (),
        data=run.data_record(),
    )


def _by_reason(reasons: Mapping[str, str]) -> str:
    """A line for each reason, with the engines that it holds for."""
    engines: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        engines.setdefault(reason.removeprefix(f"engine {name!r} "), []).append(name)
    return "\n".join(f"  {', '.join(names)}: {reason}" for reason, names in engines.items())


def _usable(engine: EngineSpec, file: SpecFile, *, recorded: bool) -> Backend | str:
    """The engine's backend, or why an optional engine is not run.

    Raises:
        BackendUnavailable: It cannot be used here, and the engine is not optional.
        SpecError: It can, and does not have what the engine asks for.
    """
    try:
        backend = backend_named(engine.backend)
        if recorded:
            _require_no_model(engine, file, backend)
        backend.version()
        unsupported: SpecError | None = None
        try:
            backend.require_supported(engine)
        except SpecError as err:
            unsupported = err
        _require_evidence(engine, file, backend, unsupported)
        if unsupported is not None:
            raise unsupported
    except BackendUnavailable as err:
        if engine.optional:
            return err.message
        raise
    return backend


def _require_no_model(engine: EngineSpec, file: SpecFile, backend: Backend) -> None:
    """Hold an engine against a recording, which has the model's answers and graphs, and no model.

    Raises:
        BackendUnavailable: It is made from the model itself.
    """
    if engine.plan is None and engine.onnx is None and backend.origin(engine) == "model":
        raise BackendUnavailable(
            f"engine {engine.name!r} is made from the model itself, and a recording has only its answers and graphs",
            where=file.engine_location(engine.name, "backend"),
            hint="Run without --reference, leave this engine out with --engine, or set optional = true to list it as "
            "NOT RUN here.",
        )


def _require_evidence(engine: EngineSpec, file: SpecFile, backend: Backend, unsupported: SpecError | None) -> None:
    """Hold the evidence that an engine asks for against this machine.

    Args:
        engine: What is asked for.
        file: The spec.
        backend: The engine's.
        unsupported: What else is wrong; it is told behind, since this machine could not run the engine without it.

    Raises:
        BackendUnavailable: This machine does not give it.
    """
    needed = Evidence(engine.required_evidence)
    here = backend.runs_here(engine)
    if needed is Evidence.PREFLIGHT or (here is not None and here.rank >= needed.rank):
        return
    raise BackendUnavailable(
        f"engine {engine.name!r} asks for evidence {needed.value!r}, and backend {engine.backend!r} "
        f"{'can only compile' if here is None else f'gives {here.value!r}'} on this machine"
        f"{'' if unsupported is None else f'; besides, {unsupported.message}'}",
        where=file.engine_location(engine.name, "evidence"),
        hint="Run it on a machine with that device, set optional = true to list it as NOT RUN here, "
        'or evidence = "preflight" to compile only.',
    )


def not_run_reason(engine: EngineSpec, file: SpecFile, *, reference: Path | None = None) -> str | None:
    """Why an optional engine is NOT RUN on this machine; None where it can be run.

    Args:
        engine: Which.
        file: The spec.
        reference: The recording that stands in the model's place; None: the model itself.

    Raises:
        BackendUnavailable: It cannot be run, and is not optional.
        SpecError: Its backend does not have what it asks for.
    """
    usable = _usable(engine, file, recorded=reference is not None)
    return usable if isinstance(usable, str) else None


def _require_reference_is_right(run: Context) -> None:
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
    kind = task_kind(run)
    expected = stated_metrics(stated, run.file.folder, where=where, fractions=kind is None)
    if run.spec.task is None:
        return
    if kind is not None:
        _require_values(expected, run, kind, where=where)
        return
    output = scores_output(run)
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


def _require_values(expected: Mapping[str, float], run: Context, kind: MetricKind, *, where: str) -> None:
    """As `_require_reference_is_right`, for a task other than classification: within a hundredth of what training said."""
    measured = reference_values(run, kind)
    for name, value in expected.items():
        if name not in measured:
            raise ReferenceMismatch(
                f"[model] metrics has {name!r}, which [task] does not measure; it measures {', '.join(measured)}",
                where=where,
            )
        better = kind.values[name].higher_is_better if name in kind.values else True
        got = measured[name]
        if not (got >= value - _STATED_SLACK * abs(value) if better else got <= value + _STATED_SLACK * abs(value)):
            raise ReferenceMismatch(
                f"the reference itself is wrong: {name} {got:.4g}, training said {value:.4g}",
                where=where,
                hint="No engine was judged. Look at the weights, the preprocessing, the postprocessing and the categories.",
            )


def seal_passed(
    file: SpecFile,
    run: CheckRun,
    out: Path,
    *,
    baselines: Path = Path("baselines"),
    release: Release | None = None,
) -> tuple[Sealed, ...]:
    """Seal every engine of a run that passed, each into `out/<model>/<engine>`.

    Args:
        file: The spec.
        run: The run.
        out: Where the bundles go.
        baselines: Where the accepted baselines lie.
        release: What the verdicts are signed for, and who signs them; None: nobody.

    Raises:
        BundleError: A bundle cannot be written.
        DigestMismatch: An engine's file is not the one that was checked.
    """
    from gate.baseline import baseline_bytes
    from gate.engines.containers import FALLBACK_PATH
    from gate.store import CALIBRATION_PATH, seal

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
        elif (why := backend_named(result.backend).unsealable(file.engine(result.name))) is not None:
            reason = why
        elif result.engine_path is None:
            reason = "its file is not at hand; run the check again"
        elif result.engine_path.endswith(".onnx") and (beside := external_data(Path(result.engine_path))):
            reason = f"its weights lie in other files, {', '.join(beside)}, which a bundle does not hold yet"
        fallback = _fallback_graph(file, result) if reason is None else None
        if isinstance(fallback, str):
            reason = fallback
        if reason is not None or result.verdict is None or result.engine_path is None:
            sealed.append(Sealed(result.name, None, reason))
            continue
        extra: dict[str, bytes | Path] = {"policy/gate.toml": file.text.encode()}
        if result.baseline_sha256 is not None:
            extra["baseline/baseline.json"] = baseline_bytes(result, run=run, root=baselines)
        if result.build is not None and "calibration_cache" in result.build.digests:
            extra[CALIBRATION_PATH] = Path(result.engine_path).with_name(CALIBRATION_NAME)
        if isinstance(fallback, Path):
            extra[FALLBACK_PATH] = fallback
        path = out / run.model_id / result.name
        seal(
            result.verdict.require_passed(),
            run=run,
            result=result,
            engine_file=Path(result.engine_path),
            extra=extra,
            out=path,
            replace=True,
            release=release,
        )
        sealed.append(Sealed(result.name, path, None))
    return tuple(sealed)


def _fallback_graph(file: SpecFile, result: EngineResult) -> Path | str | None:
    """The graph that goes into an engine's bundle beside it; why it cannot, and with it the engine; or None.

    None where none is asked for, and for an engine that is no plan or that the team brought as a plan.
    """
    engine = file.engine(result.name)
    compiled = result.backend in ("tensorrt", "tensorrt_rtx") and engine.plan is None
    if not file.spec.policy.seal_fallback or not compiled:
        return None
    asked = "[policy] seal_fallback asks for the graph that it was compiled from, and"
    path = None if result.graph_path is None else Path(result.graph_path)
    if path is None or not path.is_file():
        return f"{asked} that is not at hand; run the check again"
    try:
        beside = external_data(path)
        if result.graph_sha256 not in (file_digest(path), onnx_digest(path)):
            return f"{asked} {path} was changed since; run the check again"
    except DataError as err:
        return f"{asked} {path} cannot be read: {err.message}"
    if beside:
        return f"{asked} its weights lie in other files, {', '.join(beside)}, which a bundle does not hold yet"
    return path


@_not_ended_by_user_code()
def record(file: SpecFile, out: Path, options: CheckOptions, observer: Observer) -> Path:
    """Record the reference and the graphs of all engines into a folder, for a host without PyTorch.

    Raises:
        As `check`.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / RECORDING).is_file())):
        raise SpecError("is there and is no recording, so it is not replaced", where=str(out))
    run = Context(file, replace(options, reference=None), observer)
    try:
        return _recorded(run, out)
    finally:
        run.close()


def _recorded(run: Context, out: Path) -> Path:
    from gate.atomic import folder

    file, observer = run.file, run.observer
    task_kind(run)
    run.open_samples()
    require_task(run)
    run.open_reference()
    _require_reference_is_right(run)
    exported = exported_graph(run)
    graphs = {"fp32": RecordedGraph(exported.path, exported.opset)}
    for engine in file.spec.engines:
        made_here = engine.onnx is None and engine.plan is None
        if made_here and backend_named(engine.backend).origin(engine) == "lowered" and graph_name(engine) not in graphs:
            lowered = lowered_graph(run, engine, exported)
            graphs[graph_name(engine)] = RecordedGraph(lowered.path, lowered.opset, lowered.calibration_sha256)
    with folder(out, existing="replace") as made:
        write_recording(run.recording, made, file=file, identity=run.identity, digest=run.digest, graphs=graphs)
    observer.done()
    return out
