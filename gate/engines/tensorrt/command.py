"""The equivalent command lines of the vendor's own tool, trtexec or tensorrt_rtx: to build by hand, and to time.

Source: samples/common/sampleOptions.cpp of TensorRT 8.6 and 10; "Migrating trtexec Usage from TensorRT 10.x to 11.x",
which removes the precision flags and has strong typing always on; tensorrt_rtx: its "Best Practices" and "Quick Start".
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gate.engines.interface import BuildRecord
from gate.latency.config import Cell, LatencySpec, timed_tables
from gate.spec import AxisRange, EngineSpec, GateSpec, InputSpec

_HARDWARE = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
_DEFAULT_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a build resolved, and its command line depends on.

    Args:
        major: Major version of TensorRT; 11 for RTX 1, whose API and tool are of that kind.
        typed: Whether the network is strongly typed.
        flags: Precision flags of one that is not: `FP16`, `INT8`.
        tf32: Whether TF32 is allowed.
        tactic_sources: Those in use, where they are not the version's own default.
        all_tactic_sources: Those that the version has.
        plugins: How each plugin library is loaded, by its name: `static` or `dynamic`.
        constraints: Precision by name of each layer that is constrained.
    """

    major: int
    typed: bool
    flags: Sequence[str] = ()
    tf32: bool = False
    tactic_sources: Sequence[str] | None = None
    all_tactic_sources: Sequence[str] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)
    constraints: Mapping[str, str] = field(default_factory=dict)


def shapes_of(each: InputSpec, ranges: Mapping[str, AxisRange] | None) -> dict[str, tuple[int, ...]]:
    """The `min`, `opt` and `max` shape of an input in an optimization profile.

    Args:
        each: The input.
        ranges: The profile's own range of each dynamic axis; None takes the input's.
    """
    chosen = each.axes if ranges is None else ranges
    return {
        which: tuple(size if isinstance(size, int) else getattr(chosen[size], which) for size in each.shape)
        for which in ("min", "opt", "max")
    }


def build_command(name: str, onnx: Path, out: Path, *, spec: GateSpec, engine: EngineSpec, facts: Facts) -> str | None:
    """The same build by the vendor's tool; file names without folders, which differ between machines.

    trtexec reads a calibration cache in TensorRT's own form, which is the gate's without its first line.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.
        onnx: The graph.
        out: The plan.
        facts: What the build resolved.

    Returns:
        None where the tool of that version cannot do it: several profiles before TensorRT 10.
    """
    options = engine.options
    parts = [_tool(name), f"--onnx={onnx.name}", f"--saveEngine={out.name}", "--skipInference"]
    dynamic = {key: each for key, each in spec.inputs.items() if each.axes}
    profiles: Sequence[Mapping[str, AxisRange] | None] = options.profiles or (None,)
    if len(profiles) > 1 and facts.major < 10:
        return None
    for index, ranges in enumerate(profiles if dynamic else ()):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        for which in ("min", "opt", "max"):
            shapes = {key: shapes_of(each, ranges)[which] for key, each in dynamic.items()}
            parts.append(f"--{which}Shapes={_shapes(shapes)}")
    before = ""
    if name == "tensorrt":
        if not facts.typed:
            parts += [f"--{flag.lower()}" for flag in facts.flags]
        elif facts.major < 11:
            parts.append("--stronglyTyped")
        if facts.constraints:
            pairs = ",".join(f"{layer}:{precision}" for layer, precision in facts.constraints.items())
            parts += [f"--layerPrecisions={pairs}", f"--layerOutputTypes={pairs}", "--precisionConstraints=obey"]
        if options.calibration_cache is not None and "INT8" in facts.flags:
            cache = Path(options.calibration_cache).name
            before = f"tail -n +2 {shlex.quote(cache)} > {shlex.quote(cache + '.raw')} && "
            parts.append(f"--calib={cache}.raw")
        if not facts.tf32:
            parts.append("--noTF32")
        parts.append("--profilingVerbosity=detailed")
    if options.workspace_mib is not None:
        parts.append(f"--memPoolSize=workspace:{options.workspace_mib}")
    if options.builder_optimization_level is not None:
        parts.append(f"--builderOptimizationLevel={options.builder_optimization_level}")
    if options.timing_cache is not None:
        parts.append(f"--timingCacheFile={Path(options.timing_cache).name}")
    if facts.tactic_sources is not None:
        signed = [f"{'+' if each in facts.tactic_sources else '-'}{each}" for each in facts.all_tactic_sources]
        parts.append(f"--tacticSources={','.join(signed)}")
    parts += _plugins(facts.plugins)
    if options.version_compatible:
        parts.append("--versionCompatible")
    if options.hardware_compatible is not None:
        parts.append(f"--hardwareCompatibilityLevel={_HARDWARE[options.hardware_compatible]}")
    if options.strip_weights:
        parts.append("--stripWeights")
    return before + shlex.join(parts)


def run_command(plan: Path, *, spec: GateSpec, engine: EngineSpec, record: BuildRecord) -> str | None:
    """The same measurement of latency by the vendor's tool, on a plan that exists.

    The tool queues the next inference before the last one is done, so its host latency is of a busy GPU; its GPU
    compute time is between two events around the engine, as the gate's `gpu_compute`. It makes up its inputs.

    Args:
        plan: The plan.
        spec: Its inputs and their ranges.
        engine: Its latency table, or the defaults of one, and its options.
        record: Of the plan's build.

    Returns:
        None where the tool cannot: no profile holds the shapes, or it cannot choose that profile, before TensorRT 10.
    """
    name, major = record.backend, major_of(record.backend, record.backend_version)
    tables = timed_tables(engine.latency)
    latency = tables[0].spec if tables else LatencySpec()
    cell = tables[0].cells[0] if tables else Cell(batch=1)
    shapes = {
        key: tuple(cell.batch if axis == 0 else size for axis, size in enumerate(each.sized("opt")))
        for key, each in spec.inputs.items()
        if each.axes
    }
    index = next(
        (index for index, ranges in enumerate(engine.options.profiles or (None,)) if _holds(spec, ranges, shapes)), None
    )
    if index is None or (index and major < 10):
        return None
    parts = [_tool(name), f"--loadEngine={plan.name}"]
    if shapes:
        parts.append(f"--shapes={_shapes(shapes)}")
    if index:
        parts.append(f"--useProfile={index}")
    parts += [
        f"--iterations={latency.samples or _DEFAULT_ITERATIONS}",
        "--duration=0",
        f"--warmUp={round(latency.warm_up_s * 1000)}",
        "--percentile=50,90,95,99",
        "--noDataTransfers" if latency.timed == "gpu_compute" else "--exposeDMA",
    ]
    if engine.options.cuda_graph:
        parts.append("--useCudaGraph")
    parts += _plugins(record.options.get("plugins") or {})
    return shlex.join(parts)


def major_of(name: str, version: str) -> int:
    """The major version of TensorRT that a module is like: RTX 1 is like 11.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.
        version: Such as `8.6.0`.
    """
    return 11 if name == "tensorrt_rtx" else int(version.partition(".")[0])


def _tool(name: str) -> str:
    return "tensorrt_rtx" if name == "tensorrt_rtx" else "trtexec"


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ",".join(f"{key}:{'x'.join(map(str, shape))}" for key, shape in shapes.items())


def _plugins(plugins: Mapping[str, str]) -> list[str]:
    return [f"--{how}Plugins={name}" for name, how in plugins.items()]


def _holds(spec: GateSpec, ranges: Mapping[str, AxisRange] | None, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    for key, shape in shapes.items():
        allowed = shapes_of(spec.inputs[key], ranges)
        bounds = zip(allowed["min"], shape, allowed["max"], strict=True)
        if not all(low <= size <= high for low, size, high in bounds):
            return False
    return True
