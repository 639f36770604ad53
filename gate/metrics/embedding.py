"""Embeddings: how near each is to the reference's, and whether its nearest neighbour is of the same identity.

Retrieval is leave-one-out among the evaluation samples: each sample is once the query, all others are the gallery, nearest by
cosine. `recall_at_k` is the fraction of queries with a sample of their own identity among the k nearest. A query whose
identity no other sample has is not counted. Of equally near samples those of another identity come first, so that a model
whose embeddings are all the same finds nothing. With a gallery of k samples or fewer, where every query would be right,
recall at k is not defined.

Weights, as a bootstrap draws them, are of queries alone: the gallery stays what it was. Drawing a sample twice would otherwise
give it a twin at distance 0, and every recall would rise. So weights are the same as repeating the samples' statistics, not
as embedding the samples twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.errors import DataError, MeasurementError, SpecError
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

NAME = "embedding"
RECALL_AT = "recall_at_"
_OPTIONS = ("output", "recall_at")
_ALWAYS = (1, 5)
_NOT_COUNTED = -1
_BLOCK = 1 << 22
"""Similarities held at a time: 32 MiB of float64."""

_TIE = 1e-12
"""Cosines this near are equal: float64's own rounding of a sum of thousands of products."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EmbeddingStatistics:
    """What one model scored.

    Args:
        cosines: float64 [N], of each embedding and the reference's.
        nearer: int64 [N], how many samples of other identities are at least as near as the nearest of the query's own;
            -1 where no other sample has its identity.
        gallery: How many samples each query was held against.
        recall_at: The k of each recall.
    """

    cosines: _Floats
    nearer: _Ints
    gallery: int
    recall_at: tuple[int, ...]

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.cosines)

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """As `SampleStatistics.values`; the weights are of queries alone."""
        times = require_weights(weights, self.samples)
        total = int(times.sum())
        counted = self.nearer != _NOT_COUNTED
        queries = int(times[counted].sum())
        found = {
            "mean_cosine_to_reference": ratio(float(times.astype(np.float64) @ self.cosines), total),
            "worst_cosine_to_reference": float(self.cosines[times > 0].min()) if total else math.nan,
        }
        for k in self.recall_at:
            right = int(times[counted & (self.nearer < k)].sum())
            found[f"{RECALL_AT}{k}"] = ratio(right, queries) if self.gallery > k else math.nan
        return found

    def to_arrays(self) -> dict[str, Array]:
        """As `SampleStatistics.to_arrays`."""
        return {
            "cosines": self.cosines,
            "nearer": self.nearer,
            "gallery": np.asarray([self.gallery], np.int64),
            "recall_at": np.asarray(self.recall_at, np.int64),
        }


class EmbeddingMetric:
    """Keeps every embedding, as float32, until `statistics`: its retrieval is among all of them.

    Args:
        output: Name of the output; None for the only one.
        recall_at: The k of each recall, ascending.
    """

    def __init__(self, *, output: str | None, recall_at: tuple[int, ...]) -> None:
        self._output = output
        self._recall_at = recall_at
        self._identities: list[int] = []
        self._cosines: list[_Floats] = []
        self._embeddings: list[npt.NDArray[np.float32]] = []

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:
        """As `TaskMetric.add`.

        Args:
            predictions: The output is float [n, D].
            reference: The reference's, of the same shape.
            targets: Identities, integers.
            first_sample: As there.
        """
        ours = output_of(predictions, self._output, who="model")
        require_next(first_sample, len(self._identities), predictions=len(ours), targets=targets)
        theirs = ours if predictions is reference else output_of(reference, self._output, who="reference")
        identities = [_require_identity(each, first_sample + offset) for offset, each in enumerate(targets)]
        if ours.shape != theirs.shape:
            raise MeasurementError(
                f"the model's embeddings are {list(ours.shape)}, the reference's {list(theirs.shape)}"
            )
        if self._embeddings and ours.shape[1:] != self._embeddings[0].shape[1:]:
            raise MeasurementError(
                f"embeddings are {list(ours.shape[1:])}, those before were {list(self._embeddings[0].shape[1:])}"
            )
        units = _units(ours, who="model", first_sample=first_sample)
        their_units = units if ours is theirs else _units(theirs, who="reference", first_sample=first_sample)
        cosines = np.clip(np.einsum("nd,nd->n", units, their_units), -1.0, 1.0)
        cosines[(ours == theirs).all(axis=1)] = 1.0
        self._cosines.append(cosines)
        # Those of float64 are scaled first, so that none is beyond float32; a shorter one is kept exactly as it is.
        self._embeddings.append((units if ours.dtype.itemsize > 4 else ours).astype(np.float32))
        self._identities.extend(identities)

    def statistics(self) -> EmbeddingStatistics:
        """As `TaskMetric.statistics`."""
        if not self._identities:
            raise MeasurementError("no embedding was compared: there are no samples")
        embeddings = np.concatenate(self._embeddings)
        self._embeddings = [embeddings]
        identities = np.asarray(self._identities, np.int64)
        return EmbeddingStatistics(
            cosines=np.concatenate(self._cosines),
            nearer=_nearer(embeddings, identities),
            gallery=len(identities) - 1,
            recall_at=self._recall_at,
        )


def _require_identity(given: Any, sample: int) -> int:
    value: npt.NDArray[Any] = np.asarray(given)
    if value.dtype.kind not in "iu" or value.size != 1:
        raise DataError(f"the target of sample {sample} is {given!r}; expected an identity, one whole number")
    return int(value.reshape(()))


def _units(embeddings: Array, *, who: str, first_sample: int) -> _Floats:
    """Each embedding at length 1, float64 [n, D]."""
    if embeddings.dtype.kind != "f" or embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise MeasurementError(
            f"the {who}'s output is {embeddings.dtype} {list(embeddings.shape)}; embeddings are floats [n, D]"
        )
    require_finite(embeddings, who=who, first_sample=first_sample)
    wide = embeddings.astype(np.float64)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    if (zero := np.flatnonzero(largest == 0.0)).size:
        raise MeasurementError(
            f"the {who}'s embedding of sample {first_sample + int(zero[0])} is zero, and has no direction"
        )
    # By the largest first: squares of very large or very small values would leave float64.
    wide /= largest
    return _normalised(wide)


def _normalised(wide: _Floats) -> _Floats:
    units: _Floats = wide / np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    return units


def _nearer(embeddings: npt.NDArray[np.float32], identities: _Ints) -> _Ints:
    """As `EmbeddingStatistics.nearer`; a block of queries at a time, and of the gallery within it."""
    count = len(embeddings)
    found = np.full(count, _NOT_COUNTED, np.int64)
    _, inverse, sizes = np.unique(identities, return_inverse=True, return_counts=True)
    queries = np.flatnonzero(sizes[inverse] > 1)
    rows = max(1, _BLOCK // count)
    step = max(1, _BLOCK // embeddings.shape[1])
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        units = _scaled(embeddings[block])
        cosines = np.empty((len(block), count))
        for first in range(0, count, step):
            cosines[:, first : first + step] = units @ _scaled(embeddings[first : first + step]).T
        own = identities[block][:, None] == identities[None, :]
        mine = own.copy()
        mine[np.arange(len(block)), block] = False
        best = np.where(mine, cosines, -np.inf).max(axis=1, keepdims=True)
        found[block] = np.count_nonzero(~own & (cosines >= best - _TIE), axis=1)
    return found


def _scaled(embeddings: npt.NDArray[np.float32]) -> _Floats:
    # Squares of float32 stay within float64.
    return _normalised(embeddings.astype(np.float64))


def _made(options: Mapping[str, Any], categories: Categories | None) -> EmbeddingMetric:  # noqa: ARG001 - every kind's
    require_options(NAME, options, _OPTIONS)
    given = options.get("recall_at", list(_ALWAYS))
    if (
        not isinstance(given, Sequence)
        or isinstance(given, str)
        or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in given)
    ):
        raise SpecError(
            f"expected whole numbers from 1, such as [1, 5, 10], got {given!r}", where="[task.options] recall_at"
        )
    return EmbeddingMetric(output=option_text(options, "output"), recall_at=tuple(sorted({*_ALWAYS, *given})))


def _read(arrays: Mapping[str, Array]) -> EmbeddingStatistics:
    expected = {
        "cosines": (np.float64, 1),
        "nearer": (np.int64, 1),
        "gallery": (np.int64, 1),
        "recall_at": (np.int64, 1),
    }
    found = require_arrays(arrays, expected, kind=NAME)
    cosines = found["cosines"].astype(np.float64)
    nearer = found["nearer"].astype(np.int64)
    gallery, recall_at = found["gallery"].tolist(), found["recall_at"].tolist()
    if (
        not len(cosines)
        or len(nearer) != len(cosines)
        or gallery != [len(cosines) - 1]
        or not (np.abs(cosines) <= 1.0).all()
        or nearer.min() < _NOT_COUNTED
        or nearer.max() > gallery[0]
        or not set(_ALWAYS) <= set(recall_at)
        or min(recall_at) < 1
    ):
        raise MeasurementError(f"statistics of {NAME} contradict each other: they are not of the same samples")
    return EmbeddingStatistics(cosines, nearer, gallery[0], tuple(recall_at))


KIND = MetricKind(
    name=NAME,
    values={
        "mean_cosine_to_reference": MetricValue(what="Cosine of each embedding and the reference's, the mean."),
        "worst_cosine_to_reference": MetricValue(what="Cosine of each embedding and the reference's, the least."),
        "recall_at_1": MetricValue(what="Queries whose nearest neighbour is of their identity, as a fraction."),
        "recall_at_5": MetricValue(what="Queries with one of their identity among the 5 nearest, as a fraction."),
    },
    make=_made,
    read=_read,
    options=_OPTIONS,
    named=(RECALL_AT,),
)
"""`embedding`; the option `recall_at` adds recalls to those at 1 and 5."""
