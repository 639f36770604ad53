"""What the engine inspector says, and what is made of it."""

import json

import pytest

from gate.device import gpu
from gate.engines.tensorrt import layers
from gate.engines.tensorrt.layers import inspect_plan, layers_of_inspector
from gate.engines.tensorrt.plan import Host
from gate.errors import BackendUnavailable, IncompatibleEngine, RunError
from tests.engines.tensorrt.simulator import Device, SimulatedTrt, simulated_plan


def inspected(**layer):
    return layers_of_inspector(json.dumps({"Layers": [{"Name": "a", "LayerType": "t", **layer}]}), tf32=False)[0]


def test_tactic_and_format_are_listed():
    text = "Channel major FP16 format where channel % 8 == 0"
    layer = inspected(TacticName="sm80_xmma_gemm", Outputs=[{"Format/Datatype": text}, {"Format/Datatype": "FP32"}])
    assert (layer.precision, layer.tactic, layer.format) == ("fp16", "sm80_xmma_gemm", text)


def test_format_that_the_inspector_does_not_know_is_empty():
    layer = inspected(Outputs=[{"Format/Datatype": "N/A due to dynamic shapes"}])
    assert (layer.precision, layer.tactic, layer.format) == ("unknown", "", "")


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        ("sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize32", "fp16"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw", "int8"),
        ("sm90_xmma_fprop_f32f32_tf32f32_f32_nhwc", "tf32"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "bf16"),
        ("__myl_fused_mul_add_fp16_0x1234", "fp16"),
        ("sm89_gemm_e4m3_e4m3_f32_tn", "fp8"),
        ("sm90_gemm_bf16_f32_tn", "bf16"),
        ("sm80_xmma_gemm", "unknown"),
        ("0x00000000000003e8", "unknown"),
        ("copy_vectorized_half4", "unknown"),
        ("", "unknown"),
    ],
)
def test_precision_is_read_from_the_tactic_where_it_names_one(tactic, precision):
    assert inspected(TacticName=tactic).precision == precision


@pytest.mark.parametrize("text", ["", "[]", "null", '{"Layers": 3}', '{"Layers": null}', '{"Layers": ["a", 1]}', "{"])
def test_what_cannot_be_read_has_no_layers(text):
    assert layers_of_inspector(text, tf32=False) == ()


@pytest.mark.parametrize("odd", [{"Outputs": "x"}, {"Outputs": [None]}, {"Weights": 3}, {"TacticName": None}])
def test_layer_of_another_form_is_unknown(odd):
    assert inspected(**odd).precision == "unknown"


def test_plan_is_inspected_at_its_optimal_shapes(tmp_path, monkeypatch):
    path, device = tmp_path / "model.plan", Device()
    path.write_bytes(simulated_plan(profiles=((1, 2, 4), (8, 8, 16))))
    trt = SimulatedTrt(device)
    monkeypatch.setattr(layers, "gpu", object)
    monkeypatch.setattr(layers, "host", lambda name: Host(name=name, version=trt.__version__))
    monkeypatch.setattr(layers.api, "module", lambda name: trt)
    told = inspect_plan("tensorrt", path)
    assert [(each.precision, each.tactic[:9], each.format) for each in told.layers] == [
        ("fp16", "sm80_xmma", "Row major linear FP16 format")
    ]
    assert told.runtime == "tensorrt 10.13.0.35"
    assert told.header.version == (10, 13, 0, 35)
    assert [each.ranges["x"] for each in told.profiles] == [((1, 3), (2, 3), (4, 3)), ((8, 3), (8, 3), (16, 3))]
    assert [(each.mode, each.meta.name, each.meta.dtype, each.meta.shape) for each in told.tensors] == [
        ("input", "x", "float32", (None, 3)),
        ("output", "y", "float32", (None, 2)),
    ]
    assert told.device_memory_bytes == 4096
    assert told.size_bytes == path.stat().st_size
    assert trt.engines == 0


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_the_header_is_read_before_the_gpu_is_missed(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(simulated_plan(tag=b"vtrt", version=(1, 7, 1, 116)))
    with pytest.raises(BackendUnavailable, match="cannot open the plan of TensorRT-RTX 1.7.1.116"):
        inspect_plan("tensorrt_rtx", path)
    path.write_bytes(b"")
    with pytest.raises(IncompatibleEngine, match="the plan is empty"):
        inspect_plan("tensorrt_rtx", path)
    with pytest.raises(RunError, match="the plan cannot be read"):
        inspect_plan("tensorrt_rtx", tmp_path / "none.plan")
