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

MOST_LOOKED_AT = 256
"""Batches of samples: where these differ in shape, many are of another than the one that is timed."""


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
        """As `Feeds.batches`. Another size of an axis is made by repeating and cutting the samples along it.

        Where samples differ in shape all batches have that of the first full one; where none is full, that of the first.
        """
        full, partial = _Alike(), _Alike()
        for batch in islice(self.source.batches(cell.batch), MOST_LOOKED_AT):
            is_full = batch.size == cell.batch
            if not is_full and full.batches:
                continue
            rows = np.arange(cell.batch) % batch.size
            feed = {name: _sized(values[rows], self.spec.inputs[name], cell) for name, values in batch.inputs.items()}
            if not (full if is_full else partial).add(feed) and is_full:
                break
        found = full.batches or partial.batches
        if not found:
            raise DataError("there are no samples to time an engine on", where="[data]")
        return found


class _Alike:
    """Batches of the first one's shapes, as many as are wanted."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Array]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._room = MOST_BYTES

    def add(self, feed: dict[str, Array]) -> bool:
        """Keep a batch if it is of these shapes and there is room; returns whether there is room for more."""
        shapes = {name: array.shape for name, array in feed.items()}
        if not self.batches:
            self._shapes = shapes
        elif shapes != self._shapes:
            return True
        size = sum(array.nbytes for array in feed.values())
        if self.batches and (size > self._room or len(self.batches) == MOST_BATCHES):
            return False
        self._room -= size
        self.batches.append(feed)
        return len(self.batches) < MOST_BATCHES


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
