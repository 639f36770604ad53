"""The batches that engines are timed on: enough of them that no cache holds the input."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from gate.data.samples import SampleSource
from gate.errors import DataError
from gate.latency.config import Cell
from gate.spec import GateSpec, InputSpec
from gate.tensors import Array

MOST_BATCHES = 64
MOST_BYTES = 64 * 2**20
"""More than a processor's last cache holds, and still read in a moment."""


class Feeds(Protocol):
    """Where batches come from."""

    def batches(self, cell: Cell) -> list[dict[str, Array]]:
        """Batches of one size and shape, at least one.

        Raises:
            DataError: There are no samples.
        """
        ...


@dataclass(frozen=True)
class SampleFeeds:
    """Batches of the evaluation samples; where they are fewer, they take turns within a batch.

    Args:
        spec: What the inputs are.
        source: The samples.
    """

    spec: GateSpec
    source: SampleSource

    def batches(self, cell: Cell) -> list[dict[str, Array]]:
        """As `Feeds.batches`. Another size of an axis is made by repeating and cutting the samples along it."""
        found: list[dict[str, Array]] = []
        room = MOST_BYTES
        for batch in islice(self.source.batches(cell.batch), MOST_BATCHES):
            rows = np.arange(cell.batch) % batch.size
            feed = {name: _sized(values[rows], self.spec.inputs[name], cell) for name, values in batch.inputs.items()}
            room -= sum(array.nbytes for array in feed.values())
            if found and (room < 0 or batch.size < cell.batch):
                break
            found.append(feed)
        if not found:
            raise DataError("there are no samples to time an engine on", where="[data]")
        return found


@dataclass(frozen=True)
class RandomFeeds:
    """Batches of random numbers, for a bundle without the samples that it was judged by.

    Args:
        spec: What the inputs are.
        seed: Of the generator.
    """

    spec: GateSpec
    seed: int = 0

    def batches(self, cell: Cell) -> list[dict[str, Array]]:
        """As `Feeds.batches`: floats of a standard normal distribution, integers and booleans of 0 and 1."""
        generator = np.random.default_rng(self.seed)
        least = self._batch(generator, cell)
        size = sum(array.nbytes for array in least.values())
        count = min(MOST_BATCHES, max(2, MOST_BYTES // max(size, 1)))
        return [least, *(self._batch(generator, cell) for _ in range(count - 1))]

    def _batch(self, generator: np.random.Generator, cell: Cell) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name, given in self.spec.inputs.items():
            shape = tuple(_size(given, axis, cell, index) for index, axis in enumerate(given.shape))
            dtype = np.dtype(given.dtype)
            if dtype.kind == "f":
                found[name] = generator.standard_normal(shape).astype(dtype)
            else:
                found[name] = generator.integers(0, 2, shape).astype(dtype)
        return found


def _size(given: InputSpec, axis: int | str, cell: Cell, index: int) -> int:
    if isinstance(axis, int):
        return axis
    if index == 0:
        return cell.batch
    return cell.axes.get(axis, given.axes[axis].opt)


def _sized(values: Array, given: InputSpec, cell: Cell) -> Array:
    for index, axis in enumerate(given.shape):
        if index and isinstance(axis, str) and axis in cell.axes:
            values = np.take(values, np.arange(cell.axes[axis]) % values.shape[index], axis=index)
    return np.ascontiguousarray(values)
