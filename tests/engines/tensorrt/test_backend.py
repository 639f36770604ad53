"""TensorRT-RTX compiles here for real; running a plan needs a GPU."""

import json

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.device import Gpu, gpu
from gate.engines import backend
from gate.engines.tensorrt.backend import TensorRTBackend
from gate.engines.tensorrt.layers import layers_of_inspector
from gate.errors import BackendUnavailable, BuildError
from gate.spec import GateSpec
from gate.verdict import Evidence

WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def make_spec(backend_name="tensorrt_rtx", precision="fp32", **engine):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {"x": {"dtype": "float32", "shape": ["n", 3], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}}},
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": backend_name, "precision": precision, "parity": {}, **engine}],
        },
        GateSpec,
    )


def write_graph(path, nodes=None, *, external=False, name="x", outputs=("y",), more=()):
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", [name, "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in outputs],
        [numpy_helper.from_array(WEIGHT, "w"), *more],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path, save_as_external_data=external, location="w.data", size_threshold=0)
    return path


def build(tmp_path, path, spec=None):
    spec = spec or make_spec()
    return backend("tensorrt_rtx").build(onnx=path, out=tmp_path / "model.plan", spec=spec, engine=spec.engines[0])


def test_graph_is_compiled_and_its_layers_listed(tmp_path):
    record = build(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(options={"workspace_mib": 64}))
    assert (tmp_path / "model.plan").stat().st_size > 1000
    assert [layer.precision for layer in record.layers if layer.type == "MATRIX_MULTIPLY"] == ["fp32"]
    assert record.options["tf32"] is False
    assert record.options["strongly_typed"] is True
    assert record.backend_version == backend("tensorrt_rtx").version()
    assert record.command == (
        "tensorrt_rtx --onnx=a.onnx --saveEngine=model.plan --minShapes=x:1x3 --optShapes=x:2x3 --maxShapes=x:4x3 "
        "--memPoolSize=workspace:64"
    )


def test_tf32_is_on_only_where_asked(tmp_path):
    record = build(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(precision="tf32"))
    assert record.options["tf32"] is True
    assert [layer.precision for layer in record.layers if layer.type == "MATRIX_MULTIPLY"] == ["tf32"]


def test_external_data_is_read(tmp_path):
    build(tmp_path, write_graph(tmp_path / "a.onnx", external=True))
    assert (tmp_path / "model.plan").exists()


def test_several_outputs_are_compiled(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    record = build(tmp_path, write_graph(tmp_path / "a.onnx", nodes, outputs=("y", "z")))
    assert {layer.type for layer in record.layers} >= {"MATRIX_MULTIPLY", "ACTIVATION"}


def test_operator_that_the_parser_does_not_know_is_named(tmp_path):
    path = write_graph(tmp_path / "a.onnx", [helper.make_node("Nonsense", ["x"], ["y"], name="odd")])
    with pytest.raises(BuildError, match="cannot parse the graph") as caught:
        build(tmp_path, path)
    assert "odd" in (caught.value.node or "")
    assert "Nonsense" in str(caught.value)
    assert caught.value.log
    assert not (tmp_path / "model.plan").exists()


def test_int32_bias_that_tensorrt_refuses_is_a_build_error(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s"], ["bias"], name="bias"),
        helper.make_node("Gemm", ["x", "w", "bias"], ["y"], name="product"),
    ]
    more = [
        numpy_helper.from_array(np.array([1, 2], np.int32), "b"),
        numpy_helper.from_array(np.array(0.5, np.float32), "s"),
    ]
    with pytest.raises(BuildError, match="bias"):
        build(tmp_path, write_graph(tmp_path / "a.onnx", nodes, more=more))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no input 'x'"), (b"\xff no graph", "tensorrt_rtx cannot parse")]
)
def test_file_that_is_no_onnx_is_a_build_error(tmp_path, content, message):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(BuildError, match=message):
        build(tmp_path, tmp_path / "a.onnx")


def test_missing_file_is_a_build_error(tmp_path):
    with pytest.raises(BuildError, match="no such file"):
        build(tmp_path, tmp_path / "a.onnx")


def test_input_of_another_name_is_a_build_error(tmp_path):
    with pytest.raises(BuildError, match="no input 'x'.*an input 'image'"):
        build(tmp_path, write_graph(tmp_path / "a.onnx", name="image"))


def test_nothing_is_printed(tmp_path, capfd):
    build(tmp_path, write_graph(tmp_path / "a.onnx"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU here")
@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_without_a_gpu_a_plan_is_refused_before_it_is_read(tmp_path, name):
    spec = make_spec(name)
    assert backend(name).runs_here(spec.engines[0]) is None
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU here"):
        backend(name).open(tmp_path / "does-not-exist.plan", spec=spec, engine=spec.engines[0])


@pytest.mark.parametrize(
    ("name", "capability", "refusal"),
    [
        ("tensorrt_rtx", "8.9", None),
        ("tensorrt_rtx", "12.0", None),
        ("tensorrt_rtx", "9.0", "runs on compute capability 8.0, 8.6, 8.9 and 12.x; here is 9.0"),
        ("tensorrt_rtx", "7.5", "here is 7.5"),
    ],
)
def test_gpu_that_the_runtime_does_not_run_on_is_refused(name, capability, refusal):
    found = TensorRTBackend(name)._refusal(Gpu(name="GPU", compute_capability=capability, driver="1"))
    assert found is None if refusal is None else refusal in (found or "")


def test_command_of_a_weakly_typed_build_has_its_flags(tmp_path):
    spec = make_spec("tensorrt", "int8", task={}, options={"builder_optimization_level": 2})
    command = TensorRTBackend("tensorrt")._command(
        tmp_path / "a.onnx", tmp_path / "b.plan", spec=spec, engine=spec.engines[0], typed=False
    )
    assert command.endswith("--maxShapes=x:4x3 --int8 --fp16 --noTF32 --builderOptimizationLevel=2")


def test_inspector_is_read_with_its_control_characters():
    text = (
        '{"Layers": [{"Name": "a\x01", "LayerType": "CaskConvolution", "Outputs": '
        '[{"Name": "o", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]},'
        '{"Name": "b", "LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]},'
        '{"Name": "c", "LayerType": "NoOp", "Outputs": []}, "only a name"]}'
    )
    assert [layer.precision for layer in layers_of_inspector(text, tf32=False)] == ["fp16", "fp32", "unknown"]
    assert [layer.precision for layer in layers_of_inspector(text, tf32=True)] == ["fp16", "tf32", "unknown"]
    assert layers_of_inspector("not json", tf32=False) == ()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_engine_computes_the_graph_on_the_gpu(tmp_path, name):
    found, spec = backend(name), make_spec(name)
    if found.runs_here(spec.engines[0]) is not Evidence.DEVICE:
        pytest.skip(f"{name} does not run on this GPU")
    path, plan = write_graph(tmp_path / "a.onnx"), tmp_path / "model.plan"
    found.build(onnx=path, out=plan, spec=spec, engine=spec.engines[0])
    with found.open(plan, spec=spec, engine=spec.engines[0]) as runner:
        for rows in (1, 2, 4):
            x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
            np.testing.assert_allclose(runner.run({"x": x})["y"], x @ WEIGHT, rtol=1e-5)
        runner.timed({"x": np.ones((2, 3), np.float32)})()


def layer_86(kind: str, weights: str | None, tactic: str | None) -> dict[str, object]:
    """A layer as TensorRT 8.6.0 wrote it on an H200 for a network with dynamic shapes."""
    unknown = [{"Format/Datatype": "N/A due to dynamic shapes"}]
    layer: dict[str, object] = {"Name": "x", "LayerType": kind, "Inputs": unknown, "Outputs": unknown}
    if weights is not None:
        layer["Weights"] = {"Type": weights, "Count": 216}
    if tactic is not None:
        layer["TacticName"] = tactic
    return layer


def test_inspector_with_dynamic_shapes_is_read_by_weights_and_tactics():
    layers = [
        layer_86(
            "CaskConvolution", "Float", "sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nchwkcrs_nchw_tilesize32"
        ),
        layer_86("CaskConvolution", "Float", "sm90_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize"),
        layer_86("CaskConvolution", "Half", "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize64"),
        layer_86("CaskConvolution", "Int8", "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32"),
        layer_86("CaskGemmMatrixMultiply", None, "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize32x32x64_stage6"),
        layer_86("NoOp", None, None),
    ]
    text = json.dumps({"Layers": layers})
    expected = ["fp32", "tf32", "fp16", "int8", "fp16", "unknown"]
    assert [layer.precision for layer in layers_of_inspector(text, tf32=True)] == expected
    assert [layer.precision for layer in layers_of_inspector(text, tf32=False)] == expected
