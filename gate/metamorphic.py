"""Checks that need no reference: what must stay the same when the same question is asked another way.

They catch what parity at one batch size does not: rows that leak into their neighbours, a profile edge that is
compiled wrongly, an engine that does not repeat itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gate.engines.interface import Renewable, Runner
from gate.errors import GateError, MeasurementError
from gate.spec import EngineSpec, InputSpec
from gate.tensors import Array, NamedArrays
from gate.verdict import Evidence, Failure, Finding, Interval, Limit

ROWS = 8
_WITH_CONTEXTS = ("tensorrt", "tensorrt_rtx")
"""Backends whose engines have execution contexts, so that one can be fresh."""

HINT = "docs/findings.md#metamorphic"


@dataclass(frozen=True)
class _Difference:
    """The worst relative difference found, where, and how many rows were compared."""

    value: float
    where: str
    rows: int


def metamorphic_findings(
    runner: Runner,
    samples: NamedArrays,
    *,
    engine: EngineSpec,
    inputs: Mapping[str, InputSpec],
    limit: Limit,
    evidence: Evidence,
    without_batch: Collection[str] = (),
) -> tuple[Finding | Failure, ...]:
    """Run the checks that the spec leaves on and that the profile allows.

    Args:
        runner: The engine.
        samples: A few samples, per input an array [n, ...], n >= 1.
        engine: Says which checks are on.
        inputs: The profile.
        limit: The relative difference allowed.
        evidence: Of the runner.
        without_batch: The engine's outputs that have no batch axis, and so no rows.
    """
    found: list[Finding | Failure] = []
    asked = engine.metamorphic
    for name, wanted, measure in (
        ("repeatability", asked.repeatability, _repeatability),
        ("batch_independence", asked.batch_independence, _batch_independence),
        ("profile_edges", asked.profile_edges, _profile_edges),
        ("fresh_context", asked.fresh_context, _fresh_context),
    ):
        if not wanted:
            continue
        check = f"metamorphic.{name}"
        try:
            difference = measure(runner, samples, inputs, without_batch)
        except GateError as err:
            found.append(
                Failure(
                    check=check, error=type(err).__name__, message=str(err), evidence=evidence, hint=err.hint or HINT
                )
            )
            continue
        if difference is None:
            continue
        found.append(
            Finding(
                check=check,
                estimate=difference.value,
                interval=Interval(difference.value, difference.value),
                limit=limit,
                n=difference.rows,
                evidence=evidence,
                detail=difference.where,
                hint=HINT,
            )
        )
    return tuple(found)


def applicable_checks(engine: EngineSpec, inputs: Mapping[str, InputSpec]) -> tuple[str, ...]:
    """Names of the checks that `metamorphic_findings` makes for this engine."""
    asked = engine.metamorphic
    names: list[str] = []
    if asked.repeatability:
        names.append("metamorphic.repeatability")
    _, largest = _batch_range(inputs)
    if asked.batch_independence and largest > 1:
        names.append("metamorphic.batch_independence")
    if asked.profile_edges and any(each.axes for each in inputs.values()):
        names.append("metamorphic.profile_edges")
    if asked.fresh_context and engine.backend in _WITH_CONTEXTS:
        names.append("metamorphic.fresh_context")
    return tuple(names)


def _batch_range(inputs: Mapping[str, InputSpec]) -> tuple[int, int]:
    first = next(iter(inputs.values()))
    axis = first.shape[0]
    return (axis, axis) if isinstance(axis, int) else (first.axes[axis].min, first.axes[axis].max)


def _rows(samples: NamedArrays, indices: list[int]) -> dict[str, Array]:
    """Those samples, taken cyclically where there are not enough."""
    return {name: np.ascontiguousarray(values[[i % len(values) for i in indices]]) for name, values in samples.items()}


def _relative(a: NamedArrays, b: NamedArrays) -> float:
    """The worst output's relative RMS difference; inf where they cannot be compared, NaN where one is NaN."""
    worst = 0.0
    if a.keys() != b.keys():
        return float("inf")
    for name in a:
        x, y = a[name], b[name]
        if x.shape != y.shape:
            return float("inf")
        if x.size == 0:
            continue
        if x.dtype.kind != "f":
            value = float(np.mean(x != y))
        else:
            wide, other = x.astype(np.float64), y.astype(np.float64)
            if not (np.isfinite(wide).all() and np.isfinite(other).all()):
                return float("nan")
            scale = float(np.sqrt(np.mean(np.square(wide))))
            difference = float(np.sqrt(np.mean(np.square(wide - other))))
            value = difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
        worst = max(worst, value)
    return worst


def _take(outputs: NamedArrays, indices: list[int], batch: int, without_batch: Collection[str]) -> dict[str, Array]:
    """Rows of the outputs that have a batch axis; one that should have and has not is NaN, which agrees with nothing.

    Raises:
        MeasurementError: No output has one, so nothing can be compared.
    """
    names = [name for name in outputs if name not in without_batch]
    if not names:
        raise MeasurementError(
            "no output has a batch axis, so rows cannot be compared",
            hint="Switch it off for this engine: metamorphic = { batch_independence = false, profile_edges = false }",
        )
    whole = {name: outputs[name].ndim == 0 or outputs[name].shape[0] != batch for name in names}
    return {name: np.full((1, 1), np.nan) if whole[name] else outputs[name][indices] for name in names}


def _repeatability(
    runner: Runner, samples: NamedArrays, inputs: Mapping[str, InputSpec], _without_batch: Collection[str]
) -> _Difference:
    smallest, largest = _batch_range(inputs)
    count = min(max(ROWS, smallest), largest)
    feed = _rows(samples, list(range(count)))
    first, second = runner.run(feed), runner.run(feed)
    same = all(np.array_equal(first[name], second[name]) for name in first)
    return _Difference(_relative(first, second), "the same bits twice" if same else "not the same bits twice", count)


def _batch_independence(
    runner: Runner, samples: NamedArrays, inputs: Mapping[str, InputSpec], without_batch: Collection[str]
) -> _Difference | None:
    smallest, largest = _batch_range(inputs)
    count = min(max(ROWS, smallest), largest)
    if count < 2:
        return None
    order = list(range(count))
    together = runner.run(_rows(samples, order))
    worst = _Difference(0.0, f"{count} samples agree with each alone and in reverse order", count)
    backwards = order[::-1]
    turned = _relative(
        _take(together, backwards, count, without_batch),
        _take(runner.run(_rows(samples, backwards)), order, count, without_batch),
    )
    if not turned <= worst.value:
        worst = _Difference(turned, "largest between the batch and the batch in reverse order", count)
    for row in order:
        alone = runner.run(_rows(samples, [row] * smallest))
        value = _relative(_take(together, [row], count, without_batch), _take(alone, [0], smallest, without_batch))
        if not value <= worst.value:
            worst = _Difference(value, f"largest for sample {row}: alone against in a batch of {count}", count)
            if np.isnan(value):
                break
    return worst


def _fresh_context(
    runner: Runner, samples: NamedArrays, inputs: Mapping[str, InputSpec], _without_batch: Collection[str]
) -> _Difference | None:
    """The runner has run the profile's edges by now; a fresh context of the same engine has run nothing.

    Source: NVIDIA/TensorRT issue 4853: answers that depend on the shapes that a context ran before.
    """
    if not isinstance(runner, Renewable):
        return None
    smallest, largest = _batch_range(inputs)
    worst = _Difference(0.0, "a used execution context agrees with a fresh one", 0)
    compared = 0
    for count in sorted({smallest, min(max(ROWS, smallest), largest)}):
        feed = _rows(samples, list(range(count)))
        with runner.fresh() as fresh:
            value = _relative(fresh.run(feed), runner.run(feed))
        compared += count
        if not value <= worst.value:
            worst = _Difference(value, f"largest at batch {count}: a used context against a fresh one", count)
    return _Difference(worst.value, worst.where, compared)


def _profile_edges(
    runner: Runner, samples: NamedArrays, inputs: Mapping[str, InputSpec], without_batch: Collection[str]
) -> _Difference | None:
    if not any(each.axes for each in inputs.values()):
        return None
    smallest, _ = _batch_range(inputs)
    worst = _Difference(0.0, "", 0)
    seen: list[str] = []
    compared = 0
    edges: tuple[Literal["min", "opt", "max"], ...] = ("min", "opt", "max")
    for edge in edges:
        shapes = {name: spec.sized(edge) for name, spec in inputs.items()}
        batch = next(iter(shapes.values()))[0]
        feed = {
            name: np.ascontiguousarray(_resized(rows, shapes[name]))
            for name, rows in _rows(samples, list(range(batch))).items()
        }
        outputs = runner.run(feed)
        seen.append(f"{edge} {'x'.join(map(str, next(iter(shapes.values()))))}")
        for row in sorted({0, batch // 2, batch - 1}):
            alone = runner.run({name: np.ascontiguousarray(values[[row] * smallest]) for name, values in feed.items()})
            value = _relative(_take(outputs, [row], batch, without_batch), _take(alone, [0], smallest, without_batch))
            compared += 1
            if not value <= worst.value:
                worst = _Difference(value, f"largest for row {row} of {seen[-1]}: against batch {smallest}", 1)
    detail = worst.where or f"{', '.join(seen)} agree with batch {smallest}"
    return _Difference(worst.value, detail, compared)


def _resized(rows: Array, shape: tuple[int, ...]) -> Array:
    """The rows repeated or cut along each axis to a shape."""
    for axis, size in enumerate(shape):
        if rows.shape[axis] != size:
            rows = np.take(rows, np.arange(size) % rows.shape[axis], axis=axis)
    return rows
