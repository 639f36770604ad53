"""Reasons why latencies must not decide: clocks that differ, a GPU that is shared, a machine that drifts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from gate.errors import MeasurementError
from gate.latency.measurement import LEAST_NS, CellTimes, Reading, Region, SessionTimes, SubjectTimes
from gate.latency.ratio import LOOKS, durations_from, estimate, log_ratio, nearest_rank

CLOCK_PERCENT = 2.0
"""Most difference between the mean SM clocks of two engines' legs. A kernel that is bound by computing slows down as
its clock does, so more than this would come close to the least tolerance that teams set, 3 % at p50. Steps of the clock
are 15 MHz, below 1 % of it, and their mean over many legs differs less."""

SLOWDOWN_POINTS = 10.0
"""Most difference, in percentage points, between the shares of two engines' legs that a slowdown fell into. Chance
alone stays below: legs alternate every few milliseconds, and a slowdown lasts for longer than a leg."""

SLOWDOWN_PERCENT = 10.0
"""Most legs of one engine with a slowdown. More than this reach the percentiles that budgets are set for, p90 and
above; fewer are a part of what the p99 of a deployed engine sees, too."""

FAR = math.log(2.0)
"""A ratio that lies this far from its limit is not brought there by slowdowns that fell into one engine's legs more."""

STEP_SHARE = 0.25
"""Most of what is to be told apart that one step of the clock may be. A percentile lies on a step, so that its error is
up to half of one, the same in every session, and no number of sessions shows it."""

_HOST_SLACK, _HOST_SLACK_NS = 1.02, 5_000
"""How much longer the GPU may say an inference took than the host, which waited for it: steps of their clocks."""

BUSY_PERCENT = 10
"""Most utilisation of the GPU before the first inference. A desktop's drawing stays below; a second job does not."""

_LETTERS = "AB"


class BudgetDoubts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Why an absolute budget must not be decided, by what must not be said.

    Args:
        blocks_pass: Reasons why it has not passed, whatever the numbers.
        blocks_fail: Reasons why it has not failed.
    """

    blocks_pass: tuple[str, ...] = ()
    blocks_fail: tuple[str, ...] = ()


def ratio_doubts(
    sessions: Sequence[SessionTimes],
    cell: int,
    *,
    tolerance_percent: float,
    p: float,
    region: Region = "host_wall",
    distance: float = 0.0,
) -> tuple[str, ...]:
    """Why the ratio of two engines that took turns must not be decided; empty where nothing speaks against it.

    The engines are called A, the first of the cell, and B. Each is also compared with itself: the inferences of every
    other pair of its legs against the rest, by the rule of gate.latency.ratio. Of the two legs of a pair one came after
    the other engine and one after its own, so that what a switch costs is in both halves alike. A half has half of the
    samples, so the spread is divided by sqrt(2) before it is held against the tolerance. Spread is looked at where it is the machine's,
    at the median: at p95 a few inferences that were held up move one half and not the other. Whether an engine differs
    from itself is looked at where the engines are compared. Both are held against what there is to tell apart: the
    tolerance, or where the ratio lies farther from its limit than that, its distance.

    Args:
        sessions: At least one.
        cell: Index of the cell.
        tolerance_percent: Most growth that is allowed, above 0.
        p: The percentile that is compared, as a probability.
        region: Which durations are compared.
        distance: Of the logarithm of the ratio from that of its limit.

    Raises:
        MeasurementError: There is no session or no such cell, a cell has not two engines, or the tolerance is not above
            0 %.
    """
    if not 0.0 < tolerance_percent < math.inf:
        raise MeasurementError(f"a tolerance is above 0 %, got {tolerance_percent:g} %")
    cells = _cells(sessions, cell, subjects=2)
    margin = max(math.log1p(tolerance_percent / 100.0), abs(distance))
    doubts = [*_clock_doubts(cells, abs(distance)), *_slowdown_doubts(cells, abs(distance)), *_shared(sessions, cells)]
    sound = True
    for subject, letter in enumerate(_LETTERS):
        if wrong := _contradictions(cells, subject, streams=1):
            doubts += [f"{letter}: {reason}" for reason in wrong]
            sound = False
        else:
            ours = [each.subjects[subject] for each in cells]
            doubts += _drift_doubts(ours, letter, margin, p, region)
    if sound:
        doubts += _step_doubts(sessions, cells, margin, p, region)
    return tuple(doubts)


def budget_doubts(sessions: Sequence[SessionTimes], cell: int, *, subject: int = 0, streams: int = 1) -> BudgetDoubts:
    """Why an absolute budget of one engine must not be decided.

    A slowdown of the GPU can only make an engine slower: one that keeps its budget even so has passed, and one that does
    not has not failed. Of a GPU that was shared, and by numbers that contradict each other, nothing is decided.

    Args:
        sessions: At least one.
        cell: Index of the cell.
        subject: Index of the engine in the cell.
        streams: Inferences at the same time.

    Raises:
        MeasurementError: There is no session, no such cell or no such engine, or fewer than one stream.
    """
    if streams < 1:
        raise MeasurementError(f"an engine runs on at least one stream, got {streams}")
    cells = _cells(sessions, cell, subjects=subject + 1)
    shared = _shared(sessions, cells)
    wrong = _contradictions(cells, subject, streams=streams)
    return BudgetDoubts(
        blocks_pass=(*shared, *wrong),
        blocks_fail=(*_throttled(cells, subject), *shared, *wrong),
    )


def usage_doubts(sessions: Sequence[SessionTimes]) -> tuple[str, ...]:
    """Why what the driver says of the whole GPU may be another process's, which was there before or came."""
    came = sum(any(each.others for each in session.usage) for session in sessions)
    doubts = [f"another process came to the GPU in {came} of {len(sessions)} sessions"] if came else []
    return (*doubts, *_busy(sessions))


def missing_readings(sessions: Sequence[SessionTimes], cell: int) -> tuple[str, ...]:
    """What the driver of a GPU did not say of an engine in any leg, as a sentence to note; nothing without a GPU.

    Raises:
        MeasurementError: There is no session or no such cell.
    """
    cells = _cells(sessions, cell, subjects=1)
    readings = [reading for each in cells for reading in each.readings]
    if not readings and not any("gpu_compute" in subject.regions for each in cells for subject in each.subjects):
        return ()
    asked = {"sm_clock_mhz": "the SM clock", "slowdowns": "slowdowns", "others": "other processes on the GPU"}
    by_subject = [[each for each in readings if each.subject == index] for index in range(len(cells[0].subjects))]
    lacking = [
        words
        for name, words in asked.items()
        if any(all(getattr(each, name) is None for each in ours) for ours in by_subject)
    ]
    if any(each.busy_percent is None for each in sessions):
        lacking.append("how busy the GPU was before")
    if not lacking:
        return ()
    return (f"the driver did not say, so nothing was held against it: {', '.join(lacking)}",)


def _cells(sessions: Sequence[SessionTimes], cell: int, *, subjects: int) -> list[CellTimes]:
    """The cell of every session."""
    if not sessions:
        raise MeasurementError("no session was measured, so there is nothing to decide on")
    found = []
    for number, session in enumerate(sessions, 1):
        if not 0 <= cell < len(session.cells):
            raise MeasurementError(f"session {number} has {len(session.cells)} cells, so none with index {cell}")
        if len(session.cells[cell].subjects) < subjects:
            raise MeasurementError(
                f"session {number} timed {len(session.cells[cell].subjects)} of {subjects} engines in cell {cell}"
            )
        found.append(session.cells[cell])
    return found


def _of(cell: CellTimes, subject: int) -> list[Reading]:
    return [reading for reading in cell.readings if reading.subject == subject]


def _clock_doubts(cells: Sequence[CellTimes], distance: float) -> list[str]:
    """Means of the sessions' means, of sessions in which both engines' clocks are known.

    A clock slows a kernel down by no more than it is slower itself, which leaves a ratio decided that lies twice as far
    from its limit.
    """
    means: tuple[list[float], list[float]] = ([], [])
    for cell in cells:
        a, b = (
            [each.sm_clock_mhz for each in _of(cell, subject) if each.sm_clock_mhz is not None] for subject in (0, 1)
        )
        if a and b:
            means[0].append(float(np.mean(a)))
            means[1].append(float(np.mean(b)))
    if not means[0]:
        return []
    a_mhz, b_mhz = (float(np.mean(each)) for each in means)
    if a_mhz == b_mhz:
        return []
    percent = 100.0 * abs(a_mhz - b_mhz) / max(a_mhz, b_mhz)
    if percent <= CLOCK_PERCENT or 2.0 * abs(math.log(a_mhz / b_mhz)) <= distance:
        return []
    return [f"clocks differed by {percent:.2g} % between legs (A {a_mhz:.0f} MHz, B {b_mhz:.0f} MHz)"]


def _slowdown_doubts(cells: Sequence[CellTimes], distance: float) -> list[str]:
    if distance > FAR:
        return []
    a, b = ([each.slowdowns for cell in cells for each in _of(cell, s) if each.slowdowns is not None] for s in (0, 1))
    if not a or not b:
        return []
    doubts = []
    for name in dict.fromkeys(name for slowdowns in (*a, *b) for name in slowdowns):
        of_a, of_b = (100.0 * sum(name in slowdowns for slowdowns in each) / len(each) for each in (a, b))
        if abs(of_a - of_b) > SLOWDOWN_POINTS:
            doubts.append(f"the GPU slowed down ({name}) in {of_a:.0f} % of A's legs and {of_b:.0f} % of B's")
    return doubts


def _throttled(cells: Sequence[CellTimes], subject: int) -> list[str]:
    found = [each.slowdowns for cell in cells for each in _of(cell, subject) if each.slowdowns is not None]
    slowed = [each for each in found if each]
    if not found or 100.0 * len(slowed) / len(found) <= SLOWDOWN_PERCENT:
        return []
    names = ", ".join(dict.fromkeys(name for slowdowns in slowed for name in slowdowns))
    return [f"the GPU slowed down in {100.0 * len(slowed) / len(found):.0f} % of the legs ({names})"]


def _shared(sessions: Sequence[SessionTimes], cells: Sequence[CellTimes]) -> list[str]:
    doubts = []
    shared = sum(any(each.others for each in cell.readings) for cell in cells)
    if shared:
        doubts.append(f"another process came to the GPU in {shared} of {len(cells)} sessions")
    return [*doubts, *_busy(sessions)]


def _busy(sessions: Sequence[SessionTimes]) -> list[str]:
    busy = [each.busy_percent for each in sessions if each.busy_percent is not None]
    # Written so that a NaN is a doubt.
    above = [percent for percent in busy if not percent <= BUSY_PERCENT]
    if not above:
        return []
    return [f"the GPU was busy before {len(above)} of {len(sessions)} sessions (up to {max(above):g} %)"]


def _drift_doubts(subjects: Sequence[SubjectTimes], letter: str, margin: float, p: float, region: Region) -> list[str]:
    """What every other pair of an engine's legs against the rest says of the machine.

    Args:
        margin: The logarithm of what is to be told apart.
    """
    if len(subjects) < LOOKS[0]:
        return [f"{letter} against itself takes at least {LOOKS[0]} sessions, got {len(subjects)}"]
    at_p: list[float] = []
    at_median: list[float] = []
    for number, subject in enumerate(subjects, 1):
        if region not in subject.regions:
            return [f"{letter} against itself cannot be judged: session {number} has no {region}"]
        durations = np.asarray(subject.regions[region])
        odd = (np.arange(len(durations)) // (2 * subject.leg)) % 2 == 1
        if not odd.any():
            continue
        at_p.append(log_ratio(durations[odd], durations[~odd], p))
        at_median.append(log_ratio(durations[odd], durations[~odd], 0.5))
    if len(at_p) < LOOKS[0]:
        return [
            f"{letter} against itself takes {LOOKS[0]} sessions of 3 legs or more, {len(at_p)} have them; raise max_time_s"
        ]
    spread, found = estimate(at_median).interval, estimate(at_p)
    half = (math.log(spread.upper) - math.log(spread.lower)) / 2.0 / math.sqrt(2.0)
    doubts = []
    least = f"{100.0 * math.expm1(margin):.2g} %"
    if not half <= margin:
        doubts.append(
            f"{letter} against itself varies by {100.0 * math.expm1(half):.2g} % between sessions, "
            f"more than the {least} that are to be told apart"
        )
    if math.log(found.interval.lower) > margin or math.log(found.interval.upper) < -margin:
        away = 100.0 * math.expm1(abs(math.log(found.ratio)))
        doubts.append(f"{letter} differs from itself by {away:.2g} %, more than {least}: the machine drifts")
    return doubts


def _step_doubts(
    sessions: Sequence[SessionTimes], cells: Sequence[CellTimes], margin: float, p: float, region: Region
) -> list[str]:
    """That the clock is too coarse: its step is the least difference of two durations."""
    timed = [np.asarray(each.regions[region]) for cell in cells for each in cell.subjects[:2] if region in each.regions]
    if not timed:
        return []
    distinct = np.unique(np.concatenate(timed))
    step = int(np.diff(distinct).min()) if len(distinct) > 1 else max(each.resolution_ns for each in sessions)
    shortest = min(nearest_rank(each, p) for each in timed)
    if step <= STEP_SHARE * math.expm1(margin) * shortest:
        return []
    return [
        f"the clock steps by {step} ns, {100.0 * step / shortest:.2g} % of the shorter one: too coarse to tell "
        f"{100.0 * math.expm1(margin):.2g} %; time a larger batch"
    ]


def _contradictions(cells: Sequence[CellTimes], subject: int, *, streams: int) -> list[str]:
    """The first contradiction of each session in the numbers of one engine."""
    found = []
    for number, cell in enumerate(cells, 1):
        reason = _contradiction(cell.subjects[subject], streams=streams)
        if reason is not None:
            found.append(f"session {number}: {reason}")
    return found


def _contradiction(times: SubjectTimes, *, streams: int) -> str | None:
    lengths = {name: len(durations) for name, durations in times.regions.items()}
    if not lengths:
        return "no inference was timed, so there is no latency"
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        return f"regions of the same inferences differ in number ({said})"
    if times.leg < 1:
        return f"a leg of {times.leg} inferences"
    values = {}
    for name, durations in times.regions.items():
        try:
            values[name] = durations_from(durations, least=LEAST_NS[name])
        except MeasurementError as err:
            return f"{name}: {err.message}"
    if "latency" in values and "gpu_compute" in values:
        below = np.flatnonzero(values["latency"] < values["gpu_compute"]).tolist()
        if below:
            first = below[0]
            return (
                f"inference {first} took {values['latency'][first]} ns with its copies and "
                f"{values['gpu_compute'][first]} ns without"
            )
    on_gpu = values.get("latency", values.get("gpu_compute"))
    if on_gpu is not None and "host_wall" in values:
        late = np.flatnonzero(on_gpu > _HOST_SLACK * values["host_wall"] + _HOST_SLACK_NS).tolist()
        if late:
            return (
                f"inference {late[0]} took {on_gpu[late[0]]} ns on the GPU and {values['host_wall'][late[0]]} ns by the "
                "host's clock: the host did not wait for it"
            )
    parts = [values[name] for name in ("h2d", "gpu_compute", "d2h") if name in values]
    if "latency" in values and len(parts) == 3:
        other = np.flatnonzero(values["latency"] != sum(parts)).tolist()
        if other:
            return f"the copies and the compute time of inference {other[0]} do not add up to its latency"
    wall = sum(times.regions.get("host_wall", ()))
    if times.span_ns * streams < wall:
        return (
            f"inferences of {wall} ns together were done in {times.span_ns} ns on {streams} "
            f"{'stream' if streams == 1 else 'streams'}"
        )
    return None
