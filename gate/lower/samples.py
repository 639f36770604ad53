"""Calibration samples: checked, counted and digested on their way to disk, and read back as often as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gate.errors import LoweringError
from gate.tensors import Array, NamedArrays, TensorMeta


class Samples:
    """Batches kept in a folder, so that quantiser and report read the same samples and memory holds one batch.

    Args:
        batches: By input name; batches without samples are left out.
        inputs: What the graph takes.
        folder: An empty folder to keep them in.

    Raises:
        LoweringError: There are none, or they have other inputs, shapes or dtypes than the graph takes, values that are
            not finite, or one value only.
    """

    def __init__(self, batches: Iterable[NamedArrays], inputs: Mapping[str, TensorMeta], folder: Path) -> None:
        self._inputs = dict(sorted(inputs.items()))
        self._folder = folder
        self._digests = {name: hashlib.sha256() for name in self._inputs}
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._batches = 0
        self.samples = 0
        for batch in batches:
            self._take(batch)
        self._require_enough()

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> dict[str, Array]:
        if not 0 <= index < self._batches:
            raise IndexError(index)
        return {
            name: np.load(self._folder / f"{index}-{each}.npy", allow_pickle=False)
            for each, name in enumerate(self._inputs)
        }

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (self[index] for index in range(self._batches))

    def sha256(self) -> str:
        """Of all samples: names, dtypes, shapes and bytes, however they were batched."""
        whole = hashlib.sha256()
        for name, digest in self._digests.items():
            whole.update(f"{name}\0{digest.hexdigest()}\0".encode())
        return whole.hexdigest()

    def _take(self, batch: NamedArrays) -> None:
        if set(batch) != set(self._inputs):
            raise LoweringError(
                f"calibration samples have the inputs {', '.join(sorted(batch)) or 'none'}, "
                f"the graph takes {', '.join(self._inputs)}"
            )
        arrays = {name: np.ascontiguousarray(batch[name]) for name in self._inputs}
        counts = {array.shape[0] if array.ndim else 1 for array in arrays.values()}
        if len(counts) != 1:
            raise LoweringError(f"calibration inputs differ in their number of samples: {sorted(counts)}")
        count = counts.pop()
        if count == 0:
            return
        for each, (name, array) in enumerate(arrays.items()):
            self._look_at(name, array)
            np.save(self._folder / f"{self._batches}-{each}.npy", array, allow_pickle=False)
        self.samples += count
        self._batches += 1

    def _look_at(self, name: str, array: Array) -> None:
        takes = self._inputs[name]
        if array.dtype.name != takes.dtype:
            raise LoweringError(f"calibration input {name!r} is {array.dtype}, the graph takes {takes.dtype}")
        fits = len(takes.shape) == array.ndim and all(
            not isinstance(want, int) or want == got for want, got in zip(takes.shape, array.shape, strict=True)
        )
        if not fits:
            want = ", ".join(str(each) if each is not None else "?" for each in takes.shape)
            raise LoweringError(
                f"calibration input {name!r} has the shape {list(array.shape)}, the graph takes [{want}]",
                hint="Give samples of the shape that the engine is judged on.",
            )
        if self._batches == 0:
            self._digests[name].update(f"{name}\0{array.dtype}\0{list(array.shape[1:])}\0".encode())
        self._digests[name].update(array.tobytes())
        if array.size == 0 or array.dtype.kind not in "fiu":
            return
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise LoweringError(
                f"calibration input {name!r} has {int(np.sum(~np.isfinite(array)))} values that are not finite, "
                f"in the batch that begins with sample {self.samples}"
            )
        low, high = float(np.min(array)), float(np.max(array))
        self._low[name] = min(low, self._low.get(name, low))
        self._high[name] = max(high, self._high.get(name, high))

    def _require_enough(self) -> None:
        if self.samples == 0:
            raise LoweringError(
                "the calibration has no samples",
                hint="The function named in [data] calibration gives none.",
            )
        if self._low and all(self._low[name] == self._high[name] for name in self._low):
            name, value = next(iter(self._low.items()))
            raise LoweringError(
                f"every calibration value of input {name!r} is {value:g}: no range can be learnt from it",
                hint="Give real samples, preprocessed as in evaluation.",
            )


def reader_of(samples: Samples) -> Any:
    """The samples as the `CalibrationDataReader` that ONNX Runtime's and Model Optimizer's quantisers read."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batches from a range of them, the whole at first."""

        def __init__(self) -> None:
            self._next, self._end = 0, len(samples)

        def __len__(self) -> int:
            return len(samples)

        def set_range(self, start_index: int, end_index: int) -> None:
            """Go on with these batches."""
            self._next, self._end = start_index, end_index

        def get_next(self) -> dict[str, Array] | None:
            """The next batch, or None at the end."""
            if self._next >= self._end:
                return None
            self._next += 1
            return samples[self._next - 1]

        def get_first(self) -> dict[str, Array]:
            """The first batch, without moving on."""
            return samples[0]

        def rewind(self) -> None:
            """Begin again."""
            self._next = 0

    return Reader()
