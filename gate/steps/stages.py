"""Samples one by one through the whole pipeline of an engine, each stage on the clock: decode to postprocess."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gate.data.batches import Batch
from gate.data.images import ImageSource
from gate.data.samples import SampleSource, undigested
from gate.engines.interface import RegionTimed, Runner
from gate.errors import DataError, MeasurementError
from gate.latency.config import StagesSpec
from gate.latency.measurement import StageSummary
from gate.latency.stages import (
    STAGES,
    TOTAL,
    StageDurations,
    require_stages,
    stage_findings,
    summarise_stages,
)
from gate.metrics.interface import MetricKind
from gate.spec import EngineSpec
from gate.steps.context import Context, data_where
from gate.steps.own_decoder import decoded_by_function
from gate.steps.task import detections_of, task_kind
from gate.targets import ImageRecord, ImageTarget, TrackedFrame
from gate.tensors import Array
from gate.timing import Clock
from gate.verdict import Evidence, Finding

WARM_UP = 3
"""Samples that are taken through the pipeline before the first one that counts."""

_WHO = "stages"


@dataclass(frozen=True)
class StagesMeasured:
    """What the stages gave.

    Args:
        stages: Each in its order, and `total`.
        findings: One for each budget.
        notes: How the numbers were made, for a reader.
    """

    stages: tuple[StageSummary, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def stages_of(
    run: Context,
    engine: EngineSpec,
    runner: Runner,
    *,
    evidence: Evidence,
    clock: Clock = time.perf_counter_ns,
) -> StagesMeasured:
    """Take samples one by one through decode, preprocess, transfer, inference and postprocess, as far as there are such.

    Args:
        run: The samples.
        engine: What is asked for; how many samples and the budgets are its `stages`.
        runner: It, loaded.
        evidence: Of the findings.
        clock: The host's, monotonic, nanoseconds.

    Raises:
        SpecError: A budget is for a stage that this pipeline does not have.
        DataError: A sample cannot be read, or `[postprocess]` needs an image and a sample is none.
        RunError: The engine failed.
        MeasurementError: Its outputs cannot be read, or a duration is none.
    """
    spec = engine.stages or StagesSpec()
    pipeline = _Pipeline(run, engine, runner, on_device=evidence is Evidence.DEVICE, clock=clock)
    require_stages(spec, (*pipeline.names, TOTAL), engine=engine.name, file=run.file)
    took: dict[str, list[int]] = {name: [] for name in pipeline.names}
    try:
        for sample in itertools.islice(pipeline.samples(), WARM_UP):
            pipeline.finish(sample)
        for sample in itertools.islice(pipeline.samples(), spec.samples):
            pipeline.finish(sample)
            for name, values in took.items():
                values.append(sample.took[name])
            run.observer.advance()
    finally:
        run.decoder_state.pop(_WHO, None)
    durations = StageDurations({name: tuple(values) for name, values in took.items()})
    return StagesMeasured(
        stages=summarise_stages(durations),
        findings=stage_findings(durations, spec, engine=engine.name, file=run.file, evidence=evidence),
        notes=tuple(_notes(pipeline, spec)),
    )


def _notes(pipeline: _Pipeline, spec: StagesSpec) -> Iterator[str]:
    yield (
        "stages: one sample at a time, in the process of the check, files in the system's cache; they say what takes which "
        "share, [engine.latency] how fast the engine is"
    )
    if pipeline.regions is not None:
        yield (
            "stages: transfer (h2d + d2h) and inference are between CUDA events; the host's time to launch is in neither"
        )
    elif pipeline.on_device:
        yield "stages: inference holds the transfers; this engine does not tell them apart"
    if (there := len(pipeline.source)) < spec.samples:
        yield f"stages: {spec.samples} samples were asked for and there are {there}, so they took turns"
    if (least := pipeline.least) > 1:
        yield f"stages: the engine takes no fewer than {least} samples at a time, so inference is of {least} each"


@dataclass
class _Sample:
    """One sample on its way.

    Args:
        batch: Of it alone.
        given: What `[postprocess]` is told of it: an `ImageRecord` or a `TrackedFrame`; whatever else cannot be used.
        took: Nanoseconds by stage, so far.
    """

    batch: Batch
    given: Any
    took: dict[str, int] = field(default_factory=dict)


class _Pipeline:
    """The stages that an engine has in this spec, and how a sample goes through them."""

    def __init__(self, run: Context, engine: EngineSpec, runner: Runner, *, on_device: bool, clock: Clock) -> None:
        self.run = run
        self.engine = engine
        self.runner = runner
        self.on_device = on_device
        self.regions: RegionTimed | None = runner if on_device and isinstance(runner, RegionTimed) else None
        # What is held to its digest is digested in a thread, which would run beside what is timed here.
        self.source: SampleSource = undigested(run.source)
        self.least = next(iter(run.spec.inputs.values())).sized("min")[0]
        self._clock = clock
        self._kind: MetricKind | None = task_kind(run)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages there are, in their order."""
        there: set[str] = {"inference"}
        if isinstance(self.source, ImageSource):
            there |= {"decode", "preprocess"}
        if self.regions is not None:
            there.add("transfer")
        if self.run.spec.postprocess is not None and (self._kind is None or self._kind.predictions != "outputs"):
            there.add("postprocess")
        return tuple(name for name in STAGES if name in there)

    def samples(self) -> Iterator[_Sample]:
        """The samples one by one, made the engine's input, from the first again after the last.

        Raises:
            DataError: One cannot be read, or there are none.
        """
        while True:
            first = next(passing := self._once(), None)
            if first is None:
                raise DataError("gives no samples", where=data_where(self.run.spec.data, "source"))
            yield first
            yield from passing

    def _once(self) -> Iterator[_Sample]:
        if isinstance(self.source, ImageSource):
            for index in range(len(self.source)):
                yield self._from_image(self.source, index)
            return
        for batch in self.source.batches(1):
            target = None if batch.targets is None else batch.targets[0]
            yield _Sample(batch, target.image if isinstance(target, ImageTarget) else target)

    def _from_image(self, source: ImageSource, index: int) -> _Sample:
        clock = self._clock
        with _uncollected():
            begin = clock()
            pixels = source.decoded(index)
            decoded = clock()
            values = source.preprocessed(index, pixels)
            end = clock()
        batch = Batch(first=index, inputs={source.input_name: values}, labels=None)
        return _Sample(batch, source.records[index], {"decode": decoded - begin, "preprocess": end - decoded})

    def finish(self, sample: _Sample) -> None:
        """The rest of the way of a sample that is the engine's input.

        Raises:
            DataError: `[postprocess]` needs an image, and the sample is none.
            RunError: The engine failed.
            MeasurementError: Its outputs cannot be read.
        """
        outputs = self._inferred(sample)
        if "postprocess" not in self.names:
            return
        with _uncollected():
            begin = self._clock()
            self._postprocess(outputs, sample)
            sample.took["postprocess"] = self._clock() - begin

    def _inferred(self, sample: _Sample) -> dict[str, Array]:
        feed = {name: np.repeat(values, self.least, axis=0) for name, values in sample.batch.inputs.items()}
        with _uncollected():
            begin = self._clock()
            outputs = self.runner.run(feed)
            end = self._clock()
        if self.regions is None:
            sample.took["inference"] = end - begin
        else:
            sample.took.update(_regions(self.regions, feed))
        return self._of_one(outputs)

    def _of_one(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the sample alone, under the reference's names."""
        names = {theirs: ours for ours, theirs in self.engine.outputs.items()}
        return {
            names.get(name, name): values[:1] if values.ndim and len(values) == self.least else values
            for name, values in outputs.items()
        }

    def _postprocess(self, outputs: Mapping[str, Array], sample: _Sample) -> None:
        run, config, kind, first = self.run, self.run.spec.postprocess, self._kind, sample.batch.first
        try:
            if kind is not None and kind.predictions == "tracks" and isinstance(sample.given, TrackedFrame):
                decoded_by_function(outputs, [sample.given], run=run, kind=kind, who=_WHO, first=first)
            elif config is not None and isinstance(sample.given, ImageRecord):
                detections_of(outputs, [sample.given], config, run=run, batch=sample.batch, nms=self.engine.nms)
            else:
                raise DataError(
                    f"sample {first} does not say how it became the input, which [postprocess] needs",
                    where=data_where(run.spec.data, "source"),
                    hint="Give images, or targets of gate.ImageTarget (of tracks: gate.TrackedFrame): docs/tasks.md.",
                )
        except MeasurementError as err:
            raise MeasurementError(f"stages: sample {first}: {err.message}", where=err.where, hint=err.hint) from err


def _regions(runner: RegionTimed, feed: Mapping[str, Array]) -> dict[str, int]:
    """Transfer and inference of one batch, the second time that it runs: the first binds and allocates.

    Raises:
        RunError: The engine failed.
        MeasurementError: It does not say what its copies took.
    """
    once = runner.region_timed([feed], transfers=True, wait="spin")
    once(0)
    took = once(0)()
    if took.h2d is None or took.d2h is None:
        raise MeasurementError("the engine does not say what its copies to the GPU and back took")
    return {"transfer": took.h2d + took.d2h, "inference": took.gpu_compute}


@contextmanager
def _uncollected() -> Iterator[None]:
    """The garbage collector is off in this block; between samples it may do what is due."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
