"""Where nodes run: a silent fallback, whole or per node, is a failure."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.engines.onnxruntime.placement import (
    CPU_NODES_AT_MOST,
    RECORD_ENTRY,
    Placed,
    placed_nodes,
    require_placement,
    shape_nodes,
)
from gate.errors import RunError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def some(count, provider, op_type="Relu", prefix="n"):
    return [Placed(f"{prefix}{index}", op_type, provider) for index in range(count)]


def flattening_graph():
    """A convolution whose result is reshaped by arithmetic on its shape."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Shape", ["r"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "i"], ["b"], name="gather"),
        helper.make_node("Concat", ["b", "m"], ["t"], axis=0, name="concat"),
        helper.make_node("Reshape", ["r", "t"], ["y"], name="reshape"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", None])],
        [
            numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), "w"),
            numpy_helper.from_array(np.array([0]), "i"),
            numpy_helper.from_array(np.array([-1]), "m"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def recorded(tmp_path):
    onnx.save(flattening_graph(), tmp_path / "a.onnx")
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(RECORD_ENTRY, "1")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), settings, providers=[CPU])
    return placed_nodes(session)


def test_onnx_runtime_tells_where_each_node_runs(recorded):
    assert Placed("conv", "Conv", CPU) in recorded
    assert {node.name for node in recorded} == {"conv", "relu", "shape", "gather", "concat", "reshape"}
    assert require_placement(recorded, asked=CPU, at_most=0) == {CPU: 6}


def test_session_that_recorded_nothing_is_an_error(tmp_path):
    onnx.save(flattening_graph(), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=[CPU])
    with pytest.raises(RunError, match="does not tell which provider runs a node"):
        placed_nodes(session)


def test_whole_fallback_is_an_error_whatever_is_allowed(recorded):
    with pytest.raises(RunError, match="CUDAExecutionProvider runs none of the graph's 6 nodes.*fell back silently"):
        require_placement(recorded, asked=CUDA, at_most=1)


@pytest.mark.parametrize("op_type", ["Conv", "MatMul", "Gemm", "LSTM"])
def test_computing_node_elsewhere_is_an_error_whatever_is_allowed(op_type):
    nodes = [*some(99, CUDA), Placed("heavy", op_type, CPU)]
    with pytest.raises(RunError, match=rf"does not run heavy \({op_type}, on CPUExecutionProvider\)"):
        require_placement(nodes, asked=CUDA, at_most=1)


def test_computing_node_on_cuda_is_not_on_tensorrt():
    nodes = [*some(9, "TensorrtExecutionProvider"), Placed("conv", "Conv", CUDA)]
    with pytest.raises(RunError, match="what does the computing may not fall back"):
        require_placement(nodes, asked="TensorrtExecutionProvider", at_most=1)


def test_share_of_nodes_elsewhere_is_held_to_the_limit():
    nodes = [*some(95, CUDA), *some(5, CPU, "Softmax", "cpu")]
    assert require_placement(nodes, asked=CUDA, at_most=0.05) == {CUDA: 95, CPU: 5}
    with pytest.raises(RunError) as caught:
        require_placement(nodes, asked=CUDA, at_most=0.04, where="a.onnx")
    assert "5 of 100 nodes (5.0%) do not run on CUDAExecutionProvider: cpu0 (Softmax" in str(caught.value)
    assert "and 1 more" in str(caught.value)
    assert "cpu_nodes_at_most = 0.06" in caught.value.hint


def test_limit_that_the_hint_names_is_enough():
    nodes = [*some(2, CUDA), *some(1, CPU)]
    with pytest.raises(RunError, match="cpu_nodes_at_most is 0.05") as caught:
        require_placement(nodes, asked=CUDA, at_most=CPU_NODES_AT_MOST)
    limit = float(caught.value.hint.partition("cpu_nodes_at_most = ")[2].partition(" ")[0])
    assert require_placement(nodes, asked=CUDA, at_most=limit) == {CUDA: 2, CPU: 1}


def test_shape_arithmetic_may_run_on_the_cpu():
    nodes = [Placed("conv", "Conv", CUDA), *some(9, CPU, "Gather", "shape")]
    shapes = [node.name for node in nodes[1:]]
    assert require_placement(nodes, asked=CUDA, at_most=0, shapes=shapes) == {CPU: 9, CUDA: 1}
    with pytest.raises(RunError, match="9 of 10 nodes"):
        require_placement(nodes, asked=CUDA, at_most=CPU_NODES_AT_MOST)


def test_empty_list_of_nodes_is_an_error():
    with pytest.raises(RunError, match="lists no node"):
        require_placement([], asked=CUDA, at_most=1)


def test_shape_arithmetic_is_what_no_data_reaches():
    assert shape_nodes(flattening_graph()) == {"shape", "gather", "concat"}


def test_quantised_weights_and_control_flow_are_data():
    then = helper.make_graph(
        [helper.make_node("Identity", ["v"], ["a"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["v"], name="weights"),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=then, name="choice"),
        helper.make_node("Neg", ["y"], ["z"], name="negative"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones(3, np.int8), "q"),
            numpy_helper.from_array(np.float32(0.5), "scale"),
            numpy_helper.from_array(np.array(True), "flag"),
        ],
    )
    assert shape_nodes(helper.make_model(graph)) == frozenset()
