"""`gate inspect PATH`: what a bundle, a plan, an ONNX file or an AOTInductor package is, without running it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gate.cli import COMMANDS
from gate.engines.interface import CalibrationRecord, Layer
from gate.errors import BackendUnavailable, BundleError, ExitCode, GateError, SpecError

if TYPE_CHECKING:
    from gate.engines.tensorrt.layers import Inspection
    from gate.engines.tensorrt.plan import PlanHeader
    from gate.metadata import Metadata
    from gate.store import SealedBundle
    from gate.verdict import Failure, Finding

LONGEST_NAME = 48
"""Characters of a layer's name or tactic on a terminal; what is longer loses its middle."""

_DEFAULTS = {"provider": "CPUExecutionProvider", "optimization": "all", "hardware_compatible": "none"}
"""Options of a build that are shown only where they differ, as those that are null, false or empty."""

_HEAD_BYTES = 64
_MOST_ONNX_BYTES = 2**31 - 1
"""Source: protobuf's limit for one message."""
_ONNX_BEGINS = b"\x08"
"""Field 1, a number: the version of the format, which is written first. Source: onnx.proto3, ModelProto.ir_version."""
_PLAN_SUFFIXES = (".plan", ".engine", ".trt")
_WHAT = "a bundle, a plan of TensorRT or TensorRT-RTX, an ONNX file or an AOTInductor package"


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output.

    Args:
        shape: Sizes; a dynamic axis is its name, or null where it has none.
    """

    name: str
    dtype: str
    shape: list[int | str | None] | None


class Delivered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether the layers have the precision that was asked for."""

    status: Literal["PASSED", "FAILED", "INCONCLUSIVE"]
    message: str
    detail: str


class SealedFor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a bundle's verdict says it is for, and rests on; nobody looked whether its signature holds.

    Args:
        verdict_sha256: What approvals, the ledger and a revocation name it by.
        slots: What it may be deployed as.
        serial, not_after: Its order, and its end.
        keys: Ids of the keys that are said to have signed.
        spec, data, baseline: SHA-256 digests, as a trust policy pins them.
    """

    verdict_sha256: str
    slots: tuple[str, ...]
    serial: int
    not_after: str
    keys: tuple[str, ...]
    spec: str
    data: str
    baseline: str | None


class Inspected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file or bundle is. None: it does not say, or that cannot be read here; `notes` says why.

    Args:
        path: As it was given.
        kind: What it is.
        file: The engine's file in a bundle.
        sha256, size_bytes: Of the engine's file.
        backend, backend_version: What made it, and what runs it.
        precision: As asked for.
        evidence: Of a bundle's verdict; `preflight`: its device is where it was compiled, and it did not run.
        sealed_for: What the verdict says it is for, and rests on.
        lowering: How a bundle's graph was made, as in its metadata.
        calibration: What it was quantised by, of the lowering or of the compiler.
        layers: All of them.
        layers_source: Where the list comes from: `network`, `inspector`, `graph`.
        counts: Number of layers by precision; `compute_counts` of those that multiply.
        options: Of the build.
        command: The same build by the vendor's own tool.
    """

    schema_version: Literal[1] = 1
    path: str
    kind: Literal["bundle", "plan", "onnx", "aotinductor"]
    file: str | None = None
    sha256: str
    size_bytes: int
    backend: str | None = None
    backend_version: str | None = None
    model_id: str | None = None
    engine: str | None = None
    precision: str | None = None
    device: str | None = None
    opset: int | None = None
    inputs: tuple[Tensor, ...] | None = None
    outputs: tuple[Tensor, ...] | None = None
    profile: dict[str, dict[str, list[int]]] | None = None
    layers: tuple[Layer, ...] | None = None
    layers_source: str | None = None
    counts: dict[str, int] | None = None
    compute_counts: dict[str, int] | None = None
    delivered_precision: Delivered | None = None
    verdict: str | None = None
    evidence: str | None = None
    sealed_for: SealedFor | None = None
    lowering: dict[str, Any] | None = None
    calibration: CalibrationRecord | None = None
    options: dict[str, Any] | None = None
    command: str | None = None
    notes: tuple[str, ...] = ()


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "inspect",
        help=COMMANDS["inspect"],
        description=f"Say what {_WHAT} is: what made it, its precision, and its layers. A bundle is verified first. "
        "The layers of a plan outside a bundle are read on a GPU, by deserialising it: give only plans that you trust.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help=_WHAT)
    parser.add_argument(
        "--layers",
        choices=("compute", "all"),
        default="compute",
        help="the layers to show: those that multiply (compute), or all",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Look, and show; exit 4 where a bundle does not verify.

    Raises:
        SpecError: There is no such file, or it is nothing that can be inspected.
    """
    from gate.report.screen import show, terminal_width

    try:
        found = inspected(args.path)
    except BundleError as err:
        print(f"REFUSED  {err}", file=sys.stderr)
        return ExitCode.REFUSED
    if args.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        width = terminal_width(sys.stdout)
        show(render(found, everything=args.layers == "all", shorten=width is not None), sys.stdout)
    return ExitCode.PASSED


def inspected(path: Path) -> Inspected:
    """What lies at a path, by its content.

    Raises:
        SpecError: There is nothing, or nothing that can be inspected, such as a folder that is no bundle.
        BundleError: It is a bundle that does not verify, or a file in one.
        BackendUnavailable: It is an ONNX file, and `onnx` is not installed.
    """
    where = str(path)
    if path.is_dir():
        _require_bundle(path)
        return _bundle(path, path)
    if not path.is_file():
        raise SpecError("there is no such file or folder", where=where, hint=f"Give {_WHAT}.")
    if (holder := _bundle_around(path)) is not None:
        return _bundle(holder, path)
    from gate.atomic import digest_of_stream
    from gate.engines.tensorrt.plan import read_header

    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
            stream.seek(0)
            digest = digest_of_stream(stream)
    except OSError as err:
        raise SpecError(f"cannot be read: {err.strerror}", where=where) from err
    common = {"path": where, "sha256": digest.sha256, "size_bytes": digest.size_bytes}
    header = read_header(head)
    if header is not None:
        return _plan(path, header, common)
    if path.suffix in _PLAN_SUFFIXES:
        raise SpecError(
            f"is no plan of TensorRT 8.6 or above or of TensorRT-RTX, or only the beginning of one ({digest.size_bytes} bytes)",
            where=where,
            hint="Build it again, or copy it again.",
        )
    if head.startswith(b"PK"):
        return _package(path, common)
    return _onnx(path, common)


def _require_bundle(folder: Path) -> None:
    """Tell a folder that is no bundle from one that does not verify.

    Raises:
        SpecError: It has no manifest nor anything else of a bundle; names the bundles in it, or that it lies in.
    """
    from gate.cli.check import pasted
    from gate.cli.verify import bundles_below
    from gate.metadata import METADATA_PATH
    from gate.store import VERDICT_PATH

    manifest = folder / VERDICT_PATH
    if manifest.exists() or manifest.parent.exists() or (folder / METADATA_PATH).exists():
        return
    where = str(folder)
    for holder in folder.resolve().parents:
        if (holder / VERDICT_PATH).is_file():
            raise SpecError(
                f"is a folder inside the bundle {holder}", where=where, hint=f"gate inspect {pasted(holder)}"
            )
    below = "\n".join(f"gate inspect {pasted(path)}" for path in bundles_below(folder))
    raise SpecError(
        f"is a folder, not a bundle (no {VERDICT_PATH})",
        where=where,
        hint=f"It holds bundles:\n{below}" if below else f"Give {_WHAT}.",
    )


def _bundle_around(path: Path) -> Path | None:
    """The bundle that a file lies in: nothing in one is opened before it verifies."""
    from gate.store import VERDICT_PATH

    folder = path.resolve().parent.parent
    return folder if (folder / VERDICT_PATH).is_file() else None


def _bundle(folder: Path, given: Path) -> Inspected:
    from gate.precision import CHECK, check_delivered_precision
    from gate.store import verify_seal
    from gate.verdict import Evidence

    verified = verify_seal(folder)
    metadata, build = verified.metadata, verified.metadata.build
    signed = "signed; by whom, gate verify --policy says" if verified.signed_by else "not signed"
    notes = [f"intact: {len(verified.files)} files; {signed}", *metadata.warnings]
    if given != folder:
        notes.insert(0, f"a file of the bundle {folder}")
    if not build.layers:
        notes.append("its build record lists no layers")
    file = str(verified.engine.relative_to(folder))
    engine = verified.files[file]
    lowering = metadata.lowering
    # As it was judged, with what the spec excludes left out; an engine that needed no such check is looked at now.
    sealed = next((each.finding() for each in metadata.verdict.findings if each.check == CHECK), None)
    return Inspected(
        path=str(given),
        kind="bundle",
        file=file,
        sha256=engine.sha256,
        size_bytes=engine.size_bytes,
        backend=metadata.backend,
        backend_version=metadata.backend_version,
        model_id=metadata.model_id,
        engine=metadata.engine,
        precision=metadata.precision,
        device=_device(metadata),
        opset=metadata.onnx_opset,
        profile=build.profile,
        layers=build.layers or None,
        layers_source=build.layers_source,
        counts=_counts(build.layers),
        compute_counts=_compute_counts(build.layers),
        delivered_precision=_delivered(sealed or check_delivered_precision(build, evidence=Evidence.PREFLIGHT)),
        verdict=f"{metadata.verdict.status}, evidence: {metadata.verdict.evidence.value}",
        evidence=metadata.verdict.evidence.value,
        sealed_for=_sealed_for(verified),
        lowering=None if lowering is None else msgspec.to_builtins(lowering),
        calibration=build.calibration or (None if lowering is None else lowering.calibration),
        options=dict(build.options),
        command=build.command,
        notes=tuple(notes),
    )


def _sealed_for(bundle: SealedBundle) -> SealedFor:
    said = bundle.statement.predicate
    return SealedFor(
        verdict_sha256=bundle.verdict_sha256,
        slots=said.slots,
        serial=said.serial,
        not_after=said.not_after,
        keys=bundle.signed_by,
        spec=said.digests.spec,
        data=said.digests.data,
        baseline=said.digests.baseline,
    )


def _device(metadata: Metadata) -> str:
    gpu = metadata.gpu
    if gpu is None:
        return metadata.device.name
    driver = f", driver {metadata.driver}" if metadata.driver else ""
    return f"{gpu.name}, compute capability {gpu.compute_capability}{driver}"


def _delivered(finding: Finding | Failure) -> Delivered:
    from gate.verdict import Failure
    from gate.wording import finding_sentence

    detail = "" if isinstance(finding, Failure) else finding.detail
    message = finding_sentence(finding).partition(": ")[2]
    return Delivered(status=finding.status.value, message=message, detail=detail)


def _plan(path: Path, header: PlanHeader, common: dict[str, Any]) -> Inspected:
    from gate.device import gpu

    if header.length_bytes is not None and header.length_bytes != common["size_bytes"]:
        raise SpecError(
            f"is a plan of {header.made_by} that is truncated or damaged: {common['size_bytes']} bytes, "
            f"its header says {header.length_bytes}",
            where=str(path),
            hint="Build it again, or copy it again.",
        )
    found = Inspected(
        **common,
        kind="plan",
        backend=header.family,
        backend_version=None if header.version is None else ".".join(map(str, header.version)),
    )
    if gpu() is None:
        note = "its layers, inputs and outputs are read on the GPU that it was built for, and there is none here"
        return msgspec.structs.replace(found, notes=(note,))
    try:
        from gate.engines.tensorrt.layers import inspect_plan

        return with_inspection(found, inspect_plan(header.family, path))
    except GateError as err:
        return msgspec.structs.replace(found, notes=(f"its layers cannot be read here: {err.message}",))


def with_inspection(found: Inspected, inspection: Inspection) -> Inspected:
    """A plan with what its engine says of itself."""
    layers = tuple(inspection.layers) or None
    notes = [
        f"read by {inspection.runtime}; a context takes {inspection.device_memory_bytes / 2**20:.1f} MiB on the GPU"
    ]
    if layers is None:
        notes.append("the engine inspector lists no layers: it was built without detailed profiling verbosity")
    if len(inspection.profiles) > 1:
        notes.append(f"{len(inspection.profiles)} optimization profiles; the first is shown")
    tensors: dict[str, list[Tensor]] = {"input": [], "output": []}
    for each in inspection.tensors:
        tensors[each.mode].append(Tensor(each.meta.name, each.meta.dtype, list(each.meta.shape)))
    ranges = inspection.profiles[0].ranges if inspection.profiles else {}
    return msgspec.structs.replace(
        found,
        inputs=tuple(tensors["input"]),
        outputs=tuple(tensors["output"]),
        profile={
            name: dict(zip(("min", "opt", "max"), map(list, shapes), strict=True)) for name, shapes in ranges.items()
        },
        layers=layers,
        layers_source=None if layers is None else "inspector",
        counts=_counts(layers),
        compute_counts=_compute_counts(layers),
        notes=tuple(notes),
    )


def _package(path: Path, common: dict[str, Any]) -> Inspected:
    from gate.engines.torch.package import read_description

    try:
        told = read_description(path)
    except GateError as err:
        raise SpecError(err.message, where=err.where, hint=f"Give {_WHAT}.") from err
    parts = (told.device, told.machine, told.compute_capability, *told.isa)
    return Inspected(
        **common,
        kind="aotinductor",
        backend="torch",
        backend_version=told.torch,
        device=", ".join(part for part in parts if part),
        notes=("its layers are compiled code, so the package does not list them; a bundle's build record does",),
    )


def _onnx(path: Path, common: dict[str, Any]) -> Inspected:
    from gate.engines.graph import external_files, layers_of, opset_of, unsafe_external_file

    where = str(path)
    if common["size_bytes"] > _MOST_ONNX_BYTES:
        raise SpecError(f"is {common['size_bytes']} bytes, and no ONNX file is larger than 2 GiB", where=where)
    try:
        import onnx
    except ImportError as err:
        raise BackendUnavailable(
            f"reading it as ONNX needs onnx: {err}", where=where, hint='pip install "trt-gate[export]"'
        ) from err
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as err:  # protobuf's DecodeError, which is not imported for its lack of types
        raise _no_graph(path) from err
    if not model.ir_version or not model.opset_import or not model.graph.output:
        raise _no_graph(path)
    files = external_files(model)
    notes = [f"weights in {', '.join(files)}"] if files else []
    if files and (wrong := unsafe_external_file(path, files)) is not None:
        notes.append(wrong)
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = layers_of(model)
    return Inspected(
        **common,
        kind="onnx",
        opset=opset_of(model),
        inputs=tuple(_tensor(each) for each in model.graph.input if each.name not in weights),
        outputs=tuple(_tensor(each) for each in model.graph.output),
        layers=layers or None,
        layers_source="graph",
        counts=_counts(layers),
        compute_counts=_compute_counts(layers),
        notes=tuple(notes),
    )


def _no_graph(path: Path) -> SpecError:
    where = str(path)
    with path.open("rb") as stream:
        begins = stream.read(1)
    if path.suffix == ".onnx" and begins == _ONNX_BEGINS:
        return SpecError(
            "looks like ONNX and is truncated or damaged", where=where, hint="Export it again, or copy it again."
        )
    return SpecError("is nothing that can be inspected", where=where, hint=f"Give {_WHAT}.")


def _tensor(value: Any) -> Tensor:
    import onnx

    kind = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    shape: list[int | str | None] | None = None
    if kind.HasField("shape"):
        shape = [each.dim_value if each.HasField("dim_value") else each.dim_param or None for each in kind.shape.dim]
    return Tensor(value.name, {"float": "float32", "double": "float64"}.get(name, name), shape)


def _counts(layers: Sequence[Layer] | None) -> dict[str, int] | None:
    if not layers:
        return None
    return dict(Counter(layer.precision for layer in layers).most_common())


def _compute_counts(layers: tuple[Layer, ...] | None) -> dict[str, int] | None:
    from gate.precision import compute_layers

    return _counts(compute_layers(layers)) if layers else None


def render(found: Inspected, *, everything: bool = False, shorten: bool = False) -> str:
    """The screen: what it is, then its layers.

    Args:
        everything: Show every layer, not those alone that multiply.
        shorten: Take the middle out of long names.
    """
    facts = [(name, text) for name, text in _facts(found) if text]
    width = max(len(name) for name, _ in facts)
    lines = [_heading(found), *(f"  {name:<{width}}  {text}" for name, text in facts)]
    lines += [f"  {'note':<{width}}  {note}" for note in found.notes]
    lines += ["", *_layer_lines(found, everything=everything, shorten=shorten)] if found.layers else []
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _heading(found: Inspected) -> str:
    kind = {
        "bundle": f"bundle of engine {found.engine}",
        "plan": "plan",
        "onnx": "ONNX graph",
        "aotinductor": "AOTInductor package",
    }[found.kind]
    return f"{found.path}   {kind}"


def _facts(found: Inspected) -> Iterator[tuple[str, str]]:
    from gate.report.making import calibration_text
    from gate.wording import size_text

    yield "model", found.model_id or ""
    yield "file", found.file or ""
    yield "backend", f"{found.backend or ''} {found.backend_version or ''}".strip()
    yield "size", f"{size_text(found.size_bytes)}   sha256 {found.sha256}"
    yield "verdict", found.verdict or ""
    if (sealed := found.sealed_for) is not None:
        yield "", f"sha256 {sealed.verdict_sha256}"
        yield "sealed for", f"{', '.join(sealed.slots) or 'no slot'}, serial {sealed.serial}, until {sealed.not_after}"
        yield "rests on", f"spec     {sealed.spec}"
        yield "", f"data     {sealed.data}"
        yield "", f"baseline {sealed.baseline or 'none'}"
    yield "compiled on" if found.evidence == "preflight" else "device", found.device or ""
    yield "opset", str(found.opset or "")
    delivered = found.delivered_precision
    if delivered is not None:
        yield "precision", f"{found.precision}   {delivered.status}  {delivered.message}   {delivered.detail}"
    if (lowering := found.lowering) is not None:
        by = f"{lowering['tool']} {lowering['tool_version']}".strip()
        yield "lowered", "taken as it is" if lowering["tool"] == "copy" else f"{lowering['precision']} by {by}"
    if found.calibration is not None:
        yield "calibrated", f"by {calibration_text(found.calibration)}"
    for name, tensors in (("inputs", found.inputs), ("outputs", found.outputs)):
        yield name, ", ".join(f"{each.name} {each.dtype} {_shape(each.shape)}" for each in tensors or ())
    for name, ranges in (found.profile or {}).items():
        yield (
            f"profile {name}",
            " · ".join(f"{which} {ranges[which]}" for which in ("min", "opt", "max") if which in ranges),
        )
    chosen = {key: value for key, value in (found.options or {}).items() if value and _DEFAULTS.get(key) != value}
    for index, (key, value) in enumerate(chosen.items()):
        yield "" if index else "options", f"{key} = {_value(value)}"
    yield "command", found.command or ""


def _shape(shape: list[int | str | None] | None) -> str:
    return (
        "of unknown rank" if shape is None else f"[{', '.join('?' if each is None else str(each) for each in shape)}]"
    )


def _value(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _layer_lines(found: Inspected, *, everything: bool, shorten: bool) -> Iterator[str]:
    from gate.precision import compute_layers

    layers = found.layers or ()
    compute = compute_layers(layers)
    shown = layers if everything else compute
    yield f"layers ({found.layers_source})  {_count_text(len(layers), found.counts)}"
    yield f"compute layers   {_count_text(len(compute), found.compute_counts)}"
    if shown:
        yield ""
        columns: tuple[tuple[str, Callable[[Layer], str]], ...] = (
            ("name", lambda layer: layer.name),
            ("type", lambda layer: layer.type),
            ("precision", lambda layer: layer.precision),
            ("tactic", lambda layer: layer.tactic),
            ("format", lambda layer: layer.format),
        )
        texts = [[_short(get(layer)) if shorten else get(layer) for layer in shown] for _, get in columns]
        kept = [(heading, column) for (heading, _), column in zip(columns, texts, strict=True) if any(column)]
        widths = [max(len(heading), *map(len, column)) for heading, column in kept]
        for row in zip(*([heading, *column] for heading, column in kept), strict=True):
            yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    if len(shown) < len(layers):
        yield ""
        yield f"{len(layers) - len(shown)} other layers are not shown: --layers all"


def _count_text(total: int, counts: dict[str, int] | None) -> str:
    return f"{total}: {', '.join(f'{count} {name}' for name, count in (counts or {}).items())}" if total else "none"


def _short(text: str) -> str:
    if len(text) <= LONGEST_NAME:
        return text
    left = (LONGEST_NAME - 1) // 2
    return f"{text[:left]}…{text[len(text) - (LONGEST_NAME - 1 - left) :]}"
