"""Engines from the cache: reused only while nothing that decides what is built has changed."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from gate import device
from gate.atomic import digest_of_file
from gate.engines.fake import FakeBackend
from gate.engines.interface import CALIBRATION_NAME
from gate.errors import DataError
from gate.reference import ModelIdentity, RecordedGraph
from gate.spec import read_spec
from gate.steps import make
from gate.steps.context import CheckOptions, Context, Exported, Silence
from gate.steps.make import lowered_graph, make_engine
from gate.verdict import Evidence

SPEC = """schema = 1
[model]
id = "m"
factory = "model:load"
output_names = ["scores"]
[inputs.x]
dtype = "float32"
shape = ["batch", 2]
batch = { min = 1, opt = 4, max = 8 }
[data]
source = "data:evaluation"
samples = 8
calibration = "data:calibration"
calibration_samples = 6
[[engine]]
name = "packaged"
backend = "torch"
precision = "fp32"
options = { mode = "aotinductor" }
  [engine.parity]
[[engine]]
name = "weak"
backend = "tensorrt"
precision = "int8"
options = { typing = "weak", calibration_cache = "ranges.cache" }
  [engine.parity]
  top1_agreement_at_least = 0.5
[[engine]]
name = "quantised"
backend = "onnxruntime"
precision = "int8"
  [engine.parity]
  top1_agreement_at_least = 0.5
"""
DATA = """
import numpy as np


def evaluation():
    return [(each, 0) for each in np.arange(16, dtype=np.float32).reshape(8, 2)]


def calibration():
    return [(each, 0) for each in -1 - np.arange(16, dtype=np.float32).reshape(8, 2)]
"""


class Counting(FakeBackend):
    """A backend that counts its builds and, where it is told to, calibrates: it writes the ranges that it found."""

    def __init__(self, *, origin="lowered", evidence=Evidence.HOST, ranges=None):
        super().__init__(lambda feed: {"scores": feed["x"]}, evidence=evidence)
        self.builds = 0
        self._origin = origin
        self.ranges = ranges

    def origin(self, engine):
        return self._origin

    def build(self, *, onnx, out, spec, engine, resources=None):
        self.builds += 1
        source = onnx
        if source is None:
            source = out.with_name("model.in")
            source.write_bytes(b"the model")
        record = super().build(onnx=source, out=out, spec=spec, engine=engine, resources=resources)
        if onnx is None:
            source.unlink()
        if self.ranges is not None:
            kept = Path(engine.options.calibration_cache)
            if not kept.is_file():
                kept.write_bytes(self.ranges)
            out.with_name(CALIBRATION_NAME).write_bytes(self.ranges)
        return record


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "gate.toml").write_text(SPEC)
    (tmp_path / "data.py").write_text(DATA)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["scores"])]
    weights = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in ("x", "scores")]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], [weights])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    return tmp_path


def opened(folder, *, reference=None):
    """A run of the spec whose model and export are known already."""
    options = CheckOptions(cache=folder / "cache", reference=reference)
    run = Context(read_spec(folder / "gate.toml"), options, Silence())
    run.identity = ModelIdentity("a" * 64, "b" * 64, "torch fp32")
    run.graph = Exported(folder / "model.onnx", "c" * 64, 18, reused=False)
    run.open_samples()
    return run


def builds(folder, backend, name):
    """How many builds one more run takes."""
    before = backend.builds
    run = opened(folder)
    make_engine(run, run.file.engine(name), backend)
    return backend.builds - before


def test_engine_that_nothing_changed_for_is_reused(folder):
    backend = Counting(origin="model")
    assert [builds(folder, backend, "packaged") for _ in range(2)] == [1, 0]


def test_engine_of_pytorch_is_built_anew_on_a_processor_with_other_instructions(folder, monkeypatch):
    backend = Counting(origin="model")
    assert builds(folder, backend, "packaged") == 1
    monkeypatch.setattr(device, "_isa", lambda: ("avx2",))
    assert builds(folder, backend, "packaged") == 1
    monkeypatch.setattr(device.platform, "machine", lambda: "riscv64")
    assert builds(folder, backend, "packaged") == 1
    assert builds(folder, backend, "packaged") == 0


def test_engine_of_pytorch_is_built_anew_when_its_outputs_are_named_otherwise(folder):
    backend = Counting(origin="model")
    assert builds(folder, backend, "packaged") == 1
    (folder / "gate.toml").write_text(SPEC.replace('"scores"', '"logits"'))
    assert builds(folder, backend, "packaged") == 1


def test_engine_on_a_gpu_is_built_anew_when_tf32_is_kept_off_it(folder, monkeypatch):
    backend = Counting(origin="exported", evidence=Evidence.DEVICE, ranges=None)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert [builds(folder, backend, "weak") for _ in range(2)] == [1, 0]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert [builds(folder, backend, "weak") for _ in range(2)] == [1, 0]


def test_another_version_of_the_gate_builds_anew(folder, monkeypatch):
    backend = Counting(origin="model")
    assert builds(folder, backend, "packaged") == 1
    monkeypatch.setattr("gate.__version__", "99.0")
    assert builds(folder, backend, "packaged") == 1


def test_engine_whose_build_wrote_the_calibration_cache_is_reused(folder):
    backend = Counting(origin="exported", ranges=b"ranges")
    assert [builds(folder, backend, "weak") for _ in range(3)] == [1, 0, 0]
    run = opened(folder)
    made = make_engine(run, run.file.engine("weak"), backend)
    assert digest_of_file(made.path).sha256 == made.sha256
    assert made.path.with_name(CALIBRATION_NAME).read_bytes() == b"ranges"


def test_engine_is_built_anew_for_other_ranges_than_its_build_wrote(folder):
    backend = Counting(origin="exported", ranges=b"ranges")
    assert builds(folder, backend, "weak") == 1
    (folder / "ranges.cache").write_bytes(b"other")
    assert builds(folder, backend, "weak") == 1


def test_calibration_cache_that_another_program_wrote_meanwhile_does_not_stand_for_the_build(folder):
    class Meanwhile(Counting):
        def build(self, *, onnx, out, spec, engine, resources=None):
            Path(engine.options.calibration_cache).write_bytes(b"of another program")
            return super().build(onnx=onnx, out=out, spec=spec, engine=engine, resources=resources)

    backend = Meanwhile(origin="exported", ranges=b"ranges")
    assert [builds(folder, backend, "weak") for _ in range(2)] == [1, 1]


def recorded(folder, monkeypatch, calibration_sha256):
    """A run whose recording holds the int8 graph, calibrated on samples of this digest."""
    graph = RecordedGraph(folder / "model.onnx", 18, calibration_sha256)
    monkeypatch.setattr(make, "recorded_graph", lambda _folder, _name: graph)
    run = opened(folder, reference=folder / "recorded")
    return lowered_graph(run, run.file.engine("quantised"), run.graph), run


def test_recorded_graph_of_the_same_calibration_samples_is_taken(folder, monkeypatch):
    digest = opened(folder).calibration()[1].inputs_sha256
    lowered, _ = recorded(folder, monkeypatch, digest)
    assert lowered.calibration_sha256 == digest


@pytest.mark.parametrize("before", ["fewer", "none"])
def test_recorded_graph_of_other_calibration_samples_is_refused(folder, monkeypatch, before):
    digest = opened(folder).calibration()[1].inputs_sha256
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "gate.toml").write_text(SPEC.replace("calibration_samples = 6", "calibration_samples = 5"))
    here = opened(folder).calibration()[1].inputs_sha256
    then = digest if before == "fewer" else None
    said = f"recorded {'none' if then is None else then[:12] + '…'}, .*gives {here[:12]}….*gate record"
    with pytest.raises(DataError, match=f"(?s)graph in int8 was calibrated on other samples .{said}"):
        recorded(folder, monkeypatch, then)
