"""A deserialised plan that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gate.engines.feed import require_feed, require_inputs
from gate.engines.tensorrt.api import dtype as dtype_of
from gate.engines.tensorrt.log import Log
from gate.engines.tensorrt.memory import Memory, memory
from gate.errors import IncompatibleEngine, RunError
from gate.spec import GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta


class TensorRTRunner:
    """A deserialised plan on the first visible GPU, with one execution context and one stream.

    Args:
        trt: The module, `tensorrt` or `tensorrt_rtx`.
        path: The plan.
        spec: Its inputs and their ranges.
        cast_io: Feed a float input in the engine's own floating dtype.

    Raises:
        IncompatibleEngine: The runtime refuses the plan.
        RunError: Its inputs are not the spec's, or it cannot be run.
        BackendUnavailable: No library for device memory is installed.
    """

    def __init__(self, trt: Any, path: Path, *, spec: GateSpec, cast_io: bool = False) -> None:
        self._where = str(path)
        self._spec = spec
        self._cast_io = cast_io
        self._log = Log()
        self._logger = self._log.logger(trt)
        self._memory: Memory | None = memory()
        self._buffers: dict[str, tuple[int, int]] = {}
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")
        self._runtime: Any = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise IncompatibleEngine(
                f"{trt.__name__} {trt.__version__} refuses the plan: {' · '.join(self._log.last()) or 'no reason given'}",
                where=self._where,
                hint="Build it here, with the installed version and on this GPU.",
            )
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise RunError(f"no execution context: {' · '.join(self._log.last())}", where=self._where)
        self._stream = self._memory.stream()
        self._inputs: dict[str, TensorMeta] = {}
        self._outputs: dict[str, TensorMeta] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name))
            meta = TensorMeta(name, dtype_of(self._engine.get_tensor_dtype(name).name), shape)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if is_input else self._outputs)[name] = meta
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
        """One inference: copy in, compute, copy out, wait.

        Raises:
            RunError: An input does not fit, the engine failed, or the runner is closed.
        """
        feed, outputs = self._bind(feed_dict)
        self._infer(feed, outputs)
        return {
            name: _float32_from_bfloat16(array) if self._outputs[name].dtype == "bfloat16" else array
            for name, array in outputs.items()
        }

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference with both copies, from arrays and buffers that are there already, done when it returns.

        Raises:
            RunError: As `run`.
        """
        feed, outputs = self._bind(feed_dict)

        def once() -> None:
            self._infer(feed, outputs)

        once()
        return once

    def close(self) -> None:
        """Free the context, the engine and the device memory."""
        memory, self._memory = self._memory, None
        self._context = self._engine = self._runtime = None
        if memory is not None:
            for address, _ in self._buffers.values():
                memory.free(address)
            self._buffers = {}
            memory.close(self._stream)

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bind(self, feed_dict: NamedArrays) -> tuple[dict[str, Array], dict[str, Array]]:
        if self._memory is None:
            raise RunError("the runner is closed", where=self._where)
        feed = require_feed(feed_dict, self._inputs, spec=self._spec, cast_io=self._cast_io)
        for name, array in feed.items():
            if not self._context.set_input_shape(name, array.shape):
                raise self._failed(f"input {name!r} cannot have the shape {list(array.shape)}")
            self._place(name, array.nbytes)
        outputs: dict[str, Array] = {}
        for name, meta in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise self._failed(f"output {name!r} has a shape that depends on values, {list(shape)}")
            outputs[name] = np.empty(shape, "uint16" if meta.dtype == "bfloat16" else meta.dtype)
            self._place(name, outputs[name].nbytes)
        return feed, outputs

    def _place(self, name: str, nbytes: int) -> None:
        if self._memory is None:
            raise RunError("the runner is closed", where=self._where)
        address, size = self._buffers.get(name, (0, -1))
        if size < nbytes:
            if size >= 0:
                del self._buffers[name]
                self._memory.free(address)
            address = self._memory.allocate(max(nbytes, 1))
            self._buffers[name] = (address, nbytes)
        if not self._context.set_tensor_address(name, address):
            raise self._failed(f"no address for {name!r}")

    def _infer(self, feed: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        memory = self._memory
        if memory is None:
            raise RunError("the runner is closed", where=self._where)
        for name, array in feed.items():
            memory.to_device(self._buffers[name][0], array, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise self._failed("the engine did not run")
        for name, array in outputs.items():
            memory.to_host(array, self._buffers[name][0], self._stream)
        memory.synchronize(self._stream)

    def _failed(self, what: str) -> RunError:
        told = " · ".join(self._log.last())
        return RunError(f"{what}{f': {told}' if told else ''}", where=self._where)


def _float32_from_bfloat16(bits: Array) -> Array:
    """The float32 values of bfloat16 bits: its upper half.

    Args:
        bits: uint16, any shape.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)
