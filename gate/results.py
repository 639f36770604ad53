"""What a check gives: one `CheckRun`, which every report, the seal and the baselines are made from.

It is written to `report.json` and read back from it; statuses are not stored in it but computed again.
Non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity", since JSON has none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from gate.engines.interface import BuildRecord, LoweringRecord
from gate.latency.measurement import MemoryUse, Region, StageSummary
from gate.latency.ratio import RatioEstimate
from gate.verdict import Evidence, Failure, Finding, Status, Verdict, status_of
from gate.wording import finding_sentence


class OutputMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every parity metric of one output (docs/findings.md says what each means). None: not defined for it.

    Args:
        output: Its name in the reference.
        kind: `float`, or `exact` for integers and booleans.
        samples, elements: How many were compared; an output without a batch axis counts one sample a batch.
        nonfinite_reference, nonfinite_candidate: Elements that are NaN or Inf.
        max_abs, max_abs_sample, max_abs_element: The largest |d|, its sample and its flat index in the sample.
        rms_reference: Root mean square of the reference, the scale that limits are relative to.
        cosine_distance: 1 - cosine of the worst sample; `mean_cosine_distance` over all samples.
        centered_cosine_distance: Of the worst sample, after the reference's per-class mean is removed from both.
        allclose_fraction: Elements with |d| <= atol + rtol·|reference|, at `allclose_atol`, `allclose_rtol`.
        quantiles: Of |d|, by name (`p50`, `p90`, `p99`, `p99_9`), within 3.1 %.
        worst_samples: Index and relative error of the worst, worst first.
        top1_agree, top5_agree, topk_samples: Counts, where the output is [N, classes]; top-5 with six classes or more.
        top1_near_ties: Disagreements where the reference's own margin is below 2 max|d| of the sample.
    """

    output: str
    kind: Literal["float", "exact"]
    samples: int
    elements: int
    nonfinite_reference: int
    nonfinite_candidate: int
    max_abs: float
    max_abs_sample: int | None
    max_abs_element: int | None
    mean_abs: float
    rms_reference: float
    rel_rmse: float
    sqnr_db: float | None
    cosine_distance: float | None
    mean_cosine_distance: float | None
    centered_cosine_distance: float | None
    allclose_fraction: float
    allclose_atol: float
    allclose_rtol: float
    mismatch_fraction: float
    quantiles: dict[str, float]
    worst_samples: tuple[tuple[int, float], ...]
    top1_agree: int | None = None
    top5_agree: int | None = None
    topk_samples: int | None = None
    top1_near_ties: int | None = None


class TaskMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Top-1 and top-5 of engine and reference against labels, as counts over the same `samples`.

    Args:
        correct: The engine's top-1 outcome of every sample in order, as hex of `numpy.packbits`.
        reference_correct: The reference's, likewise.
        top5_newly_wrong, top5_newly_right: Samples whose top-5 outcome differs, for the paired interval.
    """

    samples: int
    top1: int
    top5: int | None
    reference_top1: int
    reference_top5: int | None
    correct: str
    reference_correct: str
    top5_newly_wrong: int | None = None
    top5_newly_right: int | None = None


class TaskValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What engine and reference scored at a task other than classification, on the same samples.

    Args:
        kind: As `[task] kind`.
        samples: How many were scored; for tracking, sequences.
        values: The engine's, by name: `mean_ap`, `ap_of.person`; NaN where not defined.
        reference: The reference's.
        statistics: What each sample contributes to the engine's values, packed: a baseline is compared sample by sample.
        boxes: How the engine's boxes differ from the reference's, by name; empty for other tasks.
        settings_sha256: Of what decides, beside the samples and the answers, what the values say: options of `[task]`,
            `[postprocess]`, categories. Empty where it is not known.
    """

    kind: str
    samples: int
    values: dict[str, float]
    reference: dict[str, float]
    statistics: str = ""
    boxes: dict[str, float] = {}
    settings_sha256: str = ""


class RegionSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A region of every inference that was timed, in milliseconds; percentiles are nearest-rank."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


class SessionPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kept inferences of two engines that took turns in one process, in nanoseconds.

    Args:
        a_ns: Of the engine that is judged.
        b_ns: Of the other.
    """

    a_ns: tuple[int, ...]
    b_ns: tuple[int, ...]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine against another, timed in turn with it.

    Args:
        against: As in the spec: `baseline`, `reference`, another engine, or a bundle.
        title: What it is, for a reader.
        sha256: Of its file; None for the reference.
        ratios: The engine's percentile over the other's, by `p50` and `p95`.
        sessions: Processes.
        seconds: Wall time of all of them.
        checks: Names of the checks that rest on it.
        stopped: Why no more were measured.
        pairs: Every raw latency; kept as evidence, left out of report.json.
    """

    against: str
    title: str
    sha256: str | None
    ratios: dict[str, RatioEstimate]
    sessions: int
    seconds: float
    checks: tuple[str, ...]
    stopped: str
    pairs: tuple[SessionPair, ...] = ()


class LatencyMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency of one batch size and shape. Percentiles are nearest-rank.

    Args:
        name: Of the cell, such as `batch=8`; empty where it is the only one.
        timed: What the percentiles are of, as in `[engine.latency]`: `host_wall`, `gpu_compute` or `latency`.
        transfers: Whether the inputs were copied to a GPU and the outputs back.
        wait: How the host waited for the GPU.
        streams: Inferences at the same time.
        cuda_graph: Whether the engine was launched as a CUDA graph.
        batch: Batch size.
        axes: Sizes of other dynamic axes.
        n: Inferences timed; `sessions` processes they come from; `warm_up` untimed ones before them.
        throughput: Samples per second.
        regions: Every region that was timed.
        seconds: Wall time of all sessions.
        stopped: Why no more were measured.
        comparisons: With other engines.
        notes: What a reader should know: throttling, other processes on the GPU.
        session_sizes: How many of `durations_ns` are of each session.
        spans_ns: From the begin of a session's first kept inference to the end of its last one.
        durations_ns: Every raw latency, in order; kept as evidence, left out of report.json.
    """

    name: str = ""
    timed: str
    transfers: bool = False
    wait: Literal["spin", "block"] = "spin"
    streams: int = 1
    cuda_graph: bool = False
    batch: int
    axes: dict[str, int] = {}
    n: int
    sessions: int
    warm_up: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    throughput: float
    clock: str
    regions: dict[Region, RegionSummary] = {}
    seconds: float = 0.0
    stopped: str = ""
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    session_sizes: tuple[int, ...] = ()
    spans_ns: tuple[int, ...] = ()
    durations_ns: tuple[int, ...] = ()


class UsageMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an engine takes while it runs without a pause: the mean over sessions; None where the system does not say."""

    batch: int
    sessions: int
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_percent: float | None = None
    cpu_percent: float | None = None


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The device and the software on it.

    Args:
        kind: `cpu` or `gpu`.
        name: Of the CPU or GPU.
        cores: Usable CPU cores.
        isa: What changes a CPU's arithmetic: `avx2`, `avx512`, `avx512_vnni`, `neon`, …
        compute_capability, driver, cuda: Of the GPU; None without one.
        os: System and architecture.
        versions: Installed versions by distribution, those that can change answers or speed.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    cores: int
    isa: tuple[str, ...]
    os: str
    python: str
    versions: dict[str, str]
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None


class EngineResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine's part of a run.

    Args:
        name, backend, precision: As in the spec.
        verdict: None for an optional engine that was NOT RUN.
        not_run: Why, where it was not run.
        evidence: What the verdict rests on; None where not run.
        size_bytes: Of the engine's file.
        build: How it was made; None where it was not.
        engine_sha256: Digest of the engine's file.
        engine_path: Where it lies on this machine, while the run lasts; not in report.json.
        graph_path, graph_sha256: Of the ONNX graph that it was built from, likewise; None where it was not.
        outputs, task: What was measured; `task` of classification, `scores` of any other task.
        latencies: One for each batch size and shape that was timed.
        stages: Of the whole pipeline.
        usage: What it takes while it runs without a pause.
        memory: Of it, and the engines that were loaded beside it, in a fresh process.
        reused: What came from the cache: any of `export`, `lowered`, `engine`.
        host_peak_mib: Host memory that loading and running it added at its peak.
        device_peak_mib: Device memory likewise, by the driver's count for the whole GPU; None where it was not run on one.
        baseline_sha256: Digest of the baseline that it was compared with.
        onnx_opset, calibration_sha256: Of the graph that it was built from.
        lowering: How that graph was made, with the precision of each node; None where it was not lowered here.
        notes: Sentences for the reader: defaults that applied, likely causes.
        warnings: What a reader must see even where it passed: too few calibration samples, another scale, outliers.
    """

    name: str
    backend: str
    precision: str
    verdict: Verdict | None
    not_run: str | None = None
    evidence: Evidence | None = None
    size_bytes: int | None = None
    build: BuildRecord | None = None
    engine_sha256: str | None = None
    engine_path: str | None = None
    graph_path: str | None = None
    graph_sha256: str | None = None
    outputs: tuple[OutputMetrics, ...] = ()
    task: TaskMetrics | None = None
    scores: TaskValues | None = None
    latencies: tuple[LatencyMetrics, ...] = ()
    stages: tuple[StageSummary, ...] = ()
    usage: UsageMetrics | None = None
    memory: MemoryUse | None = None
    host_peak_mib: float | None = None
    device_peak_mib: float | None = None
    baseline_sha256: str | None = None
    onnx_opset: int | None = None
    calibration_sha256: str | None = None
    lowering: LoweringRecord | None = None
    reused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def status(self) -> Status | None:
        """The verdict's status; None where not run."""
        return None if self.verdict is None else self.verdict.status

    @property
    def failing(self) -> tuple[Finding | Failure, ...]:
        """Findings that are not PASSED, FAILED ones first, in their own order."""
        findings = () if self.verdict is None else self.verdict.findings
        return tuple(
            finding
            for status in (Status.FAILED, Status.INCONCLUSIVE)
            for finding in findings
            if finding.status is status
        )


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Digests and versions that say what was compared with what.

    Args:
        spec_sha256: Of the spec's bytes.
        data_sha256: Of every evaluation sample and label, in order.
        reference_sha256: Key of the reference: factory, weights, code, what is installed, inputs.
        reference: For a reader, such as `torch 2.13.0 fp32 (recorded 3a1f…, reused)`.
        git: Commit of the spec's folder, with `-dirty` appended where it has changes; None outside a checkout.
    """

    spec_sha256: str
    data_sha256: str
    reference_sha256: str
    reference: str
    weights_sha256: str | None
    git: str | None
    seed: int


class CheckRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run of `gate check` over one spec.

    Args:
        schema_version: Of report.json.
        gate_version: Of this package.
        spec_path: As the user gave it.
        model_id: From the spec.
        samples: Compared.
        created: UTC, RFC 3339, whole seconds.
        profile: Per input, its min, opt and max shapes.
        seconds: Wall time by stage (`samples`, `reference`, `export`, `lower`, `build`, `compare`, `metamorphic`,
            `latency`), their `total`, and `inside_engines`: the part of `compare` that was spent in the engines.
        reused: Of the whole run: any of `reference`, `export`.
        data: How images became the model's input and outputs became detections; empty where neither was done here.
    """

    schema_version: Literal[1] = 1
    gate_version: str
    spec_path: str
    model_id: str
    samples: int
    created: str
    device: Fingerprint
    provenance: Provenance
    profile: dict[str, dict[str, list[int]]]
    engines: tuple[EngineResult, ...]
    seconds: dict[str, float]
    reused: tuple[str, ...] = ()
    data: dict[str, Any] = {}

    @property
    def status(self) -> Status:
        """The worst status of the engines that ran.

        Raises:
            MeasurementError: None of them ran.
        """
        return status_of([engine.status for engine in self.engines if engine.status is not None])

    @property
    def passed(self) -> bool:
        """Whether every engine that ran passed."""
        return self.status is Status.PASSED

    @property
    def summary(self) -> str:
        """One line a hurried reader needs: the engine, the check, and observed against limit.

        `FAILED  ort-int8  parity.rel_rmse: 9.7e-03 > 5.0e-03 (gate.toml:41)`, or
        `PASSED  digits-cnn: 4 engines, 797 samples`.
        """
        ran = [engine for engine in self.engines if engine.status is not None]
        not_run = [engine.name for engine in self.engines if engine.status is None]
        tail = f"; NOT RUN: {', '.join(not_run)}" if not_run else ""
        if not ran:
            return f"NOT RUN  {self.model_id}: no engine ran, so there is nothing to pass"
        if self.passed:
            engines = "1 engine" if len(ran) == 1 else f"{len(ran)} engines"
            return f"PASSED  {self.model_id}: {engines}, {self.samples} samples{tail}"
        worst = [engine for engine in ran if engine.status is self.status]
        first = worst[0]
        others = len([engine for engine in ran if engine.status is not Status.PASSED]) - 1
        more = f" (and {others} more engine{'s' if others > 1 else ''})" if others else ""
        sentence = finding_sentence(first.failing[0], precision=first.precision)
        return f"{self.status.value}  {first.name}  {sentence}{more}{tail}"

    def __getitem__(self, check: str) -> Finding | Failure:
        """The finding of a check, `task.top1_drop_pp`, or `ort-fp16:task.top1_drop_pp` where several engines ran.

        Raises:
            KeyError: There is none, or it is of several engines; names what there is.
        """
        __tracebackhide__ = True  # pytest then shows the line of the test
        engine, _, name = check.rpartition(":")
        found = [
            finding
            for result in self.engines
            if engine in ("", result.name) and result.verdict is not None
            for finding in result.verdict.findings
            if finding.check == name
        ]
        if len(found) != 1:
            checks = sorted(
                f"{result.name}:{finding.check}"
                for result in self.engines
                if result.verdict is not None
                for finding in result.verdict.findings
            )
            many = "several engines have" if found else "there is no"
            raise KeyError(f"{many} check {check!r}; this run has {', '.join(checks)}")
        return found[0]


def builtins_from(value: object) -> Any:
    """A struct as dicts, lists, strings and finite numbers, for JSON.

    Raw durations and paths are left out, and a finding carries its computed `status` for readers.
    """
    if isinstance(value, (Finding, Failure, EngineResult, CheckRun, Verdict)):
        raw = {name: builtins_from(getattr(value, name)) for name in value.__struct_fields__ if name not in NOT_STORED}
        if isinstance(value, (Finding, Failure)):
            raw = {"type": "finding" if isinstance(value, Finding) else "failure", **raw}
        status = None if value.status is None else value.status.value
        return {**raw, "status": status}
    if isinstance(value, msgspec.Struct):
        return {name: builtins_from(getattr(value, name)) for name in value.__struct_fields__ if name not in NOT_STORED}
    if isinstance(value, dict):
        return {key: builtins_from(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [builtins_from(each) for each in value]
    if isinstance(value, (Status, Evidence)):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


NOT_STORED = frozenset({"durations_ns", "pairs", "engine_path", "graph_path", "graph_sha256"})


def run_from_builtins(raw: Any) -> CheckRun:
    """The inverse of `builtins_from` for a run: statuses are dropped and computed again.

    Raises:
        msgspec.ValidationError: It is not a run.
    """
    return msgspec.convert(_without_status(raw), CheckRun, strict=True)


def _without_status(raw: Any) -> Any:
    if isinstance(raw, dict):
        return {
            key: _without_status(value)
            for key, value in raw.items()
            if not (key == "status" and value in (None, "PASSED", "FAILED", "INCONCLUSIVE"))
        }
    if isinstance(raw, list):
        return [_without_status(each) for each in raw]
    if raw in ("NaN", "Infinity", "-Infinity"):
        return float(raw)
    return raw
