"""What this machine is: the CPU or GPU and the versions of the software on it. Nothing heavy is imported."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import msgspec

from gate.results import Fingerprint

_ISA = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_DISTRIBUTIONS = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "numpy",
    "nvidia-modelopt",
    "onnxslim",
)
_COMMAND_TIMEOUT_S = 10


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first GPU that is visible.

    Args:
        name: As the driver gives it.
        compute_capability: Such as `8.9`.
        driver: Version of the driver.
        cuda: Highest CUDA version of the driver; None where it does not say.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str | None = None


def fingerprint(for_gpu: bool) -> Fingerprint:
    """The device that a run uses, and the installed versions that can change answers or speed.

    Args:
        for_gpu: Describe the GPU, where there is one; else the CPU.
    """
    device = gpu() if for_gpu else None
    return Fingerprint(
        kind="cpu" if device is None else "gpu",
        name=_cpu_name() if device is None else device.name,
        cores=usable_cores(),
        isa=_isa(),
        os=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        compute_capability=device.compute_capability if device else None,
        driver=device.driver if device else None,
        cuda=device.cuda if device else None,
    )


@functools.cache
def gpu() -> Gpu | None:
    """The first visible NVIDIA GPU by NVML, or by `nvidia-smi` where its bindings are not installed; else None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    found = _gpu_by_nvml()
    return found if found is not None else _gpu_by_command()


def git_revision(folder: Path) -> str | None:
    """The commit checked out in a folder, with `-dirty` appended where tracked files changed; None outside one."""
    git = shutil.which("git")
    if git is None:
        return None
    commit = _output([git, "-C", str(folder), "rev-parse", "--verify", "HEAD"])
    if commit is None:
        return None
    changes = _output([git, "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if changes is None or changes else commit


def usable_cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _gpu_by_nvml() -> Gpu | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(_first_visible())
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return Gpu(
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            compute_capability=f"{major}.{minor}",
            driver=_text(pynvml.nvmlSystemGetDriverVersion()),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu_by_command() -> Gpu | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    text = _output([command, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"])
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines()]
    index = _first_visible()
    if index >= len(rows) or len(rows[index]) != 3:
        return None
    name, capability, driver = rows[index]
    version = re.search(r"CUDA Version: *([0-9.]+)", _output([command]) or "")
    return Gpu(
        name=name, compute_capability=capability, driver=driver, cuda=version.group(1) if version is not None else None
    )


def _first_visible() -> int:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _cpu_info() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _isa() -> tuple[str, ...]:
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(name for name in _ISA if name in flags)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
