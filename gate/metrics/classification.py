"""Classification: top-1 and top-5 against labels, engine and reference on the same samples.

Of equal scores the class with the lower index is the better one, on both sides, as `numpy.argmax` has it. A sample
whose scores hold a NaN or Inf is answered wrong.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from gate.errors import BaselineError, DataError, MeasurementError, SpecError
from gate.results import TaskMetrics
from gate.spec import EngineSpec, SpecFile, TaskLimits
from gate.statistics import (
    agresti_min_difference,
    clopper_pearson,
    is_among_best,
    least_samples_for_proportion,
    mcnemar_exact,
    samples_to_resolve,
)
from gate.tensors import Array
from gate.verdict import Evidence, Finding, Interval, Limit, Status

DEFAULT_DROP_PP: Mapping[str, float] = {"fp32": 0.1, "tf32": 0.1, "fp16": 0.1, "bf16": 0.2, "int8": 0.5, "fp8": 0.5}
"""Allowed drop of top-1 against the reference, in percentage points, where the spec has no key in [engine.task]."""

_TOP5_CLASSES = 6
_NAMED = 5
_ALPHA = 0.05
_Bools = npt.NDArray[np.bool_]
_Scores = npt.NDArray[np.floating]


@dataclass(frozen=True)
class _Answers:
    """Whether each sample's label is the best class, and among the five best; bool [N]."""

    top1: _Bools
    top5: _Bools


def _answers(scores: _Scores, labels: npt.NDArray[np.int64]) -> _Answers:
    finite: _Bools = np.logical_and.reduce(np.isfinite(scores), axis=1)
    clean = np.where(finite[:, None], scores, 0).astype(scores.dtype)
    return _Answers(top1=is_among_best(clean, labels, 1) & finite, top5=is_among_best(clean, labels, 5) & finite)


def _require_scores(scores: Array, labels: Array | None, *, who: str, first_sample: int) -> npt.NDArray[np.int64]:
    """The labels as int64, where scores are float [N, classes] and labels fit them."""
    where = f"samples from {first_sample}"
    if scores.ndim != 2 or scores.dtype.kind != "f" or scores.shape[1] < 2:
        raise DataError(
            f"the {who}'s scores are {scores.dtype} {list(scores.shape)}; "
            "classification needs floats [N, classes], two classes or more",
            where=where,
        )
    if labels is None:
        raise DataError("[task] needs labels, and the samples have none", where=where)
    given: npt.NDArray[Any] = np.asarray(labels)
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise DataError(f"labels must be integers [N], got {given.dtype} {list(given.shape)}", where=where)
    if len(given) != len(scores):
        raise DataError(f"there are {len(given)} labels for {len(scores)} samples", where=where)
    if wrong := np.flatnonzero((given < 0) | (given >= scores.shape[1])).tolist():
        raise DataError(
            f"sample {first_sample + wrong[0]} has label {given[wrong[0]]}; there are {scores.shape[1]} classes, "
            f"0 to {scores.shape[1] - 1}",
            hint="Do the labels count from 1, or is this another label set?",
        )
    return given.astype(np.int64)


class ClassificationAccumulator:
    """Answers of engine and reference, batch by batch, in the samples' order."""

    def __init__(self) -> None:
        self._classes: int | None = None
        self._samples = 0
        self._candidate: list[_Bools] = []
        self._reference: list[_Bools] = []
        self._top5 = np.zeros(4, np.int64)  # engine right, reference right, newly wrong, newly right

    def add(self, reference: Array, candidate: Array, labels: Array | None, *, first_sample: int) -> None:
        """Take the next batch.

        Args:
            reference: Scores, float [N, classes]; only their order counts.
            candidate: The engine's, of the same shape.
            labels: int [N], from 0.
            first_sample: Index of the first in the data set; batches come in order, and none is left out.

        Raises:
            DataError: Labels are missing, of another number, not integers or not a class; or scores are not
                [N, classes].
            MeasurementError: The shapes differ, or a batch is missing or comes twice.
        """
        reference, candidate = np.asarray(reference), np.asarray(candidate)
        checked = _require_scores(reference, labels, who="reference", first_sample=first_sample)
        if reference.shape != candidate.shape:
            raise MeasurementError(
                f"the engine's scores are {list(candidate.shape)}, the reference's {list(reference.shape)}"
            )
        _require_scores(candidate, checked, who="engine", first_sample=first_sample)
        if first_sample != self._samples:
            raise MeasurementError(f"expected the batch from sample {self._samples}, got that from {first_sample}")
        if self._classes not in (None, reference.shape[1]):
            raise MeasurementError(f"scores have {reference.shape[1]} classes, those before had {self._classes}")
        self._classes = reference.shape[1]
        self._samples += len(checked)
        theirs, ours = (_answers(cast("_Scores", each), checked) for each in (reference, candidate))
        self._reference.append(theirs.top1)
        self._candidate.append(ours.top1)
        self._top5 += [
            np.count_nonzero(each)
            for each in (ours.top5, theirs.top5, theirs.top5 & ~ours.top5, ours.top5 & ~theirs.top5)
        ]

    def metrics(self) -> TaskMetrics:
        """The counts of what was added so far; no top-5 with five classes or fewer, where it says nothing.

        Raises:
            MeasurementError: There is no sample.
        """
        if self._samples == 0 or self._classes is None:
            raise MeasurementError("no answer was compared with a label")
        candidate, reference = np.concatenate(self._candidate), np.concatenate(self._reference)
        five = self._classes >= _TOP5_CLASSES
        right, reference_right, newly_wrong, newly_right = (int(each) for each in self._top5)
        return TaskMetrics(
            samples=self._samples,
            top1=int(np.count_nonzero(candidate)),
            top5=right if five else None,
            reference_top1=int(np.count_nonzero(reference)),
            reference_top5=reference_right if five else None,
            correct=np.packbits(candidate).tobytes().hex(),
            reference_correct=np.packbits(reference).tobytes().hex(),
            top5_newly_wrong=newly_wrong if five else None,
            top5_newly_right=newly_right if five else None,
        )


def correct_from_hex(text: str, samples: int) -> _Bools:
    """Outcomes from their hex, bool [samples].

    Raises:
        MeasurementError: It does not hold one bit for each sample.
    """
    try:
        packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    except ValueError as err:
        raise MeasurementError("outcomes are not hexadecimal") from err
    bits = np.unpackbits(packed).astype(np.bool_)
    if len(packed) != (samples + 7) // 8 or bits[samples:].any():
        raise MeasurementError(f"outcomes hold {len(packed)} bytes, which is not one bit for each of {samples} samples")
    return bits[:samples]


def task_findings(
    metrics: TaskMetrics,
    *,
    engine: EngineSpec,
    file: SpecFile,
    evidence: Evidence,
    labels: Array | None = None,
) -> tuple[Finding, ...]:
    """One finding for each limit of `[engine.task]`; with none, the drop of top-1 that the precision allows.

    Args:
        metrics: The counts.
        engine: Says what is asked.
        file: Where the limits stand; asked only for findings that do not pass.
        evidence: Of the run.
        labels: int [N], where they are at hand: the worst class is then named.

    Raises:
        MeasurementError: There is no sample, or the counts contradict the outcomes.
    """
    asked = engine.task
    if asked is None:
        return ()
    ours = _outcomes(metrics.correct, metrics.samples, metrics.top1)
    theirs = _outcomes(metrics.reference_correct, metrics.samples, metrics.reference_top1)
    found: list[Finding] = []
    for key in ("top1_at_least", "top5_at_least"):
        floor = getattr(asked, key)
        if floor is not None:
            count = metrics.top1 if key == "top1_at_least" else metrics.top5
            limit = Limit("at_least", floor)
            found.append(_accuracy(key.removesuffix("_at_least"), count, metrics.samples, limit, evidence))
    empty = all(getattr(asked, key) is None for key in TaskLimits.__struct_fields__)
    if asked.top1_drop_at_most_pp is not None or empty:
        limit = (
            Limit("at_most", DEFAULT_DROP_PP[engine.precision], "default")
            if asked.top1_drop_at_most_pp is None
            else Limit("at_most", asked.top1_drop_at_most_pp)
        )
        found.append(_paired("task.top1_drop_pp", theirs, ours, limit=limit, evidence=evidence, labels=labels))
    if asked.top5_drop_at_most_pp is not None:
        limit = Limit("at_most", asked.top5_drop_at_most_pp)
        found.append(
            _drop(
                "task.top5_drop_pp",
                metrics.top5_newly_wrong,
                metrics.top5_newly_right,
                metrics.samples,
                limit=limit,
                evidence=evidence,
            )
        )
    return tuple(_located(finding, engine=engine, file=file) for finding in found)


def baseline_task_finding(metrics: TaskMetrics, baseline_correct: str, *, limit: Limit, evidence: Evidence) -> Finding:
    """The drop of top-1 against accepted answers, `baseline.top1_drop_pp`, paired sample by sample.

    Args:
        metrics: Of this run.
        baseline_correct: The accepted outcomes of the same samples, as `TaskMetrics.correct`.
        limit: In percentage points.
        evidence: Of this run.

    Raises:
        BaselineError: The baseline's outcomes are not of as many samples.
        MeasurementError: There is no sample, or the run's counts contradict its outcomes.
    """
    ours = _outcomes(metrics.correct, metrics.samples, metrics.top1)
    try:
        before = correct_from_hex(baseline_correct, metrics.samples)
    except MeasurementError as err:
        raise BaselineError(f"the accepted {err.message}") from err
    return _paired("baseline.top1_drop_pp", before, ours, limit=limit, evidence=evidence, labels=None)


def _outcomes(text: str, samples: int, right: int) -> _Bools:
    if samples <= 0:
        raise MeasurementError("no answer was compared with a label")
    bits = correct_from_hex(text, samples)
    if (count := int(np.count_nonzero(bits))) != right:
        raise MeasurementError(f"{right} answers are said to be right, the outcomes hold {count}")
    return bits


def _located(finding: Finding, *, engine: EngineSpec, file: SpecFile) -> Finding:
    if finding.status is Status.PASSED or finding.limit.source != "spec":
        return finding
    name = finding.check.removeprefix("task.")
    key = name.replace("_drop_pp", "_drop_at_most_pp") if name.endswith("_drop_pp") else f"{name}_at_least"
    limit = msgspec.structs.replace(finding.limit, location=file.engine_location(engine.name, "task", key))
    return msgspec.structs.replace(finding, limit=limit)


def _undefined(check: str, n: int, *, limit: Limit, evidence: Evidence) -> Finding:
    """A finding that fails: top-5 of five classes says nothing."""
    return Finding(
        check=check,
        estimate=math.nan,
        interval=Interval(math.nan, math.nan),
        limit=limit,
        n=n,
        evidence=evidence,
        detail=f"top-5 needs {_TOP5_CLASSES} classes or more: among fewer every answer is among the best five",
        hint=f"docs/findings.md#{check.replace('.', '-')}",
    )


def _accuracy(name: str, count: int | None, n: int, limit: Limit, evidence: Evidence) -> Finding:
    check = f"task.{name}"
    if count is None:
        return _undefined(check, n, limit=limit, evidence=evidence)
    finding = Finding(
        check=check,
        estimate=count / n,
        interval=clopper_pearson(count, n, alpha=_ALPHA),
        limit=limit,
        n=n,
        evidence=evidence,
        hint=f"docs/findings.md#task-{name}",
    )
    detail = f"{count} of {n} are right"
    if finding.status is Status.INCONCLUSIVE:
        needed = least_samples_for_proportion(n - count, limit.value, alpha=_ALPHA) if count / n > limit.value else None
        detail += f": too few to say on which side of {limit.value:g} it is" + (
            f"; {needed} samples with no more wrong answers would show it" if needed else ""
        )
    return msgspec.structs.replace(finding, detail=detail)


def _paired(
    check: str, before: _Bools, after: _Bools, *, limit: Limit, evidence: Evidence, labels: Array | None
) -> Finding:
    newly_wrong = np.flatnonzero(before & ~after)
    newly_right = int(np.count_nonzero(after & ~before))
    finding = _drop(check, len(newly_wrong), newly_right, len(after), limit=limit, evidence=evidence)
    detail = finding.detail
    if len(newly_wrong):
        named = ", ".join(str(each) for each in newly_wrong[:_NAMED].tolist())
        detail += f"; newly wrong: samples {named}{', …' if len(newly_wrong) > _NAMED else ''}"
    if labels is not None and len(labels) == len(after) and len(newly_wrong):
        given = np.asarray(labels, dtype=np.int64)
        net = np.bincount(given, weights=before.astype(np.float64) - after)
        worst = int(net.argmax())
        detail += f"; worst class {worst}: {int(net[worst])} fewer right of {np.count_nonzero(given == worst)}"
    return msgspec.structs.replace(finding, detail=detail)


def _drop(check: str, b: int | None, c: int | None, n: int, *, limit: Limit, evidence: Evidence) -> Finding:
    """The drop of accuracy in percentage points, from b newly wrong and c newly right answers of n."""
    if b is None or c is None:
        return msgspec.structs.replace(_undefined(check, n, limit=limit, evidence=evidence), unit="pp")
    change = agresti_min_difference(b, c, n)
    finding = Finding(
        check=check,
        estimate=(b - c) / n * 100.0,
        interval=Interval(-change.upper * 100.0, -change.lower * 100.0),
        limit=limit,
        unit="pp",
        n=n,
        evidence=evidence,
        hint=f"docs/findings.md#{check.replace('.', '-')}",
    )
    detail = f"{b} newly wrong, {c} newly right of {n}"
    if finding.status is Status.FAILED:
        detail += f"; McNemar's exact p = {mcnemar_exact(b, c):.2g}"
    elif finding.status is Status.INCONCLUSIVE:
        detail += f"; {_what_would_decide(finding, limit.value)}"
    return msgspec.structs.replace(finding, detail=detail)


def _what_would_decide(finding: Finding, allowed_pp: float) -> str:
    n = finding.n
    if not allowed_pp > 0.0:
        return "no number of samples shows a drop of at most 0; allow a drop above 0"
    needed = samples_to_resolve(allowed_pp / 100.0)
    best = -agresti_min_difference(0, 0, n).lower * 100.0
    if n < needed:
        return (
            f"{n} samples without a changed answer can show a drop of at most {best:.2g} pp; "
            f"{allowed_pp:g} pp takes {needed}"
        )
    half = (finding.interval.upper - finding.interval.lower) / 2.0
    room = allowed_pp - finding.estimate
    if room > 0.0:
        return (
            f"at this rate of changed answers it would take about {math.ceil(n * (half / room) ** 2)} samples to show"
        )
    return "more samples would show whether the drop is above what is allowed"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of the reference on labelled samples.

    Args:
        value: Fraction.
        upper_bound: One-sided 95 % Clopper-Pearson bound.
    """

    value: float
    upper_bound: float


def reference_accuracy(batches: Iterable[tuple[Array | None, Array]]) -> dict[str, Accuracy]:
    """The reference's own `top1` and, with six classes or more, `top5`.

    Args:
        batches: Labels int [N] and scores float [N, classes] of each batch.

    Raises:
        DataError: Labels are missing or do not fit.
        MeasurementError: There is no sample.
    """
    accumulator = ClassificationAccumulator()
    first = 0
    for labels, scores in batches:
        accumulator.add(scores, scores, labels, first_sample=first)
        first += len(scores)
    metrics = accumulator.metrics()
    counts = {"top1": metrics.top1, "top5": metrics.top5}
    return {
        name: Accuracy(count / metrics.samples, clopper_pearson(count, metrics.samples, alpha=_ALPHA).upper)
        for name, count in counts.items()
        if count is not None
    }


def stated_metrics(
    stated: Mapping[str, float] | str, folder: Path, *, where: str, fractions: bool = True
) -> dict[str, float]:
    """What training reported: numbers by name, from the spec or from the JSON file that it names.

    Args:
        stated: `{ top1 = 0.985 }`, or a file's path below `folder`.
        folder: The spec's.
        where: For errors.
        fractions: Whether each is a fraction; an error in pixels is none.

    Raises:
        SpecError: The file cannot be read, or a metric is not a finite number or not a fraction; or there is none.
    """
    raw: object = dict(stated) if isinstance(stated, Mapping) else _read_json(folder / stated, where)
    if not isinstance(raw, Mapping) or not raw:
        raise SpecError("[model] metrics names no metric, expected such as { top1 = 0.985 }", where=where)
    found: dict[str, float] = {}
    for name, value in raw.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (0.0 <= value <= 1.0 if fractions else abs(value) <= sys.float_info.max):
            expected = "a fraction from 0 to 1" if fractions else "a finite number"
            raise SpecError(f"[model] metrics {name}: expected {expected}, got {value!r}", where=where)
        found[str(name)] = float(value)
    return found


def _read_json(path: Path, where: str) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SpecError(f"[model] metrics: {path} cannot be read: {err}", where=where) from err
