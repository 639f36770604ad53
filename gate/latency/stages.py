"""The stages that one sample goes through: what each took, its share of the whole, and its budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from gate.errors import MeasurementError, SpecError
from gate.latency.config import StagesSpec
from gate.latency.measurement import StageSummary
from gate.latency.ratio import nearest_rank, positive_durations
from gate.spec import SpecFile
from gate.statistics import least_samples, percentile_interval
from gate.verdict import Evidence, Finding, Interval, Limit, Status

STAGES = ("decode", "preprocess", "transfer", "inference", "postprocess")
"""In the order in which a sample goes through them."""

TOTAL = "total"
"""All stages of a sample together."""

PERCENTILES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
"""Budgets by percentile."""

_HINT = "docs/findings.md#stages"


class StageDurations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the stages of each sample took.

    Args:
        stages: Nanoseconds by stage, one for each sample, in the same order in all of them.

    Raises:
        MeasurementError: There is no stage or no sample; a stage is none of `STAGES`; a duration is not a positive whole
            number; or the stages are not of the same number of samples.
    """

    stages: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.stages:
            raise MeasurementError("no stage was timed, so there are no shares")
        for name in self.stages:
            if name not in STAGES:
                raise MeasurementError(f"there is no stage {name!r}; stages are {', '.join(STAGES)}")
            self._of_stage(name)
        lengths = {name: len(durations) for name, durations in self.stages.items()}
        if len(set(lengths.values())) != 1:
            said = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise MeasurementError(f"every stage is timed once for each sample, got {said}")

    @property
    def names(self) -> tuple[str, ...]:
        """The stages there are, in their order, and `total`."""
        return (*(name for name in STAGES if name in self.stages), TOTAL)

    @property
    def samples(self) -> int:
        """How many samples were taken through them."""
        return len(next(iter(self.stages.values())))

    def of(self, name: str) -> npt.NDArray[np.int64]:
        """Nanoseconds of a stage, int64 [samples]; of `total` the sum of all stages of each sample.

        Raises:
            MeasurementError: There is no such stage.
        """
        if name == TOTAL:
            whole: npt.NDArray[np.int64] = np.stack([self._of_stage(each) for each in self.stages]).sum(axis=0)
            return whole
        if name not in self.stages:
            raise MeasurementError(f"stage {name!r} was not timed; {', '.join(self.names)} were")
        return self._of_stage(name)

    def _of_stage(self, name: str) -> npt.NDArray[np.int64]:
        try:
            return positive_durations(self.stages[name])
        except MeasurementError as err:
            raise MeasurementError(f"stage {name}: {err.message}", hint=err.hint) from err


def summarise_stages(durations: StageDurations) -> tuple[StageSummary, ...]:
    """Each stage in its order, and `total` last.

    Percentiles of the total are those of the samples' sums: they are not the sums of the stages' percentiles. Means and
    shares add up. Standard deviations are between samples, 0 for a single one.
    """
    whole = int(durations.of(TOTAL).sum())
    found = []
    for name in durations.names:
        values = durations.of(name)
        found.append(
            StageSummary(
                stage=name,
                n=len(values),
                mean_ms=int(values.sum()) / len(values) / 1e6,
                sd_ms=float(values.std(ddof=1)) / 1e6 if len(values) > 1 else 0.0,
                p50_ms=nearest_rank(values, 0.5) / 1e6,
                p95_ms=nearest_rank(values, 0.95) / 1e6,
                p99_ms=nearest_rank(values, 0.99) / 1e6,
                share=int(values.sum()) / whole,
            )
        )
    return tuple(found)


def stage_checks(spec: StagesSpec | None) -> tuple[str, ...]:
    """Names of the checks that a table asks for: `stages.p95_ms[decode]`."""
    if spec is None:
        return ()
    return tuple(_check(key, stage) for key in PERCENTILES for stage in getattr(spec, key))


def require_stages(spec: StagesSpec, names: Iterable[str], *, engine: str, file: SpecFile) -> None:
    """Hold the budgets against the stages that a pipeline has.

    Args:
        spec: The budgets.
        names: The stages there are, `total` among them.
        engine: Name of the engine that has the table.
        file: The spec that it stands in.

    Raises:
        SpecError: A budget is for another stage, or is not a finite number above 0.
    """
    there = tuple(names)
    for key in PERCENTILES:
        for stage, budget in getattr(spec, key).items():
            where = file.engine_location(engine, "stages", key, stage)
            if stage not in there:
                raise SpecError(
                    f"[engine.stages] {key} has a budget for {stage!r}; this engine's pipeline has {', '.join(there)}",
                    where=where,
                    hint=_why_not(stage),
                )
            if not 0.0 < budget < math.inf:
                raise SpecError(
                    f"[engine.stages] {key} of {stage} is a finite number above 0, got {budget}", where=where
                )


def stage_findings(
    durations: StageDurations, spec: StagesSpec, *, engine: str, file: SpecFile, evidence: Evidence
) -> tuple[Finding, ...]:
    """One finding for each budget, by MLPerf LoadGen's binomial bound at 99 %, as of latency budgets.

    Args:
        durations: What was measured.
        spec: The budgets.
        engine: Name of the engine that has the table.
        file: The spec that it stands in.
        evidence: Of the findings.

    Raises:
        SpecError: As `require_stages`.

    Source: `gate.statistics.percentile_interval`.
    """
    require_stages(spec, durations.names, engine=engine, file=file)
    found = []
    for key, p in PERCENTILES.items():
        for stage, budget in getattr(spec, key).items():
            limit = Limit("at_most", budget, "spec", file.engine_location(engine, "stages", key, stage))
            found.append(_finding(np.sort(durations.of(stage)), key, p, stage=stage, limit=limit, evidence=evidence))
    return tuple(found)


def _finding(
    ordered: npt.NDArray[np.int64], key: str, p: float, *, stage: str, limit: Limit, evidence: Evidence
) -> Finding:
    n = len(ordered)
    bounds = percentile_interval(ordered, p)
    finding = Finding(
        check=_check(key, stage),
        estimate=nearest_rank(ordered, p) / 1e6,
        interval=Interval(max(0.0, bounds.lower / 1e6), bounds.upper / 1e6),
        limit=limit,
        unit="ms",
        n=n,
        evidence=evidence,
        hint=_HINT,
    )
    over = int(np.count_nonzero(ordered / 1e6 > limit.value))
    detail = ""
    if finding.status is Status.INCONCLUSIVE:
        least = least_samples(p)
        if n < least:
            name = key.removesuffix("_ms")
            detail = f"{name} needs at least {least} samples, has {n}; raise samples of [engine.stages]"
        else:
            detail = f"{stage} of {over} of {n} samples is over the budget; more samples would decide"
    elif finding.status is Status.FAILED:
        detail = f"{stage} of {over} of {n} samples is over the budget, slowest {int(ordered[-1]) / 1e6:.4g} ms"
    return msgspec.structs.replace(finding, detail=detail)


def _check(key: str, stage: str) -> str:
    return f"stages.{key}[{stage}]"


def _why_not(stage: str) -> str:
    """Where a stage comes from, for one that a pipeline does not have."""
    reasons = {
        "decode": "It is there where the samples are images: [data.images], or a function that returns images.",
        "preprocess": "It is there where the samples are images that [preprocess] makes the model's input.",
        "transfer": "It is there where the engine runs on a GPU and can time its copies.",
        "postprocess": "It is there where the spec has [postprocess] and the task reads detections or tracks.",
    }
    return reasons.get(stage, f"Stages are {', '.join(STAGES)}, and {TOTAL}.")
