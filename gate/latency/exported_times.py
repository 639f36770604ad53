"""What trtexec's `--exportTimes` wrote, as measurements of sessions: one file is one process.

    [
      { "startEnqMs" : 200.1, "endEnqMs" : 200.2, "startH2dMs" : 200.1, ..., "computeMs" : 0.61, "latencyMs" : 0.93 }
    , { ... }
    ]

Older versions call the copies `in` and `out` (`startInMs`, `inMs`, `outMs`), later ones `h2d` and `d2h`. Versions that
write `endToEndMs` write their warm-up too, which is left out here by trtexec's own rule. The host's time to enqueue is
not taken over: a file holds its begin and its end alone, to six digits, which is coarser than their difference.

Source: `exportJSONTrace`, `traceToTiming` and `printPerformanceReport` in TensorRT's samples/common/sampleReporting.cpp.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import numpy as np

from gate.errors import MeasurementError
from gate.latency.config import SESSIONS
from gate.latency.measurement import Region, SubjectTimes

MOST_CHARACTERS = 512 * 1024 * 1024
"""A longer file is refused. A caller looks at the file's size before it reads it."""

WARM_UP_MS = 200.0
"""What trtexec warms up for where `--warmUp` does not say. Source: TensorRT, samples/common/sampleOptions.h."""

_COPIES = {"h2d": ("h2dMs", "inMs"), "d2h": ("d2hMs", "outMs")}
_COPY_BEGIN = ("startH2dMs", "startInMs")
_COPY_END = ("endD2hMs", "endOutMs")
_ROUNDING = 5e-6
"""Relative error of one number: trtexec writes six digits. Source: default precision of std::ostream."""

_HINT = "Write the file again: trtexec --loadEngine=model.plan --exportTimes=times.json"
_NOT_A_NUMBER = re.compile(r"[+-]?(?:nan|inf)", re.IGNORECASE)


class ExportedTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kept inferences of each file, and what a reader of their percentiles should know.

    Args:
        subjects: One for each file, in order: `latency` and `gpu_compute`, and `h2d` and `d2h` where the file has them.
        resolution_ns: The coarsest step between two durations: trtexec keeps points in time as float32 milliseconds.
        notes: Sentences for the report.
    """

    subjects: tuple[SubjectTimes, ...]
    resolution_ns: int
    notes: tuple[str, ...]

    @property
    def sessions(self) -> int:
        """How many processes they are of."""
        return len(self.subjects)


def exported_times(texts: Mapping[str, str], *, warm_up_ms: float = WARM_UP_MS) -> ExportedTimes:
    """The measurements in files that `trtexec --exportTimes` wrote, in integer nanoseconds. Pure.

    Args:
        texts: Text of each file by its path, for errors: one process each.
        warm_up_ms: What trtexec was given as `--warmUp`, in milliseconds: inferences at the begin of a file whose
            compute started before that are left out, as trtexec leaves them out of its own summary.

    Raises:
        MeasurementError: There is no file; one is empty, cut off, too large, not a list of inferences, or the same
            measurement as another; all of it is warm-up; or an inference lacks a time, has one that is no number or
            is negative, or a latency that is not h2d + compute + d2h.
    """
    if not texts:
        raise MeasurementError("there is no file of trtexec's times, so there is no latency", hint=_HINT)
    if not 0.0 <= warm_up_ms < math.inf:
        raise MeasurementError(f"a warm-up is 0 ms or more, got {warm_up_ms:g}")
    subjects: dict[str, SubjectTimes] = {}
    notes: list[str] = []
    latest_ms = 0.0
    for where, text in texts.items():
        records = _records(text, where)
        subject = _subject(records, where, warm_up_ms)
        same = next((other for other, each in subjects.items() if each.regions == subject.regions), None)
        if same is not None:
            raise MeasurementError(
                f"it holds the same times as {same}: one measurement is not two sessions", where=where, hint=_HINT
            )
        subjects[where] = subject
        latest_ms = max(latest_ms, *(float(each["endComputeMs"]) for each in records))
        if subject.warm_up:
            notes.append(
                f"{where}: {subject.warm_up} inferences of the first {warm_up_ms:g} ms are left out as warm-up"
            )
        if _overlap(records[subject.warm_up :]):
            notes.append(f"{where}: inferences overlap on the GPU (several streams), so each waited for others")
    resolution = max(1, round(float(np.spacing(np.float32(latest_ms))) * 1e6))
    notes.insert(0, f"sessions={len(subjects)}: trtexec's --exportTimes, one process in each file")
    if len(subjects) < SESSIONS:
        notes.insert(
            1, f"{SESSIONS} sessions are asked for: run trtexec {SESSIONS - len(subjects)} times more, a file each"
        )
    notes.append(f"durations are differences of float32 milliseconds, so exact to about {resolution} ns")
    return ExportedTimes(subjects=tuple(subjects.values()), resolution_ns=resolution, notes=tuple(notes))


def _records(text: str, where: str) -> list[dict[str, Any]]:
    """The list in the file, each element an object."""
    if len(text) > MOST_CHARACTERS:
        raise MeasurementError(
            f"it has {len(text)} characters, at most {MOST_CHARACTERS} are read",
            where=where,
            hint="Measure for a shorter time: trtexec --duration=60 --exportTimes=times.json",
        )
    if not text.strip():
        raise MeasurementError("it is empty, expected trtexec's list of times", where=where, hint=_HINT)
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as err:
        raise _not_json(text, err, where) from err
    except (ValueError, RecursionError) as err:
        raise MeasurementError(f"it is not trtexec's list of times: {err}", where=where, hint=_HINT) from err
    if not isinstance(found, list):
        raise MeasurementError(
            f"expected trtexec's list of times, got {_kind(found)}", where=where, hint=_wrong_file(found)
        )
    if not found:
        raise MeasurementError("it is an empty list: trtexec timed no inference", where=where, hint=_HINT)
    for index, each in enumerate(found):
        if not isinstance(each, dict):
            raise MeasurementError(
                f"record {index}: expected an object with the times of one inference, got {_kind(each)}",
                where=where,
                hint=_HINT,
            )
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted({name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1})
        raise ValueError(f"a record has {', '.join(twice)} twice")
    return found


def _not_json(text: str, err: json.JSONDecodeError, where: str) -> MeasurementError:
    index = max(0, text.count("{", 0, err.pos) - 1)
    wrong = _NOT_A_NUMBER.match(text, err.pos)
    if wrong is not None:
        return _not_finite(index, wrong.group(), where)
    at_end = not text[err.pos :].strip() or "Unterminated" in err.msg
    what = "it is cut off" if at_end else f"it is not JSON ({err.msg})"
    return MeasurementError(
        f"{what} in record {index}, line {err.lineno}; expected trtexec's list of times",
        where=where,
        hint="trtexec writes the file when it ends: let it end, then copy the file." if at_end else _HINT,
    )


def _not_finite(index: int, got: object, where: str, name: str = "a time") -> MeasurementError:
    return MeasurementError(
        f"record {index}: {name} is {got}, expected milliseconds",
        where=where,
        hint="An inference without a time was not measured: run trtexec again, and look for CUDA errors in its log.",
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _wrong_file(found: object) -> str:
    if isinstance(found, dict) and "traceEvents" in found:
        return "That is a trace of a profiler. " + _HINT
    return _HINT


def _subject(records: list[dict[str, Any]], where: str, warm_up_ms: float) -> SubjectTimes:
    copies = {
        region: name for region, names in _COPIES.items() if (name := _only_one(records[0], names, where)) is not None
    }
    begin, end = (_only_one(records[0], names, where) for names in (_COPY_BEGIN, _COPY_END))
    if len(copies) == 1:
        missing = "d2h" if "h2d" in copies else "h2d"
        raise _missing(0, _COPIES[missing][0], records[0], where)
    regions = {"latency": "latencyMs", **copies, "gpu_compute": "computeMs"}
    # What was copied is part of the span, so its ends are as needed as those of the compute.
    first, last = (begin or _COPY_BEGIN[0], end or _COPY_END[0]) if copies else ("startComputeMs", "endComputeMs")
    names = tuple(dict.fromkeys((*regions.values(), "startComputeMs", "endComputeMs", first, last)))
    for index, record in enumerate(records):
        _check_record(record, index, names=names, copies=tuple(copies.values()), where=where)
    warm_up = next((index for index, each in enumerate(records) if each["startComputeMs"] >= warm_up_ms), len(records))
    kept = records[warm_up:]
    if not kept:
        raise MeasurementError(
            f"all {len(records)} inferences began within the first {warm_up_ms:g} ms, which is warm-up",
            where=where,
            hint="Measure for longer, or say what trtexec was given as --warmUp.",
        )
    span_ms = max(each[last] for each in kept) - min(each[first] for each in kept)
    if span_ms <= 0.0:
        raise MeasurementError(
            f"its inferences took {span_ms:g} ms altogether, from {first} to {last}; expected more than 0",
            where=where,
            hint=_HINT,
        )
    return SubjectTimes(
        regions={cast("Region", region): tuple(_ns(each[name]) for each in kept) for region, name in regions.items()},
        leg=len(kept),
        warm_up=warm_up,
        span_ns=_ns(span_ms),
    )


def _only_one(record: dict[str, Any], names: tuple[str, ...], where: str) -> str | None:
    found = [name for name in names if name in record]
    if len(found) > 1:
        raise MeasurementError(
            f"record 0 has both {' and '.join(map(repr, found))}: it is not clear which one counts",
            where=where,
            hint=_HINT,
        )
    return found[0] if found else None


def _check_record(
    record: dict[str, Any], index: int, *, names: tuple[str, ...], copies: tuple[str, ...], where: str
) -> None:
    for name in names:
        if name not in record:
            raise _missing(index, name, record, where)
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _not_finite(index, f"{value!r:.40}" if isinstance(value, str) else _kind(value), where, name)
        if not abs(value) <= 1e12:
            raise _not_finite(index, f"{float(value) if isinstance(value, float) else 'above 1e12'}", where, name)
        is_length = name in ("latencyMs", "computeMs")
        if value < 0.0 or (is_length and _ns(value) < 1):
            raise MeasurementError(
                f"record {index}: {name} is {value:g} ms, expected {'more than 0' if is_length else '0 or more'}",
                where=where,
                hint="The clock went back or did not move: run trtexec again.",
            )
    latency, parts = record["latencyMs"], [*(record[name] for name in copies), record["computeMs"]]
    total = math.fsum(parts)
    # Half a unit in the sixth digit of each, and float32 sums of three parts.
    allowed = _ROUNDING * (latency + total) + 4 * 2.0**-24 * latency
    if latency < total - allowed or (copies and latency > total + allowed):
        shown = " + ".join((copies[0], "computeMs", copies[1]) if copies else ("computeMs",))
        raise MeasurementError(
            f"record {index}: latencyMs is {latency:g}, expected {shown} = {total:g}",
            where=where,
            hint="The file was changed, or is of another tool. " + _HINT,
        )


def _missing(index: int, name: str, record: dict[str, Any], where: str) -> MeasurementError:
    hint = _HINT
    if "averageMs" in record or set(record) == {"count"}:
        hint = "That is a file of --exportProfile, which times layers. " + _HINT
    elif "values" in record and "dimensions" in record:
        hint = "That is a file of --exportOutput, which holds outputs. " + _HINT
    has = ", ".join(sorted(record)) or "nothing"
    return MeasurementError(f"record {index} has no {name!r} (has {has:.200})", where=where, hint=hint)


def _overlap(records: list[dict[str, Any]]) -> bool:
    """Whether one inference computes before the one before it is done, beyond the rounding of both times."""
    return any(
        after["startComputeMs"] * (1 + 2 * _ROUNDING) < before["endComputeMs"] * (1 - 2 * _ROUNDING)
        for before, after in itertools.pairwise(records)
    )


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
