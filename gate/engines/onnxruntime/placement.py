"""Where the nodes of a graph run: what ONNX Runtime assigned to which execution provider, and whether that is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gate.errors import RunError
from gate.precision import COMPUTE_TYPES

RECORD_ENTRY = "session.record_ep_graph_assignment_info"
"""The session's configuration entry that makes ONNX Runtime keep the assignment.

Source: onnxruntime_session_options_config_keys.h, kOrtSessionOptionsRecordEpGraphAssignmentInfo, since 1.24.1.
"""

CPU_NODES_AT_MOST = 0.05
"""Share of nodes that may run elsewhere where the spec says nothing.

Shape arithmetic is not counted: it belongs on the CPU, and is 2 % to 50 % of an exported graph, by exporter. What is left
is data on the wrong device, which should be nothing; one node in twenty leaves room for shape arithmetic that ONNX
Runtime's optimiser rewrote under a name of its own. A convolution or matrix product elsewhere is never allowed.
"""

_COMPUTE = COMPUTE_TYPES | {"DeformConv"}
_NAMED = 4


@dataclass(frozen=True)
class Placed:
    """A node of the optimised graph and the execution provider that runs it."""

    name: str
    op_type: str
    provider: str


def placed_nodes(session: Any) -> tuple[Placed, ...]:
    """What an `onnxruntime.InferenceSession` with `RECORD_ENTRY` on assigned to which provider.

    Raises:
        RunError: The session does not say.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception as err:
        raise RunError(f"ONNX Runtime does not tell which provider runs a node: {' '.join(str(err).split())}") from err
    return tuple(Placed(node.name, node.op_type, part.ep_name) for part in parts for node in part.get_nodes())


def shape_nodes(model: Any) -> frozenset[str]:
    """Names of the nodes of an `onnx.ModelProto` that no tensor data reaches: arithmetic on shapes and constants.

    `Shape` and `Size` read no data, only how much there is of it. Quantised weights count as data.
    """
    graph = model.graph
    data = {value.name for value in graph.input}
    data -= {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        is_data = node.op_type == "DequantizeLinear" or any(
            each.HasField("g") or each.graphs for each in node.attribute
        )
        if is_data or (node.op_type not in ("Shape", "Size") and any(name in data for name in node.input)):
            data.update(node.output)
        elif node.name:
            found.add(node.name)
    return frozenset(found)


def require_placement(
    nodes: Sequence[Placed], *, asked: str, at_most: float, shapes: Collection[str] = (), where: str | None = None
) -> dict[str, int]:
    """Hold the assignment against the provider that was asked for.

    Args:
        nodes: Of the optimised graph.
        asked: ONNX Runtime's name of the provider.
        at_most: The share of nodes that may run on another one, 0 to 1.
        shapes: Names of nodes that do shape arithmetic, which may run on the CPU.
        where: The file, for errors.

    Returns:
        Number of nodes by provider, most first.

    Raises:
        RunError: Nothing is known of any node, none runs on the provider, one that does the computing runs on another,
            or too many nodes do.
    """
    if not nodes:
        raise RunError(f"ONNX Runtime lists no node, so it is not known whether {asked} runs the graph", where=where)
    counts = dict(Counter(node.provider for node in nodes).most_common())
    listed = ", ".join(f"{count} on {name}" for name, count in counts.items())
    if asked not in counts:
        raise RunError(
            f"{asked} runs none of the graph's {len(nodes)} nodes ({listed}): ONNX Runtime fell back silently",
            where=where,
            hint="It has no kernel for these nodes in this precision.",
        )
    elsewhere = [node for node in nodes if node.provider != asked and node.name not in shapes]
    computing = [node for node in elsewhere if node.op_type in _COMPUTE]
    if computing:
        raise RunError(
            f"{asked} does not run {_named(computing)}: what does the computing may not fall back ({listed})",
            where=where,
            hint="Its provider has no kernel for it in this precision, or these attributes.",
        )
    share = len(elsewhere) / len(nodes)
    if share > at_most:
        raise RunError(
            f"{len(elsewhere)} of {len(nodes)} nodes ({share:.1%}) do not run on {asked}: {_named(elsewhere)} ({listed}); "
            f"cpu_nodes_at_most is {at_most:g}",
            where=where,
            hint=f"Where that is meant, set options = {{ cpu_nodes_at_most = {_rounded_up(share):g} }}.",
        )
    return counts


def _named(nodes: Sequence[Placed]) -> str:
    named = ", ".join(
        f"{node.name or 'an unnamed node'} ({node.op_type}, on {node.provider})" for node in nodes[:_NAMED]
    )
    return named + (f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else "")


def _rounded_up(share: float) -> float:
    """To the next whole per cent, so that a limit of it allows the share."""
    return min(1.0, (int(share * 100) + 1) / 100)
