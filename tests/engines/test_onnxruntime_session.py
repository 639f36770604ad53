"""Sessions on a provider: what is missing is said, in ONNX Runtime's own words."""

import os
import subprocess
import sys

import onnxruntime
import pytest

from gate.engines.onnxruntime.session import causes_in, not_loaded, open_session, preload_libraries, provider_list
from gate.errors import BackendUnavailable
from gate.spec import EngineOptions

LIBRARY = "/s/onnxruntime/capi/libonnxruntime_providers_cuda.so"
LOG = (
    "\x1b[1;31m2026-11-21 07:11:16.229067094 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
    "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& "
    "onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    f"{LIBRARY} with error: libcublasLt.so.13: cannot open shared object file: No such file or directory\n"
    "\x1b[m\n"
    "unrelated progress 12 %\n"
    "\x1b[0;93m2026-11-21 07:11:16.230433623 [W:onnxruntime:Default, onnxruntime_pybind_state.cc:1295 "
    "CreateExecutionProviderFactoryInstance] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*.\x1b[m\n"
)


def test_causes_are_read_from_the_log_of_the_runtime():
    assert causes_in(LOG + LOG) == (
        f"Failed to load library {LIBRARY} with error: libcublasLt.so.13: cannot open shared object file: "
        "No such file or directory",
        "Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*.",
    )
    assert causes_in("") == ()


@pytest.mark.parametrize(
    ("causes", "hint"),
    [
        (causes_in(LOG), r'pip install "onnxruntime-gpu\[cuda,cudnn\]", built with CUDA 13.0'),
        (
            ("Failed to load library /a.so with error: libnvinfer.so.10: cannot open",),
            r'pip install "tensorrt>=10,<11"',
        ),
        (("CUDA failure 100: no CUDA-capable device is detected",), "nvidia-smi"),
        ((), "nvidia-smi"),
    ],
)
def test_provider_that_was_left_out_is_an_error_with_the_next_step(causes, hint):
    error = not_loaded("CUDAExecutionProvider", causes, cuda="13.0")
    assert isinstance(error, BackendUnavailable)
    assert all(cause in error.message for cause in causes or ("it logged no cause",))
    with pytest.raises(BackendUnavailable, match=hint):
        raise error


def test_provider_that_is_not_there_is_an_error_and_not_a_cpu_session(tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(BackendUnavailable, match=r"has no CUDAExecutionProvider \(it has .*CPUExecutionProvider"):
        open_session(
            tmp_path / "a.onnx", EngineOptions(), providers=provider_list("CUDAExecutionProvider", {}, stream=None)
        )


def test_nodes_that_tensorrt_does_not_take_go_to_cuda_first():
    given = {"trt_max_workspace_size": "1"}
    assert provider_list("TensorrtExecutionProvider", given, stream=7) == (
        ("TensorrtExecutionProvider", {**given, "user_compute_stream": "7"}),
        ("CUDAExecutionProvider", {"use_tf32": "0", "user_compute_stream": "7"}),
        ("CPUExecutionProvider", {}),
    )
    assert provider_list("CUDAExecutionProvider", {}, stream=None) == (
        ("CUDAExecutionProvider", {}),
        ("CPUExecutionProvider", {}),
    )


def test_looking_for_libraries_prints_nothing(capfd):
    preload_libraries(onnxruntime)
    assert capfd.readouterr() == ("", "")


def test_native_errors_are_collected_and_stderr_is_given_back():
    code = (
        "import os, sys\n"
        "from gate.engines.onnxruntime.session import _native_stderr\n"
        "with _native_stderr() as said:\n"
        "    os.write(2, b'inside')\n"
        "os.write(2, b'outside')\n"
        "print(said)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("['inside']\n", "outside")


def test_closed_stderr_loses_the_cause_and_not_the_run():
    code = (
        "import os, sys\n"
        "from gate.engines.onnxruntime.session import _native_stderr\n"
        "os.close(2)\n"
        "with _native_stderr() as said:\n"
        "    pass\n"
        "print(said)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    assert os.fstat(2)
