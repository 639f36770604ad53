"""Named tensors: what an input or output is, and the exact pairing of two sets of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]
else:
    # Types alone: what only reads metadata does without NumPy, which takes a third of the time of a start.
    Array = Any
NamedArrays = Mapping[str, Array]


@dataclass(frozen=True)
class TensorMeta:
    """Name, dtype and shape of an input or output.

    Args:
        name: The tensor's name in the graph.
        dtype: NumPy's name, such as `float32`; `bfloat16` for bf16.
        shape: One entry per axis: a size, or the axis's name (or None) where it is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Mismatch:
    """One way in which two sets of outputs cannot be compared; `str()` is a sentence."""

    output: str
    message: str

    def __str__(self) -> str:
        return self.message


def mismatches(reference: NamedArrays, candidate: NamedArrays, *, cast_io: bool = False) -> tuple[Mismatch, ...]:
    """Everything that keeps `candidate` from being compared with `reference`: names, shapes and dtypes.

    Args:
        reference: Outputs of the reference, by name.
        candidate: Outputs of the engine on the same inputs, by name.
        cast_io: Accept another floating dtype; the values are then compared as float32.
    """
    found: list[Mismatch] = []
    for name in reference:
        if name not in candidate:
            found.append(
                Mismatch(
                    name,
                    f"outputs differ: the engine has no {name!r} (it has {_names(candidate)}); "
                    f"the reference has {_names(reference)}",
                )
            )
    for name in candidate:
        if name not in reference:
            found.append(
                Mismatch(
                    name,
                    f"outputs differ: the engine has an extra {name!r}; the reference has {_names(reference)}",
                )
            )
    for name in reference:
        if name not in candidate:
            continue
        want, got = reference[name], candidate[name]
        if want.shape != got.shape:
            found.append(
                Mismatch(name, f"output {name!r} has shape {list(got.shape)}, the reference has {list(want.shape)}")
            )
        floats = want.dtype.kind == "f" and got.dtype.kind == "f"
        if want.dtype != got.dtype and not (cast_io and floats):
            found.append(Mismatch(name, f"output {name!r} is {got.dtype}, the reference's is {want.dtype}"))
    return tuple(found)


def _names(arrays: NamedArrays) -> str:
    return ", ".join(repr(name) for name in arrays) or "none"
