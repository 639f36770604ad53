"""A loaded graph on the CPU, and what it shares with one on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gate.engines.feed import require_feed, require_inputs
from gate.engines.graph import external_files, has_external_data, unsafe_external_file
from gate.engines.onnxruntime.session import open_session, text_of
from gate.errors import BackendUnavailable, BuildError, RunError
from gate.spec import EngineOptions, GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta

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


_BFLOAT16_IN_ONNX = 16
"""Source: `TensorProto.DataType` of ONNX. NumPy has no such type to name it by."""


def element_type(dtype: str) -> Any:
    """What ONNX Runtime takes for a dtype: NumPy's type, or ONNX's number of a type that NumPy does not have."""
    return _BFLOAT16_IN_ONNX if dtype == "bfloat16" else np.dtype(dtype).type


def reference_runner(path: Path, *, spec: GateSpec) -> OnnxRuntimeRunner:
    """An FP32 ONNX file as the reference, run as it is: only basic graph optimisation.

    Raises:
        RunError: It cannot be loaded, or its inputs are not the spec's.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    try:
        return OnnxRuntimeRunner(path, spec=spec, options=EngineOptions(optimization="basic"))
    except ImportError as err:
        raise BackendUnavailable(
            "backend 'onnxruntime' is not installed", hint='pip install "trt-gate[onnxruntime]"'
        ) from err


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
                read_model(path)
            except BuildError as err:
                raise RunError(err.message, where=self._where) from err
        self._spec = spec
        self._cast_io = cast_io
        self._sinks: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._session: Any = self._load(path, options or EngineOptions())
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
        feed = self._required_feed(feed_dict)
        names = list(self._outputs)
        try:
            values = session.run(names, feed)
        except Exception as err:
            raise self._failed(err) from err
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference on inputs that are bound already, each call to its own, to outputs that all calls share.

        Raises:
            RunError: As `run`.
        """
        session = self._open_session()
        feed = self._required_feed(feed_dict)
        binding = session.io_binding()
        for name, array in feed.items():
            # This holds the array. A bound OrtValue reads it too, and nothing says that it keeps it alive.
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        run = session.run_with_iobinding

        def once() -> None:
            try:
                run(binding)
            except Exception as err:
                raise self._failed(err) from err

        once()
        self._share_outputs(binding)
        return once

    def close(self) -> None:
        """Free the session, and the outputs of timed calls."""
        self._session = None
        self._sinks = {}

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, path: Path, options: EngineOptions) -> Any:
        return open_session(path, options)

    def _required_feed(self, feed_dict: NamedArrays) -> dict[str, Array]:
        return require_feed(feed_dict, self._inputs, spec=self._spec, cast_io=self._cast_io)

    def _share_outputs(self, binding: Any) -> None:
        """After an inference, bind its outputs to the values that calls with outputs of these shapes share.

        A binding that ran holds its outputs and writes the next ones there: without this every batch would have its own.

        Raises:
            RunError: There is too little memory.
        """
        import onnxruntime

        try:
            for meta, made in zip(self._outputs.values(), binding.get_outputs(), strict=True):
                key = meta.name, tuple(int(size) for size in made.shape())
                if key not in self._sinks:
                    self._sinks[key] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                        key[1], element_type(meta.dtype)
                    )
                binding.bind_ortvalue_output(meta.name, self._sinks[key])
        except Exception as err:
            raise self._failed(err) from err

    def _open_session(self) -> Any:
        if self._session is None:
            raise RunError("the runner is closed", where=self._where)
        return self._session

    def _failed(self, err: Exception) -> RunError:
        return RunError(f"ONNX Runtime failed: {text_of(err)}", where=self._where)


def read_model(path: Path) -> tuple[Any, tuple[str, ...]]:
    """An ONNX file as an `onnx.ModelProto` without its external data, and the names of the files that hold that.

    Raises:
        BuildError: It cannot be read, or keeps data outside its folder.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise BuildError("there is no such file", where=str(path)) from None
    except Exception as err:
        raise BuildError(f"is not an ONNX file: {text_of(err)}", where=str(path)) from err
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
