"""Detections in the image's pixels; what cannot be one is an error that names the image."""

import msgspec
import numpy as np
import pytest

from gate.errors import MeasurementError, SpecError
from gate.postprocess.config import Postprocess
from gate.postprocess.detections import FILLER, detections_from_nms_outputs, detections_from_outputs
from gate.targets import ImageRecord

LETTERBOX = ImageRecord(7, 200, 100, scale_x=0.5, scale_y=0.5, left=0.0, top=25.0, file_name="a.jpg")
PLAIN = ImageRecord(8, 100, 100)


def make(**changes):
    table = {
        "head": "boxes",
        "boxes": "b",
        "scores": "s",
        "category_ids": [10, 20],
        "format": "xyxy",
        "coordinates": "pixels",
        "activation": "none",
        "score_threshold": 0.1,
        "iou_threshold": 0.5,
    }
    return msgspec.convert({**table, **changes}, Postprocess)


def outputs(boxes, scores):
    return {"b": np.array([boxes], np.float32), "s": np.array([scores], np.float32)}


def test_boxes_are_mapped_back_suppressed_and_clipped_best_first():
    given = outputs([[10, 30, 30, 50], [11, 30, 31, 50], [-20, 0, 200, 200]], [[0.5, 0], [0.9, 0], [0, 0.7]])
    (found,) = detections_from_outputs(given, [LETTERBOX], make())
    assert found.boxes.tolist() == [[22, 10, 62, 50], [0, 0, 200, 100]]
    assert found.labels.tolist() == [10, 20]
    np.testing.assert_allclose(found.scores, [0.9, 0.7], rtol=1e-6)
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float64, np.float64, np.int64)


def test_fractions_are_of_the_input():
    given = outputs([[0.1, 0.25, 0.5, 0.75]], [[0.9, 0]])
    config = make(coordinates="normalized")
    (found,) = detections_from_outputs(given, [LETTERBOX], config, input_size=(100, 100))
    np.testing.assert_allclose(found.boxes, [[20, 0, 100, 100]], rtol=1e-6)
    with pytest.raises(MeasurementError, match="size is not known"):
        detections_from_outputs(given, [LETTERBOX], config)


def test_images_of_a_batch_are_each_their_own():
    boxes = np.array([[[0, 0, 50, 50]], [[0, 0, 50, 50]]], np.float32)
    given = {"b": boxes, "s": np.array([[[0.9, 0]], [[0, 0.8]]], np.float32)}
    first, second = detections_from_outputs(given, [LETTERBOX, PLAIN], make())
    assert (first.boxes.tolist(), second.boxes.tolist()) == ([[0, 0, 100, 50]], [[0, 0, 50, 50]])
    assert (first.labels.tolist(), second.labels.tolist()) == ([10], [20])


def test_without_suppression_the_best_are_kept():
    given = outputs([[10, 10, 30, 30]] * 3, [[0.2, 0], [0.9, 0], [0.5, 0]])
    (found,) = detections_from_outputs(given, [PLAIN], make(nms=False, max_detections=2))
    np.testing.assert_allclose(found.scores, [0.9, 0.5], rtol=1e-6)


def test_labels_apart_are_suppressed_by_class_and_background_is_left_out():
    given = {
        "b": np.array([[[10, 10, 30, 30]] * 4], np.float32),
        "s": np.array([[0.9, 0.8, 0.7, 0.95]], np.float32),
        "k": np.array([[1, 2, 1, 0]], np.int32),
    }
    (found,) = detections_from_outputs(given, [PLAIN], make(labels="k", background_class="first"))
    assert found.labels.tolist() == [10, 20]
    np.testing.assert_allclose(found.scores, [0.9, 0.8], rtol=1e-6)


def test_nothing_above_the_threshold_is_no_detection():
    (found,) = detections_from_outputs(outputs([[0, 0, 5, 5]], [[0.05, 0.1]]), [PLAIN], make())
    assert found.boxes.shape == (0, 4)
    assert len(found.scores) == len(found.labels) == 0


@pytest.mark.parametrize("name", ["b", "s"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_names_the_image(name, value):
    given = {"b": np.ones((2, 3, 4), np.float32), "s": np.full((2, 3, 2), 0.5, np.float32)}
    given[name][1, 2, 0] = value
    with pytest.raises(MeasurementError, match=f"output '{name}' holds NaN or Inf") as caught:
        detections_from_outputs(given, [PLAIN, LETTERBOX], make())
    assert caught.value.where == "image 7 (a.jpg)"


def test_box_that_overflows_in_the_decode_names_the_image():
    given = outputs([[3e38, 0, 3e38, 5]], [[0.5, 0.5]])
    with pytest.raises(MeasurementError, match="boxes decoded from the outputs hold NaN or Inf") as caught:
        detections_from_outputs(given, [PLAIN], make(format="xywh"))
    assert caught.value.where == "image 8"


def test_missing_output_and_another_number_of_images_are_errors():
    given = outputs([[0, 0, 5, 5]], [[0.5, 0.1]])
    with pytest.raises(MeasurementError, match="holds 1 samples, and there are 2 images"):
        detections_from_outputs(given, [PLAIN, PLAIN], make())
    del given["s"]
    with pytest.raises(MeasurementError, match="there is no output 's'"):
        detections_from_outputs(given, [PLAIN], make())


def test_class_without_a_category_id_is_an_error():
    with pytest.raises(MeasurementError, match="has 3 classes; category_ids has 2"):
        detections_from_outputs(outputs([[0, 0, 5, 5]], [[0.5, 0.1, 0.1]]), [PLAIN], make())


def test_table_that_contradicts_itself_is_an_error():
    with pytest.raises(SpecError, match="format must be declared"):
        detections_from_outputs(outputs([[0, 0, 5, 5]], [[0.5, 0.1]]), [PLAIN], make(format=None))


def many(boxes):
    return {"b": boxes[None].astype(np.float32), "s": np.full((1, len(boxes), 2), 0.5, np.float32)}


RNG = np.random.default_rng(0)
CORNERS = RNG.uniform(50, 90, (40, 2))
SIZES = RNG.uniform(3, 9, (40, 2))
XYWH = np.concatenate([CORNERS, SIZES], 1)


def test_boxes_plainly_in_another_format_or_unit_are_errors():
    with pytest.raises(MeasurementError, match="end left of or above their beginning, read as xyxy"):
        detections_from_outputs(many(XYWH), [PLAIN], make())
    with pytest.raises(MeasurementError, match="declared as fractions"):
        detections_from_outputs(
            many(XYWH), [PLAIN], make(format="xywh", coordinates="normalized"), input_size=(100, 100)
        )
    with pytest.raises(MeasurementError, match="declared as pixels"):
        detections_from_outputs(many(XYWH / 100), [PLAIN], make(format="xywh"))
    (found,) = detections_from_outputs(many(XYWH), [PLAIN], make(format="xywh"))
    assert len(found.scores) > 20


def inside(**changes):
    given = {
        "num_detections": np.array([[2]], np.int32),
        "detection_boxes": np.array([[[0, 25, 50, 75], [10, 25, 30, 75], [0, 0, 0, 0]]], np.float32),
        "detection_scores": np.array([[0.9, 0.5, 0]], np.float32),
        "detection_classes": np.array([[0, 1, 0]], np.int32),
        "other": np.zeros(3),
    }
    return {**given, **changes}


def test_detections_of_a_graph_with_nms_inside_are_mapped_back():
    (found,) = detections_from_nms_outputs(inside(), [LETTERBOX], make())
    assert found.boxes.tolist() == [[0, 0, 100, 100], [20, 0, 60, 100]]
    assert found.labels.tolist() == [10, 20]
    assert found.scores.tolist() == [np.float64(np.float32(0.9)), 0.5]


def test_what_the_plugin_fills_up_with_is_no_detection():
    given = inside(num_detections=np.array([[3]], np.int32))
    given["detection_scores"][0, 2] = FILLER
    (found,) = detections_from_nms_outputs(given, [LETTERBOX], make())
    assert len(found.scores) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_detections": np.array([[4]], np.int32)}, "num_detections is 4, and there are 3 places"),
        ({"num_detections": np.array([[-1]], np.int32)}, "num_detections is -1"),
        ({"num_detections": np.array([2], np.int32)}, r"'num_detections' is int32 \[1\], expected integers \[1, 1\]"),
        ({"num_detections": np.array([[3]], np.int32)}, "scores lie between 0 and 0.9, expected 0.1 to 1"),
        ({"detection_scores": np.array([[0.5, 0.9, 0]], np.float32)}, "not in the order of their scores"),
        ({"detection_scores": np.array([[np.nan, 0.5, 0]], np.float32)}, "NaN or Inf"),
        ({"detection_scores": np.array([[1.5, 0.5, 0]], np.float32)}, "scores lie between 0.5 and 1.5"),
        ({"detection_scores": np.zeros((2, 3), np.float32)}, r"expected integers \[1, 1\]|expected floats \[1, 3\]"),
        ({"detection_classes": np.array([[0, 2, 0]], np.int32)}, "class 2 has no category id"),
        ({"detection_classes": np.zeros((1, 3), np.float32)}, "expected integers"),
        ({"detection_boxes": np.zeros((1, 3, 5), np.float32)}, "'detection_boxes' is float32"),
        ({"detection_boxes": np.full((1, 3, 4), np.inf, np.float32)}, "NaN or Inf"),
    ],
)
def test_what_a_graph_cannot_have_found_is_an_error(changes, message):
    with pytest.raises(MeasurementError, match=message):
        detections_from_nms_outputs(inside(**changes), [LETTERBOX], make())


def test_missing_output_of_a_graph_with_nms_inside_is_an_error():
    given = inside()
    del given["detection_classes"]
    with pytest.raises(
        MeasurementError, match="there is no output 'detection_classes'; the graph has 'num_detections'"
    ):
        detections_from_nms_outputs(given, [LETTERBOX], make())


def test_graph_that_did_not_suppress_is_an_error():
    twice = np.array([[[0, 25, 50, 75], [0, 25, 50, 75], [0, 0, 0, 0]]], np.float32)
    with pytest.raises(MeasurementError, match="of one class overlap by 1, and iou_threshold is 0.5"):
        detections_from_nms_outputs(
            inside(detection_boxes=twice, detection_classes=np.zeros((1, 3), np.int32)), [LETTERBOX], make()
        )
    (found,) = detections_from_nms_outputs(inside(detection_boxes=twice), [LETTERBOX], make())
    assert len(found.scores) == 2
    with pytest.raises(MeasurementError, match="boxes overlap by 1") as caught:
        detections_from_nms_outputs(inside(detection_boxes=twice), [LETTERBOX], make(class_agnostic=True))
    assert "TensorRT 8.6.0 knows no class_agnostic" in (caught.value.hint or "")
