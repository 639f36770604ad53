"""From an engine's file to its verdict: run it, compare it, time it, hold it against the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from gate.engines.interface import Backend, Runner
from gate.errors import BuildError, GateError
from gate.latency.config import latency_checks
from gate.latency.ratio import LOOKS
from gate.latency.stages import stage_checks
from gate.latency.usage import usage_checks
from gate.metamorphic import applicable_checks, metamorphic_findings
from gate.metrics.findings import asked_limits
from gate.rebuilds import build_differences, with_spread
from gate.reference import batch_size
from gate.results import EngineResult, TaskValues
from gate.spec import EngineSpec, SpecFile, located
from gate.steps.compare import Compared, compare_outputs
from gate.steps.context import Context
from gate.steps.latency import measured_latency, measured_usage
from gate.steps.make import Made, make_engine, model_resources
from gate.steps.rivals import SESSION_MEMORY, engine_memory, first_sessions, timing_of
from gate.steps.task import task_kind
from gate.steps.tiled import tiled_answers
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Verdict, is_covered

if TYPE_CHECKING:
    from gate.memory import DevicePeak


def check_engine(run: Context, engine: EngineSpec, backend: Backend) -> EngineResult:
    """Build, run and judge one engine. What goes wrong in it is a Failure of its own."""
    preflight = engine.required_evidence == "preflight"
    evidence = Evidence.PREFLIGHT if preflight else backend.runs_here(engine) or Evidence.PREFLIGHT
    result = EngineResult(
        name=engine.name, backend=engine.backend, precision=engine.precision, verdict=None, evidence=evidence
    )
    findings: list[Finding | Failure] = []
    try:
        made = make_engine(run, engine, backend)
    except GateError as err:
        return _judged(run, engine, result, [_failure("build", err, Evidence.PREFLIGHT)])
    size = _size_bytes(engine, backend, made)
    result = msgspec.structs.replace(
        result,
        size_bytes=size,
        build=made.build,
        engine_sha256=made.sha256,
        engine_path=str(made.path),
        graph_path=None if made.graph is None else str(made.graph),
        graph_sha256=made.graph_sha256,
        onnx_opset=made.opset,
        calibration_sha256=made.calibration_sha256,
        reused=made.reused,
        notes=made.notes,
        warnings=made.warnings,
        lowering=made.lowering,
    )
    findings.extend(_build_findings(engine, made, size, file=run.file))
    if not preflight:
        try:
            result = _opened_and_run(run, engine, backend, result, made=made, findings=findings)
        except GateError as err:
            findings.append(_failure("run", err, evidence))
        if engine.rebuilds > 1:
            more, notes = rebuilt(run, engine, backend, made)
            findings = with_spread(findings, more)
            result = msgspec.structs.replace(result, notes=(*result.notes, *notes))
    return _judged(run, engine, result, findings)


def _opened_and_run(
    run: Context,
    engine: EngineSpec,
    backend: Backend,
    result: EngineResult,
    *,
    made: Made,
    findings: list[Finding | Failure],
) -> EngineResult:
    """Load the engine and do everything that needs it; its device memory is watched until it is timed."""
    from gate.device import device_memory_used_bytes, open_context
    from gate.memory import device_peak

    on_gpu = result.evidence is Evidence.DEVICE
    if on_gpu:
        open_context()
    with device_peak(device_memory_used_bytes if on_gpu else lambda: None) as peak:
        with _opened(run, engine, backend, made) as runner:
            result = _run_engine(run, engine, runner, result, findings=findings, peak=peak)
        peak.stop()
    if engine.memory is not None and engine.memory.device_peak_mib is not None:
        findings.append(_memory_finding("device_peak_mib", peak.mib, engine, run, evidence=Evidence.DEVICE))
    result = msgspec.structs.replace(result, device_peak_mib=peak.mib)
    if not result.outputs:
        return result
    result = _in_fresh_processes(run, engine, result, made, findings)
    if engine.baseline is not None:
        result = _against_baseline(run, engine, result, result.evidence or Evidence.PREFLIGHT, findings)
    return result


def _in_fresh_processes(
    run: Context, engine: EngineSpec, result: EngineResult, made: Made, findings: list[Finding | Failure]
) -> EngineResult:
    """What is measured in sessions: latency, usage, and the memory of engines that are loaded together."""
    memory = engine.memory
    in_session = () if memory is None else tuple(key for key in memory.budgets if key in SESSION_MEMORY)
    if engine.latency is None and engine.usage is None and not in_session:
        return result
    timing = timing_of(run, engine, made, evidence=result.evidence or Evidence.PREFLIGHT)
    if engine.latency is not None:
        with run.stage("latency", engine=engine.name, total=first_sessions(engine)):
            timed = measured_latency(timing)
        findings.extend(timed.findings)
        result = msgspec.structs.replace(result, latencies=timed.latencies)
    if engine.usage is not None:
        with run.stage("usage", engine=engine.name, total=LOOKS[0]):
            usage, found = measured_usage(timing, engine.usage)
        findings.extend(found)
        result = msgspec.structs.replace(result, usage=usage)
    if memory is not None and in_session:
        with run.stage("memory", engine=engine.name):
            use, problems = engine_memory(run, timing, memory)
        findings.extend(problems)
        if use is not None:
            result = msgspec.structs.replace(result, memory=use.together or use.alone)
            for key in in_session:
                evidence = result.evidence or Evidence.PREFLIGHT
                findings.append(_memory_finding(key, use.of(key), engine, run, evidence=evidence))
    return result


def _opened(run: Context, engine: EngineSpec, backend: Backend, made: Made) -> Runner:
    here = located(engine, run.file.folder)
    return backend.open(made.path, spec=run.spec, engine=here, resources=model_resources(run))


def rebuilt(
    run: Context, engine: EngineSpec, backend: Backend, made: Made
) -> tuple[list[list[Finding | Failure]], tuple[str, ...]]:  # the pair never leaves this module
    """The engine built again, as often as the spec asks, and each build compared with the reference.

    Returns:
        The findings of each further build, and notes on how the builds differ.
    """
    evidence = backend.runs_here(engine) or Evidence.PREFLIGHT
    found: list[list[Finding | Failure]] = []
    others: list[Made] = []
    for index in range(1, engine.rebuilds):
        findings: list[Finding | Failure] = []
        found.append(findings)
        try:
            again = make_engine(run, engine, backend, rebuild=index)
            others.append(again)
            findings.extend(_build_findings(engine, again, _size_bytes(engine, backend, again), file=run.file))
            with _opened(run, engine, backend, again) as runner:
                compared = compare_outputs(run, engine, runner, evidence, findings, engine_sha256=again.sha256)
                if compared is not None:
                    _scores(run, engine, runner, compared, evidence, findings=findings, engine_sha256=again.sha256)
        except GateError as err:
            findings.append(_failure(f"run[rebuild {index}]", err, evidence))
    builds = (made, *others)
    return found, build_differences([each.build for each in builds], [each.sha256 for each in builds])


def _judged(run: Context, engine: EngineSpec, result: EngineResult, findings: list[Finding | Failure]) -> EngineResult:
    """The result with its verdict; a check that the spec asked for and that has no finding is a Failure."""
    names = {finding.check for finding in findings}
    failed = any(isinstance(finding, Failure) for finding in findings)
    required = required_checks(engine, run, layers_listed=result.build is not None and bool(result.build.layers))
    for name in required:
        if not is_covered(name, names) and not failed:
            findings.append(
                Failure(
                    check=name,
                    error="MeasurementError",
                    message=f"{name} was asked for and nothing was measured",
                    evidence=result.evidence or Evidence.PREFLIGHT,
                    hint="Nothing compared is not a pass.",
                )
            )
    return msgspec.structs.replace(result, verdict=Verdict(findings=tuple(findings), required=required))


def required_checks(engine: EngineSpec, run: Context, *, layers_listed: bool) -> tuple[str, ...]:
    """Names of the checks that must have a finding; one of several outputs stands for all of them.

    Args:
        engine: What was asked for.
        run: Of it.
        layers_listed: Whether the engine's layers are known: a package of AOTInductor has them only if the gate made it.
    """
    lists_layers = engine.plan is None or engine.backend in ("onnxruntime", "tensorrt", "tensorrt_rtx")
    names: list[str] = ["build.delivered_precision"] if lists_layers or layers_listed else []
    if engine.required_evidence == "preflight":
        return tuple(names)
    names.extend(applicable_checks(engine, run.spec.inputs))
    if engine.parity is not None:
        names.append("parity.nonfinite")
    if engine.task is not None:
        asked = {key: getattr(engine.task, key) for key in engine.task.__struct_fields__}
        wanted = [key for key, value in asked.items() if value is not None] or ["top1_drop_at_most_pp"]
        names.extend("task." + key.replace("_drop_at_most_pp", "_drop_pp").replace("_at_least", "") for key in wanted)
    kind = task_kind(run)
    if kind is not None and engine.task_limits is not None:
        names.extend(each.check for each in asked_limits(kind, engine, run.file))
    names.extend(latency_checks(engine.latency))
    names.extend(stage_checks(engine.stages))
    names.extend(usage_checks(engine.usage))
    if engine.baseline is not None:
        names.append("baseline")
    if engine.memory is not None:
        names.extend(f"memory.{key}" for key in engine.memory.budgets)
    return tuple(names)


def _failure(check: str, err: GateError, evidence: Evidence) -> Failure:
    text = f"{err.where}: {err.message}" if err.where else err.message
    if isinstance(err, BuildError):
        node = [f"node: {err.node}"] if err.node else []
        text = "\n".join([text, *node, *(f"  | {line}" for line in err.log)])
    return Failure(check=check, error=type(err).__name__, message=text, evidence=evidence, hint=err.hint or "")


def _size_bytes(engine: EngineSpec, backend: Backend, made: Made) -> int | None:
    """Size of the engine's file; None where PyTorch keeps no engine in it."""
    if engine.backend == "torch" and backend.unsealable(engine) is not None:
        return None
    return made.path.stat().st_size


def _build_findings(
    engine: EngineSpec, made: Made, size_bytes: int | None, *, file: SpecFile
) -> Iterator[Finding | Failure]:
    from gate.precision import check_delivered_precision, excluded_by

    if engine.plan is None or made.build.layers or made.build.layers_source == "inspector":
        nodes = made.lowering.layers if made.lowering is not None else ()
        yield check_delivered_precision(
            made.build, evidence=Evidence.PREFLIGHT, excluded=excluded_by(engine.lowering, nodes)
        )
    if engine.memory is not None and engine.memory.engine_mib is not None:
        if size_bytes is None:
            yield Failure(
                check="memory.engine_mib",
                error="MeasurementError",
                message=f"PyTorch keeps no engine file in mode = {engine.options.mode or 'eager'!r}, so it has no size",
                evidence=Evidence.PREFLIGHT,
                hint='Leave engine_mib out, or use mode = "aotinductor", which makes a file.',
            )
            return
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
    run: Context,
    engine: EngineSpec,
    runner: Runner,
    result: EngineResult,
    *,
    findings: list[Finding | Failure],
    peak: DevicePeak,
) -> EngineResult:
    """Everything that needs the engine to run; findings are appended as they are made, so that none is lost."""
    from gate.memory import host_peak

    evidence = result.evidence or Evidence.PREFLIGHT
    with host_peak() as host:
        compared = compare_outputs(
            run,
            engine,
            runner,
            evidence,
            findings,
            engine_sha256=result.engine_sha256 or "",
            before_device=lambda: _seen(peak),
        )
        if compared is None:
            return result
        result = msgspec.structs.replace(
            result,
            outputs=compared.outputs,
            task=compared.task,
            warnings=(*result.warnings, *(() if compared.answers is None else compared.answers.warnings)),
            notes=(*result.notes, *compared.notes),
        )
        _metamorphic(run, engine, runner, evidence, findings)
        if not compared.on_device:
            _seen(peak)
        if engine.stages is not None:
            result = _stages(run, engine, runner, result, findings=findings)
    result = msgspec.structs.replace(result, host_peak_mib=host.mib)
    if engine.memory is not None and engine.memory.host_peak_mib is not None:
        findings.append(_memory_finding("host_peak_mib", host.mib, engine, run, evidence=evidence))
    # Images that are cut into tiles take host memory of the gate's own, so it is not watched any more.
    scores = _scores(
        run, engine, runner, compared, evidence, findings=findings, engine_sha256=result.engine_sha256 or ""
    )
    return msgspec.structs.replace(result, scores=scores)


def _stages(
    run: Context, engine: EngineSpec, runner: Runner, result: EngineResult, *, findings: list[Finding | Failure]
) -> EngineResult:
    """The stages of the whole pipeline, one sample after another."""
    from gate.steps.stages import stages_of

    evidence = result.evidence or Evidence.PREFLIGHT
    total = None if engine.stages is None else engine.stages.samples
    with run.stage("stages", engine=engine.name, total=total):
        try:
            found = stages_of(run, engine, runner, evidence=evidence)
        except GateError as err:
            findings.extend(_failure(check, err, evidence) for check in stage_checks(engine.stages) or ("stages",))
            return result
    findings.extend(found.findings)
    return msgspec.structs.replace(result, stages=found.stages, notes=(*result.notes, *found.notes))


def _scores(
    run: Context,
    engine: EngineSpec,
    runner: Runner,
    compared: Compared,
    evidence: Evidence,
    *,
    findings: list[Finding | Failure],
    engine_sha256: str,
) -> TaskValues | None:
    """The values of a task other than classification, those over tiles beside them where the spec has `[tiling]`."""
    if compared.answers is None:
        return None
    try:
        tiled = tiled_answers(run, engine, runner, compared.answers, evidence, engine_sha256=engine_sha256)
    except GateError as err:
        findings.append(_failure("task.tiled", err, evidence))
        return compared.answers.values
    findings.extend(tiled.findings)
    return tiled.values


def _seen(peak: DevicePeak) -> None:
    """Look a last time: what comes next takes device memory that is not the engine's, or must not be disturbed."""
    peak.look()
    peak.stop()


def _memory_finding(key: str, mib: float | None, engine: EngineSpec, run: Context, *, evidence: Evidence) -> Finding:
    """A peak against its budget; NaN, which fails, where the system does not tell."""
    value = math.nan if mib is None else mib
    return Finding(
        check=f"memory.{key}",
        estimate=value,
        interval=Interval(0.0 if mib is None else mib, value),
        limit=Limit(
            "at_most", getattr(engine.memory, key), "spec", run.file.engine_location(engine.name, "memory", key)
        ),
        unit="MiB",
        n=1,
        evidence=evidence,
        hint=f"docs/findings.md#memory-{key}",
    )


def _metamorphic(
    run: Context, engine: EngineSpec, runner: Runner, evidence: Evidence, findings: list[Finding | Failure]
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


def _against_baseline(
    run: Context,
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
