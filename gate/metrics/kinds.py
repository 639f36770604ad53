"""The kinds of task by name, built in or from an entry point, and what the metrics of all of them check alike.

A built-in kind is the `KIND` of a module of this folder, or one of its `KINDS`; it is imported when it is asked for. Another
package adds one by an entry point of the group `trt_gate.metrics` whose name is the kind's and whose object is a `MetricKind`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from gate.errors import DataError, GateError, MeasurementError, SpecError
from gate.metrics.interface import MetricKind, SampleStatistics, TaskMetric, Weights
from gate.targets import Categories
from gate.tensors import Array

GROUP = "trt_gate.metrics"

_BUILT_IN: Mapping[str, str] = {
    "detection": "gate.metrics.detection",
    "instance_segmentation": "gate.metrics.detection",
    "keypoints": "gate.metrics.detection",
    "semantic_segmentation": "gate.metrics.segmentation",
    "regression": "gate.metrics.regression",
    "embedding": "gate.metrics.embedding",
    "tokens": "gate.metrics.tokens",
    "tracking": "gate.metrics.tracking",
}
_WITHOUT_KIND = ("classification",)
"""Tasks that are judged by exact intervals rather than by resampling, and so have no `MetricKind`."""

_KEY = "[task] kind"


def names() -> tuple[str, ...]:
    """Every name that `kind_named` may be asked for: the built-in ones, then those of entry points; none is imported."""
    return (*_BUILT_IN, *sorted({each.name for each in _entry_points()} - {*_BUILT_IN, *_WITHOUT_KIND}))


def kind_named(name: str) -> MetricKind:
    """The kind of task that a spec names.

    Raises:
        SpecError: There is none of that name, two distributions have one, one would replace a built-in, or the one there
            is cannot be imported or is no `MetricKind` of that name.
    """
    offered = [each for each in _entry_points() if each.name == name]
    if name in _BUILT_IN or name in _WITHOUT_KIND:
        if offered:
            raise SpecError(
                f"{_origin(offered[0])} has an entry point of the group {GROUP} named {name!r}, which is built in "
                "and cannot be replaced",
                where=_KEY,
                hint="Give the metric another name there, or uninstall the package.",
            )
        if name in _BUILT_IN:
            return _built_in(name)
    if len(offered) > 1:
        raise SpecError(
            f"{' and '.join(_origin(each) for each in offered)} each have an entry point of the group {GROUP} "
            f"named {name!r}",
            where=_KEY,
            hint="Uninstall all but one of them.",
        )
    if offered:
        return _loaded(offered[0])
    known = sorted({*names(), *_WITHOUT_KIND})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise SpecError(
        f"there is no kind of task {name!r}"
        + (f", did you mean {near[0]!r}?" if near else ".")
        + f" There is {', '.join(known)}",
        where=_KEY,
        hint="If another package brings it, install that package here.",
    )


def _built_in(name: str) -> MetricKind:
    module = importlib.import_module(_BUILT_IN[name])
    several = cast("tuple[MetricKind, ...]", getattr(module, "KINDS", ()) or (module.KIND,))
    return next(each for each in several if each.name == name)


def _entry_points() -> list[metadata.EntryPoint]:
    """Of the group, in a fixed order; a distribution that is found twice on the path counts once."""
    found = {
        (each.name, each.value, _origin(each)): each
        for each in sorted(metadata.entry_points(group=GROUP), key=lambda each: (each.name, each.value))
    }
    return list(found.values())


def _origin(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a distribution without a name"


def _loaded(point: metadata.EntryPoint) -> MetricKind:
    stated = f"the entry point {point.name} = {point.value} of {_origin(point)}"
    try:
        kind = point.load()
    except Exception as err:
        raise SpecError(
            f"{stated} cannot be loaded: {type(err).__name__}: {err}",
            where=_KEY,
            hint="Repair or reinstall that package.",
        ) from err
    if not isinstance(kind, MetricKind):
        raise SpecError(f"{stated} is a {type(kind).__name__}, expected a MetricKind", where=_KEY)
    if kind.name != point.name:
        raise SpecError(f"{stated} gives a MetricKind named {kind.name!r}; both names must be the same", where=_KEY)
    if not kind.values:
        raise SpecError(f"{stated} measures no value", where=_KEY)
    if kind.predictions not in ("outputs", "detections", "tracks"):
        raise SpecError(
            f"{stated} takes {kind.predictions!r}, expected 'outputs', 'detections' or 'tracks'",
            where=_KEY,
        )
    for precision, drop in kind.default_drop.items():
        if not _is_drop(drop):
            raise SpecError(
                f"{stated} has default_drop {drop!r} for {precision}, expected a finite number from 0", where=_KEY
            )
    return _held_to_its_contract(kind, _origin(point))


def _is_drop(value: object) -> bool:
    """Whether it is a finite number from 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _held_to_its_contract(kind: MetricKind, package: str) -> MetricKind:
    """The kind of another package: what goes wrong in it is an error that names the package."""
    make, read = kind.make, kind.read

    def made(options: Mapping[str, Any], categories: Categories | None) -> TaskMetric:
        with _blamed_on(package, f"making an empty metric {kind.name!r}", SpecError):
            return _Metric(make(options, categories), package)

    def restored(arrays: Mapping[str, Array]) -> SampleStatistics:
        with _blamed_on(package, "reading stored statistics"):
            return _Statistics(read(arrays), package)

    return replace(kind, make=made, read=restored)


@contextmanager
def _blamed_on(package: str, doing: str, error: type[GateError] = MeasurementError) -> Iterator[None]:
    try:
        yield
    except GateError:
        raise
    except Exception as err:
        raise error(f"{package} failed {doing}: {type(err).__name__}: {err}", hint="Repair that package.") from err


@dataclass
class _Metric:
    """A metric of another package, as `TaskMetric`.

    Args:
        metric: It.
        package: For errors.
        added: How many samples it was given.
    """

    metric: TaskMetric
    package: str
    added: int = 0

    def add(self, predictions: Any, *, reference: Any, targets: Sequence[Any], first_sample: int) -> None:
        """As `TaskMetric.add`."""
        with _blamed_on(self.package, f"at the batch from sample {first_sample}"):
            self.metric.add(predictions, reference=reference, targets=targets, first_sample=first_sample)
        self.added += len(targets)

    def statistics(self) -> SampleStatistics:
        """As `TaskMetric.statistics`."""
        with _blamed_on(self.package, "at its statistics"):
            found = _Statistics(self.metric.statistics(), self.package)
            if not 0 < found.samples <= self.added:
                raise MeasurementError(f"{self.package} scored {found.samples} samples, and was given {self.added}")
            return found


@dataclass(frozen=True)
class _Statistics:
    """Statistics of another package, as `SampleStatistics`."""

    statistics: SampleStatistics
    package: str

    @property
    def samples(self) -> int:
        """As `SampleStatistics.samples`."""
        with _blamed_on(self.package, "at the number of samples"):
            return int(self.statistics.samples)

    def values(self, weights: Weights | None = None) -> dict[str, float]:
        """As `SampleStatistics.values`."""
        with _blamed_on(self.package, "at its values"):
            found = self.statistics.values(weights)
            for name, value in found.items():
                if isinstance(value, (bool, str)) or np.ndim(value) != 0:
                    raise MeasurementError(f"{self.package} gave {name} = {value!r}, expected a number")
            return {str(name): float(value) for name, value in found.items()}

    def to_arrays(self) -> dict[str, Array]:
        """As `SampleStatistics.to_arrays`."""
        with _blamed_on(self.package, "at storing its statistics"):
            found = {str(name): np.asarray(each) for name, each in self.statistics.to_arrays().items()}
            for name, each in found.items():
                if each.dtype.kind not in "biuf":
                    raise MeasurementError(f"{self.package} stores {name!r} as {each.dtype}, expected numbers")
            return found


def require_options(kind: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse an option of `[task]` that the kind does not have.

    Raises:
        SpecError: There is one; names the nearest.
    """
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known) or 'none'}"
            raise SpecError(f"the kind {kind!r} has no option {name!r}{meant}", where=f"[task.options] {name}")


def option_text(options: Mapping[str, Any], name: str) -> str | None:
    """An option that is a text, None where it is left out.

    Raises:
        SpecError: It is something else, or empty.
    """
    value = options.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise SpecError(f"expected a name, got {value!r}", where=f"[task.options] {name}")
    return value


def option_integer(options: Mapping[str, Any], name: str) -> int | None:
    """An option that is a whole number, None where it is left out.

    Raises:
        SpecError: It is something else.
    """
    value = options.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise SpecError(f"expected a whole number, got {value!r}", where=f"[task.options] {name}")
    return value


def output_of(predictions: Any, name: str | None, *, who: str) -> Array:
    """The output that is scored: the one that the option `output` names, or the only one.

    Args:
        predictions: Outputs by name.
        name: As the spec has it; None where it is left out.
        who: `engine` or `reference`, for errors.

    Raises:
        MeasurementError: There is no such output, there are several and none is named, or it holds no samples [n, ...].
    """
    if not isinstance(predictions, Mapping) or not predictions:
        raise MeasurementError(f"the {who}'s answer is no outputs by name: {type(predictions).__name__}")
    had = ", ".join(repr(each) for each in predictions)
    if name is None and len(predictions) > 1:
        raise MeasurementError(
            f"the {who} has {len(predictions)} outputs ({had}), and none is named to be scored",
            hint='Name it in the spec: [task.options] output = "...".',
        )
    if name is not None and name not in predictions:
        raise MeasurementError(f"the {who} has no output {name!r}; it has {had}", where="[task.options] output")
    array: Array = np.asarray(next(iter(predictions.values())) if name is None else predictions[name])
    if array.ndim == 0:
        raise MeasurementError(f"the {who}'s output is a scalar, expected one entry for each sample [n, ...]")
    return array


def require_next(first_sample: int, expected: int, *, predictions: int, targets: Sequence[Any] | None) -> None:
    """Refuse a batch that is not the next one, is empty, or has not one target for each prediction.

    Raises:
        DataError: There are no targets at all, or a sample has none.
        MeasurementError: It is out of order, empty, or of another number.
    """
    if first_sample != expected:
        raise MeasurementError(f"expected the batch from sample {expected}, got that from {first_sample}")
    if targets is None or (predictions and not len(targets)):
        raise DataError("[task] needs a target for each sample, and the samples have none", where="[data] source")
    if predictions != len(targets):
        raise MeasurementError(f"there are {predictions} predictions for {len(targets)} targets from {first_sample} on")
    if not predictions:
        raise MeasurementError(f"the batch from sample {first_sample} is empty")
    for offset, target in enumerate(targets):
        if target is None:
            raise DataError(f"sample {first_sample + offset} has no target", where="[data] source")


def require_finite(array: Array, *, who: str, first_sample: int) -> None:
    """Refuse floats with a NaN or Inf.

    Args:
        array: [n, ...].
        who: `engine` or `reference`, for errors.
        first_sample: Index of its first entry in the data set.

    Raises:
        MeasurementError: There is one; names the first sample that has it.
    """
    for offset, each in enumerate(array):
        finite = np.isfinite(each)
        if not finite.all():
            wrong = int(each.size - np.count_nonzero(finite))
            raise MeasurementError(
                f"the {who}'s output of sample {first_sample + offset} holds {wrong} of {each.size} values that are "
                "NaN or Inf; nothing can be scored with them"
            )


def require_weights(weights: Weights | None, samples: int) -> Weights:
    """How often each sample counts, int64 [samples]; once where left out.

    Raises:
        MeasurementError: They are not whole numbers from 0, one for each sample.
    """
    if weights is None:
        return np.ones(samples, np.int64)
    given = np.asarray(weights)
    if given.shape != (samples,) or given.dtype.kind not in "iu" or (samples and int(given.min()) < 0):
        raise MeasurementError(
            f"weights must be whole numbers from 0, one for each of {samples} samples; "
            f"got {given.dtype} {list(given.shape)}"
        )
    return given.astype(np.int64, copy=False)


def ratio(numerator: float, denominator: float) -> float:
    """Their quotient, NaN where there is nothing to divide by."""
    return float(numerator) / float(denominator) if denominator else math.nan


def require_arrays(
    arrays: Mapping[str, Array], expected: Mapping[str, tuple[npt.DTypeLike, int]], *, kind: str
) -> dict[str, Array]:
    """Stored statistics, exactly those that there must be.

    Args:
        arrays: As they were read.
        expected: By name the dtype and the number of axes.
        kind: For errors.

    Raises:
        MeasurementError: One is missing, unknown, or of another dtype or number of axes.
    """
    if set(arrays) != set(expected):
        raise MeasurementError(
            f"statistics of {kind} hold {', '.join(sorted(arrays)) or 'nothing'}; expected {', '.join(sorted(expected))}"
        )
    found = {name: np.asarray(arrays[name]) for name in expected}
    for name, (dtype, axes) in expected.items():
        if found[name].dtype != np.dtype(dtype) or found[name].ndim != axes:
            raise MeasurementError(
                f"{name!r} in statistics of {kind} is {found[name].dtype} {list(found[name].shape)}; "
                f"expected {np.dtype(dtype)} with {axes} axes"
            )
    return found


def array_from_texts(texts: Iterable[str]) -> Array:
    """Texts as an array that any format of arrays can store: uint8, UTF-8 of a JSON list."""
    return np.frombuffer(json.dumps(list(texts), ensure_ascii=False).encode(), np.uint8)


def texts_from_array(array: Array, *, kind: str) -> tuple[str, ...]:
    """The inverse of `array_from_texts`.

    Raises:
        MeasurementError: It holds no such list.
    """
    try:
        texts = json.loads(array.tobytes().decode())
    except ValueError as err:
        raise MeasurementError(f"names in statistics of {kind} cannot be read: {err}") from err
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise MeasurementError(f"names in statistics of {kind} are no list of texts")
    return tuple(texts)
