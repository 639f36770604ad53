"""PyTorch's process-wide switches: strict for the reference, as deployed for an engine; put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable

from gate.errors import BackendUnavailable

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""0 switches TF32 off in every NVIDIA library, whatever PyTorch asks for; 1 is taken for on.

Source: the cuBLAS documentation, NVIDIA_TF32_OVERRIDE, which describes 0 alone.
"""

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE = ":4096:8"
"""With it cuBLAS gives the same product twice.

PyTorch reads the variable once in a process, at the first product on the GPU, so it is set before any runner here
computes there. It is the workspace that PyTorch takes on Hopper anyway.
Source: the cuBLAS documentation, "Results reproducibility"; `torch.use_deterministic_algorithms`.
"""


def strict() -> Callable[[], None]:
    """Switch TF32 off and deterministic algorithms on; returns what puts the switches back."""
    import torch

    restore = _switches()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    return restore


def deployed(*, tf32: bool) -> Callable[[], None]:
    """Allow TF32 or not, and any algorithm, as users run engines; returns what puts the switches back."""
    import torch

    restore = _switches()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)
    return restore


def require_device(device: str) -> None:
    """Make sure that PyTorch can compute on a device, and reproducibly. Opens the CUDA context of the process.

    An AOTInductor package that is loaded before there is a context ends the process with a segmentation fault.

    Raises:
        BackendUnavailable: It cannot.
    """
    if device == "cpu":
        return
    import torch

    os.environ.setdefault(_CUBLAS, CUBLAS_WORKSPACE)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise BackendUnavailable(
            f"PyTorch {torch.__version__} finds no GPU here"
            + (f" (it is built for CUDA {built})" if built else ": it is built for the CPU only"),
            hint="Install a CUDA build of PyTorch that the driver supports, or run on a GPU host.",
        )
    torch.zeros(1, device="cuda")


def give_memory_back() -> None:
    """Return what PyTorch's allocator keeps of freed device memory, so that the next engine's own can be measured."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _switches() -> Callable[[], None]:
    """What puts the switches back to what they are now."""
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    allow_tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark

    def restore() -> None:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = allow_tf32
        cudnn.benchmark = benchmark

    return restore
