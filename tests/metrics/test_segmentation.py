"""Semantic segmentation against scikit-learn, and what must not be scored."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from gate.errors import DataError, MeasurementError, SpecError
from gate.metrics.segmentation import KIND
from gate.targets import Categories


def scored(output, targets, batch=None, categories=None, **options):
    metric = KIND.make(options, categories)
    step = batch or max(1, len(output))
    for first in range(0, len(output), step):
        part = {"masks": output[first : first + step]}
        metric.add(part, reference=part, targets=targets[first : first + step], first_sample=first)
    return metric.statistics()


def example(seed, samples=4, classes=4, size=(5, 6), ignored=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, classes, *size)).astype(np.float32)
    targets = rng.integers(0, classes, (samples, *size))
    if ignored:
        targets[rng.random(targets.shape) < 0.3] = 255
    return logits, list(targets)


@given(seed=st.integers(0, 200), samples=st.integers(1, 6), batch=st.integers(1, 6), ignored=st.booleans())
def test_values_are_scikit_learns_in_any_batches(seed, samples, batch, ignored):
    logits, targets = example(seed, samples, ignored=ignored)
    statistics = scored(logits, targets, batch, ignore_label=255)
    truth = np.stack(targets).ravel()
    answers = logits.argmax(axis=1).ravel()[truth != 255]
    truth = truth[truth != 255]
    values = statistics.values()
    occurring = np.unique(np.concatenate([truth, answers]))
    each = jaccard_score(truth, answers, labels=occurring, average=None)
    assert values["mean_iou"] == pytest.approx(each.mean(), abs=1e-12)
    assert [values[f"iou_of.{index}"] for index in occurring] == pytest.approx(list(each), abs=1e-12)
    assert values["pixel_accuracy"] == pytest.approx((truth == answers).mean(), abs=1e-12)
    if set(answers) <= set(truth):
        assert values["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(truth, answers), abs=1e-12)
    assert np.array_equal(statistics.confusion, confusion_matrix(truth, answers, labels=range(4)))


@given(seed=st.integers(0, 50), weights=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
def test_weights_are_the_same_as_repeating_samples(seed, weights):
    logits, targets = example(seed)
    chosen = np.repeat(np.arange(4), weights)
    repeated = scored(logits[chosen], [targets[each] for each in chosen]).values()
    weighted = scored(logits, targets).values(np.asarray(weights))
    assert weighted == pytest.approx(repeated, abs=1e-12, nan_ok=True)


def test_weights_of_one_change_nothing():
    statistics = scored(*example(0))
    assert statistics.samples == 4
    assert statistics.values(np.ones(4, np.int64)) == statistics.values()


def test_weights_of_zero_leave_every_value_undefined():
    assert all(math.isnan(each) for each in scored(*example(0)).values(np.zeros(4, np.int64)).values())


def test_class_maps_score_as_their_logits_do():
    logits, targets = example(1)
    maps = logits.argmax(axis=1).astype(np.uint8)
    assert scored(maps, targets, classes=4).values() == scored(logits, targets).values()


def test_of_equal_logits_the_lower_class_is_the_answer():
    logits = np.zeros((1, 3, 2, 2), np.float32)
    assert scored(logits, [np.zeros((2, 2), np.int64)]).values()["mean_iou"] == 1.0


def test_class_that_occurs_nowhere_is_undefined_and_left_out():
    maps = np.asarray([[[0, 1], [0, 1]]])
    values = scored(maps, list(maps), classes=["road", "car", "tram"]).values()
    assert math.isnan(values["iou_of.tram"])
    assert values["mean_iou"] == values["iou_of.road"] == values["mean_class_accuracy"] == 1.0


def test_class_that_is_only_predicted_counts_with_zero():
    values = scored(np.asarray([[[0, 2]]]), [np.asarray([[0, 0]])], classes=3).values()
    assert (values["iou_of.0"], values["iou_of.2"], values["mean_iou"]) == (0.5, 0.0, 0.25)


def test_ignored_class_has_no_iou():
    values = scored(np.asarray([[[0, 1, 0]]]), [np.asarray([[0, 1, 1]])], classes=2, ignore_label=0).values()
    assert math.isnan(values["iou_of.0"])
    assert (values["mean_iou"], values["pixel_accuracy"]) == (0.5, 0.5)


def test_classes_are_named_by_the_categories_of_the_data():
    logits, targets = example(0, classes=2)
    values = scored(logits, targets, categories=Categories({0: "road", 1: "car"})).values()
    assert {"iou_of.road", "iou_of.car"} < set(values)


def test_arrays_give_back_the_statistics():
    statistics = scored(*example(3, ignored=True), ignore_label=255, classes=["straße", "b", "c", "d"])
    again = KIND.read(statistics.to_arrays())
    weights = np.asarray([0, 2, 1, 1])
    assert again.values(weights) == statistics.values(weights)
    assert again.classes == statistics.classes
    assert np.array_equal(again.confusion, statistics.confusion)


def test_arrays_keep_which_class_is_ignored():
    statistics = scored(np.asarray([[[0, 1]]]), [np.asarray([[0, 1]])], classes=2, ignore_label=0)
    assert KIND.read(statistics.to_arrays()).values() == pytest.approx(statistics.values(), nan_ok=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("confusion"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        lambda arrays: arrays.update(counts=arrays["counts"][:-1]),
        lambda arrays: arrays.update(counts=arrays["counts"].astype(np.float64)),
        lambda arrays: arrays.update(counts=arrays["counts"][:0]),
        lambda arrays: arrays.update(confusion=arrays["confusion"] + 1),
        lambda arrays: arrays.update(ignored=np.asarray([4])),
        lambda arrays: arrays.update(classes=np.frombuffer(b"[1, 2", np.uint8)),
        lambda arrays: arrays.update(classes=np.frombuffer(b"[1, 2, 3, 4]", np.uint8)),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change):
    arrays = scored(*example(0)).to_arrays()
    change(arrays)
    with pytest.raises(MeasurementError, match="statistics of semantic_segmentation"):
        KIND.read(arrays)


def test_nothing_added_is_an_error():
    with pytest.raises(MeasurementError, match="no pixel was compared"):
        KIND.make({}, None).statistics()


def test_only_ignored_pixels_are_an_error():
    with pytest.raises(MeasurementError, match="no pixel was compared"):
        scored(np.zeros((1, 2, 2, 2), np.float32), [np.full((2, 2), 255)], ignore_label=255)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    logits, targets = example(0)
    logits[2, 0, 0, 0] = value
    with pytest.raises(MeasurementError, match="sample 2 holds 1 of 120 values that are NaN or Inf"):
        scored(logits, targets)


def test_batch_out_of_order_is_an_error():
    logits, targets = example(0)
    metric = KIND.make({}, None)
    metric.add({"y": logits[:2]}, reference=None, targets=targets[:2], first_sample=0)
    with pytest.raises(MeasurementError, match="expected the batch from sample 2, got that from 3"):
        metric.add({"y": logits[3:]}, reference=None, targets=targets[3:], first_sample=3)


def test_empty_batch_is_an_error():
    with pytest.raises(MeasurementError, match="the batch from sample 0 is empty"):
        KIND.make({}, None).add({"y": np.zeros((0, 2, 2, 2), np.float32)}, reference=None, targets=[], first_sample=0)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([np.zeros((5, 6), int)] * 3, MeasurementError, "4 predictions for 3 targets"),
        ([], DataError, "the samples have none"),
        (None, DataError, "the samples have none"),
        ([np.zeros((5, 6), int)] * 3 + [None], DataError, "sample 3 has no target"),
        ([np.zeros((5, 6))] * 4, DataError, r"float64 \[5, 6\]; expected integers"),
        ([np.zeros((1, 5, 6), int)] * 4, DataError, r"\[1, 5, 6\]; expected integers \[H, W\]"),
        ([np.zeros((6, 5), int)] * 4, MeasurementError, "output of sample 0 is 5 x 6, its label map 6 x 5"),
        ([np.full((5, 6), 4)] * 4, DataError, r"label 4, in 30 pixels; there are 4 classes(.|\n)*count from 1"),
        ([np.full((5, 6), 255)] * 4, DataError, r"label 255(.|\n)*ignore_label = 255"),
        ([np.full((5, 6), -1)] * 4, DataError, "label -1"),
    ],
)
def test_targets_that_do_not_fit_are_an_error(targets, error, message):
    metric = KIND.make({}, None)
    with pytest.raises(error, match=message):
        metric.add({"y": example(0)[0]}, reference=None, targets=targets, first_sample=0)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        (np.zeros((1, 1, 2, 2), np.float32), {}, "two classes or more"),
        (np.zeros((1, 2, 2), np.float32), {}, r"float32 \[1, 2, 2\]; expected logits"),
        (np.zeros((1, 3, 2, 2), np.float32), {"classes": 2}, "logits of 3 classes, expected 2"),
        (np.zeros((1, 2, 2), np.int64), {}, r"how many classes(.|\n)*classes = 21"),
        (np.full((1, 2, 2), 2), {"classes": 2}, "has class 2; there are 2"),
        (np.float32(1.0), {}, "is a scalar"),
    ],
)
def test_output_of_another_form_is_an_error(output, options, message):
    metric = KIND.make(options, None)
    with pytest.raises(MeasurementError, match=message):
        metric.add({"y": output}, reference=None, targets=[np.zeros((2, 2), int)], first_sample=0)


def test_number_of_classes_may_not_change():
    metric = KIND.make({}, None)
    target = [np.zeros((2, 2), int)]
    metric.add({"y": np.zeros((1, 2, 2, 2), np.float32)}, reference=None, targets=target, first_sample=0)
    with pytest.raises(MeasurementError, match="logits of 3 classes, expected 2"):
        metric.add({"y": np.zeros((1, 3, 2, 2), np.float32)}, reference=None, targets=target, first_sample=1)


def test_output_is_named_where_there_are_several():
    logits, targets = example(0)
    outputs = {"aux": -logits, "main": logits}
    metric = KIND.make({"output": "main"}, None)
    metric.add(outputs, reference=None, targets=targets, first_sample=0)
    assert metric.statistics().values() == scored(logits, targets).values()
    with pytest.raises(MeasurementError, match=r"2 outputs \('aux', 'main'\), and none is named"):
        KIND.make({}, None).add(outputs, reference=None, targets=targets, first_sample=0)
    with pytest.raises(MeasurementError, match="no output 'mian'; it has 'aux', 'main'"):
        KIND.make({"output": "mian"}, None).add(outputs, reference=None, targets=targets, first_sample=0)
    with pytest.raises(MeasurementError, match="no outputs by name: list"):
        metric.add([logits], reference=None, targets=targets, first_sample=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_lable": 1}, "did you mean 'ignore_label'"),
        ({"ignore_label": 1.5}, "expected a whole number, got 1.5"),
        ({"ignore_label": True}, "expected a whole number, got True"),
        ({"classes": 1}, "two classes or more"),
        ({"classes": ["a", "a"]}, "names that differ"),
        ({"classes": "road"}, "expected a whole number, got 'road'"),
        ({"output": 3}, "expected a name, got 3"),
    ],
)
def test_options_that_it_does_not_have_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        KIND.make(options, None)


@pytest.mark.parametrize("weights", [np.ones(3, np.int64), np.ones(4), np.asarray([1, 1, 1, -1])])
def test_weights_that_are_no_counts_are_refused(weights):
    with pytest.raises(MeasurementError, match="whole numbers from 0, one for each of 4 samples"):
        scored(*example(0)).values(weights)
