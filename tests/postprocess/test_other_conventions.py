"""What outputs would mean under another convention: the reading that is right is among them, and says what it is."""

import numpy as np
import pytest

from gate.postprocess.config import Postprocess
from gate.postprocess.detections import detections_from_outputs, other_conventions
from gate.targets import ImageRecord

TRUE = np.array([[8.0, 10.0, 24.0, 30.0], [30.0, 20.0, 60.0, 44.0]], np.float32)
RECORDS = (ImageRecord(1, 128, 96, 0.5, 0.5, 0.0, 8.0), ImageRecord(2, 64, 64))
SIZE = (64, 64)


def config(**other):
    given = {"head": "boxes", "boxes": "boxes", "scores": "scores", "category_ids": (1, 2), "format": "xyxy"}
    return Postprocess(**{**given, "coordinates": "pixels", "activation": "none", **other})


def outputs(boxes=TRUE):
    scores = np.array([[0.9, 0.0], [0.0, 0.8]], np.float32)
    return {"boxes": np.stack([boxes, boxes + 1]).astype(np.float32), "scores": np.stack([scores, scores])}


def right(images=RECORDS):
    return detections_from_outputs(outputs(), images, config(), input_size=SIZE)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-4)
        np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ({"format": "xywh"}, "the model's boxes are xyxy and were read as xywh"),
        ({"format": "cxcywh"}, "the model's boxes are xyxy and were read as cxcywh"),
        (
            {"coordinates": "normalized"},
            "the model's boxes are pixels of the input and were read as fractions of the input",
        ),
    ],
)
def test_the_true_format_is_among_the_readings(declared, sentence):
    assert_same(other_conventions(outputs(), RECORDS, config(**declared), input_size=SIZE)[sentence], right())


def test_swapped_axes_are_swapped_back():
    swapped = outputs(TRUE[:, [1, 0, 3, 2]])
    assert_same(other_conventions(swapped, RECORDS, config(), input_size=SIZE)["x and y are swapped"], right())


def test_records_that_do_not_say_letterbox_are_read_with_one():
    bare = tuple(ImageRecord(each.image_id, each.width, each.height) for each in RECORDS)
    found = other_conventions(outputs(), bare, config(), input_size=SIZE)
    assert_same(found["the images were letterboxed to 64 x 64 and their records said so"], right())
    assert "the images were stretched to 64 x 64 and their records said so" in found


def test_answers_of_a_neighbour_go_back_to_their_image():
    moved = {name: np.roll(each, 1, axis=0) for name, each in outputs().items()}
    assert_same(other_conventions(moved, RECORDS, config())["each answer is that of the image before"], right())


def test_a_reading_that_cannot_be_made_is_left_out():
    found = other_conventions(outputs(), RECORDS, config())
    assert not [sentence for sentence in found if "fractions" in sentence], "the input's size is not known"
    assert other_conventions({}, RECORDS, config()) == {}


def test_outputs_of_one_array_have_their_boxes_swapped_too():
    yolo = Postprocess(head="yolo", outputs=("out",), category_ids=(1, 2), format="xyxy")
    one = outputs(TRUE[:, [1, 0, 3, 2]])
    joined = {"out": np.concatenate([one["boxes"], one["scores"]], axis=2).transpose(0, 2, 1)}
    assert_same(other_conventions(joined, RECORDS, yolo, input_size=SIZE)["x and y are swapped"], right())
