"""The sequential rule that says whether one engine is slower than another: sessions are the sample.

In a session both engines take turns in one fresh process. Each session gives one number per percentile, the logarithm
of A's percentile over B's; these are independent between processes as single inferences are not. The rule looks at 5,
8, 12 and 20 of them and stops at the first look that decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec

from gate.errors import MeasurementError
from gate.statistics import student_t_quantile
from gate.verdict import Interval

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LOOKS = (5, 8, 12, 20)
"""Numbers of sessions after which the rule looks."""

ALPHA = 0.01
"""Most probability of a wrong pass, and of a wrong fail, over all looks together."""

RATIO_PERCENTILES = {"p50": 0.5, "p95": 0.95}

LEAST_KEPT = 200
"""Inferences of each engine that a session keeps at the least."""

MOST_NS = 10**13
"""Almost 3 hours: no inference takes as long, and the sum of very many still fits into 64 bits."""

_KEPT_P95 = ((10.0, LEAST_KEPT), (5.0, 400), (3.0, 800), (0.0, 1600))
"""From which tolerance in percent on how many are enough for p95."""


class RatioEstimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A's percentile over B's, estimated from sessions.

    Args:
        ratio: The estimate: exp of the mean of the logarithms.
        interval: Of the ratio; each side holds with probability 1 - ALPHA over all looks.
        sessions: How many it rests on.
        sd: Standard deviation of the logarithms between sessions.
    """

    ratio: float
    interval: Interval
    sessions: int
    sd: float


def log_ratio(
    a_ns: Sequence[int] | npt.NDArray[np.integer], b_ns: Sequence[int] | npt.NDArray[np.integer], p: float
) -> float:
    """Log of A's percentile over B's in one session: above 0 where A is slower. Percentiles are nearest-rank.

    Raises:
        MeasurementError: One of them has no duration, or one that is not a positive whole number.
    """
    return math.log(nearest_rank(a_ns, p)) - math.log(nearest_rank(b_ns, p))


def nearest_rank(durations_ns: Sequence[int] | npt.NDArray[np.integer], p: float) -> int:
    """`sorted[ceil(p n) - 1]`: a duration that was measured, never one between two.

    Raises:
        MeasurementError: There is none, or one is not a positive whole number of nanoseconds.
    """
    import numpy as np

    values = positive_durations(durations_ns)
    # The tolerance keeps ceil(0.95 * 20) at 19, whatever the last bit of 0.95 * 20.
    rank = max(math.ceil(p * len(values) - 1e-9), 1)
    return int(np.partition(values, rank - 1)[rank - 1])


def positive_durations(raw: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Positive whole nanoseconds.

    Raises:
        MeasurementError: There is none, or one is not; names the first.
    """
    return durations_from(raw, least=1)


def durations_from(raw: Sequence[int] | npt.NDArray[np.integer], *, least: int) -> npt.NDArray[np.int64]:
    """Whole nanoseconds from `least` on, which is 0 or 1.

    Raises:
        MeasurementError: There is none, or one is not; names the first.
    """
    import numpy as np

    values = np.asarray(raw)
    if values.ndim != 1 or values.size == 0:
        raise MeasurementError("no inference was timed, so there is no latency")
    if values.dtype.kind not in "iu":
        raise MeasurementError(f"durations are whole nanoseconds, got {values.dtype}")
    if wrong := np.flatnonzero((values < least) | (values > MOST_NS)).tolist():
        raise MeasurementError(
            f"inference {wrong[0]} took {values[wrong[0]]} ns; a duration is "
            f"{'above' if least else 'at least'} 0, and no more than {MOST_NS} ns",
            hint="The clock is too coarse or ran backwards: time on another machine or with larger batches.",
        )
    return values.astype(np.int64)


def estimate(log_ratios: Sequence[float]) -> RatioEstimate:
    """The ratio after so many sessions, with the half-width of the rule: t(1 - alpha/4, S - 1) sd / sqrt(S).

    Fewer than 5 sessions give no interval: both of its sides are open.

    Raises:
        MeasurementError: There are none, or one is not finite.
    """
    import numpy as np

    values = np.asarray(log_ratios, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise MeasurementError("no session was measured, so there is no ratio")
    if not bool(np.isfinite(values).all()):
        raise MeasurementError("a session's ratio is not a finite number")
    sessions = len(values)
    mean = float(values.mean())
    sd = float(values.std(ddof=1)) if sessions > 1 else 0.0
    if sessions < LOOKS[0]:
        return RatioEstimate(ratio=math.exp(mean), interval=Interval(0.0, math.inf), sessions=sessions, sd=sd)
    half = _quantile(sessions - 1) * sd / math.sqrt(sessions)
    interval = Interval(math.exp(mean - half), math.exp(mean + half))
    return RatioEstimate(ratio=math.exp(mean), interval=interval, sessions=sessions, sd=sd)


def next_look(sessions: int) -> int | None:
    """How many sessions the rule looks at next; None after the last look."""
    return next((look for look in LOOKS if look > sessions), None)


def kept_needed(limits: Mapping[str, float]) -> int:
    """How many inferences of each engine a session keeps so that the rule decides about these limits.

    200 are enough for p50, and for p95 of a machine on which few inferences are held up. Where about one in twenty is,
    p95 lies among those in one session and below them in the next; more inferences per session mend that, at least down
    to a tolerance of 3 %.

    Args:
        limits: Most growth in percent by percentile, `p50` and `p95`; may be empty.

    Raises:
        MeasurementError: The rule does not know the percentile, or a limit is not above 0 %.

    Source: python -m benchmarks.latency_rule --kept; docs/evidence/2026-11-21-latency-rule.md.
    """
    kept = LEAST_KEPT
    for name, percent in limits.items():
        if name not in RATIO_PERCENTILES:
            raise MeasurementError(f"engines are compared at {' and '.join(RATIO_PERCENTILES)}, got {name!r}")
        if not 0.0 < percent < math.inf:
            raise MeasurementError(f"a tolerance is above 0 %, got {percent:g} % for {name}")
        if name == "p95":
            kept = max(kept, next(number for least, number in _KEPT_P95 if percent >= least))
    return kept


@lru_cache(maxsize=64)
def _quantile(degrees: int) -> float:
    return student_t_quantile(1.0 - ALPHA / len(LOOKS), degrees)
