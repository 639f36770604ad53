"""What an engine of the spec may ask for: options by backend, lowering, profiles, evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gate.errors import SpecError
from gate.spec import EngineSpec, located, spec_from_text

HEAD = """schema = 1
[model]
id = "m"
factory = "model:load"
[inputs.x]
dtype = "float32"
shape = ["batch", 3, "width"]
batch = { min = 1, opt = 4, max = 8 }
width = { min = 8, opt = 16, max = 32 }
[data]
source = "data:evaluation"
calibration = "data:calibration"
samples = 10
[task]
kind = "classification"
[[engine]]
name = "e"
"""
CHECKED = "  [engine.parity]\n  top1_agreement_at_least = 0.9\n"
ONE = "{ batch = { min = 1, opt = 1, max = 1 }, width = { min = 8, opt = 16, max = 32 } }"
REST = "{ batch = { min = 2, opt = 4, max = 8 }, width = { min = 8, opt = 16, max = 32 } }"


def engine(lines: str, checks: str = CHECKED, head: str = HEAD) -> EngineSpec:
    return spec_from_text(head + lines + "\n" + checks, path=Path("gate.toml")).spec.engines[0]


def table(backend: str, precision: str, *more: str) -> str:
    return "\n".join((f'backend = "{backend}"', f'precision = "{precision}"', *more))


@pytest.mark.parametrize(
    "lines",
    [
        table("onnxruntime", "tf32", 'options = { provider = "cuda" }'),
        table(
            "onnxruntime", "fp16", 'options = { provider = "tensorrt", provider_options = { trt_fp16_enable = true } }'
        ),
        table("torch", "fp32"),
        table("torch", "tf32", 'evidence = "device"'),
        table("torch", "fp16", 'options = { mode = "aotinductor", cast = "weights" }'),
        table(
            "tensorrt", "int8", 'options = { typing = "weak", calibrator = "minmax", calibration_cache = "c.cache" }'
        ),
        table(
            "tensorrt", "fp16", 'options = { tf32 = true, layer_precisions = { "/head/*" = "fp32" }, typing = "weak" }'
        ),
        table("tensorrt", "fp16", f"options = {{ profiles = [{ONE}, {REST}] }}"),
        table("tensorrt", "int8", 'lowering = { tool = "modelopt", method = "max", exclude_nodes = ["/head/.*"] }'),
        table("tensorrt", "int8", 'lowering = { method = "percentile", percentile = 99.9 }'),
        table("tensorrt", "fp8"),
        table("tensorrt", "fp16", "lowering = { data_max = 1000.0 }", "rebuilds = 3"),
    ],
)
def test_what_the_backends_have_is_taken(lines: str) -> None:
    engine(lines)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (table("onnxruntime", "tf32"), "tf32 needs a GPU"),
        (table("onnxruntime", "fp32", 'evidence = "device"'), 'provider = "cuda"'),
        (table("onnxruntime", "fp32", 'evidence = "host"', 'options = { provider = "cuda" }'), "runs on a GPU here"),
        (table("onnxruntime", "fp32", "options = { cpu_nodes_at_most = 0.1 }"), "cpu_nodes_at_most needs provider"),
        (table("onnxruntime", "fp32", "options = { cuda_graph = true }"), "has no option 'cuda_graph'"),
        (table("torch", "tf32"), 'add evidence = "device"'),
        (table("torch", "int8"), "backend 'torch' has no int8"),
        (table("torch", "fp32", 'onnx = "m.onnx"'), "not from ONNX"),
        (table("torch", "fp32", 'plan = "m.pt2"'), "AOTInductor package"),
        (table("torch", "fp32", 'options = { cast = "weights" }'), "cast is for fp16 and bf16"),
        (table("torch", "fp16", "lowering = { data_max = 9.0 }"), "backend 'torch' is not lowered"),
        (table("tensorrt", "int8", 'options = { calibrator = "minmax" }'), 'calibrator needs typing = "weak"'),
        (
            table("tensorrt", "fp16", 'options = { typing = "weak", calibrator = "minmax" }'),
            "calibrator is for int8, the precision is fp16",
        ),
        (table("tensorrt", "fp8", 'options = { typing = "weak" }'), "fp8 is explicit Q/DQ"),
        (table("tensorrt", "fp32", "options = { tf32 = true }"), 'ask for precision = "tf32"'),
        (table("tensorrt", "fp16", "options = { profiles = [] }"), "profiles is empty"),
        (table("tensorrt", "fp16", f"options = {{ profiles = [{ONE}] }}"), r"no profile holds batch = 2.*1 to 8"),
        (
            table(
                "tensorrt", "fp16", f"options = {{ profiles = [{ONE}, {{ batch = {{ min = 2, opt = 2, max = 8 }} }}] }}"
            ),
            "profile 1 has no range for axis 'width'",
        ),
        (
            table("tensorrt", "fp16", f"options = {{ profiles = [{ONE}, {REST.replace('max = 8', 'max = 9')}] }}"),
            r"profile 1 batch: needs min <= opt <= max within 1 to 8, got 2, 4, 9",
        ),
        (
            table("tensorrt", "fp16", f"options = {{ profiles = [{ONE.replace('batch', 'bathc')}, {REST}] }}"),
            "did you mean 'batch'",
        ),
        (table("tensorrt", "fp32", "lowering = { data_max = 9.0 }"), "fp32 is not lowered"),
        (
            table("tensorrt", "fp16", 'lowering = { method = "entropy" }'),
            "method is not for fp16; it takes exclude_nodes",
        ),
        (table("tensorrt", "int8", 'lowering = { method = "max" }'), "method 'max' is not of onnxruntime"),
        (
            table("tensorrt", "int8", 'lowering = { tool = "modelopt", method = "percentile" }'),
            "method 'percentile' is not of modelopt; it has max, entropy",
        ),
        (table("tensorrt", "int8", "lowering = { percentile = 99.0 }"), 'percentile needs method = "percentile"'),
        (table("tensorrt", "int8", 'lowering = { tool = "none", method = "minmax" }'), "takes the graph as it is"),
        (table("tensorrt", "fp8", 'lowering = { tool = "onnxruntime" }'), "fp8 is made by modelopt"),
        (table("tensorrt", "int8", 'lowering = { exclude_nodes = ["("] }'), "is no regular expression"),
        (
            table("tensorrt", "fp16", 'options = { typing = "weak" }', "lowering = { data_max = 9.0 }"),
            'typing = "weak" compiles the FP32 graph',
        ),
        (table("tensorrt", "fp16", 'onnx = "a.onnx"', "lowering = { data_max = 9.0 }"), "does nothing beside an onnx"),
        (table("tensorrt", "fp16", 'plan = "a.plan"', "rebuilds = 2"), "cannot be built again"),
        (
            table("tensorrt", "fp16", 'options = { timing_cache = "t.cache" }', "rebuilds = 2"),
            "every build choose what the first one chose",
        ),
        (
            table("tensorrt", "fp16", 'options = { typing = "weak", layer_precisions = { "/x" = "int4" } }'),
            r"/x: must be one of bf16, fp16, fp32, int8, got 'int4'",
        ),
        (table("tensorrt", "fp16", 'typing = "weak"'), r"no key 'typing'; it belongs into \[engine\.options\]"),
        (table("tensorrt", "fp16", "options = { rebuilds = 3 }"), r"no key 'rebuilds'; it belongs into \[\[engine\]\]"),
        (table("tensorrt", "int4"), r"must be one of bf16, .*, tf32, got 'int4'$"),
        (table("tensorrt", "fp16", "rebuilds = 0"), "rebuilds: expected `?int`? >= 1"),
    ],
)
def test_what_contradicts_itself_is_named(lines: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        engine(lines)


@pytest.mark.parametrize(
    ("lines", "checks", "message"),
    [
        (
            table("onnxruntime", "fp32"),
            '  [engine.latency]\n  timed = "gpu_compute"\n  p50_ms = 1.0\n',
            'timed = "gpu_compute" needs an engine on a GPU',
        ),
        (
            table("onnxruntime", "fp32"),
            "  [engine.memory]\n  device_peak_mib = 10.0\n",
            "device_peak_mib needs an engine on a GPU",
        ),
        (
            table("tensorrt_rtx", "fp16", 'evidence = "preflight"'),
            "  [engine.memory]\n  device_peak_mib = 10.0\n",
            "has no device_peak_mib",
        ),
        (table("tensorrt_rtx", "fp16", 'evidence = "preflight"', "rebuilds = 2"), "", "rebuilds have no answers"),
        (table("torch", "fp16", 'evidence = "preflight"'), "", "ahead of time only with"),
        (table("tensorrt", "fp8"), "  [engine.parity]\n", "fp8 is decided by its answers"),
    ],
)
def test_a_check_that_cannot_be_made_is_named(lines: str, checks: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        engine(lines, checks)


def test_a_quantised_engine_without_calibration_is_told_of_both_ways() -> None:
    head = HEAD.replace('calibration = "data:calibration"\n', "")
    with pytest.raises(SpecError, match=r'calibration = "module:function".*tool = "none"'):
        engine(table("tensorrt", "fp8"), head=head)
    engine(table("tensorrt", "fp8", 'lowering = { tool = "none" }'), head=head)


def test_weak_int8_without_calibration_is_told_of_the_one_way_it_has() -> None:
    head = HEAD.replace('calibration = "data:calibration"\n', "")
    with pytest.raises(SpecError, match=r"to \[data\]$"):
        engine(table("tensorrt", "int8", 'options = { typing = "weak" }'), head=head)


def test_a_torch_engine_needs_the_model_itself() -> None:
    with pytest.raises(SpecError, match=r"\[model\] needs a factory"):
        engine(table("torch", "fp32"), head=HEAD.replace('factory = "model:load"', 'onnx = "m.onnx"'))


def test_evidence_follows_from_where_it_runs() -> None:
    assert engine(table("torch", "fp32")).required_evidence == "host"
    assert engine(table("onnxruntime", "fp32", 'options = { provider = "cuda" }')).required_evidence == "device"
    assert engine(table("tensorrt", "fp32")).required_evidence == "device"


def test_paths_of_options_start_from_the_folder_of_the_spec() -> None:
    given = engine(table("tensorrt", "fp16", 'options = { plugins = ["a.so", "/b.so"], timing_cache = "t.cache" }'))
    options = located(given, Path("/specs")).options
    assert options.plugins == ("/specs/a.so", "/b.so")
    assert options.timing_cache == "/specs/t.cache"
    plain = engine(table("tensorrt", "fp16"))
    assert located(plain, Path("/specs")) is plain
