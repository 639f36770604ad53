"""What can be read from an ONNX file without running it: its layers with their precision, its opset, its files."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gate.engines.interface import Layer

_DEFAULT_DOMAINS = ("", "ai.onnx")
_EXTERNAL_KEY = b"\x0a\x08location\x12"
"""Field 1 of a StringStringEntryProto with the value `location`: what each external tensor carries.

Source: onnx.proto3, TensorProto.external_data.
"""

_LABELS = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "DOUBLE": "fp64",
    "FLOAT8E4M3FN": "fp8",
    "FLOAT8E4M3FNUZ": "fp8",
    "FLOAT8E5M2": "fp8",
    "FLOAT8E5M2FNUZ": "fp8",
}
_QUANTIZED = ("INT8", "UINT8")
_LAYOUT = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that move values and compute nothing: what they are given decides the precision of what takes them."""


def layers_of(model: Any) -> tuple[Layer, ...]:
    """Nodes of an `onnx.ModelProto` in graph order, Constant left out, with the precision each computes in.

    The precision is the element type of the first output by type inference. A node whose data and weights both come
    from DequantizeLinear of 8-bit integers is `int8` (or `fp8`): that is how explicit quantisation is written. Between
    them may lie operators that only move values, as the Transpose of a linear layer's weights does.
    """
    import onnx

    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001 - inference is a courtesy here: without it types are unknown, and that fails closed
        typed = model
    graph = typed.graph
    types = _element_types(graph)
    producers = {name: node for node in graph.node for name in node.output}
    found: list[Layer] = []
    for node in graph.node:
        if node.op_type == "Constant":
            continue
        quantized = {_dequantized(name, producers, types) for name in node.input[:2]}
        label = quantized.pop() if len(node.input) > 1 and len(quantized) == 1 else None
        if label is None:
            label = _label(types.get(node.output[0]) if node.output else None)
        found.append(Layer(node.name or (node.output[0] if node.output else node.op_type), node.op_type, label))
    return tuple(found)


def opset_of(model: Any) -> int:
    """Version of the ONNX operator set that an `onnx.ModelProto` imports; 0 where it imports none."""
    return next((int(each.version) for each in model.opset_import if each.domain in _DEFAULT_DOMAINS), 0)


def has_external_data(path: Path) -> bool:
    """Whether an ONNX file may keep tensors in other files. Reads the bytes; `onnx` is not imported."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view.find(_EXTERNAL_KEY) >= 0


def external_files(model: Any) -> tuple[str, ...]:
    """Relative names of the files that an `onnx.ModelProto` keeps tensors in, sorted."""
    import onnx

    names = {
        entry.value
        for tensor in onnx.external_data_helper._get_all_tensors(model)  # noqa: SLF001 - onnx has no public walk over all tensors
        if onnx.external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(names))


def unsafe_external_file(path: Path, names: tuple[str, ...]) -> str | None:
    """What is wrong with the external files of the ONNX file at `path`, as a sentence; None where all is well.

    They must be regular files in its own folder: no absolute path, no `..`, no symbolic or second hard link.
    """
    folder = path.parent
    for name in names:
        pure = PurePosixPath(name.replace("\\", "/"))
        if not name or pure.is_absolute() or ".." in pure.parts or ":" in name:
            return f"external data {name!r} lies outside the model's folder"
        file = folder / name
        if not file.exists():
            return f"external data {name!r} is missing in {folder}"
        if not file.resolve().is_relative_to(folder.resolve()) or file.is_symlink() or not file.is_file():
            return f"external data {name!r} is not a regular file in the model's folder"
        if file.stat().st_nlink != 1:
            return f"external data {name!r} has more than one hard link"
    return None


def _element_types(graph: Any) -> dict[str, str]:
    import onnx

    name_of = onnx.TensorProto.DataType.Name
    types = {tensor.name: name_of(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = name_of(value.type.tensor_type.elem_type)
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    types[node.output[0]] = name_of(attribute.t.data_type)
    return types


def _dequantized(name: str, producers: Mapping[str, Any], types: dict[str, str]) -> str | None:
    node = producers.get(name)
    while node is not None and node.op_type in _LAYOUT:
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    element = types.get(node.input[0])
    if element in _QUANTIZED:
        return "int8"
    return _LABELS.get(element or "") if (element or "").startswith("FLOAT8") else None


def _label(element: str | None) -> str:
    if element is None or element == "UNDEFINED":
        return "unknown"
    return _LABELS.get(element, element.lower())
