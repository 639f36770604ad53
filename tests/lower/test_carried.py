"""A graph that carries Q/DQ from quantisation-aware training is taken as it is."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.errors import LoweringError
from gate.lower import lower
from gate.spec import LoweringSpec


@pytest.fixture
def carried(tmp_path, wide, batches):
    """The int8 graph of another tool, as an export after training would be."""
    path = tmp_path / "qat" / "model.onnx"
    lower(wide, precision="int8", out=path, calibration=batches)
    return path


def test_explicitly_taken_as_it_is(tmp_path, carried, run, compile_by_rtx):
    out = tmp_path / "model.onnx"
    record = lower(carried, precision="int8", out=out, lowering=LoweringSpec(tool="none"))
    assert (record.tool, record.tool_version, record.calibration) == ("copy", "", None)
    assert record.notes[0].endswith("was taken as it is: 4 of 4 compute nodes are int8")
    assert np.array_equal(run(out, "int8"), run(carried, "int8"))
    assert compile_by_rtx(out, tmp_path / "m.plan", "int8").layers


@pytest.mark.parametrize("lowering", [LoweringSpec(), LoweringSpec(tool="modelopt", method="max")])
def test_taken_as_it_is_without_asking_and_the_samples_are_not_read(tmp_path, carried, lowering):
    def never():
        raise RuntimeError("read")
        yield {}

    record = lower(carried, precision="int8", out=tmp_path / "m.onnx", calibration=never(), lowering=lowering)
    assert record.tool == "copy"
    assert record.calibration is None
    assert "the calibration samples were not used" in record.notes[0]
    assert ("modelopt was not used" in record.notes[0]) == (lowering.tool == "modelopt")


def test_fp8_graph_is_taken_as_fp8_and_not_as_int8(tmp_path, wide, batches):
    made = tmp_path / "fp8.onnx"
    lower(wide, precision="fp8", out=made, calibration=batches)
    record = lower(made, precision="fp8", out=tmp_path / "m.onnx", lowering=LoweringSpec(tool="none"))
    assert record.counts["fp8"] >= 3
    with pytest.raises(LoweringError, match="no node of the graph computes in int8"):
        lower(made, precision="int8", out=tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_none_for_a_graph_without_q_dq_is_an_error(tmp_path, wide, precision):
    with pytest.raises(LoweringError, match="has no QuantizeLinear or DequantizeLinear node"):
        lower(wide, precision=precision, out=tmp_path / "m.onnx", lowering=LoweringSpec(tool="none"))


def test_excluding_from_a_graph_that_is_taken_as_it_is_is_an_error(tmp_path, carried, batches):
    with pytest.raises(LoweringError, match="so nothing can be excluded"):
        lower(
            carried,
            precision="int8",
            out=tmp_path / "m.onnx",
            calibration=batches,
            lowering=LoweringSpec(exclude_ops=("Gemm",)),
        )


def test_linear_layer_whose_weights_are_transposed_after_q_dq_is_int8(tmp_path):
    eye = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "s")
    zero = numpy_helper.from_array(np.array(0, np.int8), "z")
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["iq"], name="iq"),
        helper.make_node("DequantizeLinear", ["iq", "s", "z"], ["id"], name="id"),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], name="wq"),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"], name="wd"),
        helper.make_node("Transpose", ["wd"], ["wt"], name="wt", perm=[1, 0]),
        helper.make_node("MatMul", ["id", "wt"], ["logits"], name="linear"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])],
        [eye, scale, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "qat.onnx")
    record = lower(tmp_path / "qat.onnx", precision="int8", out=tmp_path / "m.onnx", lowering=LoweringSpec(tool="none"))
    assert {layer.name: layer.precision for layer in record.layers}["linear"] == "int8"
