"""`gate init module:function | model.onnx`: write a commented spec by reading the model's inputs and outputs."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from gate.cli import COMMANDS
from gate.cli.check import pasted
from gate.errors import ExitCode, RunError, SpecError

DEFAULT_AXIS = (1, 8, 32)
_EXAMPLE = "--input image:float32:batch,3,224,224"


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "init",
        help=COMMANDS["init"],
        description="Write a commented gate.toml for a model factory (module:function) or an ONNX file.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="module:function returning a torch.nn.Module, or a .onnx file")
    parser.add_argument("--out", "-o", type=Path, default=Path("gate.toml"), metavar="FILE", help="(gate.toml)")
    parser.add_argument("--id", metavar="ID", help="the model's id; left out: from its name")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME:DTYPE:SHAPE",
        help="an input of a factory's model, such as image:float32:batch,3,224,224; a name is a dynamic axis; repeat it",
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Tensor:
    """An input as it will stand in the spec: a size, or a name for a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Model:
    """What was read from a model."""

    key: str
    value: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    opset: int | None


def run(args: argparse.Namespace) -> ExitCode:
    """Read the model and write the spec.

    Raises:
        SpecError: The file exists already, the model cannot be read or run, or its shapes are not known.
    """
    from gate.atomic import write_bytes
    from gate.spec import spec_from_text

    out: Path = args.out
    if out.exists() or out.is_symlink():
        raise SpecError("exists already, and is not overwritten", where=str(out), hint="name another file with -o")
    given = tuple(_input_from(text) for text in args.input)
    if args.model.endswith(".onnx"):
        if given:
            raise SpecError("--input is for a factory; an ONNX file has its own inputs", where=args.model)
        model = _from_onnx(Path(args.model), out)
    elif ":" in args.model:
        model = _from_factory(args.model, given, out)
    else:
        module = Path(args.model)
        raise SpecError(
            f"expected module:function or a .onnx file, got {args.model!r}",
            hint=f"name the function that returns the model: gate init {module.stem}:load"
            if module.suffix == ".py"
            else None,
        )
    model_id = args.id or _id_from(args.model)
    text = spec_text(model, model_id)
    spec_from_text(text, path=out)
    write_bytes(out, text.encode())
    shapes = "; ".join(f"{each.name} {each.dtype} [{', '.join(map(str, each.shape))}]" for each in model.inputs)
    print(f"wrote {out}: inputs {shapes}; outputs {', '.join(model.outputs)}")
    print(f"next: fill in [data], then: gate check {pasted(out)}")
    return ExitCode.PASSED


def _input_from(text: str) -> Tensor:
    """`image:float32:batch,3,224,224`."""
    from gate.spec import Dtype

    name, _, rest = text.partition(":")
    dtype, _, shape = rest.partition(":")
    sizes: tuple[int | str, ...] = tuple(int(size) if size.isdigit() else size for size in shape.split(","))
    wrong = [size for size in sizes if (isinstance(size, str) and not _is_axis(size)) or size == 0]
    if not name or dtype not in get_args(Dtype) or wrong:
        raise SpecError(
            f"--input {text!r}: expected NAME:DTYPE:SHAPE such as {_EXAMPLE.partition(' ')[2]}; "
            f"dtypes are {', '.join(get_args(Dtype))}"
        )
    return Tensor(name, dtype, sizes)


def _is_axis(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None and name not in ("dtype", "shape")


def _id_from(model: str) -> str:
    """A model id from a file's name, or from a factory's module and function."""
    stem = Path(model).stem if model.endswith(".onnx") else model.replace(":", "-")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"


def _from_onnx(path: Path, out: Path) -> Model:
    """Inputs, outputs and opset of an ONNX file; its weights are not loaded."""
    from gate.spec import Dtype

    try:
        import onnx
    except ImportError as err:
        raise SpecError("reading an ONNX file needs onnx", hint='pip install "trt-gate[onnxruntime]"') from err
    try:
        graph = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise SpecError("there is no such file", where=str(path)) from None
    except Exception as err:
        raise SpecError(f"is not an ONNX file: {type(err).__name__}: {err}", where=str(path)) from err
    weights = {each.name for each in graph.graph.initializer}
    inputs: list[Tensor] = []
    for each in graph.graph.input:
        if each.name in weights:
            continue
        kind = each.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)) if kind.elem_type else "unknown"
        if dtype not in get_args(Dtype):
            raise SpecError(
                f"input {each.name!r} is {dtype}; a spec takes {', '.join(get_args(Dtype))}", where=str(path)
            )
        if not kind.HasField("shape"):
            raise SpecError(
                f"input {each.name!r} has no shape", where=str(path), hint="Run onnx.shape_inference on it."
            )
        inputs.append(Tensor(each.name, dtype, _shape_of(kind.shape.dim)))
    if not inputs or not graph.graph.output:
        raise SpecError("has no inputs or no outputs", where=str(path))
    opset = max((each.version for each in graph.opset_import if each.domain in ("", "ai.onnx")), default=None)
    relative = os.path.relpath(path, out.resolve().parent)
    return Model("onnx", relative, tuple(inputs), tuple(each.name for each in graph.graph.output), opset)


def _shape_of(dims: Any) -> tuple[int | str, ...]:
    """Sizes; a dynamic axis gets its own name where the spec can take it, and no name twice in one input."""
    shape: list[int | str] = []
    for index, dim in enumerate(dims):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            shape.append(int(dim.dim_value))
            continue
        named = re.sub(r"\W", "_", dim.dim_param or "")
        usable = _is_axis(named) and named not in shape
        shape.append(named if usable else "batch" if index == 0 else f"axis_{index}")
    return tuple(shape)


def _from_factory(name: str, given: tuple[Tensor, ...], out: Path) -> Model:
    """Outputs of the factory's model, from one run on the inputs that were given or that it tells of itself."""
    import numpy as np

    try:
        import torch
    except ImportError as err:
        raise SpecError("a factory needs PyTorch", hint='pip install "trt-gate[torch]"') from err
    from gate.engines.torch.runner import TorchRunner, require_module
    from gate.factory import load_callable
    from gate.spec import spec_from_text

    where = f"factory {name!r}"
    folder = out.resolve().parent
    module = load_callable(name, folder, where=where)()
    require_module(module, error=SpecError, where=where)
    inputs = given or _inputs_of(module, torch, factory=name)
    draft = Model("factory", name, inputs, (), None)
    spec = spec_from_text(spec_text(draft, "draft"), path=out).spec
    zeros = {each: np.zeros(table.sized("opt"), table.dtype) for each, table in spec.inputs.items()}
    try:
        with TorchRunner(module, spec=spec) as runner:
            outputs = tuple(runner.run(zeros))
    except RunError as err:
        tried = "; ".join(f"{each} {values.dtype} {list(values.shape)}" for each, values in zeros.items())
        raise SpecError(
            f"{err.message}\nit was tried with zeros: {tried}",
            where=where,
            hint=f"Give each input as the model takes it: gate init {name} {_EXAMPLE}",
        ) from err
    return Model("factory", name, inputs, outputs, None)


def _inputs_of(module: Any, torch: Any, *, factory: str) -> tuple[Tensor, ...]:
    """The inputs that a module tells of itself: its example, or the width of the one linear layer it begins with.

    Raises:
        SpecError: It does not tell.
    """
    import inspect

    parameters = [
        each
        for each in inspect.signature(module.forward).parameters.values()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.default is each.empty
    ]
    names = [each.name for each in parameters] or ["input"]
    example = getattr(module, "example_input_array", None)
    if isinstance(example, torch.Tensor) and example.ndim and len(names) == 1:
        dtype = str(example.dtype).removeprefix("torch.")
        return (_input_from(f"{names[0]}:{dtype}:batch,{','.join(map(str, example.shape[1:]))}".rstrip(",")),)
    layers = [each for each in module.modules() if not list(each.children())]
    if layers and isinstance(layers[0], torch.nn.Linear) and len(names) == 1:
        return (Tensor(names[0], "float32", ("batch", layers[0].in_features)),)
    needed = " ".join(f"--input {each}:float32:batch,3,224,224" for each in names)
    raise SpecError(
        f"the shapes of its inputs are not known; its forward takes {', '.join(names)}",
        where=f"factory {factory!r}",
        hint=f"Give each, with its own dtype and shape: gate init {factory} {needed}",
    )


def spec_text(model: Model, model_id: str) -> str:
    """The spec, with comments."""
    lines = [
        "# Read by `gate check`. Every key: `gate schema spec`. Paths and module:function start from this folder.",
        "schema = 1",
        "",
        "[model]",
        f"id = {_toml(model_id)}",
    ]
    if model.key == "factory":
        lines += [
            f"factory = {_toml(model.value)}   # returns a torch.nn.Module in eval mode; its FP32 answers are the reference",
            '# weights = "weights.safetensors"   # name the files it reads: later runs reuse the reference without PyTorch',
        ]
        if model.outputs:
            lines.append(f"output_names = [{', '.join(map(_toml, model.outputs))}]")
    else:
        lines += [
            f"onnx = {_toml(model.value)}   # its FP32 answers are the reference"
            + (f"; opset {model.opset}" if model.opset else ""),
            f"# outputs: {', '.join(model.outputs)}",
        ]
    lines += ["# metrics = { top1 = 0.98 }   # what training reported; needs a [task]", ""]
    small, usual, large = DEFAULT_AXIS
    for each in model.inputs:
        lines += [f"[inputs.{_key(each.name)}]", f"dtype = {_toml(each.dtype)}"]
        dynamic = [size for size in each.shape if isinstance(size, str)]
        comment = "   # a name makes the axis dynamic" if dynamic else "   # fixed: no batch size but this"
        lines.append(f"shape = [{', '.join(_toml(size) for size in each.shape)}]{comment}")
        lines += [
            f"{axis} = {{ min = {small}, opt = {usual}, max = {large} }}   # the engine is tuned for opt"
            for axis in dynamic
        ]
        lines.append("")
    lines += [
        "[data]",
        'source = "data:evaluation"   # a function in data.py: gate.Samples, a dict of arrays, or a dataset; or an npz file',
        f"                             # its arrays: {', '.join(each.name for each in model.inputs)}, and labels for a [task]",
        "samples = 1000               # how many there must be: fewer is an error",
        '# calibration = "data:calibration"   # for int8; none of these may be an evaluation sample',
        "",
        *_detector_lines(model),
        "# [task]                     # answers are compared with the ground truth, too",
        '# kind = "classification"    # or detection, semantic_segmentation, regression, ...: docs/tasks.md',
        "",
        "[[engine]]",
        'name = "ort-fp32"',
        'backend = "onnxruntime"',
        'precision = "fp32"',
        "  [engine.parity]            # left empty: the limits known for the precision, printed in the report",
        "  # [engine.latency]         # timed in fresh processes, decided or INCONCLUSIVE: docs/latency.md",
        "  # p99_ms = 20.0            # a budget; also p50_ms, p90_ms, p95_ms, p99_9_ms, throughput_at_least",
        '  # speedup = { against = "reference", at_least = 1.2 }   # times as fast as PyTorch, at p50',
        "",
        "# [[engine]]",
        '# name = "trt-fp16"',
        '# backend = "tensorrt"       # or torch, or tensorrt_rtx; evidence = "preflight" compiles it without a GPU',
        '# precision = "fp16"         # or tf32, bf16, int8, fp8; what this machine can do: gate doctor --spec gate.toml',
        "# optional = true            # where TensorRT is not installed it is listed as NOT RUN, and cannot be sealed",
        "#   [engine.parity]",
        "#   [engine.latency]",
        "#   p99_ms = 2.0",
        '#   speedup = { against = "ort-fp32", at_least = 1.5 }   # another engine, in turn with it',
        '#   regression = { against = "baseline", p50 = "3 %", p95 = "5 %" }   # once accepted and sealed: --bundles DIR',
        "#   [engine.baseline]        # against baselines/: gate baseline accept",
        '#   [engine.lowering]        # int8: tool, method; exclude_nodes = ["/head/.*"] keeps nodes in FP32',
        "",
    ]
    return "\n".join(lines)


def _detector_lines(model: Model) -> list[str]:
    """What a detector has in place of `source`, as comments; nothing for a model whose input is no image."""
    image = next((each.shape for each in model.inputs if len(each.shape) == 4), None)
    if image is None or len(model.inputs) > 1 or not model.outputs:
        return []
    height, width = (size if isinstance(size, int) else 640 for size in image[2:])
    return [
        "# [data.images]              # a detector: in place of source, images and boxes in COCO's form",
        '# kind = "coco"',
        '# path = "images"',
        '# annotations = "instances.json"',
        "# [preprocess]",
        f"# size = [{height}, {width}]",
        "# [postprocess]              # what its outputs mean, every head and key: docs/tasks.md",
        '# head = "yolo"              # or boxes, detr, yolo_grid',
        f"# outputs = [{_toml(model.outputs[0])}]",
        "# category_ids = [1, 2, 3]   # of the model's classes, in their order",
        "",
    ]


def _toml(value: str | int) -> str:
    """A TOML integer or basic string. Source: toml.io v1.0.0, String."""
    if isinstance(value, int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in escaped) + '"'


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
