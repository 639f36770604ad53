"""Options of ONNX Runtime's providers: taken, resolved, and refused where they contradict the precision."""

import msgspec
import pytest

from gate.device import Gpu
from gate.engines import backend
from gate.engines.onnxruntime.providers import (
    cache_key,
    kept_folder,
    profile_options,
    require_options,
    resolved_options,
)
from gate.errors import BackendUnavailable, RunError, SpecError
from gate.spec import EngineSpec, GateSpec

SPEC = msgspec.convert(
    {
        "schema": 1,
        "model": {"id": "m", "factory": "a:b"},
        "inputs": {
            "x": {"dtype": "float32", "shape": ["n", 3], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}},
            "y": {"dtype": "float32", "shape": ["n"], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}},
            "z": {"dtype": "float32", "shape": [7]},
        },
        "data": {"source": "a:b", "samples": 1},
        "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}}],
    },
    GateSpec,
)


def make_engine(provider, precision, *, rebuilds=1, evidence=None, **provider_options):
    return msgspec.convert(
        {
            "name": "e",
            "backend": "onnxruntime",
            "precision": precision,
            "evidence": evidence,
            "rebuilds": rebuilds,
            "options": {"provider": provider, "provider_options": provider_options or None},
            "parity": {},
        },
        EngineSpec,
    )


@pytest.mark.parametrize(
    ("provider", "precision", "given", "environment"),
    [
        ("cpu", "fp32", {}, {}),
        ("cpu", "int8", {}, {}),
        ("cuda", "fp32", {}, {}),
        ("cuda", "fp32", {"use_tf32": False, "cudnn_conv_algo_search": "HEURISTIC"}, {}),
        ("cuda", "tf32", {"use_tf32": 1}, {}),
        ("cuda", "fp16", {"use_tf32": True, "device_id": 0}, {}),
        ("tensorrt", "tf32", {"trt_fp16_enable": False}, {}),
        ("tensorrt", "fp32", {}, {"NVIDIA_TF32_OVERRIDE": "0"}),
        ("tensorrt", "int8", {"trt_engine_cache_path": "/c", "trt_timing_cache_path": "/t"}, {}),
    ],
)
def test_options_that_agree_are_taken(provider, precision, given, environment):
    require_options(make_engine(provider, precision, **given), environment)


@pytest.mark.parametrize(
    ("provider", "precision", "given", "environment", "message"),
    [
        ("cuda", "fp32", {"use_tf23": 1}, {}, r"has no option 'use_tf23'; did you mean 'use_tf32'\?"),
        ("tensorrt", "tf32", {"use_tf32": 1}, {}, "tensorrt provider has no option 'use_tf32'"),
        ("cuda", "fp32", {"use_tf32": True}, {}, "use_tf32 = true contradicts precision 'fp32'"),
        ("cuda", "tf32", {"use_tf32": "0"}, {}, "use_tf32 = 0 contradicts precision 'tf32'"),
        ("cuda", "tf32", {}, {"NVIDIA_TF32_OVERRIDE": "0"}, "NVIDIA_TF32_OVERRIDE=0 turns TF32 off"),
        ("cuda", "int8", {}, {}, "cuda provider has no int8 convolution"),
        ("cuda", "fp8", {}, {}, "cuda provider has no fp8 convolution"),
        ("cuda", "fp32", {"device_id": 1}, {}, "(?s)device_id = 1.*CUDA_VISIBLE_DEVICES"),
        ("cuda", "fp32", {"user_compute_stream": 1}, {}, "cannot be set: the gate gives its own stream"),
        ("cuda", "fp32", {"enable_cuda_graph": True}, {}, "enable_cuda_graph cannot be set"),
        ("tensorrt", "tf32", {"trt_fp16_enable": True}, {}, "trt_fp16_enable contradicts precision 'tf32'"),
        ("tensorrt", "fp16", {"trt_fp16_enable": True}, {}, "(?s)trt_fp16_enable contradicts.*TensorRT chooses"),
        ("tensorrt", "int8", {"trt_int8_enable": 1}, {}, "trt_int8_enable contradicts"),
        ("tensorrt", "fp32", {}, {}, "(?s)no option that turns it off.*NVIDIA_TF32_OVERRIDE=0"),
        ("tensorrt", "fp32", {}, {"NVIDIA_TF32_OVERRIDE": "1"}, "no option that turns it off"),
        ("tensorrt", "tf32", {}, {"NVIDIA_TF32_OVERRIDE": "0"}, "turns TF32 off"),
        ("tensorrt", "fp16", {"trt_profile_min_shapes": "x:1x3"}, {}, r"profiles are the ranges in \[inputs\]"),
        ("tensorrt", "fp16", {"trt_extra_plugin_lib_paths": "/p.so"}, {}, "options.plugins"),
        ("tensorrt", "fp16", {"trt_engine_cache_enable": True}, {}, "needs trt_engine_cache_path"),
        (
            "tensorrt",
            "fp16",
            {"trt_engine_cache_enable": False, "trt_engine_cache_path": "/c"},
            {},
            "trt_engine_cache_enable = false",
        ),
        ("tensorrt", "fp16", {"trt_timing_cache_enable": True}, {}, "needs trt_timing_cache_path"),
        (
            "tensorrt",
            "fp16",
            {"trt_timing_cache_enable": 0, "trt_timing_cache_path": "/c"},
            {},
            "trt_timing_cache_enable = false",
        ),
    ],
)
def test_option_that_contradicts_is_refused(provider, precision, given, environment, message):
    with pytest.raises(SpecError, match=message):
        require_options(make_engine(provider, precision, **given), environment)


def test_rebuild_from_kept_engines_is_refused():
    with pytest.raises(SpecError, match="rebuilds = 3 builds anew"):
        require_options(make_engine("tensorrt", "fp16", rebuilds=3, trt_engine_cache_path="/c"), {})


def test_preflight_of_a_gpu_provider_is_refused():
    with pytest.raises(SpecError, match="compiles nothing without a GPU"):
        require_options(make_engine("cuda", "fp16", evidence="preflight"), {})


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "0"), ("tf32", "1"), ("fp16", "0")])
def test_tf32_follows_the_precision_on_cuda(precision, expected):
    engine = make_engine("cuda", precision)
    assert resolved_options(engine.options, precision=precision, spec=SPEC) == {"use_tf32": expected}


def test_given_options_are_told_as_text():
    engine = make_engine("cuda", "fp16", use_tf32=True, gpu_mem_limit=1024)
    told = resolved_options(engine.options, precision="fp16", spec=SPEC)
    assert told == {"use_tf32": "True", "gpu_mem_limit": "1024"}


def test_tensorrt_gets_the_profile_of_the_inputs_and_no_path():
    engine = make_engine("tensorrt", "fp16", trt_engine_cache_path="/c", trt_timing_cache_path="/t")
    assert resolved_options(engine.options, precision="fp16", spec=SPEC) == {
        "trt_engine_cache_enable": "True",
        "trt_timing_cache_enable": "True",
        "trt_profile_min_shapes": "x:1x3,y:1",
        "trt_profile_opt_shapes": "x:2x3,y:2",
        "trt_profile_max_shapes": "x:4x3,y:4",
    }


def test_fixed_inputs_need_no_profile():
    assert profile_options(msgspec.structs.replace(SPEC, inputs={"z": SPEC.inputs["z"]})) == {}


def test_input_that_a_profile_cannot_name_is_an_error():
    with pytest.raises(RunError, match="cannot read a profile for a name with ':' or ','"):
        profile_options(msgspec.structs.replace(SPEC, inputs={"x:0": SPEC.inputs["x"]}))


def test_key_of_a_kept_engine_changes_with_all_it_depends_on():
    parts = {"model_sha256": "a" * 64, "options": {"o": "1"}, "software": {"onnxruntime-gpu": "1.31.1", "gpu": "H200"}}
    changed = [
        {"model_sha256": "b" * 64},
        {"options": {"o": "2"}},
        {"options": {}},
        {"software": {"onnxruntime-gpu": "1.31.1", "gpu": "L4"}},
        {"software": {"onnxruntime-gpu": "1.30.0", "gpu": "H200"}},
    ]
    keys = [cache_key(**parts), *(cache_key(**{**parts, **each}) for each in changed)]
    assert len(set(keys)) == len(keys)
    assert cache_key(**parts) == keys[0]
    assert len(keys[0]) == 32


def test_relative_folder_for_kept_engines_is_an_error():
    engine = make_engine("tensorrt", "fp16", trt_engine_cache_path="engines")
    with pytest.raises(RunError, match="'engines' is not an absolute path"):
        kept_folder(engine.options, "trt_engine_cache_path")
    assert kept_folder(engine.options, "trt_timing_cache_path") is None


def test_backend_refuses_options_before_it_looks_for_the_provider():
    with pytest.raises(SpecError, match="has no option"):
        backend("onnxruntime").require_supported(make_engine("cuda", "fp32", nonsense=1))


def test_provider_that_is_not_installed_says_what_to_install():
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    engine = make_engine("cuda", "fp32")
    assert backend("onnxruntime").runs_here(engine) is None
    with pytest.raises(BackendUnavailable, match="(?s)has no CUDAExecutionProvider.*pip install onnxruntime-gpu"):
        backend("onnxruntime").require_supported(engine)


def test_engine_that_is_compiled_at_load_is_not_sealed():
    assert "compiles when it loads" in backend("onnxruntime").unsealable(make_engine("tensorrt", "fp16"))
    assert backend("onnxruntime").unsealable(make_engine("cuda", "fp16")) is None


def has_gpu_and_providers(monkeypatch, *, gpu=True):
    """ONNX Runtime for GPUs, on a machine with or without one."""
    monkeypatch.setattr("gate.engines.onnxruntime.backend._has_provider", lambda _: True)
    found = Gpu(name="NVIDIA L4", compute_capability="8.9", driver="580.65") if gpu else None
    monkeypatch.setattr("gate.device.gpu", lambda: found)


def test_provider_without_a_gpu_is_unavailable_and_no_fault_of_the_spec(monkeypatch):
    has_gpu_and_providers(monkeypatch, gpu=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    for provider, precision in (("cuda", "fp32"), ("cuda", "tf32"), ("tensorrt", "tf32"), ("tensorrt", "fp32")):
        with pytest.raises(BackendUnavailable, match="there is no NVIDIA GPU here"):
            backend("onnxruntime").require_supported(make_engine(provider, precision))


def test_environment_that_contradicts_the_precision_is_refused_where_the_engine_could_run(monkeypatch):
    has_gpu_and_providers(monkeypatch)
    monkeypatch.setattr("gate.engines.onnxruntime.backend.OnnxRuntimeBackend.version", lambda _: "1.31.1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    backend("onnxruntime").require_supported(make_engine("tensorrt", "fp32"))
    with pytest.raises(SpecError, match="NVIDIA_TF32_OVERRIDE=0 turns TF32 off"):
        backend("onnxruntime").require_supported(make_engine("cuda", "tf32"))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    backend("onnxruntime").require_supported(make_engine("cuda", "tf32"))
    with pytest.raises(SpecError, match="has TF32 on and no option that turns it off"):
        backend("onnxruntime").require_supported(make_engine("tensorrt", "fp32"))


def test_old_version_without_the_provider_says_what_is_missing_and_not_that_it_is_old(monkeypatch):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    monkeypatch.setattr("gate.engines.onnxruntime.backend._installed", lambda: {"onnxruntime": "1.23.2"})
    with pytest.raises(BackendUnavailable, match=r"onnxruntime 1\.23\.2\) has no CUDAExecutionProvider"):
        backend("onnxruntime").require_supported(make_engine("cuda", "fp32"))


def test_version_that_hides_a_fallback_is_refused(monkeypatch):
    import importlib.metadata

    has_gpu_and_providers(monkeypatch)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.23.2")
    with pytest.raises(SpecError, match=r"1.23.2 does not tell which provider.*\n.*onnxruntime-gpu>=1.24.1"):
        backend("onnxruntime").require_supported(make_engine("cuda", "fp32"))
    backend("onnxruntime").require_supported(make_engine("cpu", "fp32"))


def test_graph_of_the_teams_own_is_listed_in_the_precision_that_the_provider_computes_in(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("x", "w", "z")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", infos[:2], infos[2:])), tmp_path / "model.onnx")

    def listed(precision):
        record = backend("onnxruntime").describe(
            tmp_path / "model.onnx", spec=SPEC, engine=make_engine("cuda", precision)
        )
        return {layer.type: layer.precision for layer in record.layers}

    assert listed("tf32") == {"MatMul": "tf32", "Relu": "fp32"}
    assert listed("fp32") == {"MatMul": "fp32", "Relu": "fp32"}
