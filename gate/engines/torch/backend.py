"""PyTorch as an engine: eager, compiled by torch.compile, or packaged by AOTInductor."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gate import atomic
from gate.chatter import quiet
from gate.device import fingerprint, gpu
from gate.engines.feed import profile_of
from gate.engines.interface import BuildRecord, Layer, Origin, Resources
from gate.engines.torch import arithmetic, package
from gate.engines.torch.engine import CudaTorchEngineRunner, TorchEngineRunner
from gate.engines.torch.layers import dispatched, exported, layers_from_operators, tf32_of
from gate.engines.torch.module import (
    EngineModule,
    cast_of,
    device_of,
    engine_module,
    least_feed,
    mode_of,
    trace_feed,
)
from gate.engines.torch.runner import moved, tensor_from
from gate.errors import BackendUnavailable, BuildError, GateError, IncompatibleEngine, RunError, SpecError
from gate.factory import failure_of, state_digest
from gate.spec import EngineSpec, GateSpec
from gate.tensors import NamedArrays
from gate.verdict import Evidence

_FIRST_WITH_PACKAGES = (2, 6)
"""Source: PyTorch 2.6 release notes, `aoti_compile_and_package` and `aoti_load_package`."""


class TorchBackend:
    """PyTorch's own ways to run a model: what a team runs before it has an engine, and AOTInductor's packages.

    An eager or compiled engine has no code in its file: that only says what is run, and the model is built anew. An
    AOTInductor package is a shared library; loading one runs its code, so verify its digest first.
    """

    name = "torch"

    def version(self) -> str:
        """The installed version, by its metadata.

        Raises:
            BackendUnavailable: It is not installed.
        """
        try:
            return importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            raise BackendUnavailable("backend 'torch' is not installed", hint='pip install "trt-gate[torch]"') from None

    def runs_here(self, engine: EngineSpec) -> Evidence | None:
        """`device` where that is asked for, there is a GPU, and PyTorch is no build for the CPU only; else `host`."""
        if device_of(engine) == "cpu" or gpu() is None:
            return Evidence.HOST
        try:
            cpu_only = self.version().endswith("+cpu")
        except BackendUnavailable:
            return Evidence.HOST
        return Evidence.HOST if cpu_only else Evidence.DEVICE

    def origin(self, engine: EngineSpec) -> Origin:  # noqa: ARG002 - the same for every engine
        """The model itself."""
        return "model"

    def file_name(self, engine: EngineSpec) -> str:
        """`model.pt2` for a package; else `model.json`, which says what is run."""
        return "model.pt2" if mode_of(engine) == "aotinductor" else "model.json"

    def unsealable(self, engine: EngineSpec) -> str | None:
        """PyTorch keeps no engine file but AOTInductor's."""
        if mode_of(engine) == "aotinductor":
            return None
        return (
            f'PyTorch keeps no engine file in mode = "{mode_of(engine)}", so there is nothing to release; '
            'mode = "aotinductor" makes one'
        )

    def require_supported(self, engine: EngineSpec) -> None:
        """Hold the options against the installed version, and the precision against the environment.

        Raises:
            SpecError: It has no AOTInductor packages, or TF32 is switched against the precision.
        """
        version = self.version()
        require_tf32(engine)
        if mode_of(engine) == "aotinductor" and _numbers(version) < _FIRST_WITH_PACKAGES:
            raise SpecError(
                f'mode = "aotinductor" needs PyTorch {".".join(map(str, _FIRST_WITH_PACKAGES))} or later, here is {version}',
                hint='Upgrade PyTorch, or use mode = "compile".',
            )

    def build(
        self,
        *,
        onnx: Path | None,  # noqa: ARG002 - it is made from the model
        out: Path,
        spec: GateSpec,
        engine: EngineSpec,
        resources: Resources | None = None,
    ) -> BuildRecord:
        """Run the model once as the engine will, list its operators, and write the package or what says what is run.

        Raises:
            BuildError: The model fails, or cannot be exported or compiled; carries the compiler's last lines.
            BackendUnavailable: PyTorch is not installed, finds no GPU, or there is a recording in place of the model.
        """
        started = time.perf_counter()
        version = self.version()
        module, feeds = _model(resources), _feeds(resources)
        progress = (resources.progress if resources is not None else None) or _ignored
        feed = trace_feed(spec, feeds)
        made = _made(module, spec=spec, engine=engine, feed=feed, error=BuildError)
        log: tuple[str, ...] = ()
        restore = arithmetic.deployed(tf32=engine.precision == "tf32")
        try:
            tensors = _tensors(feed, made)
            if mode_of(engine) == "aotinductor":
                progress("export", None)
                program = package.exported_program(made, spec=spec, feed=feed, tensors=tensors)
                layers = layers_from_operators(exported(program), tf32=tf32_of(made.device))
                progress("compile", None)
                told = package.description(made, version, precision=engine.precision, layers=layers)
                log = package.write_package(program, out, told)
            else:
                layers = _dispatched_layers(made, tensors)
                atomic.write_bytes(out, _identity(module, engine=engine, version=version))
        finally:
            restore()
        device = made.device
        if device != "cpu":
            del made, tensors
            arithmetic.give_memory_back()
        return BuildRecord(
            backend=self.name,
            backend_version=version,
            precision=engine.precision,
            options={
                "mode": mode_of(engine),
                "cast": cast_of(engine),
                "device": device,
                "dynamic": sorted(_dynamic_axes(spec)),
                "outputs": "brought back to the dtypes of the model in FP32, after the engine",
            },
            profile=profile_of(spec),
            layers=layers,
            layers_source="export" if mode_of(engine) == "aotinductor" else "dispatch",
            log=log,
            seconds=time.perf_counter() - started,
        )

    def describe(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> BuildRecord:
        """What a package of the team's own says of itself; its layers, where the gate made it.

        Raises:
            RunError: It is no package, truncated or damaged.
        """
        said = package.read_description(path)
        return BuildRecord(
            backend=self.name,
            backend_version=said.torch or self.version(),
            precision=engine.precision,
            options={"mode": "aotinductor", "device": said.device, "plan": path.name, "made_in": said.precision},
            profile=profile_of(spec),
            layers=said.layers,
            layers_source="package" if said.layers else "not listed: only packages that the gate made hold them",
        )

    def open(
        self, path: Path, *, spec: GateSpec, engine: EngineSpec, resources: Resources | None = None
    ) -> TorchEngineRunner:
        """Load a package, or make the model ready to run; torch.compile compiles it here, not in the first run.

        Args:
            path: The engine's file. A package is executable: verify its digest first.
            spec: The inputs and their ranges.
            engine: What was asked for.
            resources: Gives the model, which an eager or compiled engine is made from; a package needs none.

        Raises:
            RunError: The file is damaged or of another model, or the model fails or cannot be compiled.
            IncompatibleEngine: It was made for another device, GPU, processor or PyTorch; said before it is loaded.
            BackendUnavailable: PyTorch is not installed, finds no GPU, or there is a recording in place of the model.
        """
        version = self.version()
        if mode_of(engine) == "aotinductor":
            return self._open_package(path, spec=spec, engine=engine, version=version)
        if not path.is_file():
            raise RunError("there is no such file", where=str(path))
        module, feeds = _model(resources), _feeds(resources)
        _require_same(path, _identity(module, engine=engine, version=version))
        made = _made(module, spec=spec, engine=engine, feed=trace_feed(spec, feeds), error=RunError)
        if mode_of(engine) == "eager":
            return _runner(made.core, spec=spec, engine=engine, dtypes=made.dtypes, where=str(path))
        return _compiled(made, spec=spec, engine=engine, feeds=feeds, where=str(path))

    def _open_package(self, path: Path, *, spec: GateSpec, engine: EngineSpec, version: str) -> TorchEngineRunner:
        told = package.read_description(path)
        device = device_of(engine)
        package.require_loadable(
            told,
            device=device,
            version=version,
            machine=platform.machine(),
            isa=fingerprint(for_gpu=False).isa,
            here=gpu(),
            where=str(path),
        )
        if device == "cuda":
            package.require_loads_alone(path, device=device)
        arithmetic.require_device(device)
        function = package.load_package(path)
        return _runner(function, spec=spec, engine=engine, dtypes=told.outputs, where=str(path))


def require_tf32(engine: EngineSpec, environment: Mapping[str, str] | None = None) -> None:
    """Refuse a precision on the GPU that the environment overrides.

    Args:
        engine: What was asked for.
        environment: Left out: the process's.

    Raises:
        SpecError: NVIDIA_TF32_OVERRIDE switches TF32 off or on, and the precision is the other one.
    """
    name = arithmetic.TF32_OVERRIDE
    value = (os.environ if environment is None else environment).get(name)
    does = {("tf32", "0"): "off", ("fp32", "1"): "on"}.get((engine.precision, value or ""))
    if does is not None and device_of(engine) == "cuda":
        raise SpecError(
            f"{name}={value} turns TF32 {does}, and the precision is {engine.precision!r}",
            where=f"engine {engine.name!r}",
            hint=f"unset {name}",
        )


def _runner(
    function: Callable[..., Any],
    *,
    spec: GateSpec,
    engine: EngineSpec,
    dtypes: Mapping[str, str],
    where: str,
    on_close: Callable[[], None] = lambda: None,
) -> TorchEngineRunner:
    kind = CudaTorchEngineRunner if device_of(engine) == "cuda" else TorchEngineRunner
    return kind(
        function,
        spec=spec,
        mode=mode_of(engine),
        dtypes=dtypes,
        tf32=engine.precision == "tf32",
        where=where,
        on_close=on_close,
    )


def _compiled(
    made: EngineModule, *, spec: GateSpec, engine: EngineSpec, feeds: tuple[NamedArrays, ...], where: str
) -> TorchEngineRunner:
    """A runner whose model is compiled: for every size of the dynamic axes, and for the smallest.

    PyTorch compiles an axis of size 1 on its own, so that its first run would be a compilation.

    Raises:
        RunError: It cannot be compiled, or takes a dynamic axis for a constant.
    """
    import torch

    with quiet():
        from torch import _dynamo as dynamo

        function = torch.compile(made.core)
    # Code that was compiled for another model of this process counts against PyTorch's limit of recompilations,
    # past which it runs eagerly without a word.
    dynamo.reset()
    settings = {name: True for name in ("fail_on_recompile_limit_hit",) if hasattr(dynamo.config, name)}
    stack = contextlib.ExitStack()
    stack.enter_context(dynamo.config.patch(**settings))
    stack.callback(dynamo.reset)
    runner = _runner(function, spec=spec, engine=engine, dtypes=made.dtypes, where=where, on_close=stack.close)
    try:
        runner.warm_up(trace_feed(spec, feeds), dynamic=_dynamic_axes(spec))
        runner.warm_up(least_feed(spec, feeds))
    except BaseException:
        runner.close()
        raise
    return runner


def _dynamic_axes(spec: GateSpec) -> dict[str, tuple[int, ...]]:
    """Positions of each input's dynamic axes; those of a single size are none, and an input without any is left out."""
    found = {
        name: tuple(
            index
            for index, size in enumerate(each.shape)
            if isinstance(size, str) and each.axes[size].min < each.axes[size].max
        )
        for name, each in spec.inputs.items()
    }
    return {name: axes for name, axes in found.items() if axes}


def _made(
    module: Any, *, spec: GateSpec, engine: EngineSpec, feed: NamedArrays, error: type[BuildError | RunError]
) -> EngineModule:
    try:
        return engine_module(module, spec=spec, engine=engine, feed=feed)
    except RunError as err:
        raise error(err.message, where=err.where, hint=err.hint) from err


def _dispatched_layers(made: EngineModule, tensors: tuple[Any, ...]) -> tuple[Layer, ...]:
    import torch

    try:
        # Untraced first: an error of the model then shows the model's own line.
        with torch.no_grad():
            made.core(*tensors)
        operators = dispatched(made.core, lambda: made.core(*tensors))
    except GateError:
        raise
    except Exception as err:
        raise failure_of(err, where="the model in its precision", error=BuildError, doing="its forward") from err
    return layers_from_operators(operators, tf32=tf32_of(made.device))


def _tensors(feed: NamedArrays, made: EngineModule) -> tuple[Any, ...]:
    return tuple(moved(tensor_from(array), made.device) for array in feed.values())


def _model(resources: Resources | None) -> Any:
    """The model.

    Raises:
        BackendUnavailable: A recording stands in its place, or nothing gives it.
    """
    if resources is None or resources.model is None:
        raise BackendUnavailable(
            "backend 'torch' is made from the model itself, and there is none here: a recording has only its answers",
            hint="Run without --reference, or leave this engine out with --engine.",
        )
    return resources.model()


def _feeds(resources: Resources | None) -> tuple[NamedArrays, ...]:
    return resources.feeds() if resources is not None and resources.feeds is not None else ()


def _identity(module: Any, *, engine: EngineSpec, version: str) -> bytes:
    """What an eager or compiled engine's file says: canonical JSON, nothing to execute."""
    said = {
        "schema": 1,
        "backend": "torch",
        "torch": version,
        "mode": mode_of(engine),
        "cast": cast_of(engine),
        "precision": engine.precision,
        "device": device_of(engine),
        "weights_sha256": state_digest(module),
    }
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _require_same(path: Path, expected: bytes) -> None:
    """Hold an engine's file against what would be run.

    Raises:
        RunError: It cannot be read, or is of another model, mode or precision.
        IncompatibleEngine: It is of another PyTorch.
    """
    where = str(path)
    try:
        found, wanted = json.loads(path.read_bytes()), json.loads(expected)
        differs = {key: (found.get(key), value) for key, value in wanted.items() if found.get(key) != value}
    except (ValueError, AttributeError) as err:
        raise RunError(f"is not what backend 'torch' writes: {err}", where=where, hint="Build it again.") from err
    if not differs:
        return
    told = "; ".join(f"{key} is {got}, here {want}" for key, (got, want) in differs.items())
    kind = IncompatibleEngine if set(differs) == {"torch"} else RunError
    raise kind(f"was made of something else: {told}", where=where, hint="Build it again.")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def _ignored(name: str, done: float | None) -> None:
    """Progress that nobody asked for."""
