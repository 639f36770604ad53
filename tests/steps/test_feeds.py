"""The batches that engines are timed on: of one shape, as many as keep the input out of the cache."""

from __future__ import annotations

import numpy as np
import pytest

from gate.data.batches import Batch
from gate.errors import DataError
from gate.latency.config import Cell
from gate.sessions.child import read_feeds
from gate.sessions.run import write_feeds
from gate.spec import AxisRange, InputSpec
from gate.steps import feeds
from gate.steps.feeds import MOST_BATCHES, RandomFeeds, SampleFeeds


class Spec:
    """As far as feeds look at it."""

    def __init__(self, *shape):
        axes = {name: AxisRange(min=1, opt=4, max=64) for name in shape if isinstance(name, str)}
        self.inputs = {"x": InputSpec(dtype="float32", shape=shape, axes=axes)}


class Source:
    """Samples whose width is given one by one; sample `i` is all `i`."""

    def __init__(self, *widths):
        self.widths = widths
        self.read = 0

    def __len__(self):
        return len(self.widths)

    def batches(self, size):
        first = 0
        while first < len(self.widths):
            count = 1
            while (
                count < size and first + count < len(self.widths) and self.widths[first + count] == self.widths[first]
            ):
                count += 1
            values = np.arange(first, first + count, dtype=np.float32)
            self.read += 1
            yield Batch(first, {"x": np.repeat(values[:, None], self.widths[first], axis=1)}, None)
            first += count


def found(source, cell, *, shape=("n", "w")):
    """Shapes of the batches, and the samples in each."""
    batches = SampleFeeds(Spec(*shape), source).batches(cell)
    assert {each["x"].dtype for each in batches} == {np.dtype(np.float32)}
    assert all(each["x"].flags.c_contiguous for each in batches)
    return [each["x"].shape for each in batches], [each["x"][:, 0].tolist() for each in batches]


def test_batches_of_another_shape_than_the_first_are_left_out():
    shapes, samples = found(Source(5, 7, 5, 5, 7, 5), Cell(batch=1))
    assert set(shapes) == {(1, 5)}
    assert samples == [[0], [2], [3], [5]]


def test_batches_that_differ_in_shape_can_be_timed(tmp_path):
    batches = SampleFeeds(Spec("n", "w"), Source(5, 7, 5, 9)).batches(Cell(batch=1))
    write_feeds(tmp_path / "feeds", batches)
    assert len(read_feeds(tmp_path / "feeds")) == 2


def test_a_batch_cut_short_by_a_change_of_shape_does_not_end_the_turns():
    shapes, samples = found(Source(5, 5, 5, 7, 5, 5, 7, 7, 5), Cell(batch=2))
    assert set(shapes) == {(2, 5)}
    assert samples == [[0, 1], [4, 5]]


def test_the_first_full_batch_says_which_shape_is_timed():
    shapes, samples = found(Source(5, 7, 7, 5, 5, 7, 7), Cell(batch=2))
    assert set(shapes) == {(2, 7)}
    assert samples == [[1, 2], [5, 6]]


def test_where_no_batch_is_full_those_of_the_first_shape_are_filled_up():
    shapes, samples = found(Source(5, 7, 5, 7), Cell(batch=3))
    assert set(shapes) == {(3, 5)}
    assert samples == [[0, 0, 0], [2, 2, 2]]


def test_samples_of_any_shape_are_brought_to_the_axes_that_are_asked_for():
    shapes, samples = found(Source(5, 7, 3, 9), Cell(batch=1, axes={"w": 6}))
    assert shapes == [(1, 6)] * 4
    assert samples == [[0], [1], [2], [3]]


def test_the_last_batch_of_a_data_set_is_not_timed_beside_full_ones():
    _, samples = found(Source(*[5] * 7), Cell(batch=3))
    assert samples == [[0, 1, 2], [3, 4, 5]]


def test_fewer_samples_than_a_batch_take_turns_within_it():
    assert found(Source(5, 5), Cell(batch=5)) == ([(5, 5)], [[0, 1, 0, 1, 0]])


def test_no_more_are_kept_or_read_than_the_most():
    source = Source(*[5] * 500)
    shapes, _ = found(source, Cell(batch=1))
    assert len(shapes) == MOST_BATCHES == source.read


def test_no_more_bytes_are_kept_than_the_most_and_one_batch_in_any_case(monkeypatch):
    monkeypatch.setattr(feeds, "MOST_BYTES", 100)
    assert len(found(Source(*[5] * 50), Cell(batch=1))[0]) == 5
    assert len(found(Source(*[50] * 50), Cell(batch=1))[0]) == 1


def test_where_every_sample_has_its_own_shape_the_search_ends(monkeypatch):
    monkeypatch.setattr(feeds, "MOST_LOOKED_AT", 10)
    source = Source(*range(1, 60))
    assert found(source, Cell(batch=1)) == ([(1, 1)], [[0]])
    assert source.read == 10


def test_no_samples_are_an_error():
    with pytest.raises(DataError, match="there are no samples to time an engine on"):
        SampleFeeds(Spec("n", 4), Source()).batches(Cell(batch=1))


def test_random_numbers_have_the_size_of_the_cell():
    batches = RandomFeeds(Spec("n", "w")).batches(Cell(batch=3, axes={"w": 9}))
    assert {each["x"].shape for each in batches} == {(3, 9)}
    assert not np.array_equal(batches[0]["x"], batches[1]["x"])
