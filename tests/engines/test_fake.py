"""The fake that is shipped for users' tests keeps the Protocols."""

import msgspec
import numpy as np
import pytest

from gate.engines.fake import FakeBackend, FakeRunner
from gate.engines.interface import Backend, Runner
from gate.errors import RunError
from gate.spec import GateSpec
from gate.verdict import Evidence

SPEC = msgspec.convert(
    {
        "schema": 1,
        "model": {"id": "m", "factory": "a:b"},
        "inputs": {"x": {"dtype": "float32", "shape": ["n"], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}}},
        "data": {"source": "a:b", "samples": 1},
        "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp16", "parity": {}}],
    },
    GateSpec,
)


def double(feed):
    return {"y": feed["x"] * 2}


def test_fake_builds_opens_and_runs(tmp_path):
    backend: Backend = FakeBackend(double)
    (tmp_path / "a.onnx").write_bytes(b"graph")
    out = tmp_path / backend.file_name(SPEC.engines[0])
    record = backend.build(onnx=tmp_path / "a.onnx", out=out, spec=SPEC, engine=SPEC.engines[0])
    assert record.layers[0].precision == "fp16"
    assert out.read_bytes() == b"graph"
    assert backend.runs_here(SPEC.engines[0]) is Evidence.HOST
    runner: Runner = backend.open(out, spec=SPEC, engine=SPEC.engines[0])
    with runner:
        assert runner.run({"x": np.ones(3, np.float32)})["y"].tolist() == [2, 2, 2]
        assert list(runner.outputs) == ["y"]
        runner.timed({"x": np.ones(3, np.float32)})()
    with pytest.raises(RunError, match="closed"):
        runner.run({"x": np.ones(3, np.float32)})


def test_fake_checks_its_inputs_as_a_real_one():
    with pytest.raises(RunError, match="outside the profile"):
        FakeRunner(double, spec=SPEC).run({"x": np.ones(5, np.float32)})


def test_missing_engine_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no such file"):
        FakeBackend(double).open(tmp_path / "none", spec=SPEC, engine=SPEC.engines[0])
