"""Latency: durations summarised, and budgets judged so that too few samples never pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.results import LatencyMetrics
from gate.spec import EngineSpec, LatencySpec, SpecFile
from gate.statistics import least_samples, percentile_interval
from gate.verdict import Evidence, Finding, Interval, Limit, Status

PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99}
LEAST = 200
"""Inferences that are timed where the spec does not say how many."""

_GROUPS = 20
_T_GROUPS = 2.539483190622288  # one-sided 99 % quantile of Student's t with _GROUPS - 1 degrees of freedom
_HINT = "docs/findings.md#latency"


def samples_needed(latency: LatencySpec) -> int:
    """How many inferences to time: what the spec says, else twice the least of the strictest percentile, at least 200."""
    if latency.samples is not None:
        return latency.samples
    asked = [p for key, p in PERCENTILES.items() if getattr(latency, key) is not None]
    return max([LEAST, *(2 * least_samples(p) for p in asked)])


def summarise(
    durations_ns: Sequence[int] | npt.NDArray[np.integer],
    *,
    batch: int,
    sessions: int,
    warm_up: int,
    clock: str,
    timed: str,
) -> LatencyMetrics:
    """The metrics of raw durations; percentiles are nearest-rank, never interpolated.

    Args:
        durations_ns: One inference each, in the order in which they were timed.
        batch: Samples in each inference.
        sessions: Processes that they come from.
        warm_up: Untimed inferences before.
        clock: Name of the clock.
        timed: What the timed region holds, such as `host_wall`.

    Raises:
        MeasurementError: There are none, or one is not a positive whole number of nanoseconds; or a count is wrong.
    """
    if batch < 1 or sessions < 1 or warm_up < 0:
        raise MeasurementError(f"latency of batch {batch}, {sessions} sessions, {warm_up} warm-ups was not measured")
    durations = _durations(durations_ns)
    ordered = np.sort(durations)
    mean_ns = int(durations.sum()) / len(durations)
    return LatencyMetrics(
        timed=timed,
        batch=batch,
        n=len(durations),
        sessions=sessions,
        warm_up=warm_up,
        mean_ms=mean_ns / 1e6,
        p50_ms=_nearest_rank(ordered, 0.5) / 1e6,
        p90_ms=_nearest_rank(ordered, 0.9) / 1e6,
        p95_ms=_nearest_rank(ordered, 0.95) / 1e6,
        p99_ms=_nearest_rank(ordered, 0.99) / 1e6,
        max_ms=int(ordered[-1]) / 1e6,
        throughput=batch * 1e9 / mean_ns,
        clock=clock,
        durations_ns=tuple(durations.tolist()),
    )


def _durations(raw: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Positive whole nanoseconds, or a MeasurementError that names the first that is not."""
    values = np.asarray(raw)
    if values.ndim != 1 or values.size == 0:
        raise MeasurementError("no inference was timed, so there is no latency")
    if values.dtype.kind not in "iu":
        raise MeasurementError(f"durations are whole nanoseconds, got {values.dtype}")
    if wrong := np.flatnonzero(values <= 0).tolist():
        raise MeasurementError(
            f"inference {wrong[0]} took {values[wrong[0]]} ns; a duration is above 0",
            hint="The clock is too coarse or ran backwards: time on another machine or with larger batches.",
        )
    return values.astype(np.int64)


def _nearest_rank(ordered: npt.NDArray[np.int64], p: float) -> int:
    # The tolerance keeps ceil(0.95 * 20) at 19, whatever the last bit of 0.95 * 20.
    rank = math.ceil(p * len(ordered) - 1e-9)
    return int(ordered[max(rank, 1) - 1])


def latency_findings(
    metrics: LatencyMetrics, *, engine: EngineSpec, file: SpecFile, evidence: Evidence
) -> tuple[Finding, ...]:
    """One finding for each budget in the spec.

    A percentile is judged by MLPerf LoadGen's binomial bound at 99 % (`gate.statistics.percentile_interval`).
    Throughput is judged by an interval of the mean latency: durations that follow each other are alike, so they are
    grouped into 20 runs of equal length and the 20 means are the sample of a Student's t interval, 99 % on each side.
    Neither knows how one process differs from the next.

    Raises:
        MeasurementError: The raw durations are missing, or are of another batch size than the budget's.
    """
    asked = engine.latency
    if asked is None:
        return ()
    if metrics.batch != asked.batch:
        raise MeasurementError(f"latency was measured at batch {metrics.batch}, the budget is for batch {asked.batch}")
    durations = _durations(metrics.durations_ns)
    if len(durations) != metrics.n:
        raise MeasurementError(f"{metrics.n} inferences were timed, {len(durations)} durations are here")
    ordered = np.sort(durations)
    found = [
        _percentile(ordered, key, p, budget=budget, evidence=evidence)
        for key, p in PERCENTILES.items()
        if (budget := getattr(asked, key)) is not None
    ]
    if asked.throughput_at_least is not None:
        found.append(_throughput(durations, metrics, floor=asked.throughput_at_least, evidence=evidence))
    return tuple(_located(finding, engine=engine, file=file) for finding in found)


def _located(finding: Finding, *, engine: EngineSpec, file: SpecFile) -> Finding:
    """The finding with its limit's place in the spec, looked up only for one that did not pass."""
    if finding.status is Status.PASSED:
        return finding
    key = finding.check.removeprefix("latency.")
    key = "throughput_at_least" if key == "throughput" else key
    limit = msgspec.structs.replace(finding.limit, location=file.engine_location(engine.name, "latency", key))
    return msgspec.structs.replace(finding, limit=limit)


def _percentile(ordered: npt.NDArray[np.int64], key: str, p: float, *, budget: float, evidence: Evidence) -> Finding:
    n = len(ordered)
    bounds = percentile_interval(ordered, p)
    interval = Interval(max(0.0, bounds.lower / 1e6), bounds.upper / 1e6)
    finding = Finding(
        check=f"latency.{key}",
        estimate=_nearest_rank(ordered, p) / 1e6,
        interval=interval,
        limit=Limit("at_most", budget),
        unit="ms",
        n=n,
        evidence=evidence,
        hint=_HINT,
    )
    name = key.removesuffix("_ms")
    over = int(np.count_nonzero(ordered / 1e6 > budget))
    detail = ""
    if finding.status is Status.INCONCLUSIVE:
        least = least_samples(p)
        if n < least:
            detail = f"{name} needs at least {least} samples, has {n}; raise samples or max_time_s"
        else:
            detail = f"{over} of {n} inferences are over the budget; more samples would decide"
    elif finding.status is Status.FAILED:
        detail = f"{over} of {n} inferences are over the budget, slowest {int(ordered[-1]) / 1e6:.4g} ms"
    return msgspec.structs.replace(finding, detail=detail)


def _throughput(
    durations: npt.NDArray[np.int64], metrics: LatencyMetrics, *, floor: float, evidence: Evidence
) -> Finding:
    n = len(durations)
    size = n // _GROUPS
    interval = Interval(0.0, math.inf)
    if size >= 2:
        means = durations[n - size * _GROUPS :].reshape(_GROUPS, size).mean(axis=1)
        mean = float(durations.mean())
        half = _T_GROUPS * float(means.std(ddof=1)) / math.sqrt(_GROUPS)
        slowest, fastest = metrics.batch * 1e9 / (mean + half), mean - half
        interval = Interval(slowest, metrics.batch * 1e9 / fastest if fastest > 0.0 else math.inf)
    finding = Finding(
        check="latency.throughput",
        estimate=metrics.throughput,
        interval=interval,
        limit=Limit("at_least", floor),
        unit="1/s",
        n=n,
        evidence=evidence,
        hint=_HINT,
    )
    detail = ""
    if finding.status is Status.INCONCLUSIVE:
        detail = (
            f"throughput needs at least {2 * _GROUPS} samples, has {n}; raise samples or max_time_s"
            if size < 2
            else "the mean latency varies too much within the run; more samples would decide"
        )
    return msgspec.structs.replace(finding, detail=detail)
