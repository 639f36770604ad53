"""A task other than classification: the answers of reference and engine against the ground truth, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gate.data.samples import Batch, categories_of
from gate.device import usable_cores
from gate.errors import DataError, MeasurementError, RunError
from gate.metrics.detection import BoxAgreement, BoxComparison, explain_low_map
from gate.metrics.findings import (
    Asked,
    asked_limits,
    implausible_gain,
    measured_values,
    task_findings,
    with_seed,
)
from gate.metrics.interface import MetricKind, SampleStatistics, TaskMetric
from gate.metrics.kinds import kind_named
from gate.postprocess.detections import detections_from_nms_outputs, detections_from_outputs
from gate.results import TaskValues
from gate.spec import EngineSpec
from gate.steps.context import Context, data_where
from gate.targets import Categories, Detections, ImageRecord, ImageTarget
from gate.tensors import Array
from gate.verdict import Evidence, Finding

NMS_OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
"""What `nms` adds to an engine's graph."""

_HINTED = 500


@dataclass(frozen=True)
class TaskMeasured:
    """What the task gave.

    Args:
        values: Of engine and reference.
        findings: One for each limit.
        notes: Likely causes, and what a reader should look at.
        boxes: How the boxes differ, with the worst images; None for other tasks.
    """

    values: TaskValues
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    boxes: BoxAgreement | None


def task_kind(run: Context) -> MetricKind | None:
    """The task's kind; None where there is no task, or it is classification.

    Raises:
        SpecError: There is no such kind, or an engine asks for what it does not measure, or an option is unknown.
    """
    task = run.spec.task
    if task is None or task.is_classification:
        return None
    kind = kind_named(task.kind)
    for engine in run.spec.engines:
        asked_limits(kind, engine, run.file)
    return kind


def require_task(run: Context) -> None:
    """Hold the task against the spec and the samples before anything is built.

    Raises:
        SpecError: The spec asks for what the task does not have.
        DataError: There is no ground truth.
    """
    kind = task_kind(run)
    if kind is None:
        return
    if kind.predictions == "detections" and run.spec.postprocess is None:
        raise DataError(
            f"{kind.name} needs [postprocess], which says how the outputs become detections",
            where=run.file.location("task", "kind"),
            hint="docs/tasks.md has one for each common head.",
        )
    if not run.digest.targets and not run.digest.labels:
        raise DataError(
            f"[task] kind = {kind.name!r} needs ground truth, and the samples have none",
            where=data_where(run.spec.data, "source"),
            hint="Give targets: docs/tasks.md.",
        )
    _made(run, kind)


@dataclass
class TaskRun:
    """One engine's answers beside the reference's."""

    run: Context
    engine: EngineSpec
    kind: MetricKind
    asked: tuple[Asked, ...]
    candidate: TaskMetric
    reference: TaskMetric
    categories: Categories | None
    boxes: BoxComparison | None
    _found: list[tuple[Detections, ...]] = field(default_factory=list)
    _truth: list[ImageTarget] = field(default_factory=list)

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array], batch: Batch) -> None:
        """Take the next batch.

        Args:
            reference: The recorded outputs.
            candidate: The engine's under the reference's names, with those that `nms` added.
            batch: The samples.

        Raises:
            DataError: The ground truth is missing or malformed.
            MeasurementError: The answers are.
        """
        targets = targets_of(batch, self.run)
        theirs = _predictions(reference, batch, targets, run=self.run, kind=self.kind, nms=None, who="the reference")
        ours = _predictions(
            candidate, batch, targets, run=self.run, kind=self.kind, nms=self.engine.nms, who="the engine"
        )
        if self.boxes is not None:
            self.boxes.add(theirs, ours, [each.image for each in targets])
            if len(self._truth) < _HINTED:
                self._found.append(ours)
                self._truth.extend(targets)
        try:
            self.reference.add(theirs, reference=theirs, targets=targets, first_sample=batch.first)
        except MeasurementError as err:
            raise MeasurementError(f"the reference: {err.message}", where=err.where, hint=err.hint) from err
        self.candidate.add(ours, reference=theirs, targets=targets, first_sample=batch.first)

    def measured(self, evidence: Evidence, engine_sha256: str) -> TaskMeasured:
        """What all batches gave.

        Raises:
            MeasurementError: There is nothing to score.
        """
        try:
            theirs: SampleStatistics = self.reference.statistics()
        except MeasurementError as err:
            raise MeasurementError(f"the reference: {err.message}", where=err.where, hint=err.hint) from err
        ours = self.candidate.statistics()
        task = self.run.spec.task
        findings = task_findings(
            self.asked,
            ours,
            theirs,
            kind=self.kind,
            evidence=evidence,
            seed=with_seed(
                candidate=engine_sha256, reference=self.run.recording.sha256, data=self.run.digest.data_sha256
            ),
            resamples=1000 if task is None else task.resamples,
            workers=usable_cores(),
        )
        values = measured_values(ours, theirs, kind=self.kind)
        agreement = None if self.boxes is None else self.boxes.result()
        if agreement is not None:
            values = msgspec.structs.replace(values, boxes=_numbers(agreement))
        return TaskMeasured(values, findings, tuple(self._notes(values, agreement)), agreement)

    def _notes(self, values: TaskValues, agreement: BoxAgreement | None) -> list[str]:
        notes = []
        if (gain := implausible_gain(values.values, values.reference, self.kind)) is not None:
            notes.append(f"implausible: {gain}")
        if agreement is None:
            return notes
        first = next(iter(self.kind.values))
        if values.values[first] < values.reference[first] / 2 and self.categories is not None and self._truth:
            found = [each for batch in self._found for each in batch]
            hint = explain_low_map(found, self._truth, self.categories, expected=values.reference[first])
            if hint is not None:
                notes.append(f"likely cause: {hint}")
        if agreement.worst and (agreement.reference_only or agreement.candidate_only or agreement.class_changes):
            worst = agreement.worst[0]
            named = worst.file_name or f"image {worst.image_id}"
            notes.append(
                f"boxes: {agreement.matched} pairs, mean IoU {agreement.mean_iou:.4f}, {agreement.class_changes} of another "
                f"category, {agreement.reference_only} not found, {agreement.candidate_only} new; worst {named}: {worst.why}"
            )
        return notes


def task_run(run: Context, engine: EngineSpec) -> TaskRun | None:
    """An empty task of an engine; None where the spec has none but classification.

    Raises:
        SpecError: As `task_kind`.
    """
    kind = task_kind(run)
    if kind is None:
        return None
    compares = kind.name == "detection"
    return TaskRun(
        run=run,
        engine=engine,
        kind=kind,
        asked=asked_limits(kind, engine, run.file),
        candidate=_made(run, kind),
        reference=_made(run, kind),
        categories=categories_of(run.source),
        boxes=BoxComparison() if compares else None,
    )


def reference_values(run: Context, kind: MetricKind) -> dict[str, float]:
    """The reference's own values on all samples.

    Raises:
        DataError: The ground truth is missing or malformed.
        MeasurementError: The reference's answers are.
    """
    metric = _made(run, kind)
    for batch, outputs in run.pairs():
        targets = targets_of(batch, run)
        found = _predictions(outputs, batch, targets, run=run, kind=kind, nms=None, who="the reference")
        metric.add(found, reference=found, targets=targets, first_sample=batch.first)
    return metric.statistics().values()


def targets_of(batch: Batch, run: Context) -> Sequence[Any]:
    """The ground truth of a batch: its targets, or else its labels.

    Raises:
        DataError: It has neither.
    """
    if batch.targets is not None:
        return batch.targets
    if batch.labels is not None:
        return [int(each) for each in batch.labels]
    raise DataError(
        f"the samples from {batch.first} on have no ground truth", where=data_where(run.spec.data, "source")
    )


def _made(run: Context, kind: MetricKind) -> TaskMetric:
    task = run.spec.task
    return kind.make({} if task is None else task.options, categories_of(run.source))


def _predictions(
    outputs: Mapping[str, Array],
    batch: Batch,
    targets: Sequence[Any],
    *,
    run: Context,
    kind: MetricKind,
    nms: str | None,
    who: str,
) -> Any:
    """What the kind's metric takes: the outputs, or detections made of them."""
    config = run.spec.postprocess
    if kind.predictions != "detections" or config is None:
        return outputs
    images = [_image(target, batch.first + row) for row, target in enumerate(targets)]
    decode = detections_from_nms_outputs if nms is not None else detections_from_outputs
    try:
        return decode(outputs, images, config, input_size=_input_size(run, batch))
    except MeasurementError as err:
        raise MeasurementError(f"{who}: {err.message}", where=err.where, hint=err.hint) from err


def _image(target: Any, index: int) -> ImageRecord:
    if not isinstance(target, ImageTarget):
        raise DataError(
            f"the target of sample {index} is a {type(target).__name__}; detections need a gate.ImageTarget",
            hint='A COCO folder gives them: [data.images] kind = "coco".',
        )
    return target.image


def _input_size(run: Context, batch: Batch) -> tuple[int, int] | None:
    """Height and width of the model's input; None where it is no image."""
    values = next(iter(batch.inputs.values()))
    if values.ndim != 4:
        return None
    if run.spec.preprocess is not None and run.spec.preprocess.layout == "nhwc":
        return int(values.shape[1]), int(values.shape[2])
    return int(values.shape[2]), int(values.shape[3])


def nms_outputs(outputs: dict[str, Any]) -> dict[str, Any]:
    """Those that `nms` added, taken out of an engine's outputs.

    Raises:
        RunError: One is missing.
    """
    missing = [name for name in NMS_OUTPUTS if name not in outputs]
    if missing:
        raise RunError(f"the engine has no output {missing[0]!r}, which nms puts into its graph")
    return {name: outputs.pop(name) for name in NMS_OUTPUTS}


def _numbers(agreement: BoxAgreement) -> dict[str, float]:
    return {
        name: float(getattr(agreement, name))
        for name in (
            "reference",
            "candidate",
            "matched",
            "mean_iou",
            "least_iou",
            "mean_score_difference",
            "max_score_difference",
            "class_changes",
            "reference_only",
            "candidate_only",
        )
    }
