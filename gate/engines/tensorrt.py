"""TensorRT and TensorRT-RTX: build a plan from an ONNX file, and run it on a GPU.

One class for both modules; what their versions 8.6, 10, 11 and RTX 1 do not share is probed with `hasattr`.
TensorRT-RTX compiles on a machine without a GPU. TensorRT builds on the GPU that it will run on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from gate import atomic
from gate.device import Gpu, gpu
from gate.engines.feed import profile_of, require_feed, require_inputs
from gate.engines.interface import BuildRecord, Layer
from gate.errors import BackendUnavailable, BuildError, IncompatibleEngine, RunError
from gate.spec import EngineSpec, GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.verdict import Evidence

_DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
_EXTRA = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
_RTX_CAPABILITIES = ("8.0", "8.6", "8.9")
"""With 12.x, what TensorRT-RTX 1.7 runs on; it refuses others, 9.0 for one, when it deserialises."""

_LOG_LINES = 12
_LABELS = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "fp8",
    "INT4": "int4",
    "FP4": "fp4",
}
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_LOWERED_FLAGS = {"fp16": ("FP16",), "bf16": ("BF16",), "int8": ("INT8", "FP16")}
"""Builder flags of a weakly typed network. INT8 has FP16 beside it: without it a fused layer may have no kernel."""

_MULTIPLYING = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "FULLY_CONNECTED")


class TensorRTBackend:
    """TensorRT (`tensorrt`) or TensorRT-RTX (`tensorrt_rtx`).

    Args:
        name: The name of the module, which is also the backend's name in the spec.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def version(self) -> str:
        """The installed version, by its metadata; an installation without metadata is imported.

        Raises:
            BackendUnavailable: It is not installed.
        """
        for distribution in _DISTRIBUTIONS[self.name]:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(distribution)
        return str(self._module().__version__)

    def runs_here(self) -> Evidence | None:
        """`device` where there is a GPU that this runtime runs on, else None. Asks the driver; imports nothing."""
        device = gpu()
        return Evidence.DEVICE if device is not None and self._refusal(device) is None else None

    def file_name(self) -> str:
        """`model.plan`."""
        return "model.plan"

    def build(self, *, onnx: Path, out: Path, spec: GateSpec, engine: EngineSpec) -> BuildRecord:
        """Parse the graph, list its typed layers, compile it with one profile, and write the plan.

        Raises:
            BuildError: The parser or the compiler refused it; carries the log and the node.
            BackendUnavailable: It is not installed, or needs a GPU to build and there is none.
        """
        version = self.version()
        trt = self._module()
        if self.name == "tensorrt" and gpu() is None:
            raise BackendUnavailable(
                "backend 'tensorrt' builds on the GPU that the engine runs on, and there is none here",
                hint='Compile here with backend = "tensorrt_rtx" and evidence = "preflight", or run on a GPU host.',
            )
        log = _Log()
        logger = log.logger(trt)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(logger, "")
        builder = _required(trt.Builder(logger), "cannot be started", log, self.name)
        typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        network = _required(
            builder.create_network(_network_flags(trt, version, typed)), "has no network", log, self.name
        )
        parser = trt.OnnxParser(network, logger)
        self._parse(parser, onnx, log)
        config = builder.create_builder_config()
        config.add_optimization_profile(_profile(builder, network, spec, str(onnx)))
        _configure(trt, config, version=version, engine=engine, typed=typed, name=self.name)
        layers = layers_of_network(network, tf32=engine.precision == "tf32")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(
                f"{self.name} {version} cannot compile the graph", where=str(onnx), log=log.last(), node=log.node()
            )
        data = bytes(plan)
        atomic.write_bytes(out, data)
        source = "network"
        if not typed and self.runs_here() is Evidence.DEVICE:
            layers, source = self._inspected(trt, logger, data, tf32=engine.precision == "tf32") or layers, "inspector"
        return BuildRecord(
            backend=self.name,
            backend_version=version,
            precision=engine.precision,
            options={
                "tf32": engine.precision == "tf32",
                "strongly_typed": typed,
                "workspace_mib": engine.options.workspace_mib,
                "builder_optimization_level": engine.options.builder_optimization_level,
            },
            profile=profile_of(spec),
            layers=layers,
            layers_source=source,
            log=log.complaints(),
            command=self._command(onnx, out, spec=spec, engine=engine, typed=typed),
        )

    def open(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> TensorRTRunner:
        """Deserialise a plan. A plan is executable: verify its digest first.

        Raises:
            BackendUnavailable: It is not installed, or no GPU here can run it; said before the plan is read.
            IncompatibleEngine: The runtime refuses the plan.
            RunError: Its inputs are not the spec's.
        """
        device = gpu()
        if device is None:
            raise BackendUnavailable(
                f"there is no NVIDIA GPU here, so {self.name} cannot run {path.name}",
                where=str(path),
                hint='Set evidence = "preflight" in this [[engine]] to compile only, or run on a GPU host.',
            )
        if (refusal := self._refusal(device)) is not None:
            raise BackendUnavailable(refusal, where=str(path))
        self.version()
        return TensorRTRunner(self._module(), path, spec=spec, cast_io=engine.cast_io)

    def _module(self) -> Any:
        try:
            return importlib.import_module(self.name)
        except ImportError as err:
            raise BackendUnavailable(
                f"backend {self.name!r} is not installed"
                if isinstance(err, ModuleNotFoundError) and err.name == self.name
                else f"backend {self.name!r} cannot be loaded: {err}",
                hint=f'pip install "trt-gate[{_EXTRA[self.name]}]"',
            ) from err

    def _refusal(self, device: Gpu) -> str | None:
        """Why this runtime does not run on a GPU; None where it does."""
        major, minor = (int(part) for part in device.compute_capability.split("."))
        if self.name == "tensorrt_rtx":
            if device.compute_capability in _RTX_CAPABILITIES or major == 12:
                return None
            supported = f"{', '.join(_RTX_CAPABILITIES)} and 12.x"
        else:
            try:
                family = int(self.version().partition(".")[0])
            except (BackendUnavailable, ValueError):
                return "backend 'tensorrt' is not installed"
            least, most = ((5, 0), (9, 0)) if family < 10 else ((7, 5), (99, 0))
            if least <= (major, minor) <= most:
                return None
            supported = f"{least[0]}.{least[1]} and above" if family >= 10 else "5.0 to 9.0"
        return (
            f"{self.name} runs on compute capability {supported}; here is {device.compute_capability} ({device.name})"
        )

    def _parse(self, parser: Any, onnx: Path, log: _Log) -> None:
        if not onnx.is_file():
            raise BuildError("there is no such file", where=str(onnx))
        if parser.parse_from_file(str(onnx)):
            return
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        if not errors:
            raise BuildError(f"{self.name} cannot parse it", where=str(onnx), log=log.last())
        first = errors[0]
        operator = first.node_operator() if hasattr(first, "node_operator") else ""
        name = first.node_name() if hasattr(first, "node_name") else f"node {first.node()}"
        node = f"{name} ({operator})" if operator else name
        raise BuildError(
            f"{self.name} cannot parse the graph: {' '.join(first.desc().split())}",
            where=str(onnx),
            log=log.last(),
            node=node.strip() or None,
        )

    def _inspected(self, trt: Any, logger: Any, plan: bytes, *, tf32: bool) -> tuple[Layer, ...]:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is None:
            return ()
        inspector = engine.create_engine_inspector()
        return layers_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), tf32=tf32)

    def _command(self, onnx: Path, out: Path, *, spec: GateSpec, engine: EngineSpec, typed: bool) -> str:
        """The same build by the vendor's tool; file names without folders, which differ between machines."""
        tool = "tensorrt_rtx" if self.name == "tensorrt_rtx" else "trtexec"
        parts = [tool, f"--onnx={onnx.name}", f"--saveEngine={out.name}"]
        dynamic = {name: each for name, each in spec.inputs.items() if each.axes}
        if dynamic:
            for which in ("min", "opt", "max"):
                shapes = ",".join(f"{name}:{'x'.join(map(str, each.sized(which)))}" for name, each in dynamic.items())
                parts.append(f"--{which}Shapes={shapes}")
        if self.name == "tensorrt":
            if typed:
                parts.append("--stronglyTyped")
            else:
                parts += [f"--{flag.lower()}" for flag in _LOWERED_FLAGS.get(engine.precision, ())]
            if engine.precision != "tf32":
                parts.append("--noTF32")
        if engine.options.workspace_mib is not None:
            parts.append(f"--memPoolSize=workspace:{engine.options.workspace_mib}")
        if engine.options.builder_optimization_level is not None:
            parts.append(f"--builderOptimizationLevel={engine.options.builder_optimization_level}")
        return shlex.join(parts)


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
        label = _label(layer.get_output(0).dtype.name) if layer.num_outputs else "unknown"
        if layer.type.name in _MULTIPLYING:
            # A convolution has its weights as an input only where they are not a constant of the layer itself.
            fed = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
            quantized = {_label(kinds.get(each.name, ("", ""))[1]) for each in fed if each is not None}
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


class _Log:
    """What a TensorRT logger was told."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, str]] = []

    def logger(self, trt: Any) -> Any:
        """A logger of that module which collects instead of printing."""
        messages = self._messages

        class Collecting(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                messages.append((getattr(severity, "name", str(severity)), message))

        return Collecting()

    def complaints(self) -> tuple[str, ...]:
        """Warnings and errors, each once."""
        told = (
            f"{severity}: {message}"
            for severity, message in self._messages
            if severity in ("WARNING", "ERROR", "INTERNAL_ERROR")
        )
        return tuple(dict.fromkeys(told))

    def last(self) -> tuple[str, ...]:
        """The last warnings and errors; the last messages of any kind where there are none."""
        complaints = self.complaints()
        return (complaints or tuple(message for _, message in self._messages))[-_LOG_LINES:]

    def node(self) -> str | None:
        """The layer that the last error names: `… for node /f/Conv`, `{ForeignNode[/f/Conv]}`."""
        for severity, message in reversed(self._messages):
            if severity not in ("ERROR", "INTERNAL_ERROR"):
                continue
            for before, after in (("ForeignNode[", "]"), ("for node ", "."), ("node name: ", " ")):
                _, found, rest = message.partition(before)
                if found:
                    return rest.partition(after)[0].strip() or None
        return None


def _required(value: Any, what: str, log: _Log, name: str) -> Any:
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
        inputs[tensor.name] = TensorMeta(tensor.name, _dtype(tensor.dtype.name), shape)
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


def _label(name: str) -> str:
    return _LABELS.get(name, name.lower() or "unknown")


def _dtype(name: str) -> str:
    return _DTYPES.get(name, name.lower())


class TensorRTRunner:
    """A deserialised plan on the first visible GPU, with one execution context and one stream.

    Args:
        trt: The module, `tensorrt` or `tensorrt_rtx`.
        path: The plan.
        spec: Its inputs and their ranges.
        cast_io: Feed a float input in the engine's own floating dtype.

    Raises:
        IncompatibleEngine: The runtime refuses the plan.
        RunError: Its inputs are not the spec's, or it cannot be run.
        BackendUnavailable: No library for device memory is installed.
    """

    def __init__(self, trt: Any, path: Path, *, spec: GateSpec, cast_io: bool = False) -> None:
        self._where = str(path)
        self._spec = spec
        self._cast_io = cast_io
        self._log = _Log()
        self._logger = self._log.logger(trt)
        self._memory: _Memory | None = _memory()
        self._buffers: dict[str, tuple[int, int]] = {}
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")
        self._runtime: Any = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise IncompatibleEngine(
                f"{trt.__name__} {trt.__version__} refuses the plan: {' · '.join(self._log.last()) or 'no reason given'}",
                where=self._where,
                hint="Build it here, with the installed version and on this GPU.",
            )
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise RunError(f"no execution context: {' · '.join(self._log.last())}", where=self._where)
        self._stream = self._memory.stream()
        self._inputs: dict[str, TensorMeta] = {}
        self._outputs: dict[str, TensorMeta] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name))
            meta = TensorMeta(name, _dtype(self._engine.get_tensor_dtype(name).name), shape)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if is_input else self._outputs)[name] = meta
        require_inputs(self._inputs, spec=spec, cast_io=cast_io, where=self._where)

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives."""
        return self._outputs

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """One inference: copy in, compute, copy out, wait.

        Raises:
            RunError: An input does not fit, the engine failed, or the runner is closed.
        """
        feed, outputs = self._bind(feed_dict)
        self._infer(feed, outputs)
        return {
            name: _float32_from_bfloat16(array) if self._outputs[name].dtype == "bfloat16" else array
            for name, array in outputs.items()
        }

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference with both copies, from arrays and buffers that are there already, done when it returns.

        Raises:
            RunError: As `run`.
        """
        feed, outputs = self._bind(feed_dict)

        def once() -> None:
            self._infer(feed, outputs)

        once()
        return once

    def close(self) -> None:
        """Free the context, the engine and the device memory."""
        memory, self._memory = self._memory, None
        self._context = self._engine = self._runtime = None
        if memory is not None:
            for address, _ in self._buffers.values():
                memory.free(address)
            self._buffers = {}
            memory.close(self._stream)

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bind(self, feed_dict: NamedArrays) -> tuple[dict[str, Array], dict[str, Array]]:
        if self._memory is None:
            raise RunError("the runner is closed", where=self._where)
        feed = require_feed(feed_dict, self._inputs, spec=self._spec, cast_io=self._cast_io)
        for name, array in feed.items():
            if not self._context.set_input_shape(name, array.shape):
                raise self._failed(f"input {name!r} cannot have the shape {list(array.shape)}")
            self._place(name, array.nbytes)
        outputs: dict[str, Array] = {}
        for name, meta in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise self._failed(f"output {name!r} has a shape that depends on values, {list(shape)}")
            outputs[name] = np.empty(shape, "uint16" if meta.dtype == "bfloat16" else meta.dtype)
            self._place(name, outputs[name].nbytes)
        return feed, outputs

    def _place(self, name: str, nbytes: int) -> None:
        if self._memory is None:
            raise RunError("the runner is closed", where=self._where)
        address, size = self._buffers.get(name, (0, -1))
        if size < nbytes:
            if size >= 0:
                del self._buffers[name]
                self._memory.free(address)
            address = self._memory.allocate(max(nbytes, 1))
            self._buffers[name] = (address, nbytes)
        if not self._context.set_tensor_address(name, address):
            raise self._failed(f"no address for {name!r}")

    def _infer(self, feed: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        memory = self._memory
        if memory is None:
            raise RunError("the runner is closed", where=self._where)
        for name, array in feed.items():
            memory.to_device(self._buffers[name][0], array, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise self._failed("the engine did not run")
        for name, array in outputs.items():
            memory.to_host(array, self._buffers[name][0], self._stream)
        memory.synchronize(self._stream)

    def _failed(self, what: str) -> RunError:
        told = " · ".join(self._log.last())
        return RunError(f"{what}{f': {told}' if told else ''}", where=self._where)


def _float32_from_bfloat16(bits: Array) -> Array:
    """The float32 values of bfloat16 bits: its upper half.

    Args:
        bits: uint16, any shape.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


class _Memory(Protocol):
    """Device memory and a stream, by address."""

    def stream(self) -> int: ...

    def allocate(self, nbytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def to_device(self, address: int, array: Array, stream: int) -> None: ...

    def to_host(self, array: Array, address: int, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def close(self, stream: int) -> None: ...


def _memory() -> _Memory:
    """Device memory through cuda-python, else through PyTorch with CUDA.

    Raises:
        BackendUnavailable: Neither is installed.
    """
    with contextlib.suppress(ImportError):
        return _CudaMemory()
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return _TorchMemory()
    raise BackendUnavailable(
        "running a plan needs device memory, and neither cuda-python nor PyTorch with CUDA is installed",
        hint='pip install "trt-gate[gpu]"',
    )


class _CudaMemory:
    """Through cuda-python's runtime bindings."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime
        self._cuda: Any = runtime

    def stream(self) -> int:
        return int(self._checked(self._cuda.cudaStreamCreate()))

    def allocate(self, nbytes: int) -> int:
        return int(self._checked(self._cuda.cudaMalloc(nbytes)))

    def free(self, address: int) -> None:
        self._checked(self._cuda.cudaFree(address))

    def to_device(self, address: int, array: Array, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream))

    def to_host(self, array: Array, address: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, stream))

    def synchronize(self, stream: int) -> None:
        self._checked(self._cuda.cudaStreamSynchronize(stream))

    def close(self, stream: int) -> None:
        self._checked(self._cuda.cudaStreamDestroy(stream))

    def _checked(self, answer: Any) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise RunError(f"CUDA failed: {getattr(status, 'name', status)}")
        return values[0] if values else None


class _TorchMemory:
    """Through PyTorch's caching allocator."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    def stream(self) -> int:
        import torch

        stream = torch.cuda.Stream()
        self._streams[stream.cuda_stream] = stream
        return int(stream.cuda_stream)

    def allocate(self, nbytes: int) -> int:
        import torch

        block = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self._held[block.data_ptr()] = block
        return int(block.data_ptr())

    def free(self, address: int) -> None:
        self._held.pop(address, None)

    def to_device(self, address: int, array: Array, stream: int) -> None:
        self._copy(address, array, stream, to_host=False)

    def to_host(self, array: Array, address: int, stream: int) -> None:
        self._copy(address, array, stream, to_host=True)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def close(self, stream: int) -> None:
        self._streams.pop(stream, None)
        self._held.clear()

    def _copy(self, address: int, array: Array, stream: int, *, to_host: bool) -> None:
        import torch

        if array.nbytes == 0:
            return
        host = torch.from_numpy(array.reshape(-1).view(np.uint8))
        device = self._held[address][: array.nbytes]
        with torch.cuda.stream(self._streams[stream]):
            if to_host:
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)
