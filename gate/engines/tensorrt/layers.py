"""The layers of a network or an engine, with the precision that each computes in."""

from __future__ import annotations

import json
from typing import Any

from gate.engines.interface import Layer
from gate.engines.tensorrt.api import label as label_of

_MULTIPLYING = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "FULLY_CONNECTED")


def layers_of_network(network: Any, *, tf32: bool) -> tuple[Layer, ...]:
    """Layers of a parsed network with the type of their first output, constants left out.

    A layer whose first two inputs both come from DEQUANTIZE of 8-bit integers is `int8`. An FP32 multiplication is
    `tf32` where that is allowed.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds: dict[str, tuple[str, str]] = {}
    for layer in layers:
        source = layer.get_input(0) if layer.num_inputs else None
        for index in range(layer.num_outputs):
            kinds[layer.get_output(index).name] = (layer.type.name, source.dtype.name if source is not None else "")
    found: list[Layer] = []
    for layer in layers:
        if layer.type.name == "CONSTANT":
            continue
        label = label_of(layer.get_output(0).dtype.name) if layer.num_outputs else "unknown"
        if layer.type.name in _MULTIPLYING:
            # A convolution has its weights as an input only where they are not a constant of the layer itself.
            fed = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
            quantized = {label_of(kinds.get(each.name, ("", ""))[1]) for each in fed if each is not None}
            dequantized = [kinds.get(each.name, ("", ""))[0] == "DEQUANTIZE" for each in fed if each is not None]
            if len(dequantized) > 1 and all(dequantized) and len(quantized) == 1:
                label = quantized.pop()
            elif label == "fp32" and tf32:
                label = "tf32"
        found.append(Layer(layer.name, layer.type.name, label))
    return tuple(found)


def layers_of_inspector(text: str, *, tf32: bool) -> tuple[Layer, ...]:
    """Layers of an engine from its inspector's JSON, with the precision that they compute in.

    With dynamic shapes TensorRT 8.6 writes `N/A due to dynamic shapes` for every type; the type of a layer's weights
    and the name of its tactic still tell. 8.6 also writes raw control characters into the JSON, so it is parsed
    leniently. What cannot be read has no layers.

    Args:
        text: JSON of IEngineInspector.get_engine_information, at ProfilingVerbosity.DETAILED.
        tf32: Whether TF32 is allowed: an FP32 layer whose tactic does not say is then `tf32`.
    """
    try:
        entries = json.loads(text, strict=False).get("Layers", [])
    except (ValueError, AttributeError):
        return ()
    found: list[Layer] = []
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        tactic = str(entry.get("TacticName") or "")
        outputs = entry.get("Outputs") or [{}]
        weights = entry.get("Weights") or {}
        label = _inspected_label(str(weights.get("Type", "")))
        if label == "unknown":
            label = _inspected_label(str(outputs[0].get("Format/Datatype", "")))
        if label == "unknown":
            label = next((name for part, name in _TACTICS if part in tactic), "unknown")
        if label == "fp32" and ("tf32" in tactic or (tf32 and not tactic)):
            label = "tf32"
        found.append(Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), label))
    return tuple(found)


_TACTICS = (
    ("_i8i8_", "int8"),
    ("_i8f32_", "int8"),
    ("_f16f16_", "fp16"),
    ("_bf16bf16_", "bf16"),
    ("_f32f32_", "fp32"),
)
"""Parts of tactic names that say what goes in: `sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_…`."""


def _inspected_label(text: str) -> str:
    """`fp16` from `Half`, or from `Channel major FP16 format where channel % 8 == 0`, as the inspector writes types."""
    words = text.replace(",", " ").split()
    names = {"FP32": "fp32", "FP16": "fp16", "BF16": "bf16", "Int8": "int8", "INT8": "int8", "FP8": "fp8"}
    names |= {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int32": "int32", "Int64": "int64", "Bool": "bool"}
    return next((names[word] for word in words if word in names), "unknown")
