"""Detections in the image's own pixels, from a detector's raw outputs or from what a graph with NMS inside gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError, SpecError
from gate.postprocess.boxes import AnyFloats, clipped, iou_matrix, ordered, pixels_from_normalized
from gate.postprocess.config import Postprocess, require_consistent
from gate.postprocess.heads import Candidates, decoded, finite_rows
from gate.postprocess.nms import Selected, best_first, candidates, suppressed
from gate.targets import Detections, Floats, ImageRecord
from gate.tensors import Array

NMS_OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
"""What a graph with NMS inside gives: int32 [n, 1], float [n, K, 4] xyxy, float [n, K], int32 [n, K]."""

FILLER = -32768.0
"""The score of what EfficientNMS_TRT counts as a detection though it lies below a score threshold under 0.007.

Source: TensorRT, plugin/efficientNMSPlugin/efficientNMSInference.cu, EfficientNMSDenseIndex.
"""

_ENOUGH_BOXES = 20
_BEYOND = 2.0


def detections_from_outputs(
    outputs: Mapping[str, Array],
    images: Sequence[ImageRecord],
    config: Postprocess,
    *,
    input_size: tuple[int, int] | None = None,
) -> tuple[Detections, ...]:
    """Detections of each image of a batch: decoded, suppressed, in the image's pixels, clipped to it, best first.

    Args:
        outputs: The model's raw outputs by name, [n, ...].
        images: How each of the n images became the model's input.
        config: What the outputs mean.
        input_size: Height and width of the model's input in pixels; needed where coordinates are normalized.

    Raises:
        SpecError: The table contradicts itself.
        MeasurementError: An output is missing, of another rank, of another number of samples than there are images, or
            not finite; a score does not lie between 0 and 1; a class has no category id; boxes are plainly not what the
            table declares; or the input's size is needed and not given.
    """
    config = require_consistent(config)
    _require_finite(outputs, config.output_names, images)
    with np.errstate(over="ignore", invalid="ignore"):
        found = decoded(outputs, config)
    _require_finite({"boxes": found.boxes, "scores": found.scores}, ("boxes", "scores"), images, decoded=True)
    kept = [_kept(found, index, config) for index in range(len(images))]
    _require_plausible([found.boxes[index][each.boxes] for index, each in enumerate(kept)], config)
    return tuple(
        _detections(found.boxes[index], _final(found.boxes[index], each, config), image, config, input_size)
        for index, (image, each) in enumerate(zip(images, kept, strict=True))
    )


def detections_from_nms_outputs(
    outputs: Mapping[str, Array],
    images: Sequence[ImageRecord],
    config: Postprocess,
    *,
    input_size: tuple[int, int] | None = None,
) -> tuple[Detections, ...]:
    """Detections of each image of a batch from a graph with decode and NMS inside, made by `gate.lower.nms`.

    Args:
        outputs: `num_detections` [n, 1], `detection_boxes` [n, K, 4], `detection_scores` [n, K], `detection_classes`
            [n, K]; others are not looked at.
        images: How each of the n images became the model's input.
        config: What was put into the graph.
        input_size: As of `detections_from_outputs`.

    Raises:
        SpecError: The table contradicts itself.
        MeasurementError: An output is missing or of another shape; a count is not between 0 and K; a detection is not
            finite, below the score threshold, out of order or of a class without a category id; boxes of one class
            overlap far more than the threshold allows; or the input's size is needed and not given.
    """
    config = require_consistent(config)
    missing = [name for name in NMS_OUTPUTS if name not in outputs]
    if missing:
        there = ", ".join(repr(each) for each in outputs) or "none"
        raise MeasurementError(f"there is no output {missing[0]!r}; the graph has {there}")
    counts, boxes, scores, classes = (np.asarray(outputs[name]) for name in NMS_OUTPUTS)
    n, k = len(images), scores.shape[1] if scores.ndim == 2 else 0
    expected = {"num_detections": (n, 1), "detection_boxes": (n, k, 4), "detection_scores": (n, k)}
    expected["detection_classes"] = (n, k)
    for name, array in zip(NMS_OUTPUTS, (counts, boxes, scores, classes), strict=True):
        kinds = "f" if name in ("detection_boxes", "detection_scores") else "iu"
        if array.shape != expected[name] or array.dtype.kind not in kinds:
            raise MeasurementError(
                f"output {name!r} is {array.dtype} {list(array.shape)}, expected "
                f"{'floats' if kinds == 'f' else 'integers'} {list(expected[name])}"
            )
    found = []
    for index, image in enumerate(images):
        count = int(counts[index, 0])
        if not 0 <= count <= k:
            raise MeasurementError(f"num_detections is {count}, and there are {k} places", where=_named(image))
        corners = np.asarray(boxes[index, :count], np.float64)
        selected = Selected(
            np.arange(count), np.asarray(classes[index, :count], np.int64), np.asarray(scores[index, :count])
        )
        selected = selected[selected.scores != FILLER]
        _require_suppressed(corners[selected.boxes], selected, config, image)
        found.append(_detections(corners, selected[: config.max_detections], image, config, input_size))
    return tuple(found)


def other_conventions(
    outputs: Mapping[str, Array],
    images: Sequence[ImageRecord],
    config: Postprocess,
    *,
    input_size: tuple[int, int] | None = None,
) -> dict[str, tuple[Detections, ...]]:
    """What the same outputs would mean if one thing were not as it is declared, by a sentence that says which.

    Args:
        outputs: As of `detections_from_outputs`.
        images: Likewise.
        config: What the outputs were taken to mean.
        input_size: Height and width of the model's input in pixels.

    Returns:
        Those readings that can be made; the formats and coordinates of boxes, x and y swapped, boxes that the model has
        mapped to the image already, images that were letterboxed or stretched with nothing recorded, and another order.
    """
    config = config.resolved()
    readings: dict[str, tuple[Mapping[str, Array], Sequence[ImageRecord], Postprocess]] = {}
    if config.head != "yolo_grid":
        for other in ("xyxy", "xywh", "cxcywh"):
            if other != config.format:
                said = f"the model's boxes are {other} and were read as {config.format}"
                readings[said] = (outputs, images, msgspec.structs.replace(config, format=other))
        for other in ("pixels", "normalized"):
            if other != config.coordinates:
                said = f"the model's boxes are {_UNITS[other]} and were read as {_UNITS[str(config.coordinates)]}"
                readings[said] = (outputs, images, msgspec.structs.replace(config, coordinates=other))
        readings["x and y are swapped"] = (_with_swapped_axes(outputs, config), images, config)
    plain = [replace(each, scale_x=1.0, scale_y=1.0, left=0.0, top=0.0) for each in images]
    readings["the model's boxes are in pixels of the image already and were mapped to it a second time"] = (
        outputs,
        plain,
        config,
    )
    if input_size is not None:
        for how, places in (("letterboxed", _letterboxed), ("stretched", _stretched)):
            said = f"the images were {how} to {input_size[1]} x {input_size[0]} and their records said so"
            readings[said] = (outputs, [places(each, input_size) for each in images], config)
    arrays = {name: np.asarray(outputs[name]) for name in config.output_names if name in outputs}
    for said, order in (
        ("each answer is that of the image before", np.roll(np.arange(len(images)), -1)),
        ("each answer is that of the image after", np.roll(np.arange(len(images)), 1)),
        ("the answers are in the reverse order of the images", np.arange(len(images))[::-1]),
    ):
        if len(images) > 1 and all(each.ndim and len(each) == len(images) for each in arrays.values()):
            readings[said] = ({name: each[order] for name, each in arrays.items()}, images, config)
    found: dict[str, tuple[Detections, ...]] = {}
    for said, (values, records, read) in readings.items():
        try:
            found[said] = detections_from_outputs(values, records, read, input_size=input_size)
        except (MeasurementError, SpecError):
            continue
    return found


_UNITS = {"pixels": "pixels of the input", "normalized": "fractions of the input"}


def _with_swapped_axes(outputs: Mapping[str, Array], config: Postprocess) -> dict[str, Array]:
    found = dict(outputs)
    if config.head == "yolo" and config.outputs[0] in found:
        array = np.asarray(found[config.outputs[0]])
        if array.ndim == 3 and array.shape[1] >= 4:
            found[config.outputs[0]] = array[:, [1, 0, 3, 2, *range(4, array.shape[1])]]
    elif config.boxes in found:
        array = np.asarray(found[config.boxes])
        if array.ndim == 3 and array.shape[2] == 4:
            found[config.boxes] = array[..., [1, 0, 3, 2]]
    return found


def _letterboxed(image: ImageRecord, size: tuple[int, int]) -> ImageRecord:
    scale = min(size[0] / image.height, size[1] / image.width)
    left, top = (size[1] - round(image.width * scale)) // 2, (size[0] - round(image.height * scale)) // 2
    return replace(image, scale_x=scale, scale_y=scale, left=float(left), top=float(top))


def _stretched(image: ImageRecord, size: tuple[int, int]) -> ImageRecord:
    return replace(image, scale_x=size[1] / image.width, scale_y=size[0] / image.height, left=0.0, top=0.0)


def in_image(boxes: AnyFloats, image: ImageRecord) -> Floats:
    """Boxes [n, 4], xyxy, of the model's input in pixels, as pixels of the image, clipped to it; float64."""
    shift = np.array([image.left, image.top, image.left, image.top], np.float64)
    scale = np.array([image.scale_x, image.scale_y, image.scale_x, image.scale_y], np.float64)
    mapped = (np.asarray(boxes, np.float64) - shift) / scale
    within: Floats = clipped(ordered(mapped), width=image.width, height=image.height).astype(np.float64)
    return within


def _named(image: ImageRecord) -> str:
    return f"image {image.image_id} ({image.file_name})" if image.file_name else f"image {image.image_id}"


def _require_finite(
    outputs: Mapping[str, Array], names: Sequence[str], images: Sequence[ImageRecord], *, decoded: bool = False
) -> None:
    """Every output holds one finite entry for each image; a missing one is left to the decode."""
    for name in names:
        if name not in outputs:
            continue
        array: npt.NDArray[Any] = np.asarray(outputs[name])
        if array.ndim < 1 or len(array) != len(images):
            count = len(array) if array.ndim else "no"
            raise MeasurementError(f"output {name!r} holds {count} samples, and there are {len(images)} images")
        if array.dtype.kind == "f" and not (finite := finite_rows(array)).all():
            image = images[int(np.flatnonzero(~finite)[0])]
            what = f"{name} decoded from the outputs hold" if decoded else f"output {name!r} holds"
            raise MeasurementError(f"{what} NaN or Inf", where=_named(image))


def _kept(found: Candidates, index: int, config: Postprocess) -> Selected:
    """The candidates of one image whose score is above the threshold."""
    scores = found.scores[index]
    if found.labels is None:
        return candidates(scores, score_threshold=config.score_threshold, best=config.labels_per_box == "best")
    labels = found.labels[index]
    chosen = np.flatnonzero((scores > scores.dtype.type(config.score_threshold)) & (labels >= 0))
    return Selected(chosen, labels[chosen], scores[chosen])


def _final(boxes: AnyFloats, kept: Selected, config: Postprocess) -> Selected:
    """What is left of an image's candidates after suppression, or the best of all where there is none."""
    if not config.nms:
        return best_first(kept)[: config.max_detections]
    return suppressed(
        boxes,
        kept,
        iou_threshold=config.iou_threshold,
        max_detections=config.max_detections,
        class_agnostic=config.class_agnostic,
    )


def _require_plausible(boxes: Sequence[AnyFloats], config: Postprocess) -> None:
    """Boxes above the score threshold look like what the table declares; few of them say nothing."""
    every = np.concatenate([np.zeros((0, 4)), *boxes])
    if len(every) < _ENOUGH_BOXES:
        return
    turned = float(((every[:, 2] < every[:, 0]) | (every[:, 3] < every[:, 1])).mean())
    if turned > 0.5:
        raise MeasurementError(
            f"{turned:.0%} of the boxes end left of or above their beginning, read as {config.format}",
            hint="Declare the format that the model writes: xyxy, xywh or cxcywh.",
        )
    beyond = np.abs(every).max(axis=1)
    if config.coordinates == "normalized" and float((beyond > _BEYOND).mean()) > 0.5:
        raise MeasurementError(
            f"boxes reach {beyond.max():g}, and they are declared as fractions of the input",
            hint='Declare coordinates = "pixels" in [postprocess].',
        )
    if config.coordinates == "pixels" and float(beyond.max()) <= _BEYOND:
        raise MeasurementError(
            f"no box reaches further than {beyond.max():g}, and they are declared as pixels of the input",
            hint='Declare coordinates = "normalized" in [postprocess].',
        )


def _require_suppressed(boxes: AnyFloats, found: Selected, config: Postprocess, image: ImageRecord) -> None:
    """What a graph gives as suppressed is finite, in order, above the threshold, and does not overlap beyond reason."""
    where = _named(image)
    if not (np.isfinite(boxes).all() and np.isfinite(found.scores).all()):
        raise MeasurementError("a detection holds NaN or Inf", where=where)
    if len(found) == 0:
        return
    scores = np.asarray(found.scores, np.float64)
    slack = float(np.finfo(found.scores.dtype).eps)
    if (scores < config.score_threshold - slack).any() or (scores > 1 + slack).any():
        raise MeasurementError(
            f"scores lie between {scores.min():g} and {scores.max():g}, expected {config.score_threshold:g} to 1",
            where=where,
            hint="Is the graph made with another score_threshold or activation than [postprocess] has?",
        )
    if (np.diff(scores) > 0).any():
        raise MeasurementError("detections are not in the order of their scores", where=where)
    if ((found.classes < 0) | (found.classes >= config.classes)).any():
        odd = int(found.classes[(found.classes < 0) | (found.classes >= config.classes)][0])
        raise MeasurementError(f"class {odd} has no category id: there are {config.classes}", where=where)
    corners = ordered(boxes)
    overlap = iou_matrix(corners, corners)
    np.fill_diagonal(overlap, 0)
    if not config.class_agnostic:
        overlap = np.where(found.classes[:, None] == found.classes[None, :], overlap, 0)
    if float(overlap.max()) > (1 + config.iou_threshold) / 2:
        same = "" if config.class_agnostic else " of one class"
        raise MeasurementError(
            f"boxes{same} overlap by {overlap.max():.3g}, and iou_threshold is {config.iou_threshold:g}",
            where=where,
            hint="Is the graph made with another iou_threshold? EfficientNMS_TRT of TensorRT 8.6.0 knows no class_agnostic."
            if config.class_agnostic
            else "Is the graph made with another iou_threshold?",
        )


def _detections(
    boxes: AnyFloats, found: Selected, image: ImageRecord, config: Postprocess, input_size: tuple[int, int] | None
) -> Detections:
    chosen = boxes[found.boxes]
    if config.coordinates == "normalized":
        if input_size is None:
            raise MeasurementError(
                "boxes are fractions of the model's input, and its size is not known",
                hint='The input needs an axis for height and width, or coordinates = "pixels".',
            )
        chosen = pixels_from_normalized(chosen, width=input_size[1], height=input_size[0])
    return Detections(
        boxes=in_image(chosen, image),
        scores=np.asarray(found.scores, np.float64),
        labels=np.array(config.category_ids, np.int64)[found.classes],
    )
