"""How an engine was made, in sentences: what the reports say of lowering, calibration, build and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gate.engines.interface import CalibrationRecord, Layer
from gate.precision import compute_layers
from gate.results import EngineResult
from gate.wording import MISSING, number

_NAMED = 6
_LISTED = 200
_LISTED_BY = {"dispatch": "operators run (dispatch)", "export": "operators exported (export)"}
_STATES = {"outliers": "with outliers"}

RANGE_HEADINGS = ("tensor", "low", "high", "largest seen", "99.9 % within", "clipped", "state")
"""Of the table of calibrated ranges."""


def making_lines(result: EngineResult) -> Iterator[str]:
    """Which tool lowered the graph, what it was calibrated on, how it was built, and what its layers compute in."""
    if (lowering := result.lowering) is not None and lowering.tool:
        by = f"lowered by {lowering.tool} {lowering.tool_version}".strip()
        if lowering.tool == "copy":
            by = "taken as it is"
        # TF32 is a setting of the compiler: its graph is an FP32 one.
        asked = "fp32" if result.precision == "tf32" else result.precision
        yield f"{by}: {_counted(lowering.layers)}{_others(lowering.layers, asked)}"
        if lowering.calibration is not None:
            yield _calibrated(lowering.calibration)
    build = result.build
    if build is None:
        return
    if build.calibration is not None:
        yield _calibrated(build.calibration)
    if build.layers and build.layers_source != "graph":
        listed = _LISTED_BY.get(build.layers_source, f"layers by the {build.layers_source}")
        yield f"{listed}: {_counted(build.layers)}{_others(build.layers, result.precision)}"
    if build.seconds is not None:
        complaints = (
            f", {plural(len(build.log), 'warning or error', 'warnings or errors')} in its log" if build.log else ""
        )
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


def reproduce_lines(result: EngineResult) -> Iterator[tuple[str, str]]:
    """What is done by hand, and the command line of the vendor's own tool for it: `build by hand`, `time by hand`."""
    if result.build is None:
        return
    if result.build.command is not None:
        yield "build by hand", result.build.command
    if result.build.run_command is not None:
        yield "time by hand", result.build.run_command


def calibrations(result: EngineResult) -> tuple[CalibrationRecord, ...]:
    """What the engine was calibrated by: the quantiser that lowered its graph, or the compiler; mostly one or none."""
    both = (
        None if result.lowering is None else result.lowering.calibration,
        None if result.build is None else result.build.calibration,
    )
    return tuple(each for each in both if each is not None)


def range_rows(record: CalibrationRecord) -> Iterator[tuple[str, ...]]:
    """Cells of `RANGE_HEADINGS` for each calibrated tensor, of the first 200; a last row says how many are left out."""
    for each in record.ranges[:_LISTED]:
        clipped = MISSING if each.clipped_fraction is None else f"{100 * each.clipped_fraction:.3g} %"
        numbers = (each.low, each.high, each.max_abs, each.p999_abs)
        cells = (MISSING if value is None else number(value, digits=3) for value in numbers)
        yield each.name, *cells, clipped, each.state
    if len(record.ranges) > _LISTED:
        yield f"{len(record.ranges) - _LISTED} more, all in report.json", *("",) * (len(RANGE_HEADINGS) - 1)


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


def calibration_text(record: CalibrationRecord) -> str:
    """By what, how and on how many samples: `onnxruntime 1.31.1, percentile 99.999, on 200 samples`."""
    samples = plural(record.samples, "sample", "samples")
    return f"{record.tool or 'the quantiser'}, {record.method_text}, on {samples}"


def plural(count: int, one: str, many: str) -> str:
    """A number with its noun: `1 tensor`, `2 tensors`."""
    return f"{count} {one if count == 1 else many}"


def _calibrated(record: CalibrationRecord) -> str:
    told = f"calibrated by {calibration_text(record)}: {plural(len(record.ranges), 'tensor', 'tensors')}"
    clipped = [each for each in record.ranges if each.clipped_fraction]
    if clipped:
        worst = max(clipped, key=lambda each: each.clipped_fraction or 0.0)
        told += f", at most {100 * (worst.clipped_fraction or 0.0):.3g} % clipped ({worst.name})"
    for state in ("outliers", "dead", "constant"):
        names = [each.name for each in record.ranges if each.state == state]
        if names:
            told += (
                f", {len(names)} {_STATES.get(state, state)}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            )
    return told
