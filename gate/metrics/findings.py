"""Findings on a task's values: against a floor, against the reference, against the accepted baseline."""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from gate.errors import MeasurementError, SpecError
from gate.metrics.interface import MetricKind, MetricValue, SampleStatistics
from gate.metrics.resampling import Over, Resampled, in_turn, resampled, values_of
from gate.results import TaskValues
from gate.spec import EngineSpec, SpecFile
from gate.tensors import Array
from gate.verdict import Evidence, Finding, Interval, Limit
from gate.wording import anchor

Form = Literal["value", "change", "ratio", "gain"]

IMPLAUSIBLE_GAIN = 0.05
"""An engine in less precision that is so much better than its reference is not better: something else differs."""

_HIGHER = {"_at_least": "value", "_drop_at_most": "change", "_ratio_at_least": "ratio"}
_LOWER = {"_at_most": "value", "_rise_at_most": "change", "_ratio_at_most": "ratio"}
_TILED: Mapping[str, Form] = {"_gain_at_least": "gain", "_at_least": "value"}

TILED = "tiled_"
"""Begins the names of values that were measured over the tiles of the images."""

_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Asked:
    """One limit on one value.

    Args:
        check: Such as `task.mean_ap_drop`.
        value: Name of the value.
        form: What is limited: the value, its change from the reference for the worse, its ratio to the reference's, or how
            far tiles raise it over the same engine's whole images.
        limit: What is allowed.
        key: In `[engine.task]`; None for a default.
        tiled: Whether it is about what was found in tiles.
    """

    check: str
    value: str
    form: Form
    limit: Limit
    key: str | None
    tiled: bool = False


def asked_limits(kind: MetricKind, engine: EngineSpec, file: SpecFile) -> tuple[Asked, ...]:
    """The limits of `[engine.task]`; with none, the drop of the kind's first value that the precision allows.

    Raises:
        SpecError: A key is no limit on a value of the kind, a limit is not finite, or there is none and no default.
    """
    limits = engine.task_limits
    if limits is None:
        return ()
    if not limits:
        first = next(iter(kind.values))
        allowed = kind.default_drop.get(engine.precision)
        if allowed is None:
            raise SpecError(
                f"engine {engine.name!r}: [engine.task] is empty, and {kind.name} has no default for {engine.precision}; "
                f"it takes {', '.join(_keys(kind)[:6])}",
                where=file.engine_location(engine.name, "task"),
            )
        word = "drop" if kind.values[first].higher_is_better else "rise"
        return (Asked(f"task.{first}_{word}", first, "change", Limit("at_most", allowed, "default"), None),)
    found = []
    for key, limit in limits.items():
        where = file.engine_location(engine.name, "task", key)
        if not math.isfinite(limit):
            raise SpecError(f"[engine.task] {key} = {limit}: expected a finite number", where=where)
        tiled = _asked_of_tiles(kind, key, limit, where)
        if tiled is not None and file.spec.tiling is None:
            raise SpecError(
                f"[engine.task] {key} needs [tiling], which says how images are cut into tiles",
                where=where,
                hint="Add to the spec: [tiling] size = 640 (pixels of a tile in the image).",
            )
        found.append(tiled or _asked(kind, key, limit, where, tiling=file.spec.tiling is not None))
    return tuple(found)


def _asked_of_tiles(kind: MetricKind, key: str, limit: float, where: str) -> Asked | None:
    """The limit on a value over tiles that a key is; None where it is none."""
    for value, ending, form in _tiled_limits(kind):
        if key == f"{TILED}{value}{ending}":
            check = f"task.{key.removesuffix('_at_least')}"
            return Asked(check, value, form, Limit("at_least", limit, "spec", where), key, tiled=True)
    return None


def _tiled_limits(kind: MetricKind) -> Iterator[tuple[str, str, Form]]:
    """Each value that tiles are scored by, with the endings that it takes."""
    for name, value in kind.values.items():
        if value.higher_is_better:
            yield from ((name, ending, form) for ending, form in _TILED.items())


def _asked(kind: MetricKind, key: str, limit: float, where: str, *, tiling: bool) -> Asked:
    for value, forms in _values_for(kind, key):
        for ending, form in forms.items():
            if key != f"{value}{ending}":
                continue
            if form == "change" and limit < 0:
                raise SpecError(f"[engine.task] {key} = {limit}: expected 0 or more", where=where)
            bound: Literal["at_most", "at_least"] = "at_least" if ending.endswith("_at_least") else "at_most"
            check = f"task.{key.removesuffix('_at_least').removesuffix('_at_most')}"
            made = Limit(bound, limit, "spec", where)
            return Asked(
                check, value, "value" if form == "value" else "change" if form == "change" else "ratio", made, key
            )
    keys = _keys(kind)
    if tiling:
        keys.extend(f"{TILED}{value}{ending}" for value, ending, _ in _tiled_limits(kind))
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.55)
    meant = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(keys)}"
    raise SpecError(f"[engine.task] has no key {key!r} for {kind.name}{meant}", where=where)


def _values_for(kind: MetricKind, key: str) -> list[tuple[str, Mapping[str, str]]]:
    """The values that a key may be about, each with the endings that it takes."""
    found = [(name, _endings(value)) for name, value in kind.values.items()]
    for prefix in kind.named:
        if key.startswith(prefix):
            found.extend(
                (key[: -len(ending)], {ending: form}) for ending, form in _HIGHER.items() if key.endswith(ending)
            )
    return sorted(found, key=lambda each: len(each[0]), reverse=True)


def _endings(value: MetricValue) -> Mapping[str, str]:
    return _HIGHER if value.higher_is_better else _LOWER


def _keys(kind: MetricKind) -> list[str]:
    return [f"{name}{ending}" for name, value in kind.values.items() for ending in _endings(value)]


def task_findings(
    asked: Sequence[Asked],
    candidate: SampleStatistics,
    reference: SampleStatistics,
    *,
    kind: MetricKind,
    evidence: Evidence,
    seed: int,
    resamples: int,
    over: Over = in_turn,
) -> tuple[Finding, ...]:
    """One finding for each limit.

    Args:
        asked: The limits.
        candidate, reference: Statistics of engine and reference on the same samples; for limits on tiles, the engine's over
            tiles and over whole images.
        kind: The task.
        evidence: Of the run.
        seed: Of the resamples.
        resamples: How many.
        over: As of `resampled`.

    Raises:
        MeasurementError: They are of another number of samples, or a value is not measured.
    """
    if not asked:
        return ()
    names = tuple(dict.fromkeys(each.value for each in asked))
    ours, theirs = values_of(candidate, names), values_of(reference, names)
    drawn = resampled(candidate, reference, names, seed=seed, resamples=resamples, over=over)
    return tuple(
        _finding(
            each,
            ours[each.value],
            theirs[each.value],
            drawn,
            kind=kind,
            evidence=evidence,
            against="whole images" if each.tiled else "the reference",
        )
        for each in asked
    )


def baseline_finding(
    candidate: SampleStatistics,
    before: SampleStatistics,
    *,
    kind: MetricKind,
    limit: Limit,
    evidence: Evidence,
    seed: int,
    resamples: int,
) -> Finding:
    """The change of the kind's first value for the worse against accepted answers, paired sample by sample.

    Raises:
        MeasurementError: They are of another number of samples.
    """
    name = next(iter(kind.values))
    word = "drop" if kind.values[name].higher_is_better else "rise"
    asked = Asked(f"baseline.{name}_{word}", name, "change", limit, None)
    drawn = resampled(candidate, before, (name,), seed=seed, resamples=resamples)
    ours, theirs = values_of(candidate, (name,))[name], values_of(before, (name,))[name]
    return _finding(asked, ours, theirs, drawn, kind=kind, evidence=evidence, against="the baseline")


def _finding(
    asked: Asked,
    ours: float,
    theirs: float,
    drawn: Resampled,
    *,
    kind: MetricKind,
    evidence: Evidence,
    against: str,
) -> Finding:
    value = kind.values.get(asked.value, MetricValue())
    if asked.form == "value":
        estimate, interval = ours, drawn.interval(asked.value)
    elif asked.form == "ratio":
        estimate, interval = _over(ours, theirs), drawn.ratio(asked.value)
    elif asked.form == "gain":
        estimate, interval = ours - theirs, drawn.difference(asked.value)
    else:
        sign = -1.0 if value.higher_is_better else 1.0
        change = drawn.difference(asked.value)
        estimate = sign * (ours - theirs)
        interval = change if sign > 0 else Interval(-change.upper, -change.lower)
    if math.isnan(estimate):
        interval = Interval(math.nan, math.nan)
        detail = f"{asked.value} is not defined on these samples: there is nothing that it could be measured by"
    elif asked.form == "change" and value.higher_is_better and 0 <= theirs <= asked.limit.value:
        interval = Interval(math.nan, math.nan)
        detail = (
            f"{against[0].upper()}{against[1:]}'s {asked.value} is {theirs:.4g}: a drop of {asked.limit.value:g} from that is "
            "all of it, so no engine could fail, and none can pass"
        )
    else:
        named = f"{asked.value} over tiles" if asked.tiled else asked.value
        detail = f"{named} {ours:.4g}, {against} {theirs:.4g}"
        # The estimate of all samples lies within: a skewed draw must not leave it outside.
        interval = Interval(min(interval.lower, estimate), max(interval.upper, estimate))
        if drawn.samples < 2:
            detail += "; a single sample leaves nothing to draw from, so it cannot be said how far this holds"
    return Finding(
        check=asked.check,
        estimate=estimate,
        interval=interval,
        limit=asked.limit,
        unit="" if asked.form == "ratio" else value.unit,
        n=drawn.samples,
        evidence=evidence,
        detail=detail,
        hint=anchor(asked.check),
    )


def _over(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


def implausible_gain(values: Mapping[str, float], reference: Mapping[str, float], kind: MetricKind) -> str | None:
    """A sentence where the engine is far better than its reference at the kind's first value."""
    name = next(iter(kind.values))
    ours, theirs = values[name], reference[name]
    gain = ours - theirs if kind.values[name].higher_is_better else theirs - ours
    if theirs and gain / abs(theirs) > IMPLAUSIBLE_GAIN:
        return (
            f"{name} is {ours:.4g}, and the reference's {theirs:.4g}: an engine is not that much better than the model that "
            "it was made of; look whether both are given and read alike"
        )
    return None


def measured_values(candidate: SampleStatistics, reference: SampleStatistics, *, kind: MetricKind) -> TaskValues:
    """Every value of both models, and what the baseline needs to compare sample by sample."""
    return TaskValues(
        kind=kind.name,
        samples=candidate.samples,
        values=candidate.values(),
        reference=reference.values(),
        statistics=packed(candidate.to_arrays()),
    )


def with_tiled(values: TaskValues, tiled: SampleStatistics, *, kind: MetricKind) -> TaskValues:
    """The same with what tiles gave beside it, each name of the kind's values behind `tiled_`.

    Raises:
        MeasurementError: Tiles were scored on another number of images.
    """
    if tiled.samples != values.samples:
        raise MeasurementError(f"tiles were scored on {tiled.samples} images, whole images are {values.samples}")
    found = tiled.values()
    more = {f"{TILED}{name}": found[name] for name in kind.values}
    return msgspec.structs.replace(values, values=values.values | more)


def packed(arrays: Mapping[str, Array]) -> str:
    """Arrays as text: safetensors, deflated, base64. The same arrays give the same text."""
    from safetensors.numpy import save

    plain = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    return base64.b64encode(zlib.compress(save(plain), 9)).decode("ascii")


def unpacked(text: str) -> dict[str, Array]:
    """The inverse of `packed`.

    Raises:
        MeasurementError: It is not such a text, or claims to hold more than 1 GiB.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
        if inflater.unconsumed_tail or not inflater.eof:
            raise MeasurementError("the stored statistics are truncated, or larger than 1 GiB")
        return dict(load(raw))
    except (binascii.Error, zlib.error, SafetensorError, ValueError) as err:
        raise MeasurementError(f"the stored statistics cannot be read: {err}") from err
