"""Semantic segmentation: a class for each pixel, held against label maps; mean IoU, accuracies, and IoU of each class.

The IoU of a class is taken over all pixels of all samples together, intersection over union. A class that is neither
predicted nor in the ground truth has none: it is NaN, and is left out of the mean. A class that is predicted but not in the
ground truth has IoU 0 and counts. Mean class accuracy is over the classes that the ground truth has. Pixels with the ignored
label count nowhere; an ignored label that is itself a class has no IoU.

Of equal logits the class with the lower index is the answer, as `numpy.argmax` has it.
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
    array_from_texts,
    option_integer,
    option_text,
    output_of,
    ratio,
    require_arrays,
    require_finite,
    require_next,
    require_options,
    require_weights,
    texts_from_array,
)
from gate.targets import Categories
from gate.tensors import Array

NAME = "semantic_segmentation"
IOU_OF = "iou_of."
_OPTIONS = ("output", "ignore_label", "classes")
_USUAL_IGNORED = 255
"""What Pascal VOC, Cityscapes and ADE20K as usually prepared mark pixels with that count nowhere."""

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SegmentationStatistics:
    """What one model scored.

    Args:
        counts: int64 [N, C, 3]: by sample and class the pixels where prediction and target are the class, where the
            prediction is, and where the target is.
        confusion: int64 [C, C], pixels of all samples, rows by target, columns by prediction.
        classes: Name of each class.
        ignored: The class that counts nowhere, where the ignored label is one.
    """

    counts: _Ints
    confusion: _Ints
    classes: tuple[str, ...]
    ignored: int | None = None

    @property
    def samples(self) -> int:
        """How many label maps there are."""
        return len(self.counts)

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """As `SampleStatistics.values`."""
        total: _Ints = np.tensordot(require_weights(weights, self.samples), self.counts, axes=1)
        intersection, predicted, target = (total[:, each] for each in range(3))
        union = predicted + target - intersection
        iou = [ratio(*each) for each in zip(intersection.tolist(), union.tolist(), strict=True)]
        accuracy = [ratio(*each) for each in zip(intersection.tolist(), target.tolist(), strict=True)]
        if self.ignored is not None:
            iou[self.ignored] = accuracy[self.ignored] = math.nan
        return {
            "mean_iou": _mean(iou),
            "pixel_accuracy": ratio(int(intersection.sum()), int(target.sum())),
            "mean_class_accuracy": _mean(accuracy),
            **{IOU_OF + name: value for name, value in zip(self.classes, iou, strict=True)},
        }

    def to_arrays(self) -> dict[str, Array]:
        """As `SampleStatistics.to_arrays`; `confusion` is of all samples."""
        return {
            "counts": self.counts,
            "confusion": self.confusion,
            "classes": array_from_texts(self.classes),
            "ignored": np.asarray([] if self.ignored is None else [self.ignored], np.int64),
        }


def _mean(values: Sequence[float]) -> float:
    """Of those that are defined, NaN where none is."""
    defined = [each for each in values if not math.isnan(each)]
    return ratio(math.fsum(defined), len(defined))


class SegmentationMetric:
    """Counts pixels by class, sample by sample; keeps 24 bytes for each class of each sample.

    Args:
        output: Name of the output with logits or class maps; None for the only one.
        ignore_label: Of pixels that count nowhere.
        names: Of the classes; None where only their number is known.
        classes: How many; None where the logits say it.
    """

    def __init__(
        self, *, output: str | None, ignore_label: int | None, names: tuple[str, ...] | None, classes: int | None
    ) -> None:
        self._output = output
        self._ignore_label = ignore_label
        self._names = names
        self._classes = classes
        self._next = 0
        self._counts: list[_Ints] = []
        self._confusion: _Ints | None = None

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:  # noqa: ARG002 - the protocol's
        """As `TaskMetric.add`.

        Args:
            predictions: The output is logits, float [n, C, H, W], or class maps, int [n, H, W].
            reference: Not looked at.
            targets: Label maps, int [H, W], of the output's height and width.
            first_sample: As there.
        """
        output = output_of(predictions, self._output, who="model")
        require_next(first_sample, self._next, predictions=len(output), targets=targets)
        classes = self._require_classes(output)
        confusion = np.zeros((classes, classes), np.int64) if self._confusion is None else self._confusion
        for offset, (answer, target) in enumerate(zip(output, targets, strict=True)):
            sample = first_sample + offset
            labels = self._require_label_map(target, classes=classes, sample=sample)
            if answer.shape[-2:] != labels.shape:
                raise MeasurementError(
                    f"the output of sample {sample} is {_size(answer.shape[-2:])}, its label map {_size(labels.shape)} "
                    "(height x width)",
                    hint="Resize the logits in the model, or the label maps in the data source as the images are: "
                    "nearest, never interpolated.",
                )
            found = self._class_map(answer, classes=classes, sample=sample)
            counted = slice(None) if self._ignore_label is None else labels != self._ignore_label
            pairs = labels[counted].ravel() * classes + found[counted].ravel()
            each = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
            confusion += each
            self._counts.append(np.stack([each.diagonal(), each.sum(axis=0), each.sum(axis=1)], axis=1))
        self._confusion = confusion
        self._next += len(output)

    def statistics(self) -> SegmentationStatistics:
        """As `TaskMetric.statistics`."""
        if self._confusion is None or not self._confusion.any():
            raise MeasurementError("no pixel was compared with a label: there are no samples, or all are ignored")
        classes = len(self._confusion)
        ignored = self._ignore_label
        return SegmentationStatistics(
            counts=np.stack(self._counts),
            confusion=self._confusion.copy(),
            classes=self._names or tuple(str(each) for each in range(classes)),
            ignored=ignored if ignored is not None and 0 <= ignored < classes else None,
        )

    def _require_classes(self, output: Array) -> int:
        """How many classes there are, where the output is of a form that can be scored."""
        known = self._classes if self._confusion is None else len(self._confusion)
        given = f"{output.dtype} {list(output.shape)}"
        if output.dtype.kind == "f" and output.ndim == 4 and output.shape[1] >= 2:
            if known not in (None, output.shape[1]):
                raise MeasurementError(f"the output has logits of {output.shape[1]} classes, expected {known}")
            return int(output.shape[1])
        if output.dtype.kind in "iu" and output.ndim == 3:
            if known is None:
                raise MeasurementError(
                    "class maps do not say how many classes there are",
                    hint="Say it in the spec: [task.options] classes = 21, or their names.",
                )
            return known
        raise MeasurementError(
            f"the output is {given}; expected logits, float [n, classes, height, width] with two classes or more, "
            "or class maps, int [n, height, width]"
        )

    def _class_map(self, answer: Array, *, classes: int, sample: int) -> _Ints:
        if answer.dtype.kind == "f":
            require_finite(answer[None], who="model", first_sample=sample)
            best: _Ints = answer.argmax(axis=0)
            return best
        found = answer.astype(np.int64)
        _require_classes_within(found, classes, sample=sample)
        return found

    def _require_label_map(self, target: Any, *, classes: int, sample: int) -> _Ints:
        given: npt.NDArray[Any] = np.asarray(target)
        if given.dtype.kind not in "iu" or given.ndim != 2 or given.size == 0:
            raise DataError(
                f"the label map of sample {sample} is {given.dtype} {list(given.shape)}; expected integers [H, W]"
            )
        labels = given.astype(np.int64)
        wrong = (labels < 0) | (labels >= classes)
        if self._ignore_label is not None:
            wrong &= labels != self._ignore_label
        if wrong.any():
            worst = int(labels[wrong][0])
            raise DataError(
                f"the label map of sample {sample} has label {worst}, in {np.count_nonzero(wrong)} pixels; there are "
                f"{classes} classes, 0 to {classes - 1}",
                hint="If these pixels are to count nowhere: [task.options] ignore_label = 255."
                if worst == _USUAL_IGNORED and self._ignore_label is None
                else "Do the labels count from 1, or is this another label set?",
            )
        return labels


def _require_classes_within(found: _Ints, classes: int, *, sample: int) -> None:
    if found.size and (found.min() < 0 or found.max() >= classes):
        worst = int(found[(found < 0) | (found >= classes)][0])
        raise MeasurementError(f"the output of sample {sample} has class {worst}; there are {classes}")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(each) for each in shape)


def _made(options: Mapping[str, Any], categories: Categories | None) -> SegmentationMetric:
    require_options(NAME, options, _OPTIONS)
    names: tuple[str, ...] | None = None
    classes: int | None = None
    given = options.get("classes")
    if isinstance(given, Sequence) and not isinstance(given, str):
        if not all(isinstance(each, str) and each for each in given) or len(set(given)) != len(given):
            raise SpecError(f"expected names that differ, got {list(given)}", where="[task.options] classes")
        names, classes = tuple(given), len(given)
    elif given is not None:
        classes = option_integer(options, "classes")
    elif categories is not None and list(categories.names) == list(range(len(categories.names))):
        names, classes = tuple(categories.names.values()), len(categories.names)
        if len(set(names)) != classes:
            names = None
    if classes is not None and classes < 2:
        raise SpecError(f"expected two classes or more, got {classes}", where="[task.options] classes")
    return SegmentationMetric(
        output=option_text(options, "output"),
        ignore_label=option_integer(options, "ignore_label"),
        names=names,
        classes=classes,
    )


def _read(arrays: Mapping[str, Array]) -> SegmentationStatistics:
    expected = {"counts": (np.int64, 3), "confusion": (np.int64, 2), "classes": (np.uint8, 1), "ignored": (np.int64, 1)}
    found = require_arrays(arrays, expected, kind=NAME)
    counts: _Ints = found["counts"].astype(np.int64)
    confusion: _Ints = found["confusion"].astype(np.int64)
    classes = texts_from_array(found["classes"], kind=NAME)
    ignored: list[int] = found["ignored"].tolist()
    total = np.stack([confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)], axis=1)
    if (
        not len(counts)
        or counts.shape[1:] != (len(classes), 3)
        or confusion.shape != (len(classes), len(classes))
        or not np.array_equal(counts.sum(axis=0), total)
        or counts.min() < 0
        or len(ignored) > 1
        or not all(0 <= each < len(classes) for each in ignored)
    ):
        raise MeasurementError(f"statistics of {NAME} contradict each other: counts, confusion and classes do not fit")
    return SegmentationStatistics(counts, confusion, classes, ignored[0] if ignored else None)


KIND = MetricKind(
    name=NAME,
    values={
        "mean_iou": MetricValue(what="Intersection over union, the mean over the classes that occur."),
        "pixel_accuracy": MetricValue(what="Pixels with the right class, as a fraction of those that count."),
        "mean_class_accuracy": MetricValue(what="Pixels of a class that are found, the mean over the classes."),
    },
    make=_made,
    read=_read,
    options=_OPTIONS,
    default_drop={"fp32": 0.001, "tf32": 0.001, "fp16": 0.001, "bf16": 0.002, "int8": 0.005, "fp8": 0.005},
    named=(IOU_OF,),
)
"""`semantic_segmentation`."""
