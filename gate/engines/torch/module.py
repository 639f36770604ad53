"""A model as PyTorch runs it in an engine: on its device, in its precision, tensors by position."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gate.engines.torch import arithmetic
from gate.engines.torch.runner import call_module, moved, named_outputs, require_module, takes_keywords, tensor_from
from gate.errors import GateError, RunError
from gate.factory import failure_of
from gate.spec import AxisRange, EngineSpec, GateSpec
from gate.tensors import NamedArrays

Mode = Literal["eager", "compile", "aotinductor"]
Device = Literal["cpu", "cuda"]
Cast = Literal["autocast", "weights"]

_NARROW = {"fp16": "float16", "bf16": "bfloat16"}
TRACE_SIZE = 2
"""An axis of size 1 is taken for a constant when a model is traced, so a dynamic one is traced with at least this.

Source: the torch.export documentation, "0/1 specialization".
"""
_USUAL_TRACE_SIZE = 8


def mode_of(engine: EngineSpec) -> Mode:
    """The engine's mode, its default filled in."""
    return engine.options.mode or "eager"


def device_of(engine: EngineSpec) -> Device:
    """Where the engine runs: on the GPU where its evidence is to be of one."""
    return "cuda" if engine.required_evidence == "device" else "cpu"


def cast_of(engine: EngineSpec) -> Cast | None:
    """How a model gets its lower precision; None where there is none to get."""
    return (engine.options.cast or "autocast") if engine.precision in _NARROW else None


@dataclass(frozen=True)
class EngineModule:
    """A model made ready to be run, compiled or exported.

    Args:
        core: A `torch.nn.Module` that takes tensors in the spec's order and returns what the model returns.
        names: Of the outputs.
        dtypes: Of the FP32 model's outputs, by torch's names.
        device: Where its weights are.
    """

    core: Any
    names: tuple[str, ...]
    dtypes: Mapping[str, str]
    device: Device


def engine_module(module: Any, *, spec: GateSpec, engine: EngineSpec, feed: NamedArrays) -> EngineModule:
    """The model on the engine's device in the engine's precision; the model itself is left as it is.

    Args:
        module: A `torch.nn.Module` in eval mode, on the CPU, in FP32.
        spec: Its inputs, and the names of its outputs.
        engine: Device, precision and cast.
        feed: Inputs that the FP32 model is run on once, for the names and dtypes of its outputs.

    Raises:
        RunError: It is no module, in train mode, fails, or cannot be copied, moved or converted.
        BackendUnavailable: It is to run on a GPU, and PyTorch finds none.
    """
    import torch

    require_module(module)
    device, cast = device_of(engine), cast_of(engine)
    arithmetic.require_device(device)
    try:
        with torch.no_grad():
            result = call_module(module, {name: tensor_from(array) for name, array in feed.items()})
    except Exception as err:
        raise failure_of(err, where="the model in FP32", error=RunError, doing="its forward") from err
    outputs = named_outputs(result, spec.model.output_names)
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in outputs.items()}
    narrow = getattr(torch, _NARROW[engine.precision]) if cast is not None else None
    if device != "cpu" or cast == "weights":
        try:
            module = moved(copy.deepcopy(module), device)
            module = module.to(narrow) if cast == "weights" else module
        except GateError:
            raise
        except Exception as err:
            raise RunError(
                f"the model cannot be copied to be converted: {type(err).__name__}: {err}",
                hint='Keep tensors that are computed in __init__ as buffers; or use cast = "autocast" on the CPU.',
            ) from err
    names = tuple(spec.inputs)
    core = _core(module, names, device=device, cast=cast, narrow=narrow, by_keyword=takes_keywords(module, names))
    return EngineModule(core, tuple(outputs), dtypes, device)


def _core(
    module: Any, names: Sequence[str], *, device: Device, cast: Cast | None, narrow: Any, by_keyword: bool
) -> Any:
    import torch

    class Core(torch.nn.Module):  # type: ignore[misc]
        """The model under autocast, or with its inputs converted as its weights are."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Any) -> Any:
            """What the model returns."""
            if cast == "weights":
                tensors = tuple(each.to(narrow) if each.is_floating_point() else each for each in tensors)
            if cast == "autocast":
                with torch.autocast(device, dtype=narrow):
                    return self._called(tensors)
            return self._called(tensors)

        def _called(self, tensors: tuple[Any, ...]) -> Any:
            if by_keyword:
                return self.module(**dict(zip(names, tensors)))  # noqa: B905 - torch.compile traces it without strict
            return self.module(*tensors)

    return Core().eval()


def named(made: EngineModule, output_names: Sequence[str]) -> Any:
    """A module around the core whose result is a dict of its outputs, as a package gives them."""
    import torch

    class Named(torch.nn.Module):  # type: ignore[misc]
        """Outputs by name."""

        def __init__(self) -> None:
            super().__init__()
            self.core = made.core

        def forward(self, *tensors: Any) -> dict[str, Any]:
            """Tensors by name."""
            return named_outputs(self.core(*tensors), output_names)

    return Named().eval()


def trace_feed(spec: GateSpec, feeds: Sequence[NamedArrays]) -> dict[str, Any]:
    """Inputs to trace with, as arrays: every dynamic axis at least `TRACE_SIZE` long where its range has that.

    Args:
        spec: The inputs and their ranges.
        feeds: Real inputs, of which the last is taken, cut or repeated to size; without any: ones.

    Raises:
        RunError: They lack an input, or have no element to repeat.
    """
    sizes = {axis: _trace_size(each) for entry in spec.inputs.values() for axis, each in entry.axes.items()}
    return _sized(spec, feeds, sizes)


def least_feed(spec: GateSpec, feeds: Sequence[NamedArrays]) -> dict[str, Any]:
    """As `trace_feed`, with every dynamic axis as short as it may be."""
    sizes = {axis: each.min for entry in spec.inputs.values() for axis, each in entry.axes.items()}
    return _sized(spec, feeds, sizes)


def _sized(spec: GateSpec, feeds: Sequence[NamedArrays], sizes: Mapping[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in spec.inputs.items():
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in each.shape)
        if not feeds:
            found[name] = np.ones(shape, each.dtype)
            continue
        if name not in feeds[-1]:
            raise RunError(f"the samples have no input {name!r}; they have {', '.join(feeds[-1]) or 'none'}")
        array = np.asarray(feeds[-1][name])
        if array.ndim != len(shape) or array.size == 0:
            raise RunError(f"a sample of input {name!r} is {list(array.shape)}, the spec has {len(shape)} axes")
        for axis, size in enumerate(shape):
            if array.shape[axis] != size:
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        found[name] = np.ascontiguousarray(array)
    return found


def _trace_size(axis: AxisRange) -> int:
    return min(max(min(axis.opt, _USUAL_TRACE_SIZE), axis.min, TRACE_SIZE), axis.max)
