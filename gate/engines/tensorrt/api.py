"""TensorRT's API where its versions 8.6, 10, 11 and RTX 1 differ, probed with `hasattr`, each with its source."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from typing import Any

from gate.errors import BackendUnavailable, SpecError
from gate.spec import EngineSpec

_DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
_EXTRA = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}

_LABELS = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "fp8",
    "INT4": "int4",
    "FP4": "fp4",
}
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def version(name: str) -> str:
    """The installed version, by its metadata; an installation without metadata is imported.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.

    Raises:
        BackendUnavailable: It is not installed.
    """
    for distribution in _DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return str(module(name).__version__)


def module(name: str) -> Any:
    """The module, imported.

    Raises:
        BackendUnavailable: It is not installed, or one of its libraries is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise BackendUnavailable(
            f"backend {name!r} is not installed"
            if isinstance(err, ModuleNotFoundError) and err.name == name
            else f"backend {name!r} cannot be loaded: {err}",
            hint=f'pip install "trt-gate[{_EXTRA[name]}]"',
        ) from err


def is_strongly_typed(trt: Any) -> bool:
    """Whether networks can be strongly typed: from TensorRT 9 on."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def label(name: str) -> str:
    """`fp16` for the `HALF` of TensorRT's DataType."""
    return _LABELS.get(name, name.lower() or "unknown")


def dtype(name: str) -> str:
    """NumPy's name of a TensorRT DataType: `float16` for `HALF`."""
    return _DTYPES.get(name, name.lower())


def require_supported(name: str, engine: EngineSpec) -> None:
    """Hold an engine's options against the installed version. Imports TensorRT only where an option depends on it.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.

    Raises:
        SpecError: The version does not have one of them; says what to use instead.
        BackendUnavailable: It is not installed.
    """
    if engine.options.typing is None:
        return
    trt = module(name)
    if engine.options.typing == "weak" and not hasattr(trt.BuilderFlag, "FP16"):
        raise SpecError(
            f'engine {engine.name!r}: {name} {version(name)} is always strongly typed, so typing = "weak" is not '
            "possible: builder flags and calibrators are gone",
            hint="Leave typing out: precision then comes from the lowered graph, int8 with explicit Q/DQ.",
        )
    if engine.options.typing == "strong" and not is_strongly_typed(trt):
        raise SpecError(
            f"engine {engine.name!r}: {name} {version(name)} has no strongly typed networks",
            hint='Leave typing out: the lowered graph is compiled with the flags it needs; typing = "weak" compiles FP32.',
        )
