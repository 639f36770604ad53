"""Greedy non-maximum suppression, as ONNX's NonMaxSuppression defines it.

Best first; of equal scores the lower index is the better. A box is dropped where its IoU with a kept one is above the
threshold, and a candidate where its score is not above the score threshold. A box without area neither drops nor is
dropped, and corners may come in any order.
Source: onnx.ai/onnx/operators/onnx__NonMaxSuppression.html; onnxruntime, non_max_suppression.cc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.postprocess.boxes import AnyFloats, iou_matrix, ordered

_BLOCK = 256
"""Candidates looked at together: their IoU with each other and with what is kept is one matrix."""


@dataclass(frozen=True)
class Selected:
    """Candidates, best first.

    Args:
        boxes: int64 [k], index of each one's box.
        classes: int64 [k].
        scores: floats [k].
    """

    boxes: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    scores: AnyFloats

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Any) -> Selected:
        return Selected(self.boxes[which], self.classes[which], self.scores[which])


def candidates(scores: AnyFloats, *, score_threshold: float, best: bool) -> Selected:
    """Pairs of box and class whose score is above a threshold, in the order of boxes, then classes.

    Args:
        scores: [N, C].
        score_threshold: Taken in the dtype of the scores.
        best: Each box for its best class alone, of equal ones the first.
    """
    if best:
        classes = np.argmax(scores, axis=1) if scores.size else np.zeros(len(scores), np.int64)
        top = np.take_along_axis(scores, classes[:, None], axis=1)[:, 0] if scores.size else scores.reshape(-1)
        chosen = np.flatnonzero(top > scores.dtype.type(score_threshold))
        return Selected(chosen, classes[chosen].astype(np.int64), top[chosen])
    boxes, classes = np.nonzero(scores > scores.dtype.type(score_threshold))
    return Selected(boxes.astype(np.int64), classes.astype(np.int64), scores[boxes, classes])


def best_first(found: Selected) -> Selected:
    """In order of score; of equal ones the lower class, then the lower box, comes first."""
    return found[np.lexsort((found.boxes, found.classes, -found.scores))]


def greedy(
    boxes: AnyFloats, scores: AnyFloats, *, iou_threshold: float, max_detections: int | None = None
) -> npt.NDArray[np.int64]:
    """Indices of the boxes that are kept, best first.

    Args:
        boxes: [n, 4], xyxy; the IoU is computed in their dtype.
        scores: [n].
        iou_threshold: A box is dropped where its IoU with a better one is above it.
        max_detections: At most so many are kept; left out: no limit.

    Raises:
        MeasurementError: Shapes contradict each other, or a value is not finite.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise MeasurementError(f"suppression needs boxes [n, 4] and scores [n], got {boxes.shape} and {scores.shape}")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise MeasurementError("boxes or scores that are not finite cannot be suppressed")
    limit = len(boxes) if max_detections is None else max_detections
    threshold = boxes.dtype.type(iou_threshold)
    order = np.argsort(-scores, kind="stable")
    corners = ordered(boxes)[order]
    kept = np.zeros(0, np.int64)
    for start in range(0, len(order), _BLOCK):
        if len(kept) >= limit:
            break
        block = np.arange(start, min(start + _BLOCK, len(order)))
        if len(kept):
            block = block[~(iou_matrix(corners[block], corners[kept]) > threshold).any(axis=1)]
        overlap = iou_matrix(corners[block], corners[block]) > threshold
        alive = np.ones(len(block), np.bool_)
        for index in np.flatnonzero(overlap.sum(axis=1) > 1):
            if alive[index]:
                alive[index + 1 :] &= ~overlap[index, index + 1 :]
        kept = np.concatenate([kept, block[alive]])
    found: npt.NDArray[np.int64] = order[kept[:limit]]
    return found


def suppressed(
    boxes: AnyFloats, found: Selected, *, iou_threshold: float, max_detections: int, class_agnostic: bool = False
) -> Selected:
    """The candidates that are kept, best first: each class for itself, or all as one class.

    Args:
        boxes: [N, 4], xyxy, of the whole image.
        found: The candidates.
        iou_threshold: As of `greedy`.
        max_detections: At most so many are kept of all classes together.
        class_agnostic: Boxes drop those of other classes too.

    Raises:
        MeasurementError: A value is not finite.
    """
    groups = np.zeros(len(found), np.int64) if class_agnostic else found.classes
    order = np.lexsort((found.boxes, groups))
    kept: list[npt.NDArray[np.int64]] = []
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        picked = greedy(
            boxes[found.boxes[members]],
            found.scores[members],
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )
        kept.append(members[picked])
    chosen = found[np.concatenate(kept)]
    if class_agnostic:
        return chosen[:max_detections]
    return best_first(chosen)[:max_detections]
