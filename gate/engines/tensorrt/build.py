"""From an ONNX file to a plan."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gate import atomic
from gate.engines.feed import profile_of, require_inputs
from gate.engines.interface import BuildRecord, Layer, Resources
from gate.engines.tensorrt import api
from gate.engines.tensorrt.command import build_command
from gate.engines.tensorrt.layers import layers_of_inspector, layers_of_network
from gate.engines.tensorrt.log import Log
from gate.errors import BuildError, RunError
from gate.spec import EngineSpec, GateSpec
from gate.tensors import TensorMeta

_LOWERED_FLAGS = {"fp16": ("FP16",), "bf16": ("BF16",), "int8": ("INT8", "FP16")}
"""Builder flags of a weakly typed network. INT8 has FP16 beside it: without it a fused layer may have no kernel."""


def build_plan(
    name: str,
    *,
    onnx: Path,
    out: Path,
    spec: GateSpec,
    engine: EngineSpec,
    resources: Resources,  # noqa: ARG001 - for calibrators and progress
    runs_here: bool,
) -> BuildRecord:
    """Parse the graph, list its typed layers, compile it, and write the plan.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.
        onnx: The graph.
        out: The plan.
        resources: What a build may use beside the graph.
        runs_here: Whether the plan can be deserialised here, to ask its inspector.

    Raises:
        BuildError: The parser or the compiler refused it; carries the log and the node.
        BackendUnavailable: It is not installed.
    """
    version = api.version(name)
    trt = api.module(name)
    started = time.perf_counter()
    log = Log()
    logger = log.logger(trt)
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    builder = _required(trt.Builder(logger), "cannot be started", log, name)
    typed = api.is_strongly_typed(trt)
    network = _required(builder.create_network(_network_flags(trt, version, typed)), "has no network", log, name)
    _parse(name, trt.OnnxParser(network, logger), onnx, log)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, spec, str(onnx)))
    _configure(trt, config, version=version, engine=engine, typed=typed, name=name)
    tf32 = engine.precision == "tf32"
    layers = layers_of_network(network, tf32=tf32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{name} {version} cannot compile the graph", where=str(onnx), log=log.last(), node=log.node())
    data = bytes(plan)
    atomic.write_bytes(out, data)
    source = "network"
    if not typed and runs_here:
        layers, source = _inspected(trt, logger, data, tf32=tf32) or layers, "inspector"
    return BuildRecord(
        backend=name,
        backend_version=version,
        precision=engine.precision,
        options={
            "tf32": tf32,
            "strongly_typed": typed,
            "workspace_mib": engine.options.workspace_mib,
            "builder_optimization_level": engine.options.builder_optimization_level,
        },
        profile=profile_of(spec),
        layers=layers,
        layers_source=source,
        log=log.complaints(),
        command=build_command(
            name, onnx, out, spec=spec, engine=engine, typed=typed, flags=_LOWERED_FLAGS.get(engine.precision, ())
        ),
        seconds=time.perf_counter() - started,
    )


def _parse(name: str, parser: Any, onnx: Path, log: Log) -> None:
    if not onnx.is_file():
        raise BuildError("there is no such file", where=str(onnx))
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        raise BuildError(f"{name} cannot parse it", where=str(onnx), log=log.last())
    first = errors[0]
    operator = first.node_operator() if hasattr(first, "node_operator") else ""
    named = first.node_name() if hasattr(first, "node_name") else f"node {first.node()}"
    node = f"{named} ({operator})" if operator else named
    raise BuildError(
        f"{name} cannot parse the graph: {' '.join(first.desc().split())}",
        where=str(onnx),
        log=log.last(),
        node=node.strip() or None,
    )


def _inspected(trt: Any, logger: Any, plan: bytes, *, tf32: bool) -> tuple[Layer, ...]:
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return ()
    inspector = engine.create_engine_inspector()
    return layers_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), tf32=tf32)


def _required(value: Any, what: str, log: Log, name: str) -> Any:
    if value is None:
        raise BuildError(f"{name} {what}", log=log.last())
    return value


def _network_flags(trt: Any, version: str, typed: bool) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    if typed:
        return 1 << int(flags.STRONGLY_TYPED)
    if hasattr(flags, "EXPLICIT_BATCH") and version.startswith(("7.", "8.")):
        return 1 << int(flags.EXPLICIT_BATCH)
    return 0


def _profile(builder: Any, network: Any, spec: GateSpec, where: str) -> Any:
    """The spec's ranges as an optimization profile.

    Raises:
        BuildError: The network's inputs are not the spec's.
    """
    inputs: dict[str, TensorMeta] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise BuildError(
                f"input {tensor.name!r} is a shape tensor: its values decide shapes, and a profile needs their range",
                where=where,
                hint="Export the model with that value as a constant.",
            )
        shape = tuple(None if size < 0 else size for size in tensor.shape)
        inputs[tensor.name] = TensorMeta(tensor.name, api.dtype(tensor.dtype.name), shape)
    try:
        require_inputs(inputs, spec=spec, cast_io=True, where=where)
    except RunError as err:
        raise BuildError(err.message, where=where, hint=err.hint) from err
    profile = builder.create_optimization_profile()
    for name in inputs:
        each = spec.inputs[name]
        profile.set_shape(name, each.sized("min"), each.sized("opt"), each.sized("max"))
    return profile


def _configure(trt: Any, config: Any, *, version: str, engine: EngineSpec, typed: bool, name: str) -> None:
    flags = trt.BuilderFlag
    if engine.precision == "tf32":
        config.set_flag(flags.TF32)
    else:
        config.clear_flag(flags.TF32)
    if not typed:
        for flag in _LOWERED_FLAGS.get(engine.precision, ()):
            if not hasattr(flags, flag):
                raise BuildError(f"{name} {version} cannot build {engine.precision}: it has no {flag} flag")
            config.set_flag(getattr(flags, flag))
    if engine.options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, engine.options.workspace_mib << 20)
    if engine.options.builder_optimization_level is not None:
        config.builder_optimization_level = engine.options.builder_optimization_level
    if name == "tensorrt":
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if version.startswith("8.") and hasattr(trt, "TacticSource"):
            # The plugin library of 8.6 asks for cuBLAS 12 and cuDNN 8, which few hosts have beside it.
            sources = config.get_tactic_sources()
            for source in ("CUBLAS", "CUBLAS_LT", "CUDNN"):
                if hasattr(trt.TacticSource, source):
                    sources &= ~(1 << int(getattr(trt.TacticSource, source)))
            config.set_tactic_sources(sources)
