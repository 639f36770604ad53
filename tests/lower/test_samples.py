"""Calibration samples: refused where they can tell nothing, digested however they are batched, read back unchanged."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import LoweringError
from gate.lower.samples import Samples, reader_of
from gate.tensors import TensorMeta

X = {"x": TensorMeta("x", "float32", ("batch", 3))}
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_digest_does_not_depend_on_the_batches(sizes):
    count = sum(sizes)
    values = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    edges = np.cumsum([0, *sizes])
    parts = [{"x": values[a:b]} for a, b in itertools.pairwise(edges)]
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as two,
        tempfile.TemporaryDirectory() as three,
    ):
        whole = Samples([{"x": values}], X, Path(one))
        split = Samples(parts, X, Path(two))
        other = Samples([{"x": values + 1}], X, Path(three))
        assert whole.sha256() == split.sha256() != other.sha256()
        assert whole.samples == split.samples == count
        assert np.array_equal(np.concatenate([each["x"] for each in split]), values)


def test_batches_are_read_back_as_often_as_needed(tmp_path):
    samples = Samples(iter([{"x": VALUES[:3]}, {"x": VALUES[:0]}, {"x": VALUES[3:]}]), X, tmp_path)
    assert len(samples) == 2
    for _ in range(2):
        assert [len(each["x"]) for each in samples] == [3, 1]


def test_reader_gives_ranges_and_rewinds(tmp_path):
    reader = reader_of(Samples([{"x": VALUES[:2]}, {"x": VALUES[2:]}], X, tmp_path))
    assert len(reader) == 2
    assert reader.get_first()["x"][0, 0] == 0
    assert [reader.get_next()["x"][0, 0], reader.get_next()["x"][0, 0], reader.get_next()] == [0, 6, None]
    reader.set_range(1, 2)
    assert reader.get_next()["x"][0, 0] == 6
    assert reader.get_next() is None
    reader.rewind()
    assert reader.get_next()["x"][0, 0] == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "have the inputs none, the graph takes x"),
        ({"x": VALUES, "y": VALUES}, "have the inputs x, y, the graph takes x"),
        ({"x": VALUES.astype(np.float16)}, "is float16, the graph takes float32"),
        ({"x": VALUES[:, :2]}, r"has the shape \[4, 2\], the graph takes \[batch, 3\]"),
        ({"x": VALUES.reshape(-1)}, r"has the shape \[12\], the graph takes \[batch, 3\]"),
        ({"x": VALUES * np.nan}, "12 values that are not finite, in the batch that begins with sample 0"),
        ({"x": VALUES * 0 + 7}, "every calibration value of input 'x' is 7"),
        ({"x": VALUES[:0]}, "the calibration has no samples"),
    ],
)
def test_samples_that_tell_nothing_are_an_error(tmp_path, batch, message):
    with pytest.raises(LoweringError, match=message):
        Samples([batch], X, tmp_path)


def test_inputs_of_different_counts_are_an_error(tmp_path):
    inputs = {**X, "y": TensorMeta("y", "float32", (None, 3))}
    with pytest.raises(LoweringError, match=r"differ in their number of samples: \[2, 4\]"):
        Samples([{"x": VALUES, "y": VALUES[:2]}], inputs, tmp_path)


def test_one_constant_input_beside_a_varying_one_is_taken(tmp_path):
    inputs = {**X, "on": TensorMeta("on", "bool", ("batch",)), "y": TensorMeta("y", "float32", (None, 3))}
    batch = {"x": VALUES, "y": VALUES * 0, "on": np.ones(4, bool)}
    assert Samples([batch], inputs, tmp_path).samples == 4
