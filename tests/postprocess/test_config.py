"""The table says what outputs mean; what it leaves to be guessed is an error."""

import msgspec
import pytest

from gate.errors import SpecError
from gate.postprocess.config import Postprocess, problems, require_consistent

BOXES = {
    "head": "boxes",
    "boxes": "b",
    "scores": "s",
    "category_ids": [1, 2],
    "format": "xyxy",
    "coordinates": "pixels",
    "activation": "none",
}
GRID = {
    "head": "yolo_grid",
    "outputs": ["p3", "p4"],
    "category_ids": [1, 2],
    "strides": [8, 16],
    "anchors": [[[10, 13], [16, 30]], [[30, 61]]],
}
DETR = {"head": "detr", "boxes": "b", "logits": "l", "category_ids": [7]}
YOLO = {"head": "yolo", "outputs": ["o"], "category_ids": [7]}


def make(table, **changes):
    return msgspec.convert({**table, **changes}, Postprocess)


@pytest.mark.parametrize("table", [BOXES, GRID, DETR, YOLO])
def test_consistent_table_has_no_problem(table):
    assert list(problems(make(table))) == []


def test_heads_have_their_conventions():
    detr, grid, yolo = (make(each).resolved() for each in (DETR, GRID, YOLO))
    assert (detr.format, detr.coordinates, detr.activation) == ("cxcywh", "normalized", "softmax")
    assert (detr.background_class, detr.labels_per_box) == ("last", "best")
    assert (grid.activation, grid.background_class, grid.labels_per_box) == ("sigmoid", "none", "all")
    assert (yolo.format, yolo.coordinates, yolo.activation) == ("cxcywh", "pixels", "none")
    deformable = make(DETR, activation="sigmoid").resolved()
    assert (deformable.background_class, deformable.labels_per_box) == ("none", "all")
    assert make(YOLO, class_agnostic=True).resolved().labels_per_box == "best"
    assert detr.resolved() == detr


@pytest.mark.parametrize(
    "table, changes, key",
    [
        (BOXES, {"format": None}, "format"),
        (BOXES, {"coordinates": None}, "coordinates"),
        (BOXES, {"activation": None}, "activation"),
        (BOXES, {"scores": None}, "scores"),
        (BOXES, {"logits": "l"}, "logits"),
        (BOXES, {"category_ids": []}, "category_ids"),
        (BOXES, {"category_ids": [1, 1]}, "category_ids"),
        (BOXES, {"scores": "b"}, "boxes"),
        (BOXES, {"strides": [8]}, "strides"),
        (BOXES, {"labels": "l", "activation": "softmax"}, "activation"),
        (BOXES, {"class_agnostic": True, "labels_per_box": "all"}, "labels_per_box"),
        (BOXES, {"class_agnostic": True, "nms": False}, "class_agnostic"),
        (GRID, {"strides": [8]}, "strides"),
        (GRID, {"anchors": [[[1, 2]]]}, "anchors"),
        (GRID, {"anchors": [[[1, 2]], []]}, "anchors"),
        (GRID, {"activation": "softmax"}, "activation"),
        (GRID, {"coordinates": "normalized"}, "coordinates"),
        (GRID, {"format": "xyxy"}, "format"),
        (GRID, {"background_class": "last"}, "background_class"),
        (GRID, {"outputs": ["p3", "p3"]}, "outputs"),
        (YOLO, {"outputs": []}, "outputs"),
        (YOLO, {"outputs": ["a", "b"]}, "outputs"),
        (DETR, {"logits": None}, "logits"),
    ],
)
def test_contradiction_names_its_key(table, changes, key):
    config = make(table, **changes)
    assert key in [each.key for each in problems(config)]
    with pytest.raises(SpecError, match=rf"\[postprocess\] {key} "):
        require_consistent(config)


@pytest.mark.parametrize(
    "changes",
    [{"score_threshold": 1.5}, {"iou_threshold": -0.1}, {"max_detections": 0}, {"head": "ssd"}, {"iou": 0.5}],
)
def test_value_outside_its_range_is_refused_when_read(changes):
    with pytest.raises(msgspec.ValidationError):
        make(BOXES, **changes)
