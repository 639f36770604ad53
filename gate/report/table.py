"""The verdict table that the terminal and the Markdown report share: one row per engine, one text per cell."""

from __future__ import annotations

import math

import msgspec

from gate.report.scores import first_score_text
from gate.results import CheckRun, EngineResult, Fingerprint
from gate.verdict import Evidence
from gate.wording import MISSING, milliseconds, number, size_text, status_word

HEADINGS = ("engine", "evidence", "parity", "task", "latency p50/p95", "size", "verdict")
NOT_RUN_HERE = "not run here"


class Row(msgspec.Struct, frozen=True):
    """One engine's cells, in the order of `HEADINGS`."""

    engine: str
    evidence: str
    parity: str
    task: str
    latency: str
    size: str
    verdict: str

    @property
    def cells(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(str(getattr(self, name)) for name in self.__struct_fields__)


def rows(run: CheckRun) -> tuple[Row, ...]:
    """The table of a run."""
    return tuple(_row(result) for result in run.engines)


def _row(result: EngineResult) -> Row:
    preflight = result.evidence is Evidence.PREFLIGHT and result.status is not None
    absent = NOT_RUN_HERE if preflight else MISSING
    return Row(
        engine=result.name,
        evidence=MISSING if result.status is None or result.evidence is None else result.evidence.value,
        parity=parity_text(result) or absent,
        task=task_text(result) or absent,
        latency=latency_text(result) or absent,
        size=size_text(result.size_bytes),
        verdict=status_word(result.status, result.evidence),
    )


def parity_text(result: EngineResult) -> str:
    """The worst output's relative error (for integers: the fraction that differs); empty where nothing was compared."""
    values = [each.rel_rmse if each.kind == "float" else each.mismatch_fraction for each in result.outputs]
    if not values:
        return ""
    return number(math.nan if any(map(math.isnan, values)) else max(values))


def task_text(result: EngineResult) -> str:
    """Top-1 accuracy, and its difference from the reference in percentage points: `98.37 % (-0.12 pp)`.

    Of any other task its first value: `mean_ap 0.777 (-0.004)`.
    """
    if result.scores is not None:
        return first_score_text(result.scores)
    task = result.task
    if task is None or task.samples <= 0:
        return ""
    difference = 100 * (task.top1 - task.reference_top1) / task.samples
    delta = "=" if task.top1 == task.reference_top1 else f"{difference:+.2f} pp"
    return f"{100 * task.top1 / task.samples:.2f} % ({delta})"


def latency_text(result: EngineResult) -> str:
    """`0.21 / 0.24 ms`: p50 and p95 of the first batch size that was timed."""
    if not result.latencies:
        return ""
    latency = result.latencies[0]
    return f"{milliseconds(latency.p50_ms)} / {milliseconds(latency.p95_ms)} ms"


def device_text(device: Fingerprint) -> str:
    """`cpu, AMD EPYC, 2 cores`, or the GPU's name and compute capability."""
    if device.kind == "gpu":
        capability = f", compute capability {device.compute_capability}" if device.compute_capability else ""
        return f"gpu, {device.name}{capability}"
    return f"cpu, {device.name}, {device.cores} core{'' if device.cores == 1 else 's'}"
