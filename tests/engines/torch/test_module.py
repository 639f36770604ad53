"""What a model is traced and warmed up with."""

import msgspec
import numpy as np
import pytest

from gate.engines.torch.module import least_feed, trace_feed
from gate.errors import RunError
from gate.spec import GateSpec


def make_spec(low, best, high):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {
                "x": {
                    "dtype": "float32",
                    "shape": ["batch", 3],
                    "axes": {"batch": {"min": low, "opt": best, "max": high}},
                }
            },
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": "torch", "precision": "fp32", "parity": {}}],
        },
        GateSpec,
    )


@pytest.mark.parametrize(
    ("sizes", "traced", "least"),
    [((1, 1, 64), 2, 1), ((1, 64, 64), 8, 1), ((1, 1, 1), 1, 1), ((16, 32, 32), 16, 16)],
)
def test_a_dynamic_axis_is_traced_with_two_or_more_where_it_may(sizes, traced, least):
    feed = {"x": np.arange(9, dtype=np.float32).reshape(3, 3)}
    found = trace_feed(make_spec(*sizes), [feed])["x"]
    assert found.shape == (traced, 3)
    assert np.array_equal(found[0], feed["x"][0])
    assert least_feed(make_spec(*sizes), [feed])["x"].shape == (least, 3)
    assert trace_feed(make_spec(*sizes), ())["x"].shape == (traced, 3)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "have no input 'x'; they have none"),
        ({"x": np.zeros((0, 3), np.float32)}, r"a sample of input 'x' is \[0, 3\]"),
        ({"x": np.zeros(3, np.float32)}, "the spec has 2 axes"),
    ],
)
def test_samples_that_cannot_be_traced_with_are_an_error(feed, message):
    with pytest.raises(RunError, match=message):
        trace_feed(make_spec(1, 2, 4), [feed])
