"""The reference runner: PyTorch, eager, FP32, TF32 off, deterministic."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from gate.engines.feed import metas_from_spec, require_feed
from gate.engines.torch import arithmetic
from gate.errors import GateError, RunError
from gate.factory import failure_of
from gate.spec import GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta


def named_outputs(result: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """A model's result as tensors by name.

    Names are `names` where given; else the keys of a dict, the fields of a dataclass or named tuple; else `output`
    for a single tensor, and `output_0`, `output_1`, … for several. A dict whose keys are the names is ordered by them.

    Raises:
        RunError: There is nothing in it, something in it is not a tensor, or there are more or fewer than names.
    """
    import torch

    if isinstance(result, torch.Tensor):
        keys, values = ["output"], [result]
    elif isinstance(result, Mapping):
        keys, values = [str(key) for key in result], list(result.values())
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        keys = [each.name for each in dataclasses.fields(result)]
        values = [getattr(result, key) for key in keys]
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        keys, values = list(result._fields), list(result)
    elif isinstance(result, (tuple, list)):
        values = list(result)
        keys = ["output"] if len(values) == 1 else [f"output_{index}" for index in range(len(values))]
    else:
        raise RunError(f"the model returns a {type(result).__name__}; expected tensors, or a dict or tuple of them")
    found = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
    if not found:
        raise RunError("the model returns no output")
    for key, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise RunError(
                f"output {key!r} is a {type(value).__name__}, not a tensor",
                hint="Wrap the model so that its forward returns tensors only, or a flat dict or tuple of them.",
            )
    if not names:
        return found
    if len(names) != len(found):
        raise RunError(
            f"[model] output_names has {len(names)} names ({', '.join(names)}), "
            f"the model returns {len(found)} outputs ({', '.join(found)})"
        )
    known = set(names) & set(found)
    if known == set(names):
        return {name: found[name] for name in names}
    if known:
        unknown = sorted(set(names) - known)
        raise RunError(f"[model] output_names: the model returns no {', '.join(unknown)} (it has {', '.join(found)})")
    return dict(zip(names, found.values(), strict=True))


def call_module(module: Any, tensors: Mapping[str, Any]) -> Any:
    """Call a module with the spec's inputs: by keyword where its `forward` has those names, else in the spec's order."""
    if takes_keywords(module, tuple(tensors)):
        return module(**tensors)
    return module(*tensors.values())


def takes_keywords(module: Any, names: Sequence[str]) -> bool:
    """Whether each name is a parameter of the module's `forward` that can be given by keyword."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return all(name in parameters and parameters[name].kind in kinds for name in names)


def require_module(module: Any, *, error: type[GateError] = RunError, where: str | None = None) -> None:
    """Refuse what cannot be a reference: not a `torch.nn.Module`, or any part of it in train mode.

    Raises:
        GateError: `error`, naming the part.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise error(f"expected a torch.nn.Module, the factory returned a {type(module).__name__}", where=where)
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        raise error(
            f"the model is in train mode: {', '.join(training[:3])}{more}",
            where=where,
            hint="Call model.eval() before the factory returns it.",
        )


class TorchRunner:
    """A module in PyTorch, eager, in inference mode, with TF32 off and deterministic algorithms.

    PyTorch's process-wide switches are set while it is open and put back when it is closed; a module that was moved
    to the GPU is moved back to the CPU.

    Args:
        module: A `torch.nn.Module` in eval mode, on the CPU.
        spec: Its inputs, and the names of its outputs.
        device: Where to run: `cpu` or `cuda`.

    Raises:
        RunError: It is no module, in train mode, or does not fit on the device.
        BackendUnavailable: PyTorch finds no GPU.
    """

    def __init__(self, module: Any, *, spec: GateSpec, device: str = "cpu") -> None:
        require_module(module)
        arithmetic.require_device(device)
        self._module: Any = moved(module, device)
        self._device = device
        self._spec = spec
        self._inputs = metas_from_spec(spec)
        self._outputs: dict[str, TensorMeta] | None = None
        self._restore: Callable[[], None] | None = arithmetic.strict()

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes: the spec's inputs."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives; known from the last run, or from one on zeros of the smallest shape."""
        if self._outputs is None:
            self.run({name: np.zeros(each.sized("min"), each.dtype) for name, each in self._spec.inputs.items()})
        return self._outputs or {}

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """One inference.

        Raises:
            RunError: An input does not fit, the model failed, or the runner is closed.
        """
        tensors = self._tensors(feed_dict)
        outputs = {name: self._array(tensor) for name, tensor in self._call(tensors).items()}
        self._outputs = metas_of(outputs, feed_dict, spec=self._spec)
        return outputs

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference on tensors that are made already.

        Raises:
            RunError: As `run`.
        """
        tensors = self._tensors(feed_dict)

        def once() -> None:
            self._call(tensors)
            self._synchronize()

        return once

    def close(self) -> None:
        """Put PyTorch's switches and the module back."""
        restore, self._restore = self._restore, None
        if restore is not None:
            restore()
            if self._device != "cpu":
                self._module.to("cpu")
                arithmetic.give_memory_back()

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensors(self, feed_dict: NamedArrays) -> dict[str, Any]:
        if self._restore is None:
            raise RunError("the runner is closed")
        feed = require_feed(feed_dict, self._inputs, spec=self._spec)
        return {name: tensor_from(array).to(self._device) for name, array in feed.items()}

    def _call(self, tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        try:
            with torch.inference_mode():
                result = call_module(self._module, tensors)
        except Exception as err:
            failure = failure_of(err, where="the reference model", error=RunError, doing="its forward")
            if "CUBLAS_WORKSPACE_CONFIG" in str(err):
                failure.hint = (
                    "PyTorch computed on the GPU before the gate could ask for reproducible products: "
                    f"export CUBLAS_WORKSPACE_CONFIG={arithmetic.CUBLAS_WORKSPACE}"
                )
            raise failure from err
        return named_outputs(result, self._spec.model.output_names)

    def _array(self, tensor: Any) -> Array:
        return array_from(tensor)

    def _synchronize(self) -> None:
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()


def moved(module: Any, device: str) -> Any:
    """The module, itself, on a device.

    Raises:
        RunError: It cannot be moved there, such as for want of memory.
    """
    try:
        return module.to(device)
    except Exception as err:
        raise RunError(f"the model cannot be moved to {device}: {type(err).__name__}: {err}") from err


def metas_of(outputs: NamedArrays, feed_dict: NamedArrays, *, spec: GateSpec) -> dict[str, TensorMeta]:
    """What outputs are, from one run: a first axis as long as the batch is the batch, all others are not known."""
    axis = next(iter(spec.inputs.values())).shape[0]
    size = next(iter(feed_dict.values())).shape[0]
    return {
        name: TensorMeta(
            name,
            array.dtype.name,
            (axis if array.shape[0] == size else None, *(None for _ in array.shape[1:])) if array.ndim else (),
        )
        for name, array in outputs.items()
    }


def tensor_from(array: Array) -> Any:
    """An array as a CPU tensor that shares no memory with it."""
    import torch

    return torch.from_numpy(np.array(array, order="C", copy=True))


def array_from(tensor: Any) -> Array:
    """A tensor as an array of its own; bfloat16, which NumPy has not, as the equal float32."""
    import torch

    plain = tensor.detach().to("cpu")
    if plain.dtype == torch.bfloat16:
        plain = plain.to(torch.float32)
    return np.array(plain.numpy(), order="C", copy=True)
