"""Which nodes of a graph keep their precision, and which it carries quantised already."""

from __future__ import annotations

import difflib
import re
from typing import Any

from gate.engines.graph import layers_of
from gate.engines.interface import Layer
from gate.errors import LoweringError
from gate.precision import compute_layers
from gate.spec import QUANTIZED, LoweringSpec

_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_NAMED = 4


def named(model: Any) -> Any:
    """The graph itself, with its unnamed nodes named after their first output, as lists of layers call them."""
    for node in model.graph.node:
        if not node.name and node.output:
            node.name = node.output[0]
    return model


def quantisers(model: Any) -> int:
    """How many QuantizeLinear and DequantizeLinear nodes a graph has."""
    return sum(node.op_type in _QUANTISERS for node in model.graph.node)


def excluded(model: Any, lowering: LoweringSpec) -> tuple[str, ...]:
    """Names of the nodes that stay in FP32 by the spec, in graph order.

    Args:
        model: The FP32 graph, its nodes named.
        lowering: A regular expression of exclude_nodes matches a whole name; exclude_ops are operators.

    Raises:
        LoweringError: One of them matches nothing; names what is near, or which operators there are.
    """
    names = [node.name for node in model.graph.node]
    kept: set[str] = set()
    for pattern in lowering.exclude_nodes:
        try:
            matching = re.compile(pattern)
        except re.error as err:
            raise LoweringError(f"exclude_nodes {pattern!r} is no regular expression: {err}") from err
        found = [name for name in names if matching.fullmatch(name)]
        if not found:
            raise LoweringError(
                f"exclude_nodes {pattern!r} matches no node of the graph's {len(names)}",
                hint=f"A whole name must match. {_near(pattern, names)}",
            )
        kept.update(found)
    operators = {node.op_type for node in model.graph.node}
    for operator in lowering.exclude_ops:
        if operator not in operators:
            raise LoweringError(
                f"exclude_ops {operator!r} is no operator of the graph",
                hint=f"It has {', '.join(sorted(operators))}.",
            )
        kept.update(node.name for node in model.graph.node if node.op_type == operator)
    return tuple(name for name in names if name in kept)


def _near(pattern: str, names: list[str]) -> str:
    """The node names that a pattern may have meant."""
    plain = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern)
    inside = [name for name in names if plain.strip(".") and plain.strip(".").lower() in name.lower()]
    near = inside[:_NAMED] or difflib.get_close_matches(plain, names, n=_NAMED, cutoff=0.4)
    return f"Near it: {', '.join(near)}." if near else f"It has {', '.join(names[:_NAMED])}, …"


def exactly(names: tuple[str, ...]) -> list[str]:
    """Regular expressions that match these names and no others, for tools that match from the beginning."""
    return [re.escape(name) + r"\Z" for name in names]


def precision_notes(
    layers: tuple[Layer, ...], *, precision: str, kept: tuple[str, ...], tool: str, why: str
) -> tuple[str, ...]:
    """What stays in another precision: by the spec, and by the tool's own choice.

    Args:
        layers: Of the lowered graph.
        precision: As asked for.
        kept: Names of the nodes that the spec excludes.
        tool: What lowered it.
        why: Its reason to leave a node.

    Raises:
        LoweringError: The tool lowered a node that the spec excludes.
    """
    compute = compute_layers(layers)
    wrong = [layer.name for layer in compute if layer.name in kept and layer.precision == precision]
    if wrong:
        raise LoweringError(f"{tool} made {precision} of nodes that the spec excludes: {', '.join(wrong[:_NAMED])}")
    notes = []
    if kept:
        many = "1 node excluded by the spec stays" if len(kept) == 1 else f"{len(kept)} nodes excluded by the spec stay"
        notes.append(f"{many} in fp32: {_listed(kept)}")
    left = [
        f"{layer.name} ({layer.type}, {layer.precision})"
        for layer in compute
        if layer.precision != precision and layer.name not in kept
    ]
    if left:
        notes.append(f"{len(left)} of {len(compute)} compute nodes are not {precision}, {why}: {_listed(left)}")
    return tuple(notes)


def nothing_lowered(source: Any, *, precision: str, lowering: LoweringSpec, tool: str) -> LoweringError:
    """The error for a graph of which no node computes in the precision that was asked for: why, and what to do.

    Args:
        source: The graph before, its nodes named.
        precision: As asked for.
        lowering: How.
        tool: What lowered it: `autocast`, `onnxruntime`, `modelopt`, or `none` for a graph that carries Q/DQ.
    """
    compute = compute_layers(layers_of(source))
    kept = excluded(source, lowering)
    why = f"no node of the graph computes in {precision}"
    hint = f"Look with gate inspect what the graph is made of, or ask for another precision than {precision}."
    if tool == "none":
        hint = f"Its Q/DQ is of another type than {precision}: ask for that, or export the model again."
    elif compute and all(layer.name in kept for layer in compute):
        why = "every convolution and matrix product is excluded by the spec"
        hint = "Take some out of exclude_nodes and exclude_ops, or ask for fp32."
    elif lowering.data_max is not None:
        why = f"data_max = {lowering.data_max:g} leaves every node in FP32"
        hint = "Give a larger data_max, or leave it out."
    elif precision in QUANTIZED and not compute:
        why = f"the graph has no convolution or matrix product, and {precision} is made of these alone"
    elif precision in QUANTIZED:
        widths = _widths(source)
        left = [layer for layer in compute if layer.name not in kept]
        sizes = [f"{layer.name} ({widths.get(layer.name, 'no constant weights')})" for layer in left]
        wide = "is wide enough" if tool == "modelopt" else "can be quantised"
        why = f"no convolution or matrix product {wide} for {precision}: {_listed(sizes)}"
        hint = (
            "Model Optimizer leaves matrix products with a side below 16 and small convolutions, and for fp8 those of 16 "
            "channels and fewer."
            if tool == "modelopt"
            else "It needs a convolution or matrix product with constant weights."
        )
    return LoweringError(f"nothing was lowered: {why}", hint=hint)


def _widths(model: Any) -> dict[str, str]:
    """Channels that each convolution and matrix product with constant weights takes and gives, by its node's name."""
    shapes = {each.name: list(each.dims) for each in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        shape = shapes.get(node.input[1]) if len(node.input) > 1 else None
        if shape is None or len(shape) < 2:
            continue
        given = {each.name: each.i for each in node.attribute}
        taken, made = shape[-2], shape[-1]
        if node.op_type == "Conv":
            taken, made = shape[1] * given.get("group", 1), shape[0]
        elif node.op_type == "ConvTranspose":
            taken, made = shape[0], shape[1] * given.get("group", 1)
        elif given.get("transB"):
            taken, made = made, taken
        found[node.name] = f"{taken} to {made} channels"
    return found


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
