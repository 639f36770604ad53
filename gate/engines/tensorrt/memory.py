"""Device memory, page-locked memory, streams, events and graphs, through cuda-python or PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from gate.errors import BackendUnavailable, RunError
from gate.tensors import Array


class Memory(Protocol):
    """What a runner needs of CUDA, by address and handle. Each method raises RunError with CUDA's own name of an error."""

    def stream(self) -> int:
        """A new stream."""
        ...

    def allocate(self, nbytes: int) -> int:
        """The address of new device memory."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def pinned(self, nbytes: int) -> Array:
        """New page-locked host memory, uint8 [nbytes]: copies from and to it need no staging."""
        ...

    def unpin(self, array: Array) -> None:
        """Give page-locked memory back; the array may not be used any more."""
        ...

    def to_device(self, address: int, array: Array, stream: int) -> None:
        """Copy a C-contiguous array to the device, in the order of the stream."""
        ...

    def to_host(self, array: Array, address: int, stream: int) -> None:
        """Copy from the device into a C-contiguous array, in the order of the stream."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait for all that the stream was given."""
        ...

    def is_on_device(self, address: int) -> bool:
        """Whether a kernel can read the address: device or managed memory."""
        ...

    def event(self, *, blocking: bool = False) -> int:
        """A new event that takes the time.

        Args:
            blocking: Who waits for it sleeps; left out, it spins. Source: `cudaEventBlockingSync` of the CUDA runtime API.
        """
        ...

    def record(self, event: int, stream: int) -> None:
        """Note the time when the stream gets there."""
        ...

    def wait(self, event: int) -> None:
        """Wait until the stream got to the event: asleep, or spinning, as it was made."""
        ...

    def elapsed_ns(self, start: int, end: int) -> int:
        """The nanoseconds between two events that the stream got to, with CUDA's resolution of about 500."""
        ...

    def drop_event(self, event: int) -> None:
        """Give an event back."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Collect what the stream is given from here on, instead of running it."""
        ...

    def end_capture(self, stream: int) -> int:
        """What was collected, as a graph that can be launched."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph, in the order of the stream."""
        ...

    def drop_graph(self, graph: int) -> None:
        """Give a graph back."""
        ...

    def close(self, stream: int) -> None:
        """Give a stream back."""
        ...


def memory() -> Memory:
    """Device memory through cuda-python, else through PyTorch with CUDA.

    Raises:
        BackendUnavailable: Neither is installed.
    """
    with contextlib.suppress(ImportError):
        return _CudaMemory()
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return _TorchMemory()
    raise BackendUnavailable(
        "running a plan needs device memory, and neither cuda-python nor PyTorch with CUDA is installed",
        hint='pip install "trt-gate[gpu]"',
    )


def four_events(found: Memory, *, blocking: bool) -> tuple[int, int, int, int]:
    """Events for the bounds of copies in, compute and copies out.

    Args:
        found: What gives them, and takes them back.
        blocking: As `Memory.event`.
    """
    first, start, end, last = (found.event(blocking=blocking) for _ in range(4))
    return first, start, end, last


class _CudaMemory:
    """Through cuda-python's runtime bindings.

    Args:
        runtime: They; left out: as installed.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._cuda: Any = _bindings() if runtime is None else runtime
        self._pinned: dict[int, int] = {}

    def stream(self) -> int:
        return int(self._call("cudaStreamCreate"))

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, nbytes: int) -> Array:
        address = int(self._call("cudaHostAlloc", nbytes, self._cuda.cudaHostAllocDefault))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        self._pinned[array.ctypes.data] = address
        return array

    def unpin(self, array: Array) -> None:
        address = self._pinned.pop(array.ctypes.data, None)
        if address is not None:
            self._call("cudaFreeHost", address)

    def to_device(self, address: int, array: Array, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def to_host(self, array: Array, address: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def is_on_device(self, address: int) -> bool:
        kinds = self._cuda.cudaMemoryType
        attributes = self._call("cudaPointerGetAttributes", address)
        return attributes.type in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged)

    def event(self, *, blocking: bool = False) -> int:
        flags = self._cuda.cudaEventBlockingSync if blocking else self._cuda.cudaEventDefault
        return int(self._call("cudaEventCreateWithFlags", flags))

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        self._call("cudaEventSynchronize", event)

    def elapsed_ns(self, start: int, end: int) -> int:
        return round(float(self._call("cudaEventElapsedTime", start, end)) * 1e6)

    def drop_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def drop_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def close(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a function of CUDA's runtime gives beside its status.

        Raises:
            RunError: It failed; the message has CUDA's name of the error.
        """
        try:
            status, *values = getattr(self._cuda, name)(*arguments)
        except RuntimeError as err:
            raise RunError(f"CUDA failed: {name}: {err}") from err
        if int(status) != 0:
            raise RunError(f"CUDA failed: {name}: {getattr(status, 'name', status)}")
        return values[0] if values else None


def _bindings() -> Any:
    """cuda-python's bindings of the CUDA runtime, which moved in version 12.6."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        from cuda import cudart as runtime
    return runtime


class _TorchMemory:
    """Through PyTorch's caching allocators."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._graphs: dict[int, Any] = {}
        self._capturing: Any = None
        self._handles = 0

    def stream(self) -> int:
        import torch

        with _as_run_error():
            stream = torch.cuda.Stream()
        self._streams[stream.cuda_stream] = stream
        return int(stream.cuda_stream)

    def allocate(self, nbytes: int) -> int:
        import torch

        with _as_run_error():
            block = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self._held[block.data_ptr()] = block
        return int(block.data_ptr())

    def free(self, address: int) -> None:
        self._held.pop(address, None)

    def pinned(self, nbytes: int) -> Array:
        import torch

        with _as_run_error():
            block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        array: Array = block.numpy()
        self._pinned[array.ctypes.data] = block
        return array

    def unpin(self, array: Array) -> None:
        self._pinned.pop(array.ctypes.data, None)

    def to_device(self, address: int, array: Array, stream: int) -> None:
        self._copy(address, array, stream, to_host=False)

    def to_host(self, array: Array, address: int, stream: int) -> None:
        self._copy(address, array, stream, to_host=True)

    def synchronize(self, stream: int) -> None:
        import torch

        with _as_run_error():
            if stream in self._streams:
                self._streams[stream].synchronize()
            else:
                torch.cuda.ExternalStream(stream).synchronize()

    def is_on_device(self, address: int) -> bool:
        import torch

        try:
            torch.as_tensor(_Byte(address), device="cuda")
        except (RuntimeError, TypeError, ValueError):
            return False
        return True

    def event(self, *, blocking: bool = False) -> int:
        import torch

        return self._keep(self._events, torch.cuda.Event(enable_timing=True, blocking=blocking))

    def record(self, event: int, stream: int) -> None:
        with _as_run_error():
            self._events[event].record(self._streams[stream])

    def wait(self, event: int) -> None:
        with _as_run_error():
            self._events[event].synchronize()

    def elapsed_ns(self, start: int, end: int) -> int:
        with _as_run_error():
            return round(float(self._events[start].elapsed_time(self._events[end])) * 1e6)

    def drop_event(self, event: int) -> None:
        self._events.pop(event, None)

    def begin_capture(self, stream: int) -> None:
        import torch

        graph = torch.cuda.CUDAGraph()
        with _as_run_error(), torch.cuda.stream(self._streams[stream]):
            graph.capture_begin(capture_error_mode="thread_local")
        self._capturing = graph

    def end_capture(self, stream: int) -> int:
        import torch

        graph, self._capturing = self._capturing, None
        with _as_run_error(), torch.cuda.stream(self._streams[stream]):
            graph.capture_end()
        return self._keep(self._graphs, graph)

    def launch(self, graph: int, stream: int) -> None:
        import torch

        with _as_run_error(), torch.cuda.stream(self._streams[stream]):
            self._graphs[graph].replay()

    def drop_graph(self, graph: int) -> None:
        self._graphs.pop(graph, None)

    def close(self, stream: int) -> None:
        self._streams.pop(stream, None)

    def _keep(self, where: dict[int, Any], thing: Any) -> int:
        self._handles += 1
        where[self._handles] = thing
        return self._handles

    def _copy(self, address: int, array: Array, stream: int, *, to_host: bool) -> None:
        import torch

        if array.nbytes == 0:
            return
        host = self._host(array)
        device = self._held[address][: array.nbytes]
        with _as_run_error(), torch.cuda.stream(self._streams[stream]):
            if to_host:
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)

    def _host(self, array: Array) -> Any:
        """The array's bytes as a tensor: of the page-locked block itself, since only then is the copy asynchronous."""
        import torch

        block = self._pinned.get(array.ctypes.data)
        if block is not None and array.nbytes <= block.numel():
            return block[: array.nbytes]
        return torch.from_numpy(array.reshape(-1).view(np.uint8))


class _Byte:
    """One byte at an address, as the CUDA array interface describes it."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (1,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


@contextlib.contextmanager
def _as_run_error() -> Iterator[None]:
    """PyTorch's errors of CUDA, such as `AcceleratorError` and `OutOfMemoryError`, as RunError."""
    try:
        yield
    except RuntimeError as err:
        first = str(err).partition("\n")[0]
        raise RunError(f"CUDA failed: {first}") from err
