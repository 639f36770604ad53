"""What is refused before a plan is deserialised."""

import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save_model

from gate.engines import backend
from gate.engines.interface import BuildRecord
from gate.engines.tensorrt.layers import inspect_plan
from gate.engines.tensorrt.plan import Host, read_header, reasons_of_diagnostics, require_compatible
from gate.errors import BackendUnavailable, IncompatibleEngine, RunError
from gate.results import Fingerprint
from gate.spec import GateSpec
from gate.verdict import Evidence

H200 = Host(name="tensorrt", version="8.6.0", compute_capability="9.0", gpu="NVIDIA H200", os="Linux x86_64")


def make_plan(version=(8, 6, 0, 12), tag=b"ftrt", serialization=0, size=128):
    head = tag + struct.pack("<IQQ", serialization, 2, size) + bytes(version)
    return head.ljust(size, b"\1")


def host(version="8.6.0", **changed):
    return Host(**{**vars(H200), "version": version, **changed})


def device(capability="9.0", os="Linux x86_64"):
    return Fingerprint(
        kind="gpu",
        name="NVIDIA H200",
        cores=1,
        isa=(),
        os=os,
        python="3.10",
        versions={},
        compute_capability=capability,
    )


def record(version="8.6.0", name="tensorrt", **options):
    return BuildRecord(backend=name, backend_version=version, precision="fp16", options=options, profile={})


def refused(data, message, here=H200, **known):
    with pytest.raises(IncompatibleEngine, match=message) as caught:
        require_compatible(data, host=here, where="model.plan", **known)
    assert caught.value.hint
    return caught.value


def test_plan_of_the_installed_version_is_let_through():
    header = require_compatible(make_plan(), host=H200, where="model.plan", record=record(), device=device())
    assert header.version == (8, 6, 0, 12)
    assert header.family == "tensorrt"
    assert header.length_bytes == len(make_plan())
    assert header.made_by == "TensorRT 8.6.0.12"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the plan is empty"),
        (b"ftrt", "the plan is truncated: 4 bytes, its header alone has 28"),
        (make_plan()[:27], "the plan is truncated: 27 bytes"),
        (make_plan(tag=b"vtrt")[:63], "the plan is truncated: 63 bytes, its header alone has 64"),
        (make_plan(tag=b"vtrt")[:-1], "the plan is truncated: 127 bytes, its header says 128"),
        (make_plan(tag=b"vtrt") + b"x", "longer than it says, or damaged: 129 bytes"),
        (b"\x08\x08\x12\x07pytorch" * 10, "it is no TensorRT plan: it begins with b'.x08"),
        (b"\0" * 200, "it is no TensorRT plan"),
        (b"gtrt" + make_plan()[4:], "it is no TensorRT plan"),
    ],
)
def test_file_that_is_no_whole_plan_is_refused(data, message):
    refused(data, message)
    if not data.startswith(b"vtrt"):
        assert read_header(data) is None


def test_plan_of_the_other_runtime_is_refused_and_says_which_backend_it_needs():
    error = refused(make_plan((1, 7, 1, 116), b"vtrt"), "it is a plan of TensorRT-RTX 1.7.1.116; .*TensorRT 8.6.0")
    assert 'backend = "tensorrt_rtx"' in (error.hint or "")
    here = Host(name="tensorrt_rtx", version="1.7.1.116", compute_capability="8.9")
    assert 'backend = "tensorrt"' in (refused(make_plan(), "it is a plan of TensorRT 8.6.0.12; ", here).hint or "")


def test_plan_of_another_version_names_both_sides_and_the_next_step():
    error = refused(
        make_plan(),
        r"the plan was built by TensorRT 8.6.0.12; here are TensorRT 10.16.1.11 and 8.9 \(L4\)",
        host("10.16.1.11", compute_capability="8.9", gpu="L4"),
    )
    assert 'Build it here (backend = "tensorrt")' in (error.hint or "")
    assert "version_compatible" in (error.hint or "")


@pytest.mark.parametrize(
    ("made", "here", "strict", "compatible"),
    [
        ((8, 6, 0, 12), "8.6.0", True, True),
        ((8, 6, 0, 12), "8.6.1", False, True),
        ((8, 6, 1, 6), "8.6.0", False, False),
        ((8, 6, 0, 12), "10.13.0.35", False, True),
        ((8, 6, 0, 12), "11.0.0.1", False, False),
        ((10, 13, 0, 35), "11.0.0.1", False, True),
        ((10, 13, 0, 35), "10.13.0.35", True, True),
        ((10, 13, 0, 35), "10.13.0.36", False, True),
        ((10, 13, 0, 35), "10.13.0.35.post1", True, True),
        ((10, 13, 0, 35), "10.12.0.36", False, False),
        ((10, 13, 0, 35), "8.6.0", False, False),
        ((10, 13, 0, 35), "unknown", False, False),
        ((10, 13, 0, 35), "10.13", False, False),
    ],
)
def test_version_is_exact_unless_the_plan_is_version_compatible(made, here, strict, compatible):
    for flag, accepted in ((False, strict), (True, compatible)):
        if accepted:
            require_compatible(make_plan(made), host=host(here), where="p", version_compatible=flag)
        else:
            refused(make_plan(made), "was built by", host(here), version_compatible=flag)


def test_build_record_decides_whether_a_plan_is_version_compatible():
    here = host("10.13.0.35")
    require_compatible(make_plan(), host=here, where="p", record=record(version_compatible=True))
    refused(make_plan(), "was built by", here, version_compatible=True, record=record())


@pytest.mark.parametrize(
    ("built", "here", "level", "accepted"),
    [
        ("9.0", "9.0", None, True),
        ("9.0", "8.9", None, False),
        ("8.0", "9.0", "ampere_plus", True),
        ("8.0", "7.5", "ampere_plus", False),
        ("8.0", "8.6", "same_compute_capability", False),
        ("8.6", "8.6", "same_compute_capability", True),
    ],
)
def test_compute_capability_is_exact_unless_the_plan_is_hardware_compatible(built, here, level, accepted):
    known = {"device": device(built), "record": record(hardware_compatible=level)}
    if accepted:
        require_compatible(make_plan(), host=host(compute_capability=here), where="p", **known)
        return
    error = refused(make_plan(), f"for compute capability {built} on ", host(compute_capability=here), **known)
    assert "hardware_compatible" in (error.hint or "")


def test_plan_of_another_platform_is_refused():
    refused(make_plan(), "on Windows AMD64; here are .* on Linux x86_64", device=device(os="Windows AMD64"))


@pytest.mark.parametrize("other", [record("10.13.0.35"), record("1.7.1.116", "tensorrt_rtx")])
def test_record_of_another_plan_is_refused(other):
    refused(make_plan(), "made by TensorRT 8.6.0.12, its build record says", record=other)


def test_version_in_an_unknown_serialization_is_left_to_the_runtime():
    header = require_compatible(make_plan(serialization=1), host=host("99.0.0"), where="p")
    assert header.version is None
    assert header.made_by == "TensorRT of unknown version"


@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_are_either_a_header_or_refused(data, tagged):
    data = b"ftrt" + data if tagged else data
    try:
        header = require_compatible(data, host=H200, where="p")
    except IncompatibleEngine:
        return
    assert header == read_header(data)
    assert header.version is None or header.version[:3] == (8, 6, 0)


def test_diagnostics_are_told_in_words_and_unknown_ones_kept():
    assert reasons_of_diagnostics(0) == ()
    assert reasons_of_diagnostics(32) == ("it is malformed or truncated",)
    assert reasons_of_diagnostics(3 | 256)[2] == "diagnostics 0x100"


def make_spec(name, weights=3):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {
                "x": {"dtype": "float32", "shape": ["n", weights], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}}
            },
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": name, "precision": "fp32", "parity": {}}],
        },
        GateSpec,
    )


def compile_plan(folder, name="tensorrt_rtx", weights=3):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weights])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((weights, 2), np.float32), "w")],
    )
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "a.onnx")
    spec, plan = make_spec(name, weights), folder / "model.plan"
    backend(name).build(onnx=folder / "a.onnx", out=plan, spec=spec, engine=spec.engines[0])
    return plan


def test_plans_of_tensorrt_rtx_have_their_version_and_length_in_the_header(tmp_path):
    rtx = backend("tensorrt_rtx")
    for weights in (3, 4096):
        data = compile_plan(tmp_path, weights=weights).read_bytes()
        header = read_header(data[:64])
        assert header is not None
        assert header.family == "tensorrt_rtx"
        assert ".".join(map(str, header.version)) == rtx.version()
        assert header.length_bytes == len(data)
        here = Host(name="tensorrt_rtx", version=rtx.version(), compute_capability="8.9")
        require_compatible(data, host=here, where="p")
        refused(data[:-1], "the plan is truncated", here)
        refused(data, "it is a plan of TensorRT-RTX", H200)


def test_backend_refuses_a_plan_without_a_gpu_and_without_deserialising(tmp_path):
    found, plan = backend("tensorrt_rtx"), compile_plan(tmp_path)
    engine = make_spec("tensorrt_rtx").engines[0]
    assert found.require_compatible(plan, engine=engine) == plan.read_bytes()
    plan.write_bytes(plan.read_bytes()[:1000])
    with pytest.raises(IncompatibleEngine, match="the plan is truncated: 1000 bytes"):
        found.require_compatible(plan, engine=engine)
    with pytest.raises(RunError, match="the plan cannot be read"):
        found.require_compatible(tmp_path / "none.plan", engine=engine)


def tensorrt_plan(folder):
    found = backend("tensorrt")
    try:
        found.version()
    except BackendUnavailable:
        pytest.skip("tensorrt is not installed")
    if found.runs_here(make_spec("tensorrt").engines[0]) is not Evidence.DEVICE:
        pytest.skip("tensorrt does not run on this GPU")
    return found, compile_plan(folder, "tensorrt")


def open_plan(found, plan):
    spec = make_spec("tensorrt")
    return found.open(plan, spec=spec, engine=spec.engines[0])


@pytest.mark.gpu
def test_gpu_plan_has_the_installed_version_in_its_header(tmp_path):
    found, plan = tensorrt_plan(tmp_path)
    header = read_header(plan.read_bytes())
    assert header is not None
    assert found.version().startswith(".".join(map(str, header.version[:3])))
    open_plan(found, plan).close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:20], "the plan is truncated"),
        (lambda data: data[: len(data) // 2], "the plan is truncated: .* its header says"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "it is no TensorRT plan"),
        (lambda data: data[:24] + bytes([data[24] ^ 1]) + data[25:], "was built by TensorRT"),
        (lambda data: b"vtrt" + data[4:], "longer than it says|truncated|plan of TensorRT-RTX"),
    ],
)
def test_gpu_damaged_plan_is_refused(tmp_path, change, message):
    found, plan = tensorrt_plan(tmp_path)
    plan.write_bytes(change(plan.read_bytes()))
    with pytest.raises(IncompatibleEngine, match=message):
        open_plan(found, plan)


@pytest.mark.gpu
def test_gpu_plan_of_tensorrt_rtx_is_refused(tmp_path):
    found, plan = tensorrt_plan(tmp_path)
    plan.write_bytes(make_plan((1, 7, 1, 116), b"vtrt"))
    with pytest.raises(IncompatibleEngine, match="it is a plan of TensorRT-RTX 1.7.1.116"):
        open_plan(found, plan)


@pytest.mark.gpu
def test_gpu_plan_is_inspected(tmp_path):
    found, plan = tensorrt_plan(tmp_path)
    told = inspect_plan("tensorrt", plan)
    assert told.runtime == f"tensorrt {found.version()}"
    assert [(each.meta.name, each.mode) for each in told.tensors] == [("x", "input"), ("y", "output")]
    assert told.profiles[0].ranges["x"] == ((1, 3), (2, 3), (4, 3))
    assert told.layers
    assert told.size_bytes == plan.stat().st_size
