"""What this machine can be used for, judged from facts: one line for each thing, OK, missing or unusable, with the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from gate.probe import NO_GPU, Answer, Facts
from gate.spec import EngineSpec, GateSpec

Condition = Literal["OK", "missing", "unusable"]

LEAST_FREE_MIB = 1024
"""Device memory for a CUDA context, a compiler and a small engine; a context alone takes about half of it."""

LEAST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
"""The oldest driver branch that runs programs built for a CUDA major version.

Source: NVIDIA CUDA Compatibility, "Minor Version Compatibility", table 1.
"""

_GPU_LINES = ("gpu", "driver", "cuda", "mig", "compute_mode", "memory")
"""What every engine on a GPU rests on."""

_HOLDING = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"
_SLOWED = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")

_CUDA_FIXES = {
    "CUDA_ERROR_NO_DEVICE": "nvidia-smi -L",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": _HOLDING,
    "CUDA_ERROR_OUT_OF_MEMORY": _HOLDING,
    "CUDA_ERROR_SYSTEM_NOT_READY": "sudo systemctl start nvidia-fabricmanager",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "sudo reboot",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "unset LD_LIBRARY_PATH",
    "CUDA_ERROR_UNKNOWN": "sudo nvidia-modprobe -u -c=0",
}
"""Source: CUDA driver API, CUresult: 100 no device, 46 held by another process or prohibited, 802 the fabric manager does
not run, 803 the library is not the kernel module's (as after an update), 804 a compatibility package on this GPU."""

_LIBRARIES = {
    ("cudnn", "8"): "'nvidia-cudnn-cu12==8.9.7.29'",
    ("cudnn", "9"): "'nvidia-cudnn-cu{cuda}>=9'",
    ("cublas", "12"): "nvidia-cublas-cu12",
    ("cublas", "13"): "'nvidia-cublas>=13'",
    ("cublasLt", "12"): "nvidia-cublas-cu12",
    ("cublasLt", "13"): "'nvidia-cublas>=13'",
    ("cudart", "12"): "nvidia-cuda-runtime-cu12",
    ("cudart", "13"): "'nvidia-cuda-runtime>=13'",
    ("cufft", "11"): "nvidia-cufft-cu12",
    ("cufft", "12"): "'nvidia-cufft>=12'",
    ("curand", "10"): "'nvidia-curand{suffix}'",
    ("nvinfer", "8"): "'tensorrt==8.6.1'",
    ("nvinfer", "10"): "'tensorrt-cu{cuda}==10.*'",
    ("nvinfer", "11"): "'tensorrt-cu{cuda}==11.*'",
}
"""The wheel that has a library, by its name and the number after `.so.`."""

_WHEEL_PATH = (
    "export LD_LIBRARY_PATH=\"$(python -c 'import glob, site; "
    'print(":".join(glob.glob(site.getsitepackages()[0] + "/nvidia/*/lib")))\')"'
)


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One thing that was looked at.

    Args:
        name: Such as `tensorrt`; `tensorrt.device` says whether it works on the GPU.
        status: `missing`: it is not here. `unusable`: it is here and does not work.
        version: Its own.
        detail: What was seen, or what is wrong.
        fix: A command that mends it; None where nothing is to be mended, or another line's fix mends it.
        needed: Whether the exit code depends on it.
        needed_by: The engines of the spec that need it.
    """

    name: str
    status: Condition
    version: str | None = None
    detail: str = ""
    fix: str | None = None
    needed: bool = False
    needed_by: tuple[str, ...] = ()


class Examination(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All lines, and what follows from them.

    Args:
        ok: All that is needed is OK, and at least one backend can be used.
        summary: Why, in one line.
        spec: The spec that says what is needed; None: any backend will do.
        usable: Backends that work here, by the evidence that they give: `preflight`, `host`, `device`.
        lines: In the order in which one thing rests on another.
    """

    schema_version: Literal[1] = 1
    ok: bool
    summary: str
    spec: str | None
    platform: str
    usable: dict[str, str]
    lines: tuple[Line, ...]


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a spec needs.

    Args:
        lines: Engines by the line that they need; `device_memory` stands for cuda-python or PyTorch with CUDA.
        device_peak_mib: The largest budget for device memory.
        optional: By each optional engine the lines that it needs; where all engines are, one must be able to run.
    """

    lines: dict[str, tuple[str, ...]]
    device_peak_mib: float | None = None
    optional: dict[str, tuple[str, ...]] = {}


def needs_of(spec: GateSpec, *, recorded: bool = False) -> Needs:
    """What the engines of a spec need that are not optional: backends, lowering, a GPU for their evidence.

    Args:
        spec: What is asked for.
        recorded: The reference and the graphs come from a recording, so that nothing is exported or lowered here.
    """
    lines: dict[str, list[str]] = {}
    peaks = [0.0]
    optional = {
        engine.name: tuple(dict.fromkeys(_needed(spec, engine, recorded=recorded)))
        for engine in spec.engines
        if engine.optional
    }
    for engine in spec.engines:
        if engine.optional:
            continue
        for name in _needed(spec, engine, recorded=recorded):
            users = lines.setdefault(name, [])
            if engine.name not in users:
                users.append(engine.name)
        if engine.memory is not None and engine.memory.device_peak_mib is not None:
            peaks.append(engine.memory.device_peak_mib)
    return Needs(
        lines={name: tuple(users) for name, users in lines.items()},
        device_peak_mib=max(peaks) or None,
        optional=optional,
    )


def _needed(spec: GateSpec, engine: EngineSpec, *, recorded: bool) -> Iterator[str]:
    options, on_device = engine.options, engine.required_evidence == "device"
    yield engine.backend
    if spec.model.factory is not None and not recorded:
        yield "torch"
        if spec.model.device == "cuda":
            yield from (*_GPU_LINES, "torch.cuda")
        if engine.backend != "torch" and engine.onnx is None and engine.plan is None:
            yield "onnx"
    if engine.backend == "onnxruntime":
        yield "onnx"
        if options.provider in ("cuda", "tensorrt"):
            yield f"onnxruntime.{options.provider}"
    if engine.backend == "torch" and options.mode in ("compile", "aotinductor"):
        yield "compiler"
    # TensorRT compiles on the GPU, whatever its evidence; TensorRT-RTX does not.
    gpu = on_device or engine.backend == "tensorrt"
    if gpu:
        yield from _GPU_LINES
        if engine.backend in ("tensorrt", "tensorrt_rtx"):
            yield f"{engine.backend}.device"
        if engine.backend == "torch":
            yield "torch.cuda"
    if on_device:
        if engine.backend in ("tensorrt", "tensorrt_rtx"):
            yield "device_memory"
        if engine.latency is not None:
            yield "clocks"
        if engine.memory is not None and engine.memory.device_peak_mib is not None:
            yield "nvml"
    if not recorded:
        yield from _lowering_needs(engine)


def _lowering_needs(engine: EngineSpec) -> Iterator[str]:
    if engine.backend == "torch" or engine.onnx is not None or engine.plan is not None:
        return
    if engine.options.typing == "weak" or engine.lowering.tool == "none" or engine.precision in ("fp32", "tf32"):
        return
    yield "onnx"
    if engine.precision == "int8" and engine.lowering.tool in (None, "onnxruntime"):
        yield "onnxruntime"
    else:
        yield "modelopt"


def examine(facts: Facts, needs: Needs | None = None, *, spec: str | None = None) -> Examination:
    """Judge the facts.

    Args:
        facts: What `gate.probe.collect` found.
        needs: What must be OK. None, or of a spec whose engines are all optional: at least one backend that works.
        spec: Where the needs come from.
    """
    lines = {line.name: line for line in _lines(facts, needs)}
    users = dict(needs.lines) if needs is not None else {}
    if (memory_users := users.pop("device_memory", None)) is not None and lines["torch.cuda"].status != "OK":
        users["cuda_python"] = memory_users
    shown = tuple(
        msgspec.structs.replace(line, needed=name in users, needed_by=users.get(name, ()))
        for name, line in lines.items()
    )
    usable = _usable(lines)
    failing = [line for line in shown if line.needed and line.status != "OK"]
    if failing:
        engines = dict.fromkeys(engine for line in failing for engine in line.needed_by)
        # What has no fix of its own follows from what has one.
        roots = [line for line in failing if line.fix is not None] or failing
        what = ", ".join(f"{line.name} {line.status}" for line in roots)
        more = f" and {len(failing) - len(roots)} more" if len(roots) < len(failing) else ""
        summary = f"{what}{more}; needed by {', '.join(engines)}"
    elif unusable := _optional_that_cannot_run(lines, needs):
        summary = f"none of the spec's engines can run here, all of them optional: {unusable}"
    elif not usable:
        summary = "no backend can be used here"
    else:
        summary = f"usable: {', '.join(f'{name} ({evidence})' for name, evidence in usable.items())}"
    return Examination(
        ok=not failing and bool(usable) and not _optional_that_cannot_run(lines, needs),
        summary=summary,
        spec=spec,
        platform=facts.platform,
        usable=usable,
        lines=shown,
    )


def _optional_that_cannot_run(lines: Mapping[str, Line], needs: Needs | None) -> str:
    """Where every engine is optional and none can run: each with what it lacks; else nothing."""
    if needs is None or needs.lines or not needs.optional:
        return ""
    lacking = {
        engine: [name for name in names if name in lines and lines[name].status != "OK"]
        for engine, names in needs.optional.items()
    }
    if not all(lacking.values()):
        return ""
    return ", ".join(f"{engine} lacks {names[0]}" for engine, names in lacking.items())


def _usable(lines: Mapping[str, Line]) -> dict[str, str]:
    def works(*names: str) -> bool:
        return all(lines[name].status == "OK" for name in names)

    found: dict[str, str] = {}
    if works("onnxruntime", "onnx"):
        found["onnxruntime"] = "device" if works("onnxruntime.cuda", *_GPU_LINES) else "host"
    if works("tensorrt", "tensorrt.device", *_GPU_LINES):
        found["tensorrt"] = "device"
    if works("tensorrt_rtx"):
        found["tensorrt_rtx"] = "device" if works("tensorrt_rtx.device", *_GPU_LINES) else "preflight"
    if works("torch"):
        found["torch"] = "device" if works("torch.cuda", *_GPU_LINES) else "host"
    return found


def _lines(facts: Facts, needs: Needs | None) -> Iterator[Line]:
    yield _gpu(facts)
    yield _driver(facts)
    yield _cuda(facts)
    yield _cuda_libraries(facts)
    yield _mig(facts)
    yield _compute_mode(facts)
    yield _memory(facts, needs)
    yield _clocks(facts)
    yield _nvml(facts)
    yield _cuda_python(facts)
    yield Line(name="python", status="OK", version=".".join(map(str, facts.python)), detail=facts.platform)
    yield from _tensorrt(facts)
    yield from _tensorrt_rtx(facts)
    yield from _onnxruntime(facts)
    yield from _torch(facts)
    yield _package(facts, "onnx", extra="export")
    yield _package(facts, "modelopt", extra="lower")
    yield _compiler(facts)


def _works_on_gpu(facts: Facts) -> bool:
    return facts.gpu is not None and facts.answers["driver"].device_error is None


def _gpu(facts: Facts) -> Line:
    if facts.gpu is not None:
        gpu = facts.gpu.gpu
        detail = f"{gpu.name}, compute capability {gpu.compute_capability}"
        return Line(name="gpu", status="OK", version=gpu.compute_capability, detail=detail)
    driver = facts.answers["driver"]
    if facts.gpu_hidden:
        detail = "CUDA_VISIBLE_DEVICES hides every GPU"
        return Line(name="gpu", status="missing", detail=detail, fix="unset CUDA_VISIBLE_DEVICES")
    if not driver.installed:
        return Line(name="gpu", status="missing", detail=driver.error or "no NVIDIA driver")
    if driver.error is None and driver.device_error is None:
        detail = "CUDA has a GPU, but neither NVML's bindings nor nvidia-smi are here to name it"
        return Line(name="gpu", status="unusable", detail=detail, fix='pip install "trt-gate[gpu]"')
    reason = driver.error or driver.device_error or ""
    return Line(name="gpu", status="missing", detail=f"the driver is here and shows no GPU: {reason}", fix="nvidia-smi")


def _driver(facts: Facts) -> Line:
    answer = facts.answers["driver"]
    version = None if facts.gpu is None else facts.gpu.gpu.driver
    if not answer.installed:
        return Line(
            name="driver",
            status="missing" if facts.gpu is None else "unusable",
            version=version,
            detail=answer.error or "no NVIDIA driver",
            fix="sudo ubuntu-drivers install   # another system: its package of NVIDIA's driver; "
            "a container: docker run --gpus all",
        )
    if answer.error is not None:
        return Line(name="driver", status="unusable", version=version, detail=answer.error, fix="nvidia-smi")
    return Line(name="driver", status="OK", version=version, detail="libcuda can be loaded")


def _cuda(facts: Facts) -> Line:
    answer = facts.answers["driver"]
    if not answer.installed or answer.error is not None:
        return Line(name="cuda", status="missing", detail="comes with the driver")
    if answer.device_error is None:
        return Line(name="cuda", status="OK", version=answer.cuda, detail="a context opens on the GPU")
    if facts.gpu is None:
        return Line(name="cuda", status="missing", version=answer.cuda, detail=answer.device_error)
    code = answer.device_error.rpartition(" ")[2]
    fix = _CUDA_FIXES.get(code, "nvidia-smi")
    if facts.gpu.compute_mode == "prohibited":
        fix = _DEFAULT_MODE
    return Line(name="cuda", status="unusable", version=answer.cuda, detail=answer.device_error, fix=fix)


def _cuda_libraries(facts: Facts) -> Line:
    if not facts.cuda_libraries:
        detail = "no libcudart, libcublas or libcudnn of the system or of wheels; PyTorch and TensorRT bring their own"
        return Line(name="cuda_libraries", status="missing", detail=detail)
    detail = ", ".join(f"{name}: {where}" for name, where in facts.cuda_libraries.items())
    return Line(name="cuda_libraries", status="OK", detail=detail)


_DEFAULT_MODE = "sudo nvidia-smi --compute-mode=DEFAULT"


def _mig(facts: Facts) -> Line:
    if facts.gpu is None:
        return _without_gpu("mig")
    if not facts.gpu.mig:
        return Line(name="mig", status="OK", detail="off" if facts.gpu.mig is False else "this GPU has none")
    if not _works_on_gpu(facts):
        return Line(
            name="mig",
            status="unusable",
            detail="on, and no instance is visible to CUDA",
            fix="nvidia-smi -L   # then: export CUDA_VISIBLE_DEVICES=MIG-<its UUID>",
        )
    return Line(name="mig", status="OK", detail="on; one instance is visible")


def _compute_mode(facts: Facts) -> Line:
    if facts.gpu is None:
        return _without_gpu("compute_mode")
    mode = facts.gpu.compute_mode
    if mode == "prohibited":
        return Line(
            name="compute_mode", status="unusable", detail="prohibited: no process may use it", fix=_DEFAULT_MODE
        )
    if mode in ("exclusive_process", "exclusive_thread"):
        if not _works_on_gpu(facts):
            detail = f"{mode.replace('_', ' ')}, and no context opens: another process may hold the GPU"
            return Line(name="compute_mode", status="unusable", detail=detail, fix=_HOLDING)
        return Line(name="compute_mode", status="OK", detail=f"{mode.replace('_', ' ')}: one process at a time")
    return Line(name="compute_mode", status="OK", detail=mode or "not reported")


def _memory(facts: Facts, needs: Needs | None) -> Line:
    if facts.gpu is None:
        return _without_gpu("memory")
    free, total = facts.gpu.memory_free_bytes, facts.gpu.memory_total_bytes
    if free is None or total is None:
        return Line(
            name="memory", status="missing", detail="the driver does not say how much is free", fix="nvidia-smi"
        )
    free_mib, total_mib = free / 2**20, total / 2**20
    budget = None if needs is None else needs.device_peak_mib
    least = max(LEAST_FREE_MIB, budget or 0)
    detail = f"{free_mib:.0f} of {total_mib:.0f} MiB free"
    if free_mib < least:
        why = "device_peak_mib of the spec" if least == budget else "a small engine"
        return Line(name="memory", status="unusable", detail=f"{detail}; {why} takes {least:.0f}", fix=_HOLDING)
    return Line(name="memory", status="OK", detail=detail)


def _clocks(facts: Facts) -> Line:
    if facts.gpu is None:
        return _without_gpu("clocks")
    state = facts.gpu
    if state.sm_clock_mhz is None:
        return Line(
            name="clocks",
            status="missing",
            detail="the driver does not give the SM clock",
            fix="nvidia-smi -q -d CLOCK",
        )
    most = f" of {state.max_sm_clock_mhz}" if state.max_sm_clock_mhz is not None else ""
    detail = f"SM {state.sm_clock_mhz}{most} MHz"
    slowed = [name for name in state.slowdowns if name in _SLOWED]
    if slowed:
        return Line(
            name="clocks",
            status="unusable",
            detail=f"{detail}, slowed now by {', '.join(slowed)}: latency means nothing",
            fix="nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
        )
    if state.slowdowns:
        detail += f", {', '.join(state.slowdowns)}"
    if state.clocks_set:
        detail += ", held by a setting"
    else:
        lock = f": sudo nvidia-smi --lock-gpu-clocks={state.max_sm_clock_mhz}" if state.max_sm_clock_mhz else ""
        detail += f", not known to be locked (to lock{lock})" if lock else ", not known to be locked"
    return Line(name="clocks", status="OK", detail=detail)


def _without_gpu(name: str) -> Line:
    return Line(name=name, status="missing", detail="no GPU to ask")


def _nvml(facts: Facts) -> Line:
    answer = facts.answers["nvml"]
    if (line := _absent("nvml", answer, fix='pip install "trt-gate[gpu]"')) is not None:
        return line
    if answer.device_error is not None:
        status: Condition = "missing" if facts.gpu is None else "unusable"
        detail = f"the bindings are here: {answer.device_error}"
        return Line(name="nvml", status=status, version=answer.version, detail=detail)
    return Line(name="nvml", status="OK", version=answer.version)


def _cuda_python(facts: Facts) -> Line:
    answer = facts.answers["cuda_python"]
    if (line := _absent("cuda_python", answer, fix='pip install "trt-gate[gpu]"')) is not None:
        return line
    if (gap := _driver_gap(facts, answer.cuda)) is not None:
        return Line(
            name="cuda_python", status="unusable", version=answer.version, detail=gap, fix=_older(facts, "cuda-python")
        )
    if answer.device_error not in (None, NO_GPU):
        return Line(name="cuda_python", status="unusable", version=answer.version, detail=answer.device_error or "")
    return Line(name="cuda_python", status="OK", version=answer.version, detail=_tried(answer))


def _tensorrt(facts: Facts) -> Iterator[Line]:
    answer = facts.answers["tensorrt"]
    installed = facts.distributions.get("tensorrt", "")
    line = _absent("tensorrt", answer, fix=_install_tensorrt(facts), facts=facts)
    if line is not None and installed.startswith("8.6") and facts.python > (most := _newest_python(installed)):
        line = Line(
            name="tensorrt",
            status="unusable",
            version=installed,
            detail=f"TensorRT {installed} has wheels up to Python {most[0]}.{most[1]}; here is "
            f"{facts.python[0]}.{facts.python[1]}",
            fix=_install_tensorrt(facts),
        )
    yield line or Line(name="tensorrt", status="OK", version=answer.version, detail=_built_for(answer))
    yield _on_device(facts, "tensorrt", "tensorrt.device", packages="tensorrt")


def _newest_python(version: str) -> tuple[int, int]:
    """Source: the files of tensorrt 8.6.0 and tensorrt-bindings 8.6.1 on the package index, cp310 and cp311."""
    return (3, 10) if version.startswith("8.6.0") else (3, 11)


def _install_tensorrt(facts: Facts) -> str:
    """The package for the driver's CUDA: `tensorrt` alone is for the newest."""
    major = _cuda_major(facts)
    return 'pip install "trt-gate[tensorrt]"' if major not in (12, 13) else f"pip install tensorrt-cu{major}"


def _tensorrt_rtx(facts: Facts) -> Iterator[Line]:
    answer = facts.answers["tensorrt_rtx"]
    line = _absent("tensorrt_rtx", answer, fix='pip install "trt-gate[rtx]"', facts=facts)
    yield line or Line(
        name="tensorrt_rtx", status="OK", version=answer.version, detail=f"compiles here{_comma(_built_for(answer))}"
    )
    device = _on_device(facts, "tensorrt_rtx", "tensorrt_rtx.device", packages="tensorrt-rtx")
    if device.status == "unusable" and device.fix is None:
        hint = 'pip install "trt-gate[tensorrt]"   # and backend = "tensorrt"; tensorrt_rtx with evidence = "preflight"'
        device = msgspec.structs.replace(device, fix=hint)
    yield device


def _on_device(facts: Facts, probe: str, name: str, *, packages: str) -> Line:
    """Whether something that is installed works on the GPU."""
    answer = facts.answers[probe]
    if answer.error is not None:
        return Line(name=name, status="missing", detail=f"needs {probe}")
    if not _works_on_gpu(facts):
        return Line(name=name, status="missing", version=answer.version, detail=NO_GPU)
    if (gap := _driver_gap(facts, answer.cuda)) is not None:
        return Line(name=name, status="unusable", version=answer.version, detail=gap, fix=_older(facts, packages))
    if answer.device_error is not None:
        fix = _library_fix(answer.device_error, facts)
        return Line(name=name, status="unusable", version=answer.version, detail=answer.device_error, fix=fix)
    return Line(name=name, status="OK", version=answer.version, detail="runs on the GPU")


def _onnxruntime(facts: Facts) -> Iterator[Line]:
    answer = facts.answers["onnxruntime"]
    both = {"onnxruntime", "onnxruntime-gpu"} <= facts.distributions.keys()
    again = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    line = _absent("onnxruntime", answer, fix=again if both else 'pip install "trt-gate[onnxruntime]"', facts=facts)
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in answer.providers)
    detail = f"providers: {providers}{_comma(_built_for(answer))}"
    yield line or Line(name="onnxruntime", status="OK", version=answer.version, detail=detail)
    if both:
        versions = [f"{name} {facts.distributions[name]}" for name in ("onnxruntime", "onnxruntime-gpu")]
        has_gpu_build = "CUDAExecutionProvider" in answer.providers
        told = f"{' and '.join(versions)} are both installed"
        yield Line(
            name="onnxruntime.packages",
            status="OK" if has_gpu_build else "unusable",
            detail=f"{told}: the one with GPU providers is what Python finds"
            if has_gpu_build
            else f"{told} into one folder: the later has overwritten the earlier",
            fix=None if has_gpu_build else again,
        )
    for name in ("cuda", "tensorrt"):
        yield _provider(facts, answer, name, again=again)


def _provider(facts: Facts, answer: Answer, short: str, *, again: str) -> Line:
    name, line = (
        {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[short],
        f"onnxruntime.{short}",
    )
    if answer.error is not None:
        return Line(name=line, status="missing", detail="needs onnxruntime")
    if name not in answer.providers:
        return Line(
            name=line, status="missing", version=answer.version, detail=f"this onnxruntime has no {name}", fix=again
        )
    error = answer.providers[name]
    if (gap := _driver_gap(facts, answer.cuda)) is not None:
        return Line(
            name=line, status="unusable", version=answer.version, detail=gap, fix=_older(facts, "onnxruntime-gpu")
        )
    if error == NO_GPU:
        return Line(name=line, status="missing", version=answer.version, detail=f"its library loads; {error}")
    if error:
        fix = _library_fix(error, facts, cuda=answer.cuda)
        if fix is not None and "libnvinfer" not in error:
            # It finds CUDA's libraries in their wheels by itself.
            fix = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
        return Line(name=line, status="unusable", version=answer.version, detail=error, fix=fix)
    return Line(name=line, status="OK", version=answer.version, detail="ran a graph on the GPU")


def _torch(facts: Facts) -> Iterator[Line]:
    answer = facts.answers["torch"]
    line = _absent("torch", answer, fix='pip install "trt-gate[torch]"', facts=facts)
    built = f"built for CUDA {answer.cuda}" if answer.cuda else "built without CUDA"
    yield line or Line(name="torch", status="OK", version=answer.version, detail=built)
    if answer.error is None and answer.cuda is None:
        fix = "pip uninstall -y torch && pip install torch" if _works_on_gpu(facts) else None
        yield Line(name="torch.cuda", status="missing", version=answer.version, detail="built without CUDA", fix=fix)
    else:
        yield _on_device(facts, "torch", "torch.cuda", packages="torch")


def _package(facts: Facts, name: str, *, extra: str) -> Line:
    answer = facts.answers[name]
    line = _absent(name, answer, fix=f'pip install "trt-gate[{extra}]"', facts=facts)
    return line or Line(name=name, status="OK", version=answer.version)


def _compiler(facts: Facts) -> Line:
    if facts.compiler is None:
        detail = "no C++ compiler, which torch.compile and AOTInductor call"
        return Line(name="compiler", status="missing", detail=detail, fix="sudo apt-get install g++")
    return Line(name="compiler", status="OK", detail=facts.compiler)


def _absent(name: str, answer: Answer, *, fix: str, facts: Facts | None = None) -> Line | None:
    """The line of something that is not installed or cannot be imported; None where it can."""
    if not answer.installed:
        return Line(name=name, status="missing", detail="is not installed", fix=fix)
    if answer.error is None:
        return None
    library = None if facts is None else _library_fix(answer.error, facts)
    return Line(name=name, status="unusable", version=answer.version, detail=answer.error, fix=library or fix)


def _driver_gap(facts: Facts, built: str | None) -> str | None:
    """Why the driver is too old for something built for a CUDA version; None where it is not, or there is none."""
    major = _leading_int(built)
    if facts.gpu is None or major is None:
        return None
    driver, has = facts.gpu.gpu.driver, _cuda_major(facts)
    if has is None or has >= major:
        return None
    least = LEAST_DRIVER.get(major)
    wanted = f"; it takes driver {least} or newer" if least is not None else ""
    return f"it is built for CUDA {built}, and driver {driver} has CUDA {has}{wanted}"


def _cuda_major(facts: Facts) -> int | None:
    """CUDA's major version that the driver has: as it says, else by its own version."""
    if facts.gpu is None:
        return None
    said = _leading_int(facts.gpu.gpu.cuda or facts.answers["driver"].cuda)
    if said is not None:
        return said
    driver = _leading_int(facts.gpu.gpu.driver)
    return (
        None if driver is None else max((cuda for cuda, least in LEAST_DRIVER.items() if driver >= least), default=None)
    )


def _older(facts: Facts, package: str) -> str:
    """What mends a driver that is too old: another driver, or a package that was built for the CUDA that it has."""
    has = _cuda_major(facts)
    update = "sudo ubuntu-drivers install"
    if package in ("tensorrt", "tensorrt-rtx") and has in (12, 13):
        return f"pip install {package}-cu{has}   # or a newer driver: {update}"
    if package == "cuda-python":
        return f"pip install 'cuda-python=={has}.*'   # or a newer driver: {update}"
    return f"{update}   # or a {package} that is built for CUDA {has}"


def _library_fix(error: str, facts: Facts, *, cuda: str | None = None) -> str | None:
    """How to get a shared library that an error misses; None where it names none that is known."""
    match = re.search(r"lib(\w+)\.so\.(\d+)", error)
    if match is None or (match[1], match[2]) not in _LIBRARIES:
        return None
    major = _leading_int(cuda) or _cuda_major(facts) or 12
    wheel = _LIBRARIES[match[1], match[2]].format(cuda=major, suffix="-cu12" if major == 12 else "")
    return f"pip install {wheel} && {_WHEEL_PATH}"


def _leading_int(text: str | None) -> int | None:
    match = re.match(r"\d+", text or "")
    return None if match is None else int(match.group())


def _built_for(answer: Answer) -> str:
    return f"built for CUDA {answer.cuda}" if answer.cuda else ""


def _comma(text: str) -> str:
    return f", {text}" if text else ""


def _tried(answer: Answer) -> str:
    return "" if answer.device_error is not None else "works on the GPU"
