"""The buffers of a runner: on the device and page-locked on the host, allocated once and only ever grown."""

from __future__ import annotations

import contextlib
from typing import Any

from gate.engines.tensorrt.memory import Memory
from gate.errors import RunError
from gate.tensors import Array


class Buffers:
    """Buffers by tensor name.

    Args:
        memory: What they come from.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._device: dict[str, tuple[int, int]] = {}
        self._pinned: dict[str, Array] = {}

    def device(self, name: str, nbytes: int) -> int:
        """The address of a buffer of at least so many bytes; it stays the same while it is large enough.

        Raises:
            RunError: There is too little memory.
        """
        address, size = self._device.get(name, (0, -1))
        if size >= nbytes:
            return address
        if size >= 0:
            del self._device[name]
            self._memory.free(address)
        # TensorRT asks for an address of empty tensors too.
        nbytes = max(nbytes, 1)
        address = self._memory.allocate(nbytes)
        self._device[name] = (address, nbytes)
        return address

    def pinned(self, name: str, *, dtype: str, shape: tuple[int, ...], nbytes: int) -> Array:
        """A page-locked array, which the next call for the same name may take back.

        Raises:
            RunError: There is too little memory.
        """
        block = self._pinned.get(name)
        if block is None or block.nbytes < nbytes:
            if block is not None:
                del self._pinned[name]
                self._memory.unpin(block)
            block = self._pinned[name] = self._memory.pinned(max(nbytes, 1))
        return block[:nbytes].view(dtype).reshape(shape)

    def overlaps(self, address: int, nbytes: int) -> bool:
        """Whether some of these bytes on the device are in a buffer."""
        return any(address < start + size and start < address + nbytes for start, size in self._device.values())

    def close(self) -> None:
        """Give all back. After an error of CUDA it may refuse; what can be given back still is."""
        device, self._device = self._device, {}
        pinned, self._pinned = self._pinned, {}
        for address, _ in device.values():
            with contextlib.suppress(RunError):
                self._memory.free(address)
        for block in pinned.values():
            with contextlib.suppress(RunError):
                self._memory.unpin(block)


def output_allocator(trt: Any, buffers: Buffers) -> Any:
    """An IOutputAllocator of that module, for outputs whose shape depends on values.

    It has `shapes`, what each output turned out to be, and `error`, why it had no memory. TensorRT 10 and later call
    `reallocate_output_async`, 8.6 knows `reallocate_output` alone.

    Source: IOutputAllocator in the stubs of TensorRT 10.13, and its docstring in 8.6.0 and in tensorrt_rtx 1.7.1.
    """

    class Growing(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.error: RunError | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:  # noqa: ARG002
            # An exception must not pass through TensorRT's own frames; 0 tells it that there is no memory.
            try:
                return buffers.device(tensor_name, size)
            except RunError as err:
                self.error = err
                return 0

        def reallocate_output_async(
            self,
            tensor_name: str,
            memory: int,
            size: int,
            alignment: int,
            stream: int,  # noqa: ARG002
        ) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shapes[tensor_name] = tuple(shape)

    return Growing()
