"""The reference: what the engines are compared with, recorded once and read back batch by batch.

A recording is content-addressed. Its key holds the factory's name, the digest of the weights, the code of the factory
and of every local module that it loaded, that of the installed modules which define the model's layers, what is
installed, and the inputs. Where the spec names the weight files, a later run finds the recording without importing
PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from gate.atomic import digest_of_stream, discard
from gate.data.batches import Batch
from gate.data.samples import DataDigest, SampleSource, all_batches
from gate.device import gpu
from gate.engines.graph import external_files, unsafe_external_file
from gate.errors import DataError, RunError, SpecError
from gate.factory import opened_files
from gate.spec import InputSpec, SpecFile
from gate.tensors import Array

if TYPE_CHECKING:
    from gate.cache import Cache
    from gate.engines.interface import Runner

RECORDING = "recording.json"


@dataclass(frozen=True)
class OutputScale:
    """What is known of one reference output before any engine is compared with it.

    Args:
        rms: Root mean square over all its elements; 0.0 for an output that is not floating.
        center: float64 mean over the samples, per element of a sample; None where samples differ in shape or the
            output has no batch axis.
        batch_axis: Whether its first axis is the batch.
    """

    rms: float
    center: npt.NDArray[np.float64] | None
    batch_axis: bool


@dataclass(frozen=True)
class ModelIdentity:
    """What the reference's answers depend on, beside its inputs.

    Args:
        sha256: Over weights, code, and versions.
        weights_sha256: Of the weights alone; None for stored outputs.
        title: For a reader: `torch 2.13.0 fp32`.
        depends: sha256 of each file that it was made from, by its path from the spec's folder.
    """

    sha256: str
    weights_sha256: str | None
    title: str
    depends: Mapping[str, str] = field(default_factory=dict)


class ReferenceModel:
    """The reference model, loaded only when something needs it.

    Args:
        file: The spec.
        cache: Where its identity is remembered, so that a later run need not load it to know it.
    """

    def __init__(self, file: SpecFile, cache: Cache) -> None:
        self._file = file
        self._cache = cache
        self._module: Any = None
        self._opened: list[Path] = []
        self._identity: ModelIdentity | None = None

    @property
    def kind(self) -> str:
        """`factory`, `onnx` or `outputs`."""
        model = self._file.spec.model
        return "factory" if model.factory is not None else "onnx" if model.onnx is not None else "outputs"

    @property
    def module(self) -> Any:
        """The `torch.nn.Module` that the factory returns.

        Raises:
            SpecError: There is no such factory.
            RunError: The factory failed.
        """
        if self._module is None:
            from gate.factory import load_callable

            factory = self._file.spec.model.factory
            if factory is None:
                raise RunError("the reference is no PyTorch factory", where=str(self._file.path))
            where = f"[model] factory = {factory!r}"
            with opened_files() as self._opened:
                function = load_callable(factory, self._file.folder, where=where)
                try:
                    module = function()
                except Exception as err:
                    raise RunError(f"failed: {type(err).__name__}: {err}", where=where) from err
            _require_fp32(module, where)
            self._module = module
        return self._module

    def identity(self) -> ModelIdentity:
        """What its answers depend on.

        Raises:
            SpecError: A file that the spec names does not exist.
            RunError: The factory failed.
        """
        if self._identity is None:
            self._identity = self._find_identity()
        return self._identity

    def _find_identity(self) -> ModelIdentity:
        model = self._file.spec.model
        if model.onnx is not None:
            path = self._existing("onnx", model.onnx)
            digest = onnx_digest(path)
            _require_fp32_graph(path, f"[model] onnx = {model.onnx!r}")
            title = f"onnx fp32 on onnxruntime {_version('onnxruntime')}"
            return ModelIdentity(digest, digest, title, {model.onnx: file_digest(path)})
        if model.outputs is not None:
            path = self._existing("outputs", model.outputs)
            digest = file_digest(path / RECORDING if path.is_dir() else path)
            return ModelIdentity(digest, None, "stored outputs", {} if path.is_dir() else {model.outputs: digest})
        declared = {name: file_digest(self._existing("weights", name)) for name in model.weight_files}
        torch_version = _version("torch")
        environment = _environment_digest()
        title = f"torch {torch_version} fp32{_on_device(model.device)}"
        key = self._cache.entry_key(
            factory=model.factory,
            folder=str(self._file.folder),
            weights=declared,
            torch=torch_version,
            environment=environment,
            prefix=sys.prefix,
        )
        if declared:
            entry = self._cache.get("model", key)
            if entry is not None:
                if self._unchanged({**entry.meta["depends"], **entry.meta["installed"]}):
                    depends = {**entry.meta["depends"], **declared}
                    return ModelIdentity(entry.meta["identity"], entry.meta["weights_sha256"], title, depends)
                discard(entry.folder)
        from gate.factory import local_sources, state_digest

        weights = state_digest(self.module)
        functions = (self._file.spec.data.source, self._file.spec.data.calibration)
        data = [each.partition(":")[0] for each in functions if each is not None]
        sources = local_sources(str(model.factory), self._file.folder, self.module, apart=data)
        files = {*sources, *self._read_by_the_factory()}
        depends = {self._relative(path): file_digest(path) for path in sorted(files)}
        # By the module's name, not by its path: the same code in another environment is the same model.
        modules = {
            name: (path, file_digest(path))
            for name, path in sorted(_installed_modules(str(model.factory), self.module).items())
            if path not in files
        }
        parts = {
            "factory": model.factory,
            "weights": weights,
            "declared": declared,
            "depends": depends,
            "modules": {name: digest for name, (_, digest) in modules.items()},
            "torch": torch_version,
            "environment": environment,
        }
        identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        if declared:
            installed = {str(path): digest for path, digest in modules.values()}
            meta = {"identity": identity, "weights_sha256": weights, "depends": depends, "installed": installed}
            self._cache.put("model", key, lambda folder: _write_identity(folder, identity), meta)
        return ModelIdentity(identity, weights, title, {**depends, **declared})

    def _read_by_the_factory(self) -> set[Path]:
        """Files that the factory opened, named in the spec or not.

        Those that a library opens outside Python are not seen; safetensors does so, hence all of the spec's folder.
        """
        data = self._file.spec.data
        beside = set(self._file.folder.glob("*.safetensors"))
        beside -= {self._file.folder / each for each in (data.source or "", data.calibration or "") if each}
        return {path for path in (*self._opened, *(each.resolve() for each in beside)) if path.is_file()}

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self._file.folder)

    def _unchanged(self, depends: Mapping[str, str]) -> bool:
        return not any(_differs(self._file.folder / name, digest) for name, digest in depends.items())

    def _existing(self, key: str, name: str) -> Path:
        path = self._file.folder / name
        if not path.exists():
            raise SpecError(f"[model] {key}: there is no {path}", where=self._file.location("model", key))
        return path

    def runner(self) -> Runner:
        """The reference, ready to run.

        Raises:
            RunError: It cannot be loaded.
            BackendUnavailable: It is to run on a GPU, and PyTorch finds none.
        """
        model = self._file.spec.model
        if model.onnx is not None:
            from gate.engines.onnxruntime import reference_runner

            return reference_runner(self._existing("onnx", model.onnx), spec=self._file.spec)
        from gate.engines.torch.runner import TorchRunner

        return TorchRunner(self.module, spec=self._file.spec, device=model.device)


def _installed_modules(factory: str, model: Any) -> dict[str, Path]:
    """The file of each module that defines the factory or the class of a layer, by the module's name.

    PyTorch and the standard library are left out: their versions stand for them. What is not installed is left out,
    too: `gate.factory.local_sources` has it.

    Args:
        factory: `module:function`.
        model: What the factory returned.
    """
    layers = model.modules() if callable(getattr(model, "modules", None)) else ()
    classes = {cls for layer in (model, *layers) for cls in type(layer).__mro__}
    names = {factory.partition(":")[0], *(cls.__module__ for cls in classes)}
    folders = [folder.resolve() for folder in _package_folders()]
    found: dict[str, Path] = {}
    for name in names:
        top = name.partition(".")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        if top == "torch" or top in sys.stdlib_module_names or not isinstance(file, str):
            continue
        path = Path(file).resolve()
        if path.is_file() and any(path.is_relative_to(folder) for folder in folders):
            found[name] = path
    return found


def _on_device(device: str) -> str:
    """Where the reference runs, for its title: nothing for the CPU, ` on NVIDIA L4` for that GPU."""
    if device == "cpu":
        return ""
    found = gpu()
    return f" on {device if found is None else found.name}"


def _differs(path: Path, digest: str) -> bool:
    return not path.is_file() or file_digest(path) != digest


def _require_fp32(module: Any, where: str) -> None:
    """Refuse a module whose weights are narrower than FP32: it would be compared with itself.

    Raises:
        RunError: One is; names it.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        return
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise RunError(
                f"the reference must be FP32, and its {name!r} is {str(tensor.dtype).removeprefix('torch.')}",
                where=where,
                hint="Let the factory return model.float().",
            )


def _require_fp32_graph(path: Path, where: str) -> None:
    """As `_require_fp32`, for the layers of an ONNX file that multiply.

    Raises:
        DataError: One computes in less.
    """
    import onnx

    from gate.engines.graph import layers_of
    from gate.precision import compute_layers

    layers = compute_layers(layers_of(onnx.load(path, load_external_data=False)))
    if narrow := [each for each in layers if each.precision not in ("fp32", "fp64", "unknown")]:
        raise DataError(
            f"the reference must be FP32, and {narrow[0].name} ({narrow[0].type}) computes in {narrow[0].precision}",
            where=where,
            hint="Name the graph as it was before it was lowered.",
        )


def _write_identity(folder: Path, identity: str) -> None:
    (folder / "identity").write_text(identity + "\n", encoding="ascii")


@dataclass(frozen=True)
class Recording:
    """Recorded outputs of the reference.

    Args:
        folder: Holds one safetensors file a batch.
        files: Their names, in order.
        firsts: Index of the first sample of each.
        outputs: Scales by output name, in the model's order.
        sha256: Its key.
        reused: Whether it came from the cache.
    """

    folder: Path
    files: tuple[str, ...]
    firsts: tuple[int, ...]
    outputs: Mapping[str, OutputScale]
    sha256: str
    reused: bool

    def batches(self) -> Iterator[dict[str, Array]]:
        """The outputs of each batch, in order."""
        from safetensors.numpy import load_file

        for name in self.files:
            yield cast("dict[str, Array]", load_file(self.folder / name))


class _ScaleSum:
    """Running sums for one output's `OutputScale`."""

    def __init__(self) -> None:
        self.square = 0.0
        self.elements = 0
        self.samples = 0
        self.total: npt.NDArray[np.float64] | None = None
        self.uniform = True
        self.batch_axis = True

    def add(self, values: Array, size: int) -> None:
        self.batch_axis = self.batch_axis and values.ndim > 0 and values.shape[0] == size
        if values.dtype.kind != "f":
            return
        wide = values.astype(np.float64)
        self.square += float(np.square(wide).sum())
        self.elements += wide.size
        if not self.batch_axis:
            self.uniform = False
        if not self.uniform:
            return
        total = wide.sum(axis=0)
        if self.total is None:
            self.total = total
        elif self.total.shape == total.shape:
            self.total = self.total + total
        else:
            self.uniform = False
        self.samples += size

    def meta(self) -> dict[str, Any]:
        center = None
        if self.uniform and self.total is not None and self.samples:
            center = (self.total / self.samples).ravel().tolist()
        rms = (self.square / self.elements) ** 0.5 if self.elements else 0.0
        shape = list(self.total.shape) if center is not None and self.total is not None else None
        return {"rms": rms, "center": center, "shape": shape, "batch_axis": self.batch_axis}


def record(
    model: ReferenceModel,
    *,
    file: SpecFile,
    source: SampleSource,
    digest: DataDigest,
    cache: Cache,
    advance: Callable[[], None],
) -> Recording:
    """The recorded reference for these samples: from the cache, or run now.

    Raises:
        RunError: The reference failed, gave a NaN or Inf, or its outputs do not fit the spec.
        DataError: Stored outputs are of another number of samples.
    """
    identity = model.identity()
    batch = batch_size(file)
    key = cache.entry_key(
        model=identity.sha256,
        inputs=digest.inputs_sha256,
        batch=batch,
        outputs=list(file.spec.model.output_names),
        runtime=identity.title,
    )
    entry = cache.get("reference", key)
    if entry is not None:
        return _recording(entry.folder, entry.meta, reused=True, sha256=key)
    meta: dict[str, Any] = {}

    def make(folder: Path) -> None:
        outputs = (
            _stored_batches(file, source, batch)
            if model.kind == "outputs"
            else _run_batches(model, file, source, batch)
        )
        meta.update(_write_batches(outputs, folder, advance))
        meta["samples"] = len(source)
        meta["inputs_sha256"] = digest.inputs_sha256
        meta["model_sha256"] = identity.sha256
        meta["weights_sha256"] = identity.weights_sha256
        meta["title"] = identity.title

    entry = cache.put("reference", key, make, meta)
    return _recording(entry.folder, entry.meta, reused=False, sha256=key)


def batch_size(file: SpecFile) -> int:
    """How many samples go through at a time: `[data] batch`, within what the first axis allows."""
    first = next(iter(file.spec.inputs.values()))
    axis = first.shape[0]
    return axis if isinstance(axis, int) else max(1, min(file.spec.data.batch, first.axes[axis].max))


def _run_batches(
    model: ReferenceModel, file: SpecFile, source: SampleSource, batch: int
) -> Iterator[tuple[int, int, dict[str, Array]]]:
    with model.runner() as runner:
        for each in all_batches(source, batch):
            yield each.first, each.size, run_filled(runner, each, inputs=file.spec.inputs)


def run_filled(runner: Runner, batch: Batch, *, inputs: Mapping[str, InputSpec]) -> dict[str, Array]:
    """The outputs for a batch; one smaller than the profile allows is filled up with its last sample, and cut again.

    Raises:
        RunError: As `Runner.run`.
    """
    least = next(iter(inputs.values())).sized("min")[0]
    if batch.size >= least:
        return runner.run(batch.inputs)
    rows = np.minimum(np.arange(least), batch.size - 1)
    outputs = runner.run({name: np.ascontiguousarray(values[rows]) for name, values in batch.inputs.items()})
    return {
        name: values[: batch.size] if values.ndim and values.shape[0] == least else values
        for name, values in outputs.items()
    }


def _stored_batches(file: SpecFile, source: SampleSource, batch: int) -> Iterator[tuple[int, int, dict[str, Array]]]:
    name = str(file.spec.model.outputs)
    path = file.folder / name
    where = f"[model] outputs = {name!r}"
    if path.is_dir():
        raise SpecError(f"{path} is a folder; give it with --reference, or name a safetensors or npz file", where=where)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
        else:
            from safetensors.numpy import load_file

            arrays = load_file(path)
    except Exception as err:
        raise DataError(f"{path} cannot be read: {err}", where=where) from err
    if not arrays:
        raise DataError(f"{path} holds no outputs", where=where)
    for key, values in arrays.items():
        if values.dtype.kind not in "biuf":
            raise DataError(f"output {key!r} is {values.dtype}, expected numbers", where=where)
        if values.ndim == 0 or len(values) != len(source):
            raise DataError(
                f"output {key!r} has shape {list(values.shape)}, there are {len(source)} samples", where=where
            )
    for each in source.batches(batch):
        yield (
            each.first,
            each.size,
            {key: values[each.first : each.first + each.size] for key, values in arrays.items()},
        )


def _write_batches(
    outputs: Iterator[tuple[int, int, dict[str, Array]]], folder: Path, advance: Callable[[], None]
) -> dict[str, Any]:
    from safetensors.numpy import save_file

    files: list[str] = []
    firsts: list[int] = []
    sums: dict[str, _ScaleSum] = {}
    for first, size, arrays in outputs:
        if sums and arrays.keys() != sums.keys():
            raise RunError(f"the reference gave outputs {sorted(arrays)} at sample {first}, before {sorted(sums)}")
        for name, values in arrays.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise RunError(
                    f"the reference itself gives NaN or Inf in output {name!r} in samples {first} to {first + size - 1}",
                    hint="No engine can be judged by it. Look at the weights and the inputs.",
                )
            sums.setdefault(name, _ScaleSum()).add(values, size)
        files.append(f"batch-{len(files):05d}.safetensors")
        firsts.append(first)
        # np.ascontiguousarray would make a scalar an array of one element
        save_file({name: np.asarray(values, order="C") for name, values in arrays.items()}, folder / files[-1])
        advance()
    if not sums:
        raise RunError("the reference gave no outputs")
    return {
        "files": files,
        "firsts": firsts,
        "names": list(sums),
        "outputs": {name: each.meta() for name, each in sums.items()},
    }


def _recording(folder: Path, meta: Mapping[str, Any], *, reused: bool, sha256: str) -> Recording:
    outputs: dict[str, OutputScale] = {}
    for name in meta["names"]:
        raw = meta["outputs"][name]
        center = None if raw["center"] is None else np.asarray(raw["center"], dtype=np.float64).reshape(raw["shape"])
        outputs[name] = OutputScale(rms=float(raw["rms"]), center=center, batch_axis=bool(raw["batch_axis"]))
    return Recording(
        folder=folder,
        files=tuple(meta["files"]),
        firsts=tuple(meta["firsts"]),
        outputs=outputs,
        sha256=sha256,
        reused=reused,
    )


def read_recording(folder: Path, *, file: SpecFile, digest: DataDigest) -> tuple[Recording, ModelIdentity]:
    """A recording made by `gate record`, for a host without PyTorch.

    Raises:
        DataError: It is incomplete, its bytes changed, or it was recorded for other samples.
    """
    where = str(folder / RECORDING)
    try:
        raw = json.loads((folder / RECORDING).read_bytes())
        meta, digests = dict(raw["meta"]), dict(raw["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        why = "there is no such file" if isinstance(err, FileNotFoundError) else str(err)
        raise DataError(f"is no recording: {why}", where=where, hint="make one: gate record gate.toml -o DIR") from err
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != expected:
            raise DataError(f"{name} is missing or its digest differs from the recorded one", where=where)
    if raw.get("digest") != _recording_digest(raw):
        raise DataError("its own digest does not hold: it was changed after it was recorded", where=where)
    if set(meta["files"]) - set(digests):
        raise DataError("lists batches without a digest", where=where)
    if meta["inputs_sha256"] != digest.inputs_sha256:
        raise DataError(
            f"was recorded for other samples ({meta['inputs_sha256'][:12]}…, here are {digest.inputs_sha256[:12]}…)",
            where=where,
        )
    if differences := _differences(meta["spec_model"], _model_fields(file)):
        raise DataError(
            f"was recorded for another [model] than the spec's: {'; '.join(differences)}",
            where=where,
            hint=f"Record it again: gate record {file.path} -o DIR",
        )
    for name, expected in meta["depends"].items():
        path = file.folder / name
        if path.is_file() and file_digest(path) != expected:
            raise DataError(
                f"was recorded before {name} changed",
                where=where,
                hint="Record it again: gate record gate.toml -o DIR",
            )
    recording = _recording(folder, meta, reused=True, sha256=raw["key"])
    return recording, ModelIdentity(meta["model_sha256"], meta["weights_sha256"], meta["title"])


@dataclass(frozen=True)
class RecordedGraph:
    """An ONNX graph of a recording: the export, or that in an engine's precision.

    Args:
        path: Of the graph; external data lies beside it.
        opset: Of its default domain.
        calibration_sha256: Of the samples that it was calibrated on; None where it was not.
    """

    path: Path
    opset: int
    calibration_sha256: str | None = None


def recorded_graph(folder: Path, precision: str) -> RecordedGraph:
    """The graph of a recording in a precision.

    Raises:
        DataError: The recording has none.
    """
    raw = json.loads((folder / RECORDING).read_bytes())["meta"]["graphs"]
    if precision not in raw:
        raise DataError(
            f"has no graph in {precision}; it has {', '.join(sorted(raw)) or 'none'}",
            where=str(folder / RECORDING),
            hint="Record it again with this spec: gate record gate.toml -o DIR",
        )
    found = raw[precision]
    return RecordedGraph(folder / found["path"], found["opset"], found["calibration_sha256"])


def write_recording(
    entry: Recording,
    folder: Path,
    *,
    file: SpecFile,
    identity: ModelIdentity,
    digest: DataDigest,
    graphs: Mapping[str, RecordedGraph],
) -> None:
    """Write a recording and the graphs of its engines into a folder that exists and is empty.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    names = [*entry.files]
    for name in names:
        shutil.copyfile(entry.folder / name, folder / name)
    stored: dict[str, Any] = {}
    for precision, graph in graphs.items():
        (folder / precision).mkdir()
        beside = [graph.path, *(graph.path.parent / location for location in external_data(graph.path))]
        for path in beside:
            name = f"{precision}/{path.relative_to(graph.path.parent)}"
            shutil.copyfile(path, folder / name)
            names.append(name)
        stored[precision] = {
            "path": f"{precision}/{graph.path.name}",
            "opset": graph.opset,
            "calibration_sha256": graph.calibration_sha256,
        }
    meta = {
        "files": list(entry.files),
        "firsts": list(entry.firsts),
        "names": list(entry.outputs),
        "outputs": {
            name: {
                "rms": scale.rms,
                "center": None if scale.center is None else scale.center.ravel().tolist(),
                "shape": None if scale.center is None else list(scale.center.shape),
                "batch_axis": scale.batch_axis,
            }
            for name, scale in entry.outputs.items()
        },
        "inputs_sha256": digest.inputs_sha256,
        "model_sha256": identity.sha256,
        "weights_sha256": identity.weights_sha256,
        "title": identity.title,
        "spec_model": _model_fields(file),
        "depends": dict(identity.depends),
        "graphs": stored,
    }
    raw: dict[str, Any] = {
        "key": entry.sha256,
        "meta": meta,
        "files": {name: file_digest(folder / name) for name in names},
    }
    raw["digest"] = _recording_digest(raw)
    (folder / RECORDING).write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _recording_digest(raw: Mapping[str, Any]) -> str:
    """Over all that `recording.json` says: scales and digests cannot be edited without it."""
    held = {key: value for key, value in raw.items() if key != "digest"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _model_fields(file: SpecFile) -> dict[str, Any]:
    """What a recording depends on of [model]: which model, and, where the gate exports it, how."""
    model = file.spec.model
    fields: dict[str, Any] = {
        "id": model.id,
        "factory": model.factory,
        "onnx": model.onnx,
        "output_names": list(model.output_names),
    }
    if model.factory is not None:
        fields |= {"opset": model.opset, "exporter": list(model.exporter), "simplify": model.simplify}
    return fields if model.device == "cpu" else {**fields, "device": model.device}


def _differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Where a recording's [model] differs from the spec's; a key that the recording does not have differs, too."""
    return [
        f"recorded {_said(recorded, key)}, the spec says {_told(asked[key]) if key in asked else 'nothing'}"
        for key in sorted({*recorded, *asked})
        if key not in recorded or key not in asked or recorded[key] != asked[key]
    ]


def _said(fields: Mapping[str, Any], key: str) -> str:
    return f"with {key} {_told(fields[key])}" if key in fields else f"without its {key}"


def _told(value: object) -> str:
    """A value as a spec has it, and a word for none."""
    return "none" if value is None else json.dumps(value)


def file_digest(path: Path) -> str:
    """sha256 of a file, which may be a link."""
    with path.open("rb") as stream:
        return digest_of_stream(stream).sha256


def onnx_digest(path: Path) -> str:
    """sha256 of an ONNX file and of the external data beside it.

    Raises:
        DataError: It is no ONNX file, or its external data is missing, a link, or outside its folder.
    """
    digest = hashlib.sha256(file_digest(path).encode())
    for location in external_data(path):
        digest.update(f"{location}:{file_digest(path.parent / location)}".encode())
    return digest.hexdigest()


def external_data(path: Path) -> tuple[str, ...]:
    """The external data files of an ONNX file, relative to its folder.

    Raises:
        DataError: It is no ONNX file, or its external data is missing, a link, or outside its folder.
    """
    import onnx

    try:
        names = external_files(onnx.load(path, load_external_data=False))
    except Exception as err:
        raise DataError(f"is no ONNX file: {err}", where=str(path)) from err
    if (wrong := unsafe_external_file(path, names)) is not None:
        raise DataError(wrong, where=str(path))
    return names


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _package_folders() -> tuple[Path, ...]:
    """The folders that packages are installed in."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return tuple(dict.fromkeys(map(Path, folders)))


def _environment_digest() -> str:
    """Python's version and names and versions of everything installed, from the folder names alone."""
    names = {f"python {platform.python_version()}"}
    for folder in _package_folders():
        if folder.is_dir():
            names.update(each.name for each in folder.iterdir() if each.name.endswith((".dist-info", ".egg-info")))
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
