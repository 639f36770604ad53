"""Arrays that lie on the device: what goes into a runner, and what comes out, without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gate.engines.tensorrt.loaded import BFLOAT16
from gate.errors import RunError
from gate.tensors import TensorMeta

_LEGACY_STREAM = 1
"""Handle of the default stream. Source: `cudaStreamLegacy` of the CUDA runtime API."""
_ALIGNMENT = 256
"""What addresses that cudaMalloc gives are a multiple of, in bytes, and so those that TensorRT times its kernels with.
Source: CUDA C++ Programming Guide, "Device Memory Accesses"."""


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of an array in bytes. `bfloat16` counts two."""
    return math.prod(shape) * (2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize)


class DeviceArray:
    """An output where the engine left it, on the device, for `torch.as_tensor` or `cupy.asarray` without a copy.

    The memory is the runner's: it holds until the runner's next inference, or until it is closed. After that, asking for
    it is an error, and what was made from it before sees other values: copy what shall stay.

    Args:
        address: On the device.
        dtype: NumPy's name, or `bfloat16`; the CUDA array interface has no name for that, so it says two bytes without a
            type, which no reader takes for other numbers.
        is_current: Whether it still holds.
    """

    def __init__(self, address: int, *, shape: tuple[int, ...], dtype: str, is_current: Callable[[], bool]) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self._is_current = is_current

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3; no stream to wait for, since the inference is done.

        Raises:
            RunError: The runner ran again, or was closed.
        """
        if not self._is_current():
            raise RunError(
                "the output is gone: its runner ran again, or was closed",
                hint="Copy it before that, with `torch.as_tensor(output).clone()` for one.",
            )
        return {
            "shape": self.shape,
            "typestr": "<V2" if self.dtype == BFLOAT16 else np.dtype(self.dtype).str,
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


@dataclass(frozen=True)
class DeviceInput:
    """An input that lies on the device.

    Args:
        address: Of its first element.
        shape: Its sizes.
        nbytes: Its size in bytes.
        stream: What to wait for before it is read; None where it is done.
    """

    address: int
    shape: tuple[int, ...]
    nbytes: int
    stream: int | None


def device_input(name: str, given: Any, meta: TensorMeta) -> DeviceInput:
    """What the CUDA array interface of an object says, held against what the engine takes.

    Source: CUDA Array Interface, version 3: without `stream` (version 2) the producer's work is in the default stream;
    `stream` None is done.

    Raises:
        RunError: It has no such interface, or is of another dtype or rank, not C-contiguous, masked or misaligned.
    """
    try:
        interface = getattr(given, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError, ValueError) as err:
        raise RunError(f"input {name!r} cannot be read on the device: {err}") from err
    if not isinstance(interface, dict):
        raise RunError(
            f"input {name!r} is a {type(given).__name__} without __cuda_array_interface__",
            hint="Give a CUDA tensor or a CuPy array; `run` takes NumPy arrays.",
        )
    try:
        dtype = np.dtype(interface["typestr"])
        shape = tuple(int(size) for size in interface["shape"])
        address = int(interface["data"][0] or 0)
        strides = interface.get("strides")
        stream = interface.get("stream", _LEGACY_STREAM)
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise RunError(f"input {name!r} has a malformed __cuda_array_interface__: {err!r}") from err
    if interface.get("mask") is not None:
        raise RunError(f"input {name!r} has a mask; give it without")
    if dtype.name != meta.dtype or not dtype.isnative:
        raise RunError(f"input {name!r} is {dtype}, the engine takes {meta.dtype}", hint="Convert it on the device.")
    if len(shape) != len(meta.shape):
        raise RunError(f"input {name!r} has {len(shape)} axes {list(shape)}, the engine has {len(meta.shape)}")
    if strides is not None and not _is_contiguous(shape, tuple(strides), dtype.itemsize):
        raise RunError(f"input {name!r} is not C-contiguous", hint="Call `.contiguous()` on it.")
    if address == 0 or address % _ALIGNMENT:
        raise RunError(
            f"input {name!r} lies at address {address:#x}, which is no multiple of {_ALIGNMENT}",
            hint="Copy it with `.clone()`: a part of a larger array may begin anywhere.",
        )
    return DeviceInput(address, shape, nbytes_of(meta.dtype, shape), None if stream is None else int(stream))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    if len(strides) != len(shape):
        return False
    step = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
