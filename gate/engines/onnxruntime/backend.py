"""ONNX Runtime as a backend: its CPU, CUDA and TensorRT execution providers."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from gate import atomic
from gate.device import installed_versions
from gate.engines.feed import profile_of
from gate.engines.graph import layers_of
from gate.engines.interface import BuildRecord, Layer, Origin, Resources
from gate.engines.onnxruntime.placement import CPU_NODES_AT_MOST
from gate.engines.onnxruntime.providers import CPU, NAMES, TF32_OVERRIDE, require_options
from gate.engines.onnxruntime.runner import OnnxRuntimeRunner, read_model
from gate.engines.onnxruntime.session import disabled_optimizers, open_session
from gate.errors import BackendUnavailable, BuildError, RunError, SpecError
from gate.precision import COMPUTE_TYPES
from gate.spec import EngineSpec, GateSpec
from gate.verdict import Evidence

_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_SINCE = (1, 24, 1)
"""The first version that says which provider runs a node. Source: microsoft/onnxruntime#26781."""


def _as_computed(layers: tuple[Layer, ...], engine: EngineSpec) -> tuple[Layer, ...]:
    """The nodes of a graph in the precision that the provider computes in: TF32 is its setting, not the graph's.

    Source: ONNX Runtime's CUDA provider, `use_tf32`; that the provider runs these nodes was held by their placement.
    """
    if engine.precision != "tf32":
        return layers
    return tuple(
        msgspec.structs.replace(each, precision="tf32")
        if each.precision == "fp32" and each.type in COMPUTE_TYPES
        else each
        for each in layers
    )


class OnnxRuntimeBackend:
    """ONNX Runtime: on the CPU, or on a GPU by `options.provider`."""

    name = "onnxruntime"

    def version(self) -> str:
        """The installed version, by its metadata; where two distributions differ, that of the one that is imported.

        Raises:
            BackendUnavailable: It is not installed.
        """
        installed = _installed()
        if not installed:
            raise BackendUnavailable(
                "backend 'onnxruntime' is not installed", hint='pip install "trt-gate[onnxruntime]"'
            )
        if len(set(installed.values())) > 1:
            import onnxruntime

            return str(onnxruntime.__version__)
        return next(iter(installed.values()))

    def runs_here(self, engine: EngineSpec) -> Evidence | None:
        """`host`: the CPU provider runs on any CPU. For another, `device` where there is a GPU and the provider."""
        if not engine.needs_gpu:
            return Evidence.HOST
        from gate.device import gpu

        return Evidence.DEVICE if gpu() is not None and _has_provider(_provider(engine)) else None

    def origin(self, engine: EngineSpec) -> Origin:  # noqa: ARG002 - the same for every engine
        """The lowered graph."""
        return "lowered"

    def file_name(self, engine: EngineSpec) -> str:  # noqa: ARG002 - the same for every engine
        """`model.onnx`."""
        return "model.onnx"

    def unsealable(self, engine: EngineSpec) -> str | None:
        """None where what was checked is the file; the TensorRT provider compiles another engine in each process."""
        if engine.options.provider == "tensorrt":
            return (
                "ONNX Runtime's TensorRT provider compiles when it loads the graph, so the engine that was checked is not "
                'in the file; backend = "tensorrt" makes one to release'
            )
        return None

    def require_supported(self, engine: EngineSpec) -> None:
        """Hold a GPU provider's options, and then the machine and what is installed, against what is asked.

        What is wrong on every machine is said first, what only this one lacks second, and what one would change on a
        machine that has it last.

        Raises:
            SpecError: An option is unknown or contradicts the precision or the environment, or the version does not
                say which provider runs a node.
            BackendUnavailable: What is installed has no such provider, or there is no GPU.
        """
        require_options(engine, {TF32_OVERRIDE: "0"} if engine.precision == "fp32" else {})
        if not engine.needs_gpu:
            return
        _require_provider_and_gpu(engine)
        require_options(engine)
        version = self.version()
        if _release(version) < _SINCE:
            raise SpecError(
                f"engine {engine.name!r} asks for provider = {engine.options.provider!r}, and ONNX Runtime {version} does "
                "not tell which provider runs a node, so a silent fallback to the CPU would not be seen",
                hint=f'pip install "onnxruntime-gpu>={".".join(map(str, _SINCE))}"',
            )

    def build(
        self,
        *,
        onnx: Path | None,
        out: Path,
        spec: GateSpec,
        engine: EngineSpec,
        resources: Resources | None = None,  # noqa: ARG002 - a graph is all it takes
    ) -> BuildRecord:
        """Prove that the provider loads and runs the graph, list its nodes, and copy it, with its external data.

        Raises:
            BuildError: It cannot be read, keeps data outside its folder, or the runtime refuses it.
            BackendUnavailable: ONNX Runtime or the provider is not installed.
        """
        version = self.version()
        if onnx is None:
            raise BuildError("backend 'onnxruntime' builds from ONNX, and there is none")
        model, externals = read_model(onnx)
        started = time.perf_counter()
        try:
            more = _proved_on_gpu(onnx, spec, engine) if engine.needs_gpu else _proved_on_cpu(onnx, engine)
        except RunError as err:
            raise BuildError(
                err.message, where=err.where or str(onnx), hint=err.hint, node=_node_in(err.message)
            ) from err
        seconds = time.perf_counter() - started
        atomic.write_bytes(out, onnx.read_bytes())
        for name in externals:
            target = out.parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(onnx.parent / name, target)
        return BuildRecord(
            backend=self.name,
            backend_version=version,
            precision=engine.precision,
            options={
                "provider": _provider(engine),
                "threads": engine.options.threads,
                "optimization": engine.options.optimization or "all",
                **more,
            },
            profile=profile_of(spec),
            layers=_as_computed(layers_of(model), engine),
            layers_source="graph",
            seconds=seconds if engine.needs_gpu else None,
        )

    def describe(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> BuildRecord:
        """The nodes of a graph of the team's own, in their precision.

        Raises:
            RunError: It is no ONNX file.
        """
        import onnx

        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as err:
            raise RunError(f"is not an ONNX file: {err}", where=str(path)) from err
        return BuildRecord(
            backend=self.name,
            backend_version=self.version(),
            precision=engine.precision,
            options={"plan": path.name},
            profile=profile_of(spec),
            layers=_as_computed(layers_of(model), engine),
            layers_source="graph",
        )

    def open(
        self,
        path: Path,
        *,
        spec: GateSpec,
        engine: EngineSpec,
        resources: Resources | None = None,  # noqa: ARG002 - the file is all it takes
    ) -> OnnxRuntimeRunner:
        """Load a graph on the provider that the engine asks for.

        Raises:
            RunError: It cannot be loaded, keeps data outside its folder, its inputs are not the spec's, or the provider
                does not run it.
            BackendUnavailable: ONNX Runtime or the provider is not installed.
        """
        self.version()
        if not engine.needs_gpu:
            return OnnxRuntimeRunner(path, spec=spec, cast_io=engine.cast_io, options=engine.options)
        from gate.engines.onnxruntime.gpu import OnnxRuntimeGpuRunner

        return OnnxRuntimeGpuRunner(
            path, spec=spec, precision=engine.precision, cast_io=engine.cast_io, options=engine.options
        )


def _proved_on_cpu(onnx: Path, engine: EngineSpec) -> dict[str, Any]:
    open_session(onnx, engine.options)
    disabled = disabled_optimizers(onnx)
    return {"disabled_optimizers": list(disabled)} if disabled else {}


def _proved_on_gpu(onnx: Path, spec: GateSpec, engine: EngineSpec) -> dict[str, Any]:
    """What a session on the GPU was told, and where the nodes went."""
    from gate.engines.onnxruntime.gpu import OnnxRuntimeGpuRunner

    with OnnxRuntimeGpuRunner(
        onnx, spec=spec, precision=engine.precision, cast_io=engine.cast_io, options=engine.options, keep=False
    ) as runner:
        at_most = engine.options.cpu_nodes_at_most
        return {
            "provider_options": runner.told,
            "cpu_nodes_at_most": CPU_NODES_AT_MOST if at_most is None else at_most,
            "nodes_per_provider": runner.counts,
            TF32_OVERRIDE: os.environ.get(TF32_OVERRIDE),
        }


def _provider(engine: EngineSpec) -> str:
    return NAMES[engine.options.provider or "cpu"]


def _installed() -> dict[str, str]:
    """Version by name of the distributions that are installed; both put their files into the same folder."""
    return installed_versions(_DISTRIBUTIONS)


def _require_provider_and_gpu(engine: EngineSpec) -> None:
    """Hold what an engine on a GPU needs against this machine.

    Raises:
        BackendUnavailable: What is installed has no such provider, or there is no GPU.
    """
    from gate.device import gpu

    asked = f"engine {engine.name!r} asks for provider = {engine.options.provider!r}"
    if not _has_provider(_provider(engine)):
        listed = ", ".join(f"{name} {each}" for name, each in _installed().items())
        raise BackendUnavailable(
            f"{asked}, and what is installed ({listed}) has no {_provider(engine)}",
            hint="pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        )
    if gpu() is None:
        raise BackendUnavailable(
            f"{asked}, and there is no NVIDIA GPU here",
            hint="Run it on a machine with one, or set optional = true to list it as NOT RUN here.",
        )


def _has_provider(name: str) -> bool:
    """Whether what is installed has a provider. Only a build of one's own, or two at once, must be imported to know."""
    installed = tuple(_installed())
    if name == CPU or installed == ("onnxruntime-gpu",):
        return True
    try:
        import onnxruntime
    except ImportError:
        return False
    return name in onnxruntime.get_available_providers()


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `1.31.1` is (1, 31, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match is not None else ()


def _node_in(message: str) -> str | None:
    """The node that ONNX Runtime names: `… node with name '/f/f.0/Conv'`, `Node (name) Op (…)`."""
    for before, after in (("node with name '", "'"), ("Node (", ")"), ("Node:", " ")):
        _, found, rest = message.partition(before)
        if found and rest.partition(after)[0].strip():
            return rest.partition(after)[0].strip()
    return None
