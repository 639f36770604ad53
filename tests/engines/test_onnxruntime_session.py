"""Sessions on a provider: what is missing is said, in ONNX Runtime's own words."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gate.engines.onnxruntime.session import (
    causes_in,
    disabled_optimizers,
    not_loaded,
    open_session,
    preload_libraries,
    provider_list,
)
from gate.errors import BackendUnavailable
from gate.spec import EngineOptions

LIBRARY = "/s/onnxruntime/capi/libonnxruntime_providers_cuda.so"
LOG = (
    "\x1b[1;31m2026-11-21 07:11:16.229067094 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
    "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& "
    "onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    f"{LIBRARY} with error: libcublasLt.so.13: cannot open shared object file: No such file or directory\n"
    "\x1b[m\n"
    "unrelated progress 12 %\n"
    "\x1b[0;93m2026-11-21 07:11:16.230433623 [W:onnxruntime:Default, onnxruntime_pybind_state.cc:1295 "
    "CreateExecutionProviderFactoryInstance] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*.\x1b[m\n"
)


def test_causes_are_read_from_the_log_of_the_runtime():
    assert causes_in(LOG + LOG) == (
        f"Failed to load library {LIBRARY} with error: libcublasLt.so.13: cannot open shared object file: "
        "No such file or directory",
        "Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*.",
    )
    assert causes_in("") == ()


@pytest.mark.parametrize(
    ("causes", "hint"),
    [
        (causes_in(LOG), r'pip install "onnxruntime-gpu\[cuda,cudnn\]", built with CUDA 13.0'),
        (
            ("Failed to load library /a.so with error: libnvinfer.so.10: cannot open",),
            r'pip install "tensorrt>=10,<11"',
        ),
        (("CUDA failure 100: no CUDA-capable device is detected",), "nvidia-smi"),
        ((), "nvidia-smi"),
    ],
)
def test_provider_that_was_left_out_is_an_error_with_the_next_step(causes, hint):
    error = not_loaded("CUDAExecutionProvider", causes, cuda="13.0")
    assert isinstance(error, BackendUnavailable)
    assert all(cause in error.message for cause in causes or ("it logged no cause",))
    with pytest.raises(BackendUnavailable, match=hint):
        raise error


def test_provider_that_is_not_there_is_an_error_and_not_a_cpu_session(tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(BackendUnavailable, match=r"has no CUDAExecutionProvider \(it has .*CPUExecutionProvider"):
        open_session(
            tmp_path / "a.onnx", EngineOptions(), providers=provider_list("CUDAExecutionProvider", {}, stream=None)
        )


def test_nodes_that_tensorrt_does_not_take_go_to_cuda_first():
    given = {"trt_max_workspace_size": "1"}
    assert provider_list("TensorrtExecutionProvider", given, stream=7) == (
        ("TensorrtExecutionProvider", {**given, "user_compute_stream": "7"}),
        ("CUDAExecutionProvider", {"use_tf32": "0", "user_compute_stream": "7"}),
        ("CPUExecutionProvider", {}),
    )
    assert provider_list("CUDAExecutionProvider", {}, stream=None) == (
        ("CUDAExecutionProvider", {}),
        ("CPUExecutionProvider", {}),
    )


def graph(tmp_path, activation, element, name="q.onnx"):
    """x -> activation -> QuantizeLinear -> DequantizeLinear -> y, with steps of 1."""
    zero = helper.make_tensor("zero", element, [], [0])
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])
    limits = [
        helper.make_tensor("low", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("high", TensorProto.FLOAT, [], [6.0]),
    ]
    inputs = ["x", "low", "high"] if activation == "Clip" else ["x"]
    made = helper.make_graph(
        [
            helper.make_node(activation, inputs, ["a"]),
            helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [scale, zero, *(limits if activation == "Clip" else [])],
    )
    path = tmp_path / name
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


X = np.array([-4, -1, 1, 4], np.float32)


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.parametrize("optimization", [None, "extended", "basic"])
@pytest.mark.parametrize("element", [TensorProto.FLOAT8E4M3FN, TensorProto.INT8])
def test_relu_before_a_quantiser_clamps_at_zero_at_each_optimisation(tmp_path, activation, optimization, element):
    session = open_session(graph(tmp_path, activation, element), EngineOptions(optimization=optimization))
    assert session.run(None, {"x": X})[0].tolist() == [0, 0, 1, 4]


def test_only_fp8_graphs_do_without_optimisations(tmp_path):
    assert disabled_optimizers(graph(tmp_path, "Relu", TensorProto.INT8)) == ()
    assert disabled_optimizers(graph(tmp_path, "Relu", TensorProto.UINT8)) == ()
    for element in (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2):
        assert "ReluQuantRewrite" in disabled_optimizers(graph(tmp_path, "Relu", element))
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(b"no graph")
    assert disabled_optimizers(plain) == ()


def test_looking_for_libraries_prints_nothing(capfd):
    preload_libraries(onnxruntime)
    assert capfd.readouterr() == ("", "")
