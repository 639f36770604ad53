"""The clock loops: one call after another, engines that take turns, streams at once. They measure and do not judge."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import msgspec

from gate.errors import MeasurementError
from gate.latency.measurement import Region

Clock = Callable[[], int]


_LEAST_OF_A_STREAM = 2


class Regions(Protocol):
    """What a call on a GPU says of its inference, nanoseconds; None for what did not happen."""

    @property
    def gpu_compute(self) -> int:
        """Between two events around the engine."""
        ...

    @property
    def enqueue(self) -> int:
        """The host's time to launch it."""
        ...

    @property
    def h2d(self) -> int | None:
        """Between events around the copies in."""
        ...

    @property
    def d2h(self) -> int | None:
        """Between events around the copies out."""
        ...


Call = Callable[[int], Callable[[], Regions] | None]
"""One inference, done when it returns; takes its number, by which inputs take turns.

What it returns reads the events of that inference; it is called once the clock was read, before the next inference.
"""


class LegTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kept inferences of one engine.

    Args:
        regions: Nanoseconds by region, in the order in which they were timed. `host_wall` is the clock around the call;
            `latency` is there where both copies are.
        span_ns: From the begin of the first kept inference to the end of the last one.
    """

    regions: dict[Region, tuple[int, ...]]
    span_ns: int


class ConcurrentTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `concurrent` gave.

    Args:
        times: `host_wall` alone: streams share the GPU, so its own events do not say what one inference took.
        warm_up: Untimed inferences of all streams before all began.
    """

    times: LegTimes
    warm_up: int


def warm_up(call: Call, *, seconds: float, calls: int, clock: Clock = time.perf_counter_ns) -> int:
    """Call untimed for so long or so often, whichever comes first, at least once; returns how often.

    Raises:
        MeasurementError: The clock went back.
    """
    begin = previous = clock()
    done = 0
    while done == 0 or (done < calls and previous - begin < seconds * 1e9):
        call(done)
        done += 1
        now = clock()
        if now < previous:
            raise _stepped_back(clock, previous, now)
        previous = now
    return done


def interleave(
    calls: Sequence[Call],
    *,
    kept: int,
    leg: int,
    discard: int,
    order: Literal[0, 1] = 0,
    before: Callable[[int], None] | None = None,
    between: Callable[[int], None] | None = None,
    least_s: float = 0.0,
    most: int = 0,
    max_s: float = math.inf,
    clock: Clock = time.perf_counter_ns,
) -> tuple[LegTimes, ...]:
    """Time one engine, or two that take turns in legs, with the garbage collector off.

    Args:
        calls: One or two engines; each is called with 0, 1, 2 and so on, discarded inferences counted.
        kept: Inferences of each that are kept. The last leg is shorter where `leg` does not divide it.
        leg: Kept inferences of a leg.
        discard: Untimed ones before each leg: the first after a switch finds the caches of the other engine.
        order: 0: A B B A, again and again; 1: B A A B.
        before: Called with the engine's index before each leg, outside timed regions.
        between: Likewise after each leg.
        least_s: Turns go on beyond `kept` until this long is over, all engines and discarded inferences together: a
            few milliseconds are less than one hiccup of the machine lasts.
        most: Then no more inferences of each are kept than these.
        max_s: No more turns begin that would end after this long, as those before went. Then fewer inferences are
            kept: the same number of each engine, and of each at least two legs.
        clock: Monotonic, nanoseconds.

    Returns:
        In the order of the calls.

    Raises:
        MeasurementError: There are not one or two engines, nothing is to be kept, the clock went back, or only some
            calls say what happened on the GPU.

    Source: docs/latency.md, for the legs and the two discarded inferences.
    """
    if len(calls) not in (1, 2):
        raise MeasurementError(f"one engine is timed, or two in turn, got {len(calls)}")
    if kept < 1 or leg < 1 or discard < 0:
        raise MeasurementError(
            f"timing needs at least one inference and one a leg, got kept = {kept}, leg = {leg}, discard = {discard}"
        )
    timed = tuple(_Timed() for _ in calls)
    with _no_collection():
        begin = previous = clock()
        whole = 2 * len(calls)
        for number, (subject, size) in enumerate(_legs(len(calls), kept=max(kept, most), leg=leg, order=order)):
            if number and number % whole == 0:
                enough = number // len(calls) * leg >= kept and previous - begin >= least_s * 1e9
                if enough or (previous - begin) * (1 + whole / number) > max_s * 1e9:
                    break
            if before is not None:
                before(subject)
            previous = timed[subject].leg(calls[subject], size, discard=discard, clock=clock, previous=previous)
            if between is not None:
                between(subject)
    return tuple(each.times() for each in timed)


def concurrent(
    calls: Sequence[Call],
    *,
    kept: int,
    discard: int,
    warm_up_s: float,
    warm_up_calls: int,
    max_s: float = math.inf,
    clock: Clock = time.perf_counter_ns,
) -> ConcurrentTimes:
    """Time streams that run at the same time, each in a thread of its own, back to back.

    Each keeps an equal share. One that has its share goes on untimed until all have theirs, so that no inference is
    kept that had the device to itself.

    Args:
        calls: One a stream; each is called with 0, 1, 2 and so on.
        kept: Inferences of all streams together; at least one a stream.
        discard: Untimed ones of each stream after all have warmed up, and more until the last stream runs.
        warm_up_s, warm_up_calls: Of each stream, in its thread, before all begin; whichever comes first.
        max_s: After this long each stream keeps no more, once it has two.
        clock: Monotonic, nanoseconds.

    Raises:
        MeasurementError: There is no stream, fewer inferences than streams are to be kept, or the clock went back.
    """
    if not calls or kept < len(calls):
        raise MeasurementError(f"{len(calls)} streams cannot share {kept} inferences")
    barrier = threading.Barrier(len(calls))
    stop = threading.Event()
    running: list[int] = []
    finished: list[int] = []
    spans: list[list[tuple[int, int]]] = [[] for _ in calls]
    warm: list[int] = [0] * len(calls)
    failures: list[BaseException] = []

    def stream(index: int) -> None:
        call, mine = calls[index], spans[index]
        try:
            warm[index] = warm_up(call, seconds=warm_up_s, calls=warm_up_calls, clock=clock)
            barrier.wait()
            for number in range(discard):
                call(number)
            done = discard
            running.append(index)
            # A thread takes a while to wake up: until the last one runs, nothing is kept.
            while len(running) < len(calls) and not stop.is_set():
                call(done)
                done += 1
            begin = previous = clock()
            share = kept // len(calls) + (index < kept % len(calls))
            while len(mine) < share and not stop.is_set():
                if len(mine) >= _LEAST_OF_A_STREAM and previous - begin >= max_s * 1e9:
                    break
                start = clock()
                call(done)
                end = clock()
                if start < previous or end < start:
                    raise _stepped_back(clock, max(previous, start), min(start, end))
                previous = end
                done += 1
                mine.append((start, end))
            finished.append(index)
            while len(finished) < len(calls) and not stop.is_set():
                call(done)
                done += 1
        except threading.BrokenBarrierError:
            return
        except BaseException as err:  # noqa: BLE001 - raised again in the thread that waits
            failures.append(err)
            stop.set()
            barrier.abort()

    threads = [threading.Thread(target=stream, args=(index,), name=f"stream-{index}") for index in range(len(calls))]
    with _no_collection():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    both = sorted(each for mine in spans for each in mine)
    times = LegTimes(
        regions={"host_wall": tuple(end - start for start, end in both)},
        span_ns=max(end for _, end in both) - both[0][0],
    )
    return ConcurrentTimes(times=times, warm_up=sum(warm))


def resolution_ns(clock: Literal["perf_counter"] = "perf_counter") -> int:
    """The least step of a clock of Python's `time` module, in nanoseconds."""
    return max(1, round(time.get_clock_info(clock).resolution * 1e9))


class _Timed:
    """What is known of one engine so far."""

    def __init__(self) -> None:
        self._calls = 0
        self._begin: int | None = None
        self._end = 0
        self._walls: list[int] = []
        self._said: list[Regions | None] = []

    def leg(self, call: Call, size: int, *, discard: int, clock: Clock, previous: int) -> int:
        """Time one leg; returns what the clock showed at its end."""
        number = self._calls
        for _ in range(discard):
            call(number)
            number += 1
        walls, said = self._walls.append, self._said.append
        for _ in range(size):
            start = clock()
            unread = call(number)
            end = clock()
            if start < previous or end < start:
                raise _stepped_back(clock, max(previous, start), min(start, end))
            if self._begin is None:
                self._begin = start
            previous = end
            number += 1
            walls(end - start)
            said(None if unread is None else unread())
        self._calls = number
        self._end = previous
        return previous

    def times(self) -> LegTimes:
        """All legs."""
        found: dict[Region, tuple[int, ...]] = {"host_wall": tuple(self._walls)}
        said = [each for each in self._said if each is not None]
        if said:
            found |= _device_regions(said, len(self._said))
        return LegTimes(regions=found, span_ns=self._end - (self._begin or 0))


def _device_regions(said: Sequence[Regions], inferences: int) -> dict[Region, tuple[int, ...]]:
    copies = [(each.h2d, each.d2h) for each in said if each.h2d is not None and each.d2h is not None]
    partly = sum((each.h2d is None) != (each.d2h is None) for each in said)
    if len(said) != inferences or partly or len(copies) not in (0, inferences):
        raise MeasurementError(
            f"{len(said)} of {inferences} inferences timed themselves on the GPU, {len(copies)} of them both copies, so the "
            "durations are not of one kind"
        )
    compute = tuple(each.gpu_compute for each in said)
    found: dict[Region, tuple[int, ...]] = {"enqueue": tuple(each.enqueue for each in said), "gpu_compute": compute}
    if copies:
        found["h2d"] = tuple(h2d for h2d, _ in copies)
        found["d2h"] = tuple(d2h for _, d2h in copies)
        found["latency"] = tuple(h2d + own + d2h for (h2d, d2h), own in zip(copies, compute, strict=True))
    return found


def _legs(subjects: int, *, kept: int, leg: int, order: Literal[0, 1]) -> Iterator[tuple[int, int]]:
    """Index and size of each leg, in turn."""
    turn = (0,) if subjects == 1 else (order, 1 - order, 1 - order, order)
    left = [kept] * subjects
    for subject in itertools.cycle(turn):
        if not any(left):
            return
        if left[subject]:
            size = min(leg, left[subject])
            left[subject] -= size
            yield subject, size


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _stepped_back(clock: Clock, before: int, after: int) -> MeasurementError:
    return MeasurementError(
        f"the clock {_name_of(clock)} went back by {before - after} ns while timing, so no duration can be trusted"
    )


def _name_of(clock: Clock) -> str:
    return getattr(clock, "__name__", type(clock).__name__)
