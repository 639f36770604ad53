"""What is installed here and what works: each framework is tried in a process of its own, which may crash or hang."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from gate.device import GpuState, gpu_state, is_gpu_hidden, usable_cores

TIMEOUT_S = 120
"""For one probe: importing PyTorch from a cold network disk takes most of a minute."""

ADD_ONNX = bytes.fromhex(
    "080812003a350a0e0a01780a01781201792203416464120167"
    "5a0f0a0178120a0a08080112040a02080162"
    "0f0a0179120a0a08080112040a02080142040a001011"
)
"""An ONNX model of one node, y = x + x with float32 [1], IR version 8, opset 17."""

_ANSWER = "gate-probe-answer:"
NO_GPU = "there is no usable GPU"
"""Why something was not tried on the GPU."""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What came of trying one framework.

    Args:
        installed: Whether it is there at all.
        version: As it says itself.
        error: Why it cannot be used; None where it can.
        cuda: The CUDA version that it was built for; of the driver, the one it has.
        device_error: Why it does not work on the GPU; None where it ran there.
        providers: ONNX Runtime's, each with why it does not work; empty text where it does.
    """

    installed: bool = True
    version: str | None = None
    error: str | None = None
    cuda: str | None = None
    device_error: str | None = NO_GPU
    providers: dict[str, str] = {}


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that `gate.doctor.examine` judges.

    Args:
        python: Major and minor.
        platform: `Linux x86_64`.
        distributions: Installed packages by name, lower case with `-`, with their version.
        gpu: The first visible one.
        gpu_hidden: Whether CUDA_VISIBLE_DEVICES hides every GPU.
        cuda_libraries: CUDA's run-time libraries that the system's linker or the wheels have, with where.
        compiler: The C++ compiler on PATH; None: there is none.
        answers: By name of the probe, see `PROBES`.
    """

    python: tuple[int, int]
    platform: str
    distributions: dict[str, str]
    gpu: GpuState | None
    gpu_hidden: bool
    cuda_libraries: dict[str, str]
    compiler: str | None
    answers: dict[str, Answer]


def collect(on_probe: Callable[[str], None] | None = None) -> Facts:
    """Look at this machine. Nothing heavy is imported into this process.

    Args:
        on_probe: Told the name of each probe that has answered.
    """
    state = gpu_state()
    # In an exclusive mode two probes at once would take the GPU from each other.
    alone = state is not None and state.compute_mode != "default"
    answers: dict[str, Answer] = {}
    with ThreadPoolExecutor(1 if alone else min(4, usable_cores())) as pool:
        for name, given in zip(PROBES, pool.map(ask, PROBES), strict=True):
            answers[name] = given
            if on_probe is not None:
                on_probe(name)
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor),
        platform=f"{platform.system()} {platform.machine()}",
        distributions=distributions(),
        gpu=state,
        gpu_hidden=is_gpu_hidden(),
        cuda_libraries=_cuda_libraries(),
        compiler=shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++"),
        answers=answers,
    )


def distributions() -> dict[str, str]:
    """Installed packages by name, lower case with `-`, with their version."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        name = each.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-").replace(".", "-"), each.version)
    return found


def ask(name: str, *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Run one probe in a process of its own; one that crashes, hangs or says nothing is an answer with an error."""
    # The same search path as here: `-c` would put the working folder first, and a torch.py in it before torch.
    code = f"import sys; sys.path[:] = {sys.path!r}; from gate.probe import answer; answer({name!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"did not answer within {timeout_s:g} s")
    except OSError as err:
        return Answer(error=f"could not be tried: {err}")
    line = next((each for each in reversed(done.stdout.splitlines()) if _ANSWER in each), None)
    if line is not None:
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(line.partition(_ANSWER)[2], type=Answer)
    return Answer(error=_death(done.returncode, done.stderr))


def answer(name: str) -> None:
    """Try it in this process, and print what came of it; called in the process that `ask` starts."""
    try:
        given = PROBES[name]()
        text = msgspec.json.encode(given)
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        ours = missing in _MODULES.get(name, ())
        text = msgspec.json.encode(Answer(installed=not ours, error="is not installed" if ours else _said(err)))
    except Exception as err:  # noqa: BLE001 - whatever a framework raises is what the doctor reports
        text = msgspec.json.encode(Answer(error=_said(err)))
    sys.stdout.flush()
    # On a line of its own, whatever a native library has printed before without ending its line.
    os.write(1, b"\n" + _ANSWER.encode() + text + b"\n")


def _death(code: int, errors: str) -> str:
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    told = f": {last[:300]}" if last else ""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"crashed with {name} when it was tried{told}"
    return f"ended with code {code} and without an answer{told}"


def _said(err: BaseException) -> str:
    text = " ".join(str(err).split())
    return (text or type(err).__name__)[:500]


def _cuda_libraries() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("cudart", "cublas", "cudnn"):
        if (path := ctypes.util.find_library(name)) is not None:
            found[name] = path
    wheels = {"nvidia-cuda-runtime": "cudart", "nvidia-cublas": "cublas", "nvidia-cudnn": "cudnn"}
    for distribution, version in sorted(distributions().items()):
        for prefix, name in wheels.items():
            if distribution == prefix or distribution.startswith(f"{prefix}-cu"):
                found.setdefault(name, f"{distribution} {version}")
    return found


def _probe_driver() -> Answer:
    """The CUDA driver itself, and a context on the first visible GPU.

    Source: CUDA driver API, cuInit, cuDriverGetVersion, cuDeviceGetCount, cuDevicePrimaryCtxRetain.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return Answer(installed=False, error=f"no NVIDIA driver: {name} is not found")

    def failure(code: int) -> str:
        text = ctypes.c_char_p()
        named = cuda.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value is not None
        return (text.value or b"").decode() if named else f"error {code}"

    version, count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    steps: tuple[tuple[str, Callable[[], int]], ...] = (
        ("cuInit", lambda: cuda.cuInit(0)),
        ("cuDeviceGetCount", lambda: cuda.cuDeviceGetCount(ctypes.byref(count))),
        ("cuDeviceGet", lambda: cuda.cuDeviceGet(ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)),
    )
    for what, step in steps:
        if (status := step()) != 0:
            return Answer(version=text, cuda=text, device_error=f"{what}: {failure(status)}")
    cuda.cuDevicePrimaryCtxRelease_v2(device)
    return Answer(version=text, cuda=text, device_error=None)


def _has_device() -> bool:
    """Whether a context can be had; asked before a framework is sent to the GPU."""
    return _probe_driver().device_error is None


def _on_device(run: Callable[[], None]) -> str | None:
    """Why something does not run on the GPU; None where it did."""
    if not _has_device():
        return NO_GPU
    try:
        run()
    except Exception as err:  # noqa: BLE001 - as in `answer`
        return _said(err)
    return None


def _probe_torch() -> Answer:
    import torch

    def run() -> None:
        if float((torch.ones(2, device="cuda") + 1).sum()) != 4.0:
            raise ArithmeticError("1 + 1 on the GPU is not 2")

    if torch.version.cuda is None:
        return Answer(version=str(torch.__version__), device_error="it is built without CUDA")
    return Answer(version=str(torch.__version__), cuda=torch.version.cuda, device_error=_on_device(run))


def _probe_tensorrt() -> Answer:
    trt = _tensorrt("tensorrt")
    error = _on_device(lambda: _deserialize(trt, _compiled(trt)))
    return Answer(version=trt.__version__, cuda=_cuda_of("tensorrt", trt.__version__), device_error=error)


def _probe_tensorrt_rtx() -> Answer:
    trt = _tensorrt("tensorrt_rtx")
    plan = _compiled(trt)
    error = _on_device(lambda: _deserialize(trt, plan))
    return Answer(version=trt.__version__, cuda=_cuda_of("tensorrt-rtx", trt.__version__), device_error=error)


def _tensorrt(name: str) -> Any:
    """The module; the folder that type stubs leave on Python's path is none.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    trt = importlib.import_module(name)
    if not hasattr(trt, "Builder"):
        raise ModuleNotFoundError(f"{name} is a folder without code", name=name)
    return trt


def _compiled(trt: Any) -> Any:
    """The plan of a network with one layer, x + x.

    Raises:
        RuntimeError: The compiler gives none; says why.
    """
    log: list[str] = []
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    explicit = getattr(flags, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    x = network.add_input("x", trt.DataType.FLOAT, (1,))
    y = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if hasattr(config, "set_tactic_sources"):
        # cuBLAS and cuDNN, which older versions load otherwise, are not what is tried here.
        config.set_tactic_sources(0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"it does not compile: {' · '.join(log[-3:]) or 'no reason given'}")
    return plan


def _deserialize(trt: Any, plan: Any) -> None:
    log: list[str] = []
    logger = _logger(trt, log)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:
        raise RuntimeError(" · ".join(log[-3:]) or "it gives no execution context, and no reason")


def _logger(trt: Any, log: list[str]) -> Any:
    """A logger of that module which keeps errors."""

    class Collecting(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if getattr(severity, "name", "") in ("ERROR", "INTERNAL_ERROR"):
                log.append(" ".join(message.split())[:300])

    return Collecting()


def _cuda_of(name: str, version: str) -> str | None:
    """The CUDA major version that a TensorRT wheel is built for, by the name of the package that carries it.

    Source: names on the package index: tensorrt-cu12, tensorrt-cu13; tensorrt 8.6.0 requires nvidia-cuda-runtime-cu12.
    """
    installed = distributions()
    for major in ("13", "12", "11"):
        if f"{name}-cu{major}" in installed or f"{name}-cu{major}-libs" in installed:
            return major
    return "12" if name == "tensorrt" and version.startswith("8.6") else None


def _probe_onnxruntime() -> Answer:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    # A session proves more than a version: a second package may have overwritten half of this one's files.
    ort.InferenceSession(ADD_ONNX, providers=["CPUExecutionProvider"]).run(None, {"x": _one()})
    try:
        cuda = importlib.import_module("onnxruntime.capi.build_and_package_info").cuda_version
    except (ImportError, AttributeError):
        cuda = None
    available = ort.get_available_providers()
    tried: dict[str, str] = {}
    for name, library in (("CUDAExecutionProvider", "cuda"), ("TensorrtExecutionProvider", "tensorrt")):
        if name in available:
            tried[name] = _provider_error(ort, name, library)
    return Answer(version=ort.__version__, cuda=cuda or None, providers={**dict.fromkeys(available, ""), **tried})


def _one() -> Any:
    import numpy as np

    return np.ones(1, np.float32)


def _provider_error(ort: Any, name: str, library: str) -> str:
    """Why a provider does not work; empty where it ran a graph on the GPU."""
    folder = Path(ort.__file__).parent / "capi"
    suffix = ".dll" if sys.platform == "win32" else ".so"
    prefix = "" if sys.platform == "win32" else "lib"
    from gate.engines.onnxruntime.session import preload_libraries

    # As the backend does: CUDA's libraries may lie in wheels.
    preload_libraries(ort)
    try:
        shared = folder / f"{prefix}onnxruntime_providers_shared{suffix}"
        if shared.is_file():
            ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"{prefix}onnxruntime_providers_{library}{suffix}"))
    except OSError as err:
        return _said(err)

    def run() -> None:
        session = ort.InferenceSession(ADD_ONNX, providers=[name])
        if session.get_providers()[:1] != [name]:
            raise RuntimeError(f"a session fell back to {', '.join(session.get_providers())}")
        session.run(None, {"x": _one()})

    return _on_device(run) or ""


def _probe_onnx() -> Answer:
    import onnx

    return Answer(version=onnx.__version__)


def _probe_modelopt() -> Answer:
    version = importlib.metadata.version("nvidia-modelopt")
    importlib.import_module("modelopt.onnx.autocast")
    importlib.import_module("modelopt.onnx.quantization")
    return Answer(version=version)


def _probe_cuda_python() -> Answer:
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        from cuda import cudart as runtime

    def run() -> None:
        status, *_ = runtime.cudaFree(0)
        if int(status) != 0:
            raise RuntimeError(f"cudaFree: {getattr(status, 'name', status)}")

    installed = distributions()
    version = installed.get("cuda-bindings") or installed.get("cuda-python")
    return Answer(version=version, cuda=version, device_error=_on_device(run))


def _probe_nvml() -> Answer:
    import pynvml

    version = distributions().get("nvidia-ml-py") or distributions().get("pynvml")
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as err:
        return Answer(version=version, device_error=_said(err))
    return Answer(version=version, device_error=None if count else "NVML sees no GPU")


PROBES: Mapping[str, Callable[[], Answer]] = {
    "driver": _probe_driver,
    "nvml": _probe_nvml,
    "cuda_python": _probe_cuda_python,
    "torch": _probe_torch,
    "tensorrt": _probe_tensorrt,
    "tensorrt_rtx": _probe_tensorrt_rtx,
    "onnxruntime": _probe_onnxruntime,
    "onnx": _probe_onnx,
    "modelopt": _probe_modelopt,
}
"""By name; what each tries is run in a process of its own."""

_MODULES = {
    "nvml": ("pynvml",),
    "cuda_python": ("cuda",),
    "torch": ("torch",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx",),
    "onnxruntime": ("onnxruntime",),
    "onnx": ("onnx",),
    "modelopt": ("modelopt", "nvidia-modelopt"),
}
