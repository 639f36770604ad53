"""Lowering: the FP32 ONNX graph in another precision, made once for all backends.

fp16 and bf16 are made by NVIDIA Model Optimizer's AutoCast, with FP32 inputs and outputs. int8 is made by ONNX Runtime's
quantizer or Model Optimizer, fp8 by Model Optimizer, as explicit Q/DQ that TensorRT accepts: symmetric, FP32 scales,
weights per channel, no quantised bias, so that TensorRT can fuse what follows. A graph that carries Q/DQ already, from
quantisation-aware training, is taken as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate.calibration import calibration_notes
from gate.engines.graph import layers_of, opset_of
from gate.engines.interface import CalibrationRecord, Layer, LoweringRecord
from gate.errors import LoweringError
from gate.lower import autocast, modelopt, onnxruntime
from gate.lower.files import inputs_of, read, write
from gate.lower.nodes import excluded, named, nothing_lowered, precision_notes, quantisers
from gate.lower.ranges import measured_ranges
from gate.lower.samples import Samples
from gate.lower.tools import PERCENTILE, Tool, tool_for, tool_version
from gate.precision import compute_layers
from gate.spec import QUANTIZED, LoweringSpec
from gate.tensors import NamedArrays

__all__ = ["lower", "tool_version"]

_MADE_BY = {
    "copy": "copy",
    "autocast": "modelopt.onnx.autocast",
    "modelopt": "modelopt.onnx.quantization.quantize",
    "onnxruntime": "onnxruntime.quantization.quantize_static",
}
_WHY = {
    "autocast": "since their values or weights do not fit",
    "modelopt": "where Model Optimizer finds no gain",
    "onnxruntime": "which ONNX Runtime's quantizer leaves",
}


@dataclass(frozen=True)
class _Lowered:
    """A graph, what made it, and what is to be said of it."""

    model: Any
    tool: Tool
    layers: tuple[Layer, ...]
    calibration: CalibrationRecord | None = None
    notes: tuple[str, ...] = ()


def lower(
    onnx: Path,
    *,
    precision: str,
    out: Path,
    calibration: Iterable[NamedArrays] | None = None,
    lowering: LoweringSpec | None = None,
) -> LoweringRecord:
    """Write the graph in a precision.

    Args:
        onnx: The FP32 graph, or one with Q/DQ.
        precision: fp32 and tf32 copy it: TF32 is a setting of the compiler.
        lowering: How; left out: the precision's defaults.
        out: The file to write; weights above the size of a protobuf message go to `<out>.data`.
        calibration: Batches of samples by input. int8 and fp8 need them, unless the graph carries Q/DQ. fp16 uses the
            first few, where given, to find values that float16 cannot hold; so does bf16 for data_max.

    Raises:
        LoweringError: The tool is not installed or failed, nothing was lowered, the inputs or outputs changed, what is
            to be excluded is not there, or the calibration is missing, empty, not finite or constant.
    """
    lowering = lowering or LoweringSpec()
    tool = tool_for(precision, lowering)
    source = read(onnx)
    with tempfile.TemporaryDirectory(prefix="gate-lower-") as name:
        folder = Path(name)
        if tool.name == "copy":
            made = _Lowered(source, tool, layers_of(source))
        elif precision in QUANTIZED and (tool.name == "none" or quantisers(source)):
            made = _taken(source, precision, lowering, tool, calibrated=calibration is not None, where=str(onnx))
        elif precision in QUANTIZED:
            made = _quantized(
                source, folder, precision=precision, lowering=lowering, tool=tool, calibration=calibration
            )
        else:
            made = _cast(source, folder, precision=precision, lowering=lowering, tool=tool, calibration=calibration)
        if made.tool.name != "copy":
            _require_lowered(made, source=source, precision=precision, lowering=lowering, where=str(onnx))
        write(made.model, out, folder)
    return LoweringRecord(
        precision=precision,
        tool=_MADE_BY.get(made.tool.name, "copy"),
        tool_version=made.tool.version,
        opset=opset_of(made.model),
        layers=made.layers,
        calibration=made.calibration,
        notes=made.notes,
    )


def _taken(
    source: Any, precision: str, lowering: LoweringSpec, tool: Tool, *, calibrated: bool, where: str
) -> _Lowered:
    """The graph as it is, since it carries Q/DQ."""
    count = quantisers(source)
    if not count:
        raise LoweringError(
            'lowering tool = "none" takes a graph that carries Q/DQ, and this one has no QuantizeLinear or '
            "DequantizeLinear node",
            where=where,
            hint="Export the model after quantisation-aware training, or leave tool out and give calibration samples.",
        )
    if lowering.exclude_nodes or lowering.exclude_ops:
        raise LoweringError(
            f"the graph carries {count} QuantizeLinear and DequantizeLinear nodes already, so nothing can be excluded",
            where=where,
            hint="Leave exclude_nodes and exclude_ops out, or exclude these layers in training.",
        )
    unused = []
    if tool.name != "none" and lowering.tool is not None:
        unused.append(f"{lowering.tool} was not used")
    if calibrated:
        unused.append("the calibration samples were not used")
    layers = layers_of(source)
    compute = compute_layers(layers)
    inside = sum(layer.precision == precision for layer in compute)
    note = (
        f"the graph carries {count} QuantizeLinear and DequantizeLinear nodes already and was taken as it is: {inside} of "
        f"{len(compute)} compute nodes are {precision}"
    )
    return _Lowered(source, Tool("none"), layers, notes=("; ".join([note, *unused]),))


def _cast(
    source: Any,
    folder: Path,
    *,
    precision: str,
    lowering: LoweringSpec,
    tool: Tool,
    calibration: Iterable[NamedArrays] | None,
) -> _Lowered:
    source = named(source)
    kept = excluded(source, lowering)
    model, notes = autocast.cast(
        source, folder, precision=precision, lowering=lowering, kept=kept, calibration=calibration
    )
    layers = layers_of(model)
    more = precision_notes(layers, precision=precision, kept=kept, tool="AutoCast", why=_WHY["autocast"])
    return _Lowered(model, tool, layers, notes=(*more, *notes))


def _quantized(
    source: Any,
    folder: Path,
    *,
    precision: str,
    lowering: LoweringSpec,
    tool: Tool,
    calibration: Iterable[NamedArrays] | None,
) -> _Lowered:
    if calibration is None:
        raise LoweringError(
            f"{precision} needs calibration samples, and there are none",
            hint='Add calibration = "module:function" to [data].',
        )
    version = tool.version
    source = named(source)
    kept = excluded(source, lowering)
    kept_samples = folder / "samples"
    kept_samples.mkdir()
    samples = Samples(calibration, inputs_of(source), kept_samples)
    if tool.name == "modelopt":
        model = modelopt.quantized(source, folder, precision=precision, samples=samples, method=tool.method, kept=kept)
    else:
        model = onnxruntime.quantized(
            source, folder, samples=samples, method=tool.method, percentile=lowering.percentile, kept=kept
        )
    layers = layers_of(model)
    notes = precision_notes(layers, precision=precision, kept=kept, tool=tool.name, why=_WHY[tool.name])
    before, after = opset_of(source), opset_of(model)
    if before != after:
        notes = (*notes, f"opset raised from {before} to {after}")
    ranges = measured_ranges(source, model, folder, samples=samples, precision=precision)
    record = CalibrationRecord(
        tool=f"{tool.distribution} {version}",
        method=tool.method,
        percentile=(lowering.percentile or PERCENTILE) if tool.method == "percentile" else None,
        samples=samples.samples,
        sha256=samples.sha256(),
        ranges=ranges,
        notes=calibration_notes(ranges, samples=samples.samples),
    )
    return _Lowered(model, tool, layers, record, notes)


def _require_lowered(made: _Lowered, *, source: Any, precision: str, lowering: LoweringSpec, where: str) -> None:
    lowered = [
        layer
        for layer in made.layers
        if layer.precision == precision and layer.type not in ("Cast", "QuantizeLinear", "DequantizeLinear")
    ]
    if not lowered:
        raise nothing_lowered(source, precision=precision, lowering=lowering, tool=made.tool.name)
    for kind in ("input", "output"):
        before = [(each.name, each.type.tensor_type.elem_type) for each in getattr(source.graph, kind)]
        after = [(each.name, each.type.tensor_type.elem_type) for each in getattr(made.model.graph, kind)]
        if before != after:
            raise LoweringError(f"lowering changed the {kind}s: before {before}, after {after}", where=where)
