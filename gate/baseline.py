"""Baselines: accepted measurements, small and reviewed like code, and what a run is compared with.

A baseline lies at `baselines/<case>/<engine>/<device>.json`, where the device is `cpu` or a GPU's architecture, `sm90`.
Its accuracy is comparable wherever its subject is the same: precision, samples, backend, and the backend's version
family. That family is major.minor for TensorRT, whose tactics change with it, and the major version for ONNX Runtime,
whose minor versions differ between the Python versions that can install them. Its latencies are history, each with the
fingerprint of the machine that it was measured on.

A change of the reference (new weights) is what a regression check exists to compare: it is allowed, and noted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from gate import atomic
from gate.errors import BaselineError, BundleError, DigestMismatch, GateError
from gate.manifest import (
    MAX_JSON_BYTES,
    Sha256,
    Timestamp,
    canonical_json,
    pretty_json,
    sha256_hex,
    strict_json,
)
from gate.results import CheckRun, EngineResult, Fingerprint, LatencyMetrics, OutputMetrics
from gate.spec import BaselineLimits, EngineSpec, Name, SpecFile
from gate.statistics import clopper_pearson
from gate.verdict import Evidence, Failure, Finding, Interval, Limit

RATIO = 2.0
RATIO_FLOOR = 8 * 2.0**-23
"""A rel_rmse below 8 units of FP32 rounding counts as that much: 1e-7 after 0 is rounding, not a regression."""
HISTORY = 20
ACCEPT = 'gate baseline accept --reason "…"'

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"cpu|sm[0-9]{2,3}")

Count = Annotated[int, msgspec.Meta(ge=0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What accuracy depends on, and what must be equal before two measurements are compared.

    Args:
        case: The model's id.
        engine, precision, backend: As in the spec.
        backend_version_family: See the module.
        device: `cpu`, or the GPU's architecture, `sm90`.
        samples: How many were compared.
        data_sha256: Of every sample and label, in order.
    """

    case: Name
    engine: Name
    precision: str
    backend: str
    backend_version_family: str
    device: Annotated[str, msgspec.Meta(pattern="^(cpu|sm[0-9]{2,3})$")]
    samples: PositiveCount
    data_sha256: Sha256


class BaselineOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The parity metrics of one output, as in gate.results.OutputMetrics; all finite.

    Args:
        top1_agreement: Interval of top1_agree / topk_samples (Clopper-Pearson, 95 % on each side); None where not defined.
    """

    output: str
    kind: Literal["float", "exact"]
    samples: Count
    elements: Count
    rms_reference: NonNegative
    rel_rmse: NonNegative
    max_abs: NonNegative
    mean_abs: NonNegative
    mismatch_fraction: Fraction
    cosine_distance: NonNegative | None
    mean_cosine_distance: NonNegative | None
    top1_agree: Count | None
    topk_samples: Count | None
    top1_agreement: Interval | None


class BaselineTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Top-1 and top-5 of the engine against labels.

    Args:
        interval: Of top1 / samples (Clopper-Pearson, 95 % on each side).
        correct: The top-1 outcome of every sample in order, as hex of `numpy.packbits`.
    """

    samples: PositiveCount
    top1: Count
    top5: Count | None
    interval: Interval
    correct: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{2})*$")]


class BaselineScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the engine scored at a task other than classification.

    Args:
        kind: The task.
        samples: How many were scored; for tracking, sequences.
        values: Those that are defined, by name.
        settings_sha256: Of what decides what the values say, as in gate.results.TaskValues.
        statistics: What each sample contributes, packed (`gate.metrics.findings.packed`).
    """

    kind: Annotated[str, msgspec.Meta(min_length=1)]
    settings_sha256: Sha256
    samples: PositiveCount
    values: Annotated[dict[str, float], msgspec.Meta(min_length=1)]
    statistics: Annotated[str, msgspec.Meta(min_length=1)]


class LatencyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One latency measurement: history, comparable only where the fingerprint is the same.

    Args:
        fingerprint_sha256: Of the whole fingerprint's canonical JSON.
        device, os, backend_version: For a reader.
    """

    fingerprint_sha256: Sha256
    device: str
    os: str
    backend_version: str
    timed: str
    batch: PositiveCount
    n: PositiveCount
    sessions: PositiveCount
    p50_ms: NonNegative
    p95_ms: NonNegative
    p99_ms: NonNegative
    created: Timestamp


class Acceptance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who accepted it, when, and why."""

    who: Annotated[str, msgspec.Meta(min_length=1)]
    when: Timestamp
    why: Annotated[str, msgspec.Meta(min_length=1)]


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An accepted measurement of one engine on one device.

    Args:
        subject: What it is of.
        backend_version: Exactly.
        engine_sha256: Of the engine's file; None in a baseline from before it was kept.
        reference_sha256, spec_sha256: For a reader; a change of them does not keep it from being compared.
        fingerprint: Of the machine it was measured on.
        digest: SHA-256 of the canonical JSON of everything else.
    """

    schema_version: Literal[1] = 1
    subject: Subject
    backend_version: str
    reference_sha256: Sha256
    spec_sha256: Sha256
    outputs: Annotated[tuple[BaselineOutput, ...], msgspec.Meta(min_length=1)]
    task: BaselineTask | None
    scores: BaselineScores | None = None
    engine_sha256: Sha256 | None = None
    latency: tuple[LatencyRecord, ...]
    fingerprint: Fingerprint
    accepted: Acceptance
    gate_version: str
    digest: Sha256


class Compared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What comparing with a baseline gave.

    Args:
        findings: At least one.
        sha256: The baseline's digest; None where there was none that could be compared.
    """

    findings: tuple[Finding | Failure, ...]
    sha256: str | None


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A baseline that was written."""

    engine: str
    path: Path
    baseline: Baseline


class Skipped(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine whose measurement was not accepted, and why."""

    engine: str
    reason: str


class AcceptResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `accept` did."""

    accepted: tuple[Accepted, ...]
    skipped: tuple[Skipped, ...]


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One row of a comparison of two baselines.

    Args:
        metric: Dotted name.
        old, new: Values; None where one of them has none.
        change: new - old for numbers.
    """

    metric: str
    old: float | str | None
    new: float | str | None
    change: float | None


def version_family(backend: str, version: str) -> str:
    """The part of a backend's version within which its answers are compared: see the module.

    Raises:
        BaselineError: The version does not begin with major.minor.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise BaselineError(f"the version {version!r} of backend {backend!r} has no major.minor")
    return match[1] if backend == "onnxruntime" else f"{match[1]}.{match[2]}"


def device_of(backend: str, evidence: Evidence, fingerprint: Fingerprint) -> str:
    """`cpu` for what ran on the host, else the GPU's architecture: `sm90`.

    Args:
        backend: As in the spec; says it where nothing was run.
        evidence: Of the engine's result.
        fingerprint: Of the machine.

    Raises:
        BaselineError: It ran on a GPU, and the fingerprint has none.
    """
    if not _on_gpu(backend, evidence):
        return "cpu"
    if fingerprint.compute_capability is None:
        raise BaselineError(f"backend {backend!r} runs on a GPU, and the fingerprint names none")
    return "sm" + fingerprint.compute_capability.replace(".", "")


def _on_gpu(backend: str, evidence: Evidence) -> bool:
    if evidence is Evidence.PREFLIGHT:
        return backend in ("tensorrt", "tensorrt_rtx")
    return evidence is Evidence.DEVICE


def subject_of(run: CheckRun, result: EngineResult) -> Subject:
    """What an engine's measurement in a run is of.

    Raises:
        BaselineError: It was not built, or not run.
    """
    return _subject(
        result,
        case=run.model_id,
        samples=run.samples,
        data_sha256=run.provenance.data_sha256,
        fingerprint=run.device,
    )


def _subject(result: EngineResult, *, case: str, samples: int, data_sha256: str, fingerprint: Fingerprint) -> Subject:
    if result.build is None:
        raise BaselineError(f"engine {result.name!r} was not built")
    return Subject(
        case=case,
        engine=result.name,
        precision=result.precision,
        backend=result.backend,
        backend_version_family=version_family(result.backend, result.build.backend_version),
        device=device_of(result.backend, result.evidence or Evidence.PREFLIGHT, fingerprint),
        samples=samples,
        data_sha256=data_sha256,
    )


def baseline_path(root: Path, *, case: str, engine: str, device: str) -> Path:
    """Where the baseline of an engine on a device lies.

    Raises:
        BaselineError: A name could lead out of `root`.
    """
    for name in (case, engine):
        if not _NAME.fullmatch(name):
            raise BaselineError(f"{name!r} cannot name a baseline")
    if not _DEVICE.fullmatch(device):
        raise BaselineError(f"{device!r} cannot name a baseline's device")
    return root / case / engine / f"{device}.json"


def baseline_from_result(
    run: CheckRun,
    result: EngineResult,
    *,
    who: str,
    when: str,
    why: str,
    history: tuple[LatencyRecord, ...] = (),
) -> Baseline:
    """An engine's measurement in a run, as a baseline. Pure.

    Args:
        run: The run.
        result: The engine's part of it.
        who: Who accepts it.
        when: UTC, RFC 3339, whole seconds.
        why: The reason, for whoever reads the file later.
        history: Latencies of the baseline before; the newest 20 are kept.

    Raises:
        BaselineError: Nothing was measured, a number is not finite, or who, when or why is missing.
    """
    subject = subject_of(run, result)
    if result.build is None or not result.outputs:
        raise BaselineError(f"engine {result.name!r} was not run, so it has nothing to accept")
    raw = {
        "schema_version": 1,
        "subject": msgspec.to_builtins(subject),
        "backend_version": result.build.backend_version,
        "reference_sha256": run.provenance.reference_sha256,
        "spec_sha256": run.provenance.spec_sha256,
        "outputs": [_output(each) for each in sorted(result.outputs, key=lambda each: each.output)],
        "task": _task(result),
        "scores": _scores(result),
        "engine_sha256": result.engine_sha256,
        "latency": [*map(msgspec.to_builtins, history), *_latency(run, result)][-HISTORY:],
        "fingerprint": msgspec.to_builtins(run.device),
        "accepted": {"who": who.strip(), "when": when, "why": why.strip()},
        "gate_version": run.gate_version,
        "digest": "0" * 64,
    }
    try:
        draft = msgspec.convert(raw, Baseline)
        baseline = msgspec.structs.replace(draft, digest=digest_of(draft))
    except msgspec.ValidationError as err:
        raise BaselineError(f"engine {result.name!r} cannot be a baseline: {err}") from err
    except BundleError as err:
        raise BaselineError(f"engine {result.name!r} cannot be a baseline: {err.message}") from err
    for message in _contradictions(baseline):
        raise BaselineError(f"engine {result.name!r} cannot be a baseline: {message}")
    return baseline


def _output(metrics: OutputMetrics) -> dict[str, object]:
    agreement = None
    if metrics.top1_agree is not None and metrics.topk_samples:
        agreement = msgspec.to_builtins(_proportion(metrics.top1_agree, metrics.topk_samples))
    names = [name for name in BaselineOutput.__struct_fields__ if name != "top1_agreement"]
    return {**{name: getattr(metrics, name) for name in names}, "top1_agreement": agreement}


def _task(result: EngineResult) -> dict[str, object] | None:
    task = result.task
    if task is None:
        return None
    return {
        "samples": task.samples,
        "top1": task.top1,
        "top5": task.top5,
        "interval": msgspec.to_builtins(_proportion(task.top1, task.samples)),
        "correct": task.correct,
    }


def _scores(result: EngineResult) -> dict[str, object] | None:
    from gate.metrics.findings import TILED

    scores = result.scores
    if scores is None:
        return None
    defined = {
        name: value for name, value in scores.values.items() if not math.isnan(value) and not name.startswith(TILED)
    }
    return {
        "kind": scores.kind,
        "settings_sha256": scores.settings_sha256,
        "samples": scores.samples,
        "values": defined,
        "statistics": scores.statistics,
    }


def _latency(run: CheckRun, result: EngineResult) -> Iterator[dict[str, object]]:
    for latency in result.latencies:
        yield _latency_record(run, result, latency)


def _latency_record(run: CheckRun, result: EngineResult, latency: LatencyMetrics) -> dict[str, object]:
    if result.build is None:
        raise BaselineError(f"engine {result.name!r} was not built")
    return {
        "fingerprint_sha256": sha256_hex(canonical_json(msgspec.to_builtins(run.device))),
        "device": run.device.name,
        "os": run.device.os,
        "backend_version": result.build.backend_version,
        "timed": latency.timed,
        "batch": latency.batch,
        "n": latency.n,
        "sessions": latency.sessions,
        "p50_ms": latency.p50_ms,
        "p95_ms": latency.p95_ms,
        "p99_ms": latency.p99_ms,
        "created": run.created,
    }


def _proportion(successes: int, trials: int) -> Interval:
    return clopper_pearson(successes, trials, alpha=0.05)


def digest_of(baseline: Baseline) -> str:
    """SHA-256 of the canonical JSON of everything in a baseline but its digest.

    Raises:
        BundleError: A number in it is not finite.
    """
    raw = _builtins(baseline)
    del raw["digest"]
    return sha256_hex(canonical_json(raw))


def _builtins(baseline: Baseline) -> dict[str, Any]:
    """As it is written. What came later than the first baselines is left out where there is none, so that theirs hold."""
    raw: dict[str, Any] = msgspec.to_builtins(baseline)
    for name in ("scores", "engine_sha256"):
        if raw[name] is None:
            del raw[name]
    return raw


def read_baseline(path: Path) -> Baseline:
    """Read a baseline, and refuse one that its own record contradicts.

    The digest finds a number that was changed by hand. Where the digest was made anew as well, what follows from the
    record is computed again: counts from bits, intervals from counts, bounds between norms.

    Raises:
        BaselineError: It is missing, unreadable, malformed or edited; names the file and the reason.
    """
    try:
        data = atomic.read_regular(path, limit_bytes=MAX_JSON_BYTES)
    except BundleError as err:
        missing = err.message == "is missing"
        raise BaselineError(
            "there is no accepted baseline" if missing else err.message, where=str(path), hint=ACCEPT
        ) from err
    return baseline_from_bytes(data, where=str(path))


def baseline_from_bytes(data: bytes, *, where: str) -> Baseline:
    """As `read_baseline`, for bytes that are already here. Pure.

    Raises:
        BaselineError: It is malformed or edited.
    """
    hint = f"Restore it from version control, or accept a new one: {ACCEPT}"
    try:
        baseline = msgspec.convert(strict_json(data), Baseline)
    except BundleError as err:
        raise BaselineError(err.message, where=where, hint=hint) from err
    except msgspec.ValidationError as err:
        raise BaselineError(f"is not a baseline: {err}", where=where, hint=hint) from err
    if (expected := digest_of(baseline)) != baseline.digest:
        raise BaselineError(
            f"was changed after it was accepted: its digest is {baseline.digest[:12]}…, its content's {expected[:12]}…",
            where=where,
            hint=hint,
        )
    for message in _contradictions(baseline):
        raise BaselineError(f"its record contradicts itself: {message}", where=where, hint=hint)
    return baseline


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline: pretty, sorted, whole or not at all.

    Raises:
        GateError: The disk is full or may not be written to.
    """
    atomic.write_bytes(path, pretty_json(_builtins(baseline)))


def _contradictions(baseline: Baseline) -> Iterator[str]:
    """What is wrong in a record that nobody but the record itself is needed to see."""
    if not baseline.accepted.who.strip() or not baseline.accepted.why.strip():
        yield "it does not say who accepted it and why"
    names = [each.output for each in baseline.outputs]
    if len(set(names)) != len(names):
        yield "an output stands twice"
    for each in baseline.outputs:
        yield from (f"output {each.output!r}: {message}" for message in _output_contradictions(each))
        if each.samples > baseline.subject.samples:
            yield f"output {each.output!r}: has {each.samples} samples of {baseline.subject.samples}"
    if baseline.task is not None:
        yield from (f"task: {message}" for message in _task_contradictions(baseline.task))
        if baseline.task.samples != baseline.subject.samples:
            yield f"task: has {baseline.task.samples} samples of {baseline.subject.samples}"
    if baseline.scores is not None:
        yield from (f"scores: {message}" for message in _score_contradictions(baseline.scores))
    for latency in baseline.latency:
        if not latency.p50_ms <= latency.p95_ms <= latency.p99_ms:
            yield f"latency of {latency.created}: needs p50 <= p95 <= p99"


def _output_contradictions(output: BaselineOutput) -> Iterator[str]:
    numbers = {name: getattr(output, name) for name in output.__struct_fields__}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is not finite"
    slack = 1.001
    if output.kind == "float" and output.rms_reference > 0:
        # For any numbers: mean |d| <= root mean square of d <= max |d|.
        rms = output.rel_rmse * output.rms_reference
        if not output.mean_abs <= rms * slack:
            yield f"mean_abs {output.mean_abs:.4g} is above the root mean square {rms:.4g} that rel_rmse implies"
        if not rms <= output.max_abs * slack:
            yield f"rel_rmse implies a root mean square of {rms:.4g}, above max_abs {output.max_abs:.4g}"
    worst, mean = output.cosine_distance, output.mean_cosine_distance
    if worst is not None and mean is not None and not mean <= worst * slack + 1e-12:
        yield f"mean_cosine_distance {mean:.4g} is above the worst sample's {worst:.4g}"
    agree, of = output.top1_agree, output.topk_samples
    if agree is not None and of is not None and agree > of:
        yield f"top1_agree {agree} is above topk_samples {of}"
    elif agree is not None and of:
        yield from _interval_contradictions("top1_agreement", output.top1_agreement, agree, of)
    elif output.top1_agreement is not None:
        yield "has an interval of top1_agreement and no counts"


def _task_contradictions(task: BaselineTask) -> Iterator[str]:
    bits = bytes.fromhex(task.correct)
    padding = -task.samples % 8
    if len(bits) != (task.samples + 7) // 8 or (bits and bits[-1] & ((1 << padding) - 1)):
        yield f"correct does not hold one bit for each of {task.samples} samples"
    count = int.from_bytes(bits, "big").bit_count()
    if task.top1 != count:
        yield f"top1 is {task.top1}, correct has {count} samples"
    if task.top5 is not None and not task.top1 <= task.top5 <= task.samples:
        yield f"top5 is {task.top5}, with top1 {task.top1} of {task.samples}"
    if task.top1 <= task.samples:
        yield from _interval_contradictions("interval", task.interval, task.top1, task.samples)


def _score_contradictions(scores: BaselineScores) -> Iterator[str]:
    """Values that are not those of the samples that stand beside them."""
    from gate.metrics.findings import unpacked
    from gate.metrics.kinds import kind_named

    try:
        found = kind_named(scores.kind).read(unpacked(scores.statistics))
        again = found.values()
    except GateError as err:
        yield f"{err.message}. {err.hint}" if err.hint else err.message
        return
    if found.samples != scores.samples:
        yield f"has {scores.samples} samples, its statistics hold {found.samples}"
    for name, value in scores.values.items():
        if name not in again or not math.isclose(value, again[name], rel_tol=1e-9, abs_tol=1e-12):
            yield f"{name} is {value:.6g}, its statistics give {again.get(name, math.nan):.6g}"


def _interval_contradictions(name: str, interval: Interval | None, successes: int, trials: int) -> Iterator[str]:
    expected = _proportion(successes, trials)
    if interval is None or not (
        math.isclose(interval.lower, expected.lower, rel_tol=1e-9, abs_tol=1e-12)
        and math.isclose(interval.upper, expected.upper, rel_tol=1e-9, abs_tol=1e-12)
    ):
        got = "missing" if interval is None else f"{interval.lower:.6g} to {interval.upper:.6g}"
        yield f"{name} is {got}, {successes} of {trials} give {expected.lower:.6g} to {expected.upper:.6g}"


def require_comparable(baseline: Baseline, subject: Subject, result: EngineResult, *, where: str | None = None) -> None:
    """Refuse a baseline of something else, instead of comparing with it.

    Raises:
        BaselineError: The case, engine, precision, backend, version family, device, sample count, samples or outputs
            differ; names the field, got and expected.
    """
    for name in Subject.__struct_fields__:
        got, expected = getattr(baseline.subject, name), getattr(subject, name)
        if got != expected:
            raise BaselineError(f"is of another {name}: {got!r}, this run has {expected!r}", where=where, hint=ACCEPT)
    had, has = {each.output: each for each in baseline.outputs}, {each.output: each for each in result.outputs}
    if set(had) != set(has):
        raise BaselineError(
            f"is of other outputs: {', '.join(sorted(had))}; this run has {', '.join(sorted(has)) or 'none'}",
            where=where,
            hint=ACCEPT,
        )
    for name, each in had.items():
        if (each.kind, each.elements) != (has[name].kind, has[name].elements):
            raise BaselineError(
                f"output {name!r} has {each.elements} {each.kind} elements, this run has {has[name].elements} "
                f"{has[name].kind}",
                where=where,
                hint=ACCEPT,
            )


def accepted_engine(
    root: Path, *, case: str, engine: str, backend: str, evidence: Evidence, fingerprint: Fingerprint | None = None
) -> str:
    """The sha256 of the engine that was accepted as the baseline on this device.

    Args:
        root: Folder of the accepted baselines.
        case: Id of the model.
        engine: Its name.
        backend: As in the spec.
        evidence: That a run here gives.
        fingerprint: Of the device; left out: of this machine.

    Raises:
        BaselineError: There is no baseline, or it does not say which engine it is of.
    """
    if fingerprint is None:
        from gate.device import fingerprint as of_machine

        fingerprint = of_machine(for_gpu=_on_gpu(backend, evidence))
    device = device_of(backend, evidence, fingerprint)
    path = baseline_path(root, case=case, engine=engine, device=device)
    baseline = read_baseline(path)
    for name, expected in {"case": case, "engine": engine, "device": device}.items():
        if (got := getattr(baseline.subject, name)) != expected:
            raise BaselineError(
                f"is of another {name}: {got!r}, this run has {expected!r}", where=str(path), hint=ACCEPT
            )
    accepted = baseline.engine_sha256
    if accepted is None:
        raise BaselineError(
            "does not say which engine it is of: it was accepted before that was kept",
            where=str(path),
            hint="Accept it anew: gate baseline accept.",
        )
    return accepted


def check_against_baseline(
    result: EngineResult,
    *,
    engine: EngineSpec,
    file: SpecFile,
    root: Path,
    samples: int,
    data_sha256: str,
    evidence: Evidence,
    fingerprint: Fingerprint | None = None,
) -> Compared:
    """Read the baseline of an engine, refuse one of something else, and compare.

    Args:
        result: What was measured so far; its verdict is not needed.
        engine: What the spec asks of it.
        file: The spec.
        root: Folder of the accepted baselines.
        samples: How many were compared.
        data_sha256: Of the evaluation samples and labels.
        evidence: How it was measured.
        fingerprint: Of the device; left out: of this machine, where the engine runs on a GPU.
    """
    try:
        if fingerprint is None:
            from gate.device import fingerprint as of_machine

            fingerprint = of_machine(for_gpu=_on_gpu(engine.backend, evidence))
        case = file.spec.model.id
        measured = msgspec.structs.replace(result, evidence=evidence)
        subject = _subject(measured, case=case, samples=samples, data_sha256=data_sha256, fingerprint=fingerprint)
        path = baseline_path(root, case=case, engine=engine.name, device=subject.device)
        baseline = read_baseline(path)
        require_comparable(baseline, subject, result, where=str(path))
    except BaselineError as err:
        return Compared(
            findings=baseline_findings(err, result, engine=engine, file=file, evidence=evidence), sha256=None
        )
    return Compared(
        findings=baseline_findings(baseline, result, engine=engine, file=file, evidence=evidence),
        sha256=baseline.digest,
    )


def baseline_findings(
    baseline: Baseline | BaselineError | None,
    result: EngineResult,
    *,
    engine: EngineSpec,
    file: SpecFile,
    evidence: Evidence,
) -> tuple[Finding | Failure, ...]:
    """What `[engine.baseline]` asks for, against a baseline that is comparable. At least one.

    An empty table asks for both checks at their defaults, the task's only where the spec has a `[task]`: the drop that
    `[engine.task]` allows, or else the precision's.

    Args:
        baseline: As `require_comparable` accepts it; or why there is none, which is a Failure.
        result: What was measured.
        engine: What the spec asks of it.
        file: The spec.
        evidence: How it was measured.
    """
    from gate.metrics.classification import DEFAULT_DROP_PP

    if baseline is None:
        baseline = BaselineError("there is no accepted baseline", hint=ACCEPT)
    if isinstance(baseline, BaselineError):
        return (_failure("baseline", baseline, evidence),)
    limits = engine.baseline or BaselineLimits()
    drop = _limit(limits.top1_drop_at_most_pp, "top1_drop_at_most_pp", engine, file)
    scored = _limit(limits.task_drop_at_most, "task_drop_at_most", engine, file)
    ratio = _limit(limits.rel_rmse_ratio_at_most, "rel_rmse_ratio_at_most", engine, file)
    task = file.spec.task
    if drop is None and ratio is None and scored is None:
        ratio = Limit("at_most", RATIO, "default")
        if task is not None and not task.is_classification:
            scored = _default_score_limit(task.kind, engine)
        elif task is not None:
            # What the task may lose against the reference, it may lose against the baseline.
            asked = engine.task.top1_drop_at_most_pp if engine.task is not None else None
            drop = Limit("at_most", DEFAULT_DROP_PP[engine.precision] if asked is None else asked, "default")
    findings: list[Finding | Failure] = []
    if drop is not None:
        findings.append(_drop_finding(baseline, result, limit=drop, evidence=evidence))
    if scored is not None:
        findings.append(_score_finding(baseline, result, limit=scored, file=file, evidence=evidence))
    if ratio is not None:
        findings.extend(_ratio_findings(baseline, result, limit=ratio, evidence=evidence))
    return tuple(findings)


def _default_score_limit(kind_name: str, engine: EngineSpec) -> Limit | None:
    """What the task's first value may lose against the reference, it may lose against the baseline."""
    from gate.metrics.kinds import kind_named

    kind = kind_named(kind_name)
    first = next(iter(kind.values))
    word = "drop" if kind.values[first].higher_is_better else "rise"
    asked = (engine.task_limits or {}).get(f"{first}_{word}_at_most", kind.default_drop.get(engine.precision))
    return None if asked is None else Limit("at_most", asked, "default")


def _score_finding(
    baseline: Baseline, result: EngineResult, *, limit: Limit, file: SpecFile, evidence: Evidence
) -> Finding | Failure:
    from gate.metrics.findings import baseline_finding, unpacked
    from gate.metrics.kinds import kind_named
    from gate.metrics.resampling import seed_from

    scores, before = result.scores, baseline.scores
    check = "baseline.task"
    try:
        if scores is None or before is None:
            who = "this run" if scores is None else "the baseline"
            raise BaselineError(f"{who} has no scores of a task to compare")
        if scores.kind != before.kind:
            raise BaselineError(f"the baseline is of {before.kind}, this run of {scores.kind}")
        if scores.settings_sha256 != before.settings_sha256:
            raise BaselineError(
                "the baseline was scored by other [task] options, another [postprocess] or other categories than this run"
            )
        kind = kind_named(scores.kind)
        ours, theirs = (kind.read(unpacked(each.statistics)) for each in (scores, before))
        if ours.samples != theirs.samples:
            raise BaselineError(f"the baseline was scored on {theirs.samples} samples, this run on {ours.samples}")
        return baseline_finding(
            ours,
            theirs,
            kind=kind,
            limit=limit,
            evidence=evidence,
            seed=seed_from(result.engine_sha256 or "", baseline.digest),
            resamples=1000 if file.spec.task is None else file.spec.task.resamples,
        )
    except GateError as err:
        return _failure(check, err, evidence)


def _failure(check: str, err: GateError, evidence: Evidence) -> Failure:
    message = f"{err.where}: {err.message}" if err.where else err.message
    return Failure(check=check, error=type(err).__name__, message=message, evidence=evidence, hint=err.hint or ACCEPT)


def _limit(value: float | None, key: str, engine: EngineSpec, file: SpecFile) -> Limit | None:
    if value is None:
        return None
    return Limit("at_most", value, "spec", file.engine_location(engine.name, "baseline", key))


def _drop_finding(baseline: Baseline, result: EngineResult, *, limit: Limit, evidence: Evidence) -> Finding | Failure:
    from gate.metrics.classification import baseline_task_finding

    if result.task is None or baseline.task is None:
        who = "this run" if result.task is None else "the baseline"
        return _failure(
            "baseline.top1_drop_pp", BaselineError(f"{who} has no top-1 against labels to compare"), evidence
        )
    try:
        return baseline_task_finding(result.task, baseline.task.correct, limit=limit, evidence=evidence)
    except GateError as err:
        return _failure("baseline.top1_drop_pp", err, evidence)


def _ratio_findings(
    baseline: Baseline, result: EngineResult, *, limit: Limit, evidence: Evidence
) -> Iterator[Finding | Failure]:
    now = {each.output: each for each in result.outputs}
    pairs = [
        (each, now[each.output])
        for each in baseline.outputs
        if each.output in now and (each.elements or now[each.output].elements)
    ]
    if not pairs:
        yield _failure(
            "baseline.rel_rmse_ratio", BaselineError("there is no output with elements to compare"), evidence
        )
    for old, new in pairs:
        # max() of a NaN keeps or drops it by the order of its arguments: NaN comes first, and stays.
        ratio = max(new.rel_rmse, RATIO_FLOOR) / max(old.rel_rmse, RATIO_FLOOR)
        name = f"[{old.output}]" if len(pairs) > 1 else ""
        yield Finding(
            check=f"baseline.rel_rmse_ratio{name}",
            estimate=ratio,
            interval=Interval(ratio, ratio),
            limit=limit,
            n=new.samples,
            evidence=evidence,
            detail=f"output {old.output!r}: rel_rmse {new.rel_rmse:.2e}, accepted {old.rel_rmse:.2e} "
            f"by {baseline.accepted.who} on {baseline.accepted.when[:10]}",
            hint="docs/findings.md#baseline-rel_rmse_ratio",
        )


def baseline_bytes(result: EngineResult, *, run: CheckRun, root: Path) -> bytes:
    """The file of the baseline that an engine was judged by.

    Raises:
        BaselineError: It cannot be read, or is malformed.
        DigestMismatch: It is not the one that the engine was judged by.
    """
    subject = subject_of(run, result)
    path = baseline_path(root, case=subject.case, engine=subject.engine, device=subject.device)
    baseline = read_baseline(path)
    if baseline.digest != result.baseline_sha256:
        raise DigestMismatch(
            f"has digest {baseline.digest[:12]}…, the engine was judged by {str(result.baseline_sha256)[:12]}…",
            where=str(path),
            hint="The baseline was changed after the check; run the check again.",
        )
    return pretty_json(_builtins(baseline))


def accept(run: CheckRun, *, engines: Sequence[str] = (), root: Path, who: str, when: str, why: str) -> AcceptResult:
    """Write baselines from a run, and skip what cannot have one: each with its reason.

    That is what did not run, what fails a check other than the baseline's own, and what names no device or version.

    Args:
        run: The run, which may have been read from its report.
        engines: Names; empty: all of the run.
        root: Folder of the accepted baselines.
        who: Who accepts.
        when: UTC, RFC 3339, whole seconds.
        why: The reason.

    Raises:
        BaselineError: The reason or the name is empty, or the run has no such engine.
        GateError: The disk is full or may not be written to.
    """
    if not why.strip() or not who.strip():
        missing = "the reason" if not why.strip() else "who accepts"
        raise BaselineError(f"{missing} is empty: a baseline says who accepted it and why", hint=ACCEPT)
    names = [result.name for result in run.engines]
    for name in engines:
        if name not in names:
            raise BaselineError(f"the run has no engine {name!r}; it has {', '.join(names)}")
    accepted: list[Accepted] = []
    skipped: list[Skipped] = []
    for result in run.engines:
        if engines and result.name not in engines:
            continue
        reason = _why_not(result)
        if reason is not None:
            skipped.append(Skipped(engine=result.name, reason=reason))
            continue
        try:
            subject = subject_of(run, result)
            path = baseline_path(root, case=subject.case, engine=subject.engine, device=subject.device)
            try:
                history = read_baseline(path).latency
            except BaselineError:
                history = ()
            baseline = baseline_from_result(run, result, who=who, when=when, why=why, history=history)
        except BaselineError as err:
            skipped.append(Skipped(engine=result.name, reason=err.message))
            continue
        write_baseline(path, baseline)
        accepted.append(Accepted(engine=result.name, path=path, baseline=baseline))
    return AcceptResult(accepted=tuple(accepted), skipped=tuple(skipped))


def _why_not(result: EngineResult) -> str | None:
    if result.verdict is None:
        return f"NOT RUN: {result.not_run}"
    wrong = [each for each in result.failing if each.check != "baseline" and not each.check.startswith("baseline.")]
    if wrong:
        return f"{wrong[0].check} is {wrong[0].status.value}"
    if not result.outputs:
        return "it was compiled and not run, so nothing was measured"
    if result.evidence is Evidence.PREFLIGHT:
        return "its evidence is preflight"
    return None


def diff(old: Baseline, new: Baseline) -> tuple[Change, ...]:
    """Every metric and every field of the subject in which two baselines differ, and the digests behind them."""
    before, after = dict(_rows(old)), dict(_rows(new))
    changes: list[Change] = []
    for metric in [*before, *(name for name in after if name not in before)]:
        a, b = before.get(metric), after.get(metric)
        if a == b:
            continue
        number = isinstance(a, (int, float)) and isinstance(b, (int, float))
        changes.append(
            Change(metric=metric, old=a, new=b, change=float(b) - float(a) if number else None)  # type: ignore[arg-type]
        )
    return tuple(changes)


def _rows(baseline: Baseline) -> Iterator[tuple[str, float | str | None]]:
    for name in Subject.__struct_fields__:
        yield f"subject.{name}", getattr(baseline.subject, name)
    yield "backend_version", baseline.backend_version
    yield "reference_sha256", baseline.reference_sha256
    yield "spec_sha256", baseline.spec_sha256
    for output in baseline.outputs:
        for name in BaselineOutput.__struct_fields__:
            if name not in ("output", "kind", "top1_agreement"):
                yield f"{output.output}.{name}", getattr(output, name)
    if baseline.task is not None:
        yield "task.top1_fraction", baseline.task.top1 / baseline.task.samples
        if baseline.task.top5 is not None:
            yield "task.top5_fraction", baseline.task.top5 / baseline.task.samples
    if baseline.scores is not None:
        yield "scores.settings_sha256", baseline.scores.settings_sha256
        for name, value in baseline.scores.values.items():
            yield f"scores.{name}", value
    if baseline.latency:
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            yield f"latency.{name}", getattr(baseline.latency[-1], name)


def baseline_schema() -> dict[str, object]:
    """The JSON Schema (2020-12) of a baseline."""
    (_,), definitions = msgspec.json.schema_components([Baseline], ref_template="#/$defs/{name}")
    for definition in definitions.values():
        # Python 3.13 strips the indentation of docstrings; their first line is the same in each version.
        definition["description"] = definition["description"].split("\n", 1)[0]
    root = definitions.pop("Baseline")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:trt-gate:schema:baseline:1",
        **root,
        "$defs": definitions,
    }
