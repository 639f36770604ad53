"""Detections, or tracks, made of the outputs by a function of the project's own: `[postprocess] head = "function"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gate.errors import MeasurementError
from gate.factory import failure_of, load_callable
from gate.metrics.interface import MetricKind
from gate.steps.context import Context
from gate.targets import Detections, TrackedFrame
from gate.tensors import Array


def require_function(run: Context) -> Callable[..., object]:
    """The project's function.

    Raises:
        SpecError: There is no such function.
    """
    name = _name(run)
    return load_callable(name, run.file.folder, where=_where(name))


def _name(run: Context) -> str:
    config = run.spec.postprocess
    return "" if config is None or config.function is None else config.function


def _where(name: str) -> str:
    return f"[postprocess] function = {name!r}"


def decoded_by_function(
    outputs: Mapping[str, Array], given: Sequence[Any], *, run: Context, kind: MetricKind, who: str, first: int
) -> tuple[Any, ...]:
    """What the project's function makes of a batch's outputs.

    It is called as `function(outputs, images, state)`: the outputs by name, float32 or as the model has them, [n, ...]; the n
    `ImageRecord`s, or for tracking the n `TrackedFrame`s of the ground truth, of which it may look at sequence and frame
    alone; and a dict that is its own, one for each model, empty at the first sample.

    Args:
        outputs: By name.
        given: One for each sample.
        run: Has the spec.
        kind: What is to come of it.
        who: Whose outputs they are.
        first: Index of the batch's first sample.

    Raises:
        SpecError: There is no such function.
        MeasurementError: It failed, or did not give one answer of the right kind for each sample.
    """
    where = _where(_name(run))
    call = require_function(run)
    if first == 0:
        run.decoder_state[who] = {}
    copies = {key: values.copy() for key, values in outputs.items()}
    try:
        found = call(copies, list(given), run.decoder_state.setdefault(who, {}))
    except Exception as err:
        raise failure_of(err, where=where, error=MeasurementError, doing=f"decoding the outputs of {who}") from err
    expected = TrackedFrame if kind.predictions == "tracks" else Detections
    if not isinstance(found, (list, tuple)) or len(found) != len(given):
        count = f"{len(found)}" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"
        raise MeasurementError(f"gave {count}, expected {len(given)} gate.{expected.__name__}", where=where)
    for index, each in enumerate(found):
        if not isinstance(each, expected):
            raise MeasurementError(
                f"gave a {type(each).__name__} for sample {first + index}, expected a gate.{expected.__name__}",
                where=where,
            )
    return tuple(found)
