"""Predictions in COCO's results form: a list of `{image_id, category_id, bbox [x, y, width, height], score}`.

Masks stand there as `segmentation`, a COCO RLE; keypoints as `keypoints`, x, y and score K times.
Source: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gate.errors import DataError
from gate.targets import Detections, ImageRecord

_NAMED = 20


def results_from_detections(detections: Iterable[Detections], images: Iterable[ImageRecord]) -> list[dict[str, Any]]:
    """Detections as COCO has them, image by image, best first.

    Args:
        detections: Of each image.
        images: In the same order.
    """
    found: list[dict[str, Any]] = []
    for each, image in zip(detections, images, strict=True):
        for row in range(len(each.scores)):
            left, top, right, bottom = (float(value) for value in each.boxes[row])
            one: dict[str, Any] = {
                "image_id": image.image_id,
                "category_id": int(each.labels[row]),
                "bbox": [left, top, right - left, bottom - top],
                "score": float(each.scores[row]),
            }
            if each.masks is not None:
                one["segmentation"] = dict(each.masks[row])
            if each.keypoints is not None:
                one["keypoints"] = [float(value) for value in each.keypoints[row].reshape(-1)]
            found.append(one)
    return found


def detections_from_results(results: Any, images: Sequence[ImageRecord], *, where: str) -> tuple[Detections, ...]:
    """The detections of each image, best first; none for an image without a result.

    Args:
        results: COCO's list, as `json.load` gives it.
        images: All images of the ground truth, in the order of the answer.
        where: For errors.

    Raises:
        DataError: It is no such list; a result is malformed, not finite, or of an image that is not among them. All of it
            is listed.
    """
    if not isinstance(results, list):
        raise DataError(f"is a {type(results).__name__}, expected a list of results", where=where)
    places = {image.image_id: index for index, image in enumerate(images)}
    rows: list[list[Mapping[str, Any]]] = [[] for _ in images]
    problems: list[str] = []
    for index, one in enumerate(results):
        problem = _problem(one, places)
        if problem is None:
            rows[places[one["image_id"]]].append(one)
        else:
            problems.append(f"result {index}: {problem}")
    if problems:
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{count}:\n  " + "\n  ".join(problems[:_NAMED]) + more, where=where)
    return tuple(_of_image(each) for each in rows)


def _problem(one: Any, places: Mapping[int, int]) -> str | None:
    """What is wrong with a result; None where nothing is."""
    if not isinstance(one, dict):
        return f"is a {type(one).__name__}, expected a table"
    for key in ("image_id", "category_id"):
        if not isinstance(one.get(key), int) or isinstance(one.get(key), bool):
            return f"{key} is {one.get(key)!r}, expected a whole number"
    if one["image_id"] not in places:
        return f"image_id {one['image_id']} is not in the ground truth"
    if not _is_number(one.get("score")):
        return f"score is {one.get('score')!r}, expected a finite number"
    box = one.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox is {box!r}, expected [x, y, width, height]"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {box} has a negative size; is it x1, y1, x2, y2?"
    points = one.get("keypoints")
    if points is not None and (not isinstance(points, list) or len(points) % 3 or not all(map(_is_number, points))):
        return "keypoints are not x, y and score, K times"
    mask = one.get("segmentation")
    if mask is not None and not (isinstance(mask, dict) and {"size", "counts"} <= mask.keys()):
        return "segmentation is no RLE with size and counts"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _of_image(rows: Sequence[Mapping[str, Any]]) -> Detections:
    ordered = sorted(rows, key=lambda each: -each["score"])
    boxes = np.array([each["bbox"] for each in ordered], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    has_masks = bool(ordered) and all("segmentation" in each for each in ordered)
    has_points = bool(ordered) and all("keypoints" in each for each in ordered)
    return Detections(
        boxes=boxes,
        scores=np.array([each["score"] for each in ordered], dtype=np.float64),
        labels=np.array([each["category_id"] for each in ordered], dtype=np.int64),
        masks=tuple(each["segmentation"] for each in ordered) if has_masks else None,
        keypoints=np.array([each["keypoints"] for each in ordered], np.float64).reshape(len(ordered), -1, 3)
        if has_points
        else None,
    )
