"""`metadata.json`: what a sealed engine is, how it was made, what it was compared with, and what came of it. Pure.

The top-level `metadata_schema.json` is generated from the structs here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec

from gate.engines.interface import BuildRecord, CalibrationRecord, LoweringRecord
from gate.errors import BundleError, MeasurementError, VerificationError
from gate.latency.bounds import equal_parts, percentile_bounds, throughput_bounds, throughput_of
from gate.latency.config import PERCENTILES, Cell, LatencySpec, timed_tables
from gate.latency.measurement import Region
from gate.latency.ratio import (
    LEAST_KEPT,
    RATIO_PERCENTILES,
    RatioEstimate,
    estimate,
    log_ratio,
    nearest_rank,
    positive_durations,
)
from gate.manifest import (
    Digests,
    FileDigest,
    NonFinite,
    Number,
    RelativePath,
    Timestamp,
    pretty_json,
    strict_json,
)
from gate.results import (
    CheckRun,
    Comparison,
    EngineResult,
    Fingerprint,
    LatencyMetrics,
    OutputMetrics,
    RegionSummary,
    SessionPair,
    TaskMetrics,
    TaskValues,
    builtins_from,
)
from gate.spec import Name
from gate.verdict import Evidence, Finding, Interval, Limit, Status, Verdict

METADATA_PATH = "artifacts/metadata.json"
LATENCY_PATH = "evidence/latency.json"
SCHEMA_ID = "urn:trt-gate:schema:metadata:1"

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The GPU that the engine ran on."""

    name: str
    compute_capability: str


class SealedInterval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A confidence interval; an unbounded side is the text "Infinity" or "-Infinity"."""

    lower: Number
    upper: Number


class SealedFinding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One measured number against one limit, as in gate.verdict.Finding; its status is computed again on reading."""

    type: Literal["finding"]
    check: str
    estimate: Number
    interval: SealedInterval
    limit: Limit
    n: PositiveInt
    evidence: Evidence
    unit: str
    detail: str
    hint: str
    status: Literal["PASSED"]

    def finding(self) -> Finding:
        """The finding, with its numbers as numbers."""
        return Finding(
            check=self.check,
            estimate=float(self.estimate),
            interval=Interval(float(self.interval.lower), float(self.interval.upper)),
            limit=self.limit,
            n=self.n,
            evidence=self.evidence,
            unit=self.unit,
            detail=self.detail,
            hint=self.hint,
        )


class SealedVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A verdict that passed."""

    status: Literal["PASSED"]
    evidence: Evidence
    required: tuple[str, ...]
    findings: Annotated[tuple[SealedFinding, ...], msgspec.Meta(min_length=1)]


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything measured of the answers; empty for an engine that was compiled and not run."""

    outputs: tuple[OutputMetrics, ...]
    task: TaskMetrics | None
    scores: TaskValues | None = None


class SealedRatio(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine's percentile over another's, with its interval and its spread between processes."""

    ratio: Annotated[float, msgspec.Meta(gt=0)]
    interval: SealedInterval
    sd: Annotated[float, msgspec.Meta(ge=0)]


class SealedComparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The engine against another, as in gate.results.Comparison.

    Args:
        sha256: Of the other engine's file; null for the reference.
        ratios: The engine's percentile over the other's.
        checks: That rest on them.
    """

    against: Annotated[str, msgspec.Meta(min_length=1)]
    title: str
    sha256: str | None
    sessions: PositiveInt
    ratios: dict[str, SealedRatio]
    checks: tuple[str, ...]
    stopped: str


class LatencySummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The latency distribution of one batch size and shape, as in gate.results.LatencyMetrics.

    Args:
        comparisons: With other engines that were timed in turn with it.
        raw: Where in the bundle every latency lies.
    """

    name: str
    timed: str
    transfers: bool
    wait: Literal["spin", "block"]
    streams: PositiveInt
    cuda_graph: bool
    clock: str
    batch: PositiveInt
    axes: dict[str, PositiveInt]
    n: PositiveInt
    sessions: PositiveInt
    warm_up: Annotated[int, msgspec.Meta(ge=0)]
    mean_ms: Milliseconds
    p50_ms: Milliseconds
    p90_ms: Milliseconds
    p95_ms: Milliseconds
    p99_ms: Milliseconds
    p99_9_ms: Milliseconds
    max_ms: Milliseconds
    throughput: Annotated[float, msgspec.Meta(ge=0)]
    regions: dict[Region, RegionSummary]
    stopped: str
    comparisons: tuple[SealedComparison, ...]
    raw: Literal["evidence/latency.json"]


class RawLatency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every inference of one batch size and shape, in nanoseconds.

    Args:
        name: As in the summary.
        sessions: Of each process, in the order in which they were measured; at least one of each.
        spans_ns: From the begin of the first to the end of the last inference of each process.
        comparisons: By what the engine was timed in turn with, the inferences of both in each process.
    """

    name: str
    sessions: tuple[Annotated[tuple[PositiveInt, ...], msgspec.Meta(min_length=1)], ...]
    spans_ns: tuple[PositiveInt, ...] = ()
    comparisons: dict[str, tuple[SessionPair, ...]] = {}


class LatencyEvidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`evidence/latency.json`."""

    cells: tuple[RawLatency, ...]


class SealedLowering(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the graph was lowered and quantised, as in gate.engines.interface.LoweringRecord.

    Its nodes are left out: the layers that the engine runs are in `build`.
    """

    precision: str
    tool: str
    tool_version: str
    opset: PositiveInt
    calibration: CalibrationRecord | None
    notes: tuple[str, ...]


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sealed engine.

    Args:
        model_id: The model's id and the first seven digits of its weights' digest (the reference's, where the
            weights are not named): `digits-cnn@3a1f9c2`.
        onnx_opset: Of the graph that was compiled; null for a plan that existed already.
        lowering: How that graph was made; null where it was not lowered. A compiler's own calibration is in `build`.
        warnings: What a reader must know although it passed.
        profile: Per input its min, opt and max shapes.
        trt_version: Of TensorRT or TensorRT-RTX; null for another backend.
        cuda, driver, gpu: Of the machine it was checked on; null without a GPU.
        git: Commit of the spec's folder, with `-dirty` where it had changes; null outside a checkout.
        created: When it was checked.
        files: Every file of the bundle but this one and the seals.
    """

    schema_version: Literal[1] = 1
    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=120)]
    engine: Name
    onnx_opset: PositiveInt | None
    precision: str
    profile: dict[str, dict[Literal["min", "opt", "max"], list[int]]]
    backend: str
    backend_version: str
    trt_version: str | None
    cuda: str | None
    driver: str | None
    gpu: Gpu | None
    git: str | None
    created: Timestamp
    files: dict[RelativePath, FileDigest]
    lowering: SealedLowering | None
    build: BuildRecord
    warnings: tuple[str, ...]
    verdict: SealedVerdict
    samples: PositiveInt
    metrics: Metrics
    latency: tuple[LatencySummary, ...]
    host_peak_mib: float | None
    device: Fingerprint
    digests: Digests
    seeds: dict[str, int]
    gate_version: str


def metadata_of(run: CheckRun, result: EngineResult, files: Mapping[str, FileDigest]) -> Metadata:
    """The metadata of an engine that passed in a run.

    Args:
        run: The run.
        result: The engine's part of it.
        files: Every other file of the bundle, by its path in it.

    Raises:
        BundleError: The engine was not built or has no verdict, or its GPU is not known although it ran on one.
    """
    build, verdict = result.build, result.verdict
    if build is None or verdict is None:
        raise BundleError(f"engine {result.name!r} was not built and judged")
    findings = tuple(_sealed(finding) for finding in verdict.findings if isinstance(finding, Finding))
    if verdict.status is not Status.PASSED:
        raise BundleError(f"engine {result.name!r} is {verdict.status.value}; only what passed is sealed")
    device, origin = run.device, run.provenance
    gpu = None
    if device.kind == "gpu":
        if device.compute_capability is None:
            raise BundleError("the fingerprint names a GPU without its compute capability")
        gpu = Gpu(name=device.name, compute_capability=device.compute_capability)
    return Metadata(
        model_id=f"{run.model_id}@{(origin.weights_sha256 or origin.reference_sha256)[:7]}",
        engine=result.name,
        onnx_opset=result.onnx_opset or None,
        precision=result.precision,
        profile={
            name: {"min": each["min"], "opt": each["opt"], "max": each["max"]} for name, each in run.profile.items()
        },
        backend=result.backend,
        backend_version=build.backend_version,
        trt_version=build.backend_version if result.backend in ("tensorrt", "tensorrt_rtx") else None,
        cuda=device.cuda,
        driver=device.driver,
        gpu=gpu,
        git=origin.git,
        created=run.created,
        files=dict(files),
        lowering=_lowering(result.lowering),
        build=build,
        warnings=result.warnings,
        verdict=SealedVerdict(status="PASSED", evidence=verdict.evidence, required=verdict.required, findings=findings),
        samples=run.samples,
        metrics=Metrics(outputs=result.outputs, task=result.task, scores=sealed_scores(result.scores)),
        latency=tuple(map(_summary, result.latencies)),
        host_peak_mib=result.host_peak_mib,
        device=device,
        digests=Digests(
            reference=origin.reference_sha256,
            data=origin.data_sha256,
            spec=origin.spec_sha256,
            baseline=result.baseline_sha256,
            weights=origin.weights_sha256,
            calibration=result.calibration_sha256,
        ),
        seeds={"data": origin.seed},
        gate_version=run.gate_version,
    )


def sealed_scores(scores: TaskValues | None) -> TaskValues | None:
    """The defined values; what each sample contributes lies in the bundle's evidence."""
    if scores is None:
        return None
    return msgspec.structs.replace(
        scores,
        statistics="",
        **{
            name: {key: value for key, value in getattr(scores, name).items() if math.isfinite(value)}
            for name in ("values", "reference", "boxes")
        },
    )


def _lowering(record: LoweringRecord | None) -> SealedLowering | None:
    if record is None:
        return None
    kept = {name: getattr(record, name) for name in SealedLowering.__struct_fields__}
    return SealedLowering(**kept)


def _sealed(finding: Finding) -> SealedFinding:
    return SealedFinding(
        type="finding",
        check=finding.check,
        estimate=_number(finding.estimate),
        interval=SealedInterval(lower=_number(finding.interval.lower), upper=_number(finding.interval.upper)),
        limit=finding.limit,
        n=finding.n,
        evidence=finding.evidence,
        unit=finding.unit,
        detail=finding.detail,
        hint=finding.hint,
        status="PASSED",
    )


def _number(value: float) -> Number:
    if math.isfinite(value):
        return float(value)
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _summary(latency: LatencyMetrics) -> LatencySummary:
    taken = ("comparisons", "raw")
    common = {name: getattr(latency, name) for name in LatencySummary.__struct_fields__ if name not in taken}
    return LatencySummary(
        **common, comparisons=tuple(map(_comparison, latency.comparisons)), raw="evidence/latency.json"
    )


def _comparison(found: Comparison) -> SealedComparison:
    return SealedComparison(
        against=found.against,
        title=found.title,
        sha256=found.sha256,
        sessions=found.sessions,
        checks=found.checks,
        ratios={
            name: SealedRatio(
                ratio=each.ratio,
                interval=SealedInterval(lower=_number(each.interval.lower), upper=_number(each.interval.upper)),
                sd=each.sd,
            )
            for name, each in found.ratios.items()
        },
        stopped=found.stopped,
    )


def latency_evidence(result: EngineResult) -> LatencyEvidence | None:
    """Every raw latency of an engine; None where it was not timed."""
    if not result.latencies:
        return None
    cells = []
    for each in result.latencies:
        starts = [sum(each.session_sizes[:index]) for index in range(len(each.session_sizes) + 1)]
        sessions = tuple(each.durations_ns[a:b] for a, b in itertools.pairwise(starts))
        cells.append(
            RawLatency(
                name=each.name,
                sessions=sessions,
                spans_ns=each.spans_ns,
                comparisons={other.against: other.pairs for other in each.comparisons},
            )
        )
    return LatencyEvidence(cells=tuple(cells))


def latency_from_bytes(data: bytes, *, where: str) -> LatencyEvidence:
    """Read `evidence/latency.json`.

    Raises:
        BundleError: It is not strict JSON.
        VerificationError: It is not what such a file holds.
    """
    try:
        return msgspec.convert(strict_json(data, where=where), LatencyEvidence, strict=True)
    except msgspec.ValidationError as err:
        raise VerificationError(f"is no record of latencies: {err}", where=where) from err


def metadata_bytes(metadata: Metadata) -> bytes:
    """`metadata.json`: pretty, sorted; numbers that are not finite are written as text.

    Raises:
        BundleError: It holds something that JSON does not have.
    """
    return pretty_json(builtins_from(metadata))


def metadata_from_bytes(data: bytes, *, where: str) -> Metadata:
    """Read a `metadata.json`: strict JSON that its schema allows.

    Raises:
        BundleError: It is not strict JSON.
        VerificationError: The schema does not allow it; names the place and the reason.
    """
    raw = strict_json(data, where=where)
    # The types carry all that the published schema says; that of outputs allows texts for numbers as well.
    metrics = raw.get("metrics") if isinstance(raw, dict) else None
    if isinstance(metrics, dict) and isinstance(metrics.get("outputs"), list):
        metrics["outputs"] = [_output(each) for each in metrics["outputs"]]
    try:
        return msgspec.convert(raw, Metadata)
    except msgspec.ValidationError as err:
        message, _, at = str(err).partition(" - at `")
        place = at.rstrip("`") or "$"
        raise VerificationError(f"{place}: {message}", where=where) from err


def _output(raw: Any) -> Any:
    """An output's metrics with the texts that stand for numbers as numbers."""
    if not isinstance(raw, dict):
        return raw
    return {name: value if name in ("output", "kind") else _finite(value) for name, value in raw.items()}


def _finite(value: Any) -> Any:
    """A JSON value with the texts that stand for numbers as numbers."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return float(value) if value in get_args(NonFinite) else value


def contradictions(metadata: Metadata, latency: LatencyEvidence | None) -> Iterator[str]:
    """What in the metadata does not follow from its own numbers.

    Args:
        metadata: What is said.
        latency: Every raw latency; None where the engine was not timed.
    """
    findings = tuple(each.finding() for each in metadata.verdict.findings)
    for finding in findings:
        if finding.status is not Status.PASSED:
            yield f"{finding.check} is {finding.status.value} by its own numbers, it says PASSED"
    try:
        verdict = Verdict(findings=findings, required=metadata.verdict.required)
        if verdict.evidence is not metadata.verdict.evidence:
            yield f"its findings reach evidence {verdict.evidence.value!r}, it says {metadata.verdict.evidence.value!r}"
    except MeasurementError as err:
        yield err.message
    if metadata.gpu is None and any(each.evidence is Evidence.DEVICE for each in findings):
        yield "its findings were made on a GPU, it names none"
    if (metadata.build.backend, metadata.build.backend_version, metadata.build.precision) != (
        metadata.backend,
        metadata.backend_version,
        metadata.precision,
    ):
        yield "backend, backend_version or precision are not those of its build record"
    if metadata.lowering is not None and metadata.lowering.precision != metadata.precision:
        yield f"lowering.precision is {metadata.lowering.precision!r}, precision is {metadata.precision!r}"
    if metadata.metrics.scores is not None:
        yield from _score_contradictions(metadata.metrics.scores, findings)
    task = metadata.metrics.task
    if task is not None:
        for name, count, bits in (
            ("top1", task.top1, task.correct),
            ("reference_top1", task.reference_top1, task.reference_correct),
        ):
            try:
                counted = int.from_bytes(bytes.fromhex(bits), "big").bit_count()
            except ValueError:
                counted = -1
            if counted != count or count > task.samples or len(bits) != 2 * ((task.samples + 7) // 8):
                yield f"task.{name} is {count}, which its bits do not hold"
    if bool(metadata.latency) != (latency is not None):
        yield "latency and its raw numbers do not come together"
    else:
        yield from _latency_contradictions(metadata.latency, latency or LatencyEvidence(cells=()), findings)


def _score_contradictions(scores: TaskValues, findings: Sequence[Finding]) -> Iterator[str]:
    """Findings on a task whose numbers are not those of its scores."""
    for each in findings:
        group, _, name = each.check.partition(".")
        if group != "task":
            continue
        value, _, form = name.rpartition("_")
        ours, theirs = scores.values.get(value), scores.reference.get(value)
        if name in scores.values:
            expected = scores.values[name]
        elif ours is None or theirs is None or form not in ("drop", "rise", "ratio"):
            continue
        elif form == "ratio":
            expected = ours / theirs if theirs else math.nan
        else:
            expected = theirs - ours if form == "drop" else ours - theirs
        if not math.isclose(each.estimate, expected, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{each.check} is {each.estimate:.6g}, its scores give {expected:.6g}"


def _latency_contradictions(
    summaries: Sequence[LatencySummary], evidence: LatencyEvidence, findings: Sequence[Finding]
) -> Iterator[str]:
    """Latencies whose numbers are not those of the raw ones, and findings that are not those of the latencies."""
    if [each.name for each in summaries] != [each.name for each in evidence.cells]:
        yield f"{LATENCY_PATH} is not of the batch sizes and shapes in the metadata"
        return
    expected: dict[str, _Again] = {}
    for summary, raw in zip(summaries, evidence.cells, strict=True):
        label = f"latency{f'[{summary.name}]' if summary.name else ''}"
        try:
            found, said = _recomputed(summary, raw)
        except MeasurementError as err:
            yield f"{label}: {err.message}"
            continue
        for name, value in said.items():
            got = getattr(summary, name)
            if not math.isclose(got, value, rel_tol=1e-6):
                yield f"{label}.{name} is {got:.6g}, {LATENCY_PATH} gives {value:.6g}"
        expected |= found
        yield from _comparison_contradictions(summary, raw, label)
    for each in findings:
        if each.check not in expected:
            if each.check.startswith("latency."):
                yield f"{each.check} is of no latency in the metadata"
            continue
        again = expected[each.check]
        pairs = (
            ("", each.estimate, again.estimate),
            ("'s lower bound", each.interval.lower, again.interval.lower),
            ("'s upper bound", each.interval.upper, again.interval.upper),
            ("'s n", each.n, again.n),
        )
        for what, got, value in pairs:
            if got != value and not math.isclose(got, value, rel_tol=1e-6, abs_tol=1e-9):
                yield f"{each.check}{what} is {got:.6g}, {LATENCY_PATH} gives {value:.6g}"


def asked_otherwise(
    summaries: Sequence[LatencySummary], tables: LatencySpec | Sequence[LatencySpec] | None
) -> Iterator[str]:
    """What was timed, or in turn with what, and is not what the spec asks for.

    Args:
        summaries: What is said.
        tables: Of the spec.
    """
    timed = {cell.name: (table.spec, cell) for table in timed_tables(tables) for cell in table.cells}
    if list(timed) != [each.name for each in summaries]:
        yield f"asks for latency at {_names(timed)}, the metadata has {_names(each.name for each in summaries)}"
        return
    for each in summaries:
        spec, cell = timed[each.name]
        label = f"latency{f'[{each.name}]' if each.name else ''}"
        pairs: dict[str, tuple[object, object]] = {
            "batch": (cell.batch, each.batch),
            "axes": (dict(cell.axes), each.axes),
            "timed": (spec.timed, each.timed),
            "wait": (spec.wait, each.wait),
            "streams": (spec.streams, each.streams),
            "transfers": (spec.copies and "h2d" in each.regions, each.transfers),
        }
        for name, (wanted, got) in pairs.items():
            if wanted != got:
                yield f"asks for {label} with {name} = {wanted}, the metadata has {got}"
        if each.sessions < spec.sessions:
            yield f"asks for {label} of {spec.sessions} sessions, the metadata has {each.sessions}"
        wanted_checks = {against: spec.checks_against(against, cell) for against in spec.rivals}
        if {one.against: one.checks for one in each.comparisons} != wanted_checks:
            yield f"asks for {label} against {_names(wanted_checks)}, the metadata has others or other checks"


def _names(names: Iterable[str]) -> str:
    return ", ".join(name or "one size" for name in names) or "nothing"


class _Again(NamedTuple):
    """A finding computed again."""

    estimate: float
    interval: Interval
    n: int


def _recomputed(
    summary: LatencySummary, raw: RawLatency
) -> tuple[dict[str, _Again], dict[str, float]]:  # the pair never leaves this module
    """Estimates and intervals of findings by their check, and what the summary must say, from the raw latencies.

    Raises:
        MeasurementError: There are none.
    """
    import numpy as np

    pooled = np.sort(positive_durations([value for session in raw.sessions for value in session]))
    cell = Cell(batch=summary.batch, name=summary.name)
    said: dict[str, float] = {}
    found: dict[str, _Again] = {}
    equal = equal_parts(raw.sessions)
    for key, p in PERCENTILES.items():
        bounds = percentile_bounds(raw.sessions, p)
        said[key] = nearest_rank(equal, p) / 1e6
        interval = Interval(max(0.0, bounds.lower / 1e6), bounds.upper / 1e6)
        found[cell.check(f"latency.{key}")] = _Again(said[key], interval, len(equal))
    said["max_ms"] = int(pooled[-1]) / 1e6
    said["mean_ms"] = int(pooled.sum()) / len(pooled) / 1e6
    said["n"] = len(pooled)
    said["sessions"] = len(raw.sessions)
    if len(raw.spans_ns) != len(raw.sessions):
        raise MeasurementError(f"{len(raw.sessions)} sessions have {len(raw.spans_ns)} spans")
    spans = [span if summary.streams > 1 else None for span in raw.spans_ns]
    each_s = [
        throughput_of(session, batch=summary.batch, span_ns=span)
        for session, span in zip(raw.sessions, spans, strict=True)
    ]
    said["throughput"] = math.fsum(each_s) / len(each_s)
    found[cell.check("latency.throughput")] = _Again(said["throughput"], throughput_bounds(each_s), len(pooled))
    for each in summary.comparisons:
        pairs = raw.comparisons.get(each.against, ())
        n = sum(len(pair.a_ns) for pair in pairs)
        for name, ratio in _ratios(pairs).items():
            lower, upper = ratio.interval.lower, ratio.interval.upper
            regression, speedup = cell.check(f"latency.regression_{name}"), cell.check("latency.speedup")
            if regression in each.checks:
                interval = Interval(100.0 * (lower - 1.0), 100.0 * (upper - 1.0))
                found[regression] = _Again(100.0 * (ratio.ratio - 1.0), interval, n)
            if speedup in each.checks and name == "p50":
                interval = Interval(1.0 / upper, 1.0 / lower if lower > 0.0 else math.inf)
                found[speedup] = _Again(1.0 / ratio.ratio, interval, n)
    return found, said


def _comparison_contradictions(summary: LatencySummary, raw: RawLatency, label: str) -> Iterator[str]:
    if sorted(each.against for each in summary.comparisons) != sorted(raw.comparisons):
        yield f"{label}: {LATENCY_PATH} does not hold its comparisons"
        return
    if summary.comparisons:
        # The cell's inferences are those that were timed in turn with the first.
        first = summary.comparisons[0].against
        if tuple(pair.a_ns for pair in raw.comparisons[first]) != raw.sessions:
            yield f"{label} against {first}: the engine's inferences are not those of {LATENCY_PATH}"
    for each in summary.comparisons:
        sessions = raw.comparisons[each.against]
        if len(sessions) != each.sessions:
            yield f"{label} against {each.against}: {each.sessions} sessions are said, others are held"
        kept = sum(len(pair.a_ns) for pair in sessions)
        if any(len(pair.a_ns) != len(pair.b_ns) for pair in sessions):
            yield f"{label} against {each.against}: a session has not as many inferences of both engines"
        if each.checks and kept < LEAST_KEPT * len(sessions):
            yield f"{label} against {each.against}: {kept} inferences, the rule takes {LEAST_KEPT} of each session"
        ratios = _ratios(sessions)
        if set(each.ratios) != set(ratios):
            yield f"{label} against {each.against}: ratios are of {', '.join(ratios)}, it has {', '.join(each.ratios)}"
            continue
        for name, again in ratios.items():
            said = each.ratios[name]
            pairs = (
                (said.ratio, again.ratio),
                (said.sd, again.sd),
                (float(said.interval.lower), again.interval.lower),
                (float(said.interval.upper), again.interval.upper),
            )
            if not all(math.isclose(got, value, rel_tol=1e-6, abs_tol=1e-12) for got, value in pairs):
                yield f"{label} against {each.against}: {name} is not what {LATENCY_PATH} gives"


def _ratios(pairs: Sequence[SessionPair]) -> dict[str, RatioEstimate]:
    return {
        name: estimate([log_ratio(pair.a_ns, pair.b_ns, p) for pair in pairs]) for name, p in RATIO_PERCENTILES.items()
    }


def metadata_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `metadata.json`."""
    (_,), definitions = msgspec.json.schema_components([Metadata], ref_template="#/$defs/{name}")
    definitions["OutputMetrics"] = _with_non_finite(definitions["OutputMetrics"])
    definitions = {name: _first_sentence(each) for name, each in definitions.items()}
    root = definitions.pop("Metadata")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **root,
        "title": "metadata.json of a sealed engine",
        "$defs": definitions,
    }


def schema_bytes(schema: Mapping[str, Any]) -> bytes:
    """A schema as it is committed."""
    return pretty_json(schema)


def _with_non_finite(schema: Any) -> Any:
    """A schema in which each number may also be one of the texts that stand for numbers JSON does not have."""
    if isinstance(schema, dict):
        if schema.get("type") == "number":
            return {"anyOf": [schema, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
        return {key: _with_non_finite(each) for key, each in schema.items()}
    if isinstance(schema, list):
        return [_with_non_finite(each) for each in schema]
    return schema


def _first_sentence(schema: dict[str, Any]) -> dict[str, Any]:
    """A definition whose description is the first line of its docstring."""
    text = schema.get("description")
    return schema if text is None else {**schema, "description": text.split("\n", 1)[0]}
