"""From the reference to an engine's file: export, lower, build."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from gate.calibration import calibration_warnings
from gate.engines.graph import opset_of
from gate.engines.interface import CALIBRATION_NAME, Backend, BuildRecord, LoweringRecord, Resources
from gate.errors import BuildError, DataError
from gate.manifest import sha256_hex
from gate.reference import RecordedGraph, batch_size, file_digest, onnx_digest, recorded_graph
from gate.spec import QUANTIZED, EngineSpec, LoweringSpec, located
from gate.steps.context import Context, Exported
from gate.tensors import Array
from gate.verdict import Evidence

if TYPE_CHECKING:
    from gate.cache import Entry


def exported_graph(run: Context) -> Exported:
    """The model as FP32 ONNX: exported once and compared with PyTorch before anything else is blamed."""
    if run.graph is None:
        with run.stage("export"):
            run.graph = _export(run)
    return run.graph


def _export(run: Context) -> Exported:
    """The FP32 ONNX of the reference: the team's own file, a recording's, or the gate's export from PyTorch."""
    spec, file = run.spec, run.file
    if run.options.reference is not None:
        graph = recorded_graph(run.options.reference, "fp32")
        return Exported(graph.path, onnx_digest(graph.path), graph.opset, reused=True)
    if spec.model.onnx is not None:
        path = file.folder / spec.model.onnx
        return Exported(path, onnx_digest(path), _opset(path), reused=False)
    from gate.export import exporter_version, onnx_from_torch, verify_export

    key = run.cache.entry_key(
        model=run.identity.sha256,
        inputs={name: msgspec.to_builtins(each) for name, each in spec.inputs.items()},
        opset=spec.model.opset,
        exporter=list(spec.model.exporter),
        names=list(spec.model.output_names),
        simplify=spec.model.simplify,
        tools=exporter_version(),
    )
    entry = run.cache.get("export", key)
    reused = entry is not None
    if entry is None:
        meta: dict[str, object] = {}

        def make(folder: Path) -> None:
            path = folder / "model.onnx"
            feeds = _export_feeds(run)
            made = onnx_from_torch(run.model.module, spec=spec, out=path, feeds=feeds)
            verify_export(path, run.model.module, spec=spec, feeds=feeds)
            meta.update(msgspec.to_builtins(made))

        entry = run.cache.put("export", key, make, meta)
    path = entry.path("model.onnx")
    return Exported(path, graph_digest(entry), int(entry.meta["opset"]), reused=reused)


def _export_feeds(run: Context) -> tuple[dict[str, Array], ...]:
    """Sample inputs at the smallest batch and at the gate's own: real data, taken cyclically where it is short."""
    batch = next(run.source.batches(batch_size(run.file)))
    first = next(iter(run.spec.inputs.values()))
    sizes = {first.sized("min")[0], first.sized("opt")[0], min(first.sized("max")[0], batch_size(run.file))}
    return tuple(
        {name: np.ascontiguousarray(values[np.arange(size) % len(values)]) for name, values in batch.inputs.items()}
        for size in sorted(sizes)
    )


def graph_digest(entry: Entry) -> str:
    """sha256 of a cached graph: of the file, or of it and the external data beside it, which holds the weights."""
    digests = {name: each.sha256 for name, each in entry.files.items()}
    return digests["model.onnx"] if len(digests) == 1 else sha256_hex(repr(sorted(digests.items())).encode())


def _opset(path: Path) -> int:
    import onnx

    return opset_of(onnx.load(path, load_external_data=False))


@dataclass(frozen=True)
class Made:
    """An engine's file and how it came about."""

    path: Path
    sha256: str
    build: BuildRecord
    opset: int | None
    calibration_sha256: str | None
    reused: tuple[str, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lowering: LoweringRecord | None = None
    graph: Path | None = None
    graph_sha256: str | None = None


@dataclass(frozen=True)
class _Graph:
    """What an engine is built from: an ONNX file, or none where it is the model itself."""

    path: Path | None
    sha256: str
    opset: int | None
    calibration_sha256: str | None = None
    reused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lowering: LoweringRecord | None = None


def make_engine(run: Context, engine: EngineSpec, backend: Backend, *, rebuild: int = 0) -> Made:
    """The engine's file: lowered and built, or the team's own.

    Args:
        rebuild: Which of several builds of the same engine.
    """
    if engine.plan is not None:
        path = run.file.folder / engine.plan
        _require_file(path, run, engine, "plan")
        opset = None
        if engine.backend == "onnxruntime":
            onnx_digest(path)  # refuses what is no ONNX file
            opset = _opset(path)
        record = backend.describe(path, spec=run.spec, engine=located(engine, run.file.folder))
        notes: tuple[str, ...] = ()
        if not record.layers:
            notes = (f"precision {engine.precision} is what the spec says of this file; its layers were not listed",)
        return Made(path, file_digest(path), record, opset, None, (), notes)
    here = located(engine, run.file.folder)
    graph = _graph_for(run, engine, backend)
    calibrates = engine.options.typing == "weak" and engine.precision == "int8" and not engine.brings_scales
    calibration_sha256 = run.calibration()[1].inputs_sha256 if calibrates else graph.calibration_sha256
    reused = list(graph.reused)
    with run.stage("build", engine=engine.name):
        parts: dict[str, object] = {
            "lowered": graph.sha256,
            "backend": engine.backend,
            "version": backend.version(),
            "precision": engine.precision,
            "options": msgspec.to_builtins(engine.options),
            "files": _option_digests(here),
            "inputs": {name: msgspec.to_builtins(each) for name, each in run.spec.inputs.items()},
            "cast_io": engine.cast_io,
            "evidence": engine.required_evidence,
            "device": _device_key(backend, engine),
            "calibration": calibration_sha256 if calibrates else None,
            "rebuild": rebuild,
        }
        if engine.onnx is None and backend.origin(engine) == "model":
            parts |= _model_parts(run)
        key = run.cache.entry_key(**parts)
        entry: Entry | None = run.cache.get("engine", key)
        if entry is not None:
            reused.append("engine")
        else:
            meta: dict[str, object] = {}

            def make(folder: Path) -> None:
                record = backend.build(
                    onnx=graph.path,
                    out=folder / backend.file_name(engine),
                    spec=run.spec,
                    engine=here,
                    resources=_resources(run, graph, calibration_sha256 if calibrates else None),
                )
                meta["build"] = msgspec.to_builtins(record)

            entry = run.cache.put("engine", key, make, meta)
            _keep_for_its_own_ranges(run, here, entry, parts)
        record = msgspec.convert(entry.meta["build"], BuildRecord)
    name = backend.file_name(engine)
    return Made(
        path=entry.path(name),
        sha256=entry.sha256(name),
        build=record,
        opset=graph.opset,
        calibration_sha256=calibration_sha256,
        reused=tuple(reused),
        notes=graph.notes,
        warnings=calibration_warnings(
            record.calibration or (None if graph.lowering is None else graph.lowering.calibration),
            run.scale_notes if calibration_sha256 is not None else (),
        ),
        lowering=graph.lowering,
        graph=graph.path,
        graph_sha256=None if graph.path is None else graph.sha256,
    )


def _graph_for(run: Context, engine: EngineSpec, backend: Backend) -> _Graph:
    """The graph that an engine is built from."""
    if engine.onnx is not None:
        path = run.file.folder / engine.onnx
        _require_file(path, run, engine, "onnx")
        return _Graph(path, onnx_digest(path), _opset(path))
    origin = backend.origin(engine)
    if origin == "model":
        return _Graph(None, run.identity.sha256, None)
    exported = exported_graph(run)
    reused = ("export",) if exported.reused else ()
    if origin == "exported":
        return _with_nms(run, engine, _Graph(exported.path, exported.sha256, exported.opset, reused=reused))
    lowered = lowered_graph(run, engine, exported)
    graph = _Graph(
        lowered.path,
        lowered.sha256,
        lowered.opset,
        calibration_sha256=lowered.calibration_sha256,
        reused=(*reused, "lowered") if lowered.reused else reused,
        notes=lowered.notes,
        lowering=lowered.record,
    )
    return _with_nms(run, engine, graph)


def _with_nms(run: Context, engine: EngineSpec, graph: _Graph) -> _Graph:
    """The graph with decoding and suppression inside, where the engine asks for it."""
    config = run.spec.postprocess
    if engine.nms is None or config is None or graph.path is None:
        return graph
    from gate.lower.nms import with_efficient_nms, with_onnx_nms

    source = graph.path
    add = with_onnx_nms if engine.nms == "onnx" else with_efficient_nms
    with run.stage("lower", engine=engine.name):
        key = run.cache.entry_key(onnx=graph.sha256, nms=engine.nms, postprocess=msgspec.to_builtins(config))
        entry = run.cache.get("nms", key)
        if entry is None:
            entry = run.cache.put("nms", key, lambda folder: add(source, folder / "model.onnx", config), {})
    return replace(graph, path=entry.path("model.onnx"), sha256=graph_digest(entry))


def model_resources(run: Context) -> Resources:
    """The model and inputs to trace it with; no model where the reference is a recording."""
    return Resources(
        model=(lambda: run.model.module) if run.options.reference is None else None,
        feeds=lambda: _export_feeds(run),
    )


def _resources(run: Context, graph: _Graph, calibration_sha256: str | None) -> Resources:
    """What a build may ask for; each is opened only when it is asked for."""
    calibrates = calibration_sha256 is not None
    size = batch_size(run.file)
    return replace(
        model_resources(run),
        calibration=(lambda: (batch.inputs for batch in run.calibration()[0].batches(size))) if calibrates else None,
        calibration_sha256=calibration_sha256,
        onnx_sha256=graph.sha256,
        progress=run.observer.phase,
    )


def _option_digests(engine: EngineSpec) -> dict[str, str]:
    """sha256 of the files that the options name and that decide what is built.

    Raises:
        BuildError: A plugin library is missing.
    """
    found: dict[str, str] = {}
    for name in engine.options.plugins or ():
        if not Path(name).is_file():
            raise BuildError(
                f"there is no plugin library {name}", hint="options.plugins starts from the spec's folder."
            )
        found[name] = file_digest(Path(name))
    cache = engine.options.calibration_cache
    if cache is not None and Path(cache).is_file():
        found[cache] = file_digest(Path(cache))
    return found


def _keep_for_its_own_ranges(run: Context, engine: EngineSpec, entry: Entry, parts: Mapping[str, object]) -> None:
    """Keep an engine under the key that it has now, too, where its build wrote the calibration cache that it names.

    The next check finds that file, so it asks for another key. Only where the file holds what this build found.
    """
    path = engine.options.calibration_cache
    digests = _option_digests(engine)
    if path is None or CALIBRATION_NAME not in entry.files or digests == parts["files"]:
        return
    if digests.get(path) != entry.sha256(CALIBRATION_NAME):
        return

    def copied(folder: Path) -> None:
        for name in entry.files:
            shutil.copyfile(entry.path(name), folder / name)

    run.cache.put("engine", run.cache.entry_key(**{**parts, "files": digests}), copied, entry.meta)


def _model_parts(run: Context) -> dict[str, object]:
    """What an engine that PyTorch compiles depends on beside the model: the processor, and what its outputs are called."""
    from gate.device import fingerprint

    host = fingerprint(for_gpu=False)
    return {"processor": [host.os, *host.isa], "names": list(run.spec.model.output_names)}


def _device_key(backend: Backend, engine: EngineSpec) -> str:
    """What a compiled engine depends on beside its inputs: the GPU where there is one, and whether TF32 is kept off it."""
    from gate.device import fingerprint

    if backend.runs_here(engine) is not Evidence.DEVICE:
        return "host"
    device = fingerprint(for_gpu=True)
    tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE")
    return f"{device.name} {device.compute_capability} {device.driver} NVIDIA_TF32_OVERRIDE={tf32}"


def _require_file(path: Path, run: Context, engine: EngineSpec, key: str) -> None:
    if not path.is_file():
        raise BuildError(f"there is no {path}", where=run.file.engine_location(engine.name, key))


@dataclass(frozen=True)
class Lowered:
    """The exported graph in an engine's precision. `record` is None where it comes from a recording."""

    path: Path
    sha256: str
    opset: int
    calibration_sha256: str | None
    reused: bool
    notes: tuple[str, ...] = ()
    record: LoweringRecord | None = None


def graph_name(engine: EngineSpec) -> str:
    """What an engine's lowered graph is called in a recording: its precision, and a digest of how where it says how."""
    if engine.lowering == LoweringSpec():
        return engine.precision
    return f"{engine.precision}-{sha256_hex(msgspec.json.encode(engine.lowering))[:8]}"


def _looks_at_samples(run: Context, engine: EngineSpec) -> bool:
    """Whether the calibration samples decide what the graph is lowered to."""
    calibrated = engine.precision in QUANTIZED and not engine.brings_scales
    return calibrated or (engine.lowering.data_max is not None and run.spec.data.calibrates)


def _require_same_calibration(run: Context, engine: EngineSpec, graph: RecordedGraph) -> None:
    """Hold the samples that a recorded graph was calibrated on against those of the spec.

    Raises:
        DataError: They differ, or one of both has none.
    """
    here = run.calibration()[1].inputs_sha256 if _looks_at_samples(run, engine) else None
    if graph.calibration_sha256 == here:
        return
    then, now = ("none" if each is None else f"{each[:12]}…" for each in (graph.calibration_sha256, here))
    raise DataError(
        f"the recorded graph in {graph_name(engine)} was calibrated on other samples (recorded {then}, [data] gives {now})",
        where=str(run.options.reference),
        hint=f"Record it again: gate record {run.file.path} -o DIR",
    )


def lowered_graph(run: Context, engine: EngineSpec, exported: Exported) -> Lowered:
    """The exported graph in an engine's precision: from the recording, from the cache, or made now."""
    if run.options.reference is not None:
        graph = recorded_graph(run.options.reference, graph_name(engine))
        _require_same_calibration(run, engine, graph)
        return Lowered(graph.path, onnx_digest(graph.path), graph.opset, graph.calibration_sha256, reused=True)
    from gate.lower import lower, tool_version

    calibration_sha256: str | None = None
    with run.stage("lower", engine=engine.precision):
        looks_at_samples = _looks_at_samples(run, engine)
        if looks_at_samples:
            calibration_sha256 = run.calibration()[1].inputs_sha256
        key = run.cache.entry_key(
            onnx=exported.sha256,
            precision=engine.precision,
            lowering=msgspec.to_builtins(engine.lowering),
            calibration=calibration_sha256,
            batch=batch_size(run.file) if looks_at_samples else None,
            tool=tool_version(engine.precision, engine.lowering),
        )
        entry = run.cache.get("lowered", key)
        reused = entry is not None
        if entry is None:
            meta: dict[str, object] = {}

            def make(folder: Path) -> None:
                batches = (
                    (batch.inputs for batch in run.calibration()[0].batches(batch_size(run.file)))
                    if looks_at_samples
                    else None
                )
                path = folder / "model.onnx"
                record = lower(
                    exported.path, precision=engine.precision, out=path, calibration=batches, lowering=engine.lowering
                )
                meta.update(msgspec.to_builtins(record))

            entry = run.cache.put("lowered", key, make, meta)
    record = msgspec.convert(entry.meta, LoweringRecord)
    return Lowered(
        path=entry.path("model.onnx"),
        sha256=graph_digest(entry),
        opset=record.opset,
        calibration_sha256=calibration_sha256,
        reused=reused,
        notes=record.notes,
        record=record,
    )
