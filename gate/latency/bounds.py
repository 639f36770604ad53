"""What sessions say of a percentile and of throughput, each with an interval that holds over all looks.

Judging and verifying a bundle use the same functions, on the same raw durations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gate.errors import MeasurementError
from gate.latency.config import SESSIONS
from gate.latency.ratio import ALPHA, LOOKS, estimate, nearest_rank, positive_durations
from gate.statistics import mean_interval, percentile_interval
from gate.verdict import Interval

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HELD_BY_SESSION = (0.5, 0.9, 0.95)
"""Percentiles that a session's few hundred inferences tell, so that sessions can be the sample.

Source: python -m benchmarks.latency_rule --budgets; docs/evidence/2026-11-21-latency-rule.md."""

LEAST_ABOVE = 10
"""Inferences above a percentile from which on a session tells it: 10 of 1,000 are above p99."""


def held_by_session(sessions: Sequence[Sequence[int]], p: float) -> bool:
    """Whether sessions are the sample for a percentile, too."""
    return p in HELD_BY_SESSION or (1.0 - p) * min(map(len, sessions)) >= LEAST_ABOVE


def equal_parts(sessions: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Pooled inferences, int64 [n], as many of each session as the others have.

    Sessions that had the same share of the time give fewer inferences where they were slower: all of them together
    would be made of the fast ones. The first 5 are cut to the least of them, and so are the later ones, which keep more.

    Raises:
        MeasurementError: There is no session, or one has no duration or one that is not a positive whole number.
    """
    import numpy as np

    if not sessions:
        raise MeasurementError("no session was measured, so there is no latency")
    values = [positive_durations(each) for each in sessions]
    parts = []
    for group in (values[:SESSIONS], values[SESSIONS:]):
        least = min(map(len, group), default=0)
        parts += [each[:least] for each in group]
    return np.concatenate(parts)


def percentile_bounds(sessions: Sequence[Sequence[int]], p: float) -> Interval:
    """Bounds of a percentile, in nanoseconds; a side that the sessions cannot bound is infinite.

    MLPerf LoadGen's binomial bound at 99 % over the inferences of all sessions, in equal parts. It takes them for
    independent, and inferences of one process are not. So where sessions have percentiles of their own, up to p95 and
    beyond where each has 10 inferences above it, the bounds of those, as of ratios in `gate.latency.ratio`, hold as well;
    of the two the wider one counts, on each side.

    Args:
        sessions: Nanoseconds by session. Fewer than 5 bound nothing.
        p: Such as 0.95.

    Raises:
        MeasurementError: As `equal_parts`.

    Source: `gate.statistics.percentile_interval`; python -m benchmarks.latency_rule --budgets.
    """
    import numpy as np

    pooled = np.sort(equal_parts(sessions))
    if len(sessions) < SESSIONS:
        return Interval(-math.inf, math.inf)
    bounds = percentile_interval(pooled, p)
    if not held_by_session(sessions, p):
        return bounds
    own = estimate([math.log(nearest_rank(each, p)) for each in sessions]).interval
    return Interval(min(bounds.lower, own.lower), max(bounds.upper, own.upper))


def throughput_of(durations_ns: Sequence[int], *, batch: int, span_ns: int | None = None) -> float:
    """Samples per second of one session.

    Args:
        durations_ns: Of its inferences.
        batch: Samples of each.
        span_ns: How long all streams together took; None with one stream: the sum of the durations.

    Raises:
        MeasurementError: There is none, or they took no time.
    """
    values = positive_durations(durations_ns)
    whole = int(values.sum()) if span_ns is None else span_ns
    if whole <= 0:
        raise MeasurementError(f"a session of {len(values)} inferences took {whole} ns in all")
    return batch * len(values) * 1e9 / whole


def throughput_bounds(values: Sequence[float]) -> Interval:
    """Student's t over the sessions, 1 % on each side over all looks; fewer than 5 bound nothing.

    Raises:
        MeasurementError: There is none, or one is not finite.
    """
    bounds = mean_interval(values, ALPHA / len(LOOKS))
    if len(values) < SESSIONS:
        return Interval(0.0, math.inf)
    return Interval(max(0.0, bounds.lower), bounds.upper)
