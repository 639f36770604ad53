"""TensorRT-RTX compiles here for real; running a plan needs a GPU."""

import functools
import json

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.device import Gpu, gpu
from gate.engines import backend
from gate.engines.tensorrt import api, loaded
from gate.engines.tensorrt import backend as backend_module
from gate.engines.tensorrt.backend import TensorRTBackend
from gate.engines.tensorrt.layers import layers_of_inspector
from gate.engines.tensorrt.runner import TensorRTRunner
from gate.errors import BackendUnavailable, IncompatibleEngine, RunError
from gate.spec import GateSpec
from gate.verdict import Evidence
from tests.engines.tensorrt.simulator import Device, SimulatedMemory, SimulatedTrt, simulated_plan

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


L4 = Gpu(name="NVIDIA L4", compute_capability="8.9", driver="580.1")


@pytest.fixture
def on_an_l4(monkeypatch):
    """A GPU is found, and the runtime must not be imported: what is refused is refused before."""

    def imported(name):
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(backend_module, "gpu", lambda: L4)
    monkeypatch.setattr(loaded, "gpu", lambda: L4)
    monkeypatch.setattr(api, "module", imported)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the plan is empty"),
        (b"not a plan", "it is no TensorRT plan"),
        (simulated_plan(tag=b"vtrt", version=(1, 7, 1, 116))[:-1], "the plan is truncated"),
        (
            simulated_plan(tag=b"vtrt", version=(1, 6, 0, 1)),
            "was built by TensorRT-RTX 1.6.0.1; here are TensorRT-RTX 1.7",
        ),
        (simulated_plan(version=(8, 6, 0, 12)), "it is a plan of TensorRT 8.6.0.12"),
    ],
)
def test_plan_that_is_not_for_here_is_refused_before_the_runtime_is_imported(tmp_path, on_an_l4, content, message):
    plan, spec = tmp_path / "model.plan", make_spec("tensorrt_rtx")
    plan.write_bytes(content)
    with pytest.raises(IncompatibleEngine, match=message):
        backend("tensorrt_rtx").open(plan, spec=spec, engine=spec.engines[0])


def test_plan_that_is_missing_is_a_run_error(tmp_path, on_an_l4):
    spec = make_spec("tensorrt_rtx")
    with pytest.raises(RunError, match="the plan cannot be read: No such file"):
        backend("tensorrt_rtx").open(tmp_path / "model.plan", spec=spec, engine=spec.engines[0])


@pytest.mark.parametrize("asked", [True, None])
def test_options_reach_the_runner(tmp_path, monkeypatch, asked):
    device = Device()
    trt = SimulatedTrt(device, "10.13.0.35")
    monkeypatch.setattr(backend_module, "gpu", lambda: L4)
    monkeypatch.setattr(loaded, "gpu", lambda: L4)
    monkeypatch.setattr(api, "module", lambda name: trt)
    monkeypatch.setattr(api, "version", lambda name: trt.__version__)
    monkeypatch.setattr(
        backend_module, "TensorRTRunner", functools.partial(TensorRTRunner, memory_of=lambda: SimulatedMemory(device))
    )
    options = {"version_compatible": asked, "cuda_graph": asked} if asked else {}
    spec, plan = make_spec("tensorrt", options=options), tmp_path / "model.plan"
    plan.write_bytes(simulated_plan(version=(10, 12, 0, 36) if asked else (10, 13, 0, 35)))
    with backend("tensorrt").open(plan, spec=spec, engine=spec.engines[0]) as runner:
        x = np.ones((2, 3), np.float32)
        np.testing.assert_array_equal(runner.run({"x": x})["y"], x @ WEIGHT)
        assert device.launches == (1 if asked else 0)
        assert trt.runtimes[0].engine_host_code_allowed is (asked is True)
    assert device.is_clean


def test_plugin_library_that_is_missing_is_a_run_error(tmp_path, monkeypatch):
    plugin = str(tmp_path / "none.so")
    with pytest.raises(RunError, match="plugin library cannot be read"):
        loaded.LoadedPlan(SimulatedTrt(Device()), simulated_plan(), where="p", plugins=(plugin,))
