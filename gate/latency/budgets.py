"""Latency of sessions summarised, and budgets judged so that too few inferences never pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.latency.bounds import equal_parts, held_by_session, percentile_bounds, throughput_bounds, throughput_of
from gate.latency.config import PERCENTILES, Cell, LatencySpec, SpeedupSpec
from gate.latency.measurement import LEAST_NS, REGIONS, Region, SessionTimes, SubjectTimes
from gate.latency.ratio import LOOKS, RatioEstimate, durations_from, nearest_rank
from gate.results import LatencyMetrics, RegionSummary
from gate.statistics import least_samples
from gate.verdict import Evidence, Finding, Interval, Limit, Status

LEAST_PER_SESSION = 200
"""Inferences of a session that are kept where the spec does not say how many of all."""

LATER_SAMPLES = 12_000
"""Inferences that 20 sessions keep at the least, from the second look on. Source: docs/latency.md."""

HINT = "docs/findings.md#latency"


def samples_needed(latency: LatencySpec) -> int:
    """How many inferences to time in all sessions of the first look.

    What the spec says, else twice the least of the strictest percentile, at least 200 of each session.
    """
    if latency.samples is not None:
        return latency.samples
    asked = [p for key, p in PERCENTILES.items() if getattr(latency, key) is not None]
    return max([LEAST_PER_SESSION * latency.sessions, *(2 * least_samples(p) for p in asked)])


def summarise(
    sessions: Sequence[SubjectTimes],
    *,
    cell: Cell,
    spec: LatencySpec,
    clock: str,
    seconds: float = 0.0,
    stopped: str = "",
    cuda_graph: bool = False,
    notes: tuple[str, ...] = (),
) -> LatencyMetrics:
    """The metrics of an engine's inferences in several sessions, pooled.

    Percentiles are nearest-rank, over as many inferences of each session (`gate.latency.bounds.equal_parts`).

    Args:
        sessions: The engine's part of each session.
        cell: Batch size and shape.
        spec: How they were timed.
        clock: Name of the host's clock.
        seconds: Wall time of all sessions.
        stopped: Why no more were measured.
        cuda_graph: Whether the engine was launched as a CUDA graph.
        notes: For a reader.

    Raises:
        MeasurementError: There are none; one is not a positive whole number of nanoseconds; a region is missing, or has
            another number of inferences than the others.
    """
    regions = pooled_regions(sessions)
    if spec.timed not in regions:
        raise MeasurementError(
            f'timed = "{spec.timed}" was asked for, and the engine gave {", ".join(regions)}',
            hint='Leave timed out, which is "host_wall".' if spec.timed != "host_wall" else None,
        )
    durations = regions[spec.timed]
    ordered = np.sort(equal_parts([each.regions[spec.timed] for each in sessions]))
    mean_ns = int(durations.sum()) / len(durations)
    return LatencyMetrics(
        name=cell.name,
        timed=spec.timed,
        transfers=spec.copies and "h2d" in regions,
        wait=spec.wait,
        streams=spec.streams,
        cuda_graph=cuda_graph,
        batch=cell.batch,
        axes=dict(cell.axes),
        n=len(durations),
        sessions=len(sessions),
        warm_up=sum(each.warm_up for each in sessions),
        mean_ms=mean_ns / 1e6,
        p50_ms=_rank_ms(ordered, 0.5),
        p90_ms=_rank_ms(ordered, 0.9),
        p95_ms=_rank_ms(ordered, 0.95),
        p99_ms=_rank_ms(ordered, 0.99),
        p99_9_ms=_rank_ms(ordered, 0.999),
        max_ms=int(durations.max()) / 1e6,
        throughput=float(np.mean(throughputs(sessions, cell=cell, spec=spec))),
        clock=clock,
        regions={name: _region(values) for name, values in regions.items()},
        seconds=seconds,
        stopped=stopped,
        notes=notes,
        session_sizes=tuple(len(each.regions[spec.timed]) for each in sessions),
        spans_ns=tuple(each.span_ns for each in sessions),
        durations_ns=tuple(durations.tolist()),
    )


def pooled_regions(sessions: Sequence[SubjectTimes]) -> dict[Region, npt.NDArray[np.int64]]:
    """Every region of all sessions, in their order: int64 [n], nanoseconds.

    Raises:
        MeasurementError: There is no session; a duration is not positive; sessions have different regions, or regions
            different numbers of inferences.
    """
    if not sessions:
        raise MeasurementError("no session was measured, so there is no latency")
    names = [name for name in REGIONS if name in sessions[0].regions]
    found: dict[Region, list[npt.NDArray[np.int64]]] = {name: [] for name in names}
    for index, each in enumerate(sessions):
        if set(each.regions) != set(names):
            raise MeasurementError(f"session {index} timed {', '.join(each.regions)}, the first {', '.join(names)}")
        kept = {name: durations_from(each.regions[name], least=LEAST_NS[name]) for name in names}
        if len({len(values) for values in kept.values()}) != 1:
            sizes = ", ".join(f"{name} {len(values)}" for name, values in kept.items())
            raise MeasurementError(f"session {index} has regions of different lengths: {sizes}")
        for name, values in kept.items():
            found[name].append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def throughputs(sessions: Sequence[SubjectTimes], *, cell: Cell, spec: LatencySpec) -> list[float]:
    """Samples per second of each session; as `gate.latency.bounds.throughput_of`."""
    return [
        throughput_of(each.regions[spec.timed], batch=cell.batch, span_ns=each.span_ns if spec.streams > 1 else None)
        for each in sessions
    ]


def budget_findings(
    sessions: Sequence[SubjectTimes], *, cell: Cell, spec: LatencySpec, evidence: Evidence
) -> tuple[Finding, ...]:
    """One finding for each absolute budget.

    A percentile is judged by `gate.latency.bounds.percentile_bounds`, throughput by `throughput_bounds`; neither is
    decided with fewer sessions than the spec asks for.

    Raises:
        MeasurementError: As `pooled_regions`.
    """
    budgets = spec.budgets
    if not budgets:
        return ()
    durations = pooled_regions(sessions).get(spec.timed)
    if durations is None:
        raise MeasurementError(f'timed = "{spec.timed}" was asked for, and was not measured')
    timed = [each.regions[spec.timed] for each in sessions]
    few = len(sessions) < spec.sessions
    found = [
        _percentile(timed, key, budget=budgets[key], cell=cell, evidence=evidence, few=few)
        for key in PERCENTILES
        if key in budgets
    ]
    if "throughput_at_least" in budgets:
        found.append(
            _throughput(
                throughputs(sessions, cell=cell, spec=spec),
                cell=cell,
                floor=budgets["throughput_at_least"],
                n=len(durations),
                few=few,
                evidence=evidence,
            )
        )
    return tuple(found)


def regression_finding(
    estimate: RatioEstimate, name: str, *, cell: Cell, limit_percent: float, against: str, n: int, evidence: Evidence
) -> Finding:
    """How many percent slower than another engine at one percentile.

    Args:
        estimate: The engine's percentile over the other's.
        name: `p50` or `p95`.
        against: What the other is.
        n: Inferences of the engine that it rests on.
    """
    finding = Finding(
        check=cell.check(f"latency.regression_{name}"),
        estimate=_growth(estimate.ratio),
        interval=Interval(_growth(estimate.interval.lower), _growth(estimate.interval.upper)),
        limit=Limit("at_most", limit_percent),
        unit="%",
        n=n,
        evidence=evidence,
        hint=HINT,
    )
    return msgspec.structs.replace(finding, detail=_ratio_detail(finding, estimate, f"{name} against {against}"))


def speedup_finding(
    estimate: RatioEstimate, spec: SpeedupSpec, *, cell: Cell, against: str, n: int, evidence: Evidence
) -> Finding:
    """How many times faster than another engine at the median; arguments as of `regression_finding`."""
    upper = math.inf if estimate.interval.lower <= 0.0 else 1.0 / estimate.interval.lower
    finding = Finding(
        check=cell.check("latency.speedup"),
        estimate=1.0 / estimate.ratio,
        interval=Interval(1.0 / estimate.interval.upper, upper),
        limit=Limit("at_least", spec.at_least),
        n=n,
        evidence=evidence,
        hint=HINT,
    )
    return msgspec.structs.replace(finding, detail=_ratio_detail(finding, estimate, f"p50 of {against}"))


def doubted(finding: Finding, reasons: Sequence[str], *, blocks: Sequence[Status]) -> Finding:
    """The finding with its interval opened on the sides that its doubts concern, so that it does not decide there.

    Args:
        finding: As measured.
        reasons: Why; none leaves it as it is. What is not decided anyway has them added to its own.
        blocks: Which decisions the doubts are about.
    """
    new = [each for each in reasons if each not in finding.detail]
    if new and finding.status is Status.INCONCLUSIVE:
        return msgspec.structs.replace(finding, detail="; ".join([*filter(None, [finding.detail]), *new]))
    if not reasons or finding.status not in blocks:
        return finding
    lower, upper = finding.interval.lower, finding.interval.upper
    keeps_upper = (finding.limit.kind == "at_most") == (finding.status is Status.FAILED)
    interval = Interval(-math.inf, upper) if keeps_upper else Interval(lower, math.inf)
    return msgspec.structs.replace(finding, interval=interval, detail="; ".join(reasons))


def _percentile(
    sessions: Sequence[Sequence[int]], key: str, *, budget: float, cell: Cell, evidence: Evidence, few: bool
) -> Finding:
    p = PERCENTILES[key]
    bounds = Interval(-math.inf, math.inf) if few else percentile_bounds(sessions, p)
    ordered = np.sort(equal_parts(sessions))
    n = len(ordered)
    finding = Finding(
        check=cell.check(f"latency.{key}"),
        estimate=_rank_ms(ordered, p),
        interval=Interval(max(0.0, bounds.lower / 1e6), bounds.upper / 1e6),
        limit=Limit("at_most", budget),
        unit="ms",
        n=n,
        evidence=evidence,
        hint=HINT,
    )
    name = key.removesuffix("_ms").replace("_", ".")
    over = int(np.count_nonzero(ordered / 1e6 > budget))
    detail = ""
    if finding.status is Status.INCONCLUSIVE:
        least = least_samples(p)
        own = sorted(nearest_rank(each, p) / 1e6 for each in sessions)
        if n < least:
            shortest = min(map(len, sessions))
            cut = f", as many of each session as the shortest has, {shortest}" if n < sum(map(len, sessions)) else ""
            detail = f"{name} needs at least {least} samples, has {n}{cut}; raise samples or max_time_s"
        elif few:
            detail = f"{name} needs more processes, has {sessions_text(len(sessions))}; raise max_time_s"
        elif held_by_session(sessions, p):
            detail = (
                f"{over} of {n} inferences are over the budget, {name} of the {sessions_text(len(sessions))} is "
                f"{own[0]:.4g} to {own[-1]:.4g} ms; more sessions would decide"
            )
        else:
            detail = f"{over} of {n} inferences are over the budget; more samples would decide"
    elif finding.status is Status.FAILED:
        detail = f"{over} of {n} inferences are over the budget, slowest {int(ordered[-1]) / 1e6:.4g} ms"
    return msgspec.structs.replace(finding, detail=detail)


def _throughput(values: Sequence[float], *, cell: Cell, floor: float, n: int, few: bool, evidence: Evidence) -> Finding:
    sessions = len(values)
    bounds = Interval(0.0, math.inf) if few else throughput_bounds(values)
    finding = Finding(
        check=cell.check("latency.throughput"),
        estimate=math.fsum(values) / sessions,
        interval=bounds,
        limit=Limit("at_least", floor),
        unit="1/s",
        n=n,
        evidence=evidence,
        hint=HINT,
    )
    detail = ""
    if finding.status is Status.INCONCLUSIVE:
        detail = (
            f"throughput needs more processes, has {sessions_text(sessions)}; raise max_time_s"
            if few
            else f"throughput varies too much between {sessions_text(sessions)}; more would decide"
        )
    return msgspec.structs.replace(finding, detail=detail)


def _ratio_detail(finding: Finding, estimate: RatioEstimate, what: str) -> str:
    if finding.status is Status.INCONCLUSIVE and estimate.sessions < LOOKS[0]:
        return f"{what}: {sessions_text(estimate.sessions)}, the rule takes at least {LOOKS[0]}; raise max_time_s"
    spread = f"they vary by {100 * math.expm1(estimate.sd):.2g} % from one to the next"
    if finding.status is Status.INCONCLUSIVE:
        return f"{what}: not decided after {sessions_text(estimate.sessions)}, {spread}"
    return f"{what}: decided after {sessions_text(estimate.sessions)}, {spread}"


def sessions_text(count: int) -> str:
    """Such as `5 sessions`."""
    return f"{count} session{'' if count == 1 else 's'}"


def _growth(ratio: float) -> float:
    return 100.0 * (ratio - 1.0)


def _rank_ms(values: npt.NDArray[np.int64], p: float) -> float:
    return nearest_rank(values, p) / 1e6


def _region(values: npt.NDArray[np.int64]) -> RegionSummary:
    return RegionSummary(
        mean_ms=int(values.sum()) / len(values) / 1e6,
        p50_ms=_rank_ms(values, 0.5),
        p95_ms=_rank_ms(values, 0.95),
        p99_ms=_rank_ms(values, 0.99),
    )


def clock_of(sessions: Sequence[SessionTimes]) -> str:
    """The clock that all sessions were timed by.

    Raises:
        MeasurementError: They were timed by different ones.
    """
    names: Mapping[str, None] = dict.fromkeys(each.clock for each in sessions)
    if len(names) != 1:
        raise MeasurementError(f"sessions were timed by {', '.join(names) or 'no clock'}; one clock times them all")
    return next(iter(names))
