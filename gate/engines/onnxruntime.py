"""ONNX Runtime on the CPU: runs the numerics of a lowered graph on any host."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gate import atomic
from gate.engines.feed import profile_of, require_feed, require_inputs
from gate.engines.graph import external_files, has_external_data, layers_of, unsafe_external_file
from gate.engines.interface import BuildRecord, Origin, Resources
from gate.errors import BackendUnavailable, BuildError, RunError
from gate.spec import EngineOptions, EngineSpec, GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.verdict import Evidence

_PROVIDER = "CPUExecutionProvider"
_ERRORS_ONLY = 3
"""Severity of ONNX Runtime's log: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal."""

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def version(self) -> str:
        """The installed version, by its metadata.

        Raises:
            BackendUnavailable: It is not installed.
        """
        for distribution in ("onnxruntime", "onnxruntime-gpu"):
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        raise BackendUnavailable("backend 'onnxruntime' is not installed", hint='pip install "trt-gate[onnxruntime]"')

    def runs_here(self, engine: EngineSpec) -> Evidence | None:  # noqa: ARG002 - the same for every engine
        """`host`: it runs on any CPU."""
        return Evidence.HOST

    def origin(self, engine: EngineSpec) -> Origin:  # noqa: ARG002 - the same for every engine
        """The lowered graph."""
        return "lowered"

    def file_name(self, engine: EngineSpec) -> str:  # noqa: ARG002 - the same for every engine
        """`model.onnx`."""
        return "model.onnx"

    def unsealable(self, engine: EngineSpec) -> str | None:  # noqa: ARG002 - the same for every engine
        """None: what was checked is the file."""
        return None

    def require_supported(self, engine: EngineSpec) -> None:
        """Nothing depends on the version."""

    def build(
        self,
        *,
        onnx: Path | None,
        out: Path,
        spec: GateSpec,
        engine: EngineSpec,
        resources: Resources | None = None,  # noqa: ARG002 - a graph is all it takes
    ) -> BuildRecord:
        """Prove that the runtime loads the graph, list its nodes, and copy it, with its external data.

        Raises:
            BuildError: It cannot be read, keeps data outside its folder, or the runtime refuses it.
            BackendUnavailable: ONNX Runtime is not installed.
        """
        version = self.version()
        if onnx is None:
            raise BuildError("backend 'onnxruntime' builds from ONNX, and there is none")
        model, externals = _read_model(onnx)
        try:
            session = _session(onnx, engine.options)
        except RunError as err:
            raise BuildError(err.message, where=str(onnx), hint=err.hint, node=_node_in(err.message)) from err
        del session
        atomic.write_bytes(out, onnx.read_bytes())
        for name in externals:
            target = out.parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(onnx.parent / name, target)
        return BuildRecord(
            backend=self.name,
            backend_version=version,
            precision=engine.precision,
            options={
                "provider": _PROVIDER,
                "threads": engine.options.threads,
                "optimization": engine.options.optimization or "all",
            },
            profile=profile_of(spec),
            layers=layers_of(model),
            layers_source="graph",
        )

    def open(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> OnnxRuntimeRunner:
        """Load a graph.

        Raises:
            RunError: It cannot be loaded, keeps data outside its folder, or its inputs are not the spec's.
            BackendUnavailable: ONNX Runtime is not installed.
        """
        self.version()
        return OnnxRuntimeRunner(path, spec=spec, cast_io=engine.cast_io, options=engine.options)


def reference_runner(path: Path, *, spec: GateSpec) -> OnnxRuntimeRunner:
    """An FP32 ONNX file as the reference, run as it is: only basic graph optimisation.

    Raises:
        RunError: It cannot be loaded, or its inputs are not the spec's.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    OnnxRuntimeBackend().version()
    return OnnxRuntimeRunner(path, spec=spec, options=EngineOptions(optimization="basic"))


class OnnxRuntimeRunner:
    """A loaded graph on the CPU.

    Args:
        path: The ONNX file.
        spec: Its inputs and their ranges.
        cast_io: Feed a float input in the graph's own floating dtype.
        options: Threads and optimisation level.

    Raises:
        RunError: It cannot be loaded, or its inputs are not the spec's.
    """

    def __init__(
        self, path: Path, *, spec: GateSpec, cast_io: bool = False, options: EngineOptions | None = None
    ) -> None:
        self._where = str(path)
        if not path.is_file():
            raise RunError("there is no such file", where=self._where)
        if has_external_data(path):
            try:
                _read_model(path)
            except BuildError as err:
                raise RunError(err.message, where=self._where) from err
        self._spec = spec
        self._cast_io = cast_io
        self._session: Any = _session(path, options or EngineOptions())
        self._inputs = {each.name: _meta(each, self._where) for each in self._session.get_inputs()}
        self._outputs = {each.name: _meta(each, self._where) for each in self._session.get_outputs()}
        require_inputs(self._inputs, spec=spec, cast_io=cast_io, where=self._where)

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives."""
        return self._outputs

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """One inference.

        Raises:
            RunError: An input does not fit, the runtime failed, or the runner is closed.
        """
        session = self._open_session()
        feed = require_feed(feed_dict, self._inputs, spec=self._spec, cast_io=self._cast_io)
        names = list(self._outputs)
        try:
            values = session.run(names, feed)
        except Exception as err:
            raise self._failed(err) from err
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference on inputs that are bound already; outputs are allocated by the runtime each time.

        Raises:
            RunError: As `run`.
        """
        import onnxruntime

        session = self._open_session()
        feed = require_feed(feed_dict, self._inputs, spec=self._spec, cast_io=self._cast_io)
        binding = session.io_binding()
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        run = session.run_with_iobinding

        def once() -> None:
            try:
                run(binding)
            except Exception as err:
                raise self._failed(err) from err

        once()
        return once

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_session(self) -> Any:
        if self._session is None:
            raise RunError("the runner is closed", where=self._where)
        return self._session

    def _failed(self, err: Exception) -> RunError:
        return RunError(f"ONNX Runtime failed: {_text(err)}", where=self._where)


def _session(path: Path, options: EngineOptions) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
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
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[_PROVIDER])
    except Exception as err:
        text = _text(err)
        if "bfloat16" in text.lower() or _is_bf16(path):
            raise RunError(
                f"ONNX Runtime's CPU provider cannot run this bf16 graph: {text}",
                where=str(path),
                hint='Use precision = "fp16" here, or compile bf16 with backend = "tensorrt_rtx", evidence = "preflight".',
            ) from err
        raise RunError(f"ONNX Runtime refuses the graph: {text}", where=str(path)) from err
    session.disable_fallback()
    used = session.get_providers()
    if used != [_PROVIDER]:
        raise RunError(f"asked for {_PROVIDER}, ONNX Runtime took {', '.join(used)}", where=str(path))
    return session


def _is_bf16(path: Path) -> bool:
    """Whether a graph that was refused computes in bf16; only then is `onnx` loaded, and weights never."""
    try:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001 - it only chooses a hint; the refusal itself is reported
        return False
    return any(layer.precision == "bf16" for layer in layers_of(model))


def _read_model(path: Path) -> tuple[Any, tuple[str, ...]]:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise BuildError("there is no such file", where=str(path)) from None
    except Exception as err:
        raise BuildError(f"is not an ONNX file: {_text(err)}", where=str(path)) from err
    names = external_files(model)
    if (wrong := unsafe_external_file(path, names)) is not None:
        raise BuildError(wrong, where=str(path), hint="Keep external data beside the model, as regular files.")
    return model, names


def _meta(value: Any, where: str) -> TensorMeta:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise RunError(f"{value.name!r} is a {value.type}, which cannot be compared as an array", where=where)
    shape = tuple(size if isinstance(size, (int, str)) else None for size in value.shape)
    return TensorMeta(value.name, dtype, shape)


def _node_in(message: str) -> str | None:
    """The node that ONNX Runtime names: `… node with name '/f/f.0/Conv'`, `Node (name) Op (…)`."""
    for before, after in (("node with name '", "'"), ("Node (", ")"), ("Node:", " ")):
        _, found, rest = message.partition(before)
        if found and rest.partition(after)[0].strip():
            return rest.partition(after)[0].strip()
    return None


def _text(err: Exception) -> str:
    return " ".join(str(err).split()) or type(err).__name__
