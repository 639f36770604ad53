"""Every difference between engine and reference, in one pass over the outputs and in memory that does not grow.

An `OutputAccumulator` takes batches in any split and any order, and two of them merge; the metrics come out with the
same bits each time. What a sample gives does not depend on its batch, sums over samples are exact
(`gate.statistics.ExactSum`), and everything else is a maximum or a count.

Sums inside a sample are made in float32, as fast as memory allows, in segments of at most 8,192 elements whose sums
are added in float64. A segment whose squares could overflow or underflow, or whose difference is as large as the
reference itself, is computed again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError
from gate.results import OutputMetrics
from gate.statistics import ExactSum, is_among_best
from gate.tensors import Array

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}

_SEGMENT = 8192  # elements whose sums stay in float32; below OpenBLAS's threshold for threads in a dot product
_BLOCK = 131072  # elements at a time: smaller ones spend more on calls than they gain from the cache
_PENDING = 4096  # samples whose values wait to be summed
_WORST = 5
_BINS = 8192
_SHIFT = 18  # of a float32's bits: sign, exponent and the five highest bits of the mantissa are left
_LEAST_SQUARE = 1e-30  # a float32 sum of squares below it may have lost terms to underflow
_LARGEST_SQUARE = 1e37

_Floats = npt.NDArray[np.float64]
_Values = npt.NDArray[Any]
_Bools = npt.NDArray[np.bool_]
Kind = Literal["float", "exact"]


def kind_of(dtype: npt.DTypeLike) -> Kind:
    """`float` for floating dtypes, `exact` for integers and booleans.

    Raises:
        MeasurementError: It is another dtype, which cannot be compared.
    """
    kind = np.dtype(dtype).kind
    if kind == "f":
        return "float"
    if kind in "iub":
        return "exact"
    raise MeasurementError(f"outputs of dtype {np.dtype(dtype)} cannot be compared; give floats, integers or booleans")


_vecdot: Callable[..., _Values] | None = getattr(np, "vecdot", None)  # of NumPy 2.0


def _dot_rows(a: _Values, b: _Values, out: _Values | None = None) -> _Values:
    """The dot product of each row of `a` and `b`, [rows, n], summed in their dtype."""
    if _vecdot is not None:
        return _vecdot(a, b, out=out)
    return np.asarray(np.einsum("ij,ij->i", a, b, out=out))


@dataclass
class _Rows:
    """Sums of each row: of |d|, d², r², c², r·d, the same of the centred rows, max |d|, and what is not finite."""

    largest: _Floats
    absolute: _Floats
    dd: _Floats
    rr: _Floats
    cc: _Floats
    rd: _Floats
    centered: tuple[_Floats, _Floats, _Floats] | None
    bad_reference: npt.NDArray[np.int64]
    bad_candidate: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, n: int, *, centered: bool) -> _Rows:
        """`n` rows of nothing."""
        three = (np.zeros(n), np.zeros(n), np.zeros(n)) if centered else None
        largest, absolute, dd, rr, cc, rd = np.zeros((6, n))
        return cls(largest, absolute, dd, rr, cc, rd, three, *np.zeros((2, n), np.int64))

    def put(self, rows: slice | npt.NDArray[np.intp], other: _Rows) -> None:
        """Set some rows."""
        for mine, its in self._pairs(other):
            mine[rows] = its

    def gather(self, row: int, other: _Rows) -> None:
        """Add all rows of `other`, the segments of one sample, to one row; the order of the sum is fixed."""
        self.largest[row] = max(float(self.largest[row]), float(other.largest.max(initial=0.0)))
        for mine, its in self._pairs(other)[1:]:
            mine[row] += its.sum()

    def _pairs(self, other: _Rows) -> list[tuple[_Values, _Values]]:
        pairs: list[tuple[_Values, _Values]] = [
            (self.largest, other.largest),
            (self.absolute, other.absolute),
            (self.dd, other.dd),
            (self.rr, other.rr),
            (self.cc, other.cc),
            (self.rd, other.rd),
            (self.bad_reference, other.bad_reference),
            (self.bad_candidate, other.bad_candidate),
        ]
        if self.centered is not None and other.centered is not None:
            pairs.extend(zip(self.centered, other.centered, strict=True))
        return pairs


class OutputAccumulator:
    """The difference of one output, batch by batch.

    Args:
        name: Of the output.
        dtype: Of the reference; integers and booleans are compared exactly.
        atol: Absolute tolerance behind the allclose fraction; None: the fraction is not measured (NaN, which passes
            no limit).
        rtol: Relative tolerance, likewise; None: 0.
        center: float [...] of a sample's shape, the reference's mean over the samples; None: no centred cosine.
        batch_axis: Whether the first axis is the batch. Without it each call of `add` is one sample.
        histogram: Measure quantiles.
        topk: Measure top-1 and top-5 agreement where the output is [N, classes].
    """

    def __init__(
        self,
        name: str,
        dtype: npt.DTypeLike,
        *,
        atol: float | None = None,
        rtol: float | None = None,
        center: npt.NDArray[np.floating] | None = None,
        batch_axis: bool = True,
        histogram: bool = True,
        topk: bool = True,
    ) -> None:
        self.name = name
        self.kind: Kind = kind_of(dtype)
        self._atol = atol
        self._rtol = 0.0 if rtol is None else rtol
        self._center = None if center is None or self.kind == "exact" else np.asarray(center, dtype=np.float64)
        self._batch_axis = batch_axis
        self._histogram = np.zeros(_BINS, np.int64) if histogram and self.kind == "float" else None
        self._topk = topk and self.kind == "float"

        self._samples = 0
        self._elements = 0
        self._bad_reference = 0
        self._bad_candidate = 0
        self._largest = _Largest(-1.0, 0, 0)
        self._mismatches = 0
        self._close = 0
        self._worst_cosine = 0.0
        self._worst_centered = 0.0
        self._worst: list[tuple[int, float]] = []
        self._top1 = 0
        self._top5 = 0
        self._near_ties = 0
        self._topk_samples = 0
        self._top5_samples = 0
        self._sums = {key: ExactSum() for key in ("absolute", "dd", "rr", "cosine")}
        self._pending: list[tuple[int, _Rows, _Floats]] = []
        self._pending_samples = 0
        self._buffers: dict[tuple[str, str], _Values] = {}

    def add(self, reference: Array, candidate: Array, *, first_sample: int) -> None:
        """Take one batch.

        Args:
            reference: [N, ...], as `dtype` said; without a batch axis of any shape.
            candidate: Of the same shape, and exact or floating as the reference.
            first_sample: Index of the batch's first sample in the data set.

        Raises:
            MeasurementError: Shapes or kinds differ, or `center` is of another shape than a sample.
        """
        reference, candidate = np.asarray(reference), np.asarray(candidate)
        if reference.shape != candidate.shape:
            raise MeasurementError(
                f"output {self.name!r}: the engine's shape is {list(candidate.shape)}, "
                f"the reference's {list(reference.shape)}"
            )
        for who, values in (("reference", reference), ("engine", candidate)):
            if kind_of(values.dtype) != self.kind:
                raise MeasurementError(
                    f"output {self.name!r}: the {who}'s dtype is {values.dtype}, expected {self.kind}"
                )
        if not self._batch_axis:
            reference, candidate = reference[None], candidate[None]
        if reference.ndim == 0:
            raise MeasurementError(f"output {self.name!r} is a scalar and has no batch axis: say batch_axis=False")
        n = reference.shape[0]
        if n == 0:
            return
        classes = reference.shape[1] if reference.ndim == 2 and self._batch_axis else 0
        center = self._centre_of(reference.shape[1:])
        flat_reference = np.ascontiguousarray(reference).reshape(n, math.prod(reference.shape[1:]))
        flat_candidate = np.ascontiguousarray(candidate).reshape(flat_reference.shape)
        self._samples += n
        self._elements += flat_reference.size
        with np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore"):
            if self.kind == "exact":
                rows, errors = self._exact(flat_reference, flat_candidate)
            else:
                rows = self._float(flat_reference, flat_candidate, center)
                errors = _relative_errors(rows)
            self._note_largest(flat_reference, flat_candidate, rows, first_sample)
            if self._topk and classes >= 2:
                self._note_best(flat_reference, flat_candidate, rows)
        self._pending.append((first_sample, rows, errors))
        self._pending_samples += n
        if self._pending_samples >= _PENDING:
            self._settle()

    def merge(self, other: OutputAccumulator) -> None:
        """Take what another accumulator holds: other samples of the same output, with the same settings.

        Raises:
            MeasurementError: It is of another output, or has other settings.
        """
        mine, its = self._settings(), other._settings()
        same_center = (self._center is None) == (other._center is None) and (
            self._center is None or other._center is None or np.array_equal(self._center, other._center)
        )
        if mine != its or not same_center:
            raise MeasurementError(f"output {self.name!r} cannot be merged with {other.name!r}: other settings")
        self._settle()
        other._settle()
        self._samples += other._samples
        self._elements += other._elements
        self._bad_reference += other._bad_reference
        self._bad_candidate += other._bad_candidate
        self._largest = max(self._largest, other._largest, key=_Largest.order)
        self._mismatches += other._mismatches
        self._close += other._close
        self._worst_cosine = max(self._worst_cosine, other._worst_cosine)
        self._worst_centered = max(self._worst_centered, other._worst_centered)
        self._worst = _worst_of([*self._worst, *other._worst])
        self._top1 += other._top1
        self._top5 += other._top5
        self._near_ties += other._near_ties
        self._topk_samples += other._topk_samples
        self._top5_samples += other._top5_samples
        for key, each in self._sums.items():
            each.merge(other._sums[key])
        if self._histogram is not None and other._histogram is not None:
            self._histogram += other._histogram

    def metrics(self) -> OutputMetrics:
        """Every metric of what was added so far. Where an element is not finite, they are NaN and pass nothing.

        Raises:
            MeasurementError: Nothing was compared: no sample, or none with an element.
        """
        self._settle()
        if self._samples == 0 or self._elements == 0:
            raise MeasurementError(
                f"output {self.name!r}: nothing was compared ({self._samples} samples, {self._elements} elements)",
                hint="An output without elements can pass nothing: look at its shape, or leave it out of output_names.",
            )
        finite = self._bad_reference + self._bad_candidate == 0
        floating = self.kind == "float"
        measured = finite and floating
        mean_square = self._sums["rr"].over(self._elements)
        mean_error = self._sums["dd"].over(self._elements)
        relative = _ratio(math.sqrt(mean_error), math.sqrt(mean_square), differs=self._largest.value > 0.0)
        close = self._close if floating else self._elements - self._mismatches
        fraction = math.nan if floating and self._atol is None else close / self._elements
        all_classes = 0 < self._topk_samples == self._samples
        return OutputMetrics(
            output=self.name,
            kind=self.kind,
            samples=self._samples,
            elements=self._elements,
            nonfinite_reference=self._bad_reference,
            nonfinite_candidate=self._bad_candidate,
            max_abs=self._largest.value,
            max_abs_sample=self._largest.sample,
            max_abs_element=self._largest.element,
            mean_abs=self._sums["absolute"].over(self._elements) if finite else math.nan,
            rms_reference=math.sqrt(mean_square) if finite else math.nan,
            rel_rmse=relative if finite else math.nan,
            sqnr_db=None if not floating else _decibels(relative) if finite else math.nan,
            cosine_distance=None if not floating else self._worst_cosine if measured else math.nan,
            mean_cosine_distance=(
                None if not floating else self._sums["cosine"].over(self._samples) if measured else math.nan
            ),
            centered_cosine_distance=(None if self._center is None else self._worst_centered if measured else math.nan),
            allclose_fraction=fraction if finite else math.nan,
            allclose_atol=0.0 if not floating else math.nan if self._atol is None else self._atol,
            allclose_rtol=0.0 if not floating else math.nan if self._atol is None else self._rtol,
            mismatch_fraction=self._mismatches / self._elements if finite else math.nan,
            quantiles=self._quantiles()
            if finite
            else dict.fromkeys(QUANTILES if self._histogram is not None else (), math.nan),
            worst_samples=tuple(self._worst),
            top1_agree=self._top1 if all_classes else None,
            top5_agree=self._top5 if all_classes and self._top5_samples == self._samples else None,
            topk_samples=self._topk_samples if all_classes else None,
            top1_near_ties=self._near_ties if all_classes else None,
        )

    def _settings(self) -> tuple[object, ...]:
        return (
            self.name,
            self.kind,
            self._atol,
            self._rtol,
            self._batch_axis,
            self._histogram is None,
            self._topk,
        )

    def _centre_of(self, shape: tuple[int, ...]) -> _Floats | None:
        if self._center is None:
            return None
        if self._center.shape != shape:
            raise MeasurementError(
                f"output {self.name!r}: a sample's shape is {list(shape)}, its centre's {list(self._center.shape)}"
            )
        return self._center.reshape(-1)

    def _float(self, reference: _Values, candidate: _Values, center: _Floats | None) -> _Rows:
        """The sums of each sample, [N, elements]; counts of elements are noted on the way."""
        n, size = reference.shape
        if size <= _SEGMENT:
            return self._short(reference, candidate, center)
        rows = _Rows.zeros(n, centered=center is not None)
        whole = size - size % _SEGMENT
        for row in range(n):
            for part in (slice(0, whole), slice(whole, size)):
                shape = (-1, min(_SEGMENT, part.stop - part.start))
                if shape[1] == 0:
                    continue
                middle = None if center is None else center[part].reshape(shape)
                rows.gather(
                    row, self._short(reference[row, part].reshape(shape), candidate[row, part].reshape(shape), middle)
                )
        return rows

    def _short(self, reference: _Values, candidate: _Values, center: _Floats | None) -> _Rows:
        """As `_float` for rows of at most a segment; `center` is [elements] or [N, elements]."""
        n, size = reference.shape
        if size == 0 or n == 0:
            return _Rows.zeros(n, centered=center is not None)
        dtype = np.result_type(reference, candidate, np.float32)
        middle = None if center is None else center.astype(dtype)
        sums = np.empty((5 if center is None else 7, n), dtype)
        step = max(1, _BLOCK // size)
        again: list[npt.NDArray[np.intp]] = []
        for start in range(0, n, step):
            part = slice(start, start + step)
            few = middle if middle is None or middle.ndim == 1 else middle[part]
            unsafe = self._block(reference[part], candidate[part], few, sums[:, part])
            if unsafe.size:
                again.append(unsafe + start)
        largest, absolute, dd, rr, rd, *two = sums.astype(np.float64)
        # Where d is small beside r the candidate's square follows from these without loss; elsewhere see `_block`.
        cc = np.maximum(rr + 2.0 * rd + dd, 0.0)
        centered = None
        if two:
            tt, td = two
            centered = (tt, np.maximum(tt + 2.0 * td + dd, 0.0), td)
        rows = _Rows(largest, absolute, dd, rr, cc, rd, centered, *np.zeros((2, n), np.int64))
        step = max(1, _BLOCK // 4 // size)
        for unsafe in again:
            for start in range(0, len(unsafe), step):
                index = unsafe[start : start + step]
                wide = center if center is None or center.ndim == 1 else center[index]
                rows.put(index, self._careful(reference[index], candidate[index], wide))
        return rows

    def _block(
        self, reference: _Values, candidate: _Values, center: _Values | None, sums: _Values
    ) -> npt.NDArray[np.intp]:
        """Fill `sums` for rows that fit in the cache together: max |d|, sums of |d|, d², r², r·d, t² and t·d.

        t is the reference less its centre. Returns the rows that `_careful` has to do, which are not counted here.
        """
        dtype = sums.dtype
        r, c = self._as(dtype, "r", reference), self._as(dtype, "c", candidate)
        d = self._buffer(dtype, "d", r.shape)
        largest, absolute, dd, rr, rd = sums[:5]
        np.subtract(c, r, out=d)
        _dot_rows(d, d, dd)
        _dot_rows(r, r, rr)
        _dot_rows(r, d, rd)
        single = dtype == np.float32
        least = rr
        if center is not None:
            t = self._buffer(dtype, "bound", r.shape)
            np.subtract(r, center, out=t)
            _dot_rows(t, t, sums[5])
            _dot_rows(t, d, sums[6])
            least = np.minimum(rr, sums[5])
        np.abs(d, out=d)
        np.maximum.reduce(d, axis=1, out=largest)
        _dot_rows(d, self._ones(dtype, d.shape), absolute)
        safe = largest < np.inf
        if single:
            safe &= (dd >= _LEAST_SQUARE) | (largest == 0.0)
            safe &= dd <= 0.5 * least
            safe &= least >= _LEAST_SQUARE
            safe &= rr <= _LARGEST_SQUARE
        if safe.all():
            self._count(r, d, largest)
        elif safe.any():
            self._count(r[safe], d[safe], largest[safe])
        return np.flatnonzero(~safe)

    def _careful(self, reference: _Values, candidate: _Values, center: _Floats | None) -> _Rows:
        """As `_block` in float64, for rows out of float32's reach and for those with elements that are not finite."""
        r, c = reference.astype(np.float64), candidate.astype(np.float64)
        good_r, good_c = np.isfinite(r), np.isfinite(c)
        bad_reference = np.count_nonzero(~good_r, axis=1).astype(np.int64)
        bad_candidate = np.count_nonzero(~good_c, axis=1).astype(np.int64)
        broken = bad_reference + bad_candidate > 0
        neither = ~(good_r & good_c)
        r[neither] = c[neither] = 0.0
        d = c - r
        rd, dd, rr, cc = _dot_rows(r, d), _dot_rows(d, d), _dot_rows(r, r), _dot_rows(c, c)
        centered = None
        if center is not None:
            t, u = r - center, c - center
            centered = (_dot_rows(t, t), _dot_rows(u, u), _dot_rows(t, d))
        np.abs(d, out=d)
        largest = d.max(axis=1)
        largest[broken] = np.inf
        self._count(r, d, np.full(len(r), np.inf), extra=int(np.count_nonzero(neither)), neither=neither)
        return _Rows(largest, _dot_rows(d, np.ones_like(d)), dd, rr, cc, rd, centered, bad_reference, bad_candidate)

    def _count(
        self, r: _Values, d: _Values, largest: _Values, *, extra: int = 0, neither: _Bools | None = None
    ) -> None:
        """Note what is counted by element: mismatches, elements within tolerance, the histogram of |d|.

        Args:
            r: The reference's rows.
            d: |d| of those rows.
            largest: The largest |d| of each.
            extra: Elements that are not finite in either, and so 0 in both arrays.
            neither: Where they are.
        """
        flags = self._flags(d.shape)
        if largest.any():
            np.not_equal(d, 0, out=flags)
            self._mismatches += int(np.count_nonzero(flags)) + extra
        if self._atol is not None:
            limit = d.dtype.type(self._atol)
            if largest.max(initial=0.0) <= limit:
                self._close += d.size
            else:
                bound = self._buffer(d.dtype, "bound", d.shape)
                np.abs(r, out=bound)
                np.multiply(bound, d.dtype.type(self._rtol), out=bound)
                np.add(bound, limit, out=bound)
                np.less_equal(d, bound, out=flags)
                if neither is not None:
                    flags &= ~neither
                self._close += int(np.count_nonzero(flags))
        if self._histogram is not None:
            narrow = d if d.dtype == np.float32 else d.astype(np.float32)
            bits = self._buffer(np.dtype(np.intp), "bits", d.shape)
            np.right_shift(narrow.view(np.uint32), np.uint32(_SHIFT), out=bits)
            self._histogram += np.bincount(bits.ravel(), minlength=_BINS)

    def _exact(self, reference: _Values, candidate: _Values) -> tuple[_Rows, _Floats]:
        """As `_float` for integers and booleans; the relative error of a sample is the fraction that differs."""
        n, size = reference.shape
        rows = _Rows.zeros(n, centered=False)
        wrong = np.zeros(n)
        step = max(1, _BLOCK // max(1, size))
        for start in range(0, n, step):
            part = slice(start, start + step)
            r, c = reference[part], candidate[part]
            wrong[part] = np.count_nonzero(r != c, axis=1)
            d = _integer_distance(r, c)
            wide = r.astype(np.float64)
            rows.largest[part] = d.max(axis=1, initial=0.0)
            rows.absolute[part] = _dot_rows(d, np.ones_like(d))
            rows.dd[part] = _dot_rows(d, d)
            rows.rr[part] = _dot_rows(wide, wide)
        self._mismatches += int(wrong.sum())
        return rows, wrong / max(1, size)

    def _note_largest(self, reference: _Values, candidate: _Values, rows: _Rows, first_sample: int) -> None:
        if reference.shape[1] == 0:
            return
        row = int(rows.largest.argmax())
        value = float(rows.largest[row])
        found = _Largest(value, first_sample + row, 0)
        if _Largest.order(found) <= _Largest.order(self._largest):
            return
        r, c = reference[row], candidate[row]
        if self.kind == "exact":
            element = int(_integer_distance(r, c).argmax())
        else:
            bad = ~(np.isfinite(r) & np.isfinite(c))
            wide = np.abs(c.astype(np.float64) - r.astype(np.float64))
            element = int(bad.argmax() if bad.any() else wide.argmax())
        self._largest = _Largest(value, first_sample + row, element)

    def _note_best(self, reference: _Values, candidate: _Values, rows: _Rows) -> None:
        """Top-1 and top-5 agreement; a row with an element that is not finite agrees with nothing."""
        n, classes = reference.shape
        step = max(1, (1 << 20) // classes)
        finite = rows.bad_reference + rows.bad_candidate == 0
        self._topk_samples += n
        self._top5_samples += n if classes > 5 else 0
        for start in range(0, n, step):
            part = slice(start, start + step)
            r, c = reference[part], candidate[part]
            best = r.argmax(axis=1)
            same = (best == c.argmax(axis=1)) & finite[part]
            agree = int(np.count_nonzero(same))
            self._top1 += agree
            self._top5 += agree
            other = np.flatnonzero(~same & finite[part])
            if other.size:
                self._top5 += int(np.count_nonzero(is_among_best(c[other], best[other], 5)))
                few, first = r[other].astype(np.float64), best[other, None]
                top = np.take_along_axis(few, first, axis=1)[:, 0]
                np.put_along_axis(few, first, -np.inf, axis=1)
                margin = top - few.max(axis=1)
                self._near_ties += int(np.count_nonzero(margin < 2.0 * rows.largest[part][other]))

    def _settle(self) -> None:
        """Sum what is pending."""
        if not self._pending:
            return
        firsts, batches, errors = zip(*self._pending, strict=True)
        self._pending, self._pending_samples = [], 0
        index = np.concatenate([first + np.arange(len(each)) for first, each in zip(firsts, errors, strict=True)])
        error = np.concatenate(errors)
        bad_reference = np.concatenate([each.bad_reference for each in batches])
        bad_candidate = np.concatenate([each.bad_candidate for each in batches])
        self._bad_reference += int(bad_reference.sum())
        self._bad_candidate += int(bad_candidate.sum())
        rr, dd = np.concatenate([each.rr for each in batches]), np.concatenate([each.dd for each in batches])
        self._sums["rr"].add(rr)
        self._sums["dd"].add(dd)
        self._sums["absolute"].add(np.concatenate([each.absolute for each in batches]))
        if self.kind == "float":
            cc, rd = np.concatenate([each.cc for each in batches]), np.concatenate([each.rd for each in batches])
            largest = np.concatenate([each.largest for each in batches])
            distances = _cosine_distances(rr, cc, rd, dd, largest)
            self._sums["cosine"].add(distances)
            self._worst_cosine = max(self._worst_cosine, float(distances.max()))
            centered = [each.centered for each in batches if each.centered is not None]
            if centered:
                tt, uu, td = (np.concatenate(each) for each in zip(*centered, strict=True))
                self._worst_centered = max(
                    self._worst_centered, float(_cosine_distances(tt, uu, td, dd, largest).max())
                )
        error[bad_reference + bad_candidate > 0] = np.inf
        least = self._worst[-1][1] if len(self._worst) == _WORST else 0.0
        candidates = np.flatnonzero((error >= least) & (error > 0.0))
        order = np.lexsort((index[candidates], -error[candidates]))[:_WORST]
        few = [(int(index[each]), float(error[each])) for each in candidates[order]]
        self._worst = _worst_of([*self._worst, *few])

    def _quantiles(self) -> dict[str, float]:
        if self._histogram is None:
            return {}
        counts = np.cumsum(self._histogram)
        found: dict[str, float] = {}
        for name, q in QUANTILES.items():
            rank = max(1, math.ceil(q * self._elements))
            place = int(np.searchsorted(counts, rank))
            # The middle of the bin; its first one holds 0 and what is below 4e-40.
            bits = 0 if place == 0 else (place << _SHIFT) + (1 << (_SHIFT - 1))
            value = float(np.uint32(bits).view(np.float32))
            found[name] = self._largest.value if math.isnan(value) else min(value, self._largest.value)
        return found

    def _buffer(self, dtype: np.dtype[Any], name: str, shape: tuple[int, ...]) -> _Values:
        """Memory that is used again for each block: fresh pages would cost more than the arithmetic."""
        size = math.prod(shape)
        held = self._buffers.get((name, dtype.str))
        if held is None or held.size < size:
            held = self._buffers[name, dtype.str] = np.empty(max(size, min(_BLOCK, 2 * size)), dtype)
        return held[:size].reshape(shape)

    def _flags(self, shape: tuple[int, ...]) -> _Bools:
        return self._buffer(np.dtype(np.bool_), "flags", shape)

    def _ones(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> _Values:
        held = self._buffers.get(("ones", dtype.str))
        if held is None or held.shape != shape:
            held = self._buffers["ones", dtype.str] = np.broadcast_to(np.ones((1, shape[1]), dtype), shape)
        return held

    def _as(self, dtype: np.dtype[Any], name: str, values: _Values) -> _Values:
        if values.dtype == dtype:
            return values
        buffer = self._buffer(dtype, name, values.shape)
        np.copyto(buffer, values)
        return buffer


@dataclass(frozen=True)
class _Largest:
    """The largest |d| and where it is; of equal ones the first counts."""

    value: float
    sample: int
    element: int

    def order(self) -> tuple[float, int]:
        """Greater for the one to report."""
        return self.value, -self.sample


def _worst_of(found: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The worst few samples, worst first; of equal ones those with the lower index."""
    return sorted(found, key=lambda each: (-each[1], each[0]))[:_WORST]


def _relative_errors(rows: _Rows) -> _Floats:
    """`|d| / |r|` of each sample: 0 where both are 0, inf where only the reference is."""
    ratio = np.sqrt(rows.dd / np.where(rows.rr > 0.0, rows.rr, np.nan))
    unscaled = np.where(rows.largest > 0.0, np.inf, 0.0)
    return np.where(np.isnan(ratio), unscaled, ratio)


def _cosine_distances(rr: _Floats, cc: _Floats, rd: _Floats, dd: _Floats, largest: _Floats) -> _Floats:
    """1 - cosine of rows, from sums of r², c², r·d and d² with d = c - r; 0 if both are zero, 1 if one is.

    With `|c| - |r| = d·(r+c) / (|r|+|c|)`, `1 - cosine = (d² - (|c|-|r|)²) / (2|r||c|)`: small differences are not
    lost beside 1.
    """
    r, c = np.sqrt(rr), np.sqrt(cc)
    with np.errstate(all="ignore"):
        longer = (2.0 * rd + dd) / (r + c)
        distance = (dd - longer * longer) / (2.0 * r * c)
    distance = np.where(np.isfinite(distance), np.clip(distance, 0.0, 2.0), 2.0)
    zero_r, zero_c = r == 0.0, c == 0.0
    distance = np.where(zero_r ^ zero_c, 1.0, distance)
    distance = np.where(zero_r & zero_c, np.where(largest > 0.0, 2.0, 0.0), distance)
    same: _Floats = np.where((largest == 0.0) & np.isfinite(rr), 0.0, distance)
    return same


def _ratio(error: float, scale: float, *, differs: bool) -> float:
    """`error / scale`; 0 where nothing differs, inf where the scale is 0 and something does."""
    if not differs:
        return 0.0
    return error / scale if scale > 0.0 else math.inf


def _decibels(relative: float) -> float:
    if math.isnan(relative):
        return math.nan
    if relative == 0.0:
        return math.inf
    return -math.inf if math.isinf(relative) else -20.0 * math.log10(relative)


def _integer_distance(a: _Values, b: _Values) -> _Floats:
    """|a - b| of integers or booleans, without overflow, as float64."""
    if a.dtype.kind == "b" and b.dtype.kind == "b":
        return np.asarray(a != b, dtype=np.float64)
    if a.dtype != b.dtype:
        return np.asarray(np.abs(a.astype(np.float64) - b.astype(np.float64)))
    return np.asarray(np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64), dtype=np.float64)
