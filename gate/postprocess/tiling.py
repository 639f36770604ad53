"""Tiles over an image that is larger than the model's input, and what was found in them put together again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.postprocess.nms import Selected, suppressed
from gate.targets import Detections, ImageRecord
from gate.tensors import Array

_AT_EDGE_PX = 1.0
"""A box that ends within this of an inner edge of its tile is taken as cut off by it."""


@dataclass(frozen=True)
class Tile:
    """A part of an image, in its pixels.

    Args:
        left, top: Where it begins.
        width, height: At most the tiles' size; less where the image is smaller.
    """

    left: int
    top: int
    width: int
    height: int


def tiles_of(width: int, height: int, *, size: int, overlap: float) -> tuple[Tile, ...]:
    """Tiles that cover an image, row by row; neighbours overlap by the fraction at least, the last ones by more.

    Args:
        width, height: Of the image, pixels.
        size: Of a tile, pixels.
        overlap: Fraction of a tile, from 0 up to, not including, 1.

    Raises:
        MeasurementError: The image is empty, the size is below 1 or the overlap leaves no step of a pixel.
    """
    if width < 1 or height < 1 or size < 1:
        raise MeasurementError(f"no tiles of {size} pixels over an image of {width} x {height}")
    if not 0.0 <= overlap < 1.0 or size - overlap_px(size, overlap) < 1:
        raise MeasurementError(f"tiles of {size} pixels cannot overlap by {overlap:g}; it must be from 0 to below 1")
    step = size - overlap_px(size, overlap)
    return tuple(
        Tile(left, top, min(size, width), min(size, height))
        for top, left in itertools.product(_starts(height, size, step), _starts(width, size, step))
    )


def overlap_px(size: int, overlap: float) -> int:
    """How far neighbouring tiles overlap at least, pixels."""
    return int(np.ceil(size * overlap - 1e-9))


def _starts(length: int, size: int, step: int) -> tuple[int, ...]:
    last = max(length - size, 0)
    return (*range(0, last, step), last)


def tile_pixels(image: Array, tile: Tile) -> Array:
    """The pixels of a tile, [tile.height, tile.width, ...], as a view of the image.

    Args:
        image: [H, W] or [H, W, channels].
        tile: Within the image.

    Raises:
        MeasurementError: The tile is empty or reaches beyond the image.
    """
    part = image[max(tile.top, 0) : tile.top + tile.height, max(tile.left, 0) : tile.left + tile.width]
    if part.shape[:2] != (tile.height, tile.width) or part.size == 0:
        raise MeasurementError(f"{tile} does not fit an image of {list(image.shape)}")
    return part


def merged(
    found: Sequence[Detections],
    tiles: Sequence[Tile],
    image: ImageRecord,
    *,
    overlap: int,
    iou_threshold: float,
    max_detections: int,
    class_agnostic: bool = False,
) -> Detections:
    """Detections of the tiles of an image as detections of the image, each object once, best first.

    A box that is cut off by the inner edge of its tile, and reaches into it no further than tiles overlap, is dropped:
    the neighbouring tile sees more of that object. What is left is suppressed over all tiles together.

    Args:
        found: Of each tile, boxes in the tile's pixels.
        tiles: In the same order.
        image: The image.
        overlap: How far neighbouring tiles overlap at least, pixels: `overlap_px`.
        iou_threshold: Of the suppression over all tiles.
        max_detections: At most so many are kept.
        class_agnostic: Boxes drop those of other categories too.

    Raises:
        MeasurementError: There is no tile, detections are of another number than tiles, a tile reaches beyond the
            image, or a value is not finite.
    """
    if not tiles or len(found) != len(tiles):
        raise MeasurementError(f"there are detections of {len(found)} tiles, and {len(tiles)} tiles")
    boxes, scores, labels = [], [], []
    for each, tile in zip(found, tiles, strict=True):
        if each.masks is not None or each.keypoints is not None:
            raise MeasurementError("masks and keypoints of tiles cannot be put together; boxes can")
        if tile.left + tile.width > image.width or tile.top + tile.height > image.height:
            raise MeasurementError(f"{tile} reaches beyond the image of {image.width} x {image.height} pixels")
        whole = ~_cut_off(each.boxes, tile, image, overlap)
        offset = np.array([tile.left, tile.top, tile.left, tile.top], np.float64)
        boxes.append(each.boxes[whole] + offset)
        scores.append(each.scores[whole])
        labels.append(each.labels[whole])
    every, score, label = np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels)
    kept = suppressed(
        every,
        Selected(np.arange(len(every)), label, score),
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        class_agnostic=class_agnostic,
    )
    return Detections(boxes=every[kept.boxes], scores=np.asarray(kept.scores, np.float64), labels=kept.classes)


def _cut_off(boxes: npt.NDArray[np.float64], tile: Tile, image: ImageRecord, overlap: int) -> npt.NDArray[np.bool_]:
    """Which boxes [n, 4] of a tile end at its inner edge, and so near it that a neighbour sees more of the object."""
    found = np.zeros(len(boxes), np.bool_)
    axes = ((0, tile.left, tile.width, image.width), (1, tile.top, tile.height, image.height))
    for axis, start, length, whole in axes:
        first, last = boxes[:, axis], boxes[:, axis + 2]
        if start > 0:
            found |= (first <= _AT_EDGE_PX) & (last < overlap - _AT_EDGE_PX)
        if start + length < whole:
            found |= (last >= length - _AT_EDGE_PX) & (first > length - overlap + _AT_EDGE_PX)
    return found
