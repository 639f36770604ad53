"""Opens an inference session on the execution provider that was asked for, or says why there is none."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gate.chatter import quiet
from gate.engines.graph import layers_of
from gate.engines.onnxruntime.placement import RECORD_ENTRY
from gate.engines.onnxruntime.providers import CPU, TENSORRT
from gate.errors import BackendUnavailable, RunError
from gate.spec import EngineOptions

_WARNINGS, _ERRORS_ONLY, _FATAL_ONLY = 2, 3, 4
"""Severity of ONNX Runtime's log: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal."""

_LOG_LINE = re.compile(r"\[[WEF]:onnxruntime:[^\]]*\] *(.*)")
_LOCATED = re.compile(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"^/\S+\.(?:cc|h):\d+ .*?\) (?=[A-Z])")
_COLOUR = re.compile(r"\x1b?\[[0-9;]*m")
_LIBRARY = re.compile(r"\b(lib\w+)\.so\.(\d+)")
_QUANTIZER = b"QuantizeLinear"
_FLOAT8_TYPES = range(17, 21)
"""Source: onnx.proto3, TensorProto.DataType: FLOAT8E4M3FN, FLOAT8E4M3FNUZ, FLOAT8E5M2, FLOAT8E5M2FNUZ."""

_WRONG_FOR_FP8 = ("ReluQuantRewrite", "ClipQuantRewrite")
"""Rewrites that take a Relu or Clip away before a QuantizeLinear since its integers are clamped anyway.

For fp8 the first reads the zero point as the lowest value, and takes a Relu away that mattered; the second refuses the
graph. Source: ONNX Runtime 1.31, optimizer/qdq_transformer/relu_quantizelinear.cc and clip_quantizelinear.cc.
"""

_TENSORRT_LIBRARIES = ("libnvinfer.so.*", "libnvinfer_plugin.so.*", "libnvonnxparser.so.*")

Providers = Sequence[tuple[str, Mapping[str, str]]]
"""Execution providers in order of preference, each with its options."""


def open_session(path: Path, options: EngineOptions, *, providers: Providers = ((CPU, {}),)) -> Any:
    """An `onnxruntime.InferenceSession` whose first provider is the first that is asked for.

    Whether that provider runs the nodes is another question: `placement.require_placement`.

    Args:
        path: The ONNX file.
        options: Threads and optimisation level.
        providers: What may run it, in order of preference.

    Raises:
        RunError: ONNX Runtime refuses the graph.
        BackendUnavailable: The provider cannot be loaded here.
    """
    import onnxruntime

    asked = providers[0][0]
    available = onnxruntime.get_available_providers()
    if asked not in available:
        raise BackendUnavailable(
            f"the installed ONNX Runtime {onnxruntime.__version__} has no {asked} (it has {', '.join(available)})",
            hint="pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    settings = _settings(onnxruntime, options)
    disabled = disabled_optimizers(path)
    if asked == CPU:
        onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
        return _cpu_session(onnxruntime, path, settings, disabled)
    preload_libraries(onnxruntime)
    settings.add_session_config_entry(RECORD_ENTRY, "1")
    arguments = [(name, dict(given)) for name, given in providers]
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)
    try:
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=arguments, enable_fallback=0, disabled_optimizers=disabled
        )
    except Exception as err:
        text = _SOURCE.sub("", text_of(err))
        if type(err) is not RuntimeError:
            raise RunError(f"ONNX Runtime refuses the graph on {asked}: {text}", where=str(path)) from err
        causes = (*_causes(onnxruntime, path, settings, arguments), text)
        raise not_loaded(asked, causes, cuda=_cuda_of(onnxruntime)) from err
    finally:
        onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    session.disable_fallback()
    if session.get_providers()[0] != asked:
        del session
        raise not_loaded(asked, _causes(onnxruntime, path, settings, arguments), cuda=_cuda_of(onnxruntime))
    return session


def disabled_optimizers(path: Path) -> tuple[str, ...]:
    """The graph optimisations of ONNX Runtime that must not run on a graph, by name: some are wrong for fp8.

    Args:
        path: The ONNX file; its external data is not read.
    """
    return _WRONG_FOR_FP8 if _quantizes_to_fp8(path) else ()


def _quantizes_to_fp8(path: Path) -> bool:
    """Whether a graph has Q/DQ and any fp8; `onnx` is loaded for graphs with Q/DQ alone."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if view.find(_QUANTIZER) < 0:
            return False
    try:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001 - what cannot be read is not run either; and without onnx, slower is safer than wrong
        return True
    tensors = onnx.external_data_helper._get_all_tensors(model)  # noqa: SLF001 - onnx has no public walk over all tensors
    if any(tensor.data_type in _FLOAT8_TYPES for tensor in tensors):
        return True
    nodes = (*model.graph.node, *(node for function in model.functions for node in function.node))
    return any(
        attribute.name in ("output_dtype", "to") and attribute.i in _FLOAT8_TYPES
        for node in nodes
        for attribute in node.attribute
    )


def not_loaded(asked: str, causes: Sequence[str], *, cuda: str) -> BackendUnavailable:
    """The error for a provider that ONNX Runtime left out of a session.

    Args:
        asked: ONNX Runtime's name of the provider.
        causes: What it logged.
        cuda: The CUDA version that ONNX Runtime is built with; empty where it does not say.
    """
    missing = _LIBRARY.search(" ".join(causes).partition("with error: ")[2])
    if missing is not None and missing.group(1).startswith("libnv"):
        major = int(missing.group(2))
        hint = f'pip install "tensorrt>={major},<{major + 1}", or put its libraries on LD_LIBRARY_PATH.'
    elif missing is not None:
        built = f", built with CUDA {cuda}" if cuda else ""
        hint = (
            f'pip install "onnxruntime-gpu[cuda,cudnn]"{built}, or put the libraries of that CUDA, cuBLAS and cuDNN on '
            "LD_LIBRARY_PATH."
        )
    else:
        hint = "Look whether nvidia-smi shows the GPU here, and whether its driver is new enough for that CUDA."
    return BackendUnavailable(
        f"ONNX Runtime did not load {asked}, and would have run the graph elsewhere: "
        f"{'; '.join(causes) or 'it logged no cause'}",
        hint=hint,
    )


def causes_in(log: str) -> tuple[str, ...]:
    """What went wrong, by lines of ONNX Runtime's own log: each once, without time stamps and source locations."""
    found: dict[str, None] = {}
    for line in log.splitlines():
        match = _LOG_LINE.search(_COLOUR.sub("", line))
        if match is not None and (text := _LOCATED.sub("", match.group(1)).strip()):
            found[text] = None
    return tuple(found)


def preload_libraries(onnxruntime: Any) -> None:
    """Load CUDA, cuDNN and TensorRT from the installed Python packages, where they are not on the loader's path.

    ONNX Runtime's own `preload_dlls` looks beside its own package only; others may be installed elsewhere on sys.path.
    """
    with quiet():
        for folder in (None, *_package_folders("nvidia")):
            with contextlib.suppress(RuntimeError):
                onnxruntime.preload_dlls(directory=None if folder is None else str(folder))
        for folder in _package_folders("tensorrt_libs", inside=""):
            for pattern in _TENSORRT_LIBRARIES:
                for file in sorted(folder.glob(pattern)):
                    with contextlib.suppress(OSError):
                        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def text_of(err: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(err).split()) or type(err).__name__


def _package_folders(name: str, *, inside: str = "*/lib") -> tuple[Path, ...]:
    """Folders of an installed package that may hold libraries; it is found, not imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ()
    roots = [Path(each) for each in (spec.submodule_search_locations if spec is not None else None) or ()]
    return tuple(folder for root in roots for folder in ([root] if not inside else sorted(root.glob(inside))))


def _settings(onnxruntime: Any, options: EngineOptions) -> Any:
    levels = onnxruntime.GraphOptimizationLevel
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    settings.use_deterministic_compute = True
    settings.graph_optimization_level = {
        "disabled": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[options.optimization or "all"]
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    return settings


def _cpu_session(onnxruntime: Any, path: Path, settings: Any, disabled: tuple[str, ...]) -> Any:
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[CPU], disabled_optimizers=disabled)
    except Exception as err:
        text = text_of(err)
        if "bfloat16" in text.lower() or _is_bf16(path):
            raise RunError(
                f"ONNX Runtime's CPU provider cannot run this bf16 graph: {text}",
                where=str(path),
                hint='Use precision = "fp16" here, or compile bf16 with backend = "tensorrt_rtx", evidence = "preflight".',
            ) from err
        raise RunError(f"ONNX Runtime refuses the graph: {text}", where=str(path)) from err
    session.disable_fallback()
    used = session.get_providers()
    if used != [CPU]:
        raise RunError(f"asked for {CPU}, ONNX Runtime took {', '.join(used)}", where=str(path))
    return session


def _is_bf16(path: Path) -> bool:
    """Whether a graph that was refused computes in bf16; only then is `onnx` loaded, and weights never."""
    try:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001 - it only chooses a hint; the refusal itself is reported
        return False
    return any(layer.precision == "bf16" for layer in layers_of(model))


def _causes(onnxruntime: Any, path: Path, settings: Any, arguments: Any) -> tuple[str, ...]:
    """What ONNX Runtime logs when it leaves the provider out: it is made to do so again, and listened to."""
    onnxruntime.set_default_logger_severity(_WARNINGS)
    try:
        with quiet() as chatter, contextlib.suppress(Exception):
            onnxruntime.InferenceSession(str(path), settings, providers=arguments, enable_fallback=0)
    finally:
        onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return causes_in(chatter.native())


def _cuda_of(onnxruntime: Any) -> str:
    return str(getattr(onnxruntime, "cuda_version", "") or "")


def provider_list(asked: str, given: Mapping[str, str], *, stream: int | None) -> Providers:
    """The provider with its options, and what may run the nodes that it does not take.

    Args:
        asked: ONNX Runtime's name of a GPU provider.
        given: Its options.
        stream: The CUDA stream to run on; None: one of its own.
    """
    on = {} if stream is None else {"user_compute_stream": str(stream)}
    providers: list[tuple[str, Mapping[str, str]]] = [(asked, {**given, **on})]
    if asked == TENSORRT:
        providers.append(("CUDAExecutionProvider", {"use_tf32": "0", **on}))
    return (*providers, (CPU, {}))
