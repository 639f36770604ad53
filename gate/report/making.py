"""How an engine was made, in sentences: what the reports say of lowering, calibration, build and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gate.engines.interface import CalibrationRecord, Layer
from gate.precision import compute_layers
from gate.results import EngineResult

_NAMED = 6
_LISTED = 200


def making_lines(result: EngineResult) -> Iterator[str]:
    """Which tool lowered the graph, what it was calibrated on, how it was built, and what its layers compute in."""
    if (lowering := result.lowering) is not None and lowering.tool:
        by = f"{lowering.tool} {lowering.tool_version}".strip()
        # TF32 is a setting of the compiler: its graph is an FP32 one.
        asked = "fp32" if result.precision == "tf32" else result.precision
        yield f"lowered by {by}: {_counted(lowering.layers)}{_others(lowering.layers, asked)}"
        if lowering.calibration is not None:
            yield _calibrated(lowering.calibration)
    build = result.build
    if build is None:
        return
    if build.calibration is not None:
        yield _calibrated(build.calibration)
    if build.layers and build.layers_source != "graph":
        yield f"layers by the {build.layers_source}: {_counted(build.layers)}{_others(build.layers, result.precision)}"
    if build.seconds is not None:
        complaints = f", {len(build.log)} warnings or errors in its log" if build.log else ""
        yield f"built by {build.backend} {build.backend_version} in {build.seconds:.1f} s{complaints}"
    for name, digest in build.digests.items():
        yield f"made with {name} (sha256 {digest[:12]}…)"


def nodes_by_precision(result: EngineResult) -> Iterator[tuple[str, str]]:
    """Each precision with the names of the nodes that run in it: of the engine where they are listed, else of its graph."""
    build = () if result.build is None else result.build.layers
    layers = build or (() if result.lowering is None else result.lowering.layers)
    named: dict[str, list[str]] = {}
    for layer in layers:
        named.setdefault(layer.precision, []).append(f"{layer.name} ({layer.type})")
    for precision, names in sorted(named.items(), key=lambda each: -len(each[1])):
        more = f" and {len(names) - _LISTED} more, all in report.json" if len(names) > _LISTED else ""
        yield f"{precision}, {len(names)}", f"{', '.join(names[:_LISTED])}{more}"


def reproduce_lines(result: EngineResult) -> Iterator[str]:
    """Command lines of the vendor's own tool that build this engine and time it."""
    if result.build is not None:
        yield from filter(None, (result.build.command, result.build.run_command))


def _counted(layers: tuple[Layer, ...]) -> str:
    """`40 fp16, 3 fp32 of 43 nodes`."""
    counts = Counter(layer.precision for layer in layers).most_common()
    return ", ".join(f"{count} {name}" for name, count in counts) or "no node"


def _others(layers: tuple[Layer, ...], precision: str) -> str:
    """The compute layers that are not in the precision asked for, by name."""
    others = [layer for layer in compute_layers(layers) if layer.precision != precision]
    if not others:
        return ""
    named = ", ".join(f"{layer.name} ({layer.type}, {layer.precision})" for layer in others[:_NAMED])
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return f"; not {precision}: {named}{more}"


def _calibrated(record: CalibrationRecord) -> str:
    told = f"calibrated by {record.tool or 'the quantiser'}, {record.method}, on {record.samples} samples: "
    told += f"{len(record.ranges)} tensors"
    clipped = [each for each in record.ranges if each.clipped_fraction]
    if clipped:
        worst = max(clipped, key=lambda each: each.clipped_fraction or 0.0)
        told += f", at most {100 * (worst.clipped_fraction or 0.0):.3g} % clipped ({worst.name})"
    for state in ("outliers", "dead", "constant"):
        names = [each.name for each in record.ranges if each.state == state]
        if names:
            told += f", {len(names)} {state}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    return told
