"""Device memory: cuda-python's calls on a simulated runtime, and both ways on a GPU."""

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

from gate.engines.tensorrt.buffers import Buffers
from gate.engines.tensorrt.memory import _CudaMemory, _TorchMemory, four_events, memory
from gate.errors import BackendUnavailable, RunError
from tests.engines.tensorrt.simulator import Device, SimulatedMemory


class Status(IntEnum):
    cudaSuccess = 0  # noqa: N815 - as CUDA has it
    cudaErrorMemoryAllocation = 2  # noqa: N815


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class SimulatedRuntime:
    """The functions of cuda-python's runtime bindings that are used, on the host's own memory."""

    cudaMemcpyKind = Kind  # noqa: N815
    cudaHostAllocDefault = 0  # noqa: N815
    cudaEventDefault = 0  # noqa: N815
    cudaEventBlockingSync = 1  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaMemoryType = SimpleNamespace(cudaMemoryTypeDevice=2, cudaMemoryTypeManaged=3)  # noqa: N815

    def __init__(self):
        self.blocks = {}
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, *arguments))
            gives = {
                "cudaStreamCreate": 11,
                "cudaEventCreateWithFlags": 12,
                "cudaStreamEndCapture": 13,
                "cudaGraphInstantiate": 14,
                "cudaEventElapsedTime": 1.5,
            }
            return (Status.cudaSuccess, gives[name]) if name in gives else (Status.cudaSuccess,)

        return call

    def cudaMalloc(self, nbytes):  # noqa: N802
        if nbytes > 1 << 20:
            return Status.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaHostAlloc(self, nbytes, flags):  # noqa: N802
        return self.cudaMalloc(nbytes)

    def cudaFree(self, address):  # noqa: N802
        del self.blocks[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to, source, nbytes, kind, stream):  # noqa: N802
        assert stream == 11
        assert (to if kind is Kind.cudaMemcpyHostToDevice else source) in self.blocks
        ctypes.memmove(to, source, nbytes)
        return (Status.cudaSuccess,)

    def cudaPointerGetAttributes(self, address):  # noqa: N802
        return Status.cudaSuccess, SimpleNamespace(type=2 if address in self.blocks else 0)


def test_bytes_go_to_the_device_and_back_through_page_locked_memory():
    cuda = SimulatedRuntime()
    found = _CudaMemory(cuda)
    stream, address = found.stream(), found.allocate(24)
    pinned = found.pinned(24)
    assert (pinned.dtype, pinned.shape) == (np.uint8, (24,))
    pinned.view(np.float32)[...] = np.arange(6)
    found.to_device(address, pinned, stream)
    back = np.empty(6, np.float32)
    found.to_host(back, address, stream)
    np.testing.assert_array_equal(back, np.arange(6, dtype=np.float32))
    assert found.is_on_device(address)
    assert not found.is_on_device(1)
    found.unpin(pinned)
    found.free(address)
    assert cuda.blocks == {}
    found.close(stream)
    assert cuda.calls[-1] == ("cudaStreamDestroy", 11)


def test_events_and_graphs_are_made_and_given_back():
    cuda = SimulatedRuntime()
    found = _CudaMemory(cuda)
    event = found.event()
    found.event(blocking=True)
    assert [call for call in cuda.calls if "Event" in call[0]] == [
        ("cudaEventCreateWithFlags", 0),
        ("cudaEventCreateWithFlags", 1),
    ]
    found.record(event, 11)
    found.wait(event)
    assert cuda.calls[-1] == ("cudaEventSynchronize", event)
    assert found.elapsed_ns(event, event) == 1_500_000
    assert [name for name, *_ in cuda.calls].count("cudaEventSynchronize") == 1
    found.drop_event(event)
    found.begin_capture(11)
    graph = found.end_capture(11)
    found.launch(graph, 11)
    found.drop_graph(graph)
    assert ("cudaGraphInstantiate", 13, 0) in cuda.calls
    assert ("cudaGraphDestroy", 13) in cuda.calls
    assert cuda.calls[-2:] == [("cudaGraphLaunch", 14, 11), ("cudaGraphExecDestroy", 14)]


def test_error_of_cuda_is_a_run_error_with_its_name():
    with pytest.raises(RunError, match="CUDA failed: cudaMalloc: cudaErrorMemoryAllocation"):
        _CudaMemory(SimulatedRuntime()).allocate(1 << 30)


def test_missing_driver_is_a_run_error():
    def missing(*_):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(RunError, match="CUDA failed: cudaStreamCreate: Failed to dlopen"):
        _CudaMemory(SimpleNamespace(cudaStreamCreate=missing)).stream()


def test_buffers_only_grow_and_say_what_lies_in_them():
    device = Device()
    buffers = Buffers(SimulatedMemory(device))
    first = buffers.device("x", 100)
    assert buffers.device("x", 40) == first
    assert buffers.overlaps(first + 99, 8)
    assert not buffers.overlaps(first + 100, 8)
    second = buffers.device("x", 200)
    assert second != first
    assert list(device.blocks) == [second]
    empty = buffers.device("nothing", 0)
    assert buffers.device("nothing", 0) == empty
    array = buffers.pinned("x", dtype="float16", shape=(2, 3), nbytes=12)
    assert (array.dtype, array.shape) == (np.float16, (2, 3))
    assert buffers.pinned("x", dtype="uint8", shape=(4,), nbytes=4).ctypes.data == array.ctypes.data
    buffers.pinned("x", dtype="uint8", shape=(64,), nbytes=64)
    assert len(device.pinned) == 1
    buffers.close()
    buffers.close()
    assert device.is_clean


def test_buffer_that_cannot_grow_is_forgotten():
    device = Device()
    buffers = Buffers(SimulatedMemory(device))
    buffers.device("x", 100)
    device.allocations = 0
    with pytest.raises(RunError, match="cudaErrorMemoryAllocation"):
        buffers.device("x", 200)
    buffers.close()
    assert device.is_clean


@pytest.mark.gpu
@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("kind", [_CudaMemory, _TorchMemory])
def test_gpu_copies_times_and_replays(kind, blocking):
    if kind is _TorchMemory:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch has no CUDA here")
    try:
        found = kind()
    except ImportError:
        pytest.skip("cuda-python is not installed")
    stream = found.stream()
    address, pinned = found.allocate(4096), found.pinned(4096)
    other = found.pinned(4096)
    assert found.is_on_device(address)
    assert not found.is_on_device(np.zeros(1).ctypes.data)
    pinned[...] = np.arange(4096) % 251
    start, end, *more = four_events(found, blocking=blocking)
    found.record(start, stream)
    found.to_device(address, pinned, stream)
    found.record(end, stream)
    found.wait(end)
    assert found.elapsed_ns(start, end) >= 0
    found.begin_capture(stream)
    found.to_host(other, address, stream)
    graph = found.end_capture(stream)
    found.launch(graph, stream)
    found.synchronize(stream)
    np.testing.assert_array_equal(other, pinned)
    found.drop_graph(graph)
    for event in (start, end, *more):
        found.drop_event(event)
    for array in (pinned, other):
        found.unpin(array)
    found.free(address)
    found.close(stream)


@pytest.mark.gpu
def test_gpu_memory_is_found():
    try:
        found = memory()
    except BackendUnavailable:
        pytest.skip("neither cuda-python nor PyTorch with CUDA is installed")
    found.close(found.stream())
