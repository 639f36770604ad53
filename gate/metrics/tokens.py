"""Token logits: perplexity against the tokens that follow, and how far the distribution is from the reference's.

The logits at position t are held against `target[t]`: the data source shifts the tokens, the metric does not. Positions with
the ignored label count nowhere. Logarithms are natural and taken in float64.

Top-1 accuracy takes of equal logits the token with the lower index, as `numpy.argmax` has it. Top-1 agreement asks no such
order: the two agree where a token that is best for the one, or shares being best, is so for the other.
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
    option_integer,
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

NAME = "tokens"
DEFAULT_IGNORE_LABEL = -100
"""Source: torch.nn.CrossEntropyLoss, `ignore_index`."""

_OPTIONS = ("output", "ignore_label")
_COUNTS = ("positions", "agreeing", "correct")
_SUMS = ("negative_log_likelihood", "divergence")
_BLOCK = 1 << 19
"""Logits taken at a time: 4 MiB of float64 for each array that the arithmetic needs."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What one model scored, each an array [N] over the sequences.

    Args:
        positions: int64, those that count.
        agreeing: int64, those where the best token is the reference's.
        correct: int64, those where the best token is the target.
        negative_log_likelihood: float64, of the targets, summed, in nats.
        divergence: float64, Kullback-Leibler of the reference's distribution from the model's, summed, in nats.
    """

    positions: _Ints
    agreeing: _Ints
    correct: _Ints
    negative_log_likelihood: _Floats
    divergence: _Floats

    @property
    def samples(self) -> int:
        """How many sequences there are."""
        return len(self.positions)

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """As `SampleStatistics.values`."""
        counted = require_weights(weights, self.samples)
        times = counted.astype(np.float64)
        total = int(counted @ self.positions)
        return {
            "perplexity": _exp(ratio(float(times @ self.negative_log_likelihood), total)),
            "kl_divergence": ratio(float(times @ self.divergence), total),
            "top1_agreement": ratio(int(counted @ self.agreeing), total),
            "top1_accuracy": ratio(int(counted @ self.correct), total),
        }

    def to_arrays(self) -> dict[str, Array]:
        """As `SampleStatistics.to_arrays`."""
        return {name: getattr(self, name) for name in (*_COUNTS, *_SUMS)}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class TokenMetric:
    """Sums over positions, sequence by sequence; keeps 40 bytes of each.

    Args:
        output: Name of the output; None for the only one.
        ignore_label: Of positions that count nowhere.
    """

    def __init__(self, *, output: str | None, ignore_label: int) -> None:
        self._output = output
        self._ignore_label = ignore_label
        self._counts: list[tuple[int, int, int]] = []
        self._sums: list[tuple[float, float]] = []

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:
        """As `TaskMetric.add`.

        Args:
            predictions: The output is logits, float [n, T, V].
            reference: The reference's, of the same shape.
            targets: Tokens, int [T].
            first_sample: As there.
        """
        ours = output_of(predictions, self._output, who="model")
        require_next(first_sample, len(self._counts), predictions=len(ours), targets=targets)
        theirs = ours if predictions is reference else output_of(reference, self._output, who="reference")
        for who, each in (("model", ours), ("reference", theirs)):
            if each.dtype.kind != "f" or each.ndim != 3 or each.shape[2] < 2:
                raise MeasurementError(
                    f"the {who}'s output is {each.dtype} {list(each.shape)}; token logits are floats "
                    "[n, positions, vocabulary]"
                )
        if ours.shape != theirs.shape:
            raise MeasurementError(f"the model's logits are {list(ours.shape)}, the reference's {list(theirs.shape)}")
        for offset, target in enumerate(targets):
            sample = first_sample + offset
            tokens = self._require_tokens(target, positions=ours.shape[1], vocabulary=ours.shape[2], sample=sample)
            require_finite(ours[offset : offset + 1], who="model", first_sample=sample)
            if theirs is not ours:
                require_finite(theirs[offset : offset + 1], who="reference", first_sample=sample)
            counts, sums = self._scored(ours[offset], theirs[offset], tokens)
            if not all(math.isfinite(each) for each in sums):
                raise MeasurementError(f"the logits of sample {sample} lie further apart than float64 holds")
            self._counts.append(counts)
            self._sums.append(sums)

    def statistics(self) -> TokenStatistics:
        """As `TaskMetric.statistics`."""
        if not any(counts[0] for counts in self._counts):
            raise MeasurementError("no position was compared with a token: there are no samples, or all are ignored")
        counts = np.asarray(self._counts, np.int64).T.copy()
        sums = np.asarray(self._sums, np.float64).T.copy()
        return TokenStatistics(counts[0], counts[1], counts[2], sums[0], sums[1])

    def _require_tokens(self, target: Any, *, positions: int, vocabulary: int, sample: int) -> _Ints:
        given: npt.NDArray[Any] = np.asarray(target)
        if given.dtype.kind not in "iu" or given.ndim != 1 or given.size == 0:
            raise DataError(
                f"the target of sample {sample} is {given.dtype} {list(given.shape)}; expected tokens, int [T]"
            )
        if len(given) != positions:
            raise MeasurementError(f"the output of sample {sample} has {positions} positions, its target {len(given)}")
        tokens = given.astype(np.int64)
        wrong = np.flatnonzero(((tokens < 0) | (tokens >= vocabulary)) & (tokens != self._ignore_label))
        if wrong.size:
            raise DataError(
                f"the target of sample {sample} has token {int(tokens[wrong[0]])} at position {int(wrong[0])}; "
                f"the vocabulary is 0 to {vocabulary - 1}, and {self._ignore_label} marks what does not count",
                hint="Say which label marks padding: [task.options] ignore_label = ...",
            )
        return tokens

    def _scored(self, ours: Array, theirs: Array, tokens: _Ints) -> tuple[tuple[int, int, int], tuple[float, float]]:
        counted = np.flatnonzero(tokens != self._ignore_label)
        agreeing = correct = 0
        likelihood: list[float] = []
        divergence: list[float] = []
        step = max(1, _BLOCK // ours.shape[1])
        for start in range(0, len(counted), step):
            at = counted[start : start + step]
            wanted = tokens[at]
            mine: _Floats = ours[at].astype(np.float64)
            base: _Floats = theirs[at].astype(np.float64)
            correct += int(np.count_nonzero(mine.argmax(axis=1) == wanted))
            best = (mine == mine.max(axis=1, keepdims=True)) & (base == base.max(axis=1, keepdims=True))
            agreeing += int(np.count_nonzero(best.any(axis=1)))
            with np.errstate(over="ignore", invalid="ignore"):
                log_mine, log_base = _log_softmax(mine), _log_softmax(base)
                likelihood.append(-float(log_mine[np.arange(len(at)), wanted].sum()))
                apart = (np.exp(log_base) * (log_base - log_mine)).sum(axis=1)
                # It is never negative but by rounding.
                divergence.append(float(np.maximum(apart, 0.0).sum()))
        return (len(counted), agreeing, correct), (sum(likelihood), sum(divergence))


def _log_softmax(logits: _Floats) -> _Floats:
    """Of each row of float64 [n, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: _Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _made(options: Mapping[str, Any], categories: Categories | None) -> TokenMetric:  # noqa: ARG001 - every kind's
    require_options(NAME, options, _OPTIONS)
    ignored = option_integer(options, "ignore_label")
    return TokenMetric(
        output=option_text(options, "output"), ignore_label=DEFAULT_IGNORE_LABEL if ignored is None else ignored
    )


def _read(arrays: Mapping[str, Array]) -> TokenStatistics:
    expected: dict[str, tuple[npt.DTypeLike, int]] = dict.fromkeys(_COUNTS, (np.int64, 1))
    expected |= dict.fromkeys(_SUMS, (np.float64, 1))
    found = require_arrays(arrays, expected, kind=NAME)
    counts = {name: found[name].astype(np.int64) for name in _COUNTS}
    sums = {name: found[name].astype(np.float64) for name in _SUMS}
    positions = counts["positions"]
    if (
        not positions.any()
        or any(len(each) != len(positions) or each.min() < 0 or (each > positions).any() for each in counts.values())
        or any(len(each) != len(positions) or not np.isfinite(each).all() or each.min() < 0.0 for each in sums.values())
    ):
        raise MeasurementError(f"statistics of {NAME} contradict each other: they are not of the same samples")
    return TokenStatistics(
        positions=positions,
        agreeing=counts["agreeing"],
        correct=counts["correct"],
        negative_log_likelihood=sums["negative_log_likelihood"],
        divergence=sums["divergence"],
    )


KIND = MetricKind(
    name=NAME,
    values={
        "perplexity": MetricValue(
            higher_is_better=False, what="Exponential of the mean negative log likelihood of the tokens."
        ),
        "kl_divergence": MetricValue(
            higher_is_better=False, unit="nats", what="Of the reference's distribution from the model's, per position."
        ),
        "top1_agreement": MetricValue(what="Positions where the best token is the reference's, as a fraction."),
        "top1_accuracy": MetricValue(what="Positions where the best token is the right one, as a fraction."),
    },
    make=_made,
    read=_read,
    options=_OPTIONS,
)
"""`tokens`."""
