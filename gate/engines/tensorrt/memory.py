"""Device memory and streams, through cuda-python or PyTorch."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import numpy as np

from gate.errors import BackendUnavailable, RunError
from gate.tensors import Array


class Memory(Protocol):
    """Device memory and a stream, by address."""

    def stream(self) -> int: ...

    def allocate(self, nbytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def to_device(self, address: int, array: Array, stream: int) -> None: ...

    def to_host(self, array: Array, address: int, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def close(self, stream: int) -> None: ...


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


class _CudaMemory:
    """Through cuda-python's runtime bindings."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._cuda: Any = runtime

    def stream(self) -> int:
        return int(self._checked(self._cuda.cudaStreamCreate()))

    def allocate(self, nbytes: int) -> int:
        return int(self._checked(self._cuda.cudaMalloc(nbytes)))

    def free(self, address: int) -> None:
        self._checked(self._cuda.cudaFree(address))

    def to_device(self, address: int, array: Array, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream))

    def to_host(self, array: Array, address: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, stream))

    def synchronize(self, stream: int) -> None:
        self._checked(self._cuda.cudaStreamSynchronize(stream))

    def close(self, stream: int) -> None:
        self._checked(self._cuda.cudaStreamDestroy(stream))

    def _checked(self, answer: Any) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise RunError(f"CUDA failed: {getattr(status, 'name', status)}")
        return values[0] if values else None


class _TorchMemory:
    """Through PyTorch's caching allocator."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    def stream(self) -> int:
        import torch

        stream = torch.cuda.Stream()
        self._streams[stream.cuda_stream] = stream
        return int(stream.cuda_stream)

    def allocate(self, nbytes: int) -> int:
        import torch

        block = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self._held[block.data_ptr()] = block
        return int(block.data_ptr())

    def free(self, address: int) -> None:
        self._held.pop(address, None)

    def to_device(self, address: int, array: Array, stream: int) -> None:
        self._copy(address, array, stream, to_host=False)

    def to_host(self, array: Array, address: int, stream: int) -> None:
        self._copy(address, array, stream, to_host=True)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def close(self, stream: int) -> None:
        self._streams.pop(stream, None)
        self._held.clear()

    def _copy(self, address: int, array: Array, stream: int, *, to_host: bool) -> None:
        import torch

        if array.nbytes == 0:
            return
        host = torch.from_numpy(array.reshape(-1).view(np.uint8))
        device = self._held[address][: array.nbytes]
        with torch.cuda.stream(self._streams[stream]):
            if to_host:
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)
