"""The clock loop: warm up, then time one call after another. It measures and does not judge."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from gate.errors import MeasurementError

Clock = Callable[[], int]


class Progress(Protocol):
    """Told how many samples are done; called between timed regions, never inside one."""

    def advance(self, steps: int = 1) -> None:
        """So many samples more."""
        ...


class RawDurations(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one run of the clock loop gave.

    Args:
        durations_ns: Every timed call, in order, in nanoseconds.
        warm_up: Untimed calls before them.
        clock: Name of the clock.
        stopped_by: `samples`: as many as asked; `max_time`: time ran out first.
    """

    durations_ns: tuple[int, ...]
    warm_up: int
    clock: str
    stopped_by: Literal["samples", "max_time"]


_STEPS_OF_PROGRESS = 20


def sample(
    call: Callable[[], None],
    *,
    samples: int,
    warm_up_s: float,
    max_time_s: float,
    clock: Clock = time.perf_counter_ns,
    observer: Progress | None = None,
) -> RawDurations:
    """Time a call again and again, each on its own, with the garbage collector off.

    Args:
        call: One inference, inputs bound already, done when it returns.
        samples: How many to time.
        warm_up_s: Call it untimed for this long first, at least once.
        max_time_s: Stop after this long, counted from the first timed call; at least one call is timed.
        clock: Monotonic, nanoseconds.
        observer: Told of progress about twenty times.

    Raises:
        MeasurementError: No sample was asked for, or the clock went back.
    """
    if samples < 1:
        raise MeasurementError(f"timing needs at least one sample, got samples = {samples}")
    warm_up = _warm_up(call, clock, int(warm_up_s * 1e9))
    durations: list[int] = []
    every = max(1, samples // _STEPS_OF_PROGRESS)
    told = 0
    stopped_by: Literal["samples", "max_time"] = "samples"
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = previous = clock()
        deadline = begin + int(max_time_s * 1e9)
        while len(durations) < samples:
            start = clock()
            call()
            end = clock()
            if start < previous or end < start:
                raise _stepped_back(clock, previous, min(start, end))
            previous = end
            durations.append(end - start)
            if observer is not None and len(durations) - told >= every:
                observer.advance(len(durations) - told)
                told = len(durations)
            if end >= deadline and len(durations) < samples:
                stopped_by = "max_time"
                break
    finally:
        if collecting:
            gc.enable()
    if observer is not None and len(durations) > told:
        observer.advance(len(durations) - told)
    return RawDurations(durations_ns=tuple(durations), warm_up=warm_up, clock=_name_of(clock), stopped_by=stopped_by)


def _warm_up(call: Callable[[], None], clock: Clock, duration_ns: int) -> int:
    begin = previous = clock()
    calls = 0
    while calls == 0 or previous - begin < duration_ns:
        call()
        calls += 1
        now = clock()
        if now < previous:
            raise _stepped_back(clock, previous, now)
        previous = now
    return calls


def _stepped_back(clock: Clock, before: int, after: int) -> MeasurementError:
    return MeasurementError(
        f"the clock {_name_of(clock)} went back by {before - after} ns while timing, so no duration can be trusted"
    )


def _name_of(clock: Clock) -> str:
    return getattr(clock, "__name__", type(clock).__name__)
