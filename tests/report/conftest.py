"""Hand-made runs: passed, failed, inconclusive, not run, and all of these at once."""

from __future__ import annotations

import math

from gate.results import CheckRun, EngineResult, Fingerprint, LatencyMetrics, OutputMetrics, Provenance, TaskMetrics
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Verdict

HOST = Evidence.HOST


def finding(
    check="parity.rel_rmse", estimate=9.7e-3, limit=5e-3, *, kind="at_most", interval=None, allowed=None, **more
):
    lower, upper = interval or (estimate, estimate)
    values = {
        "limit": allowed or Limit(kind, limit, "spec", "gate.toml:41"),
        "n": 797,
        "evidence": HOST,
        "hint": "docs/findings.md#parity-rel_rmse",
    } | more
    return Finding(check=check, estimate=estimate, interval=Interval(lower, upper), **values)


def output(name="logits", rel_rmse=4.1e-7):
    return OutputMetrics(
        output=name,
        kind="float",
        samples=797,
        elements=7970,
        nonfinite_reference=0,
        nonfinite_candidate=0,
        max_abs=1e-5,
        max_abs_sample=512,
        max_abs_element=3,
        mean_abs=1e-6,
        rms_reference=3.0,
        rel_rmse=rel_rmse,
        sqnr_db=100.0,
        cosine_distance=1e-12,
        mean_cosine_distance=1e-13,
        centered_cosine_distance=None,
        allclose_fraction=1.0,
        allclose_atol=1e-6,
        allclose_rtol=1e-6,
        mismatch_fraction=0.0,
        quantiles={"p50": 1e-6},
        worst_samples=((512, 2e-6), (7, 1e-6)),
    )


def engine(name, *findings, rel_rmse=4.1e-7, top1=785, **more):
    values = {
        "backend": "onnxruntime",
        "precision": "fp32",
        "verdict": Verdict(findings=findings),
        "evidence": HOST,
        "size_bytes": 87040,
        "outputs": (output(rel_rmse=rel_rmse),),
        "task": TaskMetrics(
            samples=797,
            top1=top1,
            top5=None,
            reference_top1=785,
            reference_top5=None,
            correct="ff",
            reference_correct="ff",
        ),
        "latencies": (
            LatencyMetrics(
                timed="host_wall",
                batch=1,
                n=1000,
                sessions=5,
                warm_up=100,
                mean_ms=0.21,
                p50_ms=0.21,
                p90_ms=0.22,
                p95_ms=0.24,
                p99_ms=0.3,
                p99_9_ms=0.9,
                max_ms=1.0,
                throughput=4761.9,
                clock="perf_counter_ns",
                seconds=12.0,
                stopped="decided after 5 sessions",
                session_sizes=(1, 1),
                durations_ns=(210000, 220000),
            ),
        ),
        "engine_sha256": "ab" * 32,
        "engine_path": "/somewhere/model.onnx",
    } | more
    return EngineResult(name=name, **values)


def run_of(*engines, **more):
    values = {
        "gate_version": "0.1.0",
        "spec_path": "examples/digits/gate.toml",
        "model_id": "digits-cnn",
        "samples": 797,
        "created": "2026-11-21T10:02:11Z",
        "device": Fingerprint(
            kind="cpu",
            name="AMD EPYC",
            cores=2,
            isa=("avx2",),
            os="Linux x86_64",
            python="3.11.7",
            versions={"numpy": "2"},
        ),
        "provenance": Provenance(
            spec_sha256="1" * 64,
            data_sha256="2" * 64,
            reference_sha256="3" * 64,
            reference="torch 2.13.0 fp32 (recorded 3a1f…, reused)",
            weights_sha256=None,
            git=None,
            seed=0,
        ),
        "profile": {"input": {"min": [1, 1, 8, 8], "opt": [64, 1, 8, 8], "max": [256, 1, 8, 8]}},
        "seconds": {"total": 12.3},
    } | more
    return CheckRun(engines=engines, **values)


PASSES = finding(estimate=4.1e-7)
GOOD = engine("ort-fp32", PASSES)
BAD = engine(
    "ort-int8",
    finding("parity.max_abs", 4.1e-7),
    finding(detail="worst sample 512 (label 8, reference 8 by 0.31, engine 3)"),
    finding("task.top1_drop_pp", 0.12, 0.1, interval=(0.11, 0.13), unit="pp"),
    rel_rmse=9.7e-3,
    top1=784,
    precision="int8",
    notes=("likely cause: 2 activations clip",),
)
UNSURE = engine(
    "ort-fp16",
    finding(
        "latency.p99_ms",
        0.11,
        2.0,
        interval=(0.02, math.inf),
        unit="ms",
        n=300,
        detail="p99 needs at least 459 samples, has 300; raise samples or max_time_s",
    ),
)
COMPILED = engine(
    "rtx-fp16",
    finding("build.delivered_precision", 1.0, 0.9, kind="at_least", evidence=Evidence.PREFLIGHT),
    evidence=Evidence.PREFLIGHT,
    outputs=(),
    task=None,
    latencies=(),
)
ABSENT = EngineResult(
    name="trt-fp16", backend="tensorrt", precision="fp16", verdict=None, not_run="backend 'tensorrt' is not installed"
)
BROKEN = engine(
    "trt-int8",
    Failure(
        check="build",
        error="BuildError",
        message="the compiler refused the graph\nnode: /f/Conv\n  | [E] no implementation",
        evidence=Evidence.PREFLIGHT,
        hint="Lower it with another opset.",
    ),
    outputs=(),
    task=None,
    latencies=(),
    size_bytes=None,
)

PASSED = run_of(GOOD, COMPILED)
FAILED = run_of(GOOD, BAD)
INCONCLUSIVE = run_of(GOOD, UNSURE)
NOT_RUN = run_of(ABSENT)
ALL = run_of(GOOD, UNSURE, BAD, COMPILED, ABSENT, BROKEN)
