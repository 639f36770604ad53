"""Likely causes of a difference, from a few rows of engine and reference: what to look at first.

A cause is named only where undoing it explains the difference: at most a fifth of the error is left, and of the
variation of the output. So noise, however large, gets no cause.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.results import OutputMetrics
from gate.tensors import Array

_ROWS = 256
_COLUMNS = 2048
_LEFT = 0.2  # of the error, after a cause is undone
_LEAST = 1e-3  # relative error below which there is nothing to explain
_NAMED = 3

_Floats = npt.NDArray[np.float64]


def diagnose(metrics: OutputMetrics, reference: Array, candidate: Array) -> tuple[str, ...]:
    """Sentences on what may have gone wrong with one output; none where nothing is known.

    Args:
        metrics: Of the output: its name is used.
        reference: The first rows, float [n, ...].
        candidate: The engine's, of the same shape.
    """
    name = metrics.output
    rows = min(len(reference), _ROWS) if reference.ndim and reference.shape == candidate.shape else 0
    if rows == 0 or reference.size == 0 or reference.dtype.kind != "f" or candidate.dtype.kind != "f":
        return ()
    r = reference[:rows].astype(np.float64).reshape(rows, -1)
    c = candidate[:rows].astype(np.float64).reshape(rows, -1)
    if not np.isfinite(c).all():
        return (f"{name}: {_not_finite(c)}",)
    if not np.isfinite(r).all():
        return (f"{name}: the reference itself holds NaN or Inf in the first {rows} samples",)
    with np.errstate(all="ignore"):
        error = _norm(c - r)
        if not error > _LEAST * _norm(r):
            return ()
        shape = reference.shape[1:]
        cause = next(itertools.chain(_constant(r, c), _moved(r, c, shape, error), _rescaled(r, c, error)), None)
        found = [cause] if cause else list(_where(r, c))
    return tuple(f"{name}: {each}" for each in found)


def _norm(values: _Floats) -> float:
    return float(np.linalg.norm(values))


def _explains(undone: _Floats, target: _Floats, error: float) -> bool:
    """Whether what is left after a cause is undone is little beside the error, and beside what there is to explain."""
    left = _norm(undone - target)
    return left <= _LEFT * error and left <= _LEFT * _norm(target - target.mean())


def _not_finite(c: _Floats) -> str:
    bad = ~np.isfinite(c)
    samples = np.flatnonzero(bad.any(axis=1))
    columns = np.flatnonzero(bad.any(axis=0))
    if bad.all():
        return f"every element of the first {len(c)} samples is NaN or Inf"
    text = f"{len(samples)} of the first {len(c)} samples hold NaN or Inf, sample {samples[0]} first"
    if len(columns) <= _NAMED < c.shape[1]:
        text += f", only in element {', '.join(str(each) for each in columns)}"
    if np.isposinf(c[bad]).any() and not np.isnan(c[bad]).any():
        text += "; Inf without NaN suggests an overflow, in fp16 above 65504"
    return text


def _constant(r: _Floats, c: _Floats) -> Iterator[str]:
    if not c.any():
        yield "the engine's output is all zeros"
    elif c.size > 1 and np.ptp(c) == 0.0 and np.ptp(r) > 0.0:
        yield f"the engine's output is the constant {c[0, 0]:.4g}"
    elif len(c) > 1 and (c == c[0]).all() and not (r == r[0]).all():
        same = np.linalg.norm(r - c[0], axis=1) <= _LEFT * np.linalg.norm(r, axis=1)
        nearest = f", near the reference's sample {int(same.argmax())}" if same.any() else ""
        yield f"the engine gives every sample the same answer{nearest}: its input does not reach the output"


def _moved(r: _Floats, c: _Floats, shape: tuple[int, ...], error: float) -> Iterator[str]:
    """Right values at another place: rows, columns or axes."""
    n = len(r)
    for step, which in ((1, "next"), (-1, "previous")):
        if n >= 4:
            mine, its = (c[:-1], r[1:]) if step == 1 else (c[1:], r[:-1])
            unmoved = _norm(mine - (r[:-1] if step == 1 else r[1:]))
            if _explains(its, mine, unmoved):
                yield f"rows are shifted: the engine's answer to a sample is the reference's to the {which} one"
    yield from _rows_permuted(r, c, error)
    yield from _axes_permuted(r, c, shape, error)
    yield from _columns_permuted(r, c, error)


def _rows_permuted(r: _Floats, c: _Floats, error: float) -> Iterator[str]:
    n = len(r)
    if n < 4 or r.shape[1] < 2:
        return
    squared = (r * r).sum(axis=1)[None, :] - 2.0 * c @ r.T
    nearest = squared.argmin(axis=1)
    moved = np.flatnonzero(nearest != np.arange(n))
    if len(np.unique(nearest)) == n and len(moved) and _explains(r[nearest], c, error):
        yield f"rows are in another order: {_pairs(moved, nearest, 'sample')}"


def _columns_permuted(r: _Floats, c: _Floats, error: float) -> Iterator[str]:
    n, size = r.shape
    if n < 8 or not 2 <= size <= _COLUMNS:
        return
    distance = (r * r).sum(axis=0)[None, :] - 2.0 * c.T @ r
    source = distance.argmin(axis=1)
    moved = np.flatnonzero(source != np.arange(size))
    if len(np.unique(source)) == size and len(moved) and _explains(r[:, source], c, error):
        yield f"columns are in another order: {_pairs(moved, source, 'column')}; look at the order of the classes"


def _pairs(moved: npt.NDArray[np.intp], source: npt.NDArray[np.intp], what: str) -> str:
    some = ", ".join(
        f"the engine's {what} {each} is the reference's {source[each]}" for each in moved[:_NAMED].tolist()
    )
    return some + (f", and {len(moved) - _NAMED} more" if len(moved) > _NAMED else "")


def _axes_permuted(r: _Floats, c: _Floats, shape: tuple[int, ...], error: float) -> Iterator[str]:
    """The engine wrote a sample with its axes in another order into the same shape."""
    if sum(size > 1 for size in shape) < 2 or len(shape) > 4:
        return
    wide = r.reshape(len(r), *shape)
    for order in itertools.permutations(range(len(shape))):
        if order == tuple(range(len(shape))):
            continue
        turned = wide.transpose(0, *(axis + 1 for axis in order)).reshape(r.shape)
        if _explains(turned, c, error):
            yield f"a sample is transposed: its axes {list(range(len(shape)))} were written in the order {list(order)}"
            return


def _rescaled(r: _Floats, c: _Floats, error: float) -> Iterator[str]:
    """Right up to a function of the values: softmax, sigmoid, or a line."""
    if r.shape[1] >= 2:
        sums_r, sums_c = _is_distribution(r), _is_distribution(c)
        if sums_c and _explains(_softmax(r), c, error):
            yield "softmax is applied twice" if sums_r else "the engine applies a softmax that the reference does not"
        elif sums_r and _explains(_softmax(c), r, error):
            yield "softmax is missing: the engine gives scores where the reference gives probabilities"
        elif _explains(np.log(_softmax(r)), c, error):
            yield "the engine applies a log-softmax that the reference does not"
    if r.min() < 0.0 and c.min() >= -0.02 and c.max() <= 1.02 and _explains(_sigmoid(r), c, error):
        yield "the engine applies a sigmoid that the reference does not"
    if c.min() < 0.0 and r.min() >= -0.02 and r.max() <= 1.02 and _explains(_sigmoid(c), r, error):
        yield "sigmoid is missing: the engine gives scores where the reference gives probabilities"
    spread = float(r.std())
    if spread > 0.0 and r.size >= 8:
        slope = float(((r - r.mean()) * (c - c.mean())).mean()) / spread**2
        offset = float(c.mean() - slope * r.mean())
        if _explains(slope * r + offset, c, error):
            shifted = f" {offset:+.3g}" if abs(offset) > 0.01 * abs(slope) * spread else ""
            if abs(slope - 1.0) > 0.01:
                yield f"the engine's values are {slope:.3g} times the reference's{shifted}: look at the preprocessing"
            elif shifted:
                yield f"the engine's values are the reference's{shifted}: an offset is added"


def _is_distribution(values: _Floats) -> bool:
    return bool(values.min() >= -0.02 and np.abs(values.sum(axis=1) - 1.0).max() < 0.05)


def _softmax(values: _Floats) -> _Floats:
    powers: Any = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _sigmoid(values: _Floats) -> _Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-values)))


def _where(r: _Floats, c: _Floats) -> Iterator[str]:
    """Where most of the squared error is, if it is in few places."""
    squared = (c - r) ** 2
    total = float(squared.sum())
    if not 0.0 < total < math.inf:
        return
    by_column, by_row = squared.sum(axis=0), squared.sum(axis=1)
    if len(by_column) >= 4 and by_column.max() >= 0.8 * total:
        share = by_column.max() / total
        yield f"{share:.0%} of the squared error is in element {int(by_column.argmax())} of a sample"
    few = max(1, len(by_row) // 20)
    worst = np.argsort(-by_row, kind="stable")[:few]
    if len(by_row) >= 20 and by_row[worst].sum() >= 0.8 * total:
        named = ", ".join(str(each) for each in worst[:_NAMED].tolist())
        yield f"{by_row[worst].sum() / total:.0%} of the squared error is in {few} of {len(by_row)} samples: {named}"
