"""What this machine is: the CPU or GPU and the versions of the software on it. Nothing heavy is imported."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
_MIB = 1024**2

ComputeMode = Literal["default", "exclusive_thread", "prohibited", "exclusive_process"]
_COMPUTE_MODES: tuple[ComputeMode, ...] = ("default", "exclusive_thread", "prohibited", "exclusive_process")
"""In the order of their numbers. Source: nvml.h, nvmlComputeMode_t."""

_CLOCK_SETTING = 0x2
_CLOCK_REASONS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
"""Bits of the reasons for a clock below its maximum. Source: nvml.h, nvmlClocksEventReason*."""


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


class GpuState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the first visible GPU is and does at this moment. None: the driver does not say.

    Args:
        gpu: Which it is.
        source: Who said it.
        memory_total_bytes, memory_free_bytes: Of the GPU, or of the MIG instance that CUDA_VISIBLE_DEVICES names.
        sm_clock_mhz, max_sm_clock_mhz: Now, and the most it has.
        clocks_set: Whether a setting holds its clocks, such as `nvidia-smi --lock-gpu-clocks`.
        slowdowns: Other reasons for a clock below the maximum: `hw_thermal_slowdown`, `sw_power_cap`.
        mig: Whether it is divided; None also where it cannot be.
        compute_mode: Who may open a context on it.
    """

    gpu: Gpu
    source: Literal["nvml", "nvidia-smi"]
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    clocks_set: bool | None = None
    slowdowns: tuple[str, ...] = ()
    mig: bool | None = None
    compute_mode: ComputeMode | None = None


@dataclass(frozen=True)
class Nvml:
    """NVML, open, with the handles of the first visible GPU.

    Args:
        bindings: The module `pynvml`.
        whole: Handle of the GPU.
        part: Of the part of it that is visible: a MIG instance, or the GPU again.
    """

    bindings: Any
    whole: Any
    part: Any

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the function of that name gives; None where this driver or GPU does not have it."""
        try:
            return getattr(self.bindings, name)(*arguments)
        except (self.bindings.NVMLError, AttributeError):
            return None


def open_nvml(bindings: Any = None) -> Nvml | None:
    """Open NVML for the first visible GPU, CUDA's device 0 of this process. Who opens it may shut it down.

    CUDA counts the GPUs by their speed, NVML by their PCI bus, so of several the CUDA driver is asked which it is.

    Args:
        bindings: Used in the place of `pynvml`.

    Returns:
        None without NVML's bindings, without a GPU, or where nothing says which of several it is.
    """
    if is_gpu_hidden():
        return None
    if bindings is None:
        try:
            import pynvml
        except ImportError:
            return None
        bindings = pynvml
    try:
        bindings.nvmlInit()
    except bindings.NVMLError:
        return None
    try:
        handles = _nvml_handles(bindings)
    except bindings.NVMLError:
        handles = None
    if handles is None:
        bindings.nvmlShutdown()
        return None
    return Nvml(bindings=bindings, whole=handles[0], part=handles[1])


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
    if is_gpu_hidden():
        return None
    found = _gpu_by_nvml()
    return found if found is not None else _gpu_by_command()


def gpu_state() -> GpuState | None:
    """The first visible NVIDIA GPU as it is now, by NVML or by `nvidia-smi`; None where there is none."""
    if is_gpu_hidden():
        return None
    found = _state_by_nvml()
    if found is not None:
        return found
    device = _gpu_by_command()
    return None if device is None else _state_by_command(device)


def is_gpu_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU from this process."""
    return _first_visible_name() in ("", "-1")


def device_memory_used_bytes() -> int | None:
    """Memory in use on the first visible GPU, by all processes, in bytes; None without a GPU or NVML's bindings.

    Cheap enough to be asked every 10 ms: NVML stays open after the first call.
    """
    read = _memory_reader()
    return None if read is None else read()


def slowdown_names(reasons: int) -> tuple[str, ...]:
    """Names of the reasons for a clock below the maximum, settings and idling not among them, from NVML's bits."""
    return tuple(name for bit, name in _CLOCK_REASONS.items() if reasons & bit)


def open_context() -> bool:
    """Open the CUDA context of this process on the first visible GPU, so that what follows is measured without it.

    TensorRT, ONNX Runtime and PyTorch all compute in this primary context; it takes some hundred MiB of device memory,
    which belong to whoever comes first. It stays open for as long as the process lives.

    Returns:
        Whether it is open.

    Source: the CUDA driver API, cuDevicePrimaryCtxRetain.
    """
    cuda = _load_cuda()
    if cuda is None:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return bool(
        cuda.cuInit(0) == 0
        and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
        and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )


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
    opened = open_nvml()
    if opened is None:
        return None
    try:
        return _nvml_gpu(opened.bindings, opened.whole)
    except opened.bindings.NVMLError:
        return None
    finally:
        opened.bindings.nvmlShutdown()


def _state_by_nvml() -> GpuState | None:
    opened = open_nvml()
    if opened is None:
        return None
    nvml, whole = opened.bindings, opened.whole
    try:
        memory = opened.ask("nvmlDeviceGetMemoryInfo", opened.part)
        reasons = opened.ask("nvmlDeviceGetCurrentClocksThrottleReasons", whole)
        mig = opened.ask("nvmlDeviceGetMigMode", whole)
        mode = opened.ask("nvmlDeviceGetComputeMode", whole)
        return GpuState(
            gpu=_nvml_gpu(nvml, whole),
            source="nvml",
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_free_bytes=None if memory is None else int(memory.free),
            sm_clock_mhz=opened.ask("nvmlDeviceGetClockInfo", whole, nvml.NVML_CLOCK_SM),
            max_sm_clock_mhz=opened.ask("nvmlDeviceGetMaxClockInfo", whole, nvml.NVML_CLOCK_SM),
            clocks_set=None if reasons is None else bool(reasons & _CLOCK_SETTING),
            slowdowns=slowdown_names(reasons or 0),
            mig=None if mig is None else bool(mig[0]),
            compute_mode=None if mode is None else _compute_mode(mode),
        )
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


@functools.cache
def _memory_reader() -> Callable[[], int | None] | None:
    """Reads the memory in use, in bytes; NVML is never closed again."""
    opened = open_nvml()
    if opened is None:
        return None

    def used() -> int | None:
        memory = opened.ask("nvmlDeviceGetMemoryInfo", opened.part)
        return None if memory is None else int(memory.used)

    return used


def _load_cuda() -> Any:
    """The CUDA driver; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _first_cuda_device() -> tuple[str, str | None] | None:
    """PCI bus id of CUDA's device 0 in this process, and its identifier without prefix; None where CUDA has none.

    No context is opened.

    Source: the CUDA driver API, cuDeviceGetPCIBusId and cuDeviceGetUuid_v2, which gives a MIG instance's own.
    """
    cuda = _load_cuda()
    device, bus, raw = ctypes.c_int(), ctypes.create_string_buffer(32), ctypes.create_string_buffer(16)
    try:
        if (
            cuda is None
            or cuda.cuInit(0) != 0
            or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0
            or cuda.cuDeviceGetPCIBusId(bus, len(bus), device) != 0
        ):
            return None
        known = cuda.cuDeviceGetUuid_v2(raw, device) == 0
    except AttributeError:
        known = False
    if not bus.value:
        return None
    return bus.value.decode(), str(uuid.UUID(bytes=raw.raw)) if known else None


def _counts_by_bus() -> bool:
    """Whether CUDA is told to count the GPUs as NVML and `nvidia-smi` do."""
    return os.environ.get("CUDA_DEVICE_ORDER", "").upper() == "PCI_BUS_ID"


def _nvml_handles(nvml: Any) -> tuple[Any, Any] | None:
    """Handles of the first visible GPU, and of the part of it that is visible: a MIG instance, or the GPU again.

    Returns:
        None where no GPU has the identifier, or nothing says which of several is the first.

    Raises:
        NVMLError: There is none.
    """
    name = _first_visible_name()
    if name.startswith("MIG-"):
        part = nvml.nvmlDeviceGetHandleByUUID(name)
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part), part
    count = nvml.nvmlDeviceGetCount()
    if name.startswith("GPU-"):
        every = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        # CUDA takes the beginning of an identifier, too, where it is unique.
        found = [each for each in every if _text(nvml.nvmlDeviceGetUUID(each)).startswith(name)]
        return (found[0], found[0]) if len(found) == 1 else None
    if count > 1 and (first := _first_cuda_device()) is not None:
        bus, identifier = first
        handle = nvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
        return handle, _part_of(nvml, handle, identifier)
    if count > 1 and not _counts_by_bus():
        return None
    handle = nvml.nvmlDeviceGetHandleByIndex(_first_visible())
    return handle, handle


def _part_of(nvml: Any, whole: Any, identifier: str | None) -> Any:
    """The MIG instance of a GPU with that identifier; the GPU where it is its own, or is not known."""
    if identifier is None or _text(nvml.nvmlDeviceGetUUID(whole)) == f"GPU-{identifier}":
        return whole
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{identifier}")
    except nvml.NVMLError:
        return whole


def _nvml_gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        compute_capability=f"{major}.{minor}",
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )


def _compute_mode(number: int) -> ComputeMode | None:
    return _COMPUTE_MODES[number] if 0 <= number < len(_COMPUTE_MODES) else None


def _gpu_by_command() -> Gpu | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    said = _row_of_first(command, "name,compute_cap,driver_version", "noheader")
    row = [part.strip() for part in (said or "").split(",")]
    if len(row) != 3:
        return None
    name, capability, driver = row
    version = re.search(r"CUDA Version: *([0-9.]+)", _output([command]) or "")
    return Gpu(
        name=name, compute_capability=capability, driver=driver, cuda=version.group(1) if version is not None else None
    )


def _state_by_command(device: Gpu) -> GpuState:
    said = _queried(
        (
            "memory.total",
            "memory.free",
            "clocks.sm",
            "clocks.max.sm",
            "clocks_throttle_reasons.active",
            "mig.mode.current",
            "compute_mode",
        )
    )
    total, free = (_leading_int(said.get(name)) for name in ("memory.total", "memory.free"))
    try:
        reasons = int(said.get("clocks_throttle_reasons.active", ""), 16)
    except ValueError:
        reasons = None
    mode = said.get("compute_mode", "").lower()
    return GpuState(
        gpu=device,
        source="nvidia-smi",
        memory_total_bytes=None if total is None else total * _MIB,
        memory_free_bytes=None if free is None else free * _MIB,
        sm_clock_mhz=_leading_int(said.get("clocks.sm")),
        max_sm_clock_mhz=_leading_int(said.get("clocks.max.sm")),
        clocks_set=None if reasons is None else bool(reasons & _CLOCK_SETTING),
        slowdowns=slowdown_names(reasons or 0),
        mig={"Enabled": True, "Disabled": False}.get(said.get("mig.mode.current", "")),
        compute_mode=next((each for each in _COMPUTE_MODES if each == mode), None),
    )


def _queried(fields: tuple[str, ...]) -> dict[str, str]:
    """What `nvidia-smi` says of the first visible GPU, by field; a driver that lacks a field is asked for each alone."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    said = _row_of_first(command, ",".join(fields), "noheader,nounits")
    parts = [] if said is None else [part.strip() for part in said.split(",")]
    if len(parts) == len(fields):
        return dict(zip(fields, parts, strict=True))
    if len(fields) == 1:
        return {}
    return {name: value for field in fields for name, value in _queried((field,)).items()}


def _row_of_first(command: str, fields: str, layout: str) -> str | None:
    """What `nvidia-smi` says of the first visible GPU; None where it fails, or nothing says which of several it is."""
    text = _output([command, f"--query-gpu={fields}", f"--format=csv,{layout}"])
    rows = (text or "").splitlines()
    if len(rows) > 1 and (first := _first_cuda_device()) is not None:
        rows = (
            _output([command, f"--query-gpu={fields}", f"--format=csv,{layout}", f"--id={first[0]}"]) or ""
        ).splitlines()
        return rows[0] if len(rows) == 1 else None
    index = _first_visible()
    if index >= len(rows) or (len(set(rows)) > 1 and not _counts_by_bus()):
        return None
    return rows[index]


def _leading_int(text: str | None) -> int | None:
    match = re.match(r"[0-9]+", text or "")
    return None if match is None else int(match.group())


def _first_visible_name() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def _first_visible() -> int:
    first = _first_visible_name()
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
    return installed_versions(_DISTRIBUTIONS)


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Version by name of those distributions that are installed."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
