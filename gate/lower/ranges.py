"""What calibration came to: the range of each quantised activation, held against the values that the FP32 graph gives.

The quantisers do not tell, so the FP32 graph runs once more over the samples, with the quantised activations as outputs.
The scales are final by then, hence the clipped values are counted, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gate.calibration import ActivationStats, range_of
from gate.chatter import quiet
from gate.engines.interface import TensorRange
from gate.errors import LoweringError
from gate.lower.files import inputs_of, is_large, save
from gate.lower.samples import Samples
from gate.tensors import Array

_SLICE_BYTES = 128 * 2**20
"""Activations held at once; batches are run in parts that stay within, where the graph's first axis allows it."""


@dataclass(frozen=True)
class _Steps:
    """The outermost step of a quantised type, and where values begin to be clipped: half a step farther.

    Source: ONNX QuantizeLinear: int8 is symmetric here, -127 to 127; float8e4m3fn ends at 448, its last step is 32 wide.
    """

    last: float
    clips: float
    even: bool


_STEPS = {"int8": _Steps(127.0, 127.5, even=True), "fp8": _Steps(448.0, 464.0, even=False)}


def measured_ranges(
    source: Any, model: Any, folder: Path, *, samples: Samples, precision: str
) -> tuple[TensorRange, ...]:
    """The quantised activations of a lowered graph in graph order, with what the samples give in the FP32 graph.

    Args:
        source: The FP32 graph.
        model: The lowered one.
        folder: For a large graph's files.
        samples: What it was calibrated on.
        precision: int8 or fp8.

    Raises:
        LoweringError: A scale is no positive number, an activation is not finite, or the FP32 graph does not run.
    """
    steps = _STEPS[precision]
    scales = _scales(model)
    for name, scale in scales.items():
        if not (math.isfinite(scale) and scale > 0):
            raise LoweringError(f"calibration gave tensor {name!r} the range {scale * steps.last:g}")
    stats = {name: ActivationStats(-scale * steps.clips, scale * steps.clips) for name, scale in scales.items()}
    known = {*inputs_of(source), *(name for node in source.graph.node for name in node.output)}
    _measure(source, {name: each for name, each in stats.items() if name in known}, folder, samples)
    found = []
    for name, scale in scales.items():
        seen, limit = stats[name], scale * steps.last
        if seen.not_finite:
            raise LoweringError(
                f"the FP32 graph gives {seen.not_finite} values that are not finite in tensor {name!r} on the "
                "calibration samples",
                hint="Look at these samples, and at the graph in FP32.",
            )
        found.append(
            range_of(name, low=-limit, high=limit, stats=seen, even_steps=steps.even)
            if seen.count
            else TensorRange(name=name, low=-limit, high=limit)
        )
    return tuple(found)


def _scales(model: Any) -> dict[str, float]:
    """The scale of each activation that a QuantizeLinear node takes, in graph order."""
    from onnx import numpy_helper

    values = {tensor.name: tensor for tensor in model.graph.initializer}
    values |= {
        node.output[0]: each.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for each in node.attribute
        if each.name == "value"
    }
    found: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in values and node.input[1] in values:
            scale = numpy_helper.to_array(values[node.input[1]]).astype(np.float64)
            found[node.input[0]] = float(np.max(scale))
    return found


def _measure(source: Any, stats: Mapping[str, ActivationStats], folder: Path, samples: Samples) -> None:
    """Run the samples through the FP32 graph and take its activations into their statistics."""
    inputs = inputs_of(source)
    outputs = [name for name in stats if name not in inputs]
    session = _session(source, outputs, folder) if outputs else None
    size = _slice_size(source, outputs)
    for batch in samples:
        for part in _parts(batch, size):
            for name in inputs.keys() & stats.keys():
                stats[name].add(part[name])
            if session is None:
                continue
            try:
                values = session.run(outputs, part)
            except Exception as err:
                raise LoweringError(f"the FP32 graph does not run on the calibration samples: {err}") from err
            for name, value in zip(outputs, values, strict=True):
                stats[name].add(value)


def _session(source: Any, outputs: list[str], folder: Path) -> Any:
    """The FP32 graph on ONNX Runtime's CPU provider, with these outputs and no others."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(source)
    types = {each.name: each for each in (*model.graph.value_info, *model.graph.output)}
    wanted = [types.get(name, onnx.ValueInfoProto(name=name)) for name in outputs]
    copies = [onnx.ValueInfoProto.FromString(each.SerializeToString()) for each in wanted]
    del model.graph.output[:]
    model.graph.output.extend(copies)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with quiet():
        try:
            if not is_large(model):
                return onnxruntime.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            path = folder / "measured.onnx"
            save(model, path)
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as err:
            raise LoweringError(f"ONNX Runtime cannot run the FP32 graph to report its activations: {err}") from err


def _slice_size(source: Any, outputs: list[str]) -> int | None:
    """Samples that are run at once; None for whole batches, where the first axis is fixed or a size is not known."""
    import onnx

    inputs = inputs_of(source).values()
    batch = {each.shape[0] if each.shape else None for each in inputs}
    if len(batch) != 1 or not isinstance(next(iter(batch)), str) or is_large(source):
        return None
    try:
        graph = onnx.shape_inference.infer_shapes(source).graph
    except Exception:  # noqa: BLE001 - a courtesy: without it batches are run whole
        return None
    shapes = {each.name: each.type.tensor_type.shape.dim for each in (*graph.value_info, *graph.output)}
    total = 0
    for name in outputs:
        sizes = shapes.get(name)
        if not sizes or not all(dim.HasField("dim_value") for dim in sizes[1:]):
            return None
        total += 4 * math.prod(dim.dim_value for dim in sizes[1:])
    return max(1, _SLICE_BYTES // max(1, total))


def _parts(batch: dict[str, Array], size: int | None) -> Iterator[dict[str, Array]]:
    count = len(next(iter(batch.values()))) if size is not None else 0
    if size is None or count <= size:
        yield batch
        return
    for start in range(0, count, size):
        yield {name: values[start : start + size] for name, values in batch.items()}
