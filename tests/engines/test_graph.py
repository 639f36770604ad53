"""What is read from an ONNX graph: layers with their precision, opset, external files."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.engines.graph import external_files, has_external_data, layers_of, opset_of, unsafe_external_file


def quantised(kind, between=()):
    """A matrix multiplication whose data and weights come from Q/DQ of this type; `between` lies after the weights'."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="xq"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="xd"),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], name="wq"),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"], name="wd"),
    ]
    name = "wd"
    for operator in between:
        nodes.append(helper.make_node(operator, [name], [f"{name}_"], name=operator))
        name += "_"
    nodes.append(helper.make_node("MatMul", ["xd", name], ["y"], name="multiply"))
    zero = helper.make_tensor("z", kind, [], b"\0", raw=True)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [
            numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),
            numpy_helper.from_array(np.array(0.1, np.float32), "s"),
            zero,
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def precision_of(model, name="multiply"):
    return {layer.name: layer.precision for layer in layers_of(model)}[name]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (TensorProto.INT8, "int8"),
        (TensorProto.UINT8, "int8"),
        (TensorProto.FLOAT8E4M3FN, "fp8"),
        (TensorProto.FLOAT8E5M2, "fp8"),
    ],
)
def test_node_between_q_dq_has_their_precision(kind, precision):
    assert precision_of(quantised(kind)) == precision


def test_operators_that_only_move_values_may_lie_between():
    assert precision_of(quantised(TensorProto.INT8, ("Transpose", "Identity"))) == "int8"


def test_operator_that_computes_ends_the_quantisation():
    assert precision_of(quantised(TensorProto.INT8, ("Abs",))) == "fp32"


def test_node_with_one_quantised_side_computes_in_fp32():
    model = quantised(TensorProto.INT8)
    model.graph.node[-1].input[0] = "x"
    assert precision_of(model) == "fp32"


def test_constant_is_no_layer_and_an_unnamed_node_has_its_outputs_name():
    model = quantised(TensorProto.INT8)
    model.graph.node[-1].name = ""
    assert precision_of(model, "y") == "int8"
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    model.graph.node.insert(0, constant)
    assert "Constant" not in {layer.type for layer in layers_of(model)}


def test_opset_is_that_of_the_default_domain():
    model = quantised(TensorProto.INT8)
    model.opset_import.insert(0, helper.make_opsetid("com.example", 3))
    assert opset_of(model) == 19
    del model.opset_import[:]
    assert opset_of(model) == 0


def test_external_files_are_found_and_missing_ones_named(tmp_path):
    path = tmp_path / "m.onnx"
    model = quantised(TensorProto.INT8)
    onnx.save_model(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    plain = onnx.load(path, load_external_data=False)
    assert has_external_data(path)
    assert external_files(plain) == ("m.data",)
    assert unsafe_external_file(path, external_files(plain)) is None
    (tmp_path / "m.data").unlink()
    assert "is missing" in (unsafe_external_file(path, external_files(plain)) or "")
    assert "outside the model's folder" in (unsafe_external_file(path, ("../m.data",)) or "")
