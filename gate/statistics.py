"""Intervals behind a verdict, exact sums, and ranks: pure functions of numbers.

Every interval here has one-sided sides: each bound alone holds with probability `1 - alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from gate.errors import MeasurementError
from gate.verdict import Interval

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Floats = npt.NDArray[np.float64]

Z_95 = 1.645
"""One-sided 95 % quantile of the normal distribution, as rounded in the Agresti-Min bound of docs/findings.md."""


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial with n trials of probability p.

    The terms of the tail that ends at k and goes away from the mean are summed, each from its neighbour by their
    ratio, so that nothing cancels.

    Raises:
        MeasurementError: n is negative, or p is not a probability.

    Source: C. Loader, Fast and accurate computation of binomial probabilities, 2000, for the first term.
    """
    if n < 0 or not 0.0 <= p <= 1.0:
        raise MeasurementError(f"not a binomial distribution: n = {n}, p = {p}")
    if k < 0:
        return 0.0
    if k >= n:
        return 1.0
    if p in (0.0, 1.0):
        return 1.0 - p
    if k <= n * p:
        return min(1.0, _lower_tail(k, n, p))
    return max(0.0, 1.0 - _lower_tail(n - k - 1, n, 1.0 - p))


def _binomial_sf(k: int, n: int, p: float) -> float:
    """P(X > k), accurate where it is small."""
    return binomial_cdf(n - k - 1, n, 1.0 - p)


def _lower_tail(k: int, n: int, p: float) -> float:
    """P(X <= k), summed downward from k."""
    import numpy as np

    odds = (1.0 - p) / p
    total, last, top = 1.0, 1.0, k
    while top > 0:
        i = np.arange(top, max(top - 512, 0), -1, dtype=np.float64)
        terms = last * np.cumprod(i / (n - i + 1.0) * odds)
        total += float(terms.sum())
        last = float(terms[-1])
        top -= len(i)
        if last < total * 1e-18:
            break
    return _binomial_pmf(k, n, p) * total


def _binomial_pmf(k: int, n: int, p: float) -> float:
    if k == 0:
        return math.exp(n * math.log1p(-p))
    if k == n:
        return math.exp(n * math.log(p))
    exponent = (
        _stirling_error(n)
        - _stirling_error(k)
        - _stirling_error(n - k)
        - _deviance(k, n * p)
        - _deviance(n - k, n * (1.0 - p))
    )
    return math.exp(exponent) * math.sqrt(n / (2.0 * math.pi * k * (n - k)))


def _stirling_error(n: int) -> float:
    """log(n!) less Stirling's formula."""
    if n < 16:
        return math.lgamma(n + 1.0) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2.0 * math.pi)
    square = float(n) * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / square) / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    """`x log(x / mean) + mean - x`, without cancellation where x is near the mean."""
    if abs(x - mean) >= 0.1 * (x + mean):
        return x * math.log(x / mean) + mean - x
    v = (x - mean) / (x + mean)
    total, term, j = (x - mean) * v, 2.0 * x * v, 1
    while True:
        term *= v * v
        following = total + term / (2 * j + 1)
        if following == total:
            return total
        total, j = following, j + 1


def clopper_pearson(k: int, n: int, *, alpha: float = 0.05) -> Interval:
    """Exact interval of a proportion with k successes in n trials; each side is one-sided at `alpha`.

    Raises:
        MeasurementError: There are no trials, or k is not among 0 to n.

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    _require_count(k, n)
    return _clopper_pearson(k, n, alpha)


@lru_cache(maxsize=1024)
def _clopper_pearson(k: int, n: int, alpha: float) -> Interval:
    lower = 0.0 if k == 0 else 1.0 - _largest_p(n - k, n, alpha)
    upper = 1.0 if k == n else _largest_p(k, n, alpha)
    return Interval(lower, upper)


def _largest_p(k: int, n: int, alpha: float) -> float:
    """The p at which k or fewer of n has probability `alpha`: above it, so few would be unlikely."""
    if k == 0:
        return -math.expm1(math.log(alpha) / n)
    low, high = k / n, 1.0
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return high
        if binomial_cdf(k, n, middle) > alpha:
            low = middle
        else:
            high = middle


def _require_count(k: int, n: int) -> None:
    if n <= 0:
        raise MeasurementError("there are no samples, so there is no proportion")
    if not 0 <= k <= n:
        raise MeasurementError(f"{k} of {n} is not a count of successes")


def least_samples_for_proportion(disagreements: int, floor: float, *, alpha: float = 0.05) -> int | None:
    """The least n for which n - `disagreements` of n has a Clopper-Pearson lower bound of at least `floor`.

    None where no number of samples has: a floor of 1.
    """
    if floor >= 1.0:
        return None
    if floor <= 0.0:
        return max(1, disagreements)
    low, high = disagreements, max(1, disagreements)
    while clopper_pearson(high - disagreements, high, alpha=alpha).lower < floor:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if clopper_pearson(middle - disagreements, middle, alpha=alpha).lower >= floor:
            high = middle
        else:
            low = middle
    return high


def agresti_min_difference(b: int, c: int, n: int, z: float = Z_95) -> Interval:
    """Interval of the change of accuracy, candidate less reference, as a fraction, from paired answers.

    Args:
        b: Samples that the reference has right and the candidate wrong.
        c: Samples that the candidate has right and the reference wrong.
        n: All samples.
        z: Normal quantile of each side.

    Raises:
        MeasurementError: There are no samples, or b and c are more than n.

    Source: Agresti and Min, Statistics in Medicine 24, 2005: half a count added to each discordant cell.
    """
    if n <= 0:
        raise MeasurementError("there are no samples, so there is no accuracy to compare")
    if b < 0 or c < 0 or b + c > n:
        raise MeasurementError(f"{b} newly wrong and {c} newly right do not fit {n} samples")
    total = n + 2.0
    change = (c - b) / total
    half = z * math.sqrt(max(0.0, (b + c + 1.0) - (c - b) ** 2 / total)) / total
    return Interval(change - half, change + half)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p of McNemar's exact test: evidence of a change, never of its absence.

    Raises:
        MeasurementError: A count is negative.
    """
    if b < 0 or c < 0:
        raise MeasurementError(f"counts are negative: {b}, {c}")
    return min(1.0, 2.0 * binomial_cdf(min(b, c), b + c, 0.5))


def samples_to_resolve(delta: float, z: float = Z_95) -> int:
    """The least number of samples with which not one changed answer shows a drop of at most `delta`, a fraction.

    Raises:
        MeasurementError: `delta` is not above 0: no number of samples shows that.
    """
    if not delta > 0.0:
        raise MeasurementError(f"no number of samples shows that accuracy drops by at most {delta:g}")
    n = max(1, math.ceil(z / delta - 2.0))
    while agresti_min_difference(0, 0, n, z).lower < -delta:
        n += 1
    while n > 1 and agresti_min_difference(0, 0, n - 1, z).lower >= -delta:
        n -= 1
    return n


def percentile_interval(
    sorted_values: Sequence[float] | npt.NDArray[np.generic], p: float, alpha: float = 0.01
) -> Interval:
    """Interval of a percentile as order statistics, so that comparing it with a budget is MLPerf LoadGen's rule.

    With t of n values over a budget, `upper <= budget` exactly where `BinomCDF(t; n, 1-p) <= alpha` (pass), and
    `lower > budget` exactly where `1 - BinomCDF(t-1; n, 1-p) <= alpha` (fail). A side that so few values cannot
    bound is infinite.

    Args:
        sorted_values: Ascending.
        p: Such as 0.99.
        alpha: Of each side.

    Raises:
        MeasurementError: There are no values, or p is not between 0 and 1.

    Source: MLPerf LoadGen, loadgen/early_stopping.cc.
    """
    n = len(sorted_values)
    if n == 0:
        raise MeasurementError("there are no values, so there is no percentile")
    if not 0.0 < p < 1.0:
        raise MeasurementError(f"a percentile is between 0 and 1, got {p}")
    over = _over_budget(n, p, alpha)
    upper = math.inf if over.most_to_pass is None else float(sorted_values[n - 1 - over.most_to_pass])
    lower = -math.inf if over.least_to_fail is None else float(sorted_values[n - over.least_to_fail])
    return Interval(lower, upper)


class _OverBudget:
    """How many of n values may be over a budget for a pass, and how many must be for a fail; None: no number."""

    def __init__(self, most_to_pass: int | None, least_to_fail: int | None) -> None:
        self.most_to_pass = most_to_pass
        self.least_to_fail = least_to_fail


@lru_cache(maxsize=256)
def _over_budget(n: int, p: float, alpha: float) -> _OverBudget:
    # Both conditions are monotonic in t: bisect. `passing` holds below the answer, `failing` from it on.
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(middle, n, 1.0 - p) <= alpha:
            low = middle
        else:
            high = middle
    most_to_pass = None if low < 0 else low
    low, high = 0, n + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _binomial_sf(middle - 1, n, 1.0 - p) <= alpha:
            high = middle
        else:
            low = middle
    return _OverBudget(most_to_pass, None if high > n else high)


def least_samples(p: float, alpha: float = 0.01) -> int:
    """The least n for which a percentile can pass: with no value over the budget. 44, 90, 459 for p90, p95, p99.

    Raises:
        MeasurementError: p is not between 0 and 1.
    """
    if not 0.0 < p < 1.0:
        raise MeasurementError(f"a percentile is between 0 and 1, got {p}")
    n = max(1, math.floor(math.log(alpha) / math.log(p)) - 1)
    while binomial_cdf(0, n, 1.0 - p) > alpha:
        n += 1
    return n


def student_t_quantile(p: float, degrees: int) -> float:
    """The t with P(T <= t) = p for Student's T.

    Args:
        p: Between 0.5 and 1.
        degrees: Degrees of freedom, at least 1.

    Raises:
        MeasurementError: p or the degrees are outside.

    Source: P(T > t) = I_x(v/2, 1/2) / 2 with x = v / (v + t^2); Abramowitz and Stegun, 26.7.1.
    """
    if not 0.5 <= p < 1.0 or degrees < 1:
        raise MeasurementError(f"no quantile of Student's t: p = {p}, {degrees} degrees of freedom")
    low, high = 0.0, 1.0
    while _t_tail(high, degrees) > 1.0 - p:
        high *= 2.0
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        if _t_tail(middle, degrees) > 1.0 - p:
            low = middle
        else:
            high = middle


def mean_interval(values: Sequence[float], alpha: float = 0.01) -> Interval:
    """Student's t interval of a mean; both sides are open where there are fewer than two values.

    Raises:
        MeasurementError: There is no value, or one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise MeasurementError(f"an interval needs numbers, got {', '.join(map(str, values)) or 'none'}")
    if len(values) < 2:
        return Interval(-math.inf, math.inf)
    mean = math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = student_t_quantile(1.0 - alpha, len(values) - 1) * sd / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def _t_tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0."""
    square = t * t
    return 0.5 * _incomplete_beta(degrees / (degrees + square), square / (degrees + square), degrees / 2.0, 0.5)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b) with rest = 1 - x, by Lentz's continued fraction. Source: Numerical Recipes, 6.4."""
    if x == 0.0 or rest == 0.0:
        return 0.0 if x == 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(rest, x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    total, step = d, math.inf
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d = 1.0 / (1.0 + numerator * d)
            c = 1.0 + numerator / c
            step = c * d
            total *= step
        if abs(step - 1.0) < 1e-15:
            break
    return front * total / a


class ExactSum:
    """A sum of float64 numbers without rounding: any order and any grouping gives the same bits.

    Every finite float64 is an integer times 2**-1127, so the sum is kept as one Python integer.
    """

    __slots__ = ("_finite", "_units")

    _SCALE = 1127

    def __init__(self) -> None:
        self._units = 0
        self._finite = True

    def add(self, values: _Floats) -> None:
        """Add all of `values`, float64 [n]. One that is not finite makes the sum infinite for good."""
        for start in range(0, len(values), 1 << 24):
            self._add(values[start : start + (1 << 24)])

    def _add(self, values: _Floats) -> None:
        import numpy as np

        if not np.isfinite(values).all():
            self._finite = False
            return
        mantissas, exponents = np.frexp(values[values != 0.0])
        if mantissas.size == 0:
            return
        integers = (mantissas * 2.0**53).astype(np.int64)
        lowest = int(exponents.min())
        bins = (exponents - lowest).astype(np.intp)
        # In float64 weights every partial sum is an integer below 2**53, so nothing is rounded.
        high = np.bincount(bins, weights=(integers >> 27).astype(np.float64))
        low = np.bincount(bins, weights=(integers & ((1 << 27) - 1)).astype(np.float64))
        for each in np.flatnonzero((high != 0.0) | (low != 0.0)):
            units = (int(high[each]) << 27) + int(low[each])
            self._units += units << (lowest + int(each) - 53 + self._SCALE)

    def merge(self, other: ExactSum) -> None:
        """Add what another sum holds."""
        self._units += other._units
        self._finite = self._finite and other._finite

    @property
    def value(self) -> float:
        """The sum, rounded once; infinite where a term was not finite or the sum is above float64's range."""
        return self.over(1)

    def over(self, count: int) -> float:
        """The sum divided by `count`, rounded once."""
        if not self._finite:
            return math.inf
        try:
            return self._units / (count << self._SCALE)
        except OverflowError:
            return math.inf if self._units > 0 else -math.inf


def is_among_best(scores: npt.NDArray[np.floating], chosen: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.bool_]:
    """Whether the chosen class is among the k best of each row; of equal scores the one with the lower index is better.

    That is the order of `numpy.argmax`, for k = 1 too.

    Args:
        scores: float [N, classes], no NaN.
        chosen: int64 [N], classes.
        k: How many count as best.

    Returns:
        bool [N].
    """
    import numpy as np

    own = np.take_along_axis(scores, chosen[:, None], axis=1)
    not_worse = np.count_nonzero(scores >= own, axis=1)
    among: npt.NDArray[np.bool_] = not_worse <= k
    if tied := np.flatnonzero(~among).tolist():
        rows, own_rows = scores[tied], own[tied]
        better = np.count_nonzero(rows > own_rows, axis=1)
        before = np.arange(scores.shape[1])[None, :] < chosen[tied][:, None]
        earlier = np.count_nonzero((rows == own_rows) & before, axis=1)
        among[tied] = better + earlier < k
    return among
