"""Paired resampling of the samples: how far a metric, and its difference between two models, can be trusted.

Each model is scored once, sample by sample; a resample weighs the samples anew and scores both models by the same weights.
Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.metrics.interface import SampleStatistics, Weights
from gate.verdict import Interval

Floats = npt.NDArray[np.float64]

Row = list[list[float]]
Over = Callable[[Callable[[int], Row], Sequence[int]], list[Row]]

TAIL = 0.05
"""One-sided: 5 % of the resamples lie outside on each side."""


@runtime_checkable
class SelectiveStatistics(Protocol):
    """Statistics that score some values faster than all."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every value it has."""
        ...

    def values(self, weights: Weights | None = None, names: Sequence[str] | None = None) -> dict[str, float]:
        """The values that are asked for."""
        ...


@dataclass(frozen=True)
class Resampled:
    """Values of two models over the same resamples.

    Args:
        candidate, reference: By value name, float64 [resamples].
        samples: How many samples were drawn from.
    """

    candidate: Mapping[str, Floats]
    reference: Mapping[str, Floats]
    samples: int

    def interval(self, name: str) -> Interval:
        """Of the candidate's value."""
        return self._interval(self.candidate[name])

    def difference(self, name: str) -> Interval:
        """Of candidate minus reference."""
        return self._interval(self.candidate[name] - self.reference[name])

    def ratio(self, name: str) -> Interval:
        """Of candidate over reference."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._interval(self.candidate[name] / self.reference[name])

    def _interval(self, values: Floats) -> Interval:
        """The percentile interval; unbounded where a single sample leaves nothing to draw.

        A resample in which the value is not defined counts as the worst on either side.
        """
        if self.samples < 2:
            return Interval(-np.inf, np.inf)
        undefined = np.isnan(values)
        lower = np.quantile(np.where(undefined, -np.inf, values), TAIL, method="lower")
        upper = np.quantile(np.where(undefined, np.inf, values), 1.0 - TAIL, method="higher")
        return Interval(float(lower), float(upper))


def in_turn(score: Callable[[int], Row], indices: Sequence[int]) -> list[Row]:
    """One after another, here."""
    return [score(index) for index in indices]


def seed_from(*digests: str) -> int:
    """A seed that depends on what was measured, so that the same run draws the same resamples, and nobody chooses them."""
    return int.from_bytes(hashlib.sha256("\n".join(digests).encode()).digest()[:8], "big")


def resampled(
    candidate: SampleStatistics,
    reference: SampleStatistics,
    names: Sequence[str],
    *,
    seed: int,
    resamples: int,
    over: Over = in_turn,
) -> Resampled:
    """Both models scored on the same resamples.

    Args:
        candidate, reference: Of the same samples in the same order.
        names: Values to score.
        seed: As `seed_from` gives it.
        resamples: How many.
        over: Calls a function with each of some numbers and gives the results in their order: elsewhere, perhaps.

    Raises:
        MeasurementError: They are of another number of samples, or there are none.
    """
    n = candidate.samples
    if n != reference.samples:
        raise MeasurementError(f"the engine was scored on {n} samples, what it is held against on {reference.samples}")
    if n == 0:
        raise MeasurementError("no sample was scored")
    if not names:
        raise MeasurementError("no value was asked for")
    scorer = _Scorer(candidate, reference, tuple(names), n, seed)
    scores = np.array(over(scorer, range(resamples if n > 1 else 1)), dtype=np.float64)
    return Resampled(
        candidate={name: scores[:, 0, index] for index, name in enumerate(names)},
        reference={name: scores[:, 1, index] for index, name in enumerate(names)},
        samples=n,
    )


@dataclass(frozen=True)
class _Scorer:
    """Scores both models on the resample of a number; each draw depends on the seed and its number alone."""

    candidate: SampleStatistics
    reference: SampleStatistics
    names: tuple[str, ...]
    samples: int
    seed: int

    def __call__(self, index: int) -> Row:
        chances = np.full(self.samples, 1.0 / self.samples)
        weights = np.random.default_rng([self.seed, index]).multinomial(self.samples, chances).astype(np.int64)
        found = [values_of(each, self.names, weights) for each in (self.candidate, self.reference)]
        return [[values[name] for name in self.names] for values in found]


def values_of(
    statistics: SampleStatistics, names: Sequence[str], weights: Weights | None = None
) -> Mapping[str, float]:
    """The values that are asked for.

    Raises:
        MeasurementError: It has no value of that name.
    """
    if isinstance(statistics, SelectiveStatistics):
        return statistics.values(weights, tuple(names))
    found = statistics.values(weights)
    if missing := [name for name in names if name not in found]:
        raise MeasurementError(f"nothing was measured as {missing[0]!r}; there is {', '.join(found)}")
    return found
