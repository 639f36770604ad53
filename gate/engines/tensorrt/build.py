"""From an ONNX file to a plan."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import fnmatch
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate import atomic
from gate.engines.feed import profile_of, require_inputs
from gate.engines.interface import CALIBRATION_NAME, BuildRecord, CalibrationRecord, Layer, Resources
from gate.engines.tensorrt import api
from gate.engines.tensorrt.calibrate import (
    BatchShape,
    Cache,
    CacheKey,
    Feed,
    calibrator,
    ranges_of,
    read_cache,
    write_cache,
)
from gate.engines.tensorrt.command import Facts, build_command, shapes_of
from gate.engines.tensorrt.layers import layers_of_inspector, layers_of_network
from gate.engines.tensorrt.log import Interruption, Log, progress_monitor
from gate.engines.tensorrt.memory import memory
from gate.errors import BuildError, BundleError, RunError
from gate.manifest import sha256_hex
from gate.spec import AxisRange, EngineSpec, GateSpec
from gate.tensors import TensorMeta

if TYPE_CHECKING:
    import tensorrt

_FLOATS = ("FLOAT", "HALF", "BF16")
_QUANTIZING = ("QUANTIZE", "DEQUANTIZE")
_MAJOR_WITH_CUDNN = 8
_CUDNN = "libcudnn_ops_infer.so.8"
_TIMING_LIMIT_BYTES = 1024 * 1024 * 1024
_NEAR = 3
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A build that is under way: what it is asked for, and where what TensorRT tells goes."""

    name: str
    version: str
    trt: Any
    spec: GateSpec
    engine: EngineSpec
    resources: Resources
    where: str
    log: Log
    interruption: Interruption

    @property
    def weak(self) -> bool:
        return self.engine.options.typing == "weak"

    @property
    def typed(self) -> bool:
        """Strong typing is the default of every version that has it."""
        return api.is_strongly_typed(self.trt) and not self.weak

    @property
    def tf32(self) -> bool:
        return self.engine.precision == "tf32" or self.engine.options.tf32 is True

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the precision flags that the builder needs."""
        return () if self.typed else api.builder_flags(self.engine)

    @property
    def profiles(self) -> tuple[Mapping[str, AxisRange] | None, ...]:
        return self.engine.options.profiles or (None,)

    def failed(self, message: str, *, node: str | None = None, hint: str | None = None) -> BuildError:
        return BuildError(message, where=self.where, hint=hint, log=self.log.last(), node=node)

    def required(self, value: Any, what: str) -> Any:
        if value is None:
            raise self.failed(f"{self.name} {what}")
        return value


def build_plan(
    name: str,
    *,
    onnx: Path,
    out: Path,
    spec: GateSpec,
    engine: EngineSpec,
    resources: Resources,
    runs_here: bool,
) -> BuildRecord:
    """Parse the graph, list its layers, compile it, and write the plan and the caches that were asked for.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.
        onnx: The graph: in the engine's precision, or in FP32 for weak typing.
        out: The plan.
        resources: What a build may use beside the graph.
        runs_here: Whether the plan can be deserialised here, to ask its inspector.

    Raises:
        BuildError: The parser or the compiler refused it, a plugin library or calibration cannot be used, or a layer
            that is to be constrained does not exist; carries the log and the node.
        BackendUnavailable: It is not installed.
    """
    version = api.version(name)
    trt = api.module(name)
    started = time.perf_counter()
    job = _Job(
        name=name,
        version=version,
        trt=trt,
        spec=spec,
        engine=engine,
        resources=resources,
        where=str(onnx),
        log=Log(),
        interruption=Interruption(),
    )
    logger = job.log.logger(trt)
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    plugins = api.load_plugins(trt, engine.options.plugins or (), job.log)
    _require_class_agnostic(job)
    builder = _builder(job, logger)
    network: tensorrt.INetworkDefinition = job.required(
        builder.create_network(api.network_flags(trt, typed=job.typed)), "has no network"
    )
    _parse(job, trt.OnnxParser(network, logger), onnx)
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    inputs = _inputs(job, network)
    with warnings.catch_warnings():
        # The API of weak typing is deprecated since 10.12; whoever asks for it knows.
        warnings.simplefilter("ignore", DeprecationWarning)
        options = _configure(job, builder, config)
        sources, are_own = _set_tactic_sources(job, config)
        timings = _read_timing_cache(job, config)
        constraints = _constrain(job, network)
        feed = _calibration(job, builder, network, config, inputs)
        keep = calibrator(trt, engine.options.calibrator or "entropy", feed) if feed is not None else None
        if keep is not None:
            config.int8_calibrator = keep
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = progress_monitor(trt, resources.progress, job.interruption)
        layers = layers_of_network(network, tf32=job.tf32)
        try:
            data = _compile(job, builder, network, config)
            calibration = _calibrated(job, feed) if feed is not None else None
        finally:
            if feed is not None:
                feed.close()
        atomic.write_bytes(out, data)
        if calibration is not None and (owner := _owner(job)) is not None:
            write_cache(out.with_name(CALIBRATION_NAME), owner, calibration[0])
        digests = {each.name: each.sha256 for each in plugins} | _write_timing_cache(job, timings)
    if calibration is not None:
        digests["calibration_cache"] = sha256_hex(calibration[0].payload)
    source = "network"
    if runs_here and name == "tensorrt":
        inspected = _inspected(job, logger, data)
        layers, source = (inspected, "inspector") if inspected else (layers, source)
    loaded = {each.name: "static" if each.is_static else "dynamic" for each in plugins}
    facts = Facts(
        major=api.major(trt),
        typed=job.typed,
        flags=job.flags,
        tf32=job.tf32,
        tactic_sources=None if are_own else [each.upper() for each in sources],
        all_tactic_sources=api.tactic_source_names(trt) if hasattr(trt, "TacticSource") else (),
        plugins=loaded,
        constraints=constraints,
    )
    return BuildRecord(
        backend=name,
        backend_version=version,
        precision=engine.precision,
        options={
            **options,
            "tactic_sources": sources,
            "plugins": loaded,
            "layer_precisions": dict(engine.options.layer_precisions or {}),
            "constrained_layers": len(constraints),
            "calibrator": (engine.options.calibrator or "entropy") if feed is not None else None,
            "calibration_cache": _file_name(engine.options.calibration_cache),
            "timing_cache": _file_name(engine.options.timing_cache),
            "cuda_graph": bool(engine.options.cuda_graph),
        },
        profile=profile_of(spec),
        layers=layers,
        layers_source=source,
        log=job.log.complaints(),
        command=build_command(name, onnx, out, spec=spec, engine=engine, facts=facts),
        seconds=time.perf_counter() - started,
        digests=digests,
        calibration=calibration[1] if calibration is not None else None,
    )


def _require_class_agnostic(job: _Job) -> None:
    """Refuse suppression over all classes where the plugin suppresses within each class alone and does not say so.

    Raises:
        BuildError: The plugin of this version does not know `class_agnostic`.
    """
    asked = job.spec.postprocess
    if job.engine.nms != "efficient_nms" or asked is None or not asked.class_agnostic:
        return
    known = api.plugin_attributes(job.trt, "EfficientNMS_TRT")
    if known is not None and "class_agnostic" not in known:
        raise BuildError(
            f"EfficientNMS_TRT of {job.name} {job.version} does not know class_agnostic and would ignore it",
            where=job.where,
            hint='nms = "onnx" puts the same suppression into the graph, as NonMaxSuppression.',
        )


def _builder(job: _Job, logger: Any) -> tensorrt.Builder:
    """The builder.

    Raises:
        BuildError: It cannot be started: 8.6.0 raises TypeError then, where CUDA cannot be initialised for one.
    """
    try:
        builder: tensorrt.Builder | None = job.trt.Builder(logger)
    except (TypeError, RuntimeError) as err:
        raise job.failed(f"{job.name} {job.version} cannot be started: {err}") from err
    if builder is None:
        raise job.failed(f"{job.name} {job.version} cannot be started")
    return builder


def _parse(job: _Job, parser: tensorrt.OnnxParser, onnx: Path) -> None:
    """Parse the file.

    Raises:
        BuildError: With the first error as its message, and a line per error with node and operator before the log.
    """
    if not onnx.is_file():
        raise BuildError("there is no such file", where=job.where)
    if parser.parse_from_file(str(onnx)):
        return
    told: list[tuple[str, str | None]] = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        told.append((" ".join(error.desc().split()), _node(error, onnx)))
    if not told:
        raise job.failed(f"{job.name} cannot parse it")
    message, node = told[0]
    others = len(told) - 1
    more = f" (and {others} more error{'s' if others > 1 else ''}, below)" if others else ""
    lines = tuple(f"{where or 'graph'}: {what}" for what, where in told[1:])
    raise BuildError(
        f"{job.name} cannot parse the graph: {message}{more}",
        where=job.where,
        log=(*lines, *job.log.last()),
        node=node,
    )


def _node(error: tensorrt.ParserError, onnx: Path) -> str | None:
    """The node that a parser error is about, as `name (operator)`; None where it does not say."""
    name, operator, index = api.node_of(error)
    if not name and not operator and index >= 0:
        with contextlib.suppress(Exception):
            import onnx as library

            node = library.load(str(onnx), load_external_data=False).graph.node[index]
            name, operator = node.name, node.op_type
    name = name or (f"node {index}" if index >= 0 else "")
    return (f"{name} ({operator})" if operator else name).strip() or None


def _inputs(job: _Job, network: tensorrt.INetworkDefinition) -> dict[str, TensorMeta]:
    """The network's inputs, held against the spec's.

    Raises:
        BuildError: They are not the spec's.
    """
    inputs: dict[str, TensorMeta] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise BuildError(
                f"input {tensor.name!r} is a shape tensor: its values decide shapes, and a profile needs their range",
                where=job.where,
                hint="Export the model with that value as a constant.",
            )
        sizes: Any = tensor.shape  # Dims are a tuple, which the stubs do not say
        shape = tuple(None if size < 0 else size for size in sizes)
        inputs[tensor.name] = TensorMeta(tensor.name, api.dtype(tensor.dtype.name), shape)
    try:
        require_inputs(inputs, spec=job.spec, cast_io=True, where=job.where)
    except RunError as err:
        raise BuildError(err.message, where=job.where, hint=err.hint) from err
    return inputs


def _configure(job: _Job, builder: tensorrt.Builder, config: tensorrt.IBuilderConfig) -> dict[str, Any]:
    """Set profiles, flags and levels; the options as the build has them.

    Raises:
        BuildError: The version does not have a flag, or refuses a setting.
    """
    trt, asked = job.trt, job.engine.options
    profiles: list[dict[str, dict[str, list[int]]]] = []
    for ranges in job.profiles:
        profile: Any = builder.create_optimization_profile()  # takes tuples, which the stubs do not say
        shapes = {name: shapes_of(each, ranges) for name, each in job.spec.inputs.items()}
        for name, each in shapes.items():
            profile.set_shape(name, each["min"], each["opt"], each["max"])
        if config.add_optimization_profile(profile) < 0:
            raise job.failed(f"{job.name} refuses optimization profile {len(profiles)}: {shapes}")
        profiles.append({name: {key: list(shape) for key, shape in each.items()} for name, each in shapes.items()})
    wanted = list(job.flags)
    if asked.version_compatible:
        # With the lean runtime in the plan, which is the default and makes it one file that later versions can run.
        # Source: docs.nvidia.com, "Version Compatibility": EXCLUDE_LEAN_RUNTIME needs the runtime as another file.
        wanted.append("VERSION_COMPATIBLE")
    if asked.strip_weights:
        wanted.append("STRIP_PLAN")
    if asked.layer_precisions:
        wanted.append("OBEY_PRECISION_CONSTRAINTS")
    for flag in wanted:
        config.set_flag(_flag(job, flag))
    if job.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if asked.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, asked.workspace_mib * _MIB)
    if asked.builder_optimization_level is not None:
        config.builder_optimization_level = asked.builder_optimization_level
    if asked.hardware_compatible is not None:
        level = getattr(trt.HardwareCompatibilityLevel, api.HARDWARE_LEVELS[asked.hardware_compatible], None)
        if level is None:
            raise BuildError(f"{job.name} {job.version} has no hardware_compatible = {asked.hardware_compatible!r}")
        config.hardware_compatibility_level = level
    if job.name == "tensorrt":
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return {
        "typing": "strong" if job.typed else "weak" if job.weak else "lowered",
        "strongly_typed": job.typed,
        "builder_flags": wanted,
        "tf32": job.tf32,
        "profiles": profiles,
        "workspace_mib": int(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)) // _MIB,
        "builder_optimization_level": getattr(config, "builder_optimization_level", None),
        "version_compatible": bool(asked.version_compatible),
        "hardware_compatible": asked.hardware_compatible or "none",
        "strip_weights": bool(asked.strip_weights),
    }


def _flag(job: _Job, name: str) -> tensorrt.BuilderFlag:
    flag: tensorrt.BuilderFlag | None = getattr(job.trt.BuilderFlag, name, None)
    if flag is None:
        raise BuildError(f"{job.name} {job.version} cannot build this: it has no builder flag {name}", where=job.where)
    return flag


def _set_tactic_sources(job: _Job, config: tensorrt.IBuilderConfig) -> tuple[list[str], bool]:
    """Set the tactic sources; those in use, and whether they are the version's own."""
    trt, asked = job.trt, job.engine.options.tactic_sources
    if not hasattr(trt, "TacticSource"):
        return [], True
    own = int(config.get_tactic_sources())
    if asked is None:
        bits = api.default_tactic_sources(trt, config)
    else:
        names = api.tactic_source_names(trt)
        missing = [each for each in asked if each.upper() not in names]
        if missing:
            raise BuildError(f"{job.name} {job.version} has no tactic source {', '.join(missing)}", where=job.where)
        bits = sum(1 << int(getattr(trt.TacticSource, each.upper())) for each in set(asked))
    if bits != own and config.set_tactic_sources(bits) is False:
        raise job.failed(f"{job.name} refuses these tactic sources")
    used = [each.lower() for each in api.tactic_source_names(trt) if bits & (1 << int(getattr(trt.TacticSource, each)))]
    return used, bits == own


def _read_timing_cache(job: _Job, config: tensorrt.IBuilderConfig) -> Any:
    """Start from the timings in the file, where it exists and the builder takes it; else from none, and say so.

    The builder answers what it cannot read with an empty cache and a warning (8.6.0, RTX 1.7), or with None.

    Returns:
        The cache, which the config refers to and does not own: keep it until the build is over. None where no file is
        named.

    Raises:
        BuildError: The file cannot be read, or this version cannot write one here.
    """
    if job.engine.options.timing_cache is None:
        return None
    path = Path(job.engine.options.timing_cache)
    try:
        data = atomic.read_regular(path, limit_bytes=_TIMING_LIMIT_BYTES) if path.exists() else b""
    except BundleError as err:
        raise BuildError(f"the timing cache {err.message}", where=str(path)) from err
    _require_cudnn_for_timings(job)
    before = job.log.count
    cache: Any = config.create_timing_cache(data)
    refused = cache is None or (bool(data) and job.log.count > before)
    if not refused and not config.set_timing_cache(cache, False):
        refused = True
    if refused:
        job.log.note(f"timing cache {path.name} is not usable by {job.name} {job.version} here; it is replaced")
        cache = job.required(config.create_timing_cache(b""), "has no timing cache")
        config.set_timing_cache(cache, False)
    return cache


def _require_cudnn_for_timings(job: _Job) -> None:
    """Refuse what would end the process: TensorRT 8 asks cuDNN's version for its timing cache, and aborts without it.

    Source: TensorRT 8.6.0 on an H200, `ITimingCache.serialize`: "Could not load library libcudnn_ops_infer.so.8", SIGABRT.

    Raises:
        BuildError: cuDNN is not here.
    """
    if job.name != "tensorrt" or api.major(job.trt) != _MAJOR_WITH_CUDNN:
        return
    try:
        ctypes.CDLL(_CUDNN)
    except OSError as err:
        raise BuildError(
            f"{job.name} {job.version} writes a timing cache with cuDNN 8, which is not here ({err})",
            where=job.engine.options.timing_cache,
            hint="pip install nvidia-cudnn-cu12==8.9.7.29, with its lib folder on LD_LIBRARY_PATH; or leave timing_cache out.",
        ) from err


def _write_timing_cache(job: _Job, cache: Any) -> dict[str, str]:
    """Write the timings of this build with those from before; their digest, which makes the same build again."""
    if job.engine.options.timing_cache is None:
        return {}
    data = bytes(job.required(cache.serialize(), "cannot write its timing cache"))
    atomic.write_bytes(Path(job.engine.options.timing_cache), data)
    return {"timing_cache": sha256_hex(data)}


def _constrain(job: _Job, network: tensorrt.INetworkDefinition) -> dict[str, str]:
    """Set the precision of layers by pattern, a later pattern over an earlier one; what each such layer got.

    Raises:
        BuildError: A pattern matches no layer that computes in floating point.
    """
    asked = job.engine.options.layer_precisions
    if not asked:
        return {}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    able = [layer for layer in layers if _can_be_constrained(layer)]
    chosen: dict[str, str] = {}
    for pattern, precision in asked.items():
        matched = [layer.name for layer in able if fnmatch.fnmatchcase(layer.name, pattern)]
        if not matched:
            plain = pattern.replace("*", "").replace("?", "")
            names = [layer.name for layer in able]
            near = difflib.get_close_matches(plain, names, n=_NEAR, cutoff=0.3) or names[:_NEAR]
            raise BuildError(
                f"layer_precisions {pattern!r} matches no layer that computes in floating point",
                where=job.where,
                hint=f"Near: {', '.join(near)}." if near else "The network has no such layer.",
            )
        chosen |= dict.fromkeys(matched, precision)
    for layer in able:
        if layer.name not in chosen:
            continue
        kind = api.data_type(job.trt, chosen[layer.name])
        layer.precision = kind
        for index in range(layer.num_outputs):
            output = layer.get_output(index)
            # What the engine gives is typed by its interface, not by the layer.
            if output.dtype.name in _FLOATS and not output.is_network_output:
                layer.set_output_type(index, kind)
    return chosen


def _can_be_constrained(layer: tensorrt.ILayer) -> bool:
    """Whether a layer computes in floating point, on values rather than shapes.

    Source: setLayerPrecisions in samples/common/sampleEngines.cpp leaves out constants, shapes and integers.
    """
    if layer.type.name in ("CONSTANT", "SHAPE", *_QUANTIZING) or not layer.num_outputs:
        return False
    fed: list[Any] = [layer.get_input(index) for index in range(layer.num_inputs)]  # None where it is left out
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    if any(each is not None and each.is_shape_tensor for each in (*fed, *outputs)):
        return False
    return any(each.dtype.name in _FLOATS for each in outputs)


def _calibration(
    job: _Job,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    inputs: Mapping[str, TensorMeta],
) -> Feed | None:
    """The samples of a weakly typed int8 engine, checked; None where none are needed.

    Raises:
        BuildError: There are none, they do not fit, or the calibration cache belongs to something else.
    """
    if not job.weak or job.engine.precision != "int8":
        return None
    kinds = {network.get_layer(index).type.name for index in range(network.num_layers)}
    if job.engine.brings_scales:
        if not kinds.intersection(_QUANTIZING):
            raise BuildError(
                "the engine's own graph carries no Q/DQ, so its int8 ranges are not known",
                where=job.where,
                hint="Leave onnx out, so that the gate calibrates its own export, or quantise the graph.",
            )
        return None
    resources = job.resources
    if resources.calibration is None or resources.calibration_sha256 is None:
        raise BuildError("int8 in weak typing needs calibration samples, and there are none", where=job.where)
    key = _cache_key(job)
    path = job.engine.options.calibration_cache
    cache = read_cache(Path(path), key) if path is not None and key is not None else None
    shapes = {name: shapes_of(each, job.profiles[0])["opt"] for name, each in job.spec.inputs.items()}
    profile: Any = builder.create_optimization_profile()  # takes tuples, which the stubs do not say
    for name, shape in shapes.items():
        profile.set_shape(name, shape, shape, shape)
    # The calibrator runs at the opt shape of this profile.
    if config.set_calibration_profile(profile) is False:
        raise job.failed(f"{job.name} refuses the calibration profile {shapes}")
    return Feed(
        resources.calibration,
        inputs={name: BatchShape(meta.dtype, shapes[name]) for name, meta in inputs.items()},
        cache=cache,
        memory=memory,
        progress=resources.progress,
        interruption=job.interruption,
    )


def _cache_key(job: _Job) -> CacheKey | None:
    """What a calibration cache of this build belongs to; None where none is asked for.

    Raises:
        BuildError: The graph's digest is not known, so a cache could not be held against it.
    """
    if job.engine.options.calibration_cache is None:
        return None
    if (owner := _owner(job)) is None:
        raise BuildError("a calibration cache needs the digests of the graph and the samples", where=job.where)
    return owner


def _owner(job: _Job) -> CacheKey | None:
    """What the ranges of this build belong to; None where the graph's digest or the samples' is not known."""
    if job.resources.onnx_sha256 is None or job.resources.calibration_sha256 is None:
        return None
    return CacheKey(
        model_sha256=job.resources.onnx_sha256,
        calibration_sha256=job.resources.calibration_sha256,
        tensorrt_version=job.version,
        method=job.engine.options.calibrator or "entropy",
    )


def _calibrated(job: _Job, feed: Feed) -> tuple[Cache, CalibrationRecord]:
    """What the calibrator found, written to its cache where one is asked for.

    Raises:
        BuildError: It found nothing.
    """
    cache = feed.result()
    path, key = job.engine.options.calibration_cache, _cache_key(job)
    notes: list[str] = []
    if feed.served:
        if feed.dropped:
            notes.append(
                f"{feed.dropped} of {cache.samples + feed.dropped} calibration samples were left out: they do not fill "
                f"a batch of {feed.size}, the profile's opt"
            )
        if path is not None and key is not None:
            write_cache(Path(path), key, cache)
    else:
        notes.append(f"ranges were read from {_file_name(path)}")
    record = CalibrationRecord(
        tool=f"{job.name} {job.version}",
        method=job.engine.options.calibrator or "entropy",
        samples=cache.samples,
        sha256=job.resources.calibration_sha256 or "",
        ranges=ranges_of(cache.payload),
        notes=tuple(notes),
    )
    return cache, record


def _compile(
    job: _Job, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig
) -> bytes:
    """The plan.

    Raises:
        BuildError: The compiler refused the graph.
        BaseException: What stopped it: Ctrl-C, or what Python code that it called has raised.
    """
    with job.interruption.noting_ctrl_c():
        plan: Any = builder.build_serialized_network(network, config)
    job.interruption.raise_cause()
    if plan is None:
        raise job.failed(
            f"{job.name} {job.version} cannot compile the graph", node=job.log.node(), hint=_compile_hint(job)
        )
    return bytes(plan)


def _compile_hint(job: _Job) -> str | None:
    """What to do about a refusal whose cause is known by its log. Source: tensorrt_rtx 1.7 without a GPU."""
    told = " ".join(job.log.last())
    if "nvinfer_lean" in told:
        return (
            f"version_compatible puts the lean runtime into the plan: pip install tensorrt-lean=={job.version} "
            "(tensorrt_lean on 8.6), and let the linker find its library."
        )
    if job.engine.options.strip_weights and "CUDA_SUCCESS" in told:
        return f"{job.name} strips weights only where there is a GPU: leave strip_weights out, or build on a GPU host."
    return None


def _inspected(job: _Job, logger: Any, plan: bytes) -> tuple[Layer, ...]:
    """The layers of the plan as its inspector lists them; none where it cannot say what any of them computes in."""
    runtime = job.trt.Runtime(logger)
    if job.engine.options.version_compatible:
        # The plan carries code, the lean runtime; it was made here a moment ago.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return ()
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(job.trt.LayerInformationFormat.JSON)
    layers = layers_of_inspector(text, tf32=job.tf32)
    return layers if any(layer.precision != "unknown" for layer in layers) else ()


def _file_name(path: str | None) -> str | None:
    return Path(path).name if path is not None else None
