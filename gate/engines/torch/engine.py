"""The runner of a PyTorch engine: eager, compiled or packaged, on the CPU or a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from types import TracebackType
from typing import Any

from gate.chatter import quiet
from gate.engines.feed import metas_from_spec, require_feed
from gate.engines.interface import Unread, Wait
from gate.engines.regions import require_alike, unread_regions
from gate.engines.torch import arithmetic
from gate.engines.torch.module import Mode, least_feed
from gate.engines.torch.runner import array_from, metas_of, named_outputs, tensor_from
from gate.errors import GateError, RunError
from gate.factory import failure_of
from gate.spec import GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta

_NS_PER_MS = 1_000_000
_NO_COMPILER = ("No working C++ compiler found", "Failed to find C compiler", "InvalidCxxCompiler")
"""Source: `torch/_inductor/exc.py`; Triton's `runtime/build.py`."""


def lacks_compiler(err: BaseException | None) -> bool:
    """Whether PyTorch's compiler failed for want of a C or C++ compiler."""
    while err is not None:
        if any(each in f"{type(err).__name__}: {err}" for each in _NO_COMPILER):
            return True
        err = err.__cause__ or err.__context__
    return False


class TorchEngineRunner:
    """An engine in PyTorch on the CPU.

    Outputs in a narrower floating dtype than the FP32 model's are brought back to that one after the engine.
    PyTorch's process-wide switches are as an engine is deployed while it is open, and put back when it is closed.

    Args:
        function: Takes tensors in the spec's order.
        spec: The inputs and their ranges, and the names of the outputs.
        mode: Eager runs in inference mode, the others without gradients.
        dtypes: Dtypes of the FP32 model's outputs by name, in torch's words; an output not in it stays as it is.
        tf32: Let FP32 be computed in TF32.
        where: What to name in errors.
        on_close: Called once.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        spec: GateSpec,
        mode: Mode,
        dtypes: Mapping[str, str],
        tf32: bool,
        where: str,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        import torch

        self._function: Callable[..., Any] | None = function
        self._guard = torch.inference_mode if mode == "eager" else torch.no_grad
        self._spec = spec
        self._mode = mode
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}
        self._where = where
        self._inputs = metas_from_spec(spec)
        self._outputs: dict[str, TensorMeta] | None = None
        self._on_close = on_close
        self._restore = arithmetic.deployed(tf32=tf32)

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes: the spec's inputs."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives; known from the last run, or from one on ones of the smallest shape."""
        if self._outputs is None:
            self.run(least_feed(self._spec, ()))
        return self._outputs or {}

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """One inference.

        Raises:
            RunError: An input does not fit, the engine failed, or the runner is closed.
        """
        function = self._open_function()
        tensors = self._on_device(self._host_tensors(feed_dict))
        result = self._called(function, tensors)
        outputs = {name: array_from(tensor) for name, tensor in self._widened(result).items()}
        self._outputs = metas_of(outputs, feed_dict, spec=self._spec)
        return outputs

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference from inputs in host memory to outputs in host memory.

        Raises:
            RunError: As `run`.
        """
        function = self._open_function()
        host = self._host_tensors(feed_dict)

        def once() -> None:
            result = self._called(function, self._on_device(host))
            for tensor in self._widened(result).values():
                tensor.to("cpu")

        once()
        return once

    def warm_up(self, feed_dict: NamedArrays, *, dynamic: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """One inference whose result is dropped: torch.compile compiles in it.

        Args:
            feed_dict: As for `run`.
            dynamic: Per input the axes that must not be taken for constants.

        Raises:
            RunError: As `run`; or one of these axes was taken for a constant.
        """
        from torch import _dynamo as dynamo

        function = self._open_function()
        tensors = self._on_device(self._host_tensors(feed_dict))
        for name, tensor in zip(self._inputs, tensors, strict=True):
            for axis in (dynamic or {}).get(name, ()):
                dynamo.mark_dynamic(tensor, axis)
        with quiet():
            self._called(function, tensors)

    def close(self) -> None:
        """Free the model and put PyTorch's switches back."""
        if self._function is not None:
            self._function = None
            self._restore()
            self._on_close()

    def __enter__(self) -> TorchEngineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_function(self) -> Callable[..., Any]:
        if self._function is None:
            raise RunError("the runner is closed", where=self._where)
        return self._function

    def _host_tensors(self, feed_dict: NamedArrays) -> tuple[Any, ...]:
        feed = require_feed(feed_dict, self._inputs, spec=self._spec)
        return tuple(tensor_from(feed[name]) for name in self._inputs)

    def _on_device(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tensors

    def _called(self, function: Callable[..., Any], tensors: tuple[Any, ...]) -> Any:
        try:
            with self._guard():
                return function(*tensors)
        except Exception as err:
            if self._mode == "compile" and lacks_compiler(err):
                raise RunError(
                    "torch.compile needs a C++ compiler, and finds none here",
                    hint='sudo apt-get install g++, or mode = "eager"',
                ) from err
            raise self._failed(err) from err

    def _failed(self, err: Exception) -> GateError:
        return failure_of(err, where=self._where, error=RunError, doing=f"PyTorch ({self._mode})")

    def _widened(self, result: Any) -> dict[str, Any]:
        """Outputs by name, in the FP32 model's dtypes."""
        found = named_outputs(result, self._spec.model.output_names)
        return {
            name: value.to(self._dtypes[name]) if name in self._dtypes and value.is_floating_point() else value
            for name, value in found.items()
        }


class CudaTorchEngineRunner(TorchEngineRunner):
    """An engine in PyTorch on the current GPU, which can time the engine alone.

    Inferences between events are on a stream of the runner's own, so that several runners share the GPU; all others are
    on the current stream, and done when they return.
    """

    _stream: Any = None

    def region_timed(self, feeds: Sequence[NamedArrays], *, transfers: bool, wait: Wait) -> Callable[[int], Unread]:
        """The regions of an inference on one of several batches, between CUDA events on the runner's own stream.

        With transfers every batch is in page-locked memory, and copied to tensors that all of them share, as are the
        page-locked arrays that outputs are copied to; bringing outputs back to the FP32 model's dtypes, which is done on
        the device, counts as copying out. Without, every batch lies on the device. What makes the stream the current one
        is in the host's time, and what makes it the last one's again is done while the GPU works.

        Raises:
            RunError: As `run`, or the batches differ in shape.
        """
        self._open_function()
        batches = [self._host_tensors(feed) for feed in feeds]
        require_alike([dict(zip(self._inputs, batch, strict=True)) for batch in batches], where=self._where)
        blocking = wait == "block"
        first, start, end, last = events = (
            self._event(blocking=blocking),
            self._event(blocking=blocking),
            self._event(blocking=blocking),
            self._event(blocking=blocking),
        )
        awaited = last if transfers else end
        try:
            if self._stream is None:
                self._stream = self._new_stream()
            stream = self._stream
            current = self._current(stream)
            # The weights came to the device on another stream, and this one does not wait for it.
            self._settle()
            with current:
                placed = [self._on_device(batch) for batch in (batches[:1] if transfers else batches)]
        except RuntimeError as err:
            raise self._failed(err) from err
        sinks: dict[str, Any] = {}

        def launched(index: int) -> int:
            function = self._open_function()
            tensors = placed[0 if transfers else index]
            with current:
                if transfers:
                    first.record(stream)
                    for tensor, source in zip(tensors, batches[index], strict=True):
                        tensor.copy_(source, non_blocking=True)
                start.record(stream)
                before = perf_counter_ns()
                result = self._called(function, tensors)
                enqueue = perf_counter_ns() - before
                end.record(stream)
                if transfers:
                    for name, value in self._widened(result).items():
                        sink = sinks.get(name)
                        if sink is None or sink.dtype != value.dtype or sink.shape != value.shape:
                            sink = sinks[name] = self._page_locked(value)
                        sink.copy_(value, non_blocking=True)
                    last.record(stream)
            return enqueue

        def once(index: int) -> Unread:
            try:
                unread = unread_regions(self._elapsed_ns, events, enqueue=launched(index), transfers=transfers)
                awaited.synchronize()
            except RuntimeError as err:
                raise self._failed(err) from err
            return unread

        for index in range(len(batches)):
            once(index)
        return once

    def run_to_device(self, feed_dict: NamedArrays) -> dict[str, Any]:
        """One inference; the outputs are tensors on the device, in the dtypes of `run`.

        Raises:
            RunError: As `run`.
        """
        import torch

        function = self._open_function()
        tensors = self._on_device(self._host_tensors(feed_dict))

        try:
            outputs = self._widened(self._called(function, tensors))
            torch.cuda.synchronize()
        except RuntimeError as err:
            raise self._failed(err) from err
        return outputs

    def close(self) -> None:
        """As on the CPU; and give the device memory back, once the runner's stream is done with it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            # After an error of CUDA this fails again, and there is nothing left to wait for.
            with contextlib.suppress(RuntimeError):
                stream.synchronize()
        super().close()
        arithmetic.give_memory_back()

    def __enter__(self) -> CudaTorchEngineRunner:
        return self

    def _host_tensors(self, feed_dict: NamedArrays) -> tuple[Any, ...]:
        return tuple(tensor.pin_memory() for tensor in super()._host_tensors(feed_dict))

    def _on_device(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(tensor.to("cuda", non_blocking=True) for tensor in tensors)

    def _elapsed_ns(self, start: Any, end: Any) -> int:
        """The nanoseconds between two events that are reached."""
        self._open_function()
        try:
            elapsed_ms: float = start.elapsed_time(end)
        except RuntimeError as err:
            raise self._failed(err) from err
        return round(elapsed_ms * _NS_PER_MS)

    def _new_stream(self) -> Any:
        """A stream that runs beside all others."""
        import torch

        return torch.cuda.Stream()

    def _current(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Within, again and again, what PyTorch does in the thread is on that stream."""
        import torch

        current: contextlib.AbstractContextManager[Any] = torch.cuda.stream(stream)
        return current

    def _settle(self) -> None:
        """Wait for all that the device was given."""
        import torch

        torch.cuda.synchronize()

    def _event(self, *, blocking: bool) -> Any:
        """A CUDA event that takes the time; who waits for it sleeps, or spins."""
        import torch

        return torch.cuda.Event(enable_timing=True, blocking=blocking)

    def _page_locked(self, like: Any) -> Any:
        """New page-locked memory for a copy of a tensor."""
        import torch

        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
