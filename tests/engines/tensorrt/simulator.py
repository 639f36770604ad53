"""A simulator of a TensorRT module and of device memory: enough of both to run a tiny engine without a GPU.

A simulated plan has a header like TensorRT's and, after it, what the engine is. Its engine computes `y = x @ w` on bytes
that lie at simulated addresses; an output named `kept` holds the rows of `y` whose sum is positive, so that its shape
depends on values.
"""

import json
import math
import struct
from enum import Enum
from types import SimpleNamespace

import numpy as np

from gate.errors import RunError

WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def simulated_plan(
    *,
    version=(10, 13, 0, 35),
    tag=b"ftrt",
    profiles=((1, 2, 4),),
    outputs=("y",),
    dtype="FLOAT",
    out_dtype="FLOAT",
    output_format="LINEAR",
    location="DEVICE",
    fails="",
):
    """A plan's bytes. `fails`: `context`, `execute`, `capture`, `shape`, `silent` (no shape told) or empty."""
    body = json.dumps(
        {
            "profiles": profiles,
            "outputs": outputs,
            "dtype": dtype,
            "out_dtype": out_dtype,
            "format": output_format,
            "location": location,
            "fails": fails,
        }
    ).encode()
    head = tag + struct.pack("<IQQ", 0, 2, 64 + len(body)) + bytes(version)
    return head.ljust(64, b"\0") + body


class Device:
    """Simulated device memory and what was done to it."""

    def __init__(self):
        self.blocks = {}
        self.pinned = {}
        self.streams = set()
        self.events = {}
        self.blocking = set()  # events whose waiter sleeps
        self.graphs = {}
        self.next = 1 << 20
        self.now_ns = 0
        self.reached = -1
        self.queries = 0
        self.pending = None  # what is being captured
        self.launches = 0
        self.captures = 0
        self.copies_in = 0
        self.copies_out = 0
        self.shapes_set = 0
        self.addresses_set = 0
        self.slept = 0
        self.waited = []
        self.broken = False  # every call fails, as after a sticky error
        self.allocations = 1000  # that are left

    @property
    def is_clean(self):
        return not (self.blocks or self.pinned or self.streams or self.events or self.graphs)

    def bytes_at(self, address, nbytes):
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + len(block):
                return memoryview(block)[address - start : address - start + nbytes]
        raise RuntimeError(f"illegal address {address:#x}")

    def array_at(self, address, shape, dtype):
        return np.frombuffer(self.bytes_at(address, math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)


class SimulatedMemory:
    """gate.engines.tensorrt.memory.Memory on a Device."""

    def __init__(self, device):
        self.on = device

    def _handle(self):
        if self.on.broken:
            raise RunError("CUDA failed: cudaErrorIllegalAddress")
        self.on.next += 1 << 16
        return self.on.next

    def stream(self):
        handle = self._handle()
        self.on.streams.add(handle)
        return handle

    def allocate(self, nbytes):
        address = self._handle()
        self.on.allocations -= 1
        if self.on.allocations < 0:
            raise RunError("CUDA failed: cudaErrorMemoryAllocation")
        assert nbytes > 0
        self.on.blocks[address] = bytearray(nbytes)
        return address

    def free(self, address):
        self.on.blocks.pop(address)
        self._handle()

    def pinned(self, nbytes):
        self._handle()
        array = np.zeros(nbytes, np.uint8)
        self.on.pinned[array.ctypes.data] = array
        return array

    def unpin(self, array):
        self.on.pinned.pop(array.ctypes.data)
        self._handle()

    def to_device(self, address, array, stream):
        self._handle()
        assert any(array.ctypes.data == start for start in self.on.pinned), "copies go through page-locked memory"
        assert stream in self.on.streams
        self.on.copies_in += 1
        self.on.now_ns += 100
        self.on.bytes_at(address, array.nbytes)[:] = array.tobytes()

    def to_host(self, array, address, stream):
        self._handle()
        assert stream in self.on.streams
        self.on.copies_out += 1
        self.on.now_ns += 10
        array.reshape(-1).view(np.uint8)[...] = np.frombuffer(self.on.bytes_at(address, array.nbytes), np.uint8)

    def synchronize(self, stream):
        self._handle()
        self.on.waited.append(stream)

    def is_on_device(self, address):
        return any(start <= address < start + len(block) for start, block in self.on.blocks.items())

    def event(self, *, blocking=False):
        handle = self._handle()
        self.on.events[handle] = None
        if blocking:
            self.on.blocking.add(handle)
        return handle

    def record(self, event, stream):
        assert stream in self.on.streams
        self.on.events[event] = self.on.now_ns

    def wait(self, event):
        self._handle()
        self.on.slept += event in self.on.blocking
        self.on.reached = self.on.now_ns

    def elapsed_ns(self, start, end):
        self._handle()
        self.on.queries += 1
        assert self.on.events[end] <= self.on.reached, "cudaErrorNotReady"
        return self.on.events[end] - self.on.events[start]

    def drop_event(self, event):
        del self.on.events[event]

    def begin_capture(self, stream):
        self._handle()
        assert stream in self.on.streams
        self.on.pending = []

    def end_capture(self, stream):
        assert stream in self.on.streams
        pending, self.on.pending = self.on.pending, None
        if "failed" in pending:
            raise RunError("CUDA failed: cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated")
        handle = self._handle()
        self.on.graphs[handle] = pending
        self.on.captures += 1
        return handle

    def launch(self, graph, stream):
        self._handle()
        assert stream in self.on.streams
        self.on.launches += 1
        for work in self.on.graphs[graph]:
            work()

    def drop_graph(self, graph):
        del self.on.graphs[graph]

    def close(self, stream):
        self.on.streams.remove(stream)
        self._handle()


class Named(Enum):
    INPUT = 1
    OUTPUT = 2


class Location(Enum):
    DEVICE = 1
    HOST = 2


class OldAllocator:
    """IOutputAllocator of TensorRT 8.6: it knows `reallocate_output` alone."""


class SimulatedTrt:
    """A module like `tensorrt`.

    Args:
        device: What its engines compute on.
        version: Its `__version__`.
        validity: What get_engine_validity answers; None: the runtime has no such method.
    """

    __name__ = "tensorrt"
    ILogger = type("ILogger", (), {})
    IOutputAllocator = OldAllocator
    TensorIOMode = Named
    TensorLocation = Location
    LayerInformationFormat = SimpleNamespace(JSON="JSON")

    def __init__(self, device, version="10.13.0.35", validity=None):
        self.device = device
        self.__version__ = version
        self.validity = validity
        self.engines = 0
        self.runtimes = []

    def Runtime(self, logger):  # noqa: N802 - as TensorRT has it
        runtime = SimulatedRuntime(self, logger)
        if self.validity is not None:
            runtime.get_engine_validity = lambda data: self.validity
        self.runtimes.append(runtime)
        return runtime


class SimulatedRuntime:
    def __init__(self, trt, logger):
        self.trt = trt
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data):
        try:
            told = json.loads(bytes(data[64:]))
        except ValueError:
            self.logger.log(SimpleNamespace(name="ERROR"), "Failed due to an old deserialization call")
            return None
        return SimulatedEngine(self.trt, told, self.logger)


class SimulatedEngine:
    def __init__(self, trt, told, logger):
        self.trt, self.told, self.logger = trt, told, logger
        self.names = ["x", *told["outputs"]]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(told["profiles"])
        self.device_memory_size = 4096
        trt.engines += 1

    def __del__(self):
        self.trt.engines -= 1

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_shape(self, name):
        return (-1, 3) if name == "x" else (-1, 2)

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.told["dtype"] if name == "x" else self.told["out_dtype"])

    def get_tensor_mode(self, name):
        return Named.INPUT if name == "x" else Named.OUTPUT

    def get_tensor_format(self, name):
        return SimpleNamespace(name="LINEAR" if name == "x" else self.told["format"])

    def get_tensor_location(self, name):
        return Location[self.told["location"]] if name == "x" else Location.DEVICE

    def get_tensor_profile_shape(self, name, profile):
        assert name == "x"
        return [(size, 3) for size in self.told["profiles"][profile]]

    def create_execution_context(self):
        return None if self.told["fails"] == "context" else SimulatedContext(self)

    def create_engine_inspector(self):
        return SimulatedInspector()


class SimulatedInspector:
    execution_context = None

    def get_engine_information(self, kind):
        assert kind == "JSON"
        assert self.execution_context.shapes, "types are told for shapes only"
        layer = {
            "Name": "product",
            "LayerType": "CaskGemmMatrixMultiply",
            "TacticName": "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n",
            "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}],
        }
        return json.dumps({"Layers": [layer]})


class SimulatedContext:
    def __init__(self, engine):
        self.engine = engine
        self.active_optimization_profile = 0
        self.shapes, self.addresses, self.allocators = {}, {}, {}
        self.last_kept = (-1, 2)

    def set_optimization_profile_async(self, index, stream):
        assert stream in self.engine.trt.device.streams
        self.active_optimization_profile = index
        self.shapes, self.addresses = {}, {}
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.told["profiles"][self.active_optimization_profile]
        if self.engine.told["fails"] == "shape" or not low <= shape[0] <= high:
            return False
        self.engine.trt.device.shapes_set += 1
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        # TensorRT 8.6.0 on an H200: after an inference it is the shape that this one gave.
        rows = self.shapes["x"][0]
        return {"x": (rows, 3), "kept": self.last_kept}.get(name, (rows, 2))

    def set_tensor_address(self, name, address):
        self.engine.trt.device.addresses_set += 1
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name, allocator):
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream):
        device, told = self.engine.trt.device, self.engine.told
        assert stream in device.streams
        if told["fails"] == "execute":
            self.engine.logger.log(SimpleNamespace(name="ERROR"), "Cuda Runtime (an illegal memory access)")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if device.pending is None:
            return self._compute(shapes, addresses)
        device.pending.append("failed" if told["fails"] == "capture" else lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes, addresses):
        device, told = self.engine.trt.device, self.engine.told
        device.now_ns += 1000
        kind = {"FLOAT": np.float32, "HALF": np.float16}[told["dtype"]]
        y = device.array_at(addresses["x"], shapes["x"], kind).astype(np.float32) @ WEIGHT
        for name in told["outputs"]:
            value = y[y.sum(1) > 0] if name == "kept" else y
            if name == "kept":
                self.last_kept = value.shape
            if told["out_dtype"] == "BF16":
                value = (value.view(np.uint32) >> 16).astype(np.uint16)
            if name != "kept":
                device.bytes_at(addresses[name], value.nbytes)[:] = value.tobytes()
                continue
            allocator = self.allocators[name]
            address = allocator.reallocate_output(name, 0, value.nbytes, 256)
            if not address:
                return False
            device.bytes_at(address, value.nbytes)[:] = value.tobytes()
            if told["fails"] != "silent":
                allocator.notify_shape(name, value.shape)
        return True
