"""What the steps of a check share: the samples, the recorded reference, the cache, the observer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import numpy as np

from gate.calibration import InputStats, add_inputs, scale_notes
from gate.data.batches import Batch
from gate.data.image_spec import Preprocess
from gate.data.samples import (
    DataDigest,
    DigestedSource,
    SampleSource,
    all_batches,
    digest_of,
    open_source,
    require_disjoint,
    undigested,
)
from gate.errors import DataError, MeasurementError
from gate.reference import ModelIdentity, Recording, ReferenceModel, batch_size, read_recording
from gate.reference import record as record_reference
from gate.spec import DataSpec, SpecFile
from gate.tensors import Array

if TYPE_CHECKING:
    from gate.cache import Cache
    from gate.steps.answers import Answers


class Observer(Protocol):
    """Told what happens while it happens; a terminal shows progress, a test nothing."""

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:
        """A stage begins.

        `samples`, `reference`, `export`, `lower`, `build`, `compare`, `metamorphic`, `stages`, `latency`, `usage` or
        `memory`. `total` is the number of steps where it is known (batches); it ends when the next begins or on `done`.
        """
        ...

    def advance(self, steps: int = 1) -> None:
        """So many steps of the current stage are done."""
        ...

    def phase(self, name: str, done: float | None) -> None:
        """A compiler is in a phase of the current stage; `done` is the share of it, where it is known."""
        ...

    def note(self, text: str) -> None:
        """Something a reader should know: what was reused, a cache entry that was rebuilt."""
        ...

    def done(self) -> None:
        """The last stage ended."""
        ...


class Silence:
    """An observer that shows nothing."""

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def phase(self, name: str, done: float | None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class CheckOptions:
    """How to check.

    Args:
        engines: Only these, in the spec's order; empty: all.
        cache: Folder of the cache; None: no cache, everything is made anew in a temporary folder.
        baselines: Folder of the accepted baselines.
        reference: A folder made by `gate record`, for a host without PyTorch.
        bundles: Folder with the sealed bundles of accepted engines, as `<model>/<engine>`, to time new ones against.
        max_time_s: Measure the latency of an engine no longer than this; None: as the spec says.
        answered: Called with what an engine and the reference answered at a task other than classification, once for
            each of its builds, the first first; None: nobody is.
    """

    engines: tuple[str, ...] = ()
    cache: Path | None = field(default_factory=lambda: Path(".gate/cache"))
    baselines: Path = Path("baselines")
    reference: Path | None = None
    bundles: Path = Path("bundles")
    max_time_s: float | None = None
    answered: Callable[[Answers], None] | None = None


@dataclass(frozen=True)
class Exported:
    """The reference as FP32 ONNX, and whether it came from the cache or a recording."""

    path: Path
    sha256: str
    opset: int
    reused: bool


class Context:
    """What all engines of a run share: opened once, lazily where not every engine needs it."""

    def __init__(self, file: SpecFile, options: CheckOptions, observer: Observer) -> None:
        from gate.cache import Cache

        self.file = file
        self.spec = file.spec
        self.options = options
        self.observer = observer
        self.cache: Cache = Cache(options.cache, on_rebuild=observer.note)
        self.seconds: dict[str, float] = {}
        self.model = ReferenceModel(file, self.cache)
        self.source: SampleSource
        self.digest: DataDigest
        self.identity: ModelIdentity
        self.recording: Recording
        self._calibration: tuple[SampleSource, DataDigest] | None = None
        self._seen: dict[str, InputStats] = {}
        self.scale_notes: tuple[str, ...] = ()
        self.graph: Exported | None = None
        self._closing: list[Callable[[], None]] = []
        self.decoder_state: dict[str, dict[Any, Any]] = {}

    @contextmanager
    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> Iterator[None]:
        """Show a stage and add its wall time to `seconds`."""
        self.observer.stage(name, engine=engine, total=total)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def open_samples(self) -> None:
        """Read, check and digest every evaluation sample."""
        data = self.spec.data
        where = data_where(data, "source")
        with self.stage("samples"):
            self.source = self._opened("source", data.samples)
            self.digest = digest_of(
                self.source,
                inputs=self.spec.inputs,
                batch=batch_size(self.file),
                where=where,
                look=None if not data.calibrates else lambda inputs: add_inputs(self._seen, inputs),
            )
            self.source = DigestedSource(self.source, self.digest, where)
            labels = np.frombuffer(self.digest.labels, "<i8")
            if (
                self.spec.task is not None
                and self.spec.task.is_classification
                and len(labels) > 1
                and labels.min() == labels.max()
            ):
                raise DataError(
                    f"all {len(labels)} labels are {labels[0]}, so an engine that always gives one answer would be right",
                    where=where,
                )
            if data.calibrates:
                self.calibration()

    def _opened(self, key: Literal["source", "calibration"], needed: int) -> SampleSource:
        """The samples that `[data]` names, by a function, a file or images."""
        data = self.spec.data
        images = data.images if key == "source" else data.calibration_images
        if images is None:
            source = open_source(self.file, str(getattr(data, key)), needed=needed, key=key)
            if callable(close := getattr(source, "close", None)):
                self._closing.append(close)
            return source
        from gate.data.image_sources import open_images

        name, given = next(iter(self.spec.inputs.items()))
        opened = open_images(
            images,
            self.file.folder,
            preprocess=self.spec.preprocess or Preprocess(resize="none"),
            input_name=name,
            dtype=given.dtype,
            samples=needed,
            seed=data.seed,
            where=data_where(data, key),
        )
        self._closing.append(opened.close)
        return opened

    def data_record(self) -> dict[str, object]:
        """How images became the model's input and outputs became detections, for the bundle."""
        source = undigested(self.source)
        found: dict[str, object] = {}
        if callable(described := getattr(source, "described", None)):
            found["images"] = described()
        if self.spec.postprocess is not None:
            found["postprocess"] = msgspec.to_builtins(self.spec.postprocess.resolved())
        if self.spec.tiling is not None:
            found["tiling"] = msgspec.to_builtins(self.spec.tiling)
        return found

    def close(self) -> None:
        """End the processes that decode images."""
        while self._closing:
            self._closing.pop()()

    def calibration(self) -> tuple[SampleSource, DataDigest]:
        """The calibration samples, checked against the evaluation samples: none in both, and of the same scale."""
        if self._calibration is None:
            data = self.spec.data
            if not data.calibrates:
                raise DataError("[data] names no calibration samples", where=str(self.file.path))
            source = self._opened("calibration", data.calibration_samples)
            source = _First(source, data.calibration_samples)
            where = data_where(data, "calibration")
            seen: dict[str, InputStats] = {}
            digest = digest_of(
                source,
                inputs=self.spec.inputs,
                batch=batch_size(self.file),
                where=where,
                look=lambda inputs: add_inputs(seen, inputs),
            )
            require_disjoint(self.digest, digest)
            self.scale_notes = scale_notes(seen, self._seen)
            self._calibration = (DigestedSource(source, digest, where), digest)
        return self._calibration

    def open_reference(self) -> None:
        """Record the reference, or read its recording."""
        batches = -(-len(self.source) // batch_size(self.file))
        with self.stage("reference", total=batches):
            if self.options.reference is not None:
                self.recording, self.identity = read_recording(
                    self.options.reference, file=self.file, digest=self.digest
                )
            else:
                self.identity = self.model.identity()
                self.recording = record_reference(
                    self.model,
                    file=self.file,
                    source=self.source,
                    digest=self.digest,
                    cache=self.cache,
                    advance=self.observer.advance,
                )

    def pairs(self) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """Each batch of samples with the reference's outputs for it."""
        outputs = self.recording.batches()
        firsts = iter(self.recording.firsts)
        for batch in all_batches(self.source, batch_size(self.file)):
            first = next(firsts, None)
            if first != batch.first:
                raise MeasurementError(f"the recorded reference has no batch that starts at sample {batch.first}")
            yield batch, next(outputs)
        if next(firsts, None) is not None:
            raise MeasurementError("the recorded reference holds more samples than the data source gave")


def data_where(data: DataSpec, key: Literal["source", "calibration"]) -> str:
    """What to call the samples in errors."""
    images = data.images if key == "source" else data.calibration_images
    if images is None:
        return f"[data] {key} = {getattr(data, key)!r}"
    table = "images" if key == "source" else "calibration_images"
    return f"[data.{table}] {images.annotations or images.path}"


@dataclass(frozen=True)
class _First:
    """The first so many samples of a source."""

    source: SampleSource
    count: int

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        """As `SampleSource.batches`."""
        for batch in self.source.batches(size):
            left = self.count - batch.first
            if left <= 0:
                return
            if batch.size <= left:
                yield batch
                continue
            labels = None if batch.labels is None else batch.labels[:left]
            targets = None if batch.targets is None else batch.targets[:left]
            yield Batch(batch.first, {name: values[:left] for name, values in batch.inputs.items()}, labels, targets)


def scores_output(run: Context) -> str:
    """The output with the class scores: the spec's, or the only one.

    Raises:
        DataError: There is none, or several.
    """
    names = list(run.recording.outputs)
    asked = run.spec.task.output if run.spec.task is not None else None
    if asked is not None:
        if asked not in names:
            raise DataError(
                f"[task] output = {asked!r}, the reference has {', '.join(map(repr, names))}",
                where=run.file.location("task", "output"),
            )
        return asked
    if len(names) == 1:
        return names[0]
    raise DataError(
        f"[task] must say which output holds the class scores: {', '.join(map(repr, names))}",
        where=run.file.location("task"),
        hint=f'output = "{names[0]}"',
    )
