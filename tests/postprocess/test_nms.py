"""Suppression on the host is that of ONNX Runtime's NonMaxSuppression, box for box."""

import time

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gate.errors import MeasurementError
from gate.postprocess.nms import Selected, best_first, candidates, greedy, suppressed


def onnx_session():
    value = helper.make_tensor_value_info
    names = ["boxes", "scores", "most", "iou", "score"]
    node = helper.make_node("NonMaxSuppression", names, ["selected"])
    kinds = [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT]
    shapes = [[1, None, 4], [1, None, None], [1], [1], [1]]
    inputs = [value(*each) for each in zip(names, kinds, shapes, strict=True)]
    graph = helper.make_graph([node], "g", inputs, [value("selected", TensorProto.INT64, [None, 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SESSION = onnx_session()


def by_onnx(boxes, scores, *, iou, score=0.0, most=1000):
    """Pairs of class and box that ONNX Runtime keeps, as a set, and per class their order."""
    feed = {
        "boxes": boxes[None],
        "scores": scores.T[None].copy(),
        "most": np.array([most], np.int64),
        "iou": np.array([iou], np.float32),
        "score": np.array([score], np.float32),
    }
    (selected,) = SESSION.run(None, feed)
    return [(int(kind), int(box)) for _, kind, box in selected]


def by_host(boxes, scores, *, iou, score=0.0, most=1000):
    found = candidates(scores, score_threshold=score, best=False)
    kept = []
    for kind in range(scores.shape[1]):
        members = np.flatnonzero(found.classes == kind)
        picked = greedy(boxes[found.boxes[members]], found.scores[members], iou_threshold=iou, max_detections=most)
        kept += [(kind, int(each)) for each in found.boxes[members][picked]]
    return kept


def random_boxes(rng, n, dtype=np.float32):
    centre, size = rng.uniform(0, 100, (n, 2)), rng.uniform(1, 50, (n, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], 1).astype(dtype)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.45, 0.6, 0.7, 1.0])
def test_random_boxes_are_suppressed_as_onnxruntime_does(seed, iou):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, 700)
    scores = rng.random((700, 3)).astype(np.float32)
    for score, most in ((0.0, 1000), (0.25, 1000), (0.25, 17)):
        arguments = {"iou": iou, "score": score, "most": most}
        assert by_host(boxes, scores, **arguments) == by_onnx(boxes, scores, **arguments)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 6)] * 4, *[st.sampled_from([0.0, 0.25, 0.5, 0.75])] * 2), min_size=1, max_size=40
    ),
    st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.6, 1.0]),
    st.sampled_from([0.0, 0.25, 0.5]),
)
def test_ties_turned_corners_and_boxes_without_area_are_suppressed_as_onnxruntime_does(rows, iou, score):
    values = np.array(rows, np.float32)
    boxes, scores = values[:, :4].copy(), values[:, 4:].copy()
    assert by_host(boxes, scores, iou=iou, score=score) == by_onnx(boxes, scores, iou=iou, score=score)


def test_of_equal_scores_the_lower_index_is_kept():
    boxes = np.array([[0, 0, 4, 4]] * 3, np.float32)
    assert greedy(boxes, np.full(3, 0.5, np.float32), iou_threshold=0.5).tolist() == [0]
    assert greedy(boxes, np.array([0.5, 0.5, 0.6], np.float32), iou_threshold=0.5).tolist() == [2]


def test_overlap_that_equals_the_threshold_is_kept():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 2, 4]], np.float32)
    scores = np.array([0.9, 0.8], np.float32)
    assert greedy(boxes, scores, iou_threshold=0.5).tolist() == [0, 1]
    assert greedy(boxes, scores, iou_threshold=0.49).tolist() == [0]


def test_score_that_equals_the_threshold_is_no_candidate():
    scores = np.array([[0.1, 0.3], [0.3, 0.4]], np.float32)
    found = candidates(scores, score_threshold=0.3, best=False)
    assert (found.boxes.tolist(), found.classes.tolist()) == ([1], [1])
    assert len(candidates(scores, score_threshold=0.4, best=True)) == 0


def test_best_class_of_a_box_is_the_first_of_equal_ones():
    found = candidates(np.array([[0.5, 0.5, 0.2]], np.float32), score_threshold=0.1, best=True)
    assert (found.classes.tolist(), len(found)) == ([0], 1)


def test_classes_suppress_themselves_alone_unless_told_otherwise():
    boxes = np.array([[0, 0, 4, 4]] * 2, np.float32)
    found = Selected(np.array([0, 1]), np.array([0, 1]), np.array([0.5, 0.9], np.float32))
    each = suppressed(boxes, found, iou_threshold=0.5, max_detections=9)
    together = suppressed(boxes, found, iou_threshold=0.5, max_detections=9, class_agnostic=True)
    assert (each.boxes.tolist(), together.boxes.tolist()) == ([1, 0], [1])
    assert suppressed(boxes, found, iou_threshold=0.5, max_detections=1).boxes.tolist() == [1]


def test_order_is_score_then_class_then_box():
    found = Selected(np.array([5, 2, 1, 0]), np.array([0, 0, 1, 1]), np.array([0.5, 0.5, 0.9, 0.5], np.float32))
    assert best_first(found).boxes.tolist() == [1, 2, 5, 0]


def test_nothing_gives_nothing():
    none = candidates(np.zeros((0, 3), np.float32), score_threshold=0.1, best=True)
    assert len(suppressed(np.zeros((0, 4), np.float32), none, iou_threshold=0.5, max_detections=5)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_value_that_is_not_finite_is_an_error(value):
    boxes, scores = np.array([[0, 0, value, 1]]), np.array([0.5])
    with pytest.raises(MeasurementError, match="not finite"):
        greedy(boxes, scores, iou_threshold=0.5)
    with pytest.raises(MeasurementError, match="not finite"):
        greedy(np.zeros((1, 4)), scores * value, iou_threshold=0.5)


def test_shapes_that_contradict_each_other_are_an_error():
    with pytest.raises(MeasurementError, match="needs boxes"):
        greedy(np.zeros((2, 4)), np.zeros(3), iou_threshold=0.5)


def test_many_candidates_are_suppressed_in_reasonable_time():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 8400), rng.random((8400, 1)).astype(np.float32)
    start = time.perf_counter()
    kept = by_host(boxes, scores, iou=0.6, most=100)
    assert time.perf_counter() - start < 2.0
    assert kept == by_onnx(boxes, scores, iou=0.6, most=100)
