"""Multi-object tracking: IDF1, MOTA and identity switches, as the library `motmetrics` counts them.

What is added are frames; what is kept, weighted and resampled are sequences, since the frames of one depend on each other. So
`samples` of the statistics is the number of sequences, and a weight is of a sequence. Values over several sequences are
taken from their summed counts, as `motmetrics` takes its row OVERALL.

An object and a prediction may be paired where their boxes overlap by `iou_threshold` or more.

Source: Bernardin and Stiefelhagen, Evaluating Multiple Object Tracking Performance, 2008 (MOTA); Ristani et al., Performance
Measures and a Data Set for Multi-Target, Multi-Camera Tracking, 2016 (IDF1).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.errors import BackendUnavailable, DataError, GateError, MeasurementError, SpecError
from gate.metrics.interface import MetricKind, MetricValue, Weights
from gate.metrics.kinds import (
    array_from_texts,
    ratio,
    require_arrays,
    require_next,
    require_options,
    require_weights,
    texts_from_array,
)
from gate.targets import Categories, Floats, Ints, TrackedFrame
from gate.tensors import Array

NAME = "tracking"
DEFAULT_IOU_THRESHOLD = 0.5
"""Source: the MOTChallenge's, Milan et al., MOT16, 2016."""

_OPTIONS = ("iou_threshold",)
_COUNTS = (
    "num_objects",
    "num_predictions",
    "num_misses",
    "num_false_positives",
    "num_switches",
    "idtp",
    "idfp",
    "idfn",
)
"""Names of motmetrics, in the order of the columns."""


@dataclass(frozen=True, eq=False)
class TrackingStatistics:
    """What one model scored.

    Args:
        counts: int64 [S, 8]: by sequence the objects and predictions of all frames, misses, false positives, identity
            switches, and true positives, false positives and misses of identities.
        sequences: Name of each.
    """

    counts: npt.NDArray[np.int64]
    sequences: tuple[str, ...]

    @property
    def samples(self) -> int:
        """How many sequences there are; not frames."""
        return len(self.counts)

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """As `SampleStatistics.values`; a weight is of a sequence."""
        total = (require_weights(weights, self.samples) @ self.counts).tolist()
        objects, predictions, misses, false_positives, switches, idtp, idfp, idfn = total
        return {
            "idf1": ratio(2 * idtp, objects + predictions),
            "mota": 1.0 - ratio(misses + switches + false_positives, objects),
            "idp": ratio(idtp, idtp + idfp),
            "idr": ratio(idtp, idtp + idfn),
            "num_switches": float(switches),
        }

    def to_arrays(self) -> dict[str, Array]:
        """As `SampleStatistics.to_arrays`, in the order of the sequences."""
        return {"counts": self.counts, "sequences": array_from_texts(self.sequences)}


class TrackingMetric:
    """Follows one sequence at a time, and keeps its counts alone.

    Args:
        iou_threshold: The least overlap of a pair.

    Raises:
        BackendUnavailable: `motmetrics` is not installed.
    """

    def __init__(self, *, iou_threshold: float) -> None:
        self._library = _motmetrics()
        self._iou_threshold = iou_threshold
        self._next = 0
        self._done: dict[str, list[int]] = {}
        self._sequence: str | None = None
        self._last_frame = 0
        self._events: Any = None
        self._object_numbers: dict[int, int] = {}
        self._track_numbers: dict[int, int] = {}

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:  # noqa: ARG002 - the protocol's
        """As `TaskMetric.add`.

        Args:
            predictions: n `TrackedFrame`, each of the same sequence and frame as its target.
            reference: Not looked at.
            targets: n `TrackedFrame`; the frames of a sequence follow each other, ascending.
            first_sample: Index of the first frame in the data set.
        """
        if not isinstance(predictions, Sequence) or isinstance(predictions, str):
            raise MeasurementError(f"the model's answer is a {type(predictions).__name__}, expected tracked frames")
        require_next(first_sample, self._next, predictions=len(predictions), targets=targets)
        for offset, (answer, target) in enumerate(zip(predictions, targets, strict=True)):
            sample = first_sample + offset
            if not isinstance(target, TrackedFrame):
                raise DataError(f"the target of sample {sample} is a {type(target).__name__}, expected a TrackedFrame")
            if not isinstance(answer, TrackedFrame):
                raise MeasurementError(
                    f"the model's answer to sample {sample} is a {type(answer).__name__}, expected a TrackedFrame"
                )
            where = f"frame {target.frame} of sequence {target.sequence!r}"
            if (answer.sequence, answer.frame) != (target.sequence, target.frame):
                raise MeasurementError(
                    f"the model's answer to sample {sample} is of frame {answer.frame} of sequence "
                    f"{answer.sequence!r}, the target of {where}"
                )
            _require_objects(target, of="ground truth", where=where, error=DataError)
            _require_objects(answer, of="model", where=where, error=MeasurementError)
            self._begin_if_new(target)
            self._update(target, answer)
        self._next += len(predictions)

    def statistics(self) -> TrackingStatistics:
        """As `TaskMetric.statistics`."""
        done = dict(self._done)
        if self._sequence is not None:
            done[self._sequence] = self._counted()
        counts = np.asarray(list(done.values()), np.int64).reshape(len(done), len(_COUNTS))
        if not counts[:, 0].any():
            raise MeasurementError("no object was looked for: there are no frames, or none has ground truth")
        return TrackingStatistics(counts, tuple(done))

    def _begin_if_new(self, target: TrackedFrame) -> None:
        if target.sequence == self._sequence:
            if target.frame <= self._last_frame:
                raise DataError(
                    f"sequence {target.sequence!r} has frame {target.frame} after frame {self._last_frame}; "
                    "frames must ascend"
                )
        else:
            if target.sequence in self._done:
                raise DataError(f"frames of sequence {target.sequence!r} do not follow each other")
            if self._sequence is not None:
                self._done[self._sequence] = self._counted()
            self._sequence = target.sequence
            self._events = self._library.MOTAccumulator(auto_id=True)
            self._object_numbers, self._track_numbers = {}, {}
        self._last_frame = target.frame

    def _update(self, target: TrackedFrame, answer: TrackedFrame) -> None:
        overlaps = _ious(np.asarray(target.boxes, np.float64), np.asarray(answer.boxes, np.float64))
        distances = np.where(overlaps >= self._iou_threshold, 1.0 - overlaps, np.nan)
        with self._library.lap.set_default_solver("scipy"):
            self._events.update(
                _numbered(target.ids, self._object_numbers), _numbered(answer.ids, self._track_numbers), distances
            )

    def _counted(self) -> list[int]:
        with self._library.lap.set_default_solver("scipy"):
            found = self._library.metrics.create().compute(
                self._events, metrics=list(_COUNTS), return_dataframe=False, name=self._sequence
            )
        return [round(float(found[name])) for name in _COUNTS]


def _motmetrics() -> Any:
    try:
        return importlib.import_module("motmetrics")
    except ImportError as err:
        raise BackendUnavailable(
            f"the kind {NAME!r} needs motmetrics, which cannot be imported: {err}",
            where="[task] kind",
            hint="pip install 'trt-gate[tracking]'",
        ) from err


def _numbered(ids: Ints, numbers: dict[int, int]) -> list[int]:
    """Ids as small numbers: motmetrics keeps them as float64, which does not tell all of int64 apart."""
    return [numbers.setdefault(each, len(numbers)) for each in np.asarray(ids).tolist()]


def _require_objects(frame: TrackedFrame, *, of: str, where: str, error: type[GateError]) -> None:
    ids: npt.NDArray[Any] = np.asarray(frame.ids)
    boxes: npt.NDArray[Any] = np.asarray(frame.boxes)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size) or boxes.shape != (len(ids), 4):
        raise error(
            f"the {of} has ids {ids.dtype} {list(ids.shape)} and boxes {list(boxes.shape)}; "
            "expected int [n] and float [n, 4]",
            where=where,
        )
    if boxes.dtype.kind not in "iuf" or not np.isfinite(boxes).all():
        raise error(f"the {of} has a box with a NaN or Inf, or that is no numbers", where=where)
    if len(np.unique(ids)) != len(ids):
        raise error(f"the {of} has an id more than once in one frame", where=where)
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise error(
            f"the {of} has a box whose right or lower edge is before its left or upper",
            where=where,
            hint="Boxes are xyxy in pixels; are these xywh?",
        )


def _ious(a: Floats, b: Floats) -> Floats:
    """Intersection over union of each box of a and each of b, float64 [len(a), len(b)]; 0 where both have no area."""
    with np.errstate(over="ignore", invalid="ignore"):
        extent = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
        intersection = np.clip(extent, 0.0, None).prod(axis=2)
        areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (a, b)]
        union = areas[0][:, None] + areas[1][None, :] - intersection
        found: Floats = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0.0)
    return found


def _made(options: Mapping[str, Any], categories: Categories | None) -> TrackingMetric:  # noqa: ARG001 - every kind's
    require_options(NAME, options, _OPTIONS)
    given = options.get("iou_threshold", DEFAULT_IOU_THRESHOLD)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0.0 < given <= 1.0:
        raise SpecError(f"expected a fraction above 0, at most 1, got {given!r}", where="[task.options] iou_threshold")
    return TrackingMetric(iou_threshold=float(given))


def _read(arrays: Mapping[str, Array]) -> TrackingStatistics:
    found = require_arrays(arrays, {"counts": (np.int64, 2), "sequences": (np.uint8, 1)}, kind=NAME)
    counts = found["counts"].astype(np.int64)
    sequences = texts_from_array(found["sequences"], kind=NAME)
    if (
        counts.shape != (len(sequences), len(_COUNTS))
        or not len(counts)
        or len(set(sequences)) != len(sequences)
        or counts.min() < 0
        or not counts[:, 0].any()
        or (counts[:, 5] + counts[:, 7] != counts[:, 0]).any()
        or (counts[:, 5] + counts[:, 6] != counts[:, 1]).any()
    ):
        raise MeasurementError(f"statistics of {NAME} contradict each other: counts and sequences do not fit")
    return TrackingStatistics(counts, sequences)


KIND = MetricKind(
    name=NAME,
    values={
        "idf1": MetricValue(what="F1 of identities, over the best pairing of whole tracks."),
        "mota": MetricValue(
            what="1 less misses, false positives and identity switches for each object; may be negative."
        ),
        "idp": MetricValue(what="Precision of identities."),
        "idr": MetricValue(what="Recall of identities."),
        "num_switches": MetricValue(higher_is_better=False, what="How often an object's track changes."),
    },
    make=_made,
    read=_read,
    predictions="tracks",
    options=_OPTIONS,
)
"""`tracking`."""
