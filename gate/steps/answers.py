"""What a step hands to whoever draws pictures of an engine's task: little enough to be kept while other engines run."""

from __future__ import annotations

from dataclasses import dataclass

from gate.data.image_spec import Preprocess
from gate.metrics.detection import BoxAgreement, WorstImage
from gate.metrics.interface import SampleStatistics
from gate.targets import Categories, ImageTarget
from gate.tensors import Array

SHOWN_IMAGES = 3
"""Of the images in which the boxes differ most, so many are kept for pictures."""


@dataclass(frozen=True)
class ComparedImage:
    """An image in which an engine's boxes differ from the reference's, as a picture of it needs it.

    Args:
        worst: What both found there.
        target: Its ground truth.
        path: Of its file; None where it came from none.
        values: Where there is no file, the model's input, float [C, H, W] or [H, W, C].
    """

    worst: WorstImage
    target: ImageTarget
    path: str | None
    values: Array | None


@dataclass(frozen=True)
class Answers:
    """What pictures of an engine's task are drawn from; `CheckOptions.answered` is called with it.

    Args:
        engine: Its name.
        candidate, reference: What engine and reference scored.
        boxes: How the boxes differ; None for other tasks than detection.
        images: Those in which they differ most, at most `SHOWN_IMAGES`.
        categories: Their names, where there are any.
        preprocess: How images became the model's input, where the spec says it.
    """

    engine: str
    candidate: SampleStatistics
    reference: SampleStatistics
    boxes: BoxAgreement | None
    images: tuple[ComparedImage, ...]
    categories: Categories | None
    preprocess: Preprocess | None
