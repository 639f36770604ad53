"""The exact check of what goes into a runner, the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gate.errors import RunError
from gate.spec import GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta


def metas_from_spec(spec: GateSpec) -> dict[str, TensorMeta]:
    """The spec's inputs as tensors."""
    return {name: TensorMeta(name, each.dtype, tuple(each.shape)) for name, each in spec.inputs.items()}


def profile_of(spec: GateSpec) -> dict[str, dict[str, list[int]]]:
    """Per input its min, opt and max shapes, as a build record has them."""
    return {
        name: {"min": list(each.sized("min")), "opt": list(each.sized("opt")), "max": list(each.sized("max"))}
        for name, each in spec.inputs.items()
    }


def require_inputs(inputs: Mapping[str, TensorMeta], *, spec: GateSpec, cast_io: bool, where: str) -> None:
    """Hold an engine's inputs against the spec's: the same names, ranks, fixed sizes and dtypes.

    Raises:
        RunError: They differ.
    """
    missing = [name for name in spec.inputs if name not in inputs]
    extra = [name for name in inputs if name not in spec.inputs]
    if missing or extra:
        parts = [f"the engine has no input {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"the engine has an input {', '.join(map(repr, extra))} that the spec has not"] if extra else []
        raise RunError(
            f"{'; '.join(parts)} (engine: {', '.join(inputs)}; spec: {', '.join(spec.inputs)})",
            where=where,
            hint="Name the inputs in [inputs.NAME] as the engine does.",
        )
    for name, meta in inputs.items():
        asked = spec.inputs[name]
        if len(meta.shape) != len(asked.shape):
            raise RunError(
                f"input {name!r} has {len(meta.shape)} axes {_shape(meta.shape)}, the spec has {_shape(asked.shape)}",
                where=where,
            )
        low, high = asked.sized("min"), asked.sized("max")
        for axis, size in enumerate(meta.shape):
            if isinstance(size, int) and size >= 0 and not size == low[axis] == high[axis]:
                raise RunError(
                    f"input {name!r} is {_shape(meta.shape)}: axis {axis} is fixed at {size}, "
                    f"the spec asks for {_range(low[axis], high[axis])}",
                    where=where,
                    hint="Export it with that axis dynamic, or make the spec's profile as narrow as the engine.",
                )
        if meta.dtype != asked.dtype and not (cast_io and _is_float(meta.dtype) and _is_float(asked.dtype)):
            raise RunError(
                f"input {name!r} is {meta.dtype}, the spec has {asked.dtype}",
                where=where,
                hint="Set cast_io = true in this [[engine]] to accept another floating dtype."
                if _is_float(meta.dtype) and _is_float(asked.dtype)
                else None,
            )


def require_feed(
    feed_dict: NamedArrays, inputs: Mapping[str, TensorMeta], *, spec: GateSpec, cast_io: bool = False
) -> dict[str, Array]:
    """The inputs of one inference in the engine's order, C-contiguous, in the engine's dtypes.

    Raises:
        RunError: One is missing, unexpected, of another dtype, of another rank, outside the profile, or two of them
            disagree about a named axis.
    """
    missing = [name for name in inputs if name not in feed_dict]
    if missing:
        raise RunError(
            f"input {', '.join(map(repr, missing))} is missing; given: {', '.join(map(repr, feed_dict)) or 'none'}"
        )
    extra = [name for name in feed_dict if name not in inputs]
    if extra:
        raise RunError(f"unexpected input {', '.join(map(repr, extra))}; it takes {', '.join(map(repr, inputs))}")
    sizes: dict[str, tuple[str, int]] = {}
    feed: dict[str, Array] = {}
    for name, meta in inputs.items():
        array = np.asarray(feed_dict[name])
        _require_dtype(name, array, expected=spec.inputs[name].dtype)
        _require_shape(name, array, spec=spec, sizes=sizes)
        if array.dtype.name != meta.dtype:
            if not (cast_io and meta.dtype in ("float16", "float32", "float64")):
                raise RunError(f"input {name!r} is {array.dtype}, the engine takes {meta.dtype}")
            array = array.astype(meta.dtype)
        feed[name] = np.ascontiguousarray(array).reshape(array.shape)
    return feed


def _require_dtype(name: str, array: Array, *, expected: str) -> None:
    if array.dtype.name != expected or not array.dtype.isnative:
        raise RunError(f"input {name!r} is {array.dtype}, the spec has {expected}")


def _require_shape(name: str, array: Array, *, spec: GateSpec, sizes: dict[str, tuple[str, int]]) -> None:
    asked = spec.inputs[name]
    if array.ndim != len(asked.shape):
        raise RunError(f"input {name!r} has {array.ndim} axes {list(array.shape)}, the spec has {_shape(asked.shape)}")
    for axis, (size, wanted) in enumerate(zip(array.shape, asked.shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                raise RunError(f"input {name!r} is {list(array.shape)}: axis {axis} is {size}, the spec has {wanted}")
            continue
        allowed = asked.axes[wanted]
        if not allowed.min <= size <= allowed.max:
            raise RunError(
                f"input {name!r} is {list(array.shape)}: axis {axis} ({wanted}) is {size}, "
                f"outside the profile's {_range(allowed.min, allowed.max)}"
            )
        other, known = sizes.setdefault(wanted, (name, size))
        if known != size:
            raise RunError(f"axis {wanted!r} is {known} in input {other!r} and {size} in input {name!r}")


def _is_float(dtype: str) -> bool:
    return dtype in ("float16", "float32", "float64", "bfloat16")


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
