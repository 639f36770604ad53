"""The exact check of inputs."""

import msgspec
import numpy as np
import pytest

from gate.engines.feed import metas_from_spec, profile_of, require_feed, require_inputs
from gate.errors import RunError
from gate.spec import GateSpec
from gate.tensors import TensorMeta

SPEC = msgspec.convert(
    {
        "schema": 1,
        "model": {"id": "m", "factory": "a:b"},
        "inputs": {
            "image": {
                "dtype": "float32",
                "shape": ["batch", 3, "width"],
                "axes": {"batch": {"min": 1, "opt": 2, "max": 4}, "width": {"min": 2, "opt": 8, "max": 16}},
            },
            "ids": {"dtype": "int64", "shape": ["batch"], "axes": {"batch": {"min": 1, "opt": 2, "max": 4}}},
        },
        "data": {"source": "a:b", "samples": 1},
        "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}}],
    },
    GateSpec,
)
METAS = metas_from_spec(SPEC)


def feed(**changes):
    whole = {"image": np.zeros((2, 3, 8), np.float32), "ids": np.zeros(2, np.int64), **changes}
    return {name: array for name, array in whole.items() if array is not None}


def test_right_feed_passes_contiguous_and_in_order():
    image = np.zeros((2, 8, 3), np.float32).transpose(0, 2, 1)
    found = require_feed({"ids": feed()["ids"], "image": image}, METAS, spec=SPEC)
    assert list(found) == ["image", "ids"]
    assert found["image"].flags.c_contiguous


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, r"input 'ids' is missing; given: 'image'"),
        ({"extra": np.zeros(2)}, r"unexpected input 'extra'"),
        ({"image": np.zeros((2, 3, 8))}, r"input 'image' is float64, the spec has float32"),
        ({"image": np.zeros((2, 3, 8), ">f4")}, r"input 'image' is >f4, the spec has float32"),
        ({"image": np.zeros((2, 3), np.float32)}, r"has 2 axes \[2, 3\], the spec has \[batch, 3, width\]"),
        ({"image": np.zeros((2, 4, 8), np.float32)}, r"axis 1 is 4, the spec has 3"),
        ({"image": np.zeros((2, 3, 1), np.float32)}, r"axis 2 \(width\) is 1, outside the profile's 2 to 16"),
        ({"image": np.zeros((5, 3, 8), np.float32)}, r"axis 0 \(batch\) is 5, outside the profile's 1 to 4"),
        ({"image": np.zeros((0, 3, 8), np.float32)}, r"axis 0 \(batch\) is 0, outside"),
        ({"ids": np.zeros(3, np.int64)}, r"axis 'batch' is 2 in input 'image' and 3 in input 'ids'"),
    ],
)
def test_wrong_feed_is_an_error(changes, message):
    with pytest.raises(RunError, match=message):
        require_feed(feed(**changes), METAS, spec=SPEC)


def test_float_input_is_cast_only_where_asked():
    half = {**METAS, "image": TensorMeta("image", "float16", ("batch", 3, "width"))}
    assert require_feed(feed(), half, spec=SPEC, cast_io=True)["image"].dtype == np.float16
    with pytest.raises(RunError, match="the engine takes float16"):
        require_feed(feed(), half, spec=SPEC)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": METAS["image"]}, "the engine has no input 'ids'"),
        ({**METAS, "more": METAS["ids"]}, "an input 'more' that the spec has not"),
        ({**METAS, "ids": TensorMeta("ids", "int32", ("batch",))}, "input 'ids' is int32, the spec has int64"),
        ({**METAS, "ids": TensorMeta("ids", "int64", (2,))}, "axis 0 is fixed at 2, the spec asks for 1 to 4"),
        ({**METAS, "ids": TensorMeta("ids", "int64", ())}, "has 0 axes"),
        ({**METAS, "image": TensorMeta("image", "float16", (None, 3, None))}, "input 'image' is float16"),
    ],
)
def test_engine_with_other_inputs_is_an_error(inputs, message):
    with pytest.raises(RunError, match=message):
        require_inputs(inputs, spec=SPEC, cast_io=False, where="model.onnx")


def test_engine_with_half_inputs_is_taken_where_cast_io_is_set():
    inputs = {**METAS, "image": TensorMeta("image", "float16", (None, 3, None))}
    require_inputs(inputs, spec=SPEC, cast_io=True, where="model.onnx")


def test_profile_is_the_specs():
    assert profile_of(SPEC)["image"] == {"min": [1, 3, 2], "opt": [2, 3, 8], "max": [4, 3, 16]}
