"""PyTorch to ONNX, and the proof that the ONNX file computes what PyTorch computes."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from gate.chatter import quiet
from gate.engines.graph import opset_of
from gate.engines.onnxruntime import OnnxRuntimeRunner
from gate.engines.torch.runner import TorchRunner, call_module, named_outputs, require_module, tensor_from
from gate.errors import ExportError, RunError
from gate.spec import AxisRange, EngineOptions, GateSpec, InputSpec
from gate.tensors import Array, NamedArrays, mismatches

REL_RMSE_LIMIT = 1e-5
"""An FP32 graph differs from eager PyTorch by the order of its sums only: METHOD's limit for fp32."""

_INLINE_LIMIT_BYTES = 1_800_000_000
"""A protobuf message ends at 2 GiB; larger weights go to one file beside the model."""

_EXACT_MISMATCH_LIMIT = 1e-3
"""Share of an integer or boolean output that may differ: a near-tie may fall to the other side."""

_TRACE_SIZE = 2
"""An axis of size 1 is taken for a constant by torch.export, so a dynamic one is traced with at least this."""

_AS_IT_IS = EngineOptions(optimization="disabled")
"""Already the basic optimisation of ONNX Runtime computes layers with Q/DQ otherwise, so that values fall on the next
quantisation step: rel_rmse of 1e-3, of a right export too."""

Exporter = Literal["dynamo", "torchscript"]


class ExportRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an ONNX file was made.

    Args:
        exporter: Which of torch's exporters made it.
        opset: Its operator set.
        torch_version: Of the exporter.
        refused: What the exporters before it said, each `name: why`.
        simplified: Whether onnxslim went over it.
        inputs, outputs: Names, in the graph's order.
    """

    exporter: Exporter
    opset: int
    torch_version: str
    refused: tuple[str, ...]
    simplified: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OutputParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one output of the ONNX file differs from PyTorch, at its worst over the feeds.

    Args:
        output: Its name.
        rel_rmse: Of a floating output: RMS of the difference over RMS of PyTorch's values. Of another: the share of
            elements that differ.
    """

    output: str
    rel_rmse: float


def exporter_version() -> str:
    """Versions of everything that decides what an export looks like, for a cache's key."""
    found: list[str] = []
    for name in ("torch", "onnx", "onnxscript", "onnxslim"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def onnx_from_torch(
    module: Any,
    *,
    spec: GateSpec,
    out: Path,
    feeds: Sequence[NamedArrays] = (),
    inline_limit_bytes: int = _INLINE_LIMIT_BYTES,
) -> ExportRecord:
    """Export a module by the first of the spec's exporters that can, and check the file.

    Weights above the limit go to `<out>.data` beside it. Nothing else is left in the folder.

    Args:
        module: A `torch.nn.Module` in eval mode whose two runs agree.
        spec: Inputs with their dynamic axes, opset, exporters, output names, simplification.
        out: The ONNX file to write.
        feeds: Real inputs; the last is traced with. Without any: seeded random floats, and ones for the rest.
        inline_limit_bytes: Largest file that keeps its weights inside.

    Raises:
        ExportError: The module is in train mode or no module, two runs differ, every exporter failed (all causes are
            told), the opset is not the one asked for, or the file is not valid ONNX.
    """
    require_module(module, error=ExportError, where=_where(spec))
    example = _example(spec, feeds[-1] if feeds else None)
    outputs = _require_repeatable(module, spec, example)
    _require_distinct(spec, outputs)
    refused: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for exporter in spec.model.exporter:
        with tempfile.TemporaryDirectory(prefix="gate-export-") as name:
            try:
                model = _export(exporter, module, spec=spec, example=example, outputs=outputs, folder=Path(name))
            except ExportError as err:
                refused.append(f"{exporter}: {err.message}")
                continue
            if spec.model.simplify:
                model = _simplified(model, spec=spec, feeds=_arrays(example), folder=Path(name))
                _require_valid(model, Path(name))
            _write(model, out, inline_limit_bytes)
        return ExportRecord(
            exporter=exporter,
            opset=opset_of(model),
            torch_version=importlib.metadata.version("torch"),
            refused=tuple(refused),
            simplified=spec.model.simplify,
            inputs=tuple(each.name for each in model.graph.input),
            outputs=tuple(each.name for each in model.graph.output),
        )
    raise ExportError(
        "no exporter could make an ONNX file of the model\n" + "\n".join(f"  {cause}" for cause in refused),
        where=_where(spec),
        hint='Change [model] opset or exporter, or export it yourself and name it as onnx = "…" in the [[engine]].',
    )


def verify_export(
    onnx: Path,
    module: Any,
    *,
    spec: GateSpec,
    feeds: Iterable[NamedArrays],
    rel_rmse_limit: float = REL_RMSE_LIMIT,
) -> tuple[OutputParity, ...]:
    """Run the FP32 ONNX file on ONNX Runtime and the module in PyTorch on the same feeds, and hold them together.

    Args:
        onnx: The exported file.
        module: What it was exported from.
        spec: Inputs and output names.
        feeds: At least one; the profile's smallest and largest batch among them show a batch that was baked in.
        rel_rmse_limit: For floating outputs.

    Raises:
        ExportError: An output is missing, extra, of another shape or dtype, not finite where PyTorch is, or differs
            by more than the limit; or there is no feed.
    """
    worst: dict[str, float] = {}
    count = 0
    try:
        with (
            OnnxRuntimeRunner(onnx, spec=spec, options=_AS_IT_IS) as candidate,
            TorchRunner(module, spec=spec) as reference,
        ):
            for feed in feeds:
                count += 1
                found = _compare(reference.run(feed), candidate.run(feed), where=str(onnx), limit=rel_rmse_limit)
                for name, value in found.items():
                    worst[name] = max(worst.get(name, 0.0), value)
    except RunError as err:
        raise ExportError(f"the exported file cannot be compared: {err.message}", where=err.where) from err
    if count == 0:
        raise ExportError(
            "the exported file was compared on no sample, so it is not known to be right", where=str(onnx)
        )
    return tuple(OutputParity(name, value) for name, value in worst.items())


def _where(spec: GateSpec) -> str:
    return f"[model] factory = {spec.model.factory!r}" if spec.model.factory else f"model {spec.model.id}"


def _rows(array: Array, size: int) -> Array:
    if array.ndim == 0 or len(array) == 0:
        raise ExportError(f"there is no sample to make a batch of {size} from")
    return np.ascontiguousarray(array[np.arange(size) % len(array)])


def _example(spec: GateSpec, feeds: NamedArrays | None) -> dict[str, Any]:
    """Tensors to trace with: real rows where given, every dynamic axis at least `_TRACE_SIZE` where it may be."""
    generator = np.random.default_rng(0)
    example: dict[str, Any] = {}
    for name, each in spec.inputs.items():
        shape = tuple(size if isinstance(size, int) else _trace_size(each.axes[size]) for size in each.shape)
        if feeds is not None:
            if name not in feeds:
                raise ExportError(f"the samples have no input {name!r}; they have {', '.join(feeds) or 'none'}")
            array = _rows(np.asarray(feeds[name]), shape[0])
        elif each.dtype.startswith("float"):
            array = generator.standard_normal(shape).astype(each.dtype)
        else:
            array = np.ones(shape, each.dtype)
        example[name] = tensor_from(array)
    return example


def _trace_size(axis: AxisRange) -> int:
    return min(max(min(axis.opt, 8), axis.min, _TRACE_SIZE), axis.max)


def _arrays(example: Mapping[str, Any]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in example.items()}


def _require_repeatable(module: Any, spec: GateSpec, example: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the outputs.

    Raises:
        ExportError: Two runs on one input differ.
    """
    feed = _arrays(example)
    try:
        with TorchRunner(module, spec=spec) as runner:
            first, second = runner.run(feed), runner.run(feed)
    except RunError as err:
        raise ExportError(err.message, where=err.where or _where(spec), hint=err.hint) from err
    for name, value in first.items():
        again = second.get(name)
        if again is None or value.shape != again.shape or value.tobytes() != again.tobytes():
            raise ExportError(
                f"two runs of the model on one input differ in output {name!r}",
                where=_where(spec),
                hint="Remove what is random in its forward (dropout, noise, sampling), or seed it there.",
            )
    return tuple(first)


def _require_distinct(spec: GateSpec, outputs: tuple[str, ...]) -> None:
    if both := sorted(set(spec.inputs) & set(outputs)):
        raise ExportError(
            f"{', '.join(map(repr, both))} names an input and an output, which ONNX cannot tell apart",
            where=_where(spec),
            hint="Set [model] output_names.",
        )


def _export(
    exporter: Exporter,
    module: Any,
    *,
    spec: GateSpec,
    example: Mapping[str, Any],
    outputs: tuple[str, ...],
    folder: Path,
) -> Any:
    """The exported `onnx.ModelProto`, weights inside, of the opset asked for.

    Raises:
        ExportError: Why not.
    """
    import onnx
    import torch

    path = folder / "model.onnx"
    wrapped = _positional(module, tuple(example), spec.model.output_names)
    settings: dict[str, Any] = {
        "opset_version": spec.model.opset,
        "input_names": list(example),
        "output_names": list(outputs),
    }
    if exporter == "dynamo":
        settings |= {"dynamo": True, "dynamic_shapes": _dynamic_shapes(spec, torch.export.Dim), "external_data": True}
        settings |= {"verbose": False}
    else:
        settings |= {"dynamo": False, "dynamic_axes": _dynamic_axes(spec, wrapped, example, outputs)}
    with quiet() as chatter:
        try:
            torch.onnx.export(wrapped, tuple(example.values()), str(path), **settings)
            model = onnx.load(str(path))
        except Exception as err:
            raise ExportError(_cause(err) or " · ".join(chatter.tail(1)) or type(err).__name__) from err
    if opset_of(model) != spec.model.opset:
        model = _converted(model, spec.model.opset)
    _anonymous(model)
    _require_valid(model, folder)
    names = tuple(each.name for each in model.graph.output)
    if names != outputs:
        raise ExportError(f"the graph's outputs are {', '.join(names)}, the model's {', '.join(outputs)}")
    unused = [name for name in example if name not in {each.name for each in model.graph.input}]
    if unused:
        raise ExportError(f"the graph does not use input {', '.join(map(repr, unused))}, so it was left out of it")
    return model


def _converted(model: Any, opset: int) -> Any:
    import onnx

    got = opset_of(model)
    with quiet():
        try:
            converted = onnx.version_converter.convert_version(model, opset)
        except Exception as err:
            raise ExportError(
                f"gives opset {got}, {opset} was asked for, and it cannot be converted: {_cause(err)}"
            ) from err
    if opset_of(converted) != opset:
        raise ExportError(f"gives opset {got}, {opset} was asked for")
    return converted


def _positional(module: Any, names: tuple[str, ...], output_names: tuple[str, ...]) -> Any:
    """The module with one tensor argument per input, in the spec's order, and a flat tuple of tensors as result."""
    import torch

    class Positional(torch.nn.Module):  # type: ignore[misc]
        """Inputs by position."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            """Call the module."""
            result = call_module(self.module, dict(zip(names, tensors, strict=True)))
            return tuple(named_outputs(result, output_names).values())

    return Positional().eval()


def _dynamic_shapes(spec: GateSpec, dim: Callable[..., Any]) -> tuple[tuple[dict[int, Any], ...]]:
    """For torch.export: one entry for the wrapper's `*tensors`. Axes of one name are one dimension."""
    dims: dict[str, Any] = {}

    def axes_of(each: InputSpec) -> dict[int, Any]:
        new = {size: axis for size, axis in each.axes.items() if axis.min < axis.max and size not in dims}
        dims.update({size: dim(size, min=axis.min, max=axis.max) for size, axis in new.items()})
        return {index: dims[size] for index, size in enumerate(each.shape) if size in dims}

    return (tuple(axes_of(each) for each in spec.inputs.values()),)


def _dynamic_axes(
    spec: GateSpec, wrapped: Any, example: Mapping[str, Any], outputs: tuple[str, ...]
) -> dict[str, dict[int, str]]:
    """For the TorchScript exporter: input axes by the spec, output axes found by running at two sizes."""
    axes = {
        name: {index: size for index, size in enumerate(each.shape) if isinstance(size, str)}
        for name, each in spec.inputs.items()
    }
    axes.update(zip(outputs, _output_axes(spec, wrapped, example), strict=True))
    return {name: found for name, found in axes.items() if found}


def _output_axes(spec: GateSpec, wrapped: Any, example: Mapping[str, Any]) -> list[dict[int, str]]:
    """Which axes of each output follow a dynamic axis of the inputs: those whose size changes with it."""
    import torch

    with torch.inference_mode():
        usual = [tuple(each.shape) for each in wrapped(*example.values())]
    found: list[dict[int, str]] = [{} for _ in usual]
    ranges = {axis: sizes for each in spec.inputs.values() for axis, sizes in each.axes.items()}
    for axis, sizes in ranges.items():
        current = _current(spec, example, axis)
        other = current - 1 if current > sizes.min else current + 1
        if not sizes.min <= other <= sizes.max:
            continue
        changed = {
            name: _resized(tensor, [i for i, size in enumerate(spec.inputs[name].shape) if size == axis], other)
            for name, tensor in example.items()
        }
        try:
            with torch.inference_mode():
                shapes = [tuple(each.shape) for each in wrapped(*changed.values())]
        except Exception as err:
            raise ExportError(f"the model does not take {axis} = {other}: {_cause(err)}") from err
        for index, (before, after) in enumerate(zip(usual, shapes, strict=True)):
            if len(before) == len(after):
                for place, (left, right) in enumerate(zip(before, after, strict=True)):
                    if left != right:
                        same = abs(right - left) == abs(other - current) and left == current
                        found[index][place] = axis if same else f"{axis}_{index}_{place}"
    return found


def _current(spec: GateSpec, example: Mapping[str, Any], axis: str) -> int:
    for name, each in spec.inputs.items():
        if axis in each.shape:
            return int(example[name].shape[each.shape.index(axis)])
    raise ExportError(f"no input has the axis {axis!r}")


def _resized(tensor: Any, axes: list[int], size: int) -> Any:
    import torch

    for axis in axes:
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor


def _anonymous(model: Any) -> None:
    """Take out what differs between machines: stack traces with paths, doc strings, the producer's own metadata."""
    del model.metadata_props[:]
    model.doc_string = ""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.doc_string = ""
            del value.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _simplified(model: Any, *, spec: GateSpec, feeds: NamedArrays, folder: Path) -> Any:
    """The graph after onnxslim, held against the one before on ONNX Runtime.

    Raises:
        ExportError: onnxslim is missing or failed, or changed what is computed.
    """
    import onnx

    before, after = folder / "before.onnx", folder / "after.onnx"
    onnx.save_model(
        model, str(before), save_as_external_data=_is_large(model, _INLINE_LIMIT_BYTES), location="before.data"
    )
    with quiet():
        try:
            import onnxslim

            # A copy: onnxslim may work in place, and `before` is what it is held against.
            slim = onnxslim.slim(onnx.load(str(before)))
        except ImportError as err:
            raise ExportError(
                "[model] simplify needs onnxslim, which is not installed", hint='pip install "trt-gate[export]"'
            ) from err
        except Exception as err:
            raise ExportError(f"onnxslim failed: {_cause(err)}") from err
    if slim is None:
        raise ExportError("onnxslim gave nothing")
    _anonymous(slim)
    onnx.save_model(slim, str(after), save_as_external_data=_is_large(slim, _INLINE_LIMIT_BYTES), location="after.data")
    try:
        with (
            OnnxRuntimeRunner(before, spec=spec, options=_AS_IT_IS) as left,
            OnnxRuntimeRunner(after, spec=spec, options=_AS_IT_IS) as right,
        ):
            _compare(left.run(feeds), right.run(feeds), where="the simplified graph", limit=REL_RMSE_LIMIT)
    except RunError as err:
        raise ExportError(f"the simplified graph cannot be compared: {err.message}") from err
    return slim


def _is_large(model: Any, limit_bytes: int) -> bool:
    return int(model.ByteSize()) > limit_bytes


def _write(model: Any, out: Path, inline_limit_bytes: int) -> None:
    """Write the model, its weights beside it where they are large, by renaming finished files into place."""
    import onnx

    data = out.with_name(out.name + ".data")
    with tempfile.TemporaryDirectory(prefix=".gate-export-", dir=out.parent) as name:
        new = Path(name, out.name)
        large = _is_large(model, inline_limit_bytes)
        onnx.save_model(model, str(new), save_as_external_data=large, all_tensors_to_one_file=True, location=data.name)
        beside = Path(name, data.name)
        if beside.exists():
            beside.replace(data)
        elif data.exists():
            data.unlink()
        shutil.move(str(new), str(out))


def _require_valid(model: Any, folder: Path) -> None:
    import onnx

    path = folder / "checked.onnx"
    large = _is_large(model, _INLINE_LIMIT_BYTES)
    onnx.save_model(model, str(path), save_as_external_data=large, location="checked.data")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as err:
        raise ExportError(f"the graph of opset {opset_of(model)} is not valid ONNX: {_cause(err)}") from err


def _compare(reference: NamedArrays, candidate: NamedArrays, *, where: str, limit: float) -> dict[str, float]:
    """The difference of each output.

    Raises:
        ExportError: They cannot be paired, or differ by more than the limit.
    """
    if wrong := mismatches(reference, candidate):
        raise ExportError(
            "; ".join(str(each) for each in wrong),
            where=where,
            hint="The ONNX file does not give what PyTorch gives; try the other exporter in [model] exporter.",
        )
    found: dict[str, float] = {}
    for name, want in reference.items():
        found[name] = value = _difference(want, candidate[name])
        allowed = limit if want.dtype.kind == "f" else _EXACT_MISMATCH_LIMIT
        if not value <= allowed:
            what = "rel_rmse" if want.dtype.kind == "f" else "share of differing elements"
            raise ExportError(
                f"output {name!r} of shape {list(want.shape)} differs from PyTorch: {what} {value:.2g} > {allowed:.2g}",
                where=where,
                hint="The export changes what the model computes: no engine made from it can be right. "
                "Try the other exporter in [model] exporter, or another opset.",
            )
    return found


def _difference(want: Array, got: Array) -> float:
    """rel_rmse of floats, NaN where their non-finite elements are not the same; else the share that differs."""
    if want.size == 0:
        return 0.0
    if want.dtype.kind != "f":
        return float(np.mean(want != got))
    left, right = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(left)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True) or not np.all(np.isfinite(right[finite])):
        return math.nan
    left, right = left[finite], right[finite]
    if left.size == 0:
        return math.nan
    error, scale = float(np.sqrt(np.mean((left - right) ** 2))), float(np.sqrt(np.mean(left**2)))
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def _cause(err: BaseException) -> str:
    """The innermost cause in one line: exporters wrap it in pages of advice."""
    inner: BaseException = err
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    text = " ".join(lines[:3])
    return f"{type(inner).__name__}: {text[:500]}" if text else type(inner).__name__
