"""`gate inspect` on what the gate itself makes."""

from __future__ import annotations

import json
import re
import shutil

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate import device
from gate.cli import inspect
from gate.engines.interface import CalibrationRecord, Layer, LoweringRecord
from tests.cli import conftest as tiny


@pytest.fixture
def bundle(gate_command, project):
    """A sealed bundle of the small project."""
    assert gate_command("seal", "gate.toml", "--out", "dist").code == 0
    return project / "dist" / "tiny" / "ort"


@pytest.fixture
def graph(project):
    """A graph with a dynamic axis and a node that does not multiply."""
    weights = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
            helper.make_node("Relu", ["h"], ["y"], name="relu"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    path = project / "graph.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def rtx_plan(tmp_path_factory):
    """A plan of TensorRT-RTX, compiled here through its backend."""
    from gate.engines import backend
    from gate.spec import spec_from_text

    folder = tmp_path_factory.mktemp("rtx")
    text = tiny.SPEC.replace('"onnxruntime"', '"tensorrt_rtx"').replace(
        "  [engine.parity]\n", 'evidence = "preflight"\n'
    )
    file = spec_from_text(text, path=folder / "gate.toml")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["y"], name="matmul")],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    out = folder / "model.plan"
    backend("tensorrt_rtx").build(onnx=path, out=out, spec=file.spec, engine=file.spec.engines[0])
    return out


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device.gpu.cache_clear()
    yield
    device.gpu.cache_clear()


def test_bundle_shows_what_it_is_and_whether_its_precision_was_delivered(gate_command, bundle):
    outcome = gate_command("inspect", str(bundle))
    assert outcome.code == 0, outcome.err
    assert "bundle of engine ort" in outcome.out
    assert "fp32   PASSED  1 >= 1 (default)" in outcome.out
    assert "profile input  min [1, 4] · opt [4, 4] · max [16, 4]" in outcome.out
    assert "compute layers   1: 1 fp32" in outcome.out


def test_json_of_a_bundle_is_complete(gate_command, bundle):
    found = json.loads(gate_command("inspect", str(bundle), "--json").out)
    metadata = json.loads((bundle / "artifacts/metadata.json").read_bytes())
    assert found["kind"] == "bundle"
    assert found["precision"] == metadata["precision"]
    assert found["layers"] == metadata["build"]["layers"]
    assert found["options"] == metadata["build"]["options"]
    assert found["delivered_precision"]["status"] == "PASSED"
    assert found["sha256"] == metadata["files"]["artifacts/model.onnx"]["sha256"]


def test_bundle_that_was_changed_is_refused_before_it_is_read(gate_command, bundle):
    (bundle / "artifacts/model.onnx").write_bytes(b"other")
    for path in (bundle, bundle / "artifacts/model.onnx"):
        outcome = gate_command("inspect", str(path), "--json")
        assert outcome.code == 4
        assert outcome.out == ""
        assert outcome.err.startswith("REFUSED  ")


def test_file_of_a_bundle_is_inspected_as_that_bundle(gate_command, bundle):
    found = json.loads(gate_command("inspect", str(bundle / "artifacts/model.onnx"), "--json").out)
    assert found["kind"] == "bundle"
    assert found["notes"][0].startswith("a file of the bundle ")


def test_folder_of_bundles_names_them(gate_command, bundle):
    outcome = gate_command("inspect", str(bundle.parents[1]))
    assert outcome.code == 2
    assert "is a folder, not a bundle (no seals/verdict.dsse.json)" in outcome.err
    assert f"gate inspect {bundle}" in outcome.err


def test_folder_that_is_no_bundle_is_a_usage_error(gate_command, project):
    (project / "plain").mkdir()
    outcome = gate_command("inspect", "plain")
    assert outcome.code == 2
    assert "plain: is a folder, not a bundle (no seals/verdict.dsse.json)" in outcome.err


def test_folder_inside_a_bundle_names_the_bundle(gate_command, bundle):
    outcome = gate_command("inspect", str(bundle / "artifacts"))
    assert outcome.code == 2
    assert f"is a folder inside the bundle {bundle}" in outcome.err
    assert f"gate inspect {bundle}" in outcome.err


def test_bundle_without_its_manifest_is_refused(gate_command, bundle):
    (bundle / "seals/verdict.dsse.json").unlink()
    assert gate_command("inspect", str(bundle)).code == 4


def test_bundle_names_its_file_and_only_options_that_were_chosen(gate_command, bundle):
    outcome = gate_command("inspect", str(bundle))
    assert re.search(r"^  file +artifacts/model.onnx$", outcome.out, re.MULTILINE)
    assert "null" not in outcome.out
    assert "optimization" not in outcome.out
    found = json.loads(gate_command("inspect", str(bundle), "--json").out)
    assert found["file"] == "artifacts/model.onnx"
    assert found["options"]["optimization"] == "all"


def quantised(run):
    """The run with its engine quantised, and something to be warned of."""
    calibration = CalibrationRecord(
        tool="onnxruntime 1.31.1", method="percentile", percentile=99.9, samples=4, sha256="b" * 64
    )
    lowering = LoweringRecord(
        precision="fp32", tool="quantize_static", tool_version="1.31.1", opset=17, layers=(), calibration=calibration
    )
    engine = msgspec.structs.replace(run.engines[0], lowering=lowering, warnings=("calibrated on 4 samples",))
    return msgspec.structs.replace(run, engines=(engine,))


@pytest.fixture
def warned(gate_command, project, monkeypatch):
    """A sealed bundle of a quantised engine with a warning."""
    from gate import pipeline

    plain = pipeline.check
    monkeypatch.setattr(pipeline, "check", lambda *args, **more: quantised(plain(*args, **more)))
    outcome = gate_command("seal", "gate.toml", "--out", "dist")
    assert outcome.code == 0, outcome.err
    return project / "dist" / "tiny" / "ort"


def test_bundle_says_how_it_was_lowered_and_what_to_be_warned_of(gate_command, warned):
    outcome = gate_command("inspect", str(warned))
    assert re.search(r"^  lowered +fp32 by quantize_static 1\.31\.1$", outcome.out, re.MULTILINE)
    assert re.search(
        r"^  calibrated +by onnxruntime 1\.31\.1, percentile 99\.9, on 4 samples$", outcome.out, re.MULTILINE
    )
    assert re.search(r"^  note +calibrated on 4 samples$", outcome.out, re.MULTILINE)
    found = json.loads(gate_command("inspect", str(warned), "--json").out)
    assert found["lowering"]["calibration"]["percentile"] == 99.9


def test_verifying_shows_warnings(gate_command, warned):
    lines = gate_command("verify", str(warned)).out.splitlines()
    assert lines[-2] == "   note        calibrated on 4 samples"
    assert lines[-1].startswith(f"INTACT  {warned}   who made it is not known")
    assert json.loads(gate_command("verify", "--json", str(warned)).out)["warnings"] == ["calibrated on 4 samples"]


def test_options_are_shown_one_a_line_where_they_were_chosen():
    options = {
        "threads": 2,
        "optimization": "basic",
        "provider": "CPUExecutionProvider",
        "a": None,
        "b": False,
        "c": {},
    }
    found = inspect.Inspected(path="d", kind="bundle", engine="e", sha256="0" * 64, size_bytes=1, options=options)
    lines = [line.strip() for line in inspect.render(found).splitlines()]
    assert lines[-2:] == ["options  threads = 2", 'optimization = "basic"']


def test_device_of_what_did_not_run_is_where_it_was_compiled():
    common = {"path": "d", "kind": "bundle", "engine": "e", "sha256": "0" * 64, "size_bytes": 1, "device": "AMD"}
    assert "  compiled on  AMD" in inspect.render(inspect.Inspected(**common, evidence="preflight"))
    assert "  device  AMD" in inspect.render(inspect.Inspected(**common, evidence="host"))


def test_truncated_graph_is_said_to_be_one(gate_command, project, graph):
    path = project / "cut.onnx"
    for kept in (graph.stat().st_size - 5, 20, 1):
        path.write_bytes(graph.read_bytes()[:kept])
        outcome = gate_command("inspect", str(path))
        assert outcome.code == 2
        assert "looks like ONNX and is truncated or damaged" in outcome.err


def test_graph_shows_inputs_opset_and_its_compute_layers(gate_command, graph):
    outcome = gate_command("inspect", str(graph))
    assert outcome.code == 0, outcome.err
    assert "x float32 [batch, 4]" in outcome.out
    assert "opset    17" in outcome.out
    assert "matmul  MatMul  fp32" in outcome.out
    assert "relu" not in outcome.out
    assert "1 other layers are not shown: --layers all" in outcome.out
    assert "relu" in gate_command("inspect", str(graph), "--layers", "all").out


def test_json_of_a_graph_has_all_layers_whatever_is_shown(gate_command, graph):
    found = json.loads(gate_command("inspect", str(graph), "--json").out)
    assert [layer["name"] for layer in found["layers"]] == ["matmul", "relu"]
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert found["counts"] == {"fp32": 2}
    assert found["compute_counts"] == {"fp32": 1}
    assert found["delivered_precision"] is None


@pytest.mark.usefixtures("without_gpu")
def test_plan_without_a_gpu_shows_its_header_and_says_what_is_missing(gate_command, rtx_plan):
    outcome = gate_command("inspect", str(rtx_plan))
    assert outcome.code == 0
    assert "backend  tensorrt_rtx 1." in outcome.out
    assert "read on the GPU that it was built for, and there is none here" in outcome.out
    found = json.loads(gate_command("inspect", str(rtx_plan), "--json").out)
    assert found["kind"] == "plan"
    assert found["layers"] is found["counts"] is found["precision"] is None


def test_plan_on_a_gpu_shows_what_its_engine_says():
    from gate.engines.tensorrt.layers import InspectedTensor, Inspection, Profile
    from gate.engines.tensorrt.plan import PlanHeader
    from gate.tensors import TensorMeta

    ranges = {"x": ((1, 4), (4, 4), (16, 4))}
    inspection = Inspection(
        header=PlanHeader(family="tensorrt", version=(8, 6, 0, 12), length_bytes=None),
        runtime="tensorrt 8.6.0",
        layers=(Layer("conv", "CaskConvolution", "fp16", "sm80_x", "Row major"), Layer("shuffle", "Shuffle", "fp32")),
        profiles=(Profile(index=0, ranges=ranges), Profile(index=1, ranges=ranges)),
        tensors=(
            InspectedTensor(TensorMeta("x", "float32", (None, 4)), "input"),
            InspectedTensor(TensorMeta("y", "float16", (None, 3)), "output"),
        ),
        device_memory_bytes=2**20,
        size_bytes=10,
    )
    bare = inspect.Inspected(path="m.plan", kind="plan", sha256="0" * 64, size_bytes=10, backend="tensorrt")
    found = inspect.with_inspection(bare, inspection)
    assert found.inputs == (inspect.Tensor("x", "float32", [None, 4]),)
    assert found.outputs == (inspect.Tensor("y", "float16", [None, 3]),)
    assert found.profile == {"x": {"min": [1, 4], "opt": [4, 4], "max": [16, 4]}}
    assert found.compute_counts == {"fp16": 1}
    assert found.counts == {"fp16": 1, "fp32": 1}
    screen = inspect.render(found)
    assert "conv  CaskConvolution  fp16       sm80_x  Row major" in screen
    assert "2 optimization profiles; the first is shown" in screen


@pytest.mark.parametrize("kept", [0, 3, 20, 63, 64, 1000])
def test_truncated_plan_is_an_error(gate_command, project, rtx_plan, kept):
    path = project / "model.plan"
    path.write_bytes(rtx_plan.read_bytes()[:kept])
    outcome = gate_command("inspect", str(path))
    assert outcome.code == 2
    assert "truncated" in outcome.err or "only the beginning of one" in outcome.err


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x08\x08", bytes(range(256)) * 8, b"ftrt"], ids=repr
)
def test_file_that_is_none_of_these_is_an_error(gate_command, project, content):
    path = project / "what"
    path.write_bytes(content)
    outcome = gate_command("inspect", str(path))
    assert outcome.code == 2
    assert "a bundle, a plan of TensorRT" in outcome.err


def test_path_that_is_not_there_is_an_error(gate_command):
    outcome = gate_command("inspect", "nowhere.onnx")
    assert outcome.code == 2
    assert "there is no such file" in outcome.err


def test_external_weights_that_are_missing_are_noted(gate_command, project, graph):
    model = onnx.load(graph)
    onnx.save(model, project / "big.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (project / "w.bin").unlink()
    outcome = gate_command("inspect", "big.onnx")
    assert outcome.code == 0
    assert "external data 'w.bin' is missing" in outcome.out


def test_package_of_aotinductor_says_its_device(gate_command, project):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    import warnings

    import torch

    model = torch.nn.Linear(4, 3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.zeros(2, 4),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(project / "model.pt2"))
    outcome = gate_command("inspect", "model.pt2")
    assert outcome.code == 0, outcome.err
    assert "AOTInductor package" in outcome.out
    assert "device   cpu, " in outcome.out


def test_long_names_lose_their_middle_on_a_terminal_alone():
    name = "/backbone/" + "block/" * 20 + "Conv"
    found = inspect.Inspected(
        path="a.onnx", kind="onnx", sha256="0" * 64, size_bytes=1, layers=(Layer(name, "Conv", "fp16", "sm80", ""),)
    )
    assert name in inspect.render(found)
    short = inspect.render(found, shorten=True)
    assert name not in short
    assert "…" in short
    assert "sm80" in short
    assert "format" not in short
