"""INT8 calibration in weak typing: samples to TensorRT's calibrators, and a cache of what they found.

The cache is one line of JSON, which says what the ranges belong to, and TensorRT's own bytes after it:
`tail -n +2 FILE` is what trtexec reads with --calib.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gate.atomic import read_regular, write_bytes
from gate.engines.interface import Progress, TensorRange
from gate.engines.tensorrt.api import CALIBRATORS
from gate.engines.tensorrt.log import Interruption
from gate.engines.tensorrt.memory import Memory
from gate.errors import BuildError, BundleError
from gate.manifest import sha256_hex
from gate.tensors import Array, NamedArrays

_FORMAT = "trt-gate calibration cache"
_LIMIT_BYTES = 64 * 1024 * 1024
_STEPS = 127
"""Steps of symmetric INT8 on each side of zero."""
_NEXT = "Delete the file, so that it is made anew, or name another in options.calibration_cache."


@dataclass(frozen=True)
class BatchShape:
    """What an input looks like in a calibration batch: NumPy's name of its dtype, and its shape, the batch first."""

    dtype: str
    shape: tuple[int, ...]


class CacheKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration cache belongs to.

    Args:
        model_sha256: Of the FP32 graph, its external data included.
        calibration_sha256: Of the calibration samples.
        tensorrt_version: Such as `8.6.0`.
        method: `entropy` or `minmax`.
    """

    model_sha256: str
    calibration_sha256: str
    tensorrt_version: str
    method: str


class _Header(CacheKey, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str
    samples: int
    payload_sha256: str


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges that a calibrator found.

    Args:
        payload: TensorRT's own bytes.
        samples: How many samples they were found on.
    """

    payload: bytes
    samples: int


def read_cache(path: Path, key: CacheKey) -> Cache | None:
    """A calibration cache; None where there is no such file.

    Raises:
        BuildError: It belongs to another model, other samples, another version or method, or is none at all.
    """
    where = str(path)
    if not os.path.lexists(path):
        return None
    try:
        data = read_regular(path, limit_bytes=_LIMIT_BYTES)
    except BundleError as err:
        raise BuildError(f"the calibration cache {err.message}", where=where, hint=_NEXT) from err
    line, _, payload = data.partition(b"\n")
    if line.startswith(b"TRT-"):
        raise BuildError(
            "is TensorRT's own calibration cache, which does not say what model and samples it belongs to",
            where=where,
            hint=_NEXT,
        )
    try:
        header = msgspec.json.decode(line, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BuildError(f"is no calibration cache of the gate: {err}", where=where, hint=_NEXT) from err
    if header.format != _FORMAT:
        raise BuildError(f"is no calibration cache of the gate: its format is {header.format!r}", where=where)
    for field, what in (
        ("model_sha256", "model"),
        ("calibration_sha256", "set of calibration samples"),
        ("tensorrt_version", "version of TensorRT"),
        ("method", "calibrator"),
    ):
        has, wanted = getattr(header, field), getattr(key, field)
        if has != wanted:
            raise BuildError(
                f"the calibration cache belongs to another {what}: it has {_short(has)}, here is {_short(wanted)}",
                where=where,
                hint=_NEXT,
            )
    if header.payload_sha256 != sha256_hex(payload) or not payload:
        raise BuildError(
            "the calibration cache is damaged: its ranges are not those that were written "
            f"(sha256 {_short(sha256_hex(payload))}, expected {_short(header.payload_sha256)})",
            where=where,
            hint=_NEXT,
        )
    if header.samples < 1:
        raise BuildError(f"the calibration cache was made of {header.samples} samples", where=where, hint=_NEXT)
    return Cache(payload=payload, samples=header.samples)


def write_cache(path: Path, key: CacheKey, cache: Cache) -> None:
    """Write a calibration cache, whole or not at all.

    Raises:
        GateError: The disk is full or may not be written to.
    """
    header = _Header(
        format=_FORMAT,
        samples=cache.samples,
        payload_sha256=sha256_hex(cache.payload),
        **msgspec.structs.asdict(key),
    )
    write_bytes(path, msgspec.json.encode(header) + b"\n" + cache.payload)


def ranges_of(payload: bytes) -> tuple[TensorRange, ...]:
    """The ranges in TensorRT's cache, in its order: `name: scale` per line, the scale as a big-endian float in hex.

    Source: caches that TensorRT 8.6.0 wrote: first line `TRT-8600-EntropyCalibration2`, then `x: 3c010a14`.

    Raises:
        BuildError: A line is not of that kind, a scale is not finite or negative, or there is none.
    """
    lines = payload.decode("utf-8", "replace").splitlines()
    if not lines or not lines[0].startswith("TRT-"):
        raise BuildError("the calibrator's ranges do not begin as TensorRT writes them")
    found: list[TensorRange] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        name, separator, digits = line.rpartition(": ")
        try:
            (scale,) = struct.unpack(">f", bytes.fromhex(digits))
        except (ValueError, struct.error) as err:
            raise BuildError(f"line {number} of the calibrator's ranges is not `name: scale`: {line[:80]!r}") from err
        if not separator or not name or not math.isfinite(scale) or scale < 0:
            raise BuildError(f"line {number} of the calibrator's ranges has the scale {scale}: {line[:80]!r}")
        found.append(
            TensorRange(name=name, low=-scale * _STEPS, high=scale * _STEPS, state="ok" if scale > 0 else "dead")
        )
    if not found:
        raise BuildError("the calibrator found no range at all")
    return tuple(found)


def rebatched(
    batches: Iterable[NamedArrays], inputs: Mapping[str, BatchShape], *, dropped: Callable[[int], None]
) -> Iterator[dict[str, Array]]:
    """The samples in batches of exactly the inputs' shapes, C-contiguous, each checked.

    Args:
        batches: Samples by input name, in batches of any size.
        inputs: What a calibration batch looks like; the first axis of each shape is the batch.
        dropped: Told at the end how many samples did not fill a batch.

    Raises:
        BuildError: An input is missing or unexpected, or an array has another dtype or shape or is not finite.
    """
    size = next(iter(inputs.values())).shape[0]
    held: dict[str, list[Array]] = {name: [] for name in inputs}
    rows = 0
    for batch in batches:
        arrays = _checked(batch, inputs)
        count = len(next(iter(arrays.values())))
        for name, array in arrays.items():
            held[name].append(array)
        rows += count
        if rows < size:
            continue
        joined = {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in held.items()}
        for start in range(0, rows - size + 1, size):
            yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in joined.items()}
        rest = rows % size
        held = {name: [array[rows - rest :].copy()] if rest else [] for name, array in joined.items()}
        rows = rest
    dropped(rows)


def _checked(batch: NamedArrays, inputs: Mapping[str, BatchShape]) -> dict[str, Array]:
    if set(batch) != set(inputs):
        raise BuildError(f"calibration samples have inputs {', '.join(batch)}; the network has {', '.join(inputs)}")
    arrays: dict[str, Array] = {}
    for name, meta in inputs.items():
        array = np.asarray(batch[name])
        if array.dtype.name != meta.dtype or not array.dtype.isnative:
            raise BuildError(f"calibration samples of input {name!r} are {array.dtype}, the network takes {meta.dtype}")
        if array.ndim != len(meta.shape) or array.shape[1:] != meta.shape[1:]:
            raise BuildError(
                f"calibration samples of input {name!r} have the shape {list(array.shape[1:])}, "
                f"the profile's opt is {list(meta.shape[1:])}",
                hint="The calibrator takes the opt shape alone: give such samples, or change opt in [inputs].",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BuildError(f"calibration samples of input {name!r} are not finite: they hold NaN or infinity")
        arrays[name] = array
    if len({len(array) for array in arrays.values()}) > 1:
        counts = ", ".join(f"{name}: {len(array)}" for name, array in arrays.items())
        raise BuildError(f"calibration samples differ in number between inputs ({counts})")
    return arrays


class Feed:
    """Calibration samples for a calibrator, through buffers on the device, and what the calibrator found.

    Every sample is checked when this is made, before the build has taken any time; they are read twice.

    Args:
        calibration: Gives the samples in batches, each time from the start.
        inputs: What a calibration batch looks like.
        cache: Ranges that were found before; then no sample is read.
        memory: Gives device memory, when the first batch is asked for.
        progress: Told of the share that is done.
        interruption: Filled with what goes wrong while the compiler calls.

    Raises:
        BuildError: A sample does not fit, or there are too few to fill one batch.
    """

    def __init__(
        self,
        calibration: Callable[[], Iterable[NamedArrays]],
        *,
        inputs: Mapping[str, BatchShape],
        cache: Cache | None,
        memory: Callable[[], Memory],
        progress: Progress | None,
        interruption: Interruption,
    ) -> None:
        self._calibration = calibration
        self._inputs = inputs
        self._make_memory = memory
        self._progress = progress
        self._interruption = interruption
        self._memory: Memory | None = None
        self._stream = 0
        self._addresses: dict[str, int] = {}
        self._batches: Iterator[dict[str, Array]] | None = None
        self.size = next(iter(inputs.values())).shape[0]
        self.cache = cache
        self.was_read = False
        self.dropped = 0
        self.served = 0
        self.total = 0
        self.found: bytes | None = None
        if cache is None:
            self.total = sum(1 for _ in self._fresh())
            if not self.total:
                raise BuildError(
                    f"{self.dropped} calibration samples do not fill one batch of {self.size}, the profile's opt",
                    hint="Raise calibration_samples in [data], or lower opt in [inputs].",
                )

    def next(self, names: list[str]) -> list[int] | None:
        """Addresses of the next batch in the order of the names; None at the end. Never raises."""
        try:
            if self._interruption.cause is not None:
                return None
            return self._next(names)
        except BaseException as err:  # noqa: BLE001 - kept, and raised when the compiler has returned
            self._interruption.stop(err)
            return None

    def read(self) -> bytes | None:
        """The ranges that were found before."""
        self.was_read = self.cache is not None
        return self.cache.payload if self.cache is not None else None

    def result(self) -> Cache:
        """The ranges that the engine was built with.

        Raises:
            BuildError: The calibrator was not used, or gave nothing.
        """
        if self.served:
            if not self.found:
                raise BuildError("the calibrator gave no ranges")
            return Cache(payload=self.found, samples=self.served * self.size)
        if self.cache is not None and self.was_read:
            return self.cache
        raise BuildError(
            "TensorRT asked the calibrator for nothing",
            hint="A graph that carries Q/DQ already needs no calibrator: leave typing out.",
        )

    def close(self) -> None:
        """Free the buffers."""
        memory, self._memory = self._memory, None
        self._batches = None
        if memory is not None:
            for address in self._addresses.values():
                memory.free(address)
            self._addresses = {}
            memory.close(self._stream)

    def _fresh(self) -> Iterator[dict[str, Array]]:
        return rebatched(self._calibration(), self._inputs, dropped=self._note_dropped)

    def _note_dropped(self, count: int) -> None:
        self.dropped = count

    def _next(self, names: list[str]) -> list[int] | None:
        if set(names) != set(self._inputs):
            raise BuildError(f"the calibrator asks for {', '.join(names)}; the network has {', '.join(self._inputs)}")
        if self._batches is None:
            self._batches = self._fresh()
        batch = next(self._batches, None)
        if batch is None:
            return None
        if self._memory is None:
            self._memory = self._make_memory()
            self._stream = self._memory.stream()
        for name, array in batch.items():
            if name not in self._addresses:
                self._addresses[name] = self._memory.allocate(max(array.nbytes, 1))
            self._memory.to_device(self._addresses[name], array, self._stream)
        self._memory.synchronize(self._stream)
        self.served += 1
        if self._progress is not None:
            self._progress("calibrate", self.served / self.total if self.total else None)
        return [self._addresses[name] for name in names]


def calibrator(trt: Any, method: str, feed: Feed) -> Any:
    """A calibrator of that module. Keep it until the build is done: the builder's configuration does not.

    Args:
        trt: The module, of TensorRT 8 to 10.
        method: `entropy` or `minmax`.
        feed: Its samples.
    """
    base: Any = getattr(trt, CALIBRATORS[method])

    class Calibrator(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def get_batch_size(self) -> int:
            return feed.size

        def get_batch(self, names: list[str]) -> list[int] | None:
            return feed.next(names)

        def read_calibration_cache(self) -> bytes | None:
            return feed.read()

        def write_calibration_cache(self, cache: Any) -> None:
            feed.found = bytes(cache)

    return Calibrator()


def _short(value: str) -> str:
    return f"{value[:12]}…" if len(value) == 64 else value
