"""Backends by name, and what is said where one is not installed."""

import importlib.metadata
import subprocess
import sys

import pytest

from gate.engines import BACKENDS, backend
from gate.errors import BackendUnavailable, SpecError
from gate.spec import EngineSpec
from gate.verdict import Evidence


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_has_the_name_of_the_spec(name):
    assert backend(name).name == name


def test_unknown_backend_names_the_nearest():
    with pytest.raises(SpecError, match=r"no backend 'tensort'; did you mean 'tensorrt'\?"):
        backend("tensort")


def test_backend_that_is_not_installed_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "trt-gate\[tensorrt\]"'):
        backend("tensorrt").version()
    with pytest.raises(BackendUnavailable, match=r'pip install "trt-gate\[onnxruntime\]"'):
        backend("onnxruntime").version()


def test_versions_and_evidence_are_found_without_importing_a_framework():
    code = (
        "import sys\n"
        "from gate.engines import backend\n"
        "from gate.spec import EngineSpec\n"
        "for name in ('onnxruntime', 'tensorrt_rtx'):\n"
        "    engine = EngineSpec(name='e', backend=name, precision='fp32')\n"
        "    found = backend(name); found.version(); found.runs_here(engine); found.file_name(engine)\n"
        "bad = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'modelopt'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_onnx_runtime_gives_host_evidence():
    assert (
        backend("onnxruntime").runs_here(EngineSpec(name="e", backend="onnxruntime", precision="fp32")) is Evidence.HOST
    )
