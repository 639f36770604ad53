"""The backends by name. Importing this loads none of them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from gate.errors import SpecError

if TYPE_CHECKING:
    from gate.engines.interface import Backend

BACKENDS = ("onnxruntime", "tensorrt_rtx", "tensorrt", "torch")


def backend(name: str) -> Backend:
    """The backend of a name in the spec; whether it is installed is asked by its `version()`.

    Raises:
        SpecError: There is no such backend; names the nearest.
    """
    if name == "onnxruntime":
        from gate.engines.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    if name in ("tensorrt_rtx", "tensorrt"):
        from gate.engines.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(name)
    if name == "torch":
        from gate.engines.torch.backend import TorchBackend

        return TorchBackend()
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    raise SpecError(
        f"there is no backend {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(BACKENDS)}")
    )
