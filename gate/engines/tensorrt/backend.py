"""The TensorRT backends: one class for both modules, `tensorrt` and `tensorrt_rtx`.

TensorRT-RTX compiles on a machine without a GPU. TensorRT builds on the GPU that it will run on.
"""

from __future__ import annotations

from pathlib import Path

from gate.device import Gpu, gpu
from gate.engines.interface import BuildRecord, Origin, Resources
from gate.engines.tensorrt import api
from gate.engines.tensorrt.build import build_plan
from gate.engines.tensorrt.runner import TensorRTRunner
from gate.errors import BackendUnavailable, BuildError
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
        return build_plan(
            self.name,
            onnx=onnx,
            out=out,
            spec=spec,
            engine=engine,
            resources=resources or Resources(),
            runs_here=self.runs_here(engine) is Evidence.DEVICE,
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
        api.version(self.name)
        return TensorRTRunner(api.module(self.name), path, spec=spec, cast_io=engine.cast_io)

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
