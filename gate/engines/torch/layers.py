"""What a PyTorch engine computes in: its operators with their precision, from a traced run or an exported graph."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gate.engines.interface import Layer
from gate.engines.torch.arithmetic import TF32_OVERRIDE
from gate.precision import COMPUTE_TYPES

ONNX_TYPES: Mapping[str, str] = {
    "_convolution": "Conv",
    "conv1d": "Conv",
    "conv2d": "Conv",
    "conv3d": "Conv",
    "convolution": "Conv",
    "cudnn_convolution": "Conv",
    "mkldnn_convolution": "Conv",
    "conv_transpose1d": "ConvTranspose",
    "conv_transpose2d": "ConvTranspose",
    "conv_transpose3d": "ConvTranspose",
    "cudnn_convolution_transpose": "ConvTranspose",
    "addmm": "Gemm",
    "linear": "Gemm",
    "addbmm": "MatMul",
    "addmv": "MatMul",
    "baddbmm": "MatMul",
    "bmm": "MatMul",
    "matmul": "MatMul",
    "mm": "MatMul",
    "mv": "MatMul",
    "einsum": "Einsum",
    "_efficient_attention_forward": "Attention",
    "_flash_attention_forward": "Attention",
    "_scaled_dot_product_cudnn_attention": "Attention",
    "_scaled_dot_product_efficient_attention": "Attention",
    "_scaled_dot_product_flash_attention": "Attention",
    "_scaled_dot_product_flash_attention_for_cpu": "Attention",
    "scaled_dot_product_attention": "Attention",
    "_native_multi_head_attention": "MultiHeadAttention",
    "_transformer_encoder_layer_fwd": "MultiHeadAttention",
    "gru": "GRU",
    "lstm": "LSTM",
    "_cudnn_rnn": "RNN",
    "mkldnn_rnn_layer": "RNN",
    "rnn_relu": "RNN",
    "rnn_tanh": "RNN",
}
"""ATen's operators that multiply, as ONNX calls them, so that `gate.precision` counts them.

Source: `native_functions.yaml` of PyTorch, and the ONNX operator reference.
"""

PRECISIONS: Mapping[str, str] = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}
"""What the gate calls torch's floating dtypes; the others keep torch's name."""

_CONVOLUTION_TRANSPOSED = 6
"""Position of `transposed` in `aten::convolution`. Source: `native_functions.yaml`."""

_FIRST_WITH_TF32 = (8, 0)
"""Compute capability of the first GPUs with TF32. Source: NVIDIA Ampere architecture whitepaper."""


@dataclass(frozen=True)
class Operator:
    """One call of an ATen operator.

    Args:
        name: Such as `convolution`.
        module: The module that calls it, such as `head.fc`; empty for the outermost.
        dtype: Of its first output, by torch's name: `float32`.
        transposed: Of a convolution.
    """

    name: str
    module: str
    dtype: str
    transposed: bool = False


def layers_from_operators(
    operators: Iterable[Operator], *, tf32: Callable[[str], bool] = lambda _: False
) -> tuple[Layer, ...]:
    """Operators as layers: named by module and operator, typed as ONNX does where it multiplies.

    Args:
        operators: In execution order.
        tf32: Whether an FP32 layer of this type is computed in TF32.
    """
    seen: Counter[str] = Counter()
    layers: list[Layer] = []
    for each in operators:
        kind = ONNX_TYPES.get(each.name, each.name)
        if each.transposed and kind == "Conv":
            kind = "ConvTranspose"
        precision = PRECISIONS.get(each.dtype, each.dtype)
        if precision == "fp32" and kind in COMPUTE_TYPES and tf32(kind):
            precision = "tf32"
        name = f"{each.module}/{each.name}" if each.module else each.name
        seen[name] += 1
        layers.append(Layer(name if seen[name] == 1 else f"{name}:{seen[name]}", kind, precision))
    return tuple(layers)


def tf32_of(device: str, *, environment: Mapping[str, str] | None = None) -> Callable[[str], bool]:
    """Whether FP32 layers of a type run in TF32 on a device: by PyTorch's switches as they are now, and by the GPU.

    Args:
        device: `cpu` or `cuda`.
        environment: Whose `NVIDIA_TF32_OVERRIDE` stands above the switches; left out: the process's.
    """
    import torch

    override = (os.environ if environment is None else environment).get(TF32_OVERRIDE)
    if device == "cpu" or override == "0" or torch.cuda.get_device_capability() < _FIRST_WITH_TF32:
        return lambda _: False
    if override == "1":
        return lambda _: True
    convolutions = bool(torch.backends.cudnn.allow_tf32)
    products = torch.get_float32_matmul_precision() != "highest"
    by_cudnn = ("Conv", "ConvTranspose", "GRU", "LSTM", "RNN")
    return lambda kind: convolutions if kind in by_cudnn else products


def dispatched(module: Any, call: Callable[[], object]) -> tuple[Operator, ...]:
    """The operators that PyTorch dispatches while `call` runs the module, after autocast had its say.

    Views and what gives no tensor are left out.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    stack: list[str] = []
    found: list[Operator] = []

    class Listing(TorchDispatchMode):  # type: ignore[misc]
        """Writes down each operator."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """Call it, and keep its name and the dtype of what it gave."""
            result = func(*args, **(kwargs or {}))
            dtype = _dtype(result)
            if dtype is not None and not getattr(func, "is_view", False):
                found.append(_operator(func, args, stack[-1] if stack else "", dtype))
            return result

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: object) -> None:
        stack.pop()

    hooks: list[Any] = []
    for name, part in module.named_modules():
        if not isinstance(part, torch.jit.ScriptModule):
            hooks.append(part.register_forward_pre_hook(enter(_short(name))))
            hooks.append(part.register_forward_hook(leave, always_call=True))
    try:
        # Inference mode shows composite operators before autocast takes their parts, no_grad the parts themselves.
        with torch.no_grad(), Listing():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found)


def exported(program: Any) -> tuple[Operator, ...]:
    """The ATen operators of an exported program, those under autocast with the dtypes that it gives them."""
    return tuple(_listed(program.graph_module))


def _listed(graph: Any) -> Iterator[Operator]:
    """Of a `torch.fx.GraphModule`, and of those in it: a region under autocast is one of its own."""
    import torch

    for node in graph.graph.nodes:
        if node.op == "get_attr":
            part = getattr(graph, node.target, None)
            if isinstance(part, torch.fx.GraphModule):
                yield from _listed(part)
        if node.op != "call_function" or not hasattr(node.target, "overloadpacket"):
            continue
        dtype = _dtype(node.meta.get("val"))
        if dtype is not None and not getattr(node.target, "is_view", False):
            paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            yield _operator(node.target, node.args, _short(paths[-1] if paths else ""), dtype)


def _operator(func: Any, args: Any, module: str, dtype: str) -> Operator:
    name = func.overloadpacket.__name__
    transposed = name in ("convolution", "_convolution") and bool(args[_CONVOLUTION_TRANSPOSED])
    return Operator(name, module, dtype, transposed)


def _dtype(value: Any) -> str | None:
    """Torch's name of a tensor's dtype, or of that of the first tensor in a tuple."""
    import torch

    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None


def _short(path: str) -> str:
    """A module's path without the gate's own wrappers around it: `module.features.0` as `features.0`."""
    return re.sub(r"^(?:L\[['\"]self['\"]\]\.?)?(?:core\.?)?(?:module(?:\.|$))?", "", path)
