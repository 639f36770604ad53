"""What an engine takes while it runs without a pause: power, energy, utilisation. Sessions are the sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from gate.errors import MeasurementError
from gate.latency.config import UsageSpec
from gate.latency.measurement import Usage
from gate.results import UsageMetrics
from gate.statistics import mean_interval
from gate.verdict import Evidence, Finding, Interval, Limit, Status

_HINT = "docs/findings.md#usage"
_LIMITS = {
    "power_w": ("power_w", "at_most", "W"),
    "energy_mj": ("energy_mj", "at_most", "mJ"),
    "gpu_percent_at_least": ("gpu_percent", "at_least", "%"),
    "cpu_percent_at_most": ("cpu_percent", "at_most", "%"),
}


def usage_checks(spec: UsageSpec | None) -> tuple[str, ...]:
    """Names of the checks that a table asks for."""
    return () if spec is None else tuple(f"usage.{key}" for key in _LIMITS if getattr(spec, key) is not None)


def usage_metrics(sessions: Sequence[Usage], *, batch: int) -> UsageMetrics:
    """The means over sessions; None where one of them does not know.

    Raises:
        MeasurementError: There are none, or one ran no inference.
    """
    values = _values(sessions)
    means = {name: None if any(v is None for v in each) else _mean(each) for name, each in values.items()}
    return UsageMetrics(batch=batch, sessions=len(sessions), **means)


def usage_findings(sessions: Sequence[Usage], spec: UsageSpec, *, evidence: Evidence) -> tuple[Finding, ...]:
    """One finding for each budget: a Student's t interval over sessions, 99 % on each side.

    What the system does not say is NaN, which fails.

    Raises:
        MeasurementError: As `usage_metrics`.
    """
    values = _values(sessions)
    found = []
    for key, (name, kind, unit) in _LIMITS.items():
        limit = getattr(spec, key)
        if limit is None:
            continue
        known = [math.nan if value is None else value for value in values[name]]
        mean = _mean(known)
        interval = Interval(math.nan, math.nan) if math.isnan(mean) else mean_interval(known)
        finding = Finding(
            check=f"usage.{key}",
            estimate=mean,
            interval=interval,
            limit=Limit("at_most" if kind == "at_most" else "at_least", limit),
            unit=unit,
            n=sum(each.inferences for each in sessions),
            evidence=evidence,
            hint=_HINT,
        )
        detail = ""
        if math.isnan(mean):
            detail = "the system does not say what it is"
        elif finding.status is Status.INCONCLUSIVE:
            detail = f"it varies too much between {len(known)} sessions"
        found.append(msgspec.structs.replace(finding, detail=detail))
    return tuple(found)


def _values(sessions: Sequence[Usage]) -> dict[str, list[float | None]]:
    if not sessions:
        raise MeasurementError("no session was measured, so there is no usage")
    for index, each in enumerate(sessions):
        if each.inferences < 1 or not each.seconds > 0.0:
            raise MeasurementError(f"session {index} ran {each.inferences} inferences in {each.seconds:g} s")
    return {
        "energy_mj": [None if each.energy_mj is None else each.energy_mj / each.inferences for each in sessions],
        "power_w": [each.power_w for each in sessions],
        "gpu_percent": [each.gpu_percent for each in sessions],
        "cpu_percent": [each.cpu_percent for each in sessions],
    }


def _mean(values: Sequence[float | None]) -> float:
    return math.fsum(math.nan if value is None else value for value in values) / len(values)
