"""Boxes: their formats, conversions between them, overlap, clipping.

The last axis is the box. xyxy are the corners, xywh the upper left corner and the size, cxcywh the centre and the size;
in pixels or as fractions of the width and height of what the box lies in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError

AnyFloats = npt.NDArray[np.floating[Any]]


def xyxy_from_xywh(boxes: AnyFloats) -> AnyFloats:
    """Corners of boxes [..., 4] given by their upper left corner and size."""
    corner, size = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([corner, corner + size], axis=-1)


def xyxy_from_cxcywh(boxes: AnyFloats) -> AnyFloats:
    """Corners of boxes [..., 4] given by their centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] * boxes.dtype.type(0.5)
    return np.concatenate([centre - half, centre + half], axis=-1)


def xywh_from_xyxy(boxes: AnyFloats) -> AnyFloats:
    """Upper left corner and size of boxes [..., 4] given by their corners."""
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def cxcywh_from_xyxy(boxes: AnyFloats) -> AnyFloats:
    """Centre and size of boxes [..., 4] given by their corners."""
    half = boxes.dtype.type(0.5)
    return np.concatenate([(boxes[..., :2] + boxes[..., 2:]) * half, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def xyxy_from(boxes: AnyFloats, box_format: str) -> AnyFloats:
    """Corners of boxes [..., 4] in a format.

    Raises:
        MeasurementError: They are no boxes, or there is no such format.
    """
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise MeasurementError(f"boxes must have 4 numbers each, got {list(boxes.shape)}")
    if box_format == "xyxy":
        return boxes
    if box_format == "xywh":
        return xyxy_from_xywh(boxes)
    if box_format == "cxcywh":
        return xyxy_from_cxcywh(boxes)
    raise MeasurementError(f"no box format {box_format!r}; there is xyxy, xywh, cxcywh")


def pixels_from_normalized(boxes: AnyFloats, *, width: float, height: float) -> AnyFloats:
    """Boxes [..., 4] in pixels, of any format, given as fractions of a width and height in pixels."""
    return boxes * np.array([width, height, width, height], boxes.dtype)


def normalized_from_pixels(boxes: AnyFloats, *, width: float, height: float) -> AnyFloats:
    """Boxes [..., 4] as fractions of a width and height in pixels, of any format."""
    return boxes / np.array([width, height, width, height], boxes.dtype)


def ordered(boxes: AnyFloats) -> AnyFloats:
    """Boxes [..., 4], xyxy, with the lesser corner first."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=-1)


def area(boxes: AnyFloats) -> AnyFloats:
    """Of boxes [..., 4], xyxy, in their unit squared; 0 where a side is negative."""
    size = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    found: AnyFloats = size[..., 0] * size[..., 1]
    return found


def iou_matrix(first: AnyFloats, second: AnyFloats) -> AnyFloats:
    """Intersection over union of each box [n, 4] with each [m, 4], xyxy: [n, m]; 0 where one has no area.

    Computed in the dtype of the boxes, in the order of ONNX Runtime's NonMaxSuppression, so that a threshold decides alike.
    Source: onnxruntime, core/providers/cpu/object_detection/non_max_suppression_helper.h, SuppressByIOU.
    """
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    size = np.maximum(np.minimum(first[:, None, 2:], second[None, :, 2:]) - corner, 0)
    intersection = size[..., 0] * size[..., 1]
    one, two = area(first), area(second)
    union = one[:, None] + two[None, :] - intersection
    valid = (intersection > 0) & (one > 0)[:, None] & (two > 0)[None, :] & (union > 0)
    found: AnyFloats = np.divide(intersection, union, out=np.zeros_like(intersection), where=valid)
    return found


def clipped(boxes: AnyFloats, *, width: float, height: float) -> AnyFloats:
    """Boxes [..., 4], xyxy, pixels, within an image; one that lies outside has no area left, at its border."""
    edge = np.array([width, height, width, height], boxes.dtype)
    found: AnyFloats = np.clip(boxes, 0, edge)
    return found
