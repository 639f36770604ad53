"""The differences of an output computed where the engine left it: the reference goes up once, one small answer comes back.

`DeviceAccumulator` is an `OutputAccumulator` whose `add` also takes a tensor on a device. What it brings back for a batch,
sums of each sample and counts, goes into the state of `gate.compare`, which makes the metrics of it: those are the same
code for both. Counts are those that NumPy gives, and so are the largest |d| and its place. Sums are made in float64, where
NumPy makes them in float32 for float32 outputs; the two differ by float32's rounding there, and by 1e-12 elsewhere.

Sums are folded in halves by additions of whole tensors, never by a device's own reduction: the bits of a sample depend
neither on its batch nor on the device, so that the CPU gives those of a GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.compare import (
    _BINS,
    _LARGEST_SQUARE,
    _LEAST_SQUARE,
    _PENDING,
    _SEGMENT,
    _SHIFT,
    OutputAccumulator,
    _Largest,
    _relative_errors,
    _Rows,
    kind_of,
)
from gate.errors import MeasurementError
from gate.tensors import Array

LEAST_ELEMENTS = 1 << 19
"""Elements of a batch from which comparing on the device pays. On an NVIDIA H200, float32 outputs on the device, one
batch an accumulator, NumPy after a copy to the host against the device: (32, 8192) 1.12 and 1.90 ms, (32, 16384) 3.59 and
2.12 ms, (32, 32768) 5.29 and 2.22 ms, (32, 131072) 19.06 and 6.80 ms.
Source: benchmarks/compare_on_device.py."""

LEAST_ELEMENTS_A_SAMPLE = 64
"""A sample's sums are up to 11 numbers of 8 bytes; of smaller samples nearly as much would come back as they hold."""

_BLOCK = 1 << 20  # elements at a time, of at most 200 bytes each in temporary tensors
_LEGACY_STREAM = 1
"""Handle of the default stream. Source: `cudaStreamLegacy` of the CUDA runtime API."""
_PER_THREAD_STREAM = 2
"""Handle of a thread's default stream. Source: `cudaStreamPerThread` of the CUDA runtime API."""

_Floats = npt.NDArray[np.float64]
_Tensor = Any  # torch.Tensor; torch is not imported here


def is_large(shape: tuple[int, ...], *, batch_axis: bool = True) -> bool:
    """Whether a batch of that shape is better compared where it lies.

    Args:
        shape: Of the batch.
        batch_axis: Whether its first axis is the batch.
    """
    samples = shape[0] if batch_axis and shape else 1
    return math.prod(shape) >= max(LEAST_ELEMENTS, samples * LEAST_ELEMENTS_A_SAMPLE)


def has_cuda() -> bool:
    """Whether PyTorch is installed here and finds a GPU. Imports it, so ask where it would be used."""
    try:
        import torch
    except (ImportError, OSError):
        return False
    return bool(torch.cuda.is_available())


def described(name: str, candidate: object) -> Array:
    """An array of an output's shape and dtype; for one on a device all zeros, read-only, without memory of its own.

    Args:
        name: Of the output.
        candidate: An array, a tensor of PyTorch, or an object with `__cuda_array_interface__`.

    Raises:
        MeasurementError: It is none of these, malformed, or of a dtype that NumPy has not.
    """
    if isinstance(candidate, (np.ndarray, np.generic)):
        return np.asarray(candidate)
    output = _output_of(name, candidate)
    return np.broadcast_to(np.zeros((), output.dtype), output.shape)


def host_array(candidate: object) -> Array:
    """An output as a NumPy array; of a tensor or an object on a device a copy, bfloat16 as float32.

    Raises:
        MeasurementError: It is neither an array nor a tensor, of a dtype that NumPy has not, or cannot be copied.
    """
    if isinstance(candidate, (np.ndarray, np.generic)):
        return np.asarray(candidate)
    output = _output_of("output", candidate)
    if math.prod(output.shape) == 0:
        return np.zeros(output.shape, output.dtype)
    try:
        return _on_host(output.tensor())
    except (RuntimeError, TypeError, ValueError) as err:
        raise MeasurementError(f"an output cannot be copied from its device: {_first_line(err)}") from err


class DeviceAccumulator(OutputAccumulator):
    """The difference of one output, batch by batch, computed on the device where the engine's output lies.

    It takes the arguments of `OutputAccumulator` and merges with one.
    """

    def add(self, reference: Array, candidate: Any, *, first_sample: int) -> None:
        """Take one batch.

        Args:
            reference: [N, ...], as `dtype` said, in host memory; without a batch axis of any shape.
            candidate: Of the same shape: a tensor of PyTorch, an object with `__cuda_array_interface__`, which is read
                without a copy, or a NumPy array, which is compared on the host. bfloat16 is taken as float32.
            first_sample: Index of the batch's first sample in the data set.

        Raises:
            MeasurementError: As `OutputAccumulator.add`, or the device failed, or `candidate` is no tensor.
        """
        if isinstance(candidate, (np.ndarray, np.generic)):
            super().add(reference, np.asarray(candidate), first_sample=first_sample)
            return
        reference = np.asarray(reference)
        output = _output_of(self.name, candidate)
        if self._is_for_the_host(reference, output):
            # Of the output's shape and type, without its memory: the errors, and what an empty batch counts, are the base's.
            super().add(reference, described(self.name, candidate), first_sample=first_sample)
            return
        try:
            tensor = output.tensor()
            if tensor.device.type not in ("cpu", "cuda") or not _is_known(reference.dtype, output.dtype, self.kind):
                super().add(reference, _on_host(tensor), first_sample=first_sample)
                return
            self._add_on_device(reference, tensor, first_sample)
        except (RuntimeError, TypeError, ValueError) as err:
            raise MeasurementError(
                f"output {self.name!r} cannot be compared on its device: {_first_line(err)}",
                hint="Give the outputs as NumPy arrays to compare them on the host.",
            ) from err

    def _is_for_the_host(self, reference: Array, output: _Output) -> bool:
        """Whether there is an error to raise, or no element to compare."""
        return (
            reference.shape != output.shape
            or reference.size == 0
            or {kind_of(reference.dtype), kind_of(output.dtype)} != {self.kind}
            or (self._batch_axis and reference.ndim == 0)
        )

    def _add_on_device(self, reference: Array, tensor: _Tensor, first_sample: int) -> None:
        import torch

        shape = reference.shape if self._batch_axis else (1, *reference.shape)
        n, size = shape[0], math.prod(shape[1:])
        classes = shape[1] if len(shape) == 2 and self._batch_axis and self._topk else 0
        center = self._centre_of(shape[1:])
        with torch.no_grad():
            batch = _Batch(
                _uploaded(reference, tensor.device).reshape(n, size),
                tensor.detach().reshape(n, size),
                center=None if center is None else _uploaded(center, tensor.device),
                atol=self._atol,
                rtol=self._rtol,
                histogram=self._histogram is not None,
                classes=classes,
            )
            partial = batch.exact() if self.kind == "exact" else batch.floating()
        self._absorb(partial, elements=n * size, classes=classes, first_sample=first_sample)

    def _absorb(self, partial: _Partial, *, elements: int, classes: int, first_sample: int) -> None:
        """Take what a batch came to."""
        rows = partial.rows
        n = len(rows.largest)
        self._samples += n
        self._elements += elements
        self._mismatches += partial.mismatches
        self._close += partial.close
        if self._histogram is not None:
            self._histogram += partial.histogram
        found = _Largest(float(rows.largest[partial.row]), first_sample + partial.row, partial.element)
        self._largest = max(self._largest, found, key=_Largest.order)
        if classes >= 2:
            self._topk_samples += n
            self._top5_samples += n if classes > 5 else 0
            self._top1 += partial.top1
            self._top5 += partial.top5
            self._near_ties += partial.near_ties
        if partial.wrong is None:
            with np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore"):
                errors = _relative_errors(rows)
        else:
            errors = partial.wrong / (elements // n)
        self._pending.append((first_sample, rows, errors))
        self._pending_samples += n
        if self._pending_samples >= _PENDING:
            self._settle()


@dataclass(frozen=True)
class _Interface:
    """What a CUDA array interface says."""

    shape: tuple[int, ...]
    typestr: str
    strides: tuple[int, ...] | None
    address: int
    stream: int | None


def _interface_of(candidate: object) -> _Interface | None:
    """The CUDA array interface of an object; None where it has none.

    Source: CUDA Array Interface, version 3: without `stream` (version 2) the producer's work is in the default stream;
    `stream` None is done.

    Raises:
        MeasurementError: It is malformed, or has a mask.
    """
    try:
        raw = getattr(candidate, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError, ValueError) as err:
        raise MeasurementError(f"an output cannot be read on its device: {_first_line(err)}") from err
    if raw is None:
        return None
    try:
        mask, strides, stream = raw.get("mask"), raw.get("strides"), raw.get("stream", _LEGACY_STREAM)
        interface = _Interface(
            shape=tuple(int(size) for size in raw["shape"]),
            typestr=str(raw["typestr"]),
            strides=None if strides is None else tuple(int(stride) for stride in strides),
            address=int(raw["data"][0] or 0),
            stream=None if stream is None else int(stream),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        raise MeasurementError(f"an output has a malformed __cuda_array_interface__: {err!r}") from err
    if mask is not None:
        raise MeasurementError("an output has a mask in its __cuda_array_interface__; give it without")
    return interface


class _Window:
    """Memory of another object, which it keeps, said to be writable: PyTorch refuses to look at what is not."""

    def __init__(self, owner: object, interface: _Interface, typestr: str) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": interface.shape,
            "typestr": typestr,
            "strides": interface.strides,
            "data": (interface.address, False),
            "version": 3,
        }


@dataclass(frozen=True)
class _Output:
    """An engine's output on its device: its shape, its dtype as NumPy has it, and how to get at it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tensor: Callable[[], _Tensor]


def _output_of(name: str, candidate: object) -> _Output:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(candidate, torch.Tensor):
        if candidate.layout is not torch.strided:
            raise MeasurementError(f"output {name!r} is a tensor of layout {candidate.layout}; give a dense one")
        dtype = _numpy_dtype(str(candidate.dtype).removeprefix("torch."), shown=str(candidate.dtype))
        return _Output(tuple(candidate.shape), dtype, lambda: candidate)
    interface = _interface_of(candidate)
    if interface is None:
        raise MeasurementError(
            f"output {name!r} is a {type(candidate).__name__}, which cannot be compared",
            hint="Give a NumPy array, a tensor of PyTorch, or an object with __cuda_array_interface__.",
        )
    # The interface has no name for bfloat16: its producers say two bytes without a type.
    brain = interface.typestr[1:] == "V2" and str(getattr(candidate, "dtype", "")).endswith("bfloat16")
    dtype = np.dtype(np.float32) if brain else _numpy_dtype(interface.typestr, shown=interface.typestr)
    return _Output(interface.shape, dtype, lambda: _viewed(candidate, interface, dtype, brain=brain))


def _numpy_dtype(name: str, *, shown: str) -> np.dtype[Any]:
    try:
        return np.dtype("float32" if name == "bfloat16" else name)
    except TypeError as err:
        raise MeasurementError(
            f"outputs of dtype {shown} cannot be compared; give floats, integers or booleans"
        ) from err


def _viewed(candidate: object, interface: _Interface, dtype: np.dtype[Any], *, brain: bool) -> _Tensor:
    """The memory of an object as a tensor, once its producer is done with it."""
    import torch

    # Types that PyTorch may not take from the interface go by the signed integers of their size.
    signed = brain or (dtype.kind == "u" and dtype.itemsize > 1)
    typestr = f"<i{2 if brain else dtype.itemsize}" if signed else interface.typestr
    tensor = torch.as_tensor(_Window(candidate, interface, typestr), device="cuda")
    if interface.stream is not None:
        if interface.stream in (_LEGACY_STREAM, _PER_THREAD_STREAM):
            torch.cuda.synchronize(tensor.device)
        else:
            torch.cuda.current_stream(tensor.device).wait_stream(torch.cuda.ExternalStream(interface.stream))
    if signed:
        tensor = tensor.view(torch.bfloat16 if brain else getattr(torch, dtype.name))
    return tensor


def _on_host(tensor: _Tensor) -> Array:
    import torch

    tensor = tensor.detach()
    wide = tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor
    array: Array = wide.to("cpu", copy=True).numpy()
    return array


def _uploaded(values: Array, device: Any) -> _Tensor:
    """An array on the device. Memory that may not be written is copied first, since PyTorch warns of it."""
    import torch

    native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")).reshape(values.shape)
    return torch.from_numpy(native if native.flags.writeable else native.copy()).to(device)


def _is_known(reference: np.dtype[Any], candidate: np.dtype[Any], kind: str) -> bool:
    """Whether the device's arithmetic is written for these dtypes; others are compared on the host."""
    if kind == "exact":
        return reference.newbyteorder("=") == candidate.newbyteorder("=")
    return max(reference.itemsize, candidate.itemsize) <= 8


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


@dataclass(frozen=True)
class _Partial:
    """What a batch comes to, on the host.

    Args:
        rows: Of each sample.
        row, element: Where the batch's largest |d| is.
        wrong: Elements of each sample that differ, for integers and booleans; None for floats.
    """

    rows: _Rows
    row: int
    element: int
    mismatches: int
    close: int
    top1: int
    top5: int
    near_ties: int
    histogram: npt.NDArray[np.int64]
    wrong: _Floats | None


@dataclass(frozen=True)
class _Segments:
    """Of each segment of some rows, on the device.

    Args:
        sums: float64 [sums, rows, segments].
        largest: float64 [rows, segments], max |d|, infinite where an element is not finite.
        counts: int64 [2, rows, segments]: elements not finite in reference and candidate; or [1, …]: that differ.
    """

    sums: _Tensor
    largest: _Tensor
    counts: _Tensor


@dataclass
class _Batch:
    """One batch on its device, as rows.

    Args:
        reference, candidate: [N, elements].
        center: float64 [elements], or None.
        classes: Of [N, classes] whose agreement is asked for; 0 of others.
    """

    reference: _Tensor
    candidate: _Tensor
    center: _Tensor | None
    atol: float | None
    rtol: float
    histogram: bool
    classes: int
    _counted: dict[str, _Tensor] = field(default_factory=dict)

    def floating(self) -> _Partial:
        """Of floating outputs."""
        sums, largest, counts = self._rows(self._float_segments)
        self._note_place(largest, counts.sum(dim=0))
        if self.classes >= 2:
            self._note_best(largest, counts.sum(dim=0) == 0)
        return self._brought_back([largest, *sums], counts)

    def exact(self) -> _Partial:
        """Of integers and booleans."""
        sums, largest, counts = self._rows(self._exact_segments)
        self._note_place(largest, None)
        return self._brought_back([largest, *sums], counts)

    def _rows(
        self, segments: Callable[[_Tensor, _Tensor, _Tensor | None], _Segments]
    ) -> tuple[_Tensor, _Tensor, _Tensor]:
        """Sums [sums, N], largest [N] and counts [counts, N] of all rows, made in blocks."""
        import torch

        n, size = self.reference.shape
        step = max(1, _BLOCK // size)
        found: list[tuple[_Tensor, _Tensor, _Tensor]] = []
        for start in range(0, n, step):
            parts = [
                segments(
                    self.reference[start : start + step, part].unflatten(1, (-1, width)),
                    self.candidate[start : start + step, part].unflatten(1, (-1, width)),
                    None if self.center is None else self.center[part].unflatten(0, (-1, width)),
                )
                for part, width in _columns(size)
            ]
            found.append(
                (
                    _folded(torch.cat([each.sums for each in parts], dim=2)),
                    torch.cat([each.largest for each in parts], dim=1).amax(dim=1),
                    torch.cat([each.counts for each in parts], dim=2).sum(dim=2),
                )
            )
        sums, largest, counts = zip(*found, strict=True)
        return torch.cat(sums, dim=1), torch.cat(largest), torch.cat(counts, dim=1)

    def _float_segments(self, reference: _Tensor, candidate: _Tensor, center: _Tensor | None) -> _Segments:
        """Of [rows, segments, width]; elements are counted on the way.

        Whether |d| and the tolerance are those of float32 or of float64 is decided for each segment, as
        `gate.compare` decides. The difference of two float32 is the same by way of float64.

        Source: S. Figueroa, When is double rounding innocuous?, SIGNUM Newsletter 30, 1995.
        """
        import torch

        single = max(reference.itemsize, candidate.itemsize) <= 4
        r, c = reference.to(torch.float64), candidate.to(torch.float64)
        good_r, good_c = torch.isfinite(r), torch.isfinite(c)
        neither = ~(good_r & good_c)
        bad = torch.stack(((~good_r).sum(dim=2), (~good_c).sum(dim=2)))
        r, c = r.masked_fill(neither, 0.0), c.masked_fill(neither, 0.0)
        d = c - r
        pairs = [(d, d), (r, r), (c, c), (r, d)]
        rounded = None  # the centred reference as float32, which the decision rests on
        if center is not None:
            t, u = r - center, c - center
            pairs += [(t, t), (u, u), (t, d)]
            if single:
                rounded = (r - center.to(torch.float32)).to(torch.float32).to(torch.float64)
                pairs.append((rounded, rounded))
        products = torch.empty((1 + len(pairs), *d.shape), dtype=torch.float64, device=d.device)
        for place, (one, other) in enumerate(pairs, start=1):
            torch.mul(one, other, out=products[place])
        error = d.abs_()  # in place of d, whose products are made
        products[0] = error
        sums = _folded(products)
        largest = error.amax(dim=2)
        broken = bad.sum(dim=0) > 0
        safe = None
        if single:
            narrow = largest.to(torch.float32).to(torch.float64)
            dd, rr = sums[1], sums[2]
            least = rr if rounded is None else torch.minimum(rr, sums[-1])
            safe = (dd >= _LEAST_SQUARE) | (largest == 0.0)
            safe &= (dd <= 0.5 * least) & (least >= _LEAST_SQUARE) & (rr <= _LARGEST_SQUARE)
            safe &= (narrow < math.inf) & ~broken
            largest = torch.where(safe, narrow, largest)
            sums = sums if rounded is None else sums[:-1]
        self._note_elements(r, error, neither, safe)
        return _Segments(sums, largest.masked_fill(broken, math.inf), bad)

    def _note_elements(self, r: _Tensor, error: _Tensor, neither: _Tensor, safe: _Tensor | None) -> None:
        """Note what is counted by element: mismatches, elements within tolerance, the histogram of |d|.

        Args:
            r: float64 [rows, segments, width], the reference, 0 where either is not finite.
            error: |d|, likewise.
            neither: Where either is not finite.
            safe: [rows, segments]: which are counted in float32; None: none.
        """
        import torch

        self._note("mismatches", ((error != 0.0) | neither).sum())
        narrow = error.to(torch.float32)
        if self.atol is not None:
            close = error <= r.abs() * self.rtol + self.atol
            if safe is not None:
                with np.errstate(over="ignore", under="ignore"):
                    atol, rtol = float(np.float32(self.atol)), float(np.float32(self.rtol))
                bound = r.to(torch.float32).abs_().mul_(rtol).add_(atol)
                close = torch.where(safe[..., None], narrow <= bound, close)
            self._note("close", (close & ~neither).sum())
        if self.histogram:
            bins = (narrow.view(torch.int32) >> _SHIFT).to(torch.int64).flatten()
            ones = torch.ones((), dtype=torch.int64, device=bins.device).expand(len(bins))
            counts = torch.zeros(_BINS, dtype=torch.int64, device=bins.device)
            # Whole numbers: whatever the order in which a device adds them, the sum is the same.
            self._note("histogram", counts.scatter_add_(0, bins, ones))

    def _exact_segments(self, reference: _Tensor, candidate: _Tensor, center: _Tensor | None) -> _Segments:  # noqa: ARG002 (as _float_segments)
        import torch

        d, r = _integer_distance(reference, candidate), _whole(reference)
        wrong = (d != 0.0).sum(dim=2)
        products = torch.empty((3, *d.shape), dtype=torch.float64, device=d.device)
        products[0] = d
        torch.mul(d, d, out=products[1])
        torch.mul(r, r, out=products[2])
        self._note("mismatches", wrong.sum())
        return _Segments(_folded(products), d.amax(dim=2), wrong[None])

    def _note_place(self, largest: _Tensor, bad: _Tensor | None) -> None:
        """Note where the batch's largest |d| is; in a row with elements that are not finite, the first of those.

        Source: of equal values the first is meant, as `torch.max` documents it.
        """
        import torch

        row = largest.argmax().reshape(1)
        values, elements = [], []
        size = self.reference.shape[1]
        for start in range(0, size, _BLOCK):
            part = slice(start, start + _BLOCK)
            r, c = _row_of(self.reference[:, part], row), _row_of(self.candidate[:, part], row)
            if bad is None:
                error = _integer_distance(r, c)
            else:
                r, c = r.to(torch.float64), c.to(torch.float64)
                neither = ~(torch.isfinite(r) & torch.isfinite(c))
                error = torch.where(bad[row] > 0, neither.to(torch.float64), (c - r).abs_())
            value, element = error.max(dim=0)
            values.append(value)
            elements.append(element + start)
        first = torch.stack(values).argmax()
        self._counted["row"] = row[0]
        self._counted["element"] = torch.stack(elements)[first]

    def _note_best(self, largest: _Tensor, finite: _Tensor) -> None:
        """Note top-1 and top-5 agreement; of equal scores the one with the lower index is better."""
        import torch

        n, classes = self.reference.shape
        index = torch.arange(classes, device=largest.device)
        step = max(1, _BLOCK // classes)
        for start in range(0, n, step):
            part = slice(start, start + step)
            r, c = self.reference[part].to(torch.float64), self.candidate[part].to(torch.float64)
            top, best = r.max(dim=1, keepdim=True)
            same = (best[:, 0] == c.argmax(dim=1)) & finite[part]
            own = c.gather(1, best)
            before = ((c > own) | ((c == own) & (index < best))).sum(dim=1)
            margin = top[:, 0] - r.masked_fill(index == best, -math.inf).amax(dim=1)
            near = finite[part] & ~same & (margin < 2.0 * largest[part])
            self._note("top1", same.sum())
            self._note("top5", (finite[part] & (before < 5)).sum())
            self._note("near_ties", near.sum())

    def _note(self, name: str, count: _Tensor) -> None:
        held = self._counted.get(name)
        self._counted[name] = count if held is None else held + count

    def _brought_back(self, floats: list[_Tensor], counts: _Tensor) -> _Partial:
        """Everything in one transfer, float64 by its bits among the int64."""
        import torch

        n = self.reference.shape[0]
        counted = dict(self._counted)
        histogram = counted.pop("histogram", None)
        words = [torch.stack(floats).view(torch.int64).flatten(), counts.flatten(), torch.stack(list(counted.values()))]
        if histogram is not None:
            words.append(histogram)
        host = torch.cat(words).cpu().numpy()
        # Copied, since rows wait to be summed and would keep the histogram beside them.
        cuts = np.cumsum([len(each) for each in words])[:-1]
        real, whole, single, *rest = (each.copy() for each in np.split(host, cuts))
        largest, absolute, dd, rr, *more = real.view(np.float64).reshape(-1, n)
        number = dict(zip(counted, (int(each) for each in single), strict=True))
        exact = len(counts) == 1
        if exact:
            rows = _Rows.zeros(n, centered=False)
            rows.largest, rows.absolute, rows.dd, rows.rr = largest, absolute, dd, rr
        else:
            cc, rd, *centered = more
            tt, uu, td = centered or (None, None, None)
            three = None if tt is None or uu is None or td is None else (tt, uu, td)
            rows = _Rows(largest, absolute, dd, rr, cc, rd, three, *whole.reshape(2, n))
        return _Partial(
            rows=rows,
            row=number["row"],
            element=number["element"],
            mismatches=number["mismatches"],
            close=number.get("close", 0),
            top1=number.get("top1", 0),
            top5=number.get("top5", 0),
            near_ties=number.get("near_ties", 0),
            histogram=rest[0] if rest else np.zeros(_BINS, np.int64),
            wrong=whole.astype(np.float64) if exact else None,
        )


def _columns(size: int) -> Iterator[tuple[slice, int]]:
    """The segments of a row, in blocks of whole ones, and what is left: columns, and the width of a segment."""
    if size <= _SEGMENT:
        yield slice(0, size), size
        return
    whole = size - size % _SEGMENT
    for start in range(0, whole, _BLOCK):
        yield slice(start, min(start + _BLOCK, whole)), _SEGMENT
    if whole < size:
        yield slice(whole, size), size - whole


def _folded(values: _Tensor) -> _Tensor:
    """The sum over the last axis, upper half on lower half until one is left; `values` is used up.

    Each addition is one of the standard's, in an order that the width alone gives: the same bits on every device.
    """
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half].add_(values[..., half:width])
        width = half
    return values[..., 0].clone()  # what it was made in is freed


def _signed_bits(values: _Tensor) -> _Tensor:
    """The same memory; unsigned integers of two bytes and more as signed ones.

    Source: torch.Tensor, "Data types": uint16, uint32 and uint64 have limited support in eager mode.
    """
    import torch

    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(values.dtype)
    return values if signed is None else values.view(signed)


def _row_of(values: _Tensor, row: _Tensor) -> _Tensor:
    """One row, int64 [1] on the device, of [N, elements]."""
    return _signed_bits(values).index_select(0, row)[0].view(values.dtype)


def _ordered(values: _Tensor) -> _Tensor:
    """Integers or booleans as int64 in the same order and as far apart; uint64 with its highest bit turned round."""
    import torch

    bits = _signed_bits(values)
    if values.dtype == torch.uint64:
        return bits ^ -(2**63)
    wide = bits.to(torch.int64)
    return wide if bits is values else wide & (2 ** (8 * values.itemsize) - 1)


def _whole(values: _Tensor) -> _Tensor:
    """Integers or booleans as float64, rounded once."""
    import torch

    return _unsigned_float(_signed_bits(values)) if values.dtype == torch.uint64 else _ordered(values).double()


def _integer_distance(a: _Tensor, b: _Tensor) -> _Tensor:
    """|a - b| of integers or booleans of one dtype, without overflow, as float64."""
    import torch

    a, b = _ordered(a), _ordered(b)
    return _unsigned_float(torch.maximum(a, b) - torch.minimum(a, b))


def _unsigned_float(bits: _Tensor) -> _Tensor:
    """The float64 nearest to the number that 64 bits are without a sign."""
    low = 2**32 - 1
    return ((bits >> 32) & low).double() * 2.0**32 + (bits & low).double()
