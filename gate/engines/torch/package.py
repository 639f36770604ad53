"""AOTInductor packages: made from the model, read without loading, loaded only where they were made for.

A package (`.pt2`) is a zip with a shared library in it: loading one runs its code. Verify its digest first.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gate.chatter import quiet
from gate.device import Gpu, fingerprint, gpu
from gate.engines.interface import Layer
from gate.engines.torch.engine import lacks_compiler
from gate.engines.torch.module import Device, EngineModule, named
from gate.errors import BuildError, IncompatibleEngine, RunError
from gate.spec import GateSpec, InputSpec
from gate.tensors import NamedArrays

KEY = "gate"
"""Under which the gate's own description stands in a package's metadata."""

_METADATA = "_metadata.json"
_CPP_LIBRARIES = (b"libstdc++.so.", b"libc++.so.")
_LIMIT_BYTES = 1 << 26
_LOG_LINES = 12
_TRIAL_S = 300
_ISA = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_TILE": "amx_int8",
    "ASIMD": "asimd",
    "SVE": "sve",
}
"""What `AOTI_CPU_ISA` names, as /proc/cpuinfo has it. Source: `torch/_inductor/cpu_vec_isa.py`."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a package says of itself.

    Args:
        device: `cpu` or `cuda`.
        torch: The version that made it; None in a package that the gate did not make.
        compute_capability: Of the GPU it was compiled for; None for the CPU.
        machine: Such as `x86_64`; None where it does not say.
        isa: Instruction sets that its code may use, as /proc/cpuinfo names them.
        outputs: Dtypes of the model's outputs in FP32 by name, in torch's words; empty where not known.
        precision: As was asked for when it was made; None where not known.
        layers: What it computes in; empty where not known.
    """

    device: str
    torch: str | None = None
    compute_capability: str | None = None
    machine: str | None = None
    isa: tuple[str, ...] = ()
    outputs: dict[str, str] = {}
    precision: str | None = None
    layers: tuple[Layer, ...] = ()


def description(made: EngineModule, version: str, *, precision: str, layers: tuple[Layer, ...]) -> Description:
    """What a package that is made here says of itself."""
    device = gpu() if made.device == "cuda" else None
    return Description(
        device=made.device,
        torch=version,
        compute_capability=device.compute_capability if device is not None else None,
        machine=platform.machine(),
        isa=fingerprint(for_gpu=False).isa if made.device == "cpu" else (),
        outputs=dict(made.dtypes),
        precision=precision,
        layers=layers,
    )


def exported_program(made: EngineModule, *, spec: GateSpec, feed: NamedArrays, tensors: tuple[Any, ...]) -> Any:
    """The model as a `torch.export.ExportedProgram`, every dynamic axis within the spec's range.

    Args:
        made: The model.
        spec: Its inputs and their ranges.
        feed: What is traced with, for messages.
        tensors: The same on the model's device, in the spec's order.

    Raises:
        BuildError: It cannot be exported; carries the cause.
    """
    import torch

    with quiet() as chatter:
        try:
            with torch.no_grad():
                return torch.export.export(
                    named(made, spec.model.output_names),
                    tensors,
                    dynamic_shapes=_dynamic_shapes(spec, torch.export.Dim),
                    strict=False,
                )
        except Exception as err:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise BuildError(
                f"torch.export cannot export the model (traced with {shapes}): {_first_line(err)}",
                hint="Where it names a dynamic axis as constant: the model cannot change that axis, "
                'so give it one size in [inputs], or use options = { mode = "eager" }.',
                log=_log_of(err, chatter.tail(4)),
            ) from err


def write_package(program: Any, out: Path, told: Description) -> tuple[str, ...]:
    """Compile an exported program and write the package; returns the compiler's warnings.

    Raises:
        BuildError: The compiler refused it; carries the last lines of what it said. Or it put a C++ library into the
            package.
    """
    import torch
    from torch import _inductor as inductor

    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {KEY: json.dumps(msgspec.to_builtins(told), sort_keys=True)}
    with quiet() as chatter:
        try:
            with torch.no_grad():
                inductor.aoti_compile_and_package(
                    program, package_path=str(out), inductor_configs={"aot_inductor.metadata": metadata}
                )
        except Exception as err:
            if lacks_compiler(err):
                raise BuildError(
                    "AOTInductor needs a C++ compiler, and finds none here",
                    hint='sudo apt-get install g++, or mode = "eager"',
                ) from err
            raise BuildError(
                f"AOTInductor cannot compile the model: {_first_line(err)}", log=_log_of(err, chatter.tail(4))
            ) from err
    if brings_cpp_library(out):
        raise BuildError(
            f"the C++ compiler ({_compiler()}) put a C++ library of its own into the package; beside the one that PyTorch "
            "has loaded, it crashes where the package is loaded",
            hint="Name a compiler that links libstdc++.so, such as CXX=/usr/bin/g++, and build again.",
        )
    ours = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    warned = [
        f"{each.category.__name__}: {_first_line(each.message)}"
        for each in chatter.warned
        if not issubclass(each.category, ours)
    ]
    return tuple(dict.fromkeys(warned))


def brings_cpp_library(path: Path) -> bool:
    """Whether a shared library of a package links to no C++ library: its compiler put one into it.

    Two of them in a process share some of their state and not the rest. Seen on an H200 with PyTorch 2.11 and a GCC that
    links libstdc++ statically: `std::regex` in the package took a facet of the other's locale for its own, and the process
    that loaded it was ended by SIGSEGV; the one that had built it had libstdc++ among its global symbols, and was not.
    """
    with zipfile.ZipFile(path) as archive:
        names = [each for each in archive.namelist() if each.endswith(".so")]
        return any(not any(name in archive.read(each) for name in _CPP_LIBRARIES) for each in names)


def _compiler() -> str:
    return f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else shutil.which("g++") or "g++"


def read_description(path: Path) -> Description:
    """What a package says of itself, read without loading any of its code, its checksums held.

    Raises:
        RunError: It is no package, truncated or damaged.
    """
    where = str(path)
    hint = "Build it again."
    if not path.is_file():
        raise RunError("there is no such file", where=where)
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise RunError(f"is damaged: the checksum of {damaged} does not hold", where=where, hint=hint)
            members = [
                each
                for each in archive.infolist()
                if each.filename.endswith(_METADATA) and each.file_size < _LIMIT_BYTES
            ]
            tables = [json.loads(archive.read(each)) for each in members]
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as err:
        raise RunError(
            f"is no AOTInductor package, or a part of one: {_first_line(err)}", where=where, hint=hint
        ) from err
    tables = [each for each in tables if isinstance(each, dict) and "AOTI_DEVICE_KEY" in each]
    if not tables:
        raise RunError("is no AOTInductor package: it does not say for which device it was compiled", where=where)
    own = next((each[KEY] for each in tables if KEY in each), None)
    if own is None:
        return _foreign(tables[0])
    try:
        return msgspec.convert(json.loads(own), Description)
    except (msgspec.ValidationError, TypeError, ValueError) as err:
        raise RunError(f"its description cannot be read: {_first_line(err)}", where=where, hint=hint) from err


def require_loadable(
    told: Description, *, device: Device, version: str, machine: str, isa: Sequence[str], here: Gpu | None, where: str
) -> None:
    """Hold what a package says of itself against what is here, before any of its code is loaded.

    Args:
        told: The package's own description.
        device: Where it is to run.
        version: Of the installed PyTorch.
        machine: Of this host, such as `x86_64`.
        isa: Instruction sets of this processor.
        here: The GPU here; None where there is none.
        where: Its path, for messages.

    Raises:
        IncompatibleEngine: It was made for another device, GPU, processor or PyTorch.
    """
    hint = 'Build it here: leave plan out and keep options = { mode = "aotinductor" }.'
    if told.device != device:
        wanted = "device" if told.device == "cuda" else "host"
        raise IncompatibleEngine(
            f"the package was compiled for {told.device}, the engine is to run on {device}",
            where=where,
            hint=f'Set evidence = "{wanted}" in this [[engine]], or build it for {device}.',
        )
    if told.torch is not None and _release(told.torch) != _release(version):
        raise IncompatibleEngine(
            f"the package was compiled by PyTorch {told.torch}, here is {version}", where=where, hint=hint
        )
    if told.machine is not None and told.machine != machine:
        raise IncompatibleEngine(
            f"the package was compiled for {told.machine}, here is {machine}", where=where, hint=hint
        )
    if device == "cuda":
        if (
            told.compute_capability is not None
            and here is not None
            and told.compute_capability != here.compute_capability
        ):
            raise IncompatibleEngine(
                f"the package was compiled for compute capability {told.compute_capability}, "
                f"here is {here.compute_capability} ({here.name})",
                where=where,
                hint=hint,
            )
        return
    if lacking := [each for each in told.isa if each not in isa]:
        raise IncompatibleEngine(
            f"the package may use instructions that this processor has not: {', '.join(lacking)}",
            where=where,
            hint=hint,
        )


def load_package(path: Path) -> Callable[..., Any]:
    """The compiled model of a package. This runs its code: verify its digest, then `require_loadable`, before.

    Raises:
        RunError: PyTorch cannot load it.
    """
    from torch import _inductor as inductor

    with quiet() as chatter:
        try:
            loaded: Callable[..., Any] = inductor.aoti_load_package(str(path))
        except Exception as err:
            said = " · ".join(chatter.tail(2))
            raise RunError(
                f"PyTorch cannot load the package: {_first_line(err)}" + (f" · {said}" if said else ""), where=str(path)
            ) from err
    return loaded


def require_loads_alone(path: Path, *, device: Device) -> None:
    """Load a package in a process of its own first: one that only the process can load that made it is not an engine.

    Loading runs the package's code, and code that crashes would end the gate without a verdict: see
    `brings_cpp_library` for one that the process that had made it could load, and no other.

    Raises:
        RunError: That process failed or crashed.
    """
    code = (
        "import sys, torch\n"
        "device = 'cuda' if sys.argv[2] == 'cuda' else 'cpu'\n"
        "torch.zeros(1, device=device)\n"
        "from torch import _inductor\n"
        "_inductor.aoti_load_package(sys.argv[1])\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), device],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise RunError(f"a process of its own did not load it in {_TRIAL_S} s", where=str(path)) from err
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines()
    why = f"was ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else "could not load it"
    raise RunError(
        f"a process of its own {why}{f': {lines[-1]}' if lines else ''}",
        where=str(path),
        hint="What only the process can load that made it cannot be released; "
        + (
            "it brings a C++ library of its own: build it with a compiler that links libstdc++.so, such as CXX=/usr/bin/g++."
            if brings_cpp_library(path)
            else "build it with another PyTorch, or as TensorRT."
        ),
    )


def _foreign(table: Mapping[str, Any]) -> Description:
    """The description of a package that the gate did not make, from what AOTInductor writes."""
    capability = str(table.get("AOTI_COMPUTE_CAPABILITY") or "")
    words = str(table.get("AOTI_CPU_ISA") or "").split()
    return Description(
        device=str(table["AOTI_DEVICE_KEY"]),
        compute_capability=f"{capability[:-1]}.{capability[-1]}" if capability.isdigit() else None,
        machine=str(table["AOTI_MACHINE"]) if table.get("AOTI_MACHINE") else None,
        isa=tuple(_ISA[word] for word in words if word in _ISA) if table["AOTI_DEVICE_KEY"] == "cpu" else (),
    )


def _dynamic_shapes(spec: GateSpec, dim: Callable[..., Any]) -> tuple[tuple[dict[int, Any], ...]]:
    """For `*tensors`: per input its dynamic axes. Axes of one name are one dimension; one of a single size is none."""
    ranges = {axis: each for entry in spec.inputs.values() for axis, each in entry.axes.items()}
    dims = {axis: dim(axis, min=each.min, max=each.max) for axis, each in ranges.items() if each.min < each.max}

    def axes_of(entry: InputSpec) -> dict[int, Any]:
        return {index: dims[size] for index, size in enumerate(entry.shape) if isinstance(size, str) and size in dims}

    return (tuple(axes_of(entry) for entry in spec.inputs.values()),)


def _release(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu`: what it was built for is held by the device."""
    return version.partition("+")[0]


def _first_line(err: object) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(err).__name__


def _log_of(err: BaseException, said: tuple[str, ...]) -> tuple[str, ...]:
    return (*said, *[line for line in str(err).splitlines() if line.strip()][-_LOG_LINES:])
