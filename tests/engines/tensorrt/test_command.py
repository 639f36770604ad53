"""The vendor's tool does the same build and the same measurement, with the flags of its version."""

from pathlib import Path

import msgspec
import pytest

from gate.engines.interface import BuildRecord
from gate.engines.tensorrt.command import Facts, build_command, major_of, run_command
from gate.spec import GateSpec

ONNX, PLAN = Path("/cache/a.onnx"), Path("/cache/model.plan")
HALVES = [{"n": {"min": 1, "opt": 1, "max": 2}}, {"n": {"min": 3, "opt": 4, "max": 4}}]


def make_spec(backend="tensorrt", precision="fp16", *, static=False, **engine):
    axes = {} if static else {"n": {"min": 1, "opt": 2, "max": 4}}
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {"x": {"dtype": "float32", "shape": [2 if static else "n", 3], "axes": axes}},
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": backend, "precision": precision, "parity": {}, **engine}],
        },
        GateSpec,
    )


def built(spec, **facts):
    name = spec.engines[0].backend
    return build_command(
        name, ONNX, PLAN, spec=spec, engine=spec.engines[0], facts=Facts(**{"major": 10, "typed": True, **facts})
    )


def run(spec, version="10.13.0", **options):
    engine = spec.engines[0]
    record = BuildRecord(
        backend=engine.backend, backend_version=version, precision=engine.precision, options=options, profile={}
    )
    return run_command(PLAN, spec=spec, engine=engine, record=record)


SHAPES = "--minShapes=x:1x3 --optShapes=x:2x3 --maxShapes=x:4x3"
START = "trtexec --onnx=a.onnx --saveEngine=model.plan --skipInference"


def test_weakly_typed_build_has_its_flags():
    spec = make_spec(precision="int8", task={}, options={"builder_optimization_level": 2})
    assert built(spec, major=8, typed=False, flags=("INT8", "FP16")) == (
        f"{START} {SHAPES} --int8 --fp16 --noTF32 --profilingVerbosity=detailed --builderOptimizationLevel=2"
    )


@pytest.mark.parametrize(("major", "flag"), [(10, " --stronglyTyped"), (11, "")])
def test_strong_typing_is_a_flag_until_it_is_all_there_is(major, flag):
    assert built(make_spec(), major=major) == f"{START} {SHAPES}{flag} --noTF32 --profilingVerbosity=detailed"


def test_tf32_is_left_on_where_it_is_on():
    assert "--noTF32" not in built(make_spec(precision="tf32"), tf32=True)


def test_fixed_shapes_need_no_profile():
    assert "Shapes" not in built(make_spec(static=True))


def test_several_profiles_are_numbered_from_10_on():
    spec = make_spec(options={"profiles": HALVES})
    assert (
        "--profile=0 --minShapes=x:1x3 --optShapes=x:1x3 --maxShapes=x:2x3 "
        "--profile=1 --minShapes=x:3x3 --optShapes=x:4x3 --maxShapes=x:4x3"
    ) in built(spec)
    assert built(spec, major=8) is None


def test_every_option_has_its_flag():
    options = {
        "workspace_mib": 64,
        "timing_cache": "/somewhere/t.cache",
        "version_compatible": True,
        "hardware_compatible": "same_compute_capability",
        "strip_weights": True,
    }
    command = built(
        make_spec(options=options),
        tactic_sources=["JIT"],
        all_tactic_sources=["CUDNN", "JIT"],
        plugins={"a b.so": "static", "c.so": "dynamic"},
    )
    assert command.endswith(
        "--memPoolSize=workspace:64 --timingCacheFile=t.cache --tacticSources=-CUDNN,+JIT '--staticPlugins=a b.so' "
        "--dynamicPlugins=c.so --versionCompatible --hardwareCompatibilityLevel=sameComputeCapability --stripWeights"
    )


def test_calibration_cache_is_given_without_its_first_line():
    spec = make_spec(precision="int8", task={}, options={"typing": "weak", "calibration_cache": "/data/my cache"})
    command = built(spec, typed=False, flags=("INT8", "FP16"))
    assert command.startswith("tail -n +2 'my cache' > 'my cache.raw' && trtexec --onnx=a.onnx")
    assert "'--calib=my cache.raw'" in command


def test_constrained_layers_are_named():
    command = built(make_spec(), typed=False, flags=("FP16",), constraints={"/a": "fp32", "/b": "fp16"})
    assert "--layerPrecisions=/a:fp32,/b:fp16 --layerOutputTypes=/a:fp32,/b:fp16 --precisionConstraints=obey" in command


def test_rtx_has_its_own_tool_and_no_precision_flags():
    assert built(make_spec("tensorrt_rtx")) == (
        f"tensorrt_rtx --onnx=a.onnx --saveEngine=model.plan --skipInference {SHAPES}"
    )


@pytest.mark.parametrize(("name", "version", "major"), [("tensorrt", "8.6.0", 8), ("tensorrt_rtx", "1.7.1", 11)])
def test_major_version(name, version, major):
    assert major_of(name, version) == major


def test_latency_is_measured_as_the_spec_says():
    latency = {"batch": 1, "timed": "gpu_compute", "samples": 500, "warm_up_s": 0.25, "p50_ms": 1}
    assert run(make_spec(latency=latency, options={"cuda_graph": True})) == (
        "trtexec --loadEngine=model.plan --shapes=x:1x3 --iterations=500 --duration=0 --warmUp=250 "
        "--percentile=50,90,95,99 --noDataTransfers --useCudaGraph"
    )
    latency = {"batch": 4, "p50_ms": 1}
    assert run(make_spec(latency=latency)) == (
        "trtexec --loadEngine=model.plan --shapes=x:4x3 --iterations=200 --duration=0 --warmUp=1000 "
        "--percentile=50,90,95,99 --exposeDMA"
    )


def test_latency_without_a_table_takes_its_defaults():
    assert "--shapes=x:1x3 --iterations=200" in run(make_spec())
    assert "--shapes" not in run(make_spec(static=True))


def test_latency_takes_the_profile_that_holds_the_batch():
    def batch(size):
        return make_spec(latency={"batch": size, "p50_ms": 1}, options={"profiles": HALVES})

    assert "--shapes=x:4x3 --useProfile=1" in run(batch(4))
    assert "--useProfile" not in run(batch(2))
    assert "--useProfile" not in run(batch(2), "8.6.0")
    assert run(batch(4), "8.6.0") is None
    assert run(batch(5)) is None


def test_latency_loads_the_plugins_of_the_build():
    assert run(make_spec(), plugins={"a.so": "dynamic"}).endswith("--exposeDMA --dynamicPlugins=a.so")
