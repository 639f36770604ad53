"""Regression: numbers held against numbers; RMSE, MAE and R2 over all elements of all samples.

R2 is `1 - sum (prediction - target)^2 / sum (target - mean target)^2` with one mean over all elements, as
`sklearn.metrics.r2_score` of the flattened arrays has it: where components of an output have means of their own, what lies
between these counts as explained. It is NaN where all targets are equal.

Each sample keeps its mean and the squares about it, so that an offset that all targets share cancels nothing.
Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.errors import DataError, MeasurementError
from gate.metrics.interface import MetricKind, MetricValue, Weights
from gate.metrics.kinds import (
    option_text,
    output_of,
    ratio,
    require_arrays,
    require_finite,
    require_next,
    require_options,
    require_weights,
)
from gate.targets import Categories
from gate.tensors import Array

NAME = "regression"
_OPTIONS = ("output",)
_FIELDS = ("absolute_errors", "squared_errors", "target_means", "target_squares")

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RegressionStatistics:
    """What one model scored.

    Args:
        elements: int64 [N], how many numbers each sample has.
        absolute_errors: float64 [N], their sum, in the target's unit.
        squared_errors: float64 [N], their sum.
        target_means: float64 [N].
        target_squares: float64 [N], the sum of squares of the targets about the sample's mean.
    """

    elements: npt.NDArray[np.int64]
    absolute_errors: _Floats
    squared_errors: _Floats
    target_means: _Floats
    target_squares: _Floats

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.elements)

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """As `SampleStatistics.values`."""
        counted = require_weights(weights, self.samples)
        total = int(counted @ self.elements)
        if not total:
            return {"rmse": math.nan, "mae": math.nan, "r2": math.nan}
        times = counted.astype(np.float64)
        squared = float(times @ self.squared_errors)
        weight = times * self.elements
        # Against the first mean rather than 0: equal targets leave exactly nothing, large ones do not cancel.
        shifted = self.target_means - self.target_means[0]
        about = shifted - float(weight @ shifted) / total
        spread = float(times @ self.target_squares) + float(weight @ (about * about))
        return {
            "rmse": math.sqrt(squared / total),
            "mae": float(times @ self.absolute_errors) / total,
            "r2": 1.0 - ratio(squared, spread),
        }

    def to_arrays(self) -> dict[str, Array]:
        """As `SampleStatistics.to_arrays`."""
        return {"elements": self.elements, **{name: getattr(self, name) for name in _FIELDS}}


class RegressionMetric:
    """Sums of errors, sample by sample; keeps 40 bytes of each.

    Args:
        output: Name of the output; None for the only one.
    """

    def __init__(self, *, output: str | None) -> None:
        self._output = output
        self._elements: list[int] = []
        self._rows: list[tuple[float, float, float, float]] = []

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:  # noqa: ARG002 - the protocol's
        """As `TaskMetric.add`.

        Args:
            predictions: The output is float [n, ...].
            reference: Not looked at.
            targets: Arrays of numbers, each of the output's shape without its first axis; one number fits [] and [1].
            first_sample: As there.
        """
        output = output_of(predictions, self._output, who="model")
        require_next(first_sample, len(self._rows), predictions=len(output), targets=targets)
        if output.dtype.kind != "f":
            raise MeasurementError(
                f"the output is {output.dtype} {list(output.shape)}; regression needs floats [n, ...]"
            )
        require_finite(output, who="model", first_sample=first_sample)
        for offset, (answer, given) in enumerate(zip(output, targets, strict=True)):
            sample = first_sample + offset
            target = _require_target(given, sample=sample)
            if answer.shape != target.shape and not answer.size == target.size == 1:
                raise MeasurementError(
                    f"the output of sample {sample} is {list(answer.shape)}, its target {list(target.shape)}",
                    hint="The data source must give each target in the shape of the output without its first axis.",
                )
            row = _row(answer.astype(np.float64).ravel(), target.ravel())
            if not all(math.isfinite(each) for each in row):
                raise MeasurementError(f"the squared errors of sample {sample} are above what float64 holds")
            self._elements.append(target.size)
            self._rows.append(row)

    def statistics(self) -> RegressionStatistics:
        """As `TaskMetric.statistics`."""
        if not self._rows:
            raise MeasurementError("no prediction was compared with a target: there are no samples")
        columns = np.asarray(self._rows, np.float64).T.copy()
        return RegressionStatistics(np.asarray(self._elements, np.int64), *columns)


def _require_target(given: Any, *, sample: int) -> _Floats:
    target: npt.NDArray[Any] = np.asarray(given)
    if target.dtype.kind not in "iuf" or target.size == 0:
        raise DataError(f"the target of sample {sample} is {target.dtype} {list(target.shape)}; expected numbers")
    if not np.isfinite(target).all():
        raise DataError(f"the target of sample {sample} holds a NaN or Inf")
    return target.astype(np.float64)


def _row(answer: _Floats, target: _Floats) -> tuple[float, float, float, float]:
    """Sums of absolute and of squared errors, the target's mean, and its squares about that."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = answer - target
        shifted = target - target[0]
        mean = float(shifted.mean())
        about = shifted - mean
        return float(np.abs(error).sum()), float(error @ error), float(target[0] + mean), float(about @ about)


def _made(options: Mapping[str, Any], categories: Categories | None) -> RegressionMetric:  # noqa: ARG001 - every kind's
    require_options(NAME, options, _OPTIONS)
    return RegressionMetric(output=option_text(options, "output"))


def _read(arrays: Mapping[str, Array]) -> RegressionStatistics:
    expected = {"elements": (np.int64, 1), **dict.fromkeys(_FIELDS, (np.float64, 1))}
    found = require_arrays(arrays, expected, kind=NAME)
    elements = found.pop("elements").astype(np.int64)
    floats = {name: each.astype(np.float64) for name, each in found.items()}
    if (
        not len(elements)
        or elements.min() < 1
        or any(len(each) != len(elements) or not np.isfinite(each).all() for each in floats.values())
        or any(each.min() < 0.0 for name, each in floats.items() if name != "target_means")
    ):
        raise MeasurementError(f"statistics of {NAME} contradict each other: they are not of the same samples")
    return RegressionStatistics(elements, **floats)


KIND = MetricKind(
    name=NAME,
    values={
        "rmse": MetricValue(higher_is_better=False, what="Root of the mean squared error, in the target's unit."),
        "mae": MetricValue(higher_is_better=False, what="Mean absolute error, in the target's unit."),
        "r2": MetricValue(what="The part of the targets' variance that the predictions explain."),
    },
    make=_made,
    read=_read,
    options=_OPTIONS,
)
"""`regression`."""
