"""The clock loop, on a clock that the test winds."""

import gc
import time
from dataclasses import dataclass
from itertools import count, groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.timing import concurrent, interleave, resolution_ns, warm_up


class Clock:
    """Nanoseconds that go on by what each call takes."""

    def __init__(self):
        self.now = 10**9

    def __call__(self):
        return self.now


class Engine:
    """Takes so many nanoseconds of the clock, and writes down when it was called, with which number."""

    def __init__(self, clock, name, log, *, takes=10, says=lambda number: None):
        self.clock, self.name, self.log, self.takes, self.says = clock, name, log, takes, says

    def __call__(self, number):
        self.log.append(f"{self.name}{number}")
        self.clock.now += self.takes
        said = self.says(number)
        return None if said is None else lambda: self.read(said)

    def read(self, said):
        """Asking the events takes its time too."""
        self.clock.now += 1000
        self.log.append(f"{self.name}r")
        return said


@dataclass(frozen=True)
class Said:
    gpu_compute: int
    enqueue: int = 1
    h2d: int | None = None
    d2h: int | None = None


def legs_of(log):
    """The names of the engines in the order of their turns, with how many calls each turn had."""
    return [(name, len(list(calls))) for name, calls in groupby(log, key=lambda each: each[0])]


@pytest.mark.parametrize(("order", "turns"), [(0, "ABBAABBA"), (1, "BAABBAAB")])
def test_two_engines_take_turns_in_legs_with_untimed_ones_before(order, turns):
    clock, log, begun, ended = Clock(), [], [], []
    interleave(
        [Engine(clock, "A", log), Engine(clock, "B", log)],
        kept=20,
        leg=5,
        discard=2,
        order=order,
        before=begun.append,
        between=ended.append,
        clock=clock,
    )
    assert "".join("AB"[each] for each in begun) == turns
    assert ended == begun
    assert [name for name, _ in legs_of(log)] == [name for name, _ in groupby(turns)]
    for name in "AB":
        assert [each for each in log if each[0] == name] == [f"{name}{number}" for number in range(28)]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.sampled_from([0, 1]), st.integers(1, 2))
def test_each_engine_keeps_exactly_as_many_as_asked(kept, leg, discard, order, engines):
    clock, log = Clock(), []
    calls = [Engine(clock, name, log, takes=takes) for name, takes in (("A", 7), ("B", 9))][:engines]
    found = interleave(calls, kept=kept, leg=leg, discard=discard, order=order, clock=clock)
    assert [each.regions for each in found] == [{"host_wall": (takes,) * kept} for takes in (7, 9)[:engines]]
    legs = -(-kept // leg)
    assert len(log) == engines * (kept + legs * discard)


def test_what_is_between_legs_is_in_no_duration():
    clock, log = Clock(), []

    def later(_):
        clock.now += 10**6

    (found,) = interleave([Engine(clock, "A", log)], kept=4, leg=2, discard=1, before=later, between=later, clock=clock)
    assert found.regions["host_wall"] == (10, 10, 10, 10)
    assert found.span_ns == 4 * 10 + 2 * 10**6 + 10


def test_regions_of_a_gpu_are_recorded_with_their_sum():
    clock = Clock()
    engine = Engine(clock, "A", [], says=lambda number: Said(100 + number, h2d=5, d2h=6))
    (found,) = interleave([engine], kept=3, leg=3, discard=0, clock=clock)
    assert found.regions == {
        "host_wall": (10, 10, 10),
        "enqueue": (1, 1, 1),
        "gpu_compute": (100, 101, 102),
        "h2d": (5, 5, 5),
        "d2h": (6, 6, 6),
        "latency": (111, 112, 113),
    }


def test_what_happened_on_the_gpu_is_asked_once_the_clock_was_read_and_of_kept_inferences_alone():
    clock, log = Clock(), []
    engine = Engine(clock, "A", log, says=Said)
    (found,) = interleave([engine], kept=4, leg=2, discard=1, clock=clock)
    assert found.regions["host_wall"] == (10, 10, 10, 10)
    assert log == ["A0", "A1", "Ar", "A2", "Ar", "A3", "A4", "Ar", "A5", "Ar"]


def test_without_copies_there_is_no_latency():
    clock = Clock()
    (found,) = interleave([Engine(clock, "A", [], says=Said)], kept=2, leg=2, discard=0, clock=clock)
    assert set(found.regions) == {"host_wall", "enqueue", "gpu_compute"}


@pytest.mark.parametrize(
    "says",
    [
        lambda number: Said(1) if number else None,
        lambda number: Said(1, h2d=1),
        lambda number: Said(1, h2d=1, d2h=1) if number else Said(1),
    ],
)
def test_regions_of_some_inferences_only_are_an_error(says):
    clock = Clock()
    with pytest.raises(MeasurementError, match="not of one kind"):
        interleave([Engine(clock, "A", [], says=says)], kept=3, leg=3, discard=0, clock=clock)


@pytest.mark.parametrize("ticks", [(0, 10, 5), (0, 10, 20, 15, 30), (20, 15, 30)])
def test_clock_that_goes_back_while_engines_take_turns_is_an_error(ticks):
    left = iter(ticks)
    with pytest.raises(MeasurementError, match="went back by 5 ns"):
        interleave([lambda number: None], kept=2, leg=2, discard=0, clock=lambda: next(left))


def test_clock_that_goes_back_between_legs_is_an_error():
    clock = Clock()

    def back(_):
        clock.now -= 5

    with pytest.raises(MeasurementError, match="went back by 5 ns"):
        interleave([Engine(clock, "A", [])], kept=4, leg=2, discard=0, between=back, clock=clock)


@pytest.mark.parametrize(
    "changes", [{"kept": 0}, {"leg": 0}, {"discard": -1}, {"calls": []}, {"calls": [lambda number: None] * 3}]
)
def test_turns_that_cannot_be_taken_are_an_error(changes):
    with pytest.raises(MeasurementError, match=r"at least one inference|one engine is timed"):
        interleave(**{"calls": [lambda number: None], "kept": 1, "leg": 1, "discard": 0, **changes})


def test_garbage_collector_is_off_while_engines_take_turns():
    seen = []
    interleave([lambda number: seen.append(gc.isenabled())], kept=3, leg=2, discard=1)
    assert seen == [False] * 5
    assert gc.isenabled()


@given(st.floats(-1.0, 40.0), st.integers(1, 12), st.sampled_from([0, 1]), st.integers(1, 2), st.integers(0, 3))
def test_turns_that_would_end_too_late_do_not_begin(max_s, leg, order, engines, discard):
    clock, log = Clock(), []
    began = clock.now
    calls = [Engine(clock, name, log, takes=10**8) for name in "AB"[:engines]]
    found = interleave(calls, kept=100, leg=leg, discard=discard, order=order, max_s=max_s, clock=clock)
    kept = {len(each.regions["host_wall"]) for each in found}
    assert len(kept) == 1
    (number,) = kept
    turn_s = 2 * engines * (leg + discard) * 0.1
    assert number == 100 or number % (2 * leg) == 0
    assert 2 * leg <= number <= 100
    assert (clock.now - began) / 1e9 <= max(max_s, turn_s) + 1e-6
    if number < 100:
        assert (clock.now - began) / 1e9 + turn_s > max_s - 1e-6


@given(st.floats(0.0, 40.0), st.integers(1, 12), st.sampled_from([0, 1]), st.integers(1, 2), st.integers(0, 3))
def test_turns_go_on_until_they_took_long_enough_or_are_as_many_as_are_kept(least_s, leg, order, engines, discard):
    clock, log = Clock(), []
    began = clock.now
    calls = [Engine(clock, name, log, takes=10**8) for name in "AB"[:engines]]
    least, most = 2 * leg, 40 * leg
    found = interleave(
        calls, kept=least, leg=leg, discard=discard, order=order, least_s=least_s, most=most, clock=clock
    )
    (number,) = {len(each.regions["host_wall"]) for each in found}
    took_s, turn_s = (clock.now - began) / 1e9, 2 * engines * (leg + discard) * 0.1
    assert least <= number <= most
    assert number % (2 * leg) == 0
    assert number == most or took_s >= least_s - 1e-6
    assert number == least or took_s - turn_s < least_s + 1e-6


def test_turns_end_in_time_although_they_were_to_take_longer():
    clock = Clock()
    (found,) = interleave(
        [Engine(clock, "A", [], takes=10**8)], kept=8, leg=2, discard=0, least_s=60.0, most=1000, max_s=2.0, clock=clock
    )
    assert 8 < len(found.regions["host_wall"]) <= 20


def test_streams_keep_two_each_when_their_time_is_over():
    found = concurrent(
        [lambda _: time.sleep(0.001)] * 2, kept=5000, discard=1, warm_up_s=0, warm_up_calls=1, max_s=-1.0
    )
    assert len(found.times.regions["host_wall"]) == 4
    found = concurrent(
        [lambda _: time.sleep(0.001)] * 2, kept=5000, discard=1, warm_up_s=0, warm_up_calls=1, max_s=0.05
    )
    assert 4 < len(found.times.regions["host_wall"]) < 200


@pytest.mark.parametrize(("seconds", "calls", "expected"), [(0.0, 200, 1), (10.0, 5, 5), (0.5, 200, 5), (1.0, 0, 1)])
def test_warm_up_ends_with_whichever_comes_first(seconds, calls, expected):
    clock, log = Clock(), []
    assert warm_up(Engine(clock, "A", log, takes=10**8), seconds=seconds, calls=calls, clock=clock) == expected
    assert len(log) == expected


def test_streams_run_at_the_same_time_and_share_the_inferences():
    seen = [set() for _ in range(3)]

    def stream(index):
        def call(number):
            seen[index].add(number)
            time.sleep(0.001)

        return call

    found = concurrent([stream(index) for index in range(3)], kept=60, discard=1, warm_up_s=1.0, warm_up_calls=2)
    walls = found.times.regions["host_wall"]
    assert list(found.times.regions) == ["host_wall"]
    assert len(walls) == 60
    assert found.warm_up == 6
    assert found.times.span_ns * 3 >= sum(walls)
    assert found.times.span_ns < sum(walls)
    assert all(len(each) >= 20 for each in seen)


def test_no_stream_ends_before_all_have_their_share():
    seen = [0, 0]

    def stream(index, seconds):
        def call(number):
            seen[index] += 1
            time.sleep(seconds)

        return call

    calls = [stream(0, 0.0005), stream(1, 0.01)]
    found = concurrent(calls, kept=21, discard=0, warm_up_s=0, warm_up_calls=1)
    walls = sorted(found.times.regions["host_wall"])
    assert [wall >= 10**7 for wall in walls].count(True) >= 10
    assert len(walls) == 21
    assert seen[0] > 40


def test_stream_that_fails_ends_the_others_with_its_error():
    def fails(number):
        if number == 4:
            raise ValueError("broken stream")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="broken stream"):
        concurrent([lambda number: time.sleep(0.001), fails], kept=10**6, discard=0, warm_up_s=0, warm_up_calls=1)
    assert gc.isenabled()


def test_stream_that_fails_in_its_warm_up_ends_the_others():
    def fails(number):
        raise ValueError("broken at once")

    with pytest.raises(ValueError, match="broken at once"):
        concurrent([lambda number: None, fails], kept=10, discard=0, warm_up_s=0, warm_up_calls=1)


def test_clock_that_goes_back_in_a_stream_is_an_error():
    ticks = count(10**6, -1)
    with pytest.raises(MeasurementError, match="went back"):
        concurrent([lambda number: None], kept=3, discard=0, warm_up_s=0, warm_up_calls=1, clock=lambda: next(ticks))


@pytest.mark.parametrize(("streams", "kept"), [(0, 5), (2, 1)])
def test_streams_without_an_inference_each_are_an_error(streams, kept):
    with pytest.raises(MeasurementError, match="cannot share"):
        concurrent([lambda number: None] * streams, kept=kept, discard=0, warm_up_s=0, warm_up_calls=1)


def test_the_clock_has_a_resolution():
    assert resolution_ns() >= 1
