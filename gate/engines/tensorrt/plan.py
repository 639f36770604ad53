"""What a plan's first bytes say, and whether it can run here: asked before anything is deserialised.

Pure: bytes in, facts out. TensorRT is not imported.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gate.engines.interface import BuildRecord
from gate.errors import IncompatibleEngine
from gate.results import Fingerprint

Family = Literal["tensorrt", "tensorrt_rtx"]

_FAMILIES: Mapping[bytes, Family] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
"""Tags at offset 0. Source: `kPLAN_FILE_TAG` of `trtexec --getPlanVersionOnly` in TensorRT's samples; TensorRT-RTX 1.7's
as its compiler writes it."""
_VERSION_AT = 24
"""Offset of major, minor, patch and build, one byte each, in serialization version 0. Source: likewise."""
_LENGTH_AT = 16
"""Offset of the plan's whole length, uint64. Source: every plan that TensorRT 8.6.0 on an H200 and TensorRT-RTX 1.7.1 wrote;
8.6.0 itself says `plan->header.size == blobSize failed` where it is another."""
_LEAST_BYTES: Mapping[Family, int] = {"tensorrt": 28, "tensorrt_rtx": 64}
"""The shortest header. Source: TensorRT: as far as the version goes. RTX: `Runtime.engine_header_size` of 1.7.1."""
_LATER_MAJORS = ((8, 10), (10, 11))
"""Majors that a version-compatible plan may be carried over, from and to. Source: TensorRT's developer guide, "Version
Compatibility"; not from 8 to 11."""
_DIAGNOSTICS: Mapping[int, str] = {
    1: "it was compiled by another version of TensorRT-RTX",
    2: "it was not compiled for this GPU's compute capability",
    4: "the CUDA driver is too old",
    8: "the CUDA runtime is too old",
    16: "the GPU has too little memory",
    32: "it is malformed or truncated",
    64: "the CUDA driver or runtime is not installed properly",
}
"""Source: EngineInvalidityDiagnostics of tensorrt_rtx 1.7.1."""


@dataclass(frozen=True, kw_only=True)
class PlanHeader:
    """What a plan's first bytes say.

    Args:
        family: The module that made it: `tensorrt` or `tensorrt_rtx`.
        version: Major, minor, patch and build of what made it; None in a serialization version that is not known.
        length_bytes: Of the whole plan, where the header says; else None.
    """

    family: Family
    version: tuple[int, int, int, int] | None
    length_bytes: int | None

    @property
    def made_by(self) -> str:
        """Such as `TensorRT 8.6.0.12`."""
        version = "of unknown version" if self.version is None else ".".join(map(str, self.version))
        return f"{_product(self.family)} {version}"


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where a plan is to run.

    Args:
        name: The module: `tensorrt` or `tensorrt_rtx`.
        version: Installed.
        compute_capability: Of the GPU, such as `8.9`; None where there is none to ask.
        gpu: Its name.
        os: System and architecture, such as `Linux x86_64`.
    """

    name: str
    version: str
    compute_capability: str | None = None
    gpu: str | None = None
    os: str | None = None


def read_header(data: bytes) -> PlanHeader | None:
    """What the first 64 bytes of a plan say; None where they are no plan's, or too few.

    Args:
        data: The plan, or its beginning.
    """
    family = _FAMILIES.get(data[:4])
    if family is None or len(data) < _LEAST_BYTES[family]:
        return None
    (serialization,) = struct.unpack_from("<I", data, 4)
    if serialization != 0:
        return PlanHeader(family=family, version=None, length_bytes=None)
    major, minor, patch, build = data[_VERSION_AT : _VERSION_AT + 4]
    (length,) = struct.unpack_from("<Q", data, _LENGTH_AT)
    return PlanHeader(family=family, version=(major, minor, patch, build), length_bytes=length)


def require_compatible(
    data: bytes,
    *,
    host: Host,
    where: str,
    version_compatible: bool = False,
    hardware_compatible: str | None = None,
    record: BuildRecord | None = None,
    device: Fingerprint | None = None,
) -> PlanHeader:
    """Hold a plan against the runtime, the GPU and the platform that shall run it, before it is deserialised.

    Args:
        data: The whole plan.
        host: Where it shall run.
        where: The plan's name, for messages.
        version_compatible: The spec says that it was built so.
        hardware_compatible: The level that the spec says it was built with; None: for one compute capability.
        record: How it was built, where that is known. What it says of both options counts, not what the spec says.
        device: Where it was built, where that is known.

    Returns:
        The plan's header.

    Raises:
        IncompatibleEngine: It is empty, truncated or no plan, or for another runtime, version, GPU or platform.
    """
    header = _require_whole(data, where)
    if record is not None:
        version_compatible = record.options.get("version_compatible") is True
        hardware_compatible = record.options.get("hardware_compatible") or None
        _require_record(header, record, where)
    if header.family != host.name:
        raise IncompatibleEngine(
            f"it is a plan of {header.made_by}; here it is to run with {_product(host.name)} {host.version}",
            where=where,
            hint=f'Set backend = "{header.family}" in this [[engine]], or build it with backend = "{host.name}".',
        )
    built_for = device.compute_capability if device is not None else None
    both = (
        f"was built by {header.made_by}{f' for compute capability {built_for}' if built_for else ''}"
        f"{f' on {device.os}' if device is not None else ''}; here are {_product(host.name)} {host.version}"
        f"{f' and {host.compute_capability}' if host.compute_capability else ''}{f' ({host.gpu})' if host.gpu else ''}"
        f"{f' on {host.os}' if host.os and device is not None else ''}"
    )
    if not _is_version_accepted(header, host, version_compatible):
        raise IncompatibleEngine(
            f"the plan {both}",
            where=where,
            hint=f'Build it here (backend = "{host.name}")'
            + (
                ", or set version_compatible = true when building and when loading: then 8 runs in 10, and 10 in 11, "
                "but 8 not in 11, and none in an earlier version."
                if header.family == "tensorrt"
                else "."
            ),
        )
    if device is not None and host.os is not None and device.os != host.os:
        raise IncompatibleEngine(f"the plan {both}", where=where, hint="Build it on the platform that it runs on.")
    if (
        header.family == "tensorrt"
        and built_for is not None
        and host.compute_capability is not None
        and not _is_hardware_accepted(built_for, host.compute_capability, hardware_compatible)
    ):
        raise IncompatibleEngine(
            f"the plan {both}",
            where=where,
            hint=f'Build it here (backend = "{host.name}"), or set hardware_compatible = "ampere_plus" when building, '
            "for GPUs of compute capability 8.0 and above.",
        )
    return header


def reasons_of_diagnostics(bits: int) -> tuple[str, ...]:
    """What TensorRT-RTX's validity check found, in words.

    Args:
        bits: Its EngineInvalidityDiagnostics, or-ed.
    """
    found = [text for bit, text in _DIAGNOSTICS.items() if bits & bit]
    rest = bits & ~sum(_DIAGNOSTICS)
    return (*found, f"diagnostics {rest:#x}") if rest else tuple(found)


def _require_whole(data: bytes, where: str) -> PlanHeader:
    """The header of a plan of which nothing is missing, as far as that can be told.

    Raises:
        IncompatibleEngine: It is empty, truncated, or no plan.
    """
    if not data:
        raise IncompatibleEngine("the plan is empty", where=where, hint="Build it again, or copy it again.")
    family = _FAMILIES.get(data[:4])
    if family is None:
        raise IncompatibleEngine(
            f"it is no TensorRT plan: it begins with {data[:4]!r}, a plan of TensorRT 8.6 and above with b'ftrt', one of "
            "TensorRT-RTX with b'vtrt'",
            where=where,
            hint="Give the file that the builder wrote, not the ONNX file; plans of versions before 8.6 are not read.",
        )
    header = read_header(data)
    if header is None:
        raise IncompatibleEngine(
            f"the plan is truncated: {len(data)} bytes, its header alone has {_LEAST_BYTES[family]}",
            where=where,
            hint="Build it again, or copy it again.",
        )
    if header.length_bytes is not None and header.length_bytes != len(data):
        what = "truncated" if len(data) < header.length_bytes else "longer than it says, or damaged"
        raise IncompatibleEngine(
            f"the plan is {what}: {len(data)} bytes, its header says {header.length_bytes}",
            where=where,
            hint="Build it again, or copy it again.",
        )
    return header


def _require_record(header: PlanHeader, record: BuildRecord, where: str) -> None:
    """Raises IncompatibleEngine where a build record is of another plan."""
    same = header.version is None or _agree(header.version, _numbers(record.backend_version))
    if record.backend != header.family or not same:
        raise IncompatibleEngine(
            f"the plan was made by {header.made_by}, its build record says {_product(record.backend)} "
            f"{record.backend_version}",
            where=where,
            hint="The record belongs to another plan: build and seal both together.",
        )


def _is_version_accepted(header: PlanHeader, host: Host, version_compatible: bool) -> bool:
    """Whether the installed version may be given the plan. A version that cannot be read is left to the runtime."""
    if header.version is None:
        return True
    here = _numbers(host.version)
    if _agree(header.version, here):
        return True
    if not version_compatible or header.family != "tensorrt" or len(here) < 3:
        return False
    if header.version[0] == here[0]:
        return header.version[: len(here)] <= here
    return (header.version[0], here[0]) in _LATER_MAJORS


def _is_hardware_accepted(built: str, here: str, level: str | None) -> bool:
    if level == "ampere_plus":
        return min(_numbers(built), _numbers(here)) >= (8, 0)
    return built == here


def _agree(made: tuple[int, ...], here: tuple[int, ...]) -> bool:
    """Whether two versions are the same, as far as both say; the first three parts must be said."""
    if len(here) < 3:
        return False
    return all(one == other % 256 for one, other in zip(made, here, strict=False))


def _numbers(version: str) -> tuple[int, ...]:
    """`(8, 6, 0)` of `8.6.0`, at most four parts; what follows the numbers, such as `.post1`, is left out."""
    found = re.match(r"\d+(?:\.\d+){0,3}", version)
    return tuple(int(part) for part in found.group().split(".")) if found is not None else ()


def _product(name: str) -> str:
    return {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(name, name)
