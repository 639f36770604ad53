"""Detection, instance segmentation and keypoints against ground truth in COCO's form, and engine against reference.

What comes in is checked before it is scored: pycocotools takes NaN scores, categories that do not exist and boxes turned
inside out without a word, and gives a number.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.errors import DataError, MeasurementError, SpecError
from gate.metrics.coco import (
    DEFAULT_MAX_DETECTIONS,
    PERSON_SIGMAS,
    CocoEvaluation,
    CocoStatistics,
    IouType,
    named_image,
    require_library,
    rle_from_segmentation,
    summary_names,
)
from gate.metrics.interface import MetricKind, MetricValue
from gate.targets import Categories, Detections, Floats, ImageRecord, ImageTarget, Ints

DEFAULT_DROP: Mapping[str, float] = {
    "fp32": 0.001,
    "tf32": 0.001,
    "fp16": 0.001,
    "bf16": 0.002,
    "int8": 0.005,
    "fp8": 0.005,
}
"""Allowed drop of `mean_ap` against the reference, by precision."""

_OUTSIDE_PX = 1.0
"""How far an annotated box may leave its image: COCO's own files do by fractions of a pixel."""

_SECOND_SIGMOID = (0.5, 0.7311)
"""What a sigmoid makes of 0 to 1."""

_SIGMOID_MARGIN = 0.02

_FEWEST_SCORES = 20
_NAMED = 8

Key = tuple[float, ...]


class DetectionMetric:
    """Detections of one model against ground truth; what is kept is per detection and annotation, no image.

    Args:
        categories: Of the ground truth.
        iou_type: What overlaps: boxes, masks or keypoints.
        max_detections: How many detections of an image and category count; COCO's number where left out.

    Raises:
        BackendUnavailable: Neither pycocotools nor faster-coco-eval is installed.
    """

    def __init__(
        self, categories: Categories, *, iou_type: IouType = "bbox", max_detections: int | None = None
    ) -> None:
        require_library()
        self._categories = categories
        self._type: IouType = iou_type
        self._evaluation = CocoEvaluation(
            categories.names, iou_type=iou_type, max_detections=max_detections, sigmas=categories.skeleton_sigmas
        )
        self._ids = np.array(sorted(categories.names), dtype=np.int64)
        self._seen: dict[int, int] = {}
        self._detections = 0

    def add(
        self,
        predictions: Sequence[Detections],
        *,
        reference: Sequence[Detections],  # noqa: ARG002 - the protocol's
        targets: Sequence[ImageTarget],
        first_sample: int,
    ) -> None:
        """As `TaskMetric.add`: n `Detections`, which may be empty, and n `ImageTarget`.

        Raises:
            BackendUnavailable: Neither pycocotools nor faster-coco-eval is installed.
            DataError: A target is missing or malformed, an image comes twice, a category is unknown.
            MeasurementError: Predictions are of another number or shape, not finite, or of an unknown category.
        """
        if first_sample != self._evaluation.samples:
            raise MeasurementError(
                f"expected the batch from sample {self._evaluation.samples}, got that from {first_sample}"
            )
        if len(predictions) != len(targets):
            raise MeasurementError(
                f"there are detections of {len(predictions)} images for {len(targets)} images",
                where=f"samples from {first_sample}",
            )
        for place, (target, found) in enumerate(zip(targets, predictions, strict=True), start=first_sample):
            if not isinstance(target, ImageTarget):
                raise DataError(
                    f"its ground truth is {type(target).__name__}, expected an image with COCO annotations",
                    where=f"sample {place}",
                )
            require_target(target, self._categories, iou_type=self._type)
            image = target.image
            if image.image_id in self._seen:
                raise DataError(
                    f"image id {image.image_id} is that of sample {self._seen[image.image_id]} too",
                    where=f"sample {place}, {named_image(image)}",
                    hint="An image that comes twice would count once, or be compared with the wrong annotations.",
                )
            require_detections(found, image, self._categories, iou_type=self._type)
            self._seen[image.image_id] = place
            self._detections += len(found.scores)
        self._evaluation.add(targets, predictions)

    def statistics(self) -> CocoStatistics:
        """Of what was added.

        Raises:
            DataError: A segmentation of the ground truth cannot be read.
            MeasurementError: No image was added, none has an annotation to find, or none a detection.
        """
        found = self._evaluation.statistics()
        if not found.annotations:
            raise MeasurementError(
                f"there is nothing to find in {found.samples} images: no annotation that counts",
                hint="Are the annotations those of these images? A crowd is not counted, nor are people without a "
                "visible keypoint.",
            )
        if not self._detections:
            raise MeasurementError(
                f"no detection in any of {found.samples} images",
                hint="Look at the score threshold, the order of the outputs, and the input's range.",
            )
        return found


def require_target(target: ImageTarget, categories: Categories, *, iou_type: IouType = "bbox") -> None:
    """Check the annotations of an image.

    Raises:
        DataError: One has no box, area or category, an unknown one, a box that is not finite, of negative size or
            outside the image, or no mask or keypoints where these are scored.
    """
    image = target.image
    if image.width <= 0 or image.height <= 0:
        raise DataError(f"its size is {image.width} x {image.height}", where=named_image(image))
    for annotation in target.annotations:
        where = f"{named_image(image)}, annotation {annotation.get('id', 'without id')}"
        wanted = ("category_id", "bbox", "area") + {"bbox": (), "segm": ("segmentation",), "keypoints": ("keypoints",)}[
            iou_type
        ]
        if missing := [key for key in wanted if annotation.get(key) is None]:
            raise DataError(f"has no {missing[0]!r}", where=where)
        category = annotation["category_id"]
        if category not in categories.names:
            raise DataError(f"has category {category!r}; {_named_ids(categories)}", where=where)
        box = _numbers(annotation["bbox"], where, "bbox")
        if len(box) != 4:
            raise DataError(f"its bbox has {len(box)} numbers, expected x, y, width, height", where=where)
        area = _numbers([annotation["area"]], where, "area")[0]
        if not np.isfinite([*box, area]).all():
            raise DataError(f"its box or area is not finite: {_shown(box)}, area {area:g}", where=where)
        x, y, width, height = box
        if width < 0 or height < 0 or area < 0:
            raise DataError(f"its box or area is of negative size: {_shown(box)}, area {area:g}", where=where)
        over = max(-x, -y, x + width - image.width, y + height - image.height)
        if over > _OUTSIDE_PX:
            raise DataError(
                f"its box {_shown(box)} leaves the image of {image.width} x {image.height} by {over:g} px",
                where=where,
                hint="COCO has x, y, width, height in pixels: is this x1, y1, x2, y2?",
            )
        if iou_type == "keypoints":
            points = _numbers(annotation["keypoints"], where, "keypoints")
            expected = 3 * len(categories.skeleton_sigmas.get(category, PERSON_SIGMAS))
            if len(points) != expected:
                raise DataError(f"has {len(points)} numbers of keypoints, expected {expected}", where=where)
            if not np.isfinite(points).all():
                raise DataError("its keypoints hold a NaN or Inf", where=where)


def require_detections(
    found: Detections, image: ImageRecord, categories: Categories, *, iou_type: IouType = "bbox"
) -> None:
    """Check what a model found in an image.

    Raises:
        MeasurementError: Arrays do not fit each other, hold a NaN or Inf, boxes of negative size, an unknown category, the
            same detection twice, or no masks or keypoints where these are scored.
    """
    where = named_image(image)
    if not isinstance(found, Detections):
        raise MeasurementError(f"its predictions are {type(found).__name__}, expected Detections", where=where)
    boxes, scores, labels = np.asarray(found.boxes), np.asarray(found.scores), np.asarray(found.labels)
    count = len(scores) if scores.ndim == 1 else -1
    if boxes.shape != (count, 4) or labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise MeasurementError(
            f"detections do not fit each other: boxes {boxes.dtype} {list(boxes.shape)}, "
            f"scores {scores.dtype} {list(scores.shape)}, labels {labels.dtype} {list(labels.shape)}",
            where=where,
            hint="Expected boxes [n, 4], scores [n] and whole-number labels [n].",
        )
    for name, values in (("score", scores), ("box", boxes)):
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise MeasurementError(f"a predicted {name} is NaN, Inf or no number", where=where)
    if iou_type == "segm":
        _require_masks(found, image)
    elif iou_type == "keypoints":
        _require_keypoints(found, where, categories)
    if not count:
        return
    inside_out = np.flatnonzero((boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]))
    if len(inside_out):
        raise MeasurementError(
            f"{len(inside_out)} of {count} predicted boxes are of negative size, such as {_shown(boxes[inside_out[0]])}",
            where=where,
            hint="Boxes are x1, y1, x2, y2: are these x, y, width, height, or a center and a size?",
        )
    unknown = np.setdiff1d(labels, np.array(sorted(categories.names), np.int64))
    if len(unknown):
        raise MeasurementError(
            f"a predicted category is {int(unknown[0])}; {_named_ids(categories)}",
            where=where,
            hint="Does the model count its classes from 0 and the ground truth from 1, or the other way round?",
        )
    _require_different(found, boxes, scores, labels, where)


def _require_masks(found: Detections, image: ImageRecord) -> None:
    where, count = named_image(image), len(found.scores)
    if found.masks is None:
        if count:
            raise MeasurementError("its detections have no masks", where=where)
        return
    if len(found.masks) != count:
        raise MeasurementError(f"there are {len(found.masks)} masks for {count} detections", where=where)
    for mask in found.masks:
        try:
            rle_from_segmentation(mask, image, where=where)
        except DataError as err:
            raise MeasurementError(f"a predicted mask cannot be used: {err.message}", where=where) from err


def _require_keypoints(found: Detections, where: str, categories: Categories) -> None:
    count = len(found.scores)
    if found.keypoints is None:
        if count:
            raise MeasurementError("its detections have no keypoints", where=where)
        return
    points = np.asarray(found.keypoints)
    numbers = {len(categories.skeleton_sigmas.get(each, PERSON_SIGMAS)) for each in categories.names}
    if points.ndim != 3 or len(points) != count or points.shape[2] != 3 or (count and {points.shape[1]} != numbers):
        raise MeasurementError(
            f"its keypoints are {list(points.shape)}, expected [{count}, {'/'.join(map(str, sorted(numbers)))}, 3]",
            where=where,
        )
    if not np.isfinite(points).all():
        raise MeasurementError("a predicted keypoint is NaN or Inf", where=where)


def _require_different(
    found: Detections, boxes: npt.NDArray[Any], scores: npt.NDArray[Any], labels: npt.NDArray[Any], where: str
) -> None:
    rows = np.column_stack([boxes, scores, labels]).astype(np.float64)
    if found.keypoints is not None:
        rows = np.column_stack([rows, np.asarray(found.keypoints, np.float64).reshape(len(rows), -1)])
    if len(np.unique(rows, axis=0)) == len(rows):
        return
    keys: list[tuple[object, ...]] = [tuple(row) for row in rows.tolist()]
    if found.masks is not None:
        keys = [(*key, str(mask["counts"])) for key, mask in zip(keys, found.masks, strict=True)]
    key, times = Counter(keys).most_common(1)[0]
    if times > 1:
        place = keys.index(key)
        raise MeasurementError(
            f"the same detection comes {times} times: category {int(labels[place])}, score {float(scores[place]):g}, "
            f"box {_shown(boxes[place])}",
            where=where,
            hint="Is non-maximum suppression left out, or were outputs of two batches put together?",
        )


def _numbers(values: Any, where: str, key: str) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as err:
        raise DataError(f"its {key!r} is not numbers: {values!r:.80}", where=where) from err


def _shown(values: Any) -> str:
    return "(" + ", ".join(f"{float(each):g}" for each in values) + ")"


def _named_ids(categories: Categories) -> str:
    ids = sorted(categories.names)
    if len(ids) > _NAMED and ids == list(range(ids[0], ids[-1] + 1)):
        return f"there are {ids[0]} to {ids[-1]}"
    shown = ", ".join(map(str, ids[:_NAMED]))
    return f"there are {shown}{f' and {len(ids) - _NAMED} more, up to {ids[-1]}' if len(ids) > _NAMED else ''}"


@dataclass(frozen=True)
class DrawnBox:
    """A detection of a named image: xyxy in pixels of the image, score, category id, and whether it has no counterpart."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    unmatched: bool


@dataclass(frozen=True)
class WorstImage:
    """An image in which reference and candidate differ most.

    Args:
        image_id: As in the ground truth.
        file_name: Empty where it came from no file.
        why: In one sentence.
        reference, candidate: What each found, of scores that count.
    """

    image_id: int
    file_name: str
    why: str
    reference: tuple[DrawnBox, ...]
    candidate: tuple[DrawnBox, ...]


@dataclass(frozen=True)
class BoxAgreement:
    """How far the candidate's boxes are the reference's. Of no pair, means and extremes are NaN.

    Args:
        images: How many were compared.
        reference, candidate: How many detections each has that count.
        matched: Pairs that overlap by the threshold or more, of which one or both count.
        mean_iou, least_iou: Over the pairs.
        max_score_difference, mean_score_difference: Absolute, over the pairs.
        class_changes: Pairs of different categories.
        reference_only, candidate_only: Detections that count and overlap none of the other side.
        worst: Images with most differences first; those without a difference are left out.
    """

    images: int
    reference: int
    candidate: int
    matched: int
    mean_iou: float
    least_iou: float
    max_score_difference: float
    mean_score_difference: float
    class_changes: int
    reference_only: int
    candidate_only: int
    worst: tuple[WorstImage, ...]


@dataclass(frozen=True)
class _Pairs:
    """Places of paired detections, and how far they overlap."""

    reference: Ints
    candidate: Ints
    iou: Floats


class BoxComparison:
    """Reference and candidate, box by box, image by image; memory does not grow with the number of images.

    A detection counts whose score is `min_score` or more; its counterpart may have any score, so that one that crosses
    `min_score` is a difference of scores, not a lost box.

    Args:
        min_score: The least score that counts.
        iou_threshold: The least overlap of a pair.
        worst: How many images are named.
        max_detections: How many of an image are looked at, best first.
    """

    def __init__(
        self, *, min_score: float = 0.25, iou_threshold: float = 0.5, worst: int = 5, max_detections: int = 300
    ) -> None:
        self._least = min_score
        self._threshold = iou_threshold
        self._keep = worst
        self._most = max_detections
        self._images = 0
        self._totals: Counter[str] = Counter()
        self._iou = 0.0
        self._least_iou = math.inf
        self._score = 0.0
        self._max_score = 0.0
        self._worst: list[tuple[Key, WorstImage]] = []

    def add(
        self, reference: Sequence[Detections], candidate: Sequence[Detections], images: Sequence[ImageRecord]
    ) -> None:
        """Take the next images: what both found in each, checked by `require_detections`.

        Raises:
            MeasurementError: They are of different numbers of images.
        """
        if not len(reference) == len(candidate) == len(images):
            raise MeasurementError(
                f"the reference has detections of {len(reference)} images, the engine of {len(candidate)}, "
                f"and there are {len(images)} images"
            )
        for theirs, ours, image in zip(reference, candidate, images, strict=True):
            self._add(_best(theirs, self._most), _best(ours, self._most), image)

    def _add(self, theirs: Detections, ours: Detections, image: ImageRecord) -> None:
        pairs = _paired(theirs, ours, self._threshold)
        their_count, our_count = theirs.scores >= self._least, ours.scores >= self._least
        kept = their_count[pairs.reference] | our_count[pairs.candidate]
        left, right, iou = pairs.reference[kept], pairs.candidate[kept], pairs.iou[kept]
        lone_theirs, lone_ours = their_count.copy(), our_count.copy()
        lone_theirs[pairs.reference] = False
        lone_ours[pairs.candidate] = False
        differences = np.abs(theirs.scores[left] - ours.scores[right])
        changes = int(np.count_nonzero(theirs.labels[left] != ours.labels[right]))
        lost, gained = int(lone_theirs.sum()), int(lone_ours.sum())
        self._images += 1
        self._totals.update(
            reference=int(their_count.sum()),
            candidate=int(our_count.sum()),
            matched=len(left),
            changes=changes,
            lost=lost,
            gained=gained,
        )
        largest, least = float(differences.max(initial=0.0)), float(iou.min(initial=1.0))
        if len(iou):
            self._iou += float(iou.sum())
            self._least_iou = min(self._least_iou, least)
            self._score += float(differences.sum())
            self._max_score = max(self._max_score, largest)
        if not (lost or gained or changes or largest > 0.0 or least < 1.0) or not self._keep:
            return
        # The heap's first is the least bad; of equally bad images the earlier stays.
        key = (float(lost + gained + changes), largest + (1.0 - least), -float(self._images))
        if len(self._worst) == self._keep and key <= self._worst[0][0]:
            return
        parts = [
            f"{lost} of the reference's boxes not found" if lost else "",
            f"{gained} boxes that the reference does not have" if gained else "",
            f"{changes} of another category" if changes else "",
            f"scores differ by up to {largest:.3g}" if largest > 0.0 else "",
            f"least overlap {least:.3f}" if least < 1.0 else "",
        ]
        named = WorstImage(
            image_id=image.image_id,
            file_name=image.file_name,
            why="; ".join(each for each in parts if each),
            reference=_drawn(theirs, their_count, lone_theirs),
            candidate=_drawn(ours, our_count, lone_ours),
        )
        (heapq.heappush if len(self._worst) < self._keep else heapq.heapreplace)(self._worst, (key, named))

    def result(self) -> BoxAgreement:
        """Of what was added.

        Raises:
            MeasurementError: No image was.
        """
        if not self._images:
            raise MeasurementError("no image's boxes were compared")
        total, matched = self._totals, self._totals["matched"]
        return BoxAgreement(
            images=self._images,
            reference=total["reference"],
            candidate=total["candidate"],
            matched=matched,
            mean_iou=self._iou / matched if matched else math.nan,
            least_iou=self._least_iou if matched else math.nan,
            max_score_difference=self._max_score if matched else math.nan,
            mean_score_difference=self._score / matched if matched else math.nan,
            class_changes=total["changes"],
            reference_only=total["lost"],
            candidate_only=total["gained"],
            worst=tuple(named for _, named in sorted(self._worst, key=lambda each: each[0], reverse=True)),
        )


def _best(found: Detections, most: int) -> Detections:
    scores = np.asarray(found.scores, np.float64)
    order = np.argsort(-scores, kind="stable")[:most]
    boxes, labels = np.asarray(found.boxes, np.float64).reshape(-1, 4), np.asarray(found.labels, np.int64)
    return Detections(boxes=boxes[order], scores=scores[order], labels=labels[order])


def _drawn(found: Detections, counts: npt.NDArray[np.bool_], lone: npt.NDArray[np.bool_]) -> tuple[DrawnBox, ...]:
    drawn: list[DrawnBox] = []
    for place in np.flatnonzero(counts).tolist():
        x1, y1, x2, y2 = found.boxes[place].tolist()
        drawn.append(
            DrawnBox((x1, y1, x2, y2), float(found.scores[place]), int(found.labels[place]), bool(lone[place]))
        )
    return tuple(drawn)


def box_overlaps(first: Floats, second: Floats) -> Floats:
    """Intersection over union of each box with each, float64 [n, m]; 0 where both are empty.

    Args:
        first: float64 [n, 4], xyxy.
        second: float64 [m, 4], xyxy.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    size = np.maximum(high - low, 0.0)
    shared = size[..., 0] * size[..., 1]
    areas = [(each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]) for each in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    found: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0.0)
    return found


def _paired(theirs: Detections, ours: Detections, threshold: float) -> _Pairs:
    """Pairs of most overlap first, those of one category before others; of equals the one with the better score."""
    iou = box_overlaps(theirs.boxes, ours.boxes)
    # Cut off at the image's edge, a box may have no area left, and still be the other's.
    iou[(theirs.boxes[:, None] == ours.boxes[None]).all(axis=2)] = 1.0
    rows, columns = np.nonzero(iou >= threshold)
    other = theirs.labels[rows] != ours.labels[columns]
    gap = np.abs(theirs.scores[rows] - ours.scores[columns])
    free_row, free_column = np.ones(len(theirs.scores), np.bool_), np.ones(len(ours.scores), np.bool_)
    kept: list[int] = []
    for place in np.lexsort((columns, rows, gap, -iou[rows, columns], other)).tolist():
        row, column = rows[place], columns[place]
        if free_row[row] and free_column[column]:
            free_row[row] = free_column[column] = False
            kept.append(place)
    chosen = np.array(kept, dtype=np.int64)
    return _Pairs(rows[chosen], columns[chosen], iou[rows[chosen], columns[chosen]])


Convert = Callable[[Floats, ImageRecord], Floats]


def _split(boxes: Floats) -> tuple[Floats, Floats]:
    return boxes[:, :2], boxes[:, 2:]


def _from_size(boxes: Floats, image: ImageRecord) -> Floats:  # noqa: ARG001 - as `Convert`
    first, second = _split(boxes)
    return np.concatenate([first, first + second], axis=1)


def _to_corners(boxes: Floats, image: ImageRecord) -> Floats:  # noqa: ARG001
    first, second = _split(boxes)
    return np.concatenate([first, second - first], axis=1)


def _from_center(boxes: Floats, image: ImageRecord) -> Floats:  # noqa: ARG001
    first, second = _split(boxes)
    return np.concatenate([first - second / 2, first + second / 2], axis=1)


def _corner_was_center(boxes: Floats, image: ImageRecord) -> Floats:
    return _from_center(_to_corners(boxes, image), image)


def _center_was_corner(boxes: Floats, image: ImageRecord) -> Floats:  # noqa: ARG001
    first, second = _split(boxes)
    corner, size = (first + second) / 2, second - first
    return np.concatenate([corner, corner + size], axis=1)


def _center_was_corners(boxes: Floats, image: ImageRecord) -> Floats:  # noqa: ARG001
    first, second = _split(boxes)
    return np.concatenate([(first + second) / 2, second - first], axis=1)


def _swapped(boxes: Floats, image: ImageRecord) -> Floats:  # noqa: ARG001
    return np.ascontiguousarray(boxes[:, [1, 0, 3, 2]])


def _fractions(boxes: Floats, image: ImageRecord) -> Floats:
    found: Floats = np.multiply(boxes, np.array([image.width, image.height] * 2), dtype=np.float64)
    return found


def _pixels_scaled_again(boxes: Floats, image: ImageRecord) -> Floats:
    found: Floats = np.divide(boxes, np.array([image.width, image.height] * 2), dtype=np.float64)
    return found


def _from_input(boxes: Floats, image: ImageRecord) -> Floats:
    offset, scale = np.array([image.left, image.top] * 2), np.array([image.scale_x, image.scale_y] * 2)
    found: Floats = np.divide(boxes - offset, scale, dtype=np.float64)
    return found


def _mapped_twice(boxes: Floats, image: ImageRecord) -> Floats:
    offset, scale = np.array([image.left, image.top] * 2), np.array([image.scale_x, image.scale_y] * 2)
    found: Floats = np.add(boxes * scale, offset, dtype=np.float64)
    return found


_BOX_CONVENTIONS: Mapping[str, Convert] = {
    "the model's boxes are x, y, width, height and were read as x1, y1, x2, y2": _from_size,
    "the model's boxes are x1, y1, x2, y2 and were read as x, y, width, height": _to_corners,
    "the model's boxes are center and size and were read as x1, y1, x2, y2": _from_center,
    "the model's boxes are center and size and were read as x, y, width, height": _corner_was_center,
    "the model's boxes are x, y, width, height and were read as center and size": _center_was_corner,
    "the model's boxes are x1, y1, x2, y2 and were read as center and size": _center_was_corners,
    "x and y are swapped": _swapped,
    "the boxes are fractions of the image and were read as pixels": _fractions,
    "the boxes are pixels and were multiplied by the image's size": _pixels_scaled_again,
    "the boxes are in pixels of the model's input and were not mapped back to the image": _from_input,
    "the boxes were mapped back from the model's input twice": _mapped_twice,
}


def explain_low_map(
    detections: Sequence[Detections],
    targets: Sequence[ImageTarget],
    categories: Categories,
    *,
    expected: float | None = None,
    images: int = 500,
    others: Mapping[str, Sequence[Detections]] | None = None,
) -> str | None:
    """Which other convention of boxes or categories would explain a mean AP that is far too low; None where none would.

    Boxes may be of negative size and labels unknown here: either may be the sign of such a convention.

    Args:
        detections: What a model found.
        targets: The ground truth of the same images.
        categories: Of the ground truth.
        expected: The mean AP there should be, the reference's say: half of it is not far too low.
        images: How many of them, from the first, are looked at.
        others: What else the model's outputs could mean, by a sentence, for as many images.

    Returns:
        One sentence that names the convention and the mean AP that it would give.

    Raises:
        BackendUnavailable: Neither pycocotools nor faster-coco-eval is installed.
        MeasurementError: Detections and targets are of different numbers.
    """
    if len(detections) != len(targets):
        raise MeasurementError(f"there are detections of {len(detections)} images for {len(targets)} images")
    detections, targets = detections[:images], targets[:images]
    score = partial(_mean_ap, targets=targets, categories=categories)
    now = score(detections)
    if expected is not None and now >= expected / 2:
        return None
    options = {sentence: score(found[: len(targets)]) for sentence, found in (others or {}).items()}
    for sentence, convert in _BOX_CONVENTIONS.items():
        read = [_with_boxes(found, convert, target.image) for found, target in zip(detections, targets, strict=True)]
        options[sentence] = max(options.get(sentence, 0.0), score(read))
    for sentence, places in _label_conventions(categories).items():
        options[sentence] = score([_with_labels(found, places) for found in detections])
    best = max(options, key=lambda name: options[name])
    enough = max(2.0 * now, now + 0.02, 0.0 if expected is None else expected / 2)
    if options[best] >= enough:
        return f"mean_ap is {now:.3f}; it would be {options[best]:.3f} if {best}"
    return second_sigmoid(detections)


def second_sigmoid(detections: Sequence[Detections], reference: Sequence[Detections] | None = None) -> str | None:
    """A sentence where all scores lie where a sigmoid puts what is a probability already; None where they do not.

    Args:
        detections: What a model found.
        reference: What another found in the same images: where its scores lie there too, they may belong there.
    """
    scores, others = (
        np.concatenate([np.zeros(0), *(np.asarray(each.scores, np.float64) for each in found or ())])
        for found in (detections, reference)
    )
    low, high = _SECOND_SIGMOID
    if len(scores) < _FEWEST_SCORES or scores.min() < low or scores.max() > high:
        return None
    if reference is not None and not ((others < low - _SIGMOID_MARGIN) | (others > high + _SIGMOID_MARGIN)).any():
        return None
    return (
        f"all scores lie between {scores.min():.3f} and {scores.max():.3f}, as after a second sigmoid: the order and "
        "so mean_ap stay, but every score threshold means something else"
    )


def _mean_ap(detections: Sequence[Detections], *, targets: Sequence[ImageTarget], categories: Categories) -> float:
    evaluation = CocoEvaluation(categories.names)
    ids = np.array(sorted(categories.names), dtype=np.int64)
    evaluation.add(targets, [_usable(each, ids) for each in detections])
    if not targets:
        return 0.0
    value = evaluation.statistics().values(names=["mean_ap"])["mean_ap"]
    return 0.0 if math.isnan(value) else value


def _usable(found: Detections, ids: Ints) -> Detections:
    boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4)
    scores, labels = np.asarray(found.scores, np.float64), np.asarray(found.labels, np.int64)
    keep = (
        np.isfinite(boxes).all(axis=1)
        & np.isfinite(scores)
        & (boxes[:, 2] >= boxes[:, 0])
        & (boxes[:, 3] >= boxes[:, 1])
        & np.isin(labels, ids)
    )
    return Detections(boxes=boxes[keep], scores=scores[keep], labels=labels[keep])


def _with_boxes(found: Detections, convert: Convert, image: ImageRecord) -> Detections:
    boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4)
    return Detections(boxes=convert(boxes, image), scores=found.scores, labels=found.labels)


def _label_conventions(categories: Categories) -> dict[str, Mapping[int, int]]:
    """What each label would mean, by the convention."""
    ids = sorted(categories.names)
    found: dict[str, Mapping[int, int]] = {
        "category ids were one higher (the model counts from one less)": {each - 1: each for each in ids},
        "category ids were one lower (the model counts from one more)": {each + 1: each for each in ids},
    }
    for first in (0, 1):
        if ids != list(range(ids[0], ids[0] + len(ids))):
            named = f"labels were places among the sorted category ids, counted from {first}"
            found[named] = dict(enumerate(ids, start=first))
    return found


def _with_labels(found: Detections, places: Mapping[int, int]) -> Detections:
    unknown = min(places.values()) - 1
    labels = np.array([places.get(int(each), unknown) for each in np.asarray(found.labels)], np.int64)
    return Detections(boxes=found.boxes, scores=found.scores, labels=labels)


def _make(options: Mapping[str, Any], categories: Categories | None, *, iou_type: IouType) -> DetectionMetric:
    if unknown := sorted(set(options) - {"max_detections"}):
        raise SpecError(f"[task.options] has no option {unknown[0]!r}", hint="There is max_detections.")
    most = options.get("max_detections", DEFAULT_MAX_DETECTIONS[iou_type])
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise SpecError(f"[task.options] max_detections must be a whole number above 0, got {most!r}")
    if categories is None or not categories.names:
        raise SpecError(
            "[task] needs categories, and the data source names none",
            hint="Take a source with COCO annotations, or one that gives categories.",
        )
    if repeated := [name for name, times in Counter(categories.names.values()).items() if times > 1]:
        raise SpecError(f"two categories have the name {repeated[0]!r}: their values could not be told apart")
    return DetectionMetric(categories, iou_type=iou_type, max_detections=most)


def _read(arrays: Mapping[str, npt.NDArray[np.generic]], *, iou_type: IouType) -> CocoStatistics:
    found = CocoStatistics.from_arrays(arrays)
    if found.iou_type != iou_type:
        raise MeasurementError(f"stored detections are of {found.iou_type!r}, expected {iou_type!r}")
    return found


_AREAS = {"small": "below 32² px", "medium": "of 32² to 96² px", "large": "above 96² px"}


def _described(iou_type: IouType) -> dict[str, MetricValue]:
    overlap = {"bbox": "box IoU", "segm": "mask IoU", "keypoints": "keypoint similarity"}[iou_type]
    found: dict[str, MetricValue] = {}
    for name in summary_names(iou_type):
        what = "Average precision" if name.startswith("mean_ap") else "Average recall"
        last = name.rsplit("_", 1)[-1]
        if last in _AREAS:
            what += f" of objects {_AREAS[last]}, over categories and {overlap} 0.50 to 0.95."
        elif last in {"50", "75"}:
            what += f" over categories at {overlap} 0.{last}."
        elif last in {"1", "10"}:
            best = "the best detection" if last == "1" else f"the {last} best detections"
            what += f" with {best} of an image and category, over categories and {overlap} 0.50 to 0.95."
        else:
            what += f" over categories and {overlap} 0.50 to 0.95."
        found[name] = MetricValue(what=what)
    return found


def _kind(name: str, iou_type: IouType) -> MetricKind:
    return MetricKind(
        name=name,
        values=_described(iou_type),
        make=partial(_make, iou_type=iou_type),
        read=partial(_read, iou_type=iou_type),
        predictions="detections",
        options=("max_detections",),
        default_drop=DEFAULT_DROP,
        named=("ap_of.",),
    )


IOU_TYPES: Mapping[str, IouType] = {"detection": "bbox", "instance_segmentation": "segm", "keypoints": "keypoints"}
"""What overlaps, by the name of the kind."""

KINDS: tuple[MetricKind, ...] = tuple(_kind(name, iou_type) for name, iou_type in IOU_TYPES.items())
