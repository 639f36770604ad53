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


CUDA_EVENTS = "cuda_events"
"""Name of the clock of calls that time themselves on the device."""

_STEPS_OF_PROGRESS = 20


def sample(
    call: Callable[[], int | None],
    *,
    samples: int,
    warm_up_s: float,
    max_time_s: float,
    clock: Clock = time.perf_counter_ns,
    observer: Progress | None = None,
) -> RawDurations:
    """Time a call again and again, each on its own, with the garbage collector off.

    Args:
        call: One inference, inputs bound already, done when it returns. Where it returns nanoseconds, as a call
            between CUDA events does, they are the duration; else the clock goes around it.
        samples: How many to time.
        warm_up_s: Call it untimed for this long first, at least once.
        max_time_s: Stop after this long, counted from the first timed call; at least one call is timed.
        clock: Monotonic, nanoseconds.
        observer: Told of progress about twenty times.

    Raises:
        MeasurementError: No sample was asked for, the clock went back, or only some calls timed themselves.
    """
    if samples < 1:
        raise MeasurementError(f"timing needs at least one sample, got samples = {samples}")
    warm_up = _warm_up(call, clock, int(warm_up_s * 1e9))
    durations: list[int] = []
    own = 0
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
            own_ns = call()
            end = clock()
            if start < previous or end < start:
                raise _stepped_back(clock, previous, min(start, end))
            previous = end
            if own_ns is not None:
                own += 1
            durations.append(end - start if own_ns is None else own_ns)
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
    if own not in (0, len(durations)):
        raise MeasurementError(
            f"{own} of {len(durations)} calls timed themselves, so the durations are not of one kind"
        )
    name = CUDA_EVENTS if own else _name_of(clock)
    return RawDurations(durations_ns=tuple(durations), warm_up=warm_up, clock=name, stopped_by=stopped_by)


def _warm_up(call: Callable[[], int | None], clock: Clock, duration_ns: int) -> int:
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
