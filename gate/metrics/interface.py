"""What a task's metric is: it takes answers batch by batch, and keeps what any resample of the samples can be scored from.

A metric of one's own takes part in verdict, baseline, report and seal by an entry point of the group `trt_gate.metrics`
that names a `MetricKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gate.targets import Categories
from gate.tensors import Array

Weights = npt.NDArray[np.int64]


class SampleStatistics(Protocol):
    """What one model scored, sample by sample."""

    @property
    def samples(self) -> int:
        """How many samples there are."""
        ...

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """Every value of the metric by name, NaN where it is not defined.

        Args:
            weights: int64 [samples], how often each sample counts; left out: once.
        """
        ...

    def to_arrays(self) -> dict[str, Array]:
        """All of it as arrays by name, in the order of the samples: what a baseline stores."""
        ...


class TaskMetric(Protocol):
    """Takes one model's answers, batch by batch, in the samples' order; memory grows with what is kept per sample alone."""

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:
        """Take the next batch of n samples.

        Args:
            predictions: The model's outputs by name, arrays [n, ...]; of a kind that takes detections, n `Detections`.
            reference: The reference's, in the same form; the same object where the reference itself is scored.
            targets: The ground truth of each of the n samples.
            first_sample: Index of the first in the data set; batches come in order, and none is left out.

        Raises:
            DataError: A target is missing, malformed or contradicts the others.
            MeasurementError: Predictions are missing, malformed, not finite, or of another number than targets.
        """
        ...

    def statistics(self) -> SampleStatistics:
        """Of what was added.

        Raises:
            MeasurementError: Nothing was, or there is nothing to score: no ground truth at all, say.
        """
        ...


@dataclass(frozen=True)
class MetricValue:
    """One number of a metric.

    Args:
        higher_is_better: Whether more is better.
        unit: Such as `px`; empty for fractions.
        what: In one sentence, for reports.
    """

    higher_is_better: bool = True
    unit: str = ""
    what: str = ""


@dataclass(frozen=True)
class MetricKind:
    """A task and its metric.

    Args:
        name: As `[task] kind` has it.
        values: What it measures, by name; the first is the one that a gate without limits looks at.
        make: Makes an empty metric from the options of `[task]` and the categories of the data source (None where it has
            none). Raises `SpecError` for an option it does not have.
        read: The inverse of `SampleStatistics.to_arrays`. Raises `MeasurementError` where arrays contradict each other.
        predictions: What `add` takes: outputs by name, or detections.
        options: Names of the options that `make` knows.
        default_drop: By precision the allowed drop of the first value against the reference; left out where the metric
            has no default and a limit must be given.
        named: More values than `values` names: by a prefix such as `ap_of.`, one for each category.
    """

    name: str
    values: Mapping[str, MetricValue]
    make: Callable[[Mapping[str, Any], Categories | None], TaskMetric]
    read: Callable[[Mapping[str, Array]], SampleStatistics]
    predictions: Literal["outputs", "detections", "tracks"] = "outputs"
    options: tuple[str, ...] = ()
    default_drop: Mapping[str, float] = field(default_factory=dict)
    named: tuple[str, ...] = ()
