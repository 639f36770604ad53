"""Decode: from a detector's raw outputs to boxes and scores of every candidate, still in the model's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.postprocess.boxes import AnyFloats, xyxy_from
from gate.postprocess.config import Postprocess
from gate.tensors import Array

_ENOUGH = 100
"""Fewer scores than these may all lie between 0 and 1 by chance, before an activation."""

_SUMS_TO_ONE = 1e-3


@dataclass(frozen=True)
class Candidates:
    """What a head says of each of its N places, in n images.

    Args:
        boxes: float32 or float64 [n, N, 4], xyxy, in the coordinates that the table declares, of the model's input.
        scores: [n, N, C], activation applied, background left out; or [n, N] where labels are apart.
        labels: int64 [n, N], background left out: -1 stands for it; or None.
    """

    boxes: AnyFloats
    scores: AnyFloats
    labels: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Grid:
    """Where each candidate of a grid head stands, in the order of its decode: map, anchor, row, column.

    Args:
        cell: float32 [N, 2], column and row.
        stride: float32 [N, 1], input pixels.
        anchor: float32 [N, 2], width and height in input pixels.
    """

    cell: npt.NDArray[np.float32]
    stride: npt.NDArray[np.float32]
    anchor: npt.NDArray[np.float32]


def decoded(outputs: Mapping[str, Array], config: Postprocess) -> Candidates:
    """Boxes and scores of every candidate of a batch.

    Args:
        outputs: By name, [n, ...]; those that the table does not name are not looked at.
        config: With its defaults filled in.

    Raises:
        MeasurementError: An output is missing, of another rank or size, or not of numbers; a score does not lie
            between 0 and 1, or scores have been activated already.
    """
    arrays = [_output(outputs, name, integers=name == config.labels) for name in config.output_names]
    if len({len(each) for each in arrays}) > 1:
        sizes = ", ".join(f"{name!r} {len(each)}" for name, each in zip(config.output_names, arrays, strict=True))
        raise MeasurementError(f"outputs hold different numbers of samples: {sizes}")
    if config.head == "yolo_grid":
        return _grid_head(arrays, config)
    if config.head == "yolo":
        return _yolo(arrays[0], config)
    boxes, scores = arrays[:2]
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise _wrong(str(config.boxes), boxes, "[n, N, 4]")
    corners = xyxy_from(boxes, str(config.format))
    name = str(config.logits if config.head == "detr" else config.scores)
    if config.labels is not None:
        return _labelled(corners, scores, arrays[2], config)
    if scores.ndim != 3 or scores.shape[1] != boxes.shape[1]:
        raise _wrong(name, scores, f"[n, {boxes.shape[1]}, C]")
    return Candidates(corners, _class_scores(scores, config, name))


def grid(shapes: list[tuple[int, int]], config: Postprocess) -> Grid:
    """Where the candidates of a grid head stand.

    Args:
        shapes: Height and width of each map, in cells.
        config: Its anchors and strides.
    """
    cells, strides, anchors = [], [], []
    for (height, width), stride, sizes in zip(shapes, config.strides, config.anchors, strict=True):
        rows, columns = np.mgrid[:height, :width]
        cell = np.stack([columns.reshape(-1), rows.reshape(-1)], axis=1).astype(np.float32)
        cells.append(np.tile(cell, (len(sizes), 1)))
        strides.append(np.full((len(sizes) * height * width, 1), stride, np.float32))
        anchors.append(np.repeat(np.array(sizes, np.float32), height * width, axis=0))
    return Grid(np.concatenate(cells), np.concatenate(strides), np.concatenate(anchors))


def sigmoid(values: AnyFloats) -> AnyFloats:
    """The logistic function, without overflow."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).astype(values.dtype)


def softmax(values: AnyFloats) -> AnyFloats:
    """Over the last axis, without overflow."""
    raised = np.exp(values - values.max(axis=-1, keepdims=True))
    found: AnyFloats = raised / raised.sum(axis=-1, keepdims=True)
    return found


def _output(outputs: Mapping[str, Array], name: str, *, integers: bool = False) -> AnyFloats:
    """One output as float32 or float64."""
    if name not in outputs:
        there = ", ".join(repr(each) for each in outputs) or "none"
        raise MeasurementError(
            f"there is no output {name!r}; the model has {there}", hint="[postprocess] names the outputs it reads."
        )
    array = np.asarray(outputs[name])
    if array.dtype.kind != "f" and not (integers and array.dtype.kind in "iu"):
        raise MeasurementError(f"output {name!r} is {array.dtype}; detections are made of floats")
    if array.ndim < 1:
        raise MeasurementError(f"output {name!r} is one number; it needs an axis of samples")
    return cast("AnyFloats", array if array.dtype == np.float64 else array.astype(np.float32, copy=False))


def _wrong(name: str, array: AnyFloats, expected: str) -> MeasurementError:
    return MeasurementError(f"output {name!r} is {list(array.shape)}, expected {expected}")


def _grid_head(maps: list[AnyFloats], config: Postprocess) -> Candidates:
    """YOLOv5's decode. Source: ultralytics/yolov5, models/yolo.py, Detect.forward."""
    each = 5 + config.classes
    rows, shapes = [], []
    for name, array, anchors in zip(config.outputs, maps, config.anchors, strict=True):
        count = len(anchors)
        if array.ndim == 4 and array.shape[1] == count * each:
            height, width = array.shape[2:]
            split = array.reshape(len(array), count, each, height, width).transpose(0, 1, 3, 4, 2)
        elif array.ndim == 5 and array.shape[1] == count and array.shape[4] == each:
            height, width = array.shape[2:4]
            split = array
        else:
            expected = (
                f"[n, {count * each}, H, W] or [n, {count}, H, W, {each}] ({count} anchors, {config.classes} classes)"
            )
            raise _wrong(name, array, expected)
        shapes.append((height, width))
        rows.append(split.reshape(len(array), count * height * width, each))
    raw = np.concatenate(rows, axis=1)
    values = _activated(raw, config, "the maps")
    places = grid(shapes, config)
    double = values[..., :4] * values.dtype.type(2)
    centre = (double[..., :2] - values.dtype.type(0.5) + places.cell) * places.stride
    size = double[..., 2:] ** 2 * places.anchor
    boxes = xyxy_from(np.concatenate([centre, size], axis=-1), "cxcywh")
    return Candidates(boxes, values[..., 4:5] * values[..., 5:])


def _yolo(array: AnyFloats, config: Postprocess) -> Candidates:
    name = config.outputs[0]
    if array.ndim != 3 or array.shape[1] != 4 + config.classes:
        raise _wrong(name, array, f"[n, {4 + config.classes}, N]: 4 numbers of the box and {config.classes} classes")
    places = array.transpose(0, 2, 1)
    return Candidates(xyxy_from(places[..., :4], str(config.format)), _class_scores(places[..., 4:], config, name))


def _labelled(boxes: AnyFloats, scores: AnyFloats, labels: AnyFloats, config: Postprocess) -> Candidates:
    for name, array in ((config.scores, scores), (config.labels, labels)):
        if array.shape != boxes.shape[:2]:
            raise _wrong(str(name), array, str(list(boxes.shape[:2])))
    with np.errstate(invalid="ignore"):
        whole = np.rint(labels).astype(np.int64)
    if not np.array_equal(whole, labels):
        raise MeasurementError(f"output {config.labels!r} holds labels that are no whole numbers")
    if config.background_class == "first":
        whole = whole - 1
    elif config.background_class == "last":
        whole = np.where(whole == config.classes, -1, whole)
    least = 0 if config.background_class == "none" else -1
    if ((whole < least) | (whole >= config.classes)).any():
        odd = int(labels.reshape(-1)[np.flatnonzero((whole < least) | (whole >= config.classes))[0]])
        raise MeasurementError(
            f"output {config.labels!r} has class {odd}, which has no category id: there are {config.classes}",
            hint="category_ids lists one for each class; background_class says whether one stands for no object.",
        )
    return Candidates(boxes, _activated(scores, config, str(config.scores)), whole)


def _class_scores(raw: AnyFloats, config: Postprocess, name: str) -> AnyFloats:
    """Scores [n, N, C] with the activation applied and the background left out."""
    columns = config.classes + (config.background_class != "none")
    if raw.shape[2] != columns:
        background = "" if columns == config.classes else " and the background"
        raise MeasurementError(
            f"output {name!r} has {raw.shape[2]} classes; category_ids has {config.classes}{background}",
            hint="category_ids lists one for each class; background_class says whether one stands for no object.",
        )
    values = _activated(raw, config, name)
    if config.background_class == "first":
        return values[..., 1:]
    return values[..., :-1] if config.background_class == "last" else values


def _activated(raw: AnyFloats, config: Postprocess, name: str) -> AnyFloats:
    is_fraction = bool(((raw >= 0) & (raw <= 1)).all())
    if config.activation == "none":
        checked = raw[..., 4:] if config.head == "yolo_grid" else raw
        if not bool(((checked >= 0) & (checked <= 1)).all()):
            raise MeasurementError(
                f"scores of {name!r} lie between {checked.min():g} and {checked.max():g}, not between 0 and 1",
                hint='Declare activation = "sigmoid" or "softmax" in [postprocess]; with "none" they are probabilities.',
            )
        return raw
    sums = config.activation != "softmax" or bool(np.allclose(raw.sum(axis=-1), 1, atol=_SUMS_TO_ONE))
    if is_fraction and sums and raw.size >= _ENOUGH:
        raise MeasurementError(
            f"scores of {name!r} are probabilities already, and a second {config.activation} would flatten them",
            hint='Declare activation = "none" in [postprocess].',
        )
    return sigmoid(raw) if config.activation == "sigmoid" else softmax(raw)


def finite_rows(array: Array) -> npt.NDArray[np.bool_]:
    """Which samples of an output [n, ...] hold finite numbers alone; bool [n]."""
    values: npt.NDArray[Any] = np.asarray(array)
    found: npt.NDArray[np.bool_] = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return found
