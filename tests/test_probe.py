"""What is tried in a process of its own, and what becomes of one that crashes, hangs or says nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from gate import probe


@pytest.fixture
def faulty_onnx(tmp_path, monkeypatch):
    """Puts a package `onnx` of that text before the real one, for this process and its probes."""

    def put(text):
        (tmp_path / "onnx.py").write_text(text)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    return put


def test_installed_framework_answers_with_its_version():
    import onnx

    assert probe.ask("onnx") == probe.Answer(version=onnx.__version__)


def test_probe_that_crashes_is_an_answer_with_the_signal(faulty_onnx):
    faulty_onnx("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    answer = probe.ask("onnx")
    assert answer.installed
    assert answer.error is not None
    assert "crashed with SIGSEGV" in answer.error


def test_probe_that_hangs_is_ended(faulty_onnx):
    faulty_onnx("import time; time.sleep(60)")
    assert probe.ask("onnx", timeout_s=1).error == "did not answer within 1 s"


def test_probe_that_ends_without_an_answer_is_an_error(faulty_onnx):
    faulty_onnx("import os; os._exit(3)")
    assert "ended with code 3 and without an answer" in (probe.ask("onnx").error or "")


def test_probe_that_ends_well_without_an_answer_is_an_error(faulty_onnx):
    faulty_onnx("import os; os._exit(0)")
    assert probe.ask("onnx").error is not None


def test_framework_that_raises_is_installed_and_says_why(faulty_onnx):
    faulty_onnx("raise OSError('libfoo.so.1: cannot open shared object file')")
    answer = probe.ask("onnx")
    assert answer.installed
    assert answer.error == "libfoo.so.1: cannot open shared object file"


def test_package_that_a_framework_misses_is_an_error_of_the_framework(faulty_onnx):
    faulty_onnx("import missing_dependency_of_onnx")
    answer = probe.ask("onnx")
    assert answer.installed
    assert "missing_dependency_of_onnx" in (answer.error or "")


def test_what_a_framework_prints_does_not_hide_the_answer(faulty_onnx):
    faulty_onnx("import sys; sys.stdout.write('loading'); __version__ = '1.0'")
    assert probe.ask("onnx") == probe.Answer(version="1.0")


def test_framework_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(sys, "path", [each for each in sys.path if "site-packages" not in each])
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnx': raise ModuleNotFoundError('no onnx', name='onnx')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from gate.probe import answer\n"
        "answer('onnx')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert '"installed":false' in done.stdout


def test_working_folder_does_not_shadow_a_framework(tmp_path, monkeypatch):
    (tmp_path / "onnx.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    assert probe.ask("onnx").error is None


def test_the_model_that_onnx_runtime_runs_is_valid():
    import onnx

    model = onnx.load_from_string(probe.ADD_ONNX)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_onnx_runtime_runs_a_graph_and_lists_its_providers():
    answer = probe.ask("onnxruntime")
    assert answer.error is None
    assert answer.providers["CPUExecutionProvider"] == ""


def test_tensorrt_rtx_compiles_a_network():
    answer = probe.ask("tensorrt_rtx")
    assert answer.error is None
    assert answer.version is not None


def test_folder_without_code_is_no_tensorrt(tmp_path, monkeypatch):
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    if not (answer := probe.ask("tensorrt")).installed:
        assert answer.error == "is not installed"
    else:
        assert answer.version is not None


def test_collecting_imports_nothing_heavy():
    code = (
        "import sys; from gate import probe; probe.PROBES = {}; probe.collect();"
        "bad = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'modelopt'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return STATUS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_DEVICE_UNAVAILABLE"; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize(
    ("status", "error"), [(0, None), (46, "cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE")]
)
def test_driver_is_asked_for_a_context(tmp_path, monkeypatch, status, error):
    (tmp_path / "driver.c").write_text(DRIVER.replace("STATUS", str(status)))
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "driver.c")], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert probe.ask("driver") == probe.Answer(version="12.4", cuda="12.4", device_error=error)


@pytest.mark.gpu
def test_driver_opens_a_context_on_the_gpu():
    answer = probe.ask("driver")
    assert answer.device_error is None, answer
    assert answer.cuda is not None
