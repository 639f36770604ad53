"""What calibration samples say of a graph: activations in one pass and fixed memory, and what is wrong with them.

Everything here is pure: `ActivationStats` and `InputStats` take arrays, merge, and are judged afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from gate.engines.interface import CalibrationRecord, TensorRange
from gate.tensors import Array, NamedArrays

LEAST_SAMPLES = 32
"""Fewer calibration samples are named as too few.

Of n + 1 exchangeable samples the last one has the largest value of a tensor with probability 1 / (n + 1). So after 32
samples each further one exceeds a tensor's range with probability 3 %, and a range is more than its sample.
"""

OUTLIER_RATIO = 8.0
"""A range this much wider than 99.9 % of the values other than zero is one of outliers.

Each doubling of an evenly stepped range costs one bit of all that lies inside: at 8, int8 has 4 of its 7 bits left.
"""

FLOAT_OUTLIER_RATIO = 448.0
"""The same for fp8 e4m3, whose steps shrink with the value: only what falls below 1 loses, where the largest is 448."""

CLIPPED_FRACTION = 1e-3
"""A tensor of which more is clipped is named."""

SCALE_FACTOR = 1.5
"""Calibration and evaluation data whose rms or range differ by more were not preprocessed alike.

The nearest confusions of preprocessing are a factor of 2: [0, 1] against [-1, 1] in range, [0, 1] against mean and
standard deviation taken out in rms; 1 / 255 and a forgotten standard deviation are farther. Two draws of 32 and more
samples of one set stay within a few per cent in rms, and normally distributed values within 1.5 in range (3.5 standard
deviations for the largest of 2,000 values, 5.2 for the largest of ten million).
"""

_SHIFT = 18
_BINS = 1 << (31 - _SHIFT)
"""Bins of an absolute float32 by its upper bits: sign apart, 8 of the exponent and 5 of the fraction.

A bin's edges differ by at most 1 / 32, hence 3.1 %.
"""

_BLOCK = 1 << 17
"""Values handled at once, so that the scratch arrays stay in the processor's cache."""

_NAMED = 4

_WIDER = "larger in range than the evaluation data"


class ActivationStats:
    """What calibration saw of one tensor: extremes, a histogram of absolute values, and how many values its range clips.

    Merging the statistics of parts gives those of the whole, whatever the parts are.

    Args:
        low, high: Values outside are counted as clipped. Left out: nothing is.
    """

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        self.clip = (low, high)
        self.count = 0
        self.not_finite = 0
        self.clipped = 0
        self.low = math.inf
        self.high = -math.inf
        self.bins: npt.NDArray[np.int64] = np.zeros(_BINS, np.int64)

    def add(self, values: Array) -> None:
        """Take more values of any shape; another floating type than float32 is converted."""
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        size = min(_BLOCK, flat.size)
        absolute, keys = np.empty(size, np.float32), np.empty(size, np.int64)
        for start in range(0, flat.size, _BLOCK):
            self._add(flat[start : start + _BLOCK], absolute, keys)

    def _add(self, block: npt.NDArray[np.float32], absolute: npt.NDArray[np.float32], keys: Array) -> None:
        low, high = float(block.min()), float(block.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = block[np.isfinite(block)]
            self.not_finite += block.size - finite.size
            block = finite
            if block.size == 0:
                return
            low, high = float(block.min()), float(block.max())
        self.count += block.size
        self.low, self.high = min(self.low, low), max(self.high, high)
        if low < self.clip[0]:
            self.clipped += int(np.count_nonzero(block < self.clip[0]))
        if high > self.clip[1]:
            self.clipped += int(np.count_nonzero(block > self.clip[1]))
        size = block.size
        np.abs(block, out=absolute[:size])
        np.right_shift(absolute[:size].view(np.uint32), _SHIFT, out=keys[:size], casting="unsafe")
        self.bins += np.bincount(keys[:size], minlength=_BINS)

    def merge(self, other: ActivationStats) -> None:
        """Take what another one saw.

        Raises:
            ValueError: It counts clipped values by another range.
        """
        if other.clip != self.clip:
            raise ValueError(f"statistics clipped at {other.clip} do not merge with those clipped at {self.clip}")
        self.count += other.count
        self.not_finite += other.not_finite
        self.clipped += other.clipped
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.bins += other.bins

    @property
    def max_abs(self) -> float:
        """The largest absolute value; 0 where there is none."""
        return max(-self.low, self.high) if self.count else 0.0

    def quantile_abs(self, p: float, *, zeros: bool = True) -> float:
        """A bound that at least the share `p` of the absolute values keeps, at most 3.1 % above the least such value.

        Args:
            p: Above 0, at most 1.
            zeros: Count the values that are zero (and those below float32's normal range beside it).
        """
        bins = self.bins
        if not zeros:
            bins = bins.copy()
            bins[0] = 0
        total = int(bins.sum())
        if total == 0:
            return 0.0
        index = int(np.searchsorted(np.cumsum(bins), math.ceil(p * total)))
        if index == 0:
            return 0.0
        edge = float(np.array([(index + 1) << _SHIFT], np.uint32).view(np.float32)[0])
        return min(edge, self.max_abs)


def range_of(name: str, *, low: float, high: float, stats: ActivationStats, even_steps: bool = True) -> TensorRange:
    """A tensor's range, judged by what calibration saw of it.

    Args:
        name: Of the tensor.
        low, high: What the outermost steps of the quantised type stand for.
        stats: Of its values, finite and at least one.
        even_steps: The steps are equally wide, as in int8; fp8's are not.
    """
    covered = min(stats.max_abs, max(abs(low), abs(high)))
    bulk = stats.quantile_abs(0.999, zeros=False)
    ratio = OUTLIER_RATIO if even_steps else FLOAT_OUTLIER_RATIO
    return TensorRange(
        name=name,
        low=low,
        high=high,
        clipped_fraction=stats.clipped / stats.count,
        max_abs=stats.max_abs,
        p999_abs=stats.quantile_abs(0.999),
        state="dead"
        if stats.max_abs == 0
        else "constant"
        if stats.low == stats.high
        else "outliers"
        if covered > ratio * bulk
        else "ok",
    )


def calibration_notes(ranges: Iterable[TensorRange], *, samples: int) -> tuple[str, ...]:
    """What a reader should know of a calibration: too few samples, dead, constant, clipped tensors and outliers."""
    notes: list[str] = []
    if samples < LEAST_SAMPLES:
        notes.append(
            f"calibrated on {samples} {'sample' if samples == 1 else 'samples'}: each further one exceeds a tensor's range "
            f"with probability 1 in {samples + 1}; give at least {LEAST_SAMPLES}, better some hundreds"
        )
    found = tuple(ranges)
    for state, what in (("dead", "zeros only"), ("constant", "one value only")):
        names = [each.name for each in found if each.state == state]
        if names:
            notes.append(f"calibration gave {what} in {_tensors(names)}: its range is a guess")
    outliers = sorted((each for each in found if each.state == "outliers"), key=_spread, reverse=True)
    if outliers:
        worst = outliers[0]
        notes.append(
            f"a few values take most of the range of {_tensors([each.name for each in outliers])}; in {worst.name} the "
            f"largest is {worst.max_abs:.3g}, and 99.9 % are within {worst.p999_abs:.3g}"
        )
    clipped = sorted(
        (each for each in found if (each.clipped_fraction or 0.0) > CLIPPED_FRACTION),
        key=lambda each: each.clipped_fraction or 0.0,
        reverse=True,
    )
    if clipped:
        notes.append(
            f"more than {100 * CLIPPED_FRACTION:g} % of the calibration values lie outside the range of "
            f"{_tensors([each.name for each in clipped])}; most in {clipped[0].name}: "
            f"{100 * (clipped[0].clipped_fraction or 0.0):.2g} %"
        )
    return tuple(notes)


def calibration_warnings(record: CalibrationRecord | None, scales: Iterable[str] = ()) -> tuple[str, ...]:
    """What a reader must know of an engine's calibration, whether it passed or not.

    Args:
        record: Of the calibration; None where the graph comes from a recording, which does not hold it.
        scales: The notes of `scale_notes`. That of an input whose range is wider alone is left out where outliers take
            that range: it would tell the same again, and wrongly blame the preprocessing.
    """
    if record is None:
        return tuple(scales)
    explained = tuple(_of_input(each.name) for each in record.ranges if each.state == "outliers")
    kept = (note for note in scales if not (note.startswith(explained) and _WIDER in note))
    return tuple(dict.fromkeys((*record.notes, *kept)))


def _of_input(name: str) -> str:
    return f"calibration input {name!r} "


def _spread(each: TensorRange) -> float:
    return (each.max_abs or 0.0) / each.p999_abs if each.p999_abs else math.inf


def _tensors(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'}: {', '.join(names[:_NAMED])}{more}"


class InputStats:
    """Count, mean, standard deviation, rms and extremes of one input's values, in one pass.

    Merging the statistics of parts gives those of the whole, up to rounding in float64.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.not_finite = 0
        self.mean = 0.0
        self.low = math.inf
        self.high = -math.inf
        self._squares = 0.0

    def add(self, values: Array) -> None:
        """Take more values of any shape; those that are not finite are counted apart."""
        flat = np.asarray(values).reshape(-1)
        if flat.dtype.kind == "f":
            finite = np.isfinite(flat)
            if not finite.all():
                self.not_finite += int(flat.size - np.count_nonzero(finite))
                flat = flat[finite]
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            mean = float(block.mean())
            part = InputStats()
            part.count, part.mean = block.size, mean
            part.low, part.high = float(block.min()), float(block.max())
            part._squares = float(np.square(block - mean).sum())
            self.merge(part)

    def merge(self, other: InputStats) -> None:
        """Take what another one saw."""
        self.not_finite += other.not_finite
        if other.count == 0:
            return
        count, shift = self.count + other.count, other.mean - self.mean
        self._squares += other._squares + shift * shift * self.count * other.count / count
        self.mean += shift * other.count / count
        self.count = count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def std(self) -> float:
        """Standard deviation of the values about their mean, divided by their count."""
        return math.sqrt(self._squares / self.count) if self.count else 0.0

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.hypot(self.mean, self.std)

    @property
    def spread(self) -> float:
        """Largest less smallest value."""
        return self.high - self.low if self.count else 0.0


def add_inputs(stats: dict[str, InputStats], batch: NamedArrays) -> None:
    """Take a batch into the statistics of its inputs; a new name begins its own."""
    for name, values in batch.items():
        stats.setdefault(name, InputStats()).add(values)


def scale_notes(calibration: Mapping[str, InputStats], evaluation: Mapping[str, InputStats]) -> tuple[str, ...]:
    """The inputs in which calibration data are of another scale than the data that the engine is judged on.

    Args:
        calibration: Statistics of the calibration samples by input.
        evaluation: Of the evaluation samples; all of them, or at least some dozens.

    Returns:
        One sentence for each input whose rms or range differs by more than `SCALE_FACTOR`, or that cannot be compared.
    """
    notes = []
    for name in sorted({*calibration, *evaluation}):
        ours, theirs = calibration.get(name), evaluation.get(name)
        if ours is None or theirs is None or not ours.count or not theirs.count:
            where = "calibration" if ours is None or not ours.count else "evaluation"
            notes.append(f"input {name!r} has no finite values in the {where} data: its scale was not compared")
            continue
        said = _scale(ours.rms, theirs.rms, "rms") or _scale(ours.spread, theirs.spread, "range")
        if said:
            notes.append(f"{_of_input(name)}{said}: preprocess both alike")
    return tuple(notes)


def _scale(ours: float, theirs: float, what: str) -> str | None:
    """How two scales differ, or None where they do not by enough."""
    if ours == theirs:
        return None
    numbers = f"({what} {ours:.3g} against {theirs:.3g})"
    small, large = sorted((ours, theirs))
    if small == 0:
        return f"has the {what} {ours:.3g}, the evaluation data {theirs:.3g}"
    if not large / small > SCALE_FACTOR:
        return None
    if what == "range":
        kind = _WIDER if ours > theirs else "smaller in range than the evaluation data"
    else:
        kind = f"{'smaller' if ours < theirs else 'larger'} than the evaluation data"
    return f"is {large / small:.3g} x {kind} {numbers}"
