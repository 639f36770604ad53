"""A plan deserialised: what several runners share, and what it says of its tensors and profiles."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate.device import gpu
from gate.engines.tensorrt import api
from gate.engines.tensorrt.log import Log
from gate.engines.tensorrt.plan import Host, reasons_of_diagnostics
from gate.errors import BuildError, IncompatibleEngine, RunError
from gate.tensors import TensorMeta

Shape = tuple[int, ...]
BFLOAT16 = "bfloat16"
_DTYPES = ("float32", "float16", BFLOAT16, "int8", "uint8", "int32", "int64", "bool")
"""What tensors may be, by name: other packages teach NumPy further ones, such as int4, whose bytes are laid out otherwise."""


@dataclass(frozen=True)
class Profile:
    """An optimization profile.

    Args:
        index: As TensorRT counts them.
        ranges: Per input its least, optimal and largest shape.
    """

    index: int
    ranges: Mapping[str, tuple[Shape, Shape, Shape]]

    def outside(self, name: str, shape: Shape) -> tuple[int, ...]:
        """The axes of an input's shape that are outside."""
        low, _, high = self.ranges[name]
        return tuple(axis for axis, size in enumerate(shape) if not low[axis] <= size <= high[axis])


def host(name: str) -> Host:
    """Where a plan would run: the installed version, the GPU and the platform. The runtime is not imported for it.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.

    Raises:
        BackendUnavailable: It is not installed.
    """
    device = gpu()
    return Host(
        name=name,
        version=api.version(name),
        compute_capability=device.compute_capability if device is not None else None,
        gpu=device.name if device is not None else None,
        os=f"{platform.system()} {platform.machine()}",
    )


def read_plan(path: Path) -> bytes:
    """A plan's bytes.

    Raises:
        RunError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as err:
        raise RunError(f"the plan cannot be read: {err.strerror or err}", where=str(path)) from err


class LoadedPlan:
    """A deserialised plan. Each who uses it holds it, and the last one to release it frees the engine.

    Args:
        trt: The module, `tensorrt` or `tensorrt_rtx`.
        data: The plan, which `gate.engines.tensorrt.plan.require_compatible` let through.
        where: Its name, for messages.
        plugins: Plugin libraries to load first.
        host_code: Whether the plan may bring code for the host: a version-compatible plan brings a runtime of its own.

    Raises:
        IncompatibleEngine: The runtime refuses the plan.
        RunError: A plugin library cannot be loaded.
    """

    def __init__(
        self, trt: Any, data: bytes, *, where: str, plugins: Iterable[str] = (), host_code: bool = False
    ) -> None:
        self.trt = trt
        self.where = where
        self.log = Log()
        self._plugins = tuple(plugins)
        self._host_code = host_code
        # Before TensorRT 10 two contexts of an engine cannot use the same profile, unless it was built for that
        # (PreviewFeature.PROFILE_SHARING_0806), so another runner there gets an engine of its own.
        self._data = data if str(trt.__version__).startswith(("8.", "9.")) else None
        self._holders = 0
        self._logger = self.log.logger(trt)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")
        try:
            api.load_plugins(trt, self._plugins, self.log)
        except BuildError as err:
            raise RunError(err.message, where=err.where or where, hint=err.hint) from err
        self._runtime: Any = trt.Runtime(self._logger)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._require_valid(data)
        self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise IncompatibleEngine(
                f"{trt.__name__} {trt.__version__} refuses the plan: {' · '.join(self.log.last()) or 'no reason given'}",
                where=where,
                hint="Build it here, with the installed version and on this GPU.",
            )

    @property
    def engine(self) -> Any:
        """The ICudaEngine.

        Raises:
            RunError: It was freed.
        """
        if self._engine is None:
            raise RunError("the engine is closed", where=self.where)
        return self._engine

    @property
    def device_memory_bytes(self) -> int:
        """Device memory that one execution context takes for activations, in the profile that takes most.

        Source: ICudaEngine.device_memory_size; TensorRT 10.1 and later have device_memory_size_v2 instead.
        """
        engine = self.engine
        name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(engine, name))

    def context(self) -> Any:
        """A new execution context.

        Raises:
            RunError: It cannot be made, for want of memory for one.
        """
        context = self.engine.create_execution_context()
        if context is None:
            raise self.failed("there is no execution context")
        return context

    def another(self) -> LoadedPlan:
        """What another runner uses: this engine, or in TensorRT 8 and 9 one of its own from the same bytes.

        Raises:
            RunError: It was freed.
        """
        _ = self.engine
        if self._data is None:
            return self
        return LoadedPlan(self.trt, self._data, where=self.where, plugins=self._plugins, host_code=self._host_code)

    def hold(self) -> None:
        """Keep the engine until `release`."""
        self._holders += 1

    def release(self) -> None:
        """Free the engine where nobody else holds it."""
        self._holders -= 1
        if self._holders <= 0:
            self._engine = self._runtime = self._data = None

    def failed(self, what: str) -> RunError:
        """An error with what the runtime told last."""
        told = " · ".join(self.log.last())
        return RunError(f"{what}{f': {told}' if told else ''}", where=self.where)

    def tensors(self) -> tuple[dict[str, TensorMeta], dict[str, TensorMeta]]:
        """Its inputs and its outputs, sizes that are dynamic as None."""
        trt, engine = self.trt, self.engine
        inputs: dict[str, TensorMeta] = {}
        outputs: dict[str, TensorMeta] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
            meta = TensorMeta(name, api.dtype(engine.get_tensor_dtype(name).name), shape)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = meta
        return inputs, outputs

    def profiles(self) -> tuple[Profile, ...]:
        """Its optimization profiles. An input of fixed shape has that shape in all of them."""
        engine = self.engine
        inputs, _ = self.tensors()
        found: list[Profile] = []
        for index in range(engine.num_optimization_profiles):
            ranges: dict[str, tuple[Shape, Shape, Shape]] = {}
            for name, meta in inputs.items():
                fixed = tuple(size for size in meta.shape if isinstance(size, int))
                if len(fixed) == len(meta.shape):
                    ranges[name] = (fixed, fixed, fixed)
                    continue
                low, opt, high = (
                    tuple(int(size) for size in each) for each in engine.get_tensor_profile_shape(name, index)
                )
                ranges[name] = (low, opt, high)
            found.append(Profile(index, ranges))
        return tuple(found)

    def require_runnable(self) -> None:
        """Refuse tensors that arrays cannot be: of types NumPy has not, in vectorised formats, or shape tensors.

        Raises:
            RunError: There is one.
        """
        trt, engine = self.trt, self.engine
        for metas in self.tensors():
            for name, meta in metas.items():
                if meta.dtype not in _DTYPES:
                    raise RunError(
                        f"tensor {name!r} is {meta.dtype}, which NumPy does not have, so it cannot be fed or compared",
                        where=self.where,
                        hint="Build the engine with inputs and outputs in float32 or float16.",
                    )
                format_name = engine.get_tensor_format(name).name
                if format_name != "LINEAR":
                    raise RunError(
                        f"tensor {name!r} has the memory format {format_name}, arrays are LINEAR",
                        where=self.where,
                        hint="Build the engine without formats of its own for inputs and outputs.",
                    )
                if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                    raise RunError(
                        f"tensor {name!r} is a shape tensor: its values decide shapes, and lie on the host",
                        where=self.where,
                        hint="Export the model with that value as a constant.",
                    )

    def _require_valid(self, data: bytes) -> None:
        """Ask the runtime about the plan where it can be asked, as TensorRT-RTX's can.

        Source: Runtime.get_engine_validity of tensorrt_rtx 1.7.1: EngineValidity and or-ed EngineInvalidityDiagnostics.

        Raises:
            IncompatibleEngine: The plan is not valid here.
        """
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(data)
        if validity.name != "INVALID":
            return
        reasons = reasons_of_diagnostics(int(diagnostics)) or self.log.last() or ("no reason given",)
        raise IncompatibleEngine(
            f"{self.trt.__name__} {self.trt.__version__} cannot run the plan here: {' · '.join(reasons)}",
            where=self.where,
            hint="Compile it again with the installed version, for this GPU.",
        )
