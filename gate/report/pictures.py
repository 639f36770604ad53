"""The pictures beside a report: images in which the boxes differ, precision over recall, confusion of classes.

`Pictures.take` is called while a check runs and keeps little of what it is given; `Pictures.write` draws when the verdict
is known, for the engines that did not pass or whose answers changed. What cannot be drawn is a remark in the report: a
picture never changes a verdict, and its absence neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.data.image_spec import Preprocess
from gate.errors import BackendUnavailable, DataError, GateError, MeasurementError
from gate.metrics.coco import RECALL_THRESHOLDS, CocoStatistics
from gate.metrics.detection import BoxAgreement, DrawnBox, WorstImage, box_overlaps
from gate.metrics.segmentation import SegmentationStatistics
from gate.report.drawing import draw_confusion, draw_detections, draw_precision_recall
from gate.results import CheckRun, EngineResult
from gate.steps.answers import Answers, ComparedImage
from gate.targets import Detections, ImageRecord
from gate.tensors import Array
from gate.verdict import Status

FOLDER = "pictures"
"""Beside report.md."""

_CURVE_IOU = 0.5
_SEEN_SCORE = 0.01
"""Scores that differ by less look the same: a label shows two decimals."""
_SEEN_IOU = 0.95
"""Boxes that overlap more look the same: a box of 20 px that is moved by half a pixel overlaps by 0.95."""
_OURS = re.compile(r"(boxes|precision-recall|confusion)-.+\.png|reference-confusion\.png")
_MATCHED_BY = {"bbox": "box IoU", "segm": "mask IoU", "keypoints": "keypoint similarity"}


@dataclass(frozen=True)
class Picture:
    """One that was drawn.

    Args:
        engine: What it is of.
        path: Relative to the report.
        caption: In words.
    """

    engine: str
    path: str
    caption: str

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return Path(self.path).stem


@dataclass(frozen=True)
class Drawn:
    """What came of drawing: the pictures, and why others are not there."""

    pictures: tuple[Picture, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Kept:
    """What is needed of one engine's answers."""

    boxes: BoxAgreement | None
    images: tuple[ComparedImage, ...]
    names: Mapping[int, str]
    preprocess: Preprocess | None
    matched_by: str
    curves: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None
    confusion: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], tuple[str, ...]] | None


@dataclass
class Pictures:
    """Collects the answers of a run's engines, and draws them."""

    _kept: dict[str, _Kept] = field(default_factory=dict)

    def take(self, answers: Answers) -> None:
        """Keep what pictures of an engine need; of several builds the first's."""
        if answers.engine in self._kept:
            return
        ours, theirs = answers.candidate, answers.reference
        curves = confusion = None
        matched_by = ""
        if isinstance(ours, CocoStatistics) and isinstance(theirs, CocoStatistics):
            with suppress(MeasurementError):  # nothing to find: no curve, and that is the findings' to say
                curves = (
                    ours.precision_at_recall(iou_threshold=_CURVE_IOU),
                    theirs.precision_at_recall(iou_threshold=_CURVE_IOU),
                )
            matched_by = _MATCHED_BY[ours.iou_type]
        elif isinstance(ours, SegmentationStatistics) and isinstance(theirs, SegmentationStatistics):
            confusion = (ours.confusion, theirs.confusion, ours.classes)
        self._kept[answers.engine] = _Kept(
            boxes=answers.boxes,
            images=answers.images,
            names={} if answers.categories is None else answers.categories.names,
            preprocess=answers.preprocess,
            matched_by=matched_by,
            curves=curves,
            confusion=confusion,
        )

    def write(self, run: CheckRun, folder: Path) -> Drawn:
        """Draw into `folder/pictures`, and remove what an earlier report left there.

        Args:
            run: What was checked.
            folder: Of the report.
        """
        drawn = _Drawing(folder)
        drawn.remove_earlier()
        for result in run.engines:
            kept = self._kept.get(result.name)
            if kept is not None and _is_worth_a_look(result, kept):
                _draw_engine(drawn, result.name, kept)
        return Drawn(tuple(drawn.pictures), tuple(dict.fromkeys(drawn.remarks)))


def _is_worth_a_look(result: EngineResult, kept: _Kept) -> bool:
    scores = result.scores
    changed = scores is not None and any(
        value != scores.values.get(name) and not (np.isnan(value) and np.isnan(scores.values.get(name, np.nan)))
        for name, value in scores.reference.items()
    )
    return result.status is not Status.PASSED or changed or (kept.boxes is not None and _is_moved(kept.boxes))


def _is_moved(boxes: BoxAgreement) -> bool:
    """Whether a box is missing, new or of another category."""
    return bool(boxes.reference_only or boxes.candidate_only or boxes.class_changes)


def _is_seen(image: WorstImage) -> bool:
    """Whether a reader of the picture would see a difference at all."""
    for ones, others in ((image.reference, image.candidate), (image.candidate, image.reference)):
        overlaps = box_overlaps(_detections(ones).boxes, _detections(others).boxes)
        for one, row in zip(ones, overlaps, strict=True):
            pairs = zip(others, row.tolist(), strict=True)
            if one.unmatched or not any(
                other.label == one.label and abs(other.score - one.score) < _SEEN_SCORE and overlap >= _SEEN_IOU
                for other, overlap in pairs
            ):
                return True
    return False


@dataclass
class _Drawing:
    """One folder of pictures; draws until it is known that nothing can be drawn here."""

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    _is_impossible: bool = False

    def remove_earlier(self) -> None:
        """Pictures of another run would be taken for this one's."""
        folder = self.folder / FOLDER
        if folder.is_symlink() or not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            if _OURS.fullmatch(path.name) and not path.is_dir():
                try:
                    path.unlink()
                except OSError as err:
                    self.remarks.append(f"pictures/{path.name} is of an earlier run and cannot be removed: {err}")

    def add(self, engine: str, name: str, caption: str, draw: Callable[[Path], None]) -> None:
        """Draw one picture; where that fails, say why."""
        if self._is_impossible:
            return
        try:
            draw(self.folder / FOLDER / name)
        except BackendUnavailable as err:
            self._is_impossible = True
            self.remarks.append(f"no pictures: {err.message}" + (f"; {err.hint}" if err.hint else ""))
        except GateError as err:
            self.remarks.append(f"no picture {name}: {err.message}")
        except Exception as err:  # noqa: BLE001 - whatever a drawing library raises, the verdict stands and is reported
            self.remarks.append(f"no picture {name}: {type(err).__name__}: {err}")
        else:
            self.pictures.append(Picture(engine, f"{FOLDER}/{name}", caption))


def _draw_engine(drawn: _Drawing, engine: str, kept: _Kept) -> None:
    for place, image in enumerate((each for each in kept.images if _is_seen(each.worst)), start=1):
        named = image.worst.file_name or f"image {image.worst.image_id}"
        drawn.add(
            engine, f"boxes-{engine}-{place}.png", f"{named}: {image.worst.why}", partial(_draw_image, image, kept)
        )
    if kept.curves is not None:
        ours, theirs = kept.curves
        drawn.add(
            engine,
            f"precision-recall-{engine}.png",
            f"precision over recall at {kept.matched_by} {_CURVE_IOU}, the mean over categories",
            lambda path: draw_precision_recall(
                path,
                {"reference": (RECALL_THRESHOLDS, theirs), engine: (RECALL_THRESHOLDS, ours)},
                title=f"{engine}: precision over recall at {kept.matched_by} {_CURVE_IOU}",
            ),
        )
    if kept.confusion is not None:
        matrix, reference, names = kept.confusion
        drawn.add(
            engine,
            f"confusion-{engine}.png",
            f"confusion of classes by {engine}, in pixels",
            lambda path: draw_confusion(path, matrix, names),
        )
        shared = "reference-confusion.png"
        if all(each.path != f"{FOLDER}/{shared}" for each in drawn.pictures):
            drawn.add(
                engine,
                shared,
                "confusion of classes by the reference, in pixels",
                lambda path: draw_confusion(path, reference, names),
            )


def _draw_image(image: ComparedImage, kept: _Kept, path: Path) -> None:
    pixels = (
        _pixels_of_file(image.path)
        if image.path is not None or image.values is None
        else pixels_from_input(image.values, image.target.image, kept.preprocess)
    )
    draw_detections(
        path,
        pixels,
        reference=_detections(image.worst.reference),
        candidate=_detections(image.worst.candidate),
        target=image.target,
        names=kept.names,
        reference_alone=_alone(image.worst.reference),
        candidate_alone=_alone(image.worst.candidate),
    )


def _pixels_of_file(path: str | None) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3], EXIF orientation applied.

    Raises:
        BackendUnavailable: Pillow is not installed.
        DataError: There is no such file any more, or it is no image.
    """
    if path is None:
        raise DataError("neither the image's file nor its values are known")
    try:
        from PIL import Image, ImageOps
    except ImportError as err:
        raise BackendUnavailable(f"pictures need Pillow, which cannot be imported: {err}") from err
    try:
        with Image.open(path) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError) as err:
        raise DataError(f"the image cannot be read again: {err}", where=path) from err


def pixels_from_input(values: Array, record: ImageRecord, preprocess: Preprocess | None) -> npt.NDArray[np.uint8]:
    """An image from the model's input that was made of it, in the image's own size; grey where it was cropped.

    Args:
        values: [C, H, W] or [H, W, C], of 1 or 3 channels.
        record: How the image became it.
        preprocess: What is undone; None: values of 0 to 1 or 0 to 255 are taken as such, others are stretched.

    Raises:
        DataError: It is no image.
    """
    first = preprocess.layout == "nchw" if preprocess is not None else values.ndim == 3 and values.shape[0] in (1, 3)
    planes = np.moveaxis(values, 0, -1) if first and values.ndim == 3 else values
    if planes.ndim != 3 or planes.shape[2] not in (1, 3):
        raise DataError(f"the model's input is no image: {values.dtype} {list(values.shape)}")
    shown = _as_bytes(planes.astype(np.float64), preprocess)
    if preprocess is not None and preprocess.channels == "bgr":
        shown = shown[:, :, ::-1]
    rows = np.floor((np.arange(record.height) + 0.5) * record.scale_y + record.top).astype(np.int64)
    columns = np.floor((np.arange(record.width) + 0.5) * record.scale_x + record.left).astype(np.int64)
    inside_rows, inside_columns = (
        (places >= 0) & (places < size) for places, size in zip((rows, columns), shown.shape[:2], strict=True)
    )
    pixels = np.full((record.height, record.width, 3), 128, np.uint8)
    found = shown[np.ix_(rows[inside_rows], columns[inside_columns])]
    pixels[np.ix_(inside_rows, inside_columns)] = found
    return pixels


def _as_bytes(planes: npt.NDArray[np.float64], preprocess: Preprocess | None) -> npt.NDArray[np.uint8]:
    if preprocess is not None:
        std = np.asarray(preprocess.std or (1.0,))
        mean = np.asarray(preprocess.mean or (0.0,))
        planes = (planes * std + mean) / preprocess.scale
    else:
        low, high = float(planes.min()), float(planes.max())
        if low >= 0.0 and high <= 1.0:
            planes = planes * 255
        elif low < 0.0 or high > 255:
            planes = (planes - low) * (255 / max(high - low, 1e-12))
    shown: npt.NDArray[np.uint8] = np.clip(np.rint(planes), 0, 255).astype(np.uint8)
    return shown


def _alone(drawn: Sequence[DrawnBox]) -> tuple[int, ...]:
    return tuple(place for place, each in enumerate(drawn) if each.unmatched)


def _detections(drawn: Sequence[DrawnBox]) -> Detections:
    found: list[Any] = [each.box for each in drawn]
    return Detections(
        boxes=np.asarray(found, np.float64).reshape(-1, 4),
        scores=np.asarray([each.score for each in drawn], np.float64),
        labels=np.asarray([each.label for each in drawn], np.int64),
    )
