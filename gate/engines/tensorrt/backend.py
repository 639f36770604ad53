"""The TensorRT backends: one class for both modules, `tensorrt` and `tensorrt_rtx`.

TensorRT-RTX compiles on a machine without a GPU. TensorRT builds on the GPU that it will run on.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from gate.device import Gpu, gpu
from gate.engines.feed import profile_of
from gate.engines.interface import BuildRecord, Layer, Origin, Resources
from gate.engines.tensorrt import api
from gate.engines.tensorrt.build import build_plan
from gate.engines.tensorrt.command import run_command
from gate.engines.tensorrt.layers import inspect_plan
from gate.engines.tensorrt.loaded import LoadedPlan, host, read_plan
from gate.engines.tensorrt.plan import read_header, require_compatible
from gate.engines.tensorrt.runner import TensorRTRunner
from gate.errors import BackendUnavailable, BuildError
from gate.results import Fingerprint
from gate.spec import EngineSpec, GateSpec
from gate.verdict import Evidence

_RTX_CAPABILITIES = ("8.0", "8.6", "8.9")
"""With 12.x, what TensorRT-RTX 1.7 runs on; it refuses others, 9.0 for one, when it deserialises."""


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
        return api.version(self.name)

    def runs_here(self, engine: EngineSpec) -> Evidence | None:  # noqa: ARG002 - the same for every engine
        """`device` where there is a GPU that this runtime runs on, else None. Asks the driver; imports nothing."""
        device = gpu()
        return Evidence.DEVICE if device is not None and self._refusal(device) is None else None

    def origin(self, engine: EngineSpec) -> Origin:
        """The lowered graph; the FP32 graph in weak typing, where the compiler chooses precisions."""
        return "exported" if engine.options.typing == "weak" else "lowered"

    def file_name(self, engine: EngineSpec) -> str:  # noqa: ARG002 - the same for every engine
        """`model.plan`."""
        return "model.plan"

    def unsealable(self, engine: EngineSpec) -> str | None:
        """A plan without its weights is not what was checked."""
        if engine.options.strip_weights:
            return "strip_weights leaves the weights out of the plan, so what is released would not be what was checked"
        return None

    def require_supported(self, engine: EngineSpec) -> None:
        """Hold the options against the installed version.

        Raises:
            SpecError: The version does not have one of them.
        """
        api.require_supported(self.name, engine)

    def build(
        self, *, onnx: Path | None, out: Path, spec: GateSpec, engine: EngineSpec, resources: Resources | None = None
    ) -> BuildRecord:
        """Parse the graph, list its typed layers, compile it, and write the plan.

        Raises:
            BuildError: The parser or the compiler refused it; carries the log and the node.
            BackendUnavailable: It is not installed, or needs a GPU to build and there is none.
        """
        if onnx is None:
            raise BuildError(f"backend {self.name!r} builds from ONNX, and there is none")
        api.version(self.name)
        if self.name == "tensorrt" and gpu() is None:
            raise BackendUnavailable(
                "backend 'tensorrt' builds on the GPU that the engine runs on, and there is none here",
                hint='Compile here with backend = "tensorrt_rtx" and evidence = "preflight", or run on a GPU host.',
            )
        record = build_plan(
            self.name,
            onnx=onnx,
            out=out,
            spec=spec,
            engine=engine,
            resources=resources or Resources(),
            runs_here=self.runs_here(engine) is Evidence.DEVICE,
        )
        timing = run_command(out, spec=spec, engine=engine, record=record)
        return msgspec.structs.replace(record, run_command=timing)

    def describe(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> BuildRecord:
        """What a plan of the team's own says of itself: its version by its header, its layers by the inspector on a GPU.

        Raises:
            IncompatibleEngine: The plan is no plan, truncated, or not for here.
            RunError: It cannot be read.
        """
        options = engine.options
        data = self.require_compatible(path, engine=engine)
        header = read_header(data)
        layers: tuple[Layer, ...] = ()
        source = "not listed: that takes a GPU"
        if self.runs_here(engine) is Evidence.DEVICE:
            found = inspect_plan(
                self.name,
                path,
                plugins=options.plugins or (),
                version_compatible=options.version_compatible is True,
                tf32=engine.precision == "tf32" or options.tf32 is True,
            )
            layers, source = found.layers, "inspector"
        version = self.version()
        if header is not None and header.version is not None:
            version = ".".join(map(str, header.version))
        return BuildRecord(
            backend=self.name,
            backend_version=version,
            precision=engine.precision,
            options={"plan": path.name},
            profile=profile_of(spec),
            layers=layers,
            layers_source=source,
        )

    def open(
        self,
        path: Path,
        *,
        spec: GateSpec,
        engine: EngineSpec,
        resources: Resources | None = None,  # noqa: ARG002 - the plan is all it takes
    ) -> TensorRTRunner:
        """Deserialise a plan, held against what is here before. A plan is executable: verify its digest first.

        Raises:
            BackendUnavailable: It is not installed, or no GPU here can run it; said before the plan is read.
            IncompatibleEngine: The plan is no plan, truncated, or for another runtime, version, GPU or platform.
            RunError: It cannot be read, its inputs are not the spec's, or a plugin library cannot be loaded.
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
        data = self.require_compatible(path, engine=engine)
        options = engine.options
        plan = LoadedPlan(
            api.module(self.name),
            data,
            where=str(path),
            plugins=options.plugins or (),
            host_code=options.version_compatible is True,
        )
        return TensorRTRunner(plan, spec=spec, cast_io=engine.cast_io, cuda_graph=options.cuda_graph is True)

    def require_compatible(
        self,
        path: Path,
        *,
        engine: EngineSpec,
        record: BuildRecord | None = None,
        device: Fingerprint | None = None,
    ) -> bytes:
        """Hold a plan against what is here without deserialising it.

        Args:
            path: The plan.
            engine: Its options say whether it is version-compatible and hardware-compatible, where there is no record.
            record: How it was built, where that is known.
            device: Where it was built, where that is known.

        Returns:
            The plan's bytes, those that were held against.

        Raises:
            BackendUnavailable: The runtime is not installed.
            IncompatibleEngine: The plan is no plan, truncated, or for another runtime, version, GPU or platform.
            RunError: It cannot be read.
        """
        here = host(self.name)
        data = read_plan(path)
        require_compatible(
            data,
            host=here,
            where=str(path),
            version_compatible=engine.options.version_compatible is True,
            hardware_compatible=engine.options.hardware_compatible,
            record=record,
            device=device,
        )
        return data

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
