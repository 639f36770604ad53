"""COCO's evaluation of boxes, masks and keypoints, matched once and scored again for any weights of the images.

The numbers are those of pycocotools. Overlaps are computed by its own compiled code (or by faster-coco-eval's, where
pycocotools is not installed); the matching is its rule for all thresholds and area ranges at once. Neither library gives
out what a resample needs, and both silently count a repeated image once: so what each detection was at each threshold is
kept, and a resample is a weighted accumulation of it.

Source: pycocotools 2.0.11, `cocoeval.py`: `COCOeval.evaluateImg`, `computeOks`, `accumulate`, `summarize`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gate.errors import BackendUnavailable, DataError, MeasurementError
from gate.targets import Detections, Floats, ImageRecord, ImageTarget, Ints
from gate.tensors import Array

IouType = Literal["bbox", "segm", "keypoints"]
Library = Literal["pycocotools", "faster_coco_eval"]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10, endpoint=True)
RECALL_THRESHOLDS: Floats = np.linspace(0.0, 1.0, 101, endpoint=True)
"""Source: `Params.setDetParams`: `linspace`, since `arange` gives slightly larger values."""

AREA_RANGES: Mapping[str, tuple[float, float]] = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""In square pixels, both ends belong to a range. Source: `Params.setDetParams`."""

PERSON_SIGMAS: tuple[float, ...] = tuple(
    each / 10.0
    for each in (0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89)
)
"""Of COCO's 17 keypoints of a person. Source: `Params.setKpParams`."""

DEFAULT_MAX_DETECTIONS: Mapping[IouType, int] = {"bbox": 100, "segm": 100, "keypoints": 20}

_ALL_BITS = (1 << len(IOU_THRESHOLDS)) - 1
_IMAGES_AT_ONCE = 512
_CELLS_AT_ONCE = 1 << 22
_Bits = npt.NDArray[np.uint16]
_Bools = npt.NDArray[np.bool_]
_Indices = npt.NDArray[np.int64]
_Int32 = npt.NDArray[np.int32]


def area_names(iou_type: IouType) -> tuple[str, ...]:
    """Names of the area ranges, `all` first; keypoints have no small ones."""
    return tuple(name for name in AREA_RANGES if not (iou_type == "keypoints" and name == "small"))


@dataclass(frozen=True)
class _Summary:
    """One number of the summary: average precision or recall.

    Args:
        recall: Whether it is recall.
        area: The area range.
        threshold: Index of its IoU threshold, or None for the mean over all.
        most: How many detections of an image and category count, or None for the metric's own number.
    """

    recall: bool = False
    area: str = "all"
    threshold: int | None = None
    most: int | None = None


def _summaries(iou_type: IouType) -> dict[str, _Summary]:
    found = {"mean_ap": _Summary(), "mean_ap_50": _Summary(threshold=0), "mean_ap_75": _Summary(threshold=5)}
    areas = area_names(iou_type)[1:]
    found |= {f"mean_ap_{area}": _Summary(area=area) for area in areas}
    found["mean_ar"] = _Summary(recall=True)
    if iou_type == "keypoints":
        found |= {"mean_ar_50": _Summary(recall=True, threshold=0), "mean_ar_75": _Summary(recall=True, threshold=5)}
    else:
        found |= {"mean_ar_1": _Summary(recall=True, most=1), "mean_ar_10": _Summary(recall=True, most=10)}
    return found | {f"mean_ar_{area}": _Summary(recall=True, area=area) for area in areas}


def summary_names(iou_type: IouType) -> tuple[str, ...]:
    """Names of COCO's twelve numbers (of its ten, for keypoints), `mean_ap` first."""
    return tuple(_summaries(iou_type))


def _library(name: str) -> Any:
    """A compiled module of pycocotools, or its counterpart of faster-coco-eval.

    Raises:
        BackendUnavailable: Neither is installed.
    """
    for module in (f"pycocotools.{name}", f"faster_coco_eval.core.{name}"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    raise BackendUnavailable(
        "detection metrics need pycocotools or faster-coco-eval, and neither is installed",
        hint='pip install "trt-gate[detection]"',
    )


def require_library() -> None:
    """Say at once that the metrics of this module cannot be computed here.

    Raises:
        BackendUnavailable: Neither pycocotools nor faster-coco-eval is installed.
    """
    _library("mask")


def named_image(image: ImageRecord) -> str:
    """An image in a message: its id, and its file where it came from one."""
    return f"image {image.image_id} ({image.file_name})" if image.file_name else f"image {image.image_id}"


def rle_from_segmentation(segmentation: Any, image: ImageRecord, *, where: str) -> Mapping[str, Any]:
    """A COCO segmentation (polygons, or an RLE with or without compression) as compressed RLE.

    Args:
        segmentation: As in COCO's json.
        image: Its height and width are the mask's.
        where: For errors.

    Raises:
        DataError: It is malformed, or of another size than the image.
    """
    mask = _library("mask")
    height, width = int(image.height), int(image.width)
    try:
        if isinstance(segmentation, Mapping):
            size = [int(each) for each in segmentation["size"]]
            if size != [height, width]:
                raise DataError(f"its mask is {size[0]} x {size[1]}, the image {height} x {width}", where=where)
            counts = segmentation["counts"]
            if isinstance(counts, (bytes, str)):
                encoded = counts.encode("ascii") if isinstance(counts, str) else counts
                found = {"size": size, "counts": encoded}
                _require_covers(found, where)
            else:
                runs = [int(each) for each in counts]
                if min(runs, default=-1) < 0 or sum(runs) != height * width:
                    raise DataError(f"its mask's runs cover {sum(runs)} pixels of {height} x {width}", where=where)
                found = mask.frPyObjects({"size": size, "counts": runs}, height, width)
        else:
            polygons = [[float(each) for each in polygon] for polygon in segmentation]
            if not polygons or any(len(each) < 6 or len(each) % 2 for each in polygons):
                raise DataError("its polygons need three points or more each, x and y in turn", where=where)
            if not all(math.isfinite(each) for polygon in polygons for each in polygon):
                raise DataError("its polygons hold a NaN or Inf", where=where)
            found = mask.merge(mask.frPyObjects(polygons, height, width))
    except DataError:
        raise
    except Exception as err:
        raise DataError(f"its segmentation cannot be read: {type(err).__name__}: {err}", where=where) from err
    return {"size": [height, width], "counts": found["counts"]}


def _require_covers(rle: Mapping[str, Any], where: str) -> None:
    """The runs of a compressed RLE must cover the image: the libraries write past their memory where they do not."""
    runs = _runs_from_compressed(rle["counts"])
    if runs is None or not len(runs) or runs.min() < 0 or int(runs.sum()) != rle["size"][0] * rle["size"][1]:
        raise DataError("its mask is no compressed RLE of the image's size", where=where)


def _runs_from_compressed(counts: bytes) -> Ints | None:
    """Lengths of the runs, int64 [n], or None where the text is cut off or is none.

    Source: cocoapi, common/maskApi.c, `rleFrString`: five bits a character, LEB128 of differences to the run before last.
    """
    bits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or bits[-1] & 0x20:
        return None
    last = np.flatnonzero(bits & 0x20 == 0)
    first = np.append(0, last[:-1] + 1)
    lengths = last - first + 1
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(len(bits)) - np.repeat(first, lengths))
    runs: Ints = np.add.reduceat((bits & 0x1F) << shifts, first)
    runs -= np.where(bits[last] & 0x10, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


@dataclass
class _Buffer:
    """Images that wait to be matched."""

    targets: list[ImageTarget] = field(default_factory=list)
    detections: list[Detections] = field(default_factory=list)


@dataclass(frozen=True)
class _Sorted:
    """Detections of several images: by image, category, and score falling, cut to the best of each image and category."""

    image: _Indices
    category: _Indices
    score: Floats
    rank: _Indices
    box: Floats
    area: Floats
    mask: list[Mapping[str, Any]]
    keypoints: Floats


@dataclass(frozen=True)
class _Truth:
    """Annotations of several images: by image and category, else in the order given."""

    image: _Indices
    category: _Indices
    box: Floats
    area: Floats
    crowd: _Bools
    ignored: _Bools
    mask: list[Mapping[str, Any]]
    keypoints: Floats


class CocoEvaluation:
    """Takes targets and detections image by image, and keeps of them what scoring needs.

    Args:
        category_names: By category id.
        iou_type: What overlaps: boxes, masks or keypoints.
        max_detections: How many detections of an image and category count; COCO's number where left out.
        sigmas: For keypoints, by category id the sigma of each keypoint; COCO's person where left out.
    """

    def __init__(
        self,
        category_names: Mapping[int, str],
        *,
        iou_type: IouType = "bbox",
        max_detections: int | None = None,
        sigmas: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        self._names = dict(category_names)
        self._ids = np.array(sorted(self._names), dtype=np.int64)
        self._type: IouType = iou_type
        self._most = DEFAULT_MAX_DETECTIONS[iou_type] if max_detections is None else max_detections
        self._sigmas = {key: np.asarray(value, dtype=np.float64) for key, value in (sigmas or {}).items()}
        self._ranges = np.array([AREA_RANGES[name] for name in area_names(iou_type)])
        self._waiting = _Buffer()
        self._matched_images = 0
        self._image_ids: list[int] = []
        self._detections: list[tuple[Array, ...]] = []
        self._counts: list[tuple[_Indices, _Indices, _Indices]] = []

    @property
    def samples(self) -> int:
        """How many images were added."""
        return len(self._image_ids)

    def add(self, targets: Sequence[ImageTarget], detections: Sequence[Detections]) -> None:
        """Take the next images; what comes in must have been checked.

        Args:
            targets: Of n images.
            detections: Of the same n images.

        Raises:
            BackendUnavailable: Neither pycocotools nor faster-coco-eval is installed.
            DataError: A segmentation of the ground truth cannot be read.
            MeasurementError: A mask of the predictions cannot be read.
        """
        for target, found in zip(targets, detections, strict=True):
            self._image_ids.append(target.image.image_id)
            self._waiting.targets.append(target)
            self._waiting.detections.append(found)
            if len(self._waiting.targets) == _IMAGES_AT_ONCE:
                self._match_waiting()

    def statistics(self) -> CocoStatistics:
        """Of all that was added, detections by category and score falling.

        Raises:
            MeasurementError: Nothing was.
        """
        if self._waiting.targets:
            self._match_waiting()
        if not self._image_ids:
            raise MeasurementError("no image was scored")
        category, image, score, rank = (
            np.concatenate([each[place] for each in self._detections]) for place in range(4)
        )
        hit, ignored = (np.concatenate([each[place] for each in self._detections], axis=1) for place in (4, 5))
        by_id = np.empty(len(self._image_ids), np.int64)
        by_id[np.argsort(np.array(self._image_ids), kind="stable")] = np.arange(len(self._image_ids))
        # Equal scores stand in the order of the image ids, since that is the order pycocotools goes through.
        order = np.lexsort((rank, by_id[image], -score.astype(np.float64), category))
        truth_category, truth_image, counts = (
            np.concatenate([each[place] for each in self._counts]) for place in range(3)
        )
        return CocoStatistics(
            iou_type=self._type,
            category_names=tuple(self._names[each] for each in self._ids.tolist()),
            max_detections=self._most,
            samples=len(self._image_ids),
            bounds=np.searchsorted(category[order], np.arange(len(self._ids) + 1)).astype(np.int64),
            image=image[order].astype(np.int32),
            rank=rank[order].astype(np.int32),
            hit=hit[:, order].astype(np.uint16),
            ignored=ignored[:, order].astype(np.uint16),
            truth_category=truth_category.astype(np.int32),
            truth_image=truth_image.astype(np.int32),
            truth_counts=counts.astype(np.int32),
        )

    def _match_waiting(self) -> None:
        waiting, self._waiting = self._waiting, _Buffer()
        found = self._sorted_detections(waiting)
        truth = self._sorted_truth(waiting)
        outside = _outside(truth.area, self._ranges)
        ignored = outside | truth.ignored
        state = _match(found, truth, ignored, self._overlaps(found, truth))
        hit, left_out = state == 1, state == 2
        left_out |= (state == 0) & _outside(found.area, self._ranges)[:, None]
        powers = (1 << np.arange(len(IOU_THRESHOLDS))).astype(np.uint16)[None, :, None]
        first = self._matched_images
        self._detections.append(
            (
                found.category.astype(np.int32),
                (found.image + first).astype(np.int32),
                found.score,
                found.rank.astype(np.int32),
                (hit * powers).sum(axis=1, dtype=np.uint16),
                (left_out * powers).sum(axis=1, dtype=np.uint16),
            )
        )
        groups, where = np.unique(truth.image * len(self._ids) + truth.category, return_inverse=True)
        counts = np.zeros((len(groups), len(self._ranges)), np.int64)
        np.add.at(counts, where.reshape(-1), (~ignored).T.astype(np.int64))
        self._counts.append((groups % len(self._ids), groups // len(self._ids) + first, counts))
        self._matched_images += len(waiting.targets)

    def _sorted_detections(self, waiting: _Buffer) -> _Sorted:
        lengths = [len(each.scores) for each in waiting.detections]
        image = np.repeat(np.arange(len(lengths)), lengths)
        labels = np.concatenate([np.asarray(each.labels, np.int64) for each in waiting.detections])
        category = np.searchsorted(self._ids, labels)
        score = np.concatenate([np.asarray(each.scores, np.float64) for each in waiting.detections])
        corners = np.concatenate([np.asarray(each.boxes, np.float64).reshape(-1, 4) for each in waiting.detections])
        # lexsort is stable: of equal scores the one that came first is the better, as with pycocotools' mergesort.
        order = np.lexsort((-score, category, image))
        image, category = image[order], category[order]
        rank = _rank_within(image * len(self._ids) + category)
        best = rank < self._most
        order, image, category, rank = order[best], image[best], category[best], rank[best]
        box = corners[order]
        box[:, 2:] -= box[:, :2]
        masks: list[Mapping[str, Any]] = []
        keypoints = np.zeros((0, 0, 2))
        area = box[:, 2] * box[:, 3]
        if self._type == "segm":
            every = [
                (mask, target.image)
                for each, target in zip(waiting.detections, waiting.targets, strict=True)
                for mask in each.masks or ()
            ]
            masks = [_predicted_rle(*every[place]) for place in order.tolist()]
            area = _mask_areas(masks)
        elif self._type == "keypoints":
            points = [each.keypoints for each in waiting.detections if each.keypoints is not None and len(each.scores)]
            if points:
                keypoints = np.concatenate([np.asarray(each, np.float64)[:, :, :2] for each in points])[order]
                size = keypoints.max(axis=1) - keypoints.min(axis=1)
                area = size[:, 0] * size[:, 1]
        return _Sorted(
            image=image,
            category=category,
            score=score[order],
            rank=rank,
            box=box,
            area=area,
            mask=masks,
            keypoints=keypoints,
        )

    def _sorted_truth(self, waiting: _Buffer) -> _Truth:
        every = [
            (place, annotation) for place, target in enumerate(waiting.targets) for annotation in target.annotations
        ]
        image = np.array([place for place, _ in every], np.int64)
        ids = np.array([annotation["category_id"] for _, annotation in every], np.int64)
        category = np.searchsorted(self._ids, ids)
        order = np.lexsort((category, image))
        annotations = [every[place][1] for place in order.tolist()]
        crowd = np.array([bool(each.get("iscrowd", 0)) for each in annotations], np.bool_)
        masks: list[Mapping[str, Any]] = []
        keypoints = np.zeros((0, 0, 3))
        ignored = crowd.copy()
        if self._type == "segm":
            masks = [
                rle_from_segmentation(
                    each["segmentation"], waiting.targets[place].image, where=_named_annotation(waiting, place, each)
                )
                for place, each in zip(image[order].tolist(), annotations, strict=True)
            ]
        elif self._type == "keypoints" and annotations:
            keypoints = np.array([each["keypoints"] for each in annotations], np.float64)
            keypoints = keypoints.reshape(len(annotations), -1, 3)
            seen = np.count_nonzero(keypoints[:, :, 2] > 0, axis=1)
            counted = [
                each.get("num_keypoints", number) for each, number in zip(annotations, seen.tolist(), strict=True)
            ]
            ignored |= np.array(counted) == 0
        return _Truth(
            image=image[order],
            category=category[order],
            box=np.array([each["bbox"] for each in annotations], np.float64).reshape(-1, 4),
            area=np.array([each["area"] for each in annotations], np.float64),
            crowd=crowd,
            ignored=ignored,
            mask=masks,
            keypoints=keypoints,
        )

    def _overlaps(self, found: _Sorted, truth: _Truth) -> _Overlaps:
        """Overlap of each detection with each annotation of its image and category."""
        categories = len(self._ids)
        keys, starts = np.unique(found.image * categories + found.category, return_index=True)
        ends = np.append(starts[1:], len(found.image))
        theirs, their_starts = np.unique(truth.image * categories + truth.category, return_index=True)
        their_ends = np.append(their_starts[1:], len(truth.image))
        shared, mine, its = np.intersect1d(keys, theirs, assume_unique=True, return_indices=True)
        mask = _library("mask")
        tables: list[Floats] = []
        crowds = truth.crowd.astype(np.uint8).tolist()
        spans = (starts[mine], ends[mine], their_starts[its], their_ends[its])
        for key, d0, d1, g0, g1 in zip(shared.tolist(), *(each.tolist() for each in spans), strict=True):
            if self._type == "bbox":
                table = mask.iou(found.box[d0:d1], truth.box[g0:g1], crowds[g0:g1])
            elif self._type == "segm":
                table = mask.iou(found.mask[d0:d1], truth.mask[g0:g1], crowds[g0:g1])
            else:
                sigmas = self._sigmas.get(int(self._ids[key % categories]), np.array(PERSON_SIGMAS))
                table = _similarities(found.keypoints[d0:d1], truth, slice(g0, g1), sigmas)
            tables.append(np.asarray(table, np.float64))
        return _Overlaps(tables, *spans)


def _named_annotation(waiting: _Buffer, place: int, annotation: Mapping[str, Any]) -> str:
    return f"{named_image(waiting.targets[place].image)}, annotation {annotation.get('id', 'without id')}"


def _predicted_rle(mask: Mapping[str, Any], image: ImageRecord) -> Mapping[str, Any]:
    try:
        return rle_from_segmentation(mask, image, where=named_image(image))
    except DataError as err:
        raise MeasurementError(f"a predicted mask cannot be used: {err.message}", where=err.where) from err


def _mask_areas(masks: Sequence[Mapping[str, Any]]) -> Floats:
    """Pixels of each mask, float64 [n]; 200 at a time, since pycocotools with NumPy 2 fails on more than 255."""
    area = _library("mask").area
    parts = [np.asarray(area(masks[first : first + 200]), np.float64) for first in range(0, len(masks), 200)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _outside(area: Floats, ranges: Floats) -> _Bools:
    """Whether each area lies outside each range, bool [A, n]."""
    outside: _Bools = (area[None, :] < ranges[:, :1]) | (area[None, :] > ranges[:, 1:])
    return outside


def _rank_within(groups: _Indices) -> _Indices:
    """The place of each element within its run of equal values."""
    if not len(groups):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    lengths = np.diff(np.append(starts, len(groups)))
    return np.arange(len(groups)) - np.repeat(starts, lengths)


def _similarities(points: Floats, truth: _Truth, span: slice, sigmas: Floats) -> Floats:
    """Object keypoint similarity of detections with annotations, float64 [D, G].

    Source: pycocotools, `COCOeval.computeOks`, in its order of summation.
    """
    table = np.zeros((len(points), span.stop - span.start))
    variances = (sigmas * 2) ** 2
    x, y = points[:, :, 0], points[:, :, 1]
    for column, place in enumerate(range(span.start, span.stop)):
        given, box = truth.keypoints[place], truth.box[place]
        visible = given[:, 2] > 0
        if visible.any():
            dx, dy = x - given[:, 0], y - given[:, 1]
        else:
            left, right = box[0] - box[2], box[0] + box[2] * 2
            top, bottom = box[1] - box[3], box[1] + box[3] * 2
            dx = np.maximum(0, left - x) + np.maximum(0, x - right)
            dy = np.maximum(0, top - y) + np.maximum(0, y - bottom)
        distance = (dx**2 + dy**2) / variances / (truth.area[place] + np.spacing(1)) / 2
        if visible.any():
            distance = distance[:, visible]
        table[:, column] = [np.sum(row) / len(row) for row in np.exp(-distance)]
    return table


@dataclass(frozen=True)
class _Overlaps:
    """Tables [D, G], one for each image and category with detections and annotations, and what they are of."""

    tables: list[Floats]
    first: _Indices
    last: _Indices
    truth_first: _Indices
    truth_last: _Indices


def _match(found: _Sorted, truth: _Truth, ignored: _Bools, overlaps: _Overlaps) -> npt.NDArray[np.uint8]:
    """What each detection met: uint8 [A, T, D], 0 nothing, 1 an annotation, 2 one that is left out of the score.

    Detections take in turn, best score first, the free annotation that they overlap most, the later of equals, those
    left out of the score last; a crowd stays free. All images with the same number of annotations go step by step together.

    Source: pycocotools, `COCOeval.evaluateImg`.
    """
    areas, thresholds = len(ignored), np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    state = np.zeros((areas, len(thresholds), len(found.image)), np.uint8)
    depths, widths = overlaps.last - overlaps.first, overlaps.truth_last - overlaps.truth_first
    for width in np.unique(widths).tolist():
        bucket = np.flatnonzero(widths == width)
        bucket = bucket[np.argsort(-depths[bucket], kind="stable")]
        step = max(1, _CELLS_AT_ONCE // (areas * len(thresholds) * width))
        for begin in range(0, len(bucket), step):
            _match_alike(
                bucket[begin : begin + step],
                width,
                state,
                overlaps=overlaps,
                truth=truth,
                ignored=ignored,
                thresholds=thresholds,
            )
    return state


def _match_alike(
    bucket: _Indices,
    width: int,
    state: npt.NDArray[np.uint8],
    *,
    overlaps: _Overlaps,
    truth: _Truth,
    ignored: _Bools,
    thresholds: Floats,
) -> None:
    """Match images that have `width` annotations each, the one with most detections first."""
    table = np.concatenate([overlaps.tables[place] for place in bucket.tolist()])
    # Ranks instead of overlaps: of equal overlaps the later annotation has the higher rank.
    ranks = np.empty(table.shape, np.int32)
    np.put_along_axis(
        ranks, np.argsort(table, axis=1, kind="stable"), np.arange(width, dtype=np.int32)[None, :], axis=1
    )
    depths = overlaps.last[bucket] - overlaps.first[bucket]
    rows = np.append(0, np.cumsum(depths)[:-1])
    columns = overlaps.truth_first[bucket][:, None] + np.arange(width)[None, :]
    left_out = ignored[:, columns].transpose(1, 0, 2)[:, :, None, :]
    crowd = truth.crowd[columns][:, None, None, :]
    first_choice = np.where(left_out, 0, width).astype(np.int32)
    taken = np.zeros((len(bucket), len(ignored), len(thresholds), width), np.bool_)
    for turn in range(int(depths[0])):
        active = int(np.searchsorted(-depths, -turn, side="left"))
        here = rows[:active] + turn
        some = np.flatnonzero(table[here].max(axis=1) >= thresholds[0])
        if not len(some):
            continue
        overlap = table[here[some]][:, None, None, :]
        free = (overlap >= thresholds[None, None, :, None]) & (~taken[some] | crowd[some])
        choice = np.where(free, ranks[here[some]][:, None, None, :] + first_choice[some], -1)
        best = choice.argmax(axis=3)
        value = np.take_along_axis(choice, best[..., None], axis=3)[..., 0]
        met = value >= 0
        which, area, threshold = np.nonzero(met)
        taken[some[which], area, threshold, best[met]] = True
        outcome = np.where(met, np.where(value >= width, 1, 2), 0).astype(np.uint8)
        state[:, :, overlaps.first[bucket[some]] + turn] = outcome.transpose(1, 2, 0)


@dataclass(frozen=True)
class _Plan:
    """What of one area range does not depend on weights: hits by threshold, category and score, in one row.

    A segment is a threshold and a category that has a hit.
    """

    image: _Int32
    hit_image: _Int32
    hit_rank: _Int32
    hit_place: _Indices
    start: _Indices
    end: _Indices
    category: _Indices
    threshold: _Indices
    class_start: _Indices
    left_out_image: _Int32
    left_out_before: _Indices
    left_out_base: _Indices


class CocoStatistics:
    """What one model scored, image by image; `values` for any weights of the images.

    Args:
        iou_type: What overlaps.
        category_names: In the order of the category ids.
        max_detections: How many detections of an image and category count.
        samples: How many images there are.
        bounds: int64 [K + 1], where each category's detections begin and end.
        image: int32 [D], the image of each detection, in each category by score falling.
        rank: int32 [D], the place of each among those of its image and category.
        hit: uint16 [A, D], a bit for each IoU threshold at which it is right.
        ignored: uint16 [A, D], a bit for each IoU threshold at which it is neither right nor wrong.
        truth_category, truth_image: int32 [P], pairs that have annotations.
        truth_counts: int32 [P, A], how many of those count in each area range.
    """

    def __init__(
        self,
        *,
        iou_type: IouType,
        category_names: tuple[str, ...],
        max_detections: int,
        samples: int,
        bounds: _Indices,
        image: _Int32,
        rank: _Int32,
        hit: _Bits,
        ignored: _Bits,
        truth_category: _Int32,
        truth_image: _Int32,
        truth_counts: _Int32,
    ) -> None:
        self.iou_type: IouType = iou_type
        self.category_names = category_names
        self.max_detections = max_detections
        self._samples = samples
        self._bounds = bounds
        self._image = image
        self._rank = rank
        self._hit = hit
        self._ignored = ignored
        self._truth_category = truth_category
        self._truth_image = truth_image
        self._truth_counts = truth_counts
        self._areas = area_names(iou_type)
        self._summaries = _summaries(iou_type)
        self._plans: dict[str, _Plan] = {}

    @property
    def samples(self) -> int:
        """How many images there are."""
        return self._samples

    @property
    def detections(self) -> int:
        """How many detections count, at most `max_detections` of an image and category."""
        return len(self._image)

    @property
    def annotations(self) -> int:
        """How many annotations there are to find: crowds, and people without a keypoint, are none."""
        return int(self._truth_counts[:, 0].sum())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that `values` gives."""
        return (*self._summaries, *(f"ap_of.{name}" for name in self.category_names))

    def values(
        self, weights: npt.NDArray[np.int64] | None = None, names: Iterable[str] | None = None
    ) -> dict[str, float]:
        """COCO's numbers, and `ap_of.<category>`; NaN where there is nothing to find.

        Args:
            weights: int [samples], how often each image counts; left out: once, and the numbers are pycocotools'.
            names: Which are asked for; left out: all.

        Raises:
            MeasurementError: Weights do not fit the images, are negative or all 0; or a name is unknown.
        """
        asked = tuple(self.names if names is None else names)
        if unknown := [name for name in asked if name not in self.names]:
            raise MeasurementError(f"there is no value {unknown[0]!r}", hint=f"There are {', '.join(self.names)}.")
        given = self._checked(weights)
        precision: dict[str, Floats] = {}
        recall: dict[tuple[str, int | None], Floats] = {}
        found: dict[str, float] = {}
        for name in asked:
            summary = self._summaries.get(name)
            if summary is None:
                if "all" not in precision:
                    precision["all"] = self._precision("all", given).mean(axis=2)
                column = self.category_names.index(name.removeprefix("ap_of."))
                found[name] = float(precision["all"][:, column].mean())
                continue
            if summary.recall:
                key = (summary.area, summary.most)
                if key not in recall:
                    recall[key] = self._recall(summary.area, summary.most, given)
                table = recall[key]
            else:
                if summary.area not in precision:
                    precision[summary.area] = self._precision(summary.area, given).mean(axis=2)
                table = precision[summary.area]
            rows = table if summary.threshold is None else table[summary.threshold]
            defined = rows[~np.isnan(rows)]
            found[name] = float(defined.mean()) if len(defined) else math.nan
        return found

    def precision_at_recall(self, category: str | None = None, *, iou_threshold: float = 0.5) -> Floats:
        """Interpolated precision at `RECALL_THRESHOLDS`, float64 [101]: a precision-recall curve.

        Args:
            category: Of one category, or the mean over those that have something to find.
            iou_threshold: One of `IOU_THRESHOLDS`.

        Raises:
            MeasurementError: There is no such category or threshold, or nothing to find.
        """
        rows = np.flatnonzero(np.isclose(IOU_THRESHOLDS, iou_threshold))
        if not len(rows):
            raise MeasurementError(f"{iou_threshold:g} is not one of COCO's IoU thresholds, 0.5 to 0.95 by 0.05")
        if category is not None and category not in self.category_names:
            raise MeasurementError(f"there is no category {category!r}")
        table = self._precision("all", self._checked(None))[int(rows[0])]
        if category is not None:
            table = table[[self.category_names.index(category)]]
        table = table[~np.isnan(table[:, 0])]
        if not len(table):
            raise MeasurementError("there is nothing to find, so there is no precision-recall curve")
        curve: Floats = table.mean(axis=0)
        return curve

    def _checked(self, weights: npt.NDArray[np.int64] | None) -> Floats:
        if weights is None:
            return np.ones(self._samples)
        given = np.asarray(weights)
        if given.shape != (self._samples,) or given.dtype.kind not in "iu":
            raise MeasurementError(
                f"weights are {given.dtype} {list(given.shape)}, expected one whole number for each of "
                f"{self._samples} images"
            )
        if not self._samples or given.min() < 0 or not given.any():
            raise MeasurementError("weights are negative or all 0")
        return given.astype(np.float64)

    def _to_find(self, area: str, weights: Floats) -> Floats:
        """How many annotations of each category count, float64 [K]: whole numbers."""
        counts = self._truth_counts[:, self._areas.index(area)] * weights[self._truth_image]
        found: Floats = np.bincount(self._truth_category, weights=counts, minlength=len(self.category_names)).astype(
            np.float64
        )
        return found

    def _recall(self, area: str, most: int | None, weights: Floats) -> Floats:
        """Recall of all detections, float64 [T, K]; NaN where there is nothing to find."""
        plan = self._plan(area)
        counted = weights[plan.hit_image]
        if most is not None and most < self.max_detections:
            counted *= plan.hit_rank < most
        found = np.zeros((len(IOU_THRESHOLDS), len(self.category_names)))
        if len(plan.start):
            found[plan.threshold, plan.category] = np.add.reduceat(counted, plan.start)
        to_find = self._to_find(area, weights)
        return np.where(to_find > 0, found / np.where(to_find > 0, to_find, 1.0), math.nan)

    def _precision(self, area: str, weights: Floats) -> Floats:
        """Interpolated precision, float64 [T, K, 101]; NaN where there is nothing to find.

        Precision is highest at a hit, so only hits are looked at. Sums are of whole numbers, and so exact.
        """
        plan = self._plan(area)
        to_find = self._to_find(area, weights)
        table = np.zeros((len(IOU_THRESHOLDS), len(self.category_names), len(RECALL_THRESHOLDS)))
        if len(plan.start):
            lengths = plan.end - plan.start
            hits = _sums(weights, plan.hit_image)
            counted = _sums(weights, plan.image)
            base = hits[plan.start]
            wrong_base = counted[plan.class_start]
            hits = hits[1:]
            right = hits - np.repeat(base, lengths)
            both = counted[1:].take(plan.hit_place)
            if len(plan.left_out_image):
                left_out = _sums(weights, plan.left_out_image)
                both -= left_out.take(plan.left_out_before)
                wrong_base = wrong_base - left_out[plan.left_out_base]
            both -= np.repeat(wrong_base, lengths)
            both += np.spacing(1)
            precision = np.divide(right, both, out=right)
            # Of each segment and recall threshold the first hit that reaches it; threshold 0 is reached at once.
            needed = _least_hits(to_find)[plan.category]
            places = np.empty(needed.shape, np.int64)
            places[:, 0] = plan.start
            places[:, 1:] = np.searchsorted(hits, (base[:, None] + needed[:, 1:]).reshape(-1)).reshape(len(needed), -1)
            reached = places < plan.end[:, None]
            np.minimum(places, plan.end[:, None] - 1, out=places)
            highest = np.maximum.reduceat(precision, places.reshape(-1)).reshape(places.shape)
            highest = np.maximum.accumulate(highest[:, ::-1], axis=1)[:, ::-1]
            table[plan.threshold, plan.category] = np.where(reached, highest, 0.0)
        table[:, to_find <= 0] = math.nan
        return table

    def _plan(self, area: str) -> _Plan:
        if area not in self._plans:
            self._plans[area] = self._make_plan(self._areas.index(area))
        return self._plans[area]

    def _make_plan(self, area: int) -> _Plan:
        keep = self._ignored[area] != _ALL_BITS
        bounds = np.append(0, np.cumsum(keep))[self._bounds]
        image, rank = self._image[keep], self._rank[keep]
        shifts = np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)[:, None]
        threshold, place = np.nonzero((self._hit[area][keep][None, :] >> shifts) & 1)
        left_threshold, left_place = np.nonzero((self._ignored[area][keep][None, :] >> shifts) & 1)
        categories = len(bounds) - 1
        segment = threshold * categories + np.searchsorted(bounds, place, side="right") - 1
        segments, start = np.unique(segment, return_index=True)
        end = np.append(start[1:], len(segment))
        class_start = bounds[segments % categories]
        width = len(image) + 1
        left_key = left_threshold * width + left_place
        return _Plan(
            image=image,
            hit_image=image[place],
            hit_rank=rank[place],
            hit_place=place,
            start=start,
            end=end,
            category=segments % categories,
            threshold=segments // categories,
            class_start=class_start,
            left_out_image=image[left_place],
            left_out_before=np.searchsorted(left_key, threshold * width + place),
            left_out_base=np.searchsorted(left_key, segments // categories * width + class_start),
        )

    def to_arrays(self) -> dict[str, Array]:
        """All that `values` needs, as arrays by name; bits are packed, and of the scores the order alone is kept."""
        head = {
            "iou_type": self.iou_type,
            "categories": list(self.category_names),
            "max_detections": self.max_detections,
            "samples": self._samples,
        }
        return {
            "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
            "bounds": self._bounds,
            "image": self._image,
            "rank": self._rank.astype(np.uint8 if self.max_detections <= 256 else np.int32),
            "hit": _packed(self._hit),
            "ignored": _packed(self._ignored),
            "truth_category": self._truth_category,
            "truth_image": self._truth_image,
            "truth_counts": self._truth_counts,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> CocoStatistics:
        """The inverse of `to_arrays`.

        Raises:
            MeasurementError: An array is missing, or the arrays contradict each other.
        """
        try:
            head = json.loads(np.asarray(arrays["head"], np.uint8).tobytes())
            iou_type, names = head["iou_type"], tuple(str(each) for each in head["categories"])
            most, samples = int(head["max_detections"]), int(head["samples"])
            given = {
                name: np.asarray(arrays[name])
                for name in ("bounds", "image", "rank", "truth_category", "truth_image", "truth_counts")
            }
            if iou_type not in DEFAULT_MAX_DETECTIONS or any(each.dtype.kind not in "iu" for each in given.values()):
                raise MeasurementError("its arrays are not of a known metric")
            areas, count = len(area_names(iou_type)), len(given["image"])
            hit, ignored = (_unpacked(arrays[name], (areas, count)) for name in ("hit", "ignored"))
        except MeasurementError as err:
            raise MeasurementError(f"stored detections cannot be read: {err.message}") from err
        except (KeyError, TypeError, ValueError) as err:
            raise MeasurementError(f"stored detections cannot be read: {type(err).__name__}: {err}") from err
        pairs = len(given["truth_image"])
        bounds = given["bounds"].astype(np.int64)
        fits = (
            samples > 0
            and bounds.shape == (len(names) + 1,)
            and len(names) > 0
            and bounds[0] == 0
            and bounds[-1] == count
            and bool((np.diff(bounds) >= 0).all())
            and given["rank"].shape == given["image"].shape == (count,)
            and given["truth_category"].shape == given["truth_image"].shape == (pairs,)
            and given["truth_counts"].shape == (pairs, areas)
            and _within(given["image"], samples)
            and _within(given["rank"], most)
            and _within(given["truth_image"], samples)
            and _within(given["truth_category"], len(names))
            and _within(given["truth_counts"].reshape(-1), 1 << 31)
            and not (hit & ignored).any()
        )
        if not fits:
            raise MeasurementError("stored detections cannot be read: their arrays contradict each other")
        return cls(
            iou_type=iou_type,
            category_names=names,
            max_detections=most,
            samples=samples,
            bounds=bounds,
            image=given["image"].astype(np.int32),
            rank=given["rank"].astype(np.int32),
            hit=hit,
            ignored=ignored,
            truth_category=given["truth_category"].astype(np.int32),
            truth_image=given["truth_image"].astype(np.int32),
            truth_counts=given["truth_counts"].astype(np.int32),
        )


def _within(values: Array, below: int) -> bool:
    given = values.astype(np.int64)
    return not len(given) or bool(given.min() >= 0 and given.max() < below)


def _packed(bits: _Bits) -> Array:
    """A bit for each area, threshold and detection, uint8."""
    shifts = np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)[None, :, None]
    return np.packbits(((bits[:, None, :] >> shifts) & 1).astype(np.uint8).reshape(-1))


def _unpacked(packed: Array, shape: tuple[int, int]) -> _Bits:
    areas, count = shape
    total = areas * len(IOU_THRESHOLDS) * count
    given = np.asarray(packed)
    if given.dtype != np.uint8 or given.shape != ((total + 7) // 8,):
        raise MeasurementError(f"{given.dtype} {list(given.shape)} is not one bit for each detection and threshold")
    bits = np.unpackbits(given.astype(np.uint8), count=total).reshape(areas, len(IOU_THRESHOLDS), count)
    powers = (1 << np.arange(len(IOU_THRESHOLDS))).astype(np.uint16)[None, :, None]
    found: _Bits = (bits * powers).sum(axis=1, dtype=np.uint16)
    return found


def _sums(weights: Floats, images: _Int32) -> Floats:
    """Weights of the first n of `images` for each n, float64 [len + 1]."""
    found = np.empty(len(images) + 1)
    found[0] = 0.0
    np.cumsum(weights.take(images), out=found[1:])
    return found


def _least_hits(to_find: Floats) -> Floats:
    """The least number of hits whose recall reaches each threshold, float64 [K, 101]: `hits / to_find >= threshold`."""
    total = np.where(to_find > 0, to_find, 1.0)[:, None]
    least = np.ceil(RECALL_THRESHOLDS[None, :] * total)
    least -= (least - 1.0) / total >= RECALL_THRESHOLDS[None, :]
    least += least / total < RECALL_THRESHOLDS[None, :]
    return least


def values_by_library(
    library: Library,
    targets: Sequence[ImageTarget],
    detections: Sequence[Detections],
    *,
    category_names: Mapping[int, str],
    iou_type: IouType = "bbox",
    max_detections: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """The same numbers by a library's own evaluation: slower, and nothing can be resampled; to hold ours against.

    Args:
        library: Which.
        targets: Of all images.
        detections: Of the same images.
        category_names: By category id.
        iou_type: What overlaps.
        max_detections: As in `CocoEvaluation`.
        sigmas: One for all categories, since the libraries have one; COCO's person where left out.

    Raises:
        BackendUnavailable: It is not installed.
        MeasurementError: It failed.
    """
    most = DEFAULT_MAX_DETECTIONS[iou_type] if max_detections is None else max_detections
    try:
        if library == "pycocotools":
            coco_class = importlib.import_module("pycocotools.coco").COCO
            evaluator = importlib.import_module("pycocotools.cocoeval").COCOeval
        else:
            package = importlib.import_module("faster_coco_eval")
            coco_class, evaluator = package.COCO, package.COCOeval_faster
    except ImportError as err:
        raise BackendUnavailable(f"{library} is not installed", hint='pip install "trt-gate[detection]"') from err
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            truth, answer = coco_class(), coco_class()
            truth.dataset = _coco_truth(targets, category_names, iou_type)
            answer.dataset = {**truth.dataset, "annotations": _coco_results(targets, detections, iou_type)}
            truth.createIndex()
            answer.createIndex()
            evaluation = evaluator(truth, answer, iou_type)
            evaluation.params.catIds = sorted(category_names)
            evaluation.params.maxDets = [most] if iou_type == "keypoints" else sorted({1, 10, most})
            if sigmas is not None:
                evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, np.float64)
            evaluation.evaluate()
            evaluation.accumulate()
            precision, recall = (np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
            limits = list(evaluation.params.maxDets)
    except Exception as err:
        raise MeasurementError(f"{library} failed: {type(err).__name__}: {err}") from err
    areas = area_names(iou_type)
    found: dict[str, float] = {}
    for name, summary in _summaries(iou_type).items():
        column = limits.index(most if summary.most is None else summary.most)
        rows = slice(None) if summary.threshold is None else slice(summary.threshold, summary.threshold + 1)
        table = (recall if summary.recall else precision)[rows, ..., areas.index(summary.area), column]
        found[name] = float(table[table > -1].mean()) if (table > -1).any() else math.nan
    for place, key in enumerate(sorted(category_names)):
        table = precision[:, :, place, 0, limits.index(most)]
        found[f"ap_of.{category_names[key]}"] = float(table.mean()) if (table > -1).all() else math.nan
    return found


def _coco_truth(targets: Sequence[ImageTarget], category_names: Mapping[int, str], iou_type: IouType) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for target in targets:
        for annotation in target.annotations:
            given = {**annotation, "image_id": target.image.image_id, "id": len(annotations) + 1}
            given["iscrowd"] = int(annotation.get("iscrowd", 0))
            if iou_type == "keypoints":
                given["num_keypoints"] = annotation.get(
                    "num_keypoints", sum(each > 0 for each in annotation["keypoints"][2::3])
                )
            annotations.append(given)
    images = [{"id": each.image.image_id, "width": each.image.width, "height": each.image.height} for each in targets]
    categories = [{"id": key, "name": name} for key, name in sorted(category_names.items())]
    return {"images": images, "categories": categories, "annotations": annotations}


def _coco_results(
    targets: Sequence[ImageTarget], detections: Sequence[Detections], iou_type: IouType
) -> list[dict[str, Any]]:
    """Detections as `COCO.loadRes` would make annotations of results that hold what `iou_type` looks at."""
    results: list[dict[str, Any]] = []
    for target, found in zip(targets, detections, strict=True):
        boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4).copy()
        boxes[:, 2:] -= boxes[:, :2]
        for place, (box, score, label) in enumerate(
            zip(boxes.tolist(), np.asarray(found.scores).tolist(), np.asarray(found.labels).tolist(), strict=True)
        ):
            one: dict[str, Any] = {
                "id": len(results) + 1,
                "image_id": target.image.image_id,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "score": score,
                "iscrowd": 0,
            }
            if iou_type == "segm" and found.masks is not None:
                one["segmentation"] = _predicted_rle(found.masks[place], target.image)
                one["area"] = float(_library("mask").area([one["segmentation"]])[0])
            elif iou_type == "keypoints" and found.keypoints is not None:
                points = np.asarray(found.keypoints[place], np.float64)
                one["keypoints"] = points.reshape(-1).tolist()
                size = points[:, :2].max(axis=0) - points[:, :2].min(axis=0)
                one["area"] = float(size[0] * size[1])
            results.append(one)
    return results
