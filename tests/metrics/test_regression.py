"""Regression against scikit-learn and exact fractions, and what must not be scored."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from gate.errors import DataError, MeasurementError, SpecError
from gate.metrics.regression import KIND


def scored(output, targets, batch=None):
    metric = KIND.make({}, None)
    step = batch or max(1, len(output))
    for first in range(0, len(output), step):
        part = {"y": output[first : first + step]}
        metric.add(part, reference=part, targets=list(targets[first : first + step]), first_sample=first)
    return metric.statistics()


def example(seed, samples=5, shape=(3, 2), offset=0.0):
    rng = np.random.default_rng(seed)
    targets = offset + rng.normal(size=(samples, *shape))
    return targets + 0.1 * rng.normal(size=targets.shape), targets


@given(
    seed=st.integers(0, 200), samples=st.integers(1, 8), batch=st.integers(1, 8), offset=st.sampled_from([0.0, 50.0])
)
def test_values_are_scikit_learns_in_any_batches(seed, samples, batch, offset):
    output, targets = example(seed, samples, offset=offset)
    values = scored(output, targets, batch).values()
    assert values["rmse"] == pytest.approx(root_mean_squared_error(targets.ravel(), output.ravel()), rel=1e-12)
    assert values["mae"] == pytest.approx(mean_absolute_error(targets.ravel(), output.ravel()), rel=1e-12)
    assert values["r2"] == pytest.approx(r2_score(targets.ravel(), output.ravel()), abs=1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
@pytest.mark.parametrize("offset", [1e6, -1e9])
def test_large_offset_cancels_nothing(shape, offset):
    output, targets = example(0, samples=400, shape=shape, offset=offset)
    values = scored(output, targets).values()
    truth, answers = ([Fraction(each) for each in array.ravel().tolist()] for array in (targets, output))
    mean = sum(truth) / len(truth)
    squared = sum((a - t) ** 2 for a, t in zip(answers, truth, strict=True))
    assert values["r2"] == pytest.approx(float(1 - squared / sum((t - mean) ** 2 for t in truth)), abs=1e-9)
    assert values["rmse"] == pytest.approx(math.sqrt(squared / len(truth)), rel=1e-9)


@given(seed=st.integers(0, 50), weights=st.lists(st.integers(0, 3), min_size=5, max_size=5).filter(any))
def test_weights_are_the_same_as_repeating_samples(seed, weights):
    output, targets = example(seed)
    chosen = np.repeat(np.arange(5), weights)
    repeated = scored(output[chosen], targets[chosen]).values()
    assert scored(output, targets).values(np.asarray(weights)) == pytest.approx(repeated, rel=1e-10)


def test_samples_may_differ_in_shape():
    metric = KIND.make({}, None)
    first, second = np.asarray([[1.0, 2.0]]), np.asarray([[4.0]])
    metric.add({"y": first}, reference=None, targets=[[1.0, 1.0]], first_sample=0)
    metric.add({"y": second}, reference=None, targets=[[2.0]], first_sample=1)
    assert metric.statistics().values()["mae"] == 1.0


def test_weights_of_one_change_nothing():
    statistics = scored(*example(0))
    assert statistics.samples == 5
    assert statistics.values(np.ones(5, np.int64)) == statistics.values()


def test_weights_of_zero_leave_every_value_undefined():
    assert all(math.isnan(each) for each in scored(*example(0)).values(np.zeros(5, np.int64)).values())


def test_equal_targets_leave_r2_undefined():
    values = scored(np.full((3, 2), 0.2, np.float32), np.full((3, 2), 0.1)).values()
    assert math.isnan(values["r2"])
    assert values["rmse"] == pytest.approx(0.1)


def test_half_precision_is_scored_in_float64():
    values = scored(np.full((2, 1), 60000.0, np.float16), np.asarray([[0.0], [1.0]])).values()
    assert values["mae"] == pytest.approx(np.float64(np.float16(60000.0)) - 0.5)


def test_one_number_fits_with_and_without_an_axis():
    assert scored(np.asarray([[1.0], [3.0]]), np.asarray([1.0, 2.0])).values()["mae"] == 0.5


def test_arrays_give_back_the_statistics():
    statistics = scored(*example(3))
    weights = np.asarray([0, 2, 1, 1, 1])
    assert KIND.read(statistics.to_arrays()).values(weights) == statistics.values(weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("elements"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        lambda arrays: arrays.update(elements=arrays["elements"][:-1]),
        lambda arrays: arrays.update(elements=arrays["elements"] * 0),
        lambda arrays: arrays.update({name: each[:0] for name, each in arrays.items()}),
        lambda arrays: arrays.update(squared_errors=arrays["squared_errors"] * np.nan),
        lambda arrays: arrays.update(squared_errors=-arrays["squared_errors"]),
        lambda arrays: arrays.update(target_means=arrays["target_means"][None]),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change):
    arrays = scored(*example(0)).to_arrays()
    change(arrays)
    with pytest.raises(MeasurementError, match="statistics of regression"):
        KIND.read(arrays)


def test_nothing_added_is_an_error():
    with pytest.raises(MeasurementError, match="there are no samples"):
        KIND.make({}, None).statistics()


def test_empty_batch_is_an_error():
    with pytest.raises(MeasurementError, match="the batch from sample 0 is empty"):
        KIND.make({}, None).add({"y": np.zeros((0, 2))}, reference=None, targets=[], first_sample=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predictions_that_are_not_finite_are_an_error(value):
    output, targets = example(0)
    output[1, 2, 1] = value
    with pytest.raises(MeasurementError, match="sample 1 holds 1 of 6 values that are NaN or Inf"):
        scored(output, targets)


def test_errors_beyond_float64_are_an_error():
    with pytest.raises(MeasurementError, match="squared errors of sample 0 are above what float64 holds"):
        scored(np.asarray([[1e200]]), np.asarray([[0.0]]))


def test_batch_out_of_order_is_an_error():
    output, targets = example(0)
    metric = KIND.make({}, None)
    metric.add({"y": output[:2]}, reference=None, targets=targets[:2], first_sample=0)
    with pytest.raises(MeasurementError, match="expected the batch from sample 2, got that from 0"):
        metric.add({"y": output[:2]}, reference=None, targets=targets[:2], first_sample=0)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([np.zeros((3, 2))] * 4, MeasurementError, "5 predictions for 4 targets"),
        ([], DataError, "the samples have none"),
        ([np.zeros((3, 2))] * 4 + [None], DataError, "sample 4 has no target"),
        ([np.zeros((2, 3))] * 5, MeasurementError, r"output of sample 0 is \[3, 2\], its target \[2, 3\]"),
        ([np.zeros(6)] * 5, MeasurementError, r"its target \[6\]"),
        ([np.full((3, 2), np.nan)] * 5, DataError, "target of sample 0 holds a NaN or Inf"),
        (["text"] * 5, DataError, "expected numbers"),
        ([np.zeros(0)] * 5, DataError, "expected numbers"),
    ],
)
def test_targets_that_do_not_fit_are_an_error(targets, error, message):
    with pytest.raises(error, match=message):
        KIND.make({}, None).add({"y": example(0)[0]}, reference=None, targets=targets, first_sample=0)


def test_whole_numbers_are_no_prediction():
    with pytest.raises(MeasurementError, match=r"int64 \[2, 1\]; regression needs floats"):
        scored(np.zeros((2, 1), np.int64), np.zeros((2, 1)))


def test_options_that_it_does_not_have_are_refused():
    with pytest.raises(SpecError, match="no option 'outputs'; did you mean 'output'"):
        KIND.make({"outputs": "y"}, None)


def test_only_r2_is_better_higher():
    assert {name: value.higher_is_better for name, value in KIND.values.items()} == {
        "rmse": False,
        "mae": False,
        "r2": True,
    }
