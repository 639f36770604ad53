"""Whether an engine's layers got the precision that was asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from gate.engines.interface import BuildRecord, Layer
from gate.spec import LoweringSpec
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


def excluded_by(lowering: LoweringSpec, nodes: tuple[Layer, ...] = ()) -> Callable[[Layer], bool]:
    """Whether the spec keeps a layer out of an engine's precision.

    A layer that TensorRT fused, `/a/Conv + /a/Relu`, is excluded where every compute node in it is; where it is not
    known which of its parts compute, where any part is.

    Args:
        lowering: exclude_nodes are regular expressions of whole names, exclude_ops operators.
        nodes: Of the lowered graph, by which an engine's layers are known again; empty where there is none.
    """
    patterns = [re.compile(pattern) for pattern in lowering.exclude_nodes]

    def named(name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in patterns)

    kept = {each.name for each in nodes if named(each.name) or each.type in lowering.exclude_ops}
    computing = {each.name for each in nodes if each.type in COMPUTE_TYPES}

    def excluded(layer: Layer) -> bool:
        if named(layer.name) or layer.type in lowering.exclude_ops:
            return True
        parts = [part.strip() for part in layer.name.split(" + ")]
        if known := [part for part in parts if part in computing]:
            return all(part in kept for part in known)
        return any(part in kept or named(part) for part in parts)

    return excluded


def check_delivered_precision(
    record: BuildRecord, *, evidence: Evidence, excluded: Callable[[Layer], bool] = lambda _: False
) -> Finding | Failure:
    """The share of compute layers in the precision asked for, against the least that its name allows.

    Args:
        record: Of the build; its layers as the source lists them.
        evidence: How the list was obtained.
        excluded: Whether the spec keeps a layer out of the precision; such a layer is named, and does not count.
    """
    if not record.layers and record.layers_source == "inspector":
        return Failure(
            check=CHECK,
            error="MeasurementError",
            message="the plan does not list its layers' precisions: it was built without detailed profiling",
            evidence=evidence,
            hint="Build it with: trtexec --profilingVerbosity=detailed",
        )
    found = compute_layers(record.layers)
    layers = tuple(layer for layer in found if not excluded(layer))
    left_out = [layer.name for layer in found if excluded(layer)]
    if left_out and not layers:
        return Failure(
            check=CHECK,
            error="MeasurementError",
            message=f"the spec excludes every compute layer: {_listed(left_out)}",
            evidence=evidence,
            hint=f"Nothing is left to be {record.precision}: exclude less in [engine.lowering].",
        )
    if not layers:
        what = "has no compute layer" if record.layers else "lists no layer at all"
        return Failure(
            check=CHECK,
            error="MeasurementError",
            message=f"the engine {what} (source: {record.layers_source}), so its precision is not known",
            evidence=evidence,
            hint="An engine without a convolution or matrix multiplication has nothing for a precision to speed up."
            if record.layers
            else "",
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
    if left_out:
        detail += f"; {len(left_out)} excluded by the spec: {_listed(left_out)}"
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


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
