"""Whether an engine's layers got the precision that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from gate.engines.interface import BuildRecord, Layer
from gate.verdict import Evidence, Failure, Finding, Interval, Limit

CHECK = "build.delivered_precision"

COMPUTE_TYPES = frozenset(
    {
        # ONNX operators
        "Attention",
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "Einsum",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "GRU",
        "Gemm",
        "LSTM",
        "MatMul",
        "MatMulInteger",
        "MultiHeadAttention",
        "QLinearConv",
        "QLinearMatMul",
        "RNN",
        # tensorrt.LayerType
        "CONVOLUTION",
        "DECONVOLUTION",
        "EINSUM",
        "FULLY_CONNECTED",
        "MATRIX_MULTIPLY",
        "RECURRENCE",
        "RNN_V2",
        # LayerType of TensorRT's engine inspector
        "CaskConvolution",
        "CaskDeconvolution",
        "CaskGemmConvolution",
        "CaskGemmMatrixMultiply",
        "CudnnConvolution",
        "CudnnDeconvolution",
        "MatrixMultiply",
        "gemm",
    }
)
"""Layers that do the multiplying: they decide speed and most of the error."""

AT_LEAST: Mapping[str, float] = {"fp32": 1.0, "tf32": 1.0, "fp16": 0.9, "bf16": 0.9, "int8": 0.5, "fp8": 0.5}
"""Least share of compute layers in the precision asked for.

fp32 and tf32: all, since one lower layer is another engine. fp16 and bf16: AutoCast may keep single layers in FP32,
where their values do not fit. int8 and fp8: quantisation leaves sensitive layers, often the first and last, in floating point.
"""

_FLOATING = frozenset({"fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8", "int4", "unknown"})
_NAMED = 4


def compute_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Convolutions, matrix multiplications and their relatives; those on index arithmetic are left out."""
    return tuple(layer for layer in layers if layer.type in COMPUTE_TYPES and layer.precision in _FLOATING)


def check_delivered_precision(record: BuildRecord, *, evidence: Evidence) -> Finding | Failure:
    """The share of compute layers in the precision asked for, against the least that its name allows.

    Args:
        record: Of the build; its layers as the source lists them.
        evidence: How the list was obtained.
    """
    layers = compute_layers(record.layers)
    if not layers:
        what = "has no compute layer" if record.layers else "lists no layer at all"
        return Failure(
            check=CHECK,
            error="MeasurementError",
            message=f"the engine {what} (source: {record.layers_source}), so its precision is not known",
            evidence=evidence,
            hint="An engine without a convolution or matrix multiplication has nothing for a precision to speed up.",
        )
    if record.precision not in AT_LEAST:
        return Failure(
            check=CHECK,
            error="MeasurementError",
            message=f"no share of layers is known for precision {record.precision!r}; it has {', '.join(AT_LEAST)}",
            evidence=evidence,
        )
    others = [layer for layer in layers if layer.precision != record.precision]
    share = (len(layers) - len(others)) / len(layers)
    counts = Counter(layer.precision for layer in layers)
    detail = f"{record.layers_source}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())
    if others:
        named = ", ".join(f"{layer.name} ({layer.type}, {layer.precision})" for layer in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        detail += f"; not {record.precision}: {named}{more}"
    return Finding(
        check=CHECK,
        estimate=share,
        interval=Interval(share, share),
        limit=Limit("at_least", AT_LEAST[record.precision], source="default"),
        n=len(layers),
        evidence=evidence,
        detail=detail,
        hint=""
        if share >= AT_LEAST[record.precision]
        else f"The graph is not {record.precision}: look at these layers.",
    )
