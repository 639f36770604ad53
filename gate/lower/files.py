"""The graph's files: read with its external data checked, written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from gate.engines.graph import external_files, unsafe_external_file
from gate.errors import LoweringError
from gate.tensors import TensorMeta

_LARGE_BYTES = 1_800_000_000


def read(path: Path) -> Any:
    """The `onnx.ModelProto` of a file, its external data included.

    Raises:
        LoweringError: It is not ONNX, or its external data cannot be used.
    """
    import onnx

    try:
        plain = onnx.load(str(path), load_external_data=False)
        wrong = unsafe_external_file(path, external_files(plain))
        if wrong is None:
            return onnx.load(str(path))
    except Exception as err:
        raise LoweringError(f"cannot be read as ONNX: {err}", where=str(path)) from err
    raise LoweringError(wrong, where=str(path))


def write(model: Any, out: Path, folder: Path) -> None:
    """Write a checked graph to `out`, and its weights to `<out>.data` where it is too long for one message."""
    import onnx

    data = out.with_name(out.name + ".data")
    large = is_large(model)
    final = folder / "final"
    final.mkdir()
    new = final / out.name
    onnx.save_model(model, str(new), save_as_external_data=large, all_tensors_to_one_file=True, location=data.name)
    onnx.checker.check_model(str(new))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gate-lower-", dir=out.parent) as name:
        for target in (data, out):
            made = final / target.name
            if made.exists():
                staged = Path(name, target.name)
                shutil.copyfile(made, staged)
                staged.replace(target)
            elif target.exists():
                target.unlink()


def save(model: Any, path: Path) -> None:
    """Write a graph for a tool to read, in a folder of its own."""
    import onnx

    onnx.save_model(
        model,
        str(path),
        save_as_external_data=is_large(model),
        all_tensors_to_one_file=True,
        location=f"{path.stem}.data",
    )


def is_large(model: Any) -> bool:
    """Whether it is longer than a protobuf message may be."""
    return int(model.ByteSize()) > _LARGE_BYTES


def inputs_of(model: Any) -> dict[str, TensorMeta]:
    """What the graph takes, by name; initializers that are listed as inputs are left out."""
    import onnx

    constant = {each.name for each in model.graph.initializer}
    found = {}
    for value in model.graph.input:
        if value.name in constant:
            continue
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim)
        found[value.name] = TensorMeta(
            name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape
        )
    return found
