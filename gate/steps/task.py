"""A task other than classification: the answers of reference and engine against the ground truth, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from gate.data.batches import Batch
from gate.data.images import ImageSource, Problems
from gate.data.samples import ArraySource, categories_of, undigested
from gate.device import usable_cores
from gate.errors import DataError, MeasurementError, RunError
from gate.manifest import sha256_hex
from gate.metrics.detection import (
    IOU_TYPES,
    BoxAgreement,
    BoxComparison,
    explain_low_map,
    require_target,
    second_sigmoid,
)
from gate.metrics.findings import (
    Asked,
    asked_limits,
    implausible_gain,
    measured_values,
    task_findings,
)
from gate.metrics.interface import MetricKind, SampleStatistics, TaskMetric
from gate.metrics.kinds import kind_named
from gate.metrics.resampling import seed_from
from gate.postprocess.config import Postprocess
from gate.postprocess.detections import (
    NMS_OUTPUTS,
    detections_from_nms_outputs,
    detections_from_outputs,
    other_conventions,
)
from gate.processes import spread
from gate.results import TaskValues
from gate.spec import EngineSpec
from gate.steps.answers import SHOWN_IMAGES, Answers, ComparedImage
from gate.steps.context import Context, data_where
from gate.steps.own_decoder import decoded_by_function, require_function
from gate.targets import Categories, Detections, ImageRecord, ImageTarget
from gate.tensors import Array
from gate.verdict import Evidence, Finding

_OF_CATEGORY = ("ap_of.", "iou_of.")
_NEVER_FOUND = 0.01
_NAMED = 5
_HINTED = 128
"""Of so many images the outputs are kept, to say what else they could mean where mean_ap is far too low."""

_HINTED_BYTES = 64 << 20

_POOR = 0.25
"""A reference below this mean_ap is read in other ways too: if one of them gives more, the reference is read wrongly."""


@dataclass(frozen=True)
class TaskMeasured:
    """What the task gave.

    Args:
        values: Of engine and reference.
        findings: One for each limit.
        notes: Likely causes, and what a reader should look at.
        boxes: How the boxes differ, with the worst images; None for other tasks.
        statistics: What the engine scored, sample by sample.
        warnings: What a reader must see even where it passed.
    """

    values: TaskValues
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    boxes: BoxAgreement | None
    statistics: SampleStatistics
    warnings: tuple[str, ...] = ()


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
    config = run.spec.postprocess
    if kind.predictions == "tracks" and (config is None or config.head != "function"):
        raise DataError(
            f'{kind.name} needs [postprocess] head = "function", which follows the objects',
            where=run.file.location("task", "kind"),
            hint="docs/tasks.md has an example.",
        )
    if kind.predictions == "detections" and config is None:
        raise DataError(
            f"{kind.name} needs [postprocess], which says how the outputs become detections",
            where=run.file.location("task", "kind"),
            hint="docs/tasks.md has one for each common head.",
        )
    if config is not None and config.head == "function":
        require_function(run)
    if not run.digest.targets and not run.digest.labels:
        raise DataError(
            f"[task] kind = {kind.name!r} needs ground truth, and the samples have none",
            where=data_where(run.spec.data, "source"),
            hint="Give targets: docs/tasks.md.",
        )
    empty_metric(run, kind)
    _require_targets(run, kind)


def _require_targets(run: Context, kind: MetricKind) -> None:
    """Hold the annotations of samples that a function gave against each other; those of files were when they were read.

    Raises:
        DataError: One is missing or malformed, or an image comes twice; all that is wrong is listed.
    """
    source = undigested(run.source)
    categories, iou_type = categories_of(run.source), IOU_TYPES.get(kind.name)
    if not isinstance(source, ArraySource) or source.samples.targets is None or categories is None or iou_type is None:
        return
    problems = Problems()
    seen: dict[int, int] = {}
    for index, target in enumerate(source.samples.targets[: len(source)]):
        try:
            image = _image(target, index)
            require_target(target, categories, iou_type=iou_type)
        except DataError as err:
            problems.add(f"{err.where}: {err.message}" if err.where else err.message)
            continue
        if (other := seen.setdefault(image.image_id, index)) != index:
            problems.add(f"sample {index}: image id {image.image_id} is that of sample {other} too")
    problems.require_none(data_where(run.spec.data, "source"), hint="Nothing was run. Repair the ground truth.")


@dataclass(frozen=True)
class _Kept:
    """A batch that is kept to say what else its answers could mean.

    Args:
        targets: Of its images.
        size: Height and width of the input.
        reference, candidate: Outputs that `[postprocess]` reads.
        theirs, ours: What was found.
    """

    targets: Sequence[ImageTarget]
    size: tuple[int, int] | None
    reference: Mapping[str, Array]
    candidate: Mapping[str, Array]
    theirs: Sequence[Detections]
    ours: Sequence[Detections]


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
    _kept: list[_Kept] = field(default_factory=list)
    _shown: dict[int, tuple[ImageTarget, str | None, Array | None]] = field(default_factory=dict)

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
        theirs = self._read(reference, batch, targets, nms=None, who="the reference")
        ours = self._read(candidate, batch, targets, nms=self.engine.nms, who="the engine")
        if self.boxes is not None:
            if (sentence := second_sigmoid(ours, theirs)) is not None:
                raise MeasurementError(
                    f"the engine: {sentence}",
                    where=f"samples from {batch.first}",
                    hint='Is a sigmoid in its graph, and another in the model or in [postprocess] activation = "sigmoid"?',
                )
            self.boxes.add(theirs, ours, [each.image for each in targets])
            if self.run.options.answered is not None:
                self._keep_shown(self.boxes.result(), batch, targets)
            self._keep(reference, candidate, batch, targets, theirs=theirs, ours=ours)
        with _said_of("the reference", theirs if self.boxes is not None else ()):
            self.reference.add(theirs, reference=theirs, targets=targets, first_sample=batch.first)
        with _said_of("the engine"):
            self.candidate.add(ours, reference=theirs, targets=targets, first_sample=batch.first)

    def _read(
        self, outputs: Mapping[str, Array], batch: Batch, targets: Sequence[Any], *, nms: str | None, who: str
    ) -> Any:
        """As `_predictions`; where the outputs cannot be what is declared, the hint says what they could be."""
        try:
            return _predictions(outputs, batch, targets, run=self.run, kind=self.kind, nms=nms, who=who)
        except MeasurementError as err:
            config = self.run.spec.postprocess
            if self.boxes is None or self.categories is None or config is None:
                raise
            size = _input_size(self.run, batch)
            others = other_conventions(outputs, [each.image for each in targets], config, input_size=size)
            nothing = [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)) for _ in targets]
            if not others or not any(each.annotations for each in targets):
                raise
            sentence = explain_low_map(nothing, targets, self.categories, expected=2 * _POOR, others=others)
            if sentence is None:
                raise
            hint = f"As declared, nothing can be read. {sentence[0].upper()}{sentence[1:]}."
            raise MeasurementError(err.message, where=err.where, hint=hint) from err

    def _keep(
        self,
        reference: Mapping[str, Array],
        candidate: Mapping[str, Array],
        batch: Batch,
        targets: Sequence[ImageTarget],
        *,
        theirs: Sequence[Detections],
        ours: Sequence[Detections],
    ) -> None:
        config = self.run.spec.postprocess
        left = _HINTED - sum(len(each.targets) for each in self._kept)
        if config is None or left <= 0:
            return
        names = [name for name in config.output_names if name in reference and name in candidate]
        per_image = 2 * sum(reference[name][:1].nbytes for name in names)
        held = sum(each.nbytes for kept in self._kept for each in (*kept.reference.values(), *kept.candidate.values()))
        part = slice(0, min(left, batch.size, max((_HINTED_BYTES - held) // max(per_image, 1), 0 if held else 1)))
        if part.stop:
            self._kept.append(
                _Kept(
                    targets[part],
                    _input_size(self.run, batch),
                    {name: np.array(reference[name][part]) for name in names},
                    {name: np.array(candidate[name][part]) for name in names},
                    theirs[part],
                    ours[part],
                )
            )

    def _explained(self, *, of_reference: bool, expected: float) -> str | None:
        """Which other convention would explain a mean_ap that is far below what is expected; None where none would."""
        config = self.run.spec.postprocess
        targets = [target for kept in self._kept for target in kept.targets]
        if config is None or self.categories is None or not targets:
            return None
        found = [each for kept in self._kept for each in (kept.theirs if of_reference else kept.ours)]
        others: dict[str, list[Detections]] = {}
        for kept in self._kept:
            outputs = kept.reference if of_reference else kept.candidate
            images = [each.image for each in kept.targets]
            for sentence, read in other_conventions(outputs, images, config, input_size=kept.size).items():
                others.setdefault(sentence, []).extend(read)
        whole = {sentence: read for sentence, read in others.items() if len(read) == len(targets)}
        return explain_low_map(found, targets, self.categories, expected=expected, others=whole)

    def measured(self, evidence: Evidence, engine_sha256: str) -> TaskMeasured:
        """What all batches gave.

        Raises:
            MeasurementError: There is nothing to score.
        """
        with _said_of("the reference"):
            theirs: SampleStatistics = self.reference.statistics()
        with _said_of("the engine"):
            ours = self.candidate.statistics()
        values = msgspec.structs.replace(
            measured_values(ours, theirs, kind=self.kind), settings_sha256=settings_sha256(self.run)
        )
        if self.boxes is not None and values.reference[next(iter(self.kind.values))] < _POOR:
            sentence = self._explained(of_reference=True, expected=2 * _POOR)
            if sentence is not None:
                raise MeasurementError(
                    f"the reference's own answers are read wrongly: {sentence}",
                    hint="Correct [postprocess], the categories or the records of the images; no engine can be judged so.",
                )
        task = self.run.spec.task
        findings = task_findings(
            [each for each in self.asked if not each.tiled],
            ours,
            theirs,
            kind=self.kind,
            evidence=evidence,
            seed=seed_from(engine_sha256, self.run.recording.sha256, self.run.digest.data_sha256),
            resamples=1000 if task is None else task.resamples,
            over=partial(spread, workers=usable_cores()),
        )
        agreement = None if self.boxes is None else self.boxes.result()
        if agreement is not None:
            values = msgspec.structs.replace(values, boxes=_numbers(agreement))
        if self.run.options.answered is not None:
            shown = () if agreement is None else agreement.worst[:SHOWN_IMAGES]
            self.run.options.answered(
                Answers(
                    engine=self.engine.name,
                    candidate=ours,
                    reference=theirs,
                    boxes=agreement,
                    images=tuple(ComparedImage(each, *self._shown[each.image_id]) for each in shown),
                    categories=self.categories,
                    preprocess=self.run.spec.preprocess,
                )
            )
        notes = tuple(self._notes(values, agreement))
        return TaskMeasured(values, findings, notes, agreement, ours, _warnings(values))

    def _keep_shown(self, agreement: BoxAgreement, batch: Batch, targets: Sequence[ImageTarget]) -> None:
        """Keep what pictures need of the images that differ most so far, and let go of the others.

        An image that is not among them now will not be later: more images only push it back.
        """
        wanted = {each.image_id for each in agreement.worst[:SHOWN_IMAGES]}
        self._shown = {image_id: kept for image_id, kept in self._shown.items() if image_id in wanted}
        for row, target in enumerate(targets):
            image_id = target.image.image_id
            if image_id in wanted and image_id not in self._shown:
                path = _image_path(self.run, image_id)
                values = None if path is not None else np.array(next(iter(batch.inputs.values()))[row])
                self._shown[image_id] = (target, path, values)

    def _notes(self, values: TaskValues, agreement: BoxAgreement | None) -> list[str]:
        notes = []
        if (gain := implausible_gain(values.values, values.reference, self.kind)) is not None:
            notes.append(f"implausible: {gain}")
        if agreement is None:
            return notes
        first = next(iter(self.kind.values))
        if values.values[first] < values.reference[first] / 2:
            hint = self._explained(of_reference=False, expected=values.reference[first])
            if hint is not None:
                notes.append(f"likely cause: {hint}")
        if agreement.worst and (agreement.reference_only or agreement.candidate_only or agreement.class_changes):
            worst = agreement.worst[0]
            named = worst.file_name or f"image {worst.image_id}"
            notes.append(f"boxes differ most in {named}: {worst.why}")
        return notes


def _warnings(values: TaskValues) -> tuple[str, ...]:
    """A category that the reference itself never finds cannot get worse, so it is not checked at all."""
    missed = [
        name for name, value in values.reference.items() if name.startswith(_OF_CATEGORY) and value < _NEVER_FOUND
    ]
    if not missed:
        return ()
    names = ", ".join(name.partition(".")[2] for name in missed[:_NAMED])
    more = f" and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
    return (
        f"the reference itself finds next to nothing of {names}{more}, of which there is ground truth: are the categories in the "
        "model's order?",
    )


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
        candidate=empty_metric(run, kind),
        reference=empty_metric(run, kind),
        categories=categories_of(run.source),
        boxes=BoxComparison() if compares else None,
    )


def reference_values(run: Context, kind: MetricKind) -> dict[str, float]:
    """The reference's own values on all samples.

    Raises:
        DataError: The ground truth is missing or malformed.
        MeasurementError: The reference's answers are.
    """
    metric = empty_metric(run, kind)
    for batch, outputs in run.pairs():
        targets = targets_of(batch, run)
        found = _predictions(outputs, batch, targets, run=run, kind=kind, nms=None, who="the reference")
        metric.add(found, reference=found, targets=targets, first_sample=batch.first)
    return metric.statistics().values()


def settings_sha256(run: Context) -> str:
    """Of what decides, beside the samples and the answers, what the task's values say: two of one digest can be compared."""
    spec, categories = run.spec, categories_of(run.source)
    settings = {
        "kind": None if spec.task is None else spec.task.kind,
        "options": {} if spec.task is None else spec.task.options,
        "postprocess": None if spec.postprocess is None else msgspec.to_builtins(spec.postprocess.resolved()),
        "categories": None if categories is None else [list(each) for each in sorted(categories.names.items())],
    }
    return sha256_hex(msgspec.json.encode(settings, order="deterministic"))


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


def empty_metric(run: Context, kind: MetricKind) -> TaskMetric:
    """The kind's metric with the options of `[task]` and the categories of the samples.

    Raises:
        SpecError: An option is not of the kind.
    """
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
    if kind.predictions == "outputs" or config is None:
        return outputs
    if config.head == "function":
        tracked = kind.predictions == "tracks"
        given = targets if tracked else [_image(each, batch.first + row) for row, each in enumerate(targets)]
        return decoded_by_function(outputs, given, run=run, kind=kind, who=who, first=batch.first)
    images = [_image(target, batch.first + row) for row, target in enumerate(targets)]
    try:
        return detections_of(outputs, images, config, run=run, batch=batch, nms=nms)
    except MeasurementError as err:
        raise MeasurementError(f"{who}: {err.message}", where=err.where, hint=err.hint) from err


def detections_of(
    outputs: Mapping[str, Array],
    images: Sequence[ImageRecord],
    config: Postprocess,
    *,
    run: Context,
    batch: Batch,
    nms: str | None,
) -> tuple[Detections, ...]:
    """What a model found in each image of a batch.

    Args:
        outputs: By name, with those that `nms` added.
        images: How each became the input.
        config: What the outputs mean.
        run: Of the batch.
        batch: The inputs.
        nms: As of the engine; None where suppression is done here.

    Raises:
        MeasurementError: As `detections_from_outputs`.
    """
    if config.head == "function":
        kind = kind_named("detection")
        return decoded_by_function(outputs, images, run=run, kind=kind, who="tiles", first=batch.first)
    decode = detections_from_nms_outputs if nms is not None else detections_from_outputs
    return decode(outputs, images, config, input_size=_input_size(run, batch))


def _image_path(run: Context, image_id: int) -> str | None:
    """Of an image's file; None where samples are no files."""
    source = undigested(run.source)
    if not isinstance(source, ImageSource):
        return None
    return next(
        (each.place for each in source.items if each.image_id == image_id and isinstance(each.place, str)), None
    )


@contextmanager
def _said_of(who: str, found: Sequence[Detections] = ()) -> Iterator[None]:
    """An error in this block says whose answers it is about, and what the scores of what was found tell."""
    try:
        yield
    except MeasurementError as err:
        sentence = second_sigmoid(found)
        hint = err.hint if sentence is None else f"{sentence[0].upper()}{sentence[1:]}."
        raise MeasurementError(f"{who}: {err.message}", where=err.where, hint=hint) from err


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
