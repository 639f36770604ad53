"""The clock loop, on a clock that the test winds."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.timing import sample


class Clock:
    """Nanoseconds that go on by what each call takes."""

    def __init__(self):
        self.now = 10**9

    def __call__(self):
        return self.now


class Counter:
    def __init__(self):
        self.done = 0
        self.told = 0

    def advance(self, steps=1):
        self.done += steps
        self.told += 1


def taking(clock, durations):
    left = iter(durations)

    def call():
        clock.now += next(left)

    return call


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=60))
def test_each_call_is_timed_alone_and_in_order(durations):
    clock = Clock()
    raw = sample(taking(clock, [5, *durations]), samples=len(durations), warm_up_s=0, max_time_s=1e6, clock=clock)
    assert raw.durations_ns == tuple(durations)
    assert raw.stopped_by == "samples"
    assert raw.warm_up == 1
    assert raw.clock == "Clock"


def test_warm_up_lasts_as_long_as_asked_and_is_not_timed():
    clock = Clock()
    raw = sample(taking(clock, [10**8] * 9), samples=4, warm_up_s=0.5, max_time_s=10, clock=clock)
    assert (raw.warm_up, len(raw.durations_ns)) == (5, 4)


def test_time_limit_stops_early_and_says_so():
    clock = Clock()
    raw = sample(taking(clock, [10**8] * 99), samples=50, warm_up_s=0, max_time_s=0.35, clock=clock)
    assert raw.stopped_by == "max_time"
    assert len(raw.durations_ns) == 4


def test_one_call_is_timed_however_short_the_limit():
    clock = Clock()
    raw = sample(taking(clock, [10**9] * 3), samples=5, warm_up_s=0, max_time_s=1e-9, clock=clock)
    assert raw.durations_ns == (10**9,)


def test_clock_that_goes_back_while_timing_is_an_error():
    clock = Clock()
    with pytest.raises(MeasurementError, match="went back by 7 ns"):
        sample(taking(clock, [1, 5, -7, 5]), samples=3, warm_up_s=0, max_time_s=1, clock=clock)


def test_clock_that_goes_back_in_warm_up_is_an_error():
    clock = Clock()
    with pytest.raises(MeasurementError, match="went back by 3 ns"):
        sample(taking(clock, [-3, 5]), samples=1, warm_up_s=0, max_time_s=1, clock=clock)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_sample_asked_for_is_an_error(samples):
    with pytest.raises(MeasurementError, match="at least one sample"):
        sample(lambda: None, samples=samples, warm_up_s=0, max_time_s=1)


def test_observer_is_told_of_every_sample_a_few_times():
    clock, counter = Clock(), Counter()
    sample(taking(clock, [1] * 1001), samples=1000, warm_up_s=0, max_time_s=1, clock=clock, observer=counter)
    assert counter.done == 1000
    assert counter.told == 20


def test_garbage_collector_is_off_inside_and_as_before_after():
    seen = []
    sample(lambda: seen.append(gc.isenabled()), samples=2, warm_up_s=0, max_time_s=1)
    assert seen[1:] == [False, False]
    assert gc.isenabled()


def test_garbage_collector_is_back_on_after_a_failure():
    def fail():
        if not gc.isenabled():
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        sample(fail, samples=2, warm_up_s=0, max_time_s=1)
    assert gc.isenabled()


def test_the_real_clock_is_the_default():
    raw = sample(lambda: None, samples=3, warm_up_s=0, max_time_s=1)
    assert raw.clock == "perf_counter_ns"
    assert all(duration >= 0 for duration in raw.durations_ns)


def test_a_call_that_times_itself_is_believed():
    raw = sample(lambda: 5_000, samples=3, warm_up_s=0.0, max_time_s=10.0)
    assert raw.durations_ns == (5_000, 5_000, 5_000)
    assert raw.clock == "cuda_events"


def test_calls_that_time_themselves_only_sometimes_are_an_error():
    answers = iter([None, 5, None, 5])
    with pytest.raises(MeasurementError, match="2 of 3 calls timed themselves"):
        sample(lambda: next(answers), samples=3, warm_up_s=0.0, max_time_s=10.0)
