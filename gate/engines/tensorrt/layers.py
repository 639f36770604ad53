"""The layers of a network or an engine, with the precision that each computes in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gate.device import gpu
from gate.engines.interface import Layer
from gate.engines.tensorrt import api
from gate.engines.tensorrt.api import label as label_of
from gate.engines.tensorrt.loaded import LoadedPlan, Profile, host, read_plan
from gate.engines.tensorrt.plan import PlanHeader, require_compatible
from gate.errors import BackendUnavailable
from gate.tensors import TensorMeta

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
    """Layers of an engine from its inspector's JSON, with the precision that they compute in, tactic and format.

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
    if not isinstance(entries, list):
        return ()
    return tuple(_inspected_layer(entry, tf32=tf32) for entry in entries if isinstance(entry, dict))


def _inspected_layer(entry: dict[str, Any], *, tf32: bool) -> Layer:
    tactic = str(entry.get("TacticName") or "")
    outputs = entry.get("Outputs")
    first = outputs[0] if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict) else {}
    weights = entry.get("Weights")
    text = str(first.get("Format/Datatype") or "")
    label = _inspected_label(str(weights.get("Type", ""))) if isinstance(weights, dict) else "unknown"
    if label == "unknown":
        label = _inspected_label(text)
    if label == "unknown":
        label = _tactic_label(tactic)
    if label == "fp32" and ("tf32" in tactic or (tf32 and not tactic)):
        label = "tf32"
    return Layer(
        str(entry.get("Name", "")),
        str(entry.get("LayerType", "")),
        label,
        tactic=tactic,
        format="" if text.startswith("N/A") else text,
    )


_TACTICS = (
    ("_i8i8_", "int8"),
    ("_i8f32_", "int8"),
    ("_f16f16_", "fp16"),
    ("_bf16bf16_", "bf16"),
    ("_f32f32_", "fp32"),
)
"""Parts of tactic names that say what goes in: `sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_…`."""

_TACTIC_WORDS = {
    "fp32": "fp32",
    "f32": "fp32",
    "fp16": "fp16",
    "f16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "i8": "int8",
    "e4m3": "fp8",
    "fp8": "fp8",
    "tf32": "tf32",
}
"""Words that name a type in the tactics of later versions: `sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_…`,
`__myl_MulAdd_fp16_…`. The first one counts, which is the operands' type; several in one word are not read."""


def _tactic_label(tactic: str) -> str:
    """The precision that a tactic's name tells; `unknown` where it does not."""
    label = next((name for part, name in _TACTICS if part in tactic), None)
    if label is not None:
        return label
    words = (_TACTIC_WORDS.get(word) for word in re.split(r"[^a-z0-9]+", tactic.lower()))
    return next((word for word in words if word is not None), "unknown")


def _inspected_label(text: str) -> str:
    """`fp16` from `Half`, or from `Channel major FP16 format where channel % 8 == 0`, as the inspector writes types."""
    words = text.replace(",", " ").split()
    names = {"FP32": "fp32", "FP16": "fp16", "BF16": "bf16", "Int8": "int8", "INT8": "int8", "FP8": "fp8"}
    names |= {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int32": "int32", "Int64": "int64", "Bool": "bool"}
    return next((names[word] for word in words if word in names), "unknown")


@dataclass(frozen=True)
class InspectedTensor:
    """An input or output of an engine, sizes that are dynamic as None."""

    meta: TensorMeta
    mode: Literal["input", "output"]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What an engine says of itself.

    Args:
        header: Of the plan.
        runtime: The module that read it, with its version: `tensorrt 8.6.0`.
        layers: With their precision; empty where it was built without profiling verbosity.
        profiles: The shapes it may be given.
        tensors: Its inputs and outputs.
        device_memory_bytes: What an execution context takes for activations.
        size_bytes: Of the plan.
    """

    header: PlanHeader
    runtime: str
    layers: tuple[Layer, ...]
    profiles: tuple[Profile, ...]
    tensors: tuple[InspectedTensor, ...]
    device_memory_bytes: int
    size_bytes: int


def inspect_plan(
    name: str, path: Path, *, plugins: tuple[str, ...] = (), version_compatible: bool = False, tf32: bool = False
) -> Inspection:
    """Deserialise a plan, which is executable: verify its digest first. Then ask its inspector.

    Args:
        name: `tensorrt` or `tensorrt_rtx`; `read_header` says which a plan is of.
        path: The plan.
        plugins: Plugin libraries to load first.
        version_compatible: It was built to be, and may bring code for the host.
        tf32: It was built with TF32 allowed: an FP32 layer whose tactic does not say is then `tf32`.

    Raises:
        IncompatibleEngine: It is no plan, truncated, or not for here; said before it is deserialised.
        BackendUnavailable: There is no GPU here, or the runtime is not installed; said after the header was read.
        RunError: The file cannot be read, or it has no execution context.
    """
    data = read_plan(path)
    header = require_compatible(data, host=host(name), where=str(path), version_compatible=version_compatible)
    if gpu() is None:
        raise BackendUnavailable(
            f"there is no NVIDIA GPU here, so {name} cannot open the plan of {header.made_by}",
            where=str(path),
            hint="Inspect it on the GPU that it was built for, or its build record here.",
        )
    plan = LoadedPlan(api.module(name), data, where=str(path), plugins=plugins, host_code=version_compatible)
    plan.hold()
    try:
        return _inspection(plan, header, len(data), tf32=tf32)
    finally:
        plan.release()


def _inspection(plan: LoadedPlan, header: PlanHeader, size_bytes: int, *, tf32: bool) -> Inspection:
    trt, engine = plan.trt, plan.engine
    inputs, outputs = plan.tensors()
    profiles = plan.profiles()
    inspector = engine.create_engine_inspector()
    context = plan.context()
    # Of dynamic shapes types and tactics are told for the shapes of a context only.
    for name, (_, opt, _) in profiles[0].ranges.items() if profiles else ():
        if None in inputs[name].shape:
            context.set_input_shape(name, opt)
    inspector.execution_context = context
    layers = layers_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), tf32=tf32)
    return Inspection(
        header=header,
        runtime=f"{trt.__name__} {trt.__version__}",
        layers=layers,
        profiles=profiles,
        tensors=(
            *(InspectedTensor(meta, "input") for meta in inputs.values()),
            *(InspectedTensor(meta, "output") for meta in outputs.values()),
        ),
        device_memory_bytes=plan.device_memory_bytes,
        size_bytes=size_bytes,
    )
