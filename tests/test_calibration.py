"""Calibration: what one pass counts, what is said of it, and when two sets of inputs are of another scale."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.calibration import (
    LEAST_SAMPLES,
    OUTLIER_RATIO,
    ActivationStats,
    InputStats,
    add_inputs,
    calibration_notes,
    calibration_warnings,
    range_of,
    scale_notes,
)
from gate.engines.interface import CalibrationRecord, TensorRange

RNG = np.random.default_rng(0)
FLOATS = st.floats(-1e6, 1e6, width=32)


def stats_of(values, low=-math.inf, high=math.inf):
    stats = ActivationStats(low, high)
    stats.add(np.asarray(values, np.float32))
    return stats


def inputs_of(*values):
    stats = {}
    for each in values:
        add_inputs(stats, {"image": np.asarray(each)})
    return stats


@given(st.lists(st.lists(FLOATS, max_size=20), max_size=6))
def test_merged_parts_give_the_whole(parts):
    whole, merged = stats_of([x for part in parts for x in part], -1.0, 2.0), ActivationStats(-1.0, 2.0)
    for part in parts:
        merged.merge(stats_of(part, -1.0, 2.0))
    assert np.array_equal(whole.bins, merged.bins)
    for name in ("count", "clipped", "low", "high", "max_abs"):
        assert getattr(whole, name) == getattr(merged, name)


@given(st.lists(FLOATS, min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_quantile_is_a_bound_within_a_bin(values, p):
    absolute = np.sort(np.abs(np.asarray(values, np.float32)))
    exact = float(absolute[math.ceil(p * len(absolute)) - 1])
    found = stats_of(values).quantile_abs(p)
    assert found >= exact or exact < 1e-37
    assert found <= exact * (1 + 1 / 32) + 1e-37


def test_large_arrays_are_counted_once():
    values = RNG.standard_normal(300_001).astype(np.float32)
    stats = stats_of(values, -2.0, 2.0)
    assert stats.count == stats.bins.sum() == values.size
    assert stats.clipped == np.count_nonzero(np.abs(values) > 2)
    assert stats.max_abs == float(np.abs(values).max())


def test_values_that_are_not_finite_are_counted_apart():
    stats = stats_of([1.0, np.nan, np.inf, -2.0])
    assert (stats.count, stats.not_finite, stats.max_abs) == (2, 2, 2.0)
    nothing = stats_of([np.nan])
    assert (nothing.count, nothing.not_finite, nothing.max_abs) == (0, 1, 0.0)


def test_statistics_of_other_ranges_do_not_merge():
    with pytest.raises(ValueError, match="do not merge"):
        stats_of([1.0], -1, 1).merge(stats_of([1.0], -2, 2))


def test_empty_statistics_have_no_quantile():
    assert ActivationStats().quantile_abs(0.5) == 0.0
    assert stats_of([]).count == 0


@pytest.mark.parametrize(
    ("values", "state"),
    [
        (np.zeros(100), "dead"),
        (np.full(100, 0.5), "constant"),
        (RNG.standard_normal(10_000), "ok"),
        (np.maximum(RNG.standard_normal(10_000) - 3.0, 0), "ok"),
        (np.append(RNG.standard_normal(10_000), 100.0), "outliers"),
        (np.append(np.zeros(100_000), 1.0), "ok"),
    ],
)
def test_state_says_what_is_wrong_with_a_tensor(values, state):
    stats = stats_of(values)
    assert range_of("t", low=-stats.max_abs, high=stats.max_abs, stats=stats).state == state


def test_outliers_that_the_range_clips_take_no_steps():
    stats = stats_of(np.append(RNG.standard_normal(10_000), 100.0), -4.5, 4.5)
    found = range_of("t", low=-4.5, high=4.5, stats=stats)
    assert found.state == "ok"
    assert found.clipped_fraction == pytest.approx(1e-4, rel=0.5)
    assert found.max_abs == 100.0


def test_floating_steps_bear_wider_outliers():
    values = np.append(RNG.standard_normal(10_000), 100.0)
    stats = stats_of(values)
    assert range_of("t", low=-100.0, high=100.0, stats=stats, even_steps=False).state == "ok"
    assert OUTLIER_RATIO == 8


def named(name, state="ok", clipped=0.0):
    return TensorRange(name=name, low=-1, high=1, clipped_fraction=clipped, max_abs=9.0, p999_abs=1.0, state=state)


def test_good_calibration_has_no_notes():
    assert calibration_notes([named("a")], samples=LEAST_SAMPLES) == ()


def test_notes_name_each_kind_of_trouble():
    ranges = [named("a", "dead"), named("b", "constant"), named("c", "outliers"), named("d", clipped=0.02)]
    few, dead, constant, outliers, clipped = calibration_notes(ranges, samples=LEAST_SAMPLES - 1)
    assert few.startswith("calibrated on 31 samples")
    assert "1 in 32" in few
    assert "zeros only in 1 tensor: a" in dead
    assert "one value only in 1 tensor: b" in constant
    assert "c the largest is 9, and 99.9 % are within 1" in outliers
    assert "1 tensor: d; most in d: 2 %" in clipped


def test_long_lists_are_cut():
    (note,) = calibration_notes([named(str(each), "dead") for each in range(9)], samples=100)
    assert "9 tensors: 0, 1, 2, 3 and 5 more" in note


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), min_size=1, max_size=6))
def test_input_statistics_merge(parts):
    values = np.concatenate([np.asarray(part) for part in parts])
    merged = InputStats()
    for part in parts:
        one = InputStats()
        one.add(np.asarray(part))
        merged.merge(one)
    assert merged.count == values.size
    assert merged.mean == pytest.approx(values.mean(), abs=1e-9)
    assert merged.std == pytest.approx(values.std(), abs=1e-6)
    assert merged.rms == pytest.approx(np.sqrt(np.mean(values**2)), abs=1e-6)
    assert (merged.low, merged.high) == (values.min(), values.max())


def test_input_statistics_keep_a_small_spread_beside_a_large_mean():
    values = 1e6 + RNG.standard_normal(200_000)
    stats = InputStats()
    stats.add(values)
    assert stats.std == pytest.approx(values.std(), rel=1e-9)


def test_input_statistics_count_what_is_not_finite_and_take_integers():
    stats = InputStats()
    stats.add(np.array([1.0, np.nan]))
    stats.add(np.array([3], np.uint8))
    assert (stats.count, stats.not_finite, stats.mean, stats.spread) == (2, 1, 2.0, 2.0)
    assert InputStats().rms == InputStats().spread == 0.0


IMAGES = RNG.uniform(0, 1, (64, 100)).astype(np.float32)


def test_two_draws_of_one_set_are_of_one_scale():
    assert scale_notes(inputs_of(IMAGES[:32]), inputs_of(IMAGES[32:])) == ()


def test_forgotten_division_is_named_with_both_numbers():
    (note,) = scale_notes(inputs_of(IMAGES), inputs_of(IMAGES * 255))
    assert note.startswith("calibration input 'image' is 255 x smaller than the evaluation data (rms 0.57")
    assert note.endswith("preprocess both alike")
    (note,) = scale_notes(inputs_of(IMAGES * 255), inputs_of(IMAGES))
    assert "255 x larger" in note


def test_other_range_of_the_same_rms_is_named():
    centred = IMAGES * 2 - 1
    (note,) = scale_notes(inputs_of(IMAGES), inputs_of(centred))
    assert "2 x smaller in range" in note


def test_input_of_zeros_is_named():
    (note,) = scale_notes(inputs_of(IMAGES * 0), inputs_of(IMAGES))
    assert "has the rms 0, the evaluation data 0.57" in note


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ({}, inputs_of(IMAGES), "calibration"),
        (inputs_of(IMAGES), {}, "evaluation"),
        (inputs_of(IMAGES * np.nan), inputs_of(IMAGES), "calibration"),
    ],
)
def test_scale_that_cannot_be_compared_is_said(ours, theirs, where):
    assert scale_notes(ours, theirs) == (
        f"input 'image' has no finite values in the {where} data: its scale was not compared",
    )


def record(images):
    stats = ActivationStats()
    stats.add(images)
    bound = stats.max_abs
    ranges = (range_of("image", low=-bound, high=bound, stats=stats),)
    return CalibrationRecord(
        method="minmax", samples=100, sha256="0" * 64, ranges=ranges, notes=calibration_notes(ranges, samples=100)
    )


def test_one_outlier_is_told_once_and_not_as_another_scale():
    spoiled = IMAGES.copy()
    spoiled[0, 0] = 20.0
    scales = scale_notes(inputs_of(spoiled), inputs_of(IMAGES))
    assert "larger in range than" in scales[0]
    (told,) = calibration_warnings(record(spoiled), scales)
    assert told.startswith("a few values take most of the range of 1 tensor: image")


def test_another_scale_is_told_beside_outliers():
    spoiled = IMAGES * 255
    spoiled[0, 0] = 1e5
    scales = scale_notes(inputs_of(spoiled), inputs_of(IMAGES))
    assert calibration_warnings(record(spoiled), scales) == (*record(spoiled).notes, *scales)
    centred = scale_notes(inputs_of(IMAGES * 2 - 1), inputs_of(IMAGES))
    assert calibration_warnings(record(IMAGES), centred) == centred


def test_another_scale_is_told_where_the_record_is_not_known():
    assert calibration_warnings(None, ("input 'x' is of another scale",)) == ("input 'x' is of another scale",)
    assert calibration_warnings(None) == ()
