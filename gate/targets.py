"""What a sample's answer is held against, and an answer in the same words: images, boxes, masks, keypoints.

Boxes are float64 [n, 4], xyxy, in pixels of the image as it was before preprocessing, unless a name says otherwise. A pixel
is the area between two whole numbers, so that a box over the whole image is (0, 0, width, height).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageRecord:
    """An image, and how it became the model's input: `x_input = x_image * scale_x + left`, `y` likewise.

    Args:
        image_id: As in the ground truth; unique in a data set.
        width, height: Of the image, in pixels.
        scale_x, scale_y: Input pixels per image pixel.
        left, top: Where the image begins in the input, in input pixels.
        file_name: Where it was read from, for messages; empty where it came from no file.
    """

    image_id: int
    width: int
    height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0
    file_name: str = ""


@dataclass(frozen=True)
class ImageTarget:
    """The ground truth of one image, in COCO's form.

    Args:
        image: The image.
        annotations: COCO annotations of it: `id`, `category_id`, `bbox` (xywh, pixels), `area`, `iscrowd`, and
            `segmentation` or `keypoints` where there are any.
    """

    image: ImageRecord
    annotations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, best first.

    Args:
        boxes: float64 [n, 4], xyxy, pixels of the image.
        scores: float64 [n].
        labels: int64 [n], category ids of the ground truth.
        masks: Per detection a COCO RLE (`size`, `counts`), or None.
        keypoints: float64 [n, K, 3]: x, y in pixels of the image and a score; or None.
    """

    boxes: Floats
    scores: Floats
    labels: Ints
    masks: tuple[Mapping[str, Any], ...] | None = None
    keypoints: Floats | None = None


@dataclass(frozen=True)
class TrackedFrame:
    """The ground truth, or the answer, of one frame of a video.

    Args:
        sequence: The video's name.
        frame: Its number there; frames of a sequence come in order.
        ids: int64 [n], of the objects; the same object has one id in all frames of its sequence.
        boxes: float64 [n, 4], xyxy, pixels.
    """

    sequence: str
    frame: int
    ids: Ints
    boxes: Floats


@dataclass(frozen=True)
class Categories:
    """Names of the categories by id, in the order of the ids.

    Args:
        names: By category id.
        skeleton_sigmas: For keypoints, by category id the sigma of each keypoint; COCO's person where left out.
    """

    names: Mapping[int, str]
    skeleton_sigmas: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
