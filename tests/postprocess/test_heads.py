"""Decode of each head, against the formula written out for one place."""

import math

import msgspec
import numpy as np
import pytest

from gate.errors import MeasurementError
from gate.postprocess.config import Postprocess
from gate.postprocess.heads import decoded, sigmoid, softmax

RNG = np.random.default_rng(0)
ANCHORS = [[[10, 13], [16, 30]], [[30, 61], [62, 45]]]


def make(**table):
    return msgspec.convert({"category_ids": [10, 20, 30], **table}, Postprocess).resolved()


GRID = make(head="yolo_grid", outputs=["p3", "p4"], strides=[8, 16], anchors=ANCHORS)
YOLO = make(head="yolo", outputs=["o"])
DETR = make(head="detr", boxes="b", logits="l")
PLAIN = {"head": "boxes", "boxes": "b", "scores": "s", "format": "xyxy", "coordinates": "pixels", "activation": "none"}


def logistic(value):
    return 1 / (1 + math.exp(-value))


def test_grid_place_is_decoded_as_the_formula_says():
    maps = {"p3": RNG.standard_normal((2, 16, 3, 5)), "p4": RNG.standard_normal((2, 16, 2, 4))}
    found = decoded(maps, GRID)
    assert found.boxes.shape == (2, 2 * 15 + 2 * 8, 4)
    sample, anchor, row, column = 1, 1, 1, 2
    x, y, w, h, objectness, *classes = (
        logistic(each) for each in maps["p4"][sample, 8 * anchor : 8 * anchor + 8, row, column]
    )
    place = 30 + anchor * 8 + row * 4 + column
    cx, cy = (2 * x - 0.5 + column) * 16, (2 * y - 0.5 + row) * 16
    width, height = (2 * w) ** 2 * 62, (2 * h) ** 2 * 45
    expected = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    np.testing.assert_allclose(found.boxes[sample, place], expected, rtol=1e-6)
    np.testing.assert_allclose(found.scores[sample, place], [objectness * each for each in classes], rtol=1e-6)


def test_both_layouts_of_a_grid_and_an_activation_in_the_graph_give_the_same():
    maps = {"p3": RNG.standard_normal((2, 16, 3, 5)), "p4": RNG.standard_normal((2, 16, 2, 4))}
    last = {name: each.reshape(2, 2, 8, *each.shape[2:]).transpose(0, 1, 3, 4, 2) for name, each in maps.items()}
    active = {name: sigmoid(each) for name, each in last.items()}
    plain = msgspec.structs.replace(GRID, activation="none")
    first, second, third = decoded(maps, GRID), decoded(last, GRID), decoded(active, plain)
    for other in (second, third):
        assert np.array_equal(first.boxes, other.boxes)
        assert np.array_equal(first.scores, other.scores)


def test_anchor_free_output_is_split_into_boxes_and_classes():
    array = np.zeros((1, 7, 2), np.float32)
    array[0, :, 1] = [50, 40, 20, 10, 0.1, 0.2, 0.7]
    found = decoded({"o": array}, YOLO)
    assert found.boxes[0, 1].tolist() == [40, 35, 60, 45]
    np.testing.assert_allclose(found.scores[0, 1], [0.1, 0.2, 0.7], rtol=1e-6)


def test_detr_leaves_the_class_of_no_object_out():
    logits = np.array([[[1.0, 2.0, 3.0, 4.0]]], np.float32)
    found = decoded({"b": np.array([[[0.5, 0.5, 0.2, 0.4]]], np.float32), "l": logits}, DETR)
    np.testing.assert_allclose(found.boxes[0, 0], [0.4, 0.3, 0.6, 0.7], rtol=1e-6)
    total = sum(math.exp(each) for each in (1, 2, 3, 4))
    np.testing.assert_allclose(found.scores[0, 0], [math.exp(each) / total for each in (1, 2, 3)], rtol=1e-6)


def test_deformable_detr_has_a_sigmoid_and_no_such_class():
    config = make(head="detr", boxes="b", logits="l", activation="sigmoid")
    found = decoded({"b": np.full((1, 1, 4), 0.5, np.float32), "l": np.array([[[-1.0, 0.0, 2.0]]], np.float32)}, config)
    np.testing.assert_allclose(found.scores[0, 0], [logistic(-1), 0.5, logistic(2)], rtol=1e-6)


def test_background_may_be_the_first_class():
    config = make(**PLAIN, background_class="first")
    found = decoded({"b": np.zeros((1, 1, 4)), "s": np.array([[[0.9, 0.1, 0.2, 0.3]]])}, config)
    assert found.scores[0, 0].tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "background, labels, expected",
    [("none", [0, 2], [0, 2]), ("first", [0, 3], [-1, 2]), ("last", [3, 0], [-1, 0])],
)
def test_labels_are_taken_with_their_background(background, labels, expected):
    config = make(**PLAIN, labels="k", background_class=background)
    for dtype in (np.int32, np.float32):
        outputs = {"b": np.zeros((1, 2, 4)), "s": np.full((1, 2), 0.5), "k": np.array([labels], dtype)}
        assert decoded(outputs, config).labels.tolist() == [expected]


@pytest.mark.parametrize("label, background", [(3, "none"), (-1, "none"), (4, "first"), (4, "last")])
def test_label_without_a_category_id_is_an_error(label, background):
    config = make(**PLAIN, labels="k", background_class=background)
    with pytest.raises(MeasurementError, match=f"class {label}, which has no category id: there are 3"):
        decoded({"b": np.zeros((1, 1, 4)), "s": np.full((1, 1), 0.5), "k": np.array([[label]])}, config)


def test_label_that_is_no_whole_number_is_an_error():
    config = make(**PLAIN, labels="k")
    with pytest.raises(MeasurementError, match="no whole numbers"):
        decoded({"b": np.zeros((1, 1, 4)), "s": np.full((1, 1), 0.5), "k": np.array([[0.5]])}, config)


def test_half_precision_is_decoded_in_single():
    found = decoded({"b": np.zeros((1, 1, 4), np.float16), "s": np.full((1, 1, 3), 0.5, np.float16)}, make(**PLAIN))
    assert found.boxes.dtype == found.scores.dtype == np.float32


@pytest.mark.parametrize(
    "config, outputs, message",
    [
        (YOLO, {"x": np.zeros((1, 7, 2))}, "there is no output 'o'; the model has 'x'"),
        (YOLO, {"o": np.zeros((1, 8, 2))}, r"'o' is \[1, 8, 2\], expected \[n, 7, N\]"),
        (YOLO, {"o": np.zeros((7, 2))}, r"'o' is \[7, 2\]"),
        (YOLO, {"o": np.zeros((1, 7, 2), np.int64)}, "'o' is int64"),
        (GRID, {"p3": np.zeros((1, 17, 3, 3)), "p4": np.zeros((1, 16, 3, 3))}, r"'p3' is \[1, 17, 3, 3\]"),
        (GRID, {"p3": np.zeros((1, 16, 3, 3)), "p4": np.zeros((2, 16, 3, 3))}, "different numbers of samples"),
        (DETR, {"b": np.zeros((1, 2, 5)), "l": np.zeros((1, 2, 4))}, r"'b' is \[1, 2, 5\]"),
        (DETR, {"b": np.zeros((1, 2, 4)), "l": np.zeros((1, 3, 4))}, r"'l' is \[1, 3, 4\]"),
        (DETR, {"b": np.zeros((1, 2, 4)), "l": np.zeros((1, 2, 3))}, "'l' has 3 classes; category_ids has 3 and"),
    ],
)
def test_output_that_does_not_fit_the_head_is_an_error(config, outputs, message):
    with pytest.raises(MeasurementError, match=message):
        decoded(outputs, config)


@pytest.mark.parametrize("bad", [-0.1, 1.5])
def test_scores_that_are_no_probabilities_ask_for_an_activation(bad):
    outputs = {"b": np.zeros((1, 1, 4)), "s": np.array([[[0.5, bad, 0.1]]])}
    with pytest.raises(MeasurementError, match="not between 0 and 1") as caught:
        decoded(outputs, make(**PLAIN))
    assert 'activation = "sigmoid"' in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_second_activation_is_an_error(kind):
    raw = RNG.standard_normal((1, 60, 4)).astype(np.float32) * 4
    active = sigmoid(raw) if kind == "sigmoid" else softmax(raw)
    config = make(head="detr", boxes="b", logits="l", activation=kind, background_class="last")
    boxes = np.full((1, 60, 4), 0.5, np.float32)
    assert decoded({"b": boxes, "l": raw}, config).scores.shape == (1, 60, 3)
    with pytest.raises(MeasurementError, match=f"a second {kind} would flatten them"):
        decoded({"b": boxes, "l": active}, config)


def test_activations_do_not_overflow():
    far = np.array([[-1e4, 0.0, 1e4]], np.float32)
    assert sigmoid(far).tolist() == [[0, 0.5, 1]]
    assert softmax(far).tolist() == [[0, 0, 1]]
