"""TensorRT's API where its versions 8.6, 10, 11 and RTX 1 differ, probed with `hasattr`, each with its source."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.atomic import digest_of_stream
from gate.engines.tensorrt.command import major_of
from gate.engines.tensorrt.log import Log
from gate.errors import BackendUnavailable, BuildError, SpecError
from gate.spec import OPTIONS_OF, EngineSpec

if TYPE_CHECKING:
    import tensorrt

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

PRECISION_FLAGS = {"fp16": ("FP16",), "bf16": ("BF16",), "int8": ("INT8", "FP16")}
"""Builder flags of a network that is not strongly typed, by precision.

INT8 has FP16 beside it: TensorRT 8.6 finds no kernel for some fused layers otherwise.
Source: tensorrt.pyi 10.13, BuilderFlag; removed in 11: docs.nvidia.com, "Removed Python APIs and Replacements".
"""

CALIBRATORS = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
"""Classes of the module by `options.calibrator`. Source: tensorrt.pyi 10.13; modules of 8.6.0; gone in 11."""

HARDWARE_LEVELS = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}
"""Members of HardwareCompatibilityLevel. 8.6.0 has AMPERE_PLUS alone; both: tensorrt.pyi 10.13."""

_LEFT_OUT_ON_8 = ("CUBLAS", "CUBLAS_LT", "CUDNN")
"""Tactic sources that 8.x has on by default and later versions off.

The plugin library of 8.6 asks for cuBLAS 12 and cuDNN 8, which few hosts have beside it.
Source: tensorrt.pyi 10.13, TacticSource: "Disabled by default"; on in 8.6.0.
"""


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

    The distribution tensorrt-stubs puts `tensorrt/__init__.pyi` beside no code, which Python imports as an empty
    namespace; that is no installation.

    Raises:
        BackendUnavailable: It is not installed, or one of its libraries is missing.
    """
    hint = f'pip install "trt-gate[{_EXTRA[name]}]"'
    try:
        found = importlib.import_module(name)
    except (ImportError, OSError) as err:
        raise BackendUnavailable(
            f"backend {name!r} is not installed"
            if isinstance(err, ModuleNotFoundError) and err.name == name
            else f"backend {name!r} cannot be loaded: {err}",
            hint=hint,
        ) from err
    if not hasattr(found, "Builder"):
        sys.modules.pop(name, None)
        raise BackendUnavailable(
            f"backend {name!r} is not installed: the folder {name} on Python's path holds no code, such as type stubs",
            hint=hint,
        )
    return found


def major(trt: Any) -> int:
    """The major version of TensorRT whose API the module has: RTX 1.x has that of 11.

    Source: module tensorrt_rtx 1.7: no calibrators, no precision flags, strong typing alone.
    """
    return major_of(trt.__name__, str(trt.__version__))


def is_strongly_typed(trt: Any) -> bool:
    """Whether networks can be strongly typed: from TensorRT 9 on. Source: module tensorrt 8.6.0 has no such flag."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def is_weakly_typed(trt: Any) -> bool:
    """Whether networks can be weakly typed: up to TensorRT 10.

    Source: "Removed Python APIs and Replacements" of 11: BuilderFlag.FP16, INT8, BF16; int8_calibrator.
    """
    return hasattr(trt.BuilderFlag, "FP16")


def network_flags(trt: Any, *, typed: bool) -> int:
    """Flags to create a network with.

    8.x has implicit batch networks unless told otherwise; from 10 on EXPLICIT_BATCH is ignored.
    Source: tensorrt.pyi 10.13, NetworkDefinitionCreationFlag.

    Args:
        trt: The module.
        typed: Strongly typed.
    """
    flags = trt.NetworkDefinitionCreationFlag
    if typed:
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if major(trt) < 10 else 0


def label(name: str) -> str:
    """`fp16` for the `HALF` of TensorRT's DataType."""
    return _LABELS.get(name, name.lower() or "unknown")


def dtype(name: str) -> str:
    """NumPy's name of a TensorRT DataType: `float16` for `HALF`."""
    return _DTYPES.get(name, name.lower())


def data_type(trt: Any, precision: str) -> Any:
    """TensorRT's DataType for `fp16` and its like."""
    return getattr(trt.DataType, {value: key for key, value in _LABELS.items()}[precision])


def builder_flags(engine: EngineSpec) -> tuple[str, ...]:
    """Names of the precision flags of an engine whose network is not strongly typed."""
    return PRECISION_FLAGS.get(engine.precision, ())


def node_of(error: Any) -> tuple[str, str, int]:
    """What a parser error says of its node: name, operator, and index in the graph; -1 and empty where it does not.

    Source: ParserError.node_name and node_operator: tensorrt.pyi 10.13; module 8.6.0 has the index alone.
    """
    name = str(error.node_name()) if hasattr(error, "node_name") else ""
    operator = str(error.node_operator()) if hasattr(error, "node_operator") else ""
    return name, operator, int(error.node())


def default_tactic_sources(trt: Any, config: tensorrt.IBuilderConfig) -> int:
    """The bits of the tactic sources that are used where none are asked for."""
    bits = int(config.get_tactic_sources())
    if major(trt) < 10:
        for name in _LEFT_OUT_ON_8:
            if hasattr(trt.TacticSource, name):
                bits &= ~(1 << int(getattr(trt.TacticSource, name)))
    return bits


def tactic_source_names(trt: Any) -> tuple[str, ...]:
    """The tactic sources that the version has."""
    return tuple(trt.TacticSource.__members__)


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin library that was loaded.

    Args:
        name: Its file's name.
        sha256: Of its bytes.
        is_static: It registered its plugins when the linker loaded it; the others are registered by TensorRT.
    """

    name: str
    sha256: str
    is_static: bool


def load_plugins(trt: Any, paths: Iterable[str], log: Log) -> tuple[Plugin, ...]:
    """Load plugin libraries, each once in a process, into the process-wide plugin registry.

    A library that the registry does not take is loaded by the linker: older ones register themselves then.

    Raises:
        BuildError: One is missing or cannot be loaded; carries the log.
    """
    return tuple(_plugins(trt, paths, log))


def _plugins(trt: Any, paths: Iterable[str], log: Log) -> Iterator[Plugin]:
    for each in paths:
        path = Path(each)
        try:
            with path.open("rb") as stream:
                sha256 = digest_of_stream(stream).sha256
        except OSError as err:
            raise BuildError(
                f"the plugin library cannot be read: {err.strerror or err}",
                where=each,
                hint="options.plugins starts from the spec's folder.",
            ) from err
        try:
            is_static = _loaded(trt, str(path.resolve()), sha256)
        except OSError as err:
            raise BuildError(
                f"the plugin library cannot be loaded: {err}",
                where=each,
                log=log.last(),
                hint="Build it for this machine and this TensorRT; `ldd` names a library that it misses.",
            ) from err
        yield Plugin(name=path.name, sha256=sha256, is_static=is_static)


@functools.cache
def _loaded(trt: Any, path: str, sha256: str) -> bool:  # noqa: ARG001 - a changed file is loaded again
    """Load a library once: the registry refuses a second time what it has already. Whether the linker alone did it.

    Source: tensorrt.pyi 10.13, IPluginRegistry.load_library: None "if any of the plugins are already registered".
    """
    registry = trt.get_plugin_registry()
    if hasattr(registry, "load_library") and registry.load_library(path) is not None:
        return False
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return True


def plugin_attributes(trt: Any, name: str, version: str = "1") -> frozenset[str] | None:
    """The attributes that a plugin of the registry reads from an ONNX node; the parser drops all others in silence.

    Args:
        name: The operator, such as `EfficientNMS_TRT`.

    Returns:
        None where the registry has no such plugin, or does not say.

    Source: onnx-tensorrt, onnxOpImporters.cpp, loadFields: it walks the creator's field names, not the node's.
    """
    registry = trt.get_plugin_registry()
    find = getattr(registry, "get_creator", None) or getattr(registry, "get_plugin_creator", None)
    creator = find(name, version, "") if find is not None else None
    if creator is None:
        return None
    return frozenset(field.name for field in creator.field_names)


def require_supported(name: str, engine: EngineSpec) -> None:
    """Hold an engine's options against the installed version. Imports TensorRT only where an option depends on it.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.

    Raises:
        SpecError: The version does not have one of them; says what to use instead.
        BackendUnavailable: It is not installed.
    """
    options = engine.options
    weak_only = [key for key in ("layer_precisions", "calibrator", "calibration_cache") if getattr(options, key)]
    asks = (
        "typing",
        "builder_optimization_level",
        "timing_cache",
        "tactic_sources",
        "version_compatible",
        "hardware_compatible",
        "strip_weights",
    )
    depends = any(getattr(options, key) is not None for key in asks)
    if engine.precision not in ("bf16", "fp8") and not weak_only and not depends:
        return
    trt = module(name)
    for message, hint in _refusals(trt, f"{name} {version(name)}", engine, weak_only):
        raise SpecError(f"engine {engine.name!r}: {message}", hint=hint)
    for key in OPTIONS_OF["tensorrt"]:
        if key not in OPTIONS_OF[name] and getattr(options, key) is not None:
            raise SpecError(
                f"engine {engine.name!r}: {name} has no option {key}",
                hint=f'It has {", ".join(OPTIONS_OF[name])}; backend = "tensorrt" has {key}.',
            )


def _refusals(trt: Any, which: str, engine: EngineSpec, weak_only: list[str]) -> Iterator[tuple[str, str]]:
    """What the version does not have, and what to use instead.

    Source of each probe: members of module tensorrt 8.6.0, tensorrt.pyi 10.13, and module tensorrt_rtx 1.7; what 11
    removed: "Removed Python APIs and Replacements" of its documentation.
    """
    options = engine.options
    weak = options.typing == "weak"
    flags = trt.BuilderFlag
    if (weak or weak_only) and not is_weakly_typed(trt):
        named = ['typing = "weak"'] if weak else []
        yield (
            f"{which} is always strongly typed, so {', '.join([*named, *weak_only])} is not possible: builder flags "
            "and calibrators are gone",
            "Leave it out: precision then comes from the lowered graph, int8 with explicit Q/DQ"
            + (
                '; keep single nodes in FP32 with lowering = { exclude_nodes = ["…"] }.'
                if options.layer_precisions
                else ", which is calibrated when it is lowered."
            ),
        )
    if options.typing == "strong" and not is_strongly_typed(trt):
        yield (
            f"{which} has no strongly typed networks",
            'Leave typing out: the lowered graph is compiled with the flags it needs; typing = "weak" compiles FP32.',
        )
    if weak_only and not weak:
        yield f'{", ".join(weak_only)} needs typing = "weak"', "In strong typing the graph says the precision."
    if engine.precision == "bf16" and not hasattr(trt.DataType, "BF16"):
        yield f"{which} has no BF16", 'Use precision = "fp16", or TensorRT 9 or newer.'
    if engine.precision == "fp8" and not is_strongly_typed(trt):
        yield (
            f"{which} cannot compile fp8: its parser takes opset 17, and FP8 Q/DQ is of opset 19",
            'Use precision = "int8", or TensorRT 9 or newer.',
        )
    if weak:
        yield from _weak_refusals(trt, which, engine)
    if options.builder_optimization_level is not None and not hasattr(trt.IBuilderConfig, "builder_optimization_level"):
        yield f"{which} has no builder_optimization_level", "Leave it out, or use TensorRT 8.6 or newer."
    if options.timing_cache is not None and trt.__name__ == "tensorrt_rtx":
        # Source: tensorrt_rtx 1.7: "Deprecated in TensorRT-RTX 1.2. Timing cache operations are no-ops."
        yield f"{which} times no kernels when it builds, so it has no timing cache", "Leave timing_cache out."
    if options.version_compatible and not hasattr(flags, "VERSION_COMPATIBLE"):
        yield f"{which} cannot make version compatible plans", "Use TensorRT 8.6 or newer, or build for each version."
    level = options.hardware_compatible
    if level is not None and not hasattr(getattr(trt, "HardwareCompatibilityLevel", None), HARDWARE_LEVELS[level]):
        has = getattr(getattr(trt, "HardwareCompatibilityLevel", None), "__members__", {})
        others = [key for key, member in HARDWARE_LEVELS.items() if member in has]
        yield (
            f'{which} has no hardware_compatible = "{level}"',
            f"It has {', '.join(others)}." if others else "Build on each kind of GPU instead.",
        )
    if options.strip_weights and not hasattr(flags, "STRIP_PLAN"):
        yield f"{which} cannot strip weights", "Leave strip_weights out, or use TensorRT 10 or newer."
    has_sources = tactic_source_names(trt) if options.tactic_sources is not None else ()
    missing = [each for each in options.tactic_sources or () if each.upper() not in has_sources]
    if missing:
        yield (
            f"{which} has no tactic source {', '.join(missing)}",
            f"It has {', '.join(each.lower() for each in has_sources)}.",
        )


def _weak_refusals(trt: Any, which: str, engine: EngineSpec) -> Iterator[tuple[str, str]]:
    for flag in builder_flags(engine):
        if not hasattr(trt.BuilderFlag, flag):
            yield f"{which} has no builder flag {flag}", 'Use precision = "fp16".'
    if engine.precision == "int8" and not engine.brings_scales:
        calibrator = CALIBRATORS[engine.options.calibrator or "entropy"]
        if not hasattr(trt, calibrator):
            yield f"{which} has no calibrator {calibrator}", "Leave typing out: int8 is then explicit Q/DQ."
    allowed = {"fp32", *(flag.lower() for flag in builder_flags(engine))}
    for pattern, precision in (engine.options.layer_precisions or {}).items():
        if precision not in allowed:
            yield (
                f'layer_precisions "{pattern}" = "{precision}" is not among the precisions of {engine.precision} in weak '
                f"typing: {', '.join(sorted(allowed))}",
                "Constrain layers to one of them, or ask for another precision of the engine.",
            )
