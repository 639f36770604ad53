"""Every sample through the engine, and its outputs beside the recorded reference: on the host, or where a GPU left them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from gate.compare import OutputAccumulator
from gate.compare_on_device import DeviceAccumulator, described, has_cuda, host_array, is_large
from gate.data.batches import Batch
from gate.engines.interface import OutputsOnDevice, Runner
from gate.engines.torch.arithmetic import give_memory_back
from gate.errors import DataError, MeasurementError, RunError
from gate.reference import OutputScale, Recording, run_filled
from gate.results import OutputMetrics, TaskMetrics
from gate.spec import EngineSpec
from gate.steps.context import Context, data_where, scores_output
from gate.steps.task import TaskMeasured, nms_outputs, task_run
from gate.tensors import Array, NamedArrays, mismatches
from gate.verdict import Evidence, Failure, Finding, Status

DIAGNOSED_ROWS = 256

_Output = TypeVar("_Output")


@dataclass(frozen=True)
class Compared:
    """What came of comparing an engine.

    Args:
        outputs: One for each output of the reference.
        task: The counts of answers, where the task is classification.
        answers: What any other task gave.
        notes: What a reader should know.
        on_device: Whether outputs were compared on the GPU, whose memory then holds what that takes beside the engine.
    """

    outputs: tuple[OutputMetrics, ...]
    task: TaskMetrics | None
    answers: TaskMeasured | None
    notes: tuple[str, ...]
    on_device: bool


def compare_outputs(
    run: Context,
    engine: EngineSpec,
    runner: Runner,
    evidence: Evidence,
    findings: list[Finding | Failure],
    *,
    engine_sha256: str = "",
    device_is_usable: Callable[[], bool] = has_cuda,
    before_device: Callable[[], None] = lambda: None,
) -> Compared | None:
    """Run every sample through the engine beside the recorded reference. None where outputs cannot be paired.

    The first batch is compared on the host. Where one of its outputs is large and the runner can leave its outputs on a
    GPU, the large outputs of those after it are compared there; the findings are the same.

    Args:
        run: The samples and the reference.
        engine: What is asked for.
        runner: It, loaded.
        evidence: Of the findings.
        findings: Appended to.
        engine_sha256: Of the engine's file; the task's resamples are drawn by it.
        device_is_usable: Asked where comparing on the device pays.
        before_device: Called once, before the first batch that stays on the device.

    Raises:
        DataError: The task needs labels, and there are none.
        RunError: The engine failed.
        MeasurementError: Outputs cannot be compared, or nothing was.
    """
    from gate.diagnosis import diagnose
    from gate.metrics.classification import ClassificationAccumulator, task_findings
    from gate.tolerances import parity_findings

    recording = run.recording
    classifies = run.spec.task is not None and run.spec.task.is_classification
    scores = scores_output(run) if classifies else None
    answers = task_run(run, engine)
    accumulators: dict[str, OutputAccumulator] = {}
    task = ClassificationAccumulator() if scores is not None else None
    labels: list[Array] = []
    kept: dict[str, tuple[list[Array], list[Array]]] = {}
    kept_rows = 0
    notes: list[str] = []
    on_device = stays = False
    with run.stage("compare", engine=engine.name, total=len(recording.files)), ExitStack() as afterwards:
        for batch, reference in run.pairs():
            if stays and isinstance(runner, OutputsOnDevice) and not _is_filled(batch, run):
                if not on_device:
                    on_device = True
                    afterwards.callback(give_memory_back)
                    before_device()
                given = run_batch_to_device(runner, batch, engine=engine, run=run)
            else:
                given = run_batch(runner, batch, engine=engine, run=run)
            inside = _Outputs(nms_outputs(given) if engine.nms is not None else {})
            candidate = _Outputs(given)
            wrong = mismatches(reference, candidate.described(), cast_io=engine.cast_io)
            if wrong:
                findings.append(
                    Failure(
                        check="parity.outputs",
                        error="RunError",
                        message="; ".join(dict.fromkeys(map(str, wrong))),
                        evidence=evidence,
                        hint=_output_hint(recording),
                    )
                )
                return None
            if not accumulators:
                large = _large_outputs(reference, recording.outputs)
                stays = _may_stay(engine, runner) and bool(large) and device_is_usable()
                accumulators = {
                    name: _accumulator(name, values, engine, recording.outputs[name], on_device=stays and name in large)
                    for name, values in reference.items()
                }
            for name, values in reference.items():
                if (reason := _add(accumulators[name], values, candidate, batch.first)) is not None:
                    notes.append(f"compared on the host from sample {batch.first} on: {reason}")
                    stays = False
            if task is not None and scores is not None:
                if batch.labels is None:
                    raise DataError(
                        "[task] needs labels, and the samples have none",
                        where=data_where(run.spec.data, "source"),
                    )
                task.add(reference[scores], candidate.on_host(scores), batch.labels, first_sample=batch.first)
                labels.append(batch.labels)
            if answers is not None:
                ours = {name: candidate.on_host(name) for name in candidate.given}
                answers.add(reference, ours | {name: inside.on_host(name) for name in inside.given}, batch)
            if kept_rows < DIAGNOSED_ROWS:
                for name, values in reference.items():
                    pair = kept.setdefault(name, ([], []))
                    pair[0].append(values)
                    pair[1].append(candidate.on_host(name))
                kept_rows += batch.size
            run.observer.advance()
    outputs = tuple(each.metrics() for each in accumulators.values())
    if engine.parity is not None:
        parity = parity_findings(outputs, engine=engine, file=run.file, evidence=evidence)
        findings.extend(parity)
        if any(finding.status is not Status.PASSED for finding in parity):
            for metrics in outputs:
                pair = kept[metrics.output]
                alike = len({each.shape[1:] for each in pair[0]}) == 1
                if recording.outputs[metrics.output].batch_axis and metrics.kind == "float" and alike:
                    notes.extend(diagnose(metrics, np.concatenate(pair[0]), np.concatenate(pair[1])))
    counted = None
    if task is not None:
        counted = task.metrics()
        if engine.task is not None:
            findings.extend(
                task_findings(counted, engine=engine, file=run.file, evidence=evidence, labels=np.concatenate(labels))
            )
    measured: TaskMeasured | None = None
    if answers is not None:
        with run.stage("task", engine=engine.name):
            measured = answers.measured(evidence, engine_sha256)
        findings.extend(measured.findings)
        notes.extend(measured.notes)
    if scores is not None and any(finding.status is not Status.PASSED for finding in findings):
        notes.extend(_worst_answer(run, engine, runner, scores, outputs))
    return Compared(
        outputs=outputs, task=counted, answers=measured, notes=tuple(dict.fromkeys(notes)), on_device=on_device
    )


@dataclass(frozen=True)
class _Outputs:
    """An engine's outputs for a batch, each as it was given: an array, or what lies on a device."""

    given: Mapping[str, Any]
    _copies: dict[str, Array] = field(default_factory=dict)

    def described(self) -> dict[str, Array]:
        """Arrays of their shapes and dtypes, for those on a device without memory of their own."""
        return {name: described(name, each) for name, each in self.given.items()}

    def is_on_device(self, name: str) -> bool:
        """Whether it lies there."""
        return not isinstance(self.given[name], (np.ndarray, np.generic))

    def on_host(self, name: str) -> Array:
        """An array, copied from the device once where it lies there."""
        if name not in self._copies:
            self._copies[name] = host_array(self.given[name])
        return self._copies[name]


def _large_outputs(reference: NamedArrays, scales: Mapping[str, OutputScale]) -> set[str]:
    return {name for name, values in reference.items() if is_large(values.shape, batch_axis=scales[name].batch_axis)}


def _may_stay(engine: EngineSpec, runner: Runner) -> bool:
    """Whether outputs may be compared on the device.

    Comparing there takes memory of its own, of the device and for PyTorch: an engine with a budget for either is
    compared on the host.
    """
    budget = engine.memory
    has_budget = budget is not None and not (budget.device_peak_mib is None and budget.host_peak_mib is None)
    return isinstance(runner, OutputsOnDevice) and not has_budget


def _accumulator(
    name: str, values: Array, engine: EngineSpec, scale: OutputScale, *, on_device: bool
) -> OutputAccumulator:
    from gate.tolerances import allclose_tolerances

    atol, rtol = allclose_tolerances(engine, rms=scale.rms)
    kind = DeviceAccumulator if on_device else OutputAccumulator
    return kind(name, dtype=values.dtype, atol=atol, rtol=rtol, center=scale.center, batch_axis=scale.batch_axis)


def _add(accumulator: OutputAccumulator, reference: Array, candidate: _Outputs, first_sample: int) -> str | None:
    """Take one batch of an output; where the device fails at it, on the host, and then the reason is returned.

    Raises:
        MeasurementError: It cannot be compared on the host either.
    """
    name = accumulator.name
    reason = None
    if isinstance(accumulator, DeviceAccumulator) and candidate.is_on_device(name):
        try:
            accumulator.add(reference, candidate.given[name], first_sample=first_sample)
        except MeasurementError as err:
            reason = err.message
        else:
            return None
    accumulator.add(reference, candidate.on_host(name), first_sample=first_sample)
    return reason


def _worst_answer(
    run: Context, engine: EngineSpec, runner: Runner, scores: str, outputs: tuple[OutputMetrics, ...]
) -> Iterator[str]:
    """What reference and engine say of the worst sample, for a reader who has to look at it."""
    worst = next((each.worst_samples[0][0] for each in outputs if each.output == scores and each.worst_samples), None)
    if worst is None:
        return
    for batch, reference in run.pairs():
        row = worst - batch.first
        if not 0 <= row < batch.size:
            continue
        theirs = np.asarray(reference[scores][row], dtype=np.float64)
        ours = np.asarray(run_batch(runner, batch, engine=engine, run=run)[scores][row], dtype=np.float64)
        label = "" if batch.labels is None else f"label {batch.labels[row]}, "
        margin = np.sort(theirs)[-1] - np.sort(theirs)[-2] if theirs.size > 1 else np.inf
        answer = f"engine {int(ours.argmax())}" if np.isfinite(ours).all() else "engine NaN or Inf"
        yield f"worst sample {worst}: {label}reference {int(theirs.argmax())} by {margin:.2g}, {answer}"
        return


def _output_hint(recording: Recording) -> str:
    names = ", ".join(f'"{name}"' for name in recording.outputs)
    return (
        f'Re-export with output_names = [{names}], or map them: outputs = {{ {next(iter(recording.outputs))} = "…" }}.'
    )


def run_batch(runner: Runner, batch: Batch, *, engine: EngineSpec, run: Context) -> dict[str, Array]:
    """The engine's outputs for a batch, under the reference's names.

    A batch smaller than the profile allows is filled up with its last sample, and the outputs cut again.
    """
    with _inside_engines(run):
        outputs = run_filled(runner, batch, inputs=run.spec.inputs)
    return _renamed(outputs, engine.outputs)


def run_batch_to_device(runner: OutputsOnDevice, batch: Batch, *, engine: EngineSpec, run: Context) -> dict[str, Any]:
    """As `run_batch`, for a batch that the profile allows as it is.

    The outputs stay on the device, and hold until the runner's next inference.
    """
    with _inside_engines(run):
        outputs = runner.run_to_device(batch.inputs)
    return _renamed(outputs, engine.outputs)


def _is_filled(batch: Batch, run: Context) -> bool:
    """Whether the batch is smaller than the profile allows."""
    return batch.size < next(iter(run.spec.inputs.values())).sized("min")[0]


@contextmanager
def _inside_engines(run: Context) -> Iterator[None]:
    """Add the time to what was spent in the engines."""
    started = time.perf_counter()
    yield
    run.seconds["inside_engines"] = run.seconds.get("inside_engines", 0.0) + time.perf_counter() - started


def _renamed(outputs: Mapping[str, _Output], names: Mapping[str, str]) -> dict[str, _Output]:
    """The engine's outputs under the reference's names.

    Raises:
        RunError: An output that the spec names is not there, is named twice, or takes the name of another.
    """
    for ours, theirs in names.items():
        if theirs not in outputs:
            raise RunError(f"outputs = {{ {ours} = {theirs!r} }}: the engine has {', '.join(map(repr, outputs))}")
    if len(set(names.values())) != len(names):
        raise RunError(f"outputs names one output of the engine twice: {', '.join(map(repr, names.values()))}")
    renamed = {theirs: ours for ours, theirs in names.items()}
    given = [renamed.get(name, name) for name in outputs]
    if twice := [name for name in dict.fromkeys(given) if given.count(name) > 1]:
        raise RunError(
            f"outputs maps {names[twice[0]]!r} to {twice[0]!r}, and the engine has an output {twice[0]!r} of its own"
        )
    return dict(zip(given, outputs.values(), strict=True))
