"""Resampling: the same seed draws the same, processes change nothing, and intervals hold the truth as often as they say."""

import os
import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from gate.errors import MeasurementError
from gate.metrics.resampling import Resampled, in_turn, resampled, seed_from, values_of
from gate.processes import spread


@dataclass(frozen=True)
class Means:
    """Mean and root mean square of a number per sample."""

    each: np.ndarray

    @property
    def samples(self):
        return len(self.each)

    def values(self, weights=None):
        weights = np.ones(len(self.each)) if weights is None else weights
        count = weights.sum()
        return {"mean": float(weights @ self.each / count), "rms": float(np.sqrt(weights @ self.each**2 / count))}

    def to_arrays(self):
        return {"each": self.each}


@dataclass(frozen=True)
class Selective(Means):
    """The same, and says which values were asked for."""

    asked: list = field(default_factory=list)

    @property
    def names(self):
        return ("mean", "rms")

    def values(self, weights=None, names=None):
        self.asked.append(names)
        found = super().values(weights)
        return found if names is None else {name: found[name] for name in names}


@dataclass(frozen=True)
class ByProcess(Means):
    """Its value is the process that scored it."""

    def values(self, weights=None):
        return {"mean": float(os.getpid()), "rms": 0.0}


@dataclass(frozen=True)
class NotPicklable(Means):
    """Holds what no other process can be given."""

    inside: object = field(default_factory=lambda: lambda: None)


@dataclass(frozen=True)
class DefinedAtTimes(Means):
    """Not defined where the first sample is left out."""

    def values(self, weights=None):
        if weights is not None and not weights[0]:
            return {"mean": float("nan"), "rms": float("nan")}
        return super().values(weights)


def pair(n=60, seed=0):
    random = np.random.default_rng(seed)
    theirs = random.normal(1.0, 0.5, n)
    return Means(theirs + random.normal(0, 0.1, n)), Means(theirs)


def drawn(candidate, reference, *, names=("mean", "rms"), seed=5, resamples=200, over=in_turn):
    return resampled(candidate, reference, names, seed=seed, resamples=resamples, over=over)


def assert_equal(one, other):
    assert one.samples == other.samples
    for side in ("candidate", "reference"):
        assert getattr(one, side).keys() == getattr(other, side).keys()
        for name, values in getattr(one, side).items():
            np.testing.assert_array_equal(values, getattr(other, side)[name])


def test_the_same_seed_draws_the_same_and_another_does_not():
    candidate, reference = pair()
    assert_equal(drawn(candidate, reference), drawn(candidate, reference))
    assert (
        drawn(candidate, reference).candidate["mean"] != drawn(candidate, reference, seed=6).candidate["mean"]
    ).any()


def test_more_resamples_begin_with_the_same_ones():
    candidate, reference = pair()
    few, many = drawn(candidate, reference, resamples=50), drawn(candidate, reference, resamples=120)
    np.testing.assert_array_equal(few.candidate["mean"], many.candidate["mean"][:50])


PROCESSES = partial(spread, workers=2, worth_s=0.0)


def test_processes_give_what_one_process_gives():
    candidate, reference = pair()
    alone = drawn(candidate, reference, resamples=101)
    assert_equal(drawn(candidate, reference, resamples=101, over=PROCESSES), alone)


def test_processes_do_the_work_where_it_is_worth_it():
    there = ByProcess(np.zeros(5))
    scored_by = drawn(there, there, resamples=60, over=PROCESSES).candidate["mean"]
    assert set(scored_by[:20]) == {os.getpid()}
    assert os.getpid() not in set(scored_by[20:])


def test_what_cannot_go_to_another_process_is_scored_here():
    candidate, reference = pair()
    found = drawn(NotPicklable(candidate.each), NotPicklable(reference.each), resamples=40, over=PROCESSES)
    assert_equal(found, drawn(candidate, reference, resamples=40))


def test_little_work_starts_no_process():
    there = ByProcess(np.zeros(5))
    scored_by = drawn(there, there, resamples=100, over=partial(spread, workers=8)).candidate["mean"]
    assert set(scored_by) == {os.getpid()}


def test_a_resample_weighs_both_models_alike():
    candidate, _ = pair()
    found = drawn(candidate, candidate)
    np.testing.assert_array_equal(found.candidate["mean"], found.reference["mean"])
    assert (found.difference("mean").lower, found.difference("mean").upper) == (0.0, 0.0)
    assert (found.ratio("rms").lower, found.ratio("rms").upper) == (1.0, 1.0)


def test_only_what_was_asked_for_is_scored():
    statistics = Selective(pair()[0].each)
    found = drawn(statistics, statistics, names=("rms",), resamples=30)
    assert set(statistics.asked) == {("rms",)}
    assert list(found.candidate) == ["rms"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    began = time.perf_counter()
    random = np.random.default_rng(11)
    kept = {"value": 0, "difference": 0}
    for index in range(300):
        theirs = random.exponential(1.0, 80)
        ours = theirs + random.normal(0.1, 0.3, 80)
        found = drawn(Means(ours), Means(theirs), names=("mean",), seed=index, resamples=200)
        value, difference = found.interval("mean"), found.difference("mean")
        kept["value"] += value.lower <= 1.1 <= value.upper
        kept["difference"] += difference.lower <= 0.1 <= difference.upper
    for name, count in kept.items():
        assert 0.86 <= count / 300 <= 0.94, (name, count)
    assert time.perf_counter() - began < 60


def test_pairing_makes_the_interval_of_a_difference_narrow():
    candidate, reference = pair(200)
    found = drawn(candidate, reference)
    difference, value = found.difference("mean"), found.interval("mean")
    assert difference.upper - difference.lower < (value.upper - value.lower) / 2


def test_one_sample_leaves_the_interval_unbounded():
    found = drawn(Means(np.array([0.5])), Means(np.array([0.4])))
    assert found.samples == 1
    assert (found.interval("mean").lower, found.interval("mean").upper) == (-np.inf, np.inf)
    assert (found.difference("mean").lower, found.difference("mean").upper) == (-np.inf, np.inf)


def test_a_resample_without_a_value_counts_as_the_worst_on_either_side():
    candidate = DefinedAtTimes(pair()[0].each)
    found = drawn(candidate, candidate)
    assert np.isnan(found.candidate["mean"]).mean() > 0.2
    assert (found.interval("mean").lower, found.interval("mean").upper) == (-np.inf, np.inf)


def test_a_few_resamples_without_a_value_widen_the_interval_and_no_more():
    values = np.concatenate([np.full(4, np.nan), np.linspace(0, 1, 396)])
    interval = Resampled({"a": values}, {"a": values}, samples=10).interval("a")
    clean = Resampled({"a": values[4:]}, {"a": values[4:]}, samples=10).interval("a")
    assert np.isfinite([interval.lower, interval.upper]).all()
    assert interval.lower < clean.lower
    assert interval.upper > clean.upper


def test_a_ratio_to_nothing_is_not_bounded():
    zero = np.zeros(100)
    interval = Resampled({"a": zero}, {"a": zero}, samples=10).ratio("a")
    assert (interval.lower, interval.upper) == (-np.inf, np.inf)


def test_seeds_depend_on_every_digest_and_their_order():
    seeds = {seed_from("a", "b"), seed_from("b", "a"), seed_from("a", "c"), seed_from("ab", ""), seed_from("a\nb")}
    assert len(seeds) == 4  # the line break is what joins them, and no digest holds one
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@pytest.mark.parametrize(
    ("candidate", "reference", "names", "message"),
    [
        (Means(np.zeros(3)), Means(np.zeros(4)), ("mean",), "scored on 3 samples, what it is held against on 4"),
        (Means(np.zeros(0)), Means(np.zeros(0)), ("mean",), "no sample was scored"),
        (Means(np.zeros(3)), Means(np.zeros(3)), (), "no value was asked for"),
        (Means(np.zeros(3)), Means(np.zeros(3)), ("median",), "nothing was measured as 'median'; there is mean, rms"),
    ],
)
def test_nothing_to_resample_is_an_error(candidate, reference, names, message):
    with pytest.raises(MeasurementError, match=message):
        drawn(candidate, reference, names=names)


def test_values_without_weights_are_those_of_all_samples():
    assert values_of(Means(np.array([1.0, 3.0])), ("mean",))["mean"] == 2.0
