"""An engine timed in fresh processes, alone and in turn with others, until its budgets are decided."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gate.errors import GateError, MeasurementError
from gate.latency.budgets import (
    MOST_SAMPLES,
    budget_findings,
    clock_of,
    doubted,
    regression_finding,
    samples_needed,
    speedup_finding,
    summarise,
)
from gate.latency.config import Cell, LatencySpec, TimedTable, UsageSpec, latency_checks, percent_of, timed_tables
from gate.latency.guards import budget_doubts, missing_readings, ratio_doubts
from gate.latency.measurement import SessionTimes, SubjectTimes
from gate.latency.ratio import LOOKS, RATIO_PERCENTILES, estimate, kept_needed, log_ratio
from gate.latency.usage import usage_findings, usage_metrics
from gate.results import Comparison, LatencyMetrics, SessionPair, UsageMetrics
from gate.sessions.job import CellJob, Job, Subject
from gate.sessions.run import run_session, write_feeds
from gate.spec import EngineSpec, SpecFile
from gate.steps.feeds import Feeds
from gate.verdict import Evidence, Failure, Finding, Status

LEG = 8
"""Kept inferences of a leg. Source: docs/latency.md."""


@dataclass(frozen=True)
class Rival:
    """Another engine to time in turn with.

    Args:
        against: As in the spec.
        title: For a reader.
        subject: What the session loads.
    """

    against: str
    title: str
    subject: Subject


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is timed, and with what.

    Args:
        file: The spec, for the places of limits; None where they stand in none.
        engine: The engine's part of it.
        subject: Its file.
        evidence: What a run here gives.
        rival: Finds another engine by the name that the spec gives it.
        feeds: The batches.
        stage: Called with the number of sessions of the first look; its context spans the measuring.
        advance: Called after each session.
        max_time_s: Instead of the table's; None: the table's.
    """

    file: SpecFile | None
    engine: EngineSpec
    subject: Subject
    evidence: Evidence
    rival: Callable[[str], Rival]
    feeds: Feeds
    advance: Callable[[], None]
    max_time_s: float | None = None


@dataclass(frozen=True)
class Timed:
    """What measuring an engine gave.

    Args:
        latencies: One for each cell that was measured.
        findings: At least one for each budget.
    """

    latencies: tuple[LatencyMetrics, ...]
    findings: tuple[Finding | Failure, ...]


@dataclass
class _Series:
    """Sessions in which one engine is timed alone, or in turn with another, in every cell of a table.

    Args:
        rival: The other; None: alone.
        sessions: By cell, each session cut down to that cell.
        stopped: By cell why no more were measured.
        seconds: Wall time of all sessions.
    """

    rival: Rival | None
    sessions: dict[str, list[SessionTimes]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def measured_latency(timing: Timing) -> Timed:
    """Time an engine as its `[engine.latency]` asks for; what goes wrong is a Failure of each check that it touches."""
    latencies: list[LatencyMetrics] = []
    findings: list[Finding | Failure] = []
    for table in timed_tables(timing.engine.latency):
        try:
            made = _Table(timing, table).measured()
        except GateError as err:
            checks = latency_checks_of(table)
            findings.extend(failure(check, err, timing.evidence) for check in checks)
            continue
        latencies.extend(made.latencies)
        findings.extend(made.findings)
    return Timed(latencies=tuple(latencies), findings=tuple(findings))


def latency_checks_of(table: TimedTable) -> tuple[str, ...]:
    """Names of the checks of one table; its cells keep the names that they have among all tables."""
    bare = list(latency_checks(msgspec.structs.replace(table.spec, batch=1, axes={})))
    return tuple(cell.check(check) for cell in table.cells for check in bare)


def failure(check: str, err: GateError, evidence: Evidence) -> Failure:
    """A check that could not be measured."""
    text = f"{err.where}: {err.message}" if err.where else err.message
    return Failure(check=check, error=type(err).__name__, message=text, evidence=evidence, hint=err.hint or "")


class _Table:
    """The measuring of one table: its series of sessions, and what they decide."""

    def __init__(self, timing: Timing, table: TimedTable) -> None:
        self.timing = timing
        self.table = table
        self.spec = table.spec
        self.max_time_s = timing.max_time_s or table.spec.max_time_s
        self.began = time.monotonic()
        self.longest_s = 0.0

    def measured(self) -> Timed:
        """Every cell, against every rival; budgets rest on the first series.

        Raises:
            MeasurementError: A session failed.
            DataError: There are no samples of such a shape.
        """
        findings: list[Finding | Failure] = []
        rivals: list[Rival] = []
        for name in self.spec.rivals:
            try:
                rivals.append(self.timing.rival(name))
            except GateError as err:
                findings.extend(
                    failure(check, err, self.timing.evidence) for check in self._checks_against(name, self.table.cells)
                )
        every = [_Series(rival) for rival in rivals] or [_Series(None)]
        with private_folder() as folder:
            jobs = [self._cell_job(index, cell, folder) for index, cell in enumerate(self.table.cells)]
            for index, series in enumerate(every):
                self._run(series, jobs, budgets=index == 0)
        latencies = []
        for cell in self.table.cells:
            for index, series in enumerate(every):
                findings.extend(self._findings(series, cell, budgets=index == 0))
            latencies.append(self._metrics(every, cell))
        return Timed(latencies=tuple(latencies), findings=tuple(self._located(each) for each in findings))

    def _checks_against(self, name: str, cells: Sequence[Cell]) -> tuple[str, ...]:
        """Checks of some cells that need one rival."""
        found = []
        for cell in cells:
            if self.spec.regression is not None and self.spec.regression.against == name:
                found += [cell.check(f"latency.regression_{each}") for each in self.spec.regression.limits]
            if self.spec.speedup is not None and self.spec.speedup.against == name:
                found.append(cell.check("latency.speedup"))
        return tuple(found)

    def _cell_job(self, index: int, cell: Cell, folder: Path) -> CellJob:
        path = folder / f"feeds-{index}.safetensors"
        write_feeds(path, self.timing.feeds.batches(cell))
        return CellJob(cell=cell, feeds=path, kept=LEG, subjects=(0,))

    def _run(self, series: _Series, jobs: Sequence[CellJob], *, budgets: bool) -> None:
        """Sessions until every cell is decided, the last look is over, or the time is."""
        subjects = (self.timing.subject,) if series.rival is None else (self.timing.subject, series.rival.subject)
        open_cells = dict(zip((cell.name for cell in self.table.cells), jobs, strict=True))
        count = 0
        last = max(LOOKS[-1], self.spec.sessions)
        while open_cells:
            if count and self._elapsed() + self.longest_s > self.max_time_s:
                self._stop(series, open_cells, f"max_time_s = {self.max_time_s:g} s was over after {_sessions(count)}")
                return
            kept = self._kept(series, count, budgets=budgets)
            job = self._job(subjects, [_with(each, kept, len(subjects)) for each in open_cells.values()], count)
            began = time.monotonic()
            times = run_session(job, timeout_s=self.spec.session_timeout_s)
            took = time.monotonic() - began
            self.longest_s = max(self.longest_s, took)
            series.seconds += took
            count += 1
            self.timing.advance()
            for index, name in enumerate(open_cells):
                one = msgspec.structs.replace(times, cells=(times.cells[index],))
                series.sessions.setdefault(name, []).append(one)
            if count < self.spec.sessions or not self._is_look(count):
                continue
            for cell in [each for each in self.table.cells if each.name in open_cells]:
                found = self._findings(series, cell, budgets=budgets)
                if all(each.status is not Status.INCONCLUSIVE for each in found):
                    self._stop(series, {cell.name: open_cells.pop(cell.name)}, f"decided after {_sessions(count)}")
            if count >= last:
                self._stop(series, open_cells, f"not decided after {_sessions(count)}, which are the most")
                return

    def _is_look(self, count: int) -> bool:
        return count in LOOKS or count == self.spec.sessions or count >= LOOKS[-1]

    def _stop(self, series: _Series, cells: Mapping[str, CellJob], reason: str) -> None:
        series.stopped.update(dict.fromkeys(cells, reason))

    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _kept(self, series: _Series, count: int, *, budgets: bool) -> int:
        """Inferences of each engine in the next session: what the first look needs, later what the last one needs."""
        least = 0
        if series.rival is not None:
            least = kept_needed(self._limits(series.rival.against))
        if budgets:
            first = math.ceil(samples_needed(self.spec) / self.spec.sessions)
            if count >= self.spec.sessions and self.spec.budgets:
                first = max(first, math.ceil(MOST_SAMPLES / LOOKS[-1]))
            least = max(least, first)
        return LEG * math.ceil(max(least, 2 * LEG) / LEG)

    def _limits(self, against: str) -> dict[str, float]:
        """Tolerances in percent by percentile, of all that is asked for against one rival."""
        found: dict[str, float] = {}
        if self.spec.regression is not None and self.spec.regression.against == against:
            found.update(self.spec.regression.limits)
        if self.spec.speedup is not None and self.spec.speedup.against == against:
            found["p50"] = min(found.get("p50", math.inf), percent_of(self.spec.speedup))
        return found

    def _job(self, subjects: tuple[Subject, ...], cells: list[CellJob], count: int) -> Job:
        return Job(
            subjects=subjects,
            cells=tuple(cells),
            leg=LEG,
            order=1 if count % 2 else 0,
            warm_up_s=self.spec.warm_up_s,
            transfers=self.spec.copies,
            wait=self.spec.wait,
            streams=self.spec.streams,
            on_gpu=self.timing.evidence is Evidence.DEVICE,
        )

    def _findings(self, series: _Series, cell: Cell, *, budgets: bool) -> list[Finding]:
        """What the sessions so far say of a cell."""
        sessions = series.sessions.get(cell.name, [])
        found: list[Finding] = []
        ours = [each.cells[0].subjects[0] for each in sessions]
        if budgets and self.spec.budgets:
            doubts = budget_doubts(sessions, 0, streams=self.spec.streams)
            for finding in budget_findings(ours, cell=cell, spec=self.spec, evidence=self.timing.evidence):
                doubtful = doubted(finding, doubts.blocks_pass, blocks=(Status.PASSED,))
                found.append(doubted(doubtful, doubts.blocks_fail, blocks=(Status.FAILED,)))
        if series.rival is not None:
            found += self._ratio_findings(series.rival, sessions, cell)
        return found

    def _ratio_findings(self, rival: Rival, sessions: list[SessionTimes], cell: Cell) -> Iterator[Finding]:
        n = sum(len(each.cells[0].subjects[0].regions[self.spec.timed]) for each in sessions)
        regression, speedup = self.spec.regression, self.spec.speedup
        both = (Status.PASSED, Status.FAILED)
        if regression is not None and regression.against == rival.against:
            for name, limit in regression.limits.items():
                finding = regression_finding(
                    estimate(self._log_ratios(sessions, name)),
                    name,
                    cell=cell,
                    limit_percent=limit,
                    against=rival.title,
                    n=n,
                    evidence=self.timing.evidence,
                )
                yield doubted(finding, self._doubts(sessions, name, limit), blocks=both)
        if speedup is not None and speedup.against == rival.against:
            finding = speedup_finding(
                estimate(self._log_ratios(sessions, "p50")),
                speedup,
                cell=cell,
                against=rival.title,
                n=n,
                evidence=self.timing.evidence,
            )
            yield doubted(finding, self._doubts(sessions, "p50", percent_of(speedup)), blocks=both)

    def _log_ratios(self, sessions: Sequence[SessionTimes], name: str) -> list[float]:
        p, region = RATIO_PERCENTILES[name], self.spec.timed
        pairs = (each.cells[0].subjects for each in sessions)
        return [log_ratio(a.regions[region], b.regions[region], p) for a, b in pairs]

    def _doubts(self, sessions: Sequence[SessionTimes], name: str, limit: float) -> tuple[str, ...]:
        return ratio_doubts(sessions, 0, tolerance_percent=limit, p=RATIO_PERCENTILES[name], region=self.spec.timed)

    def _metrics(self, every: Sequence[_Series], cell: Cell) -> LatencyMetrics:
        first = every[0]
        sessions = first.sessions[cell.name]
        ours: list[SubjectTimes] = [each.cells[0].subjects[0] for each in sessions]
        metrics = summarise(
            ours,
            cell=cell,
            spec=self.spec,
            clock=clock_of(sessions),
            seconds=first.seconds,
            stopped=first.stopped[cell.name],
            cuda_graph=bool(self.timing.engine.options.cuda_graph),
            notes=missing_readings(sessions, 0),
        )
        comparisons = tuple(self._comparison(series, cell) for series in every if series.rival is not None)
        return msgspec.structs.replace(metrics, comparisons=comparisons)

    def _comparison(self, series: _Series, cell: Cell) -> Comparison:
        rival, region = series.rival, self.spec.timed
        if rival is None:
            raise MeasurementError("a series without a rival has no comparison")
        sessions = series.sessions[cell.name]
        pairs = [each.cells[0].subjects for each in sessions]
        return Comparison(
            against=rival.against,
            title=rival.title,
            sha256=rival.subject.sha256,
            ratios={name: estimate(self._log_ratios(sessions, name)) for name in RATIO_PERCENTILES},
            sessions=len(sessions),
            seconds=series.seconds,
            checks=self._checks_against(rival.against, [cell]),
            stopped=series.stopped[cell.name],
            pairs=tuple(SessionPair(a_ns=a.regions[region], b_ns=b.regions[region]) for a, b in pairs),
        )

    def _located(self, finding: Finding | Failure) -> Finding | Failure:
        """The finding with its limit's place in the spec, looked up only for one that did not pass."""
        if isinstance(finding, Failure) or finding.status is Status.PASSED or self.timing.file is None:
            return finding
        name = finding.check.removeprefix("latency.").partition("[")[0]
        keys: tuple[str, ...] = (name,)
        if name == "throughput":
            keys = ("throughput_at_least",)
        elif name.startswith("regression_"):
            keys = ("regression", name.removeprefix("regression_"))
        place = self.timing.file.engine_location(self.timing.engine.name, *self.table.key, *keys)
        return msgspec.structs.replace(finding, limit=msgspec.structs.replace(finding.limit, location=place))


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="gate-latency-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with(job: CellJob, kept: int, subjects: int) -> CellJob:
    return msgspec.structs.replace(job, kept=kept, subjects=tuple(range(subjects)))


def _sessions(count: int) -> str:
    return f"{count} session{'' if count == 1 else 's'}"


def measured_usage(timing: Timing, usage: UsageSpec) -> tuple[UsageMetrics | None, tuple[Finding | Failure, ...]]:
    """What an engine takes while it runs without a pause, in as many sessions as the first look has."""
    cell = Cell(batch=usage.batch)
    try:
        with private_folder() as folder:
            feeds = folder / "feeds.safetensors"
            write_feeds(feeds, timing.feeds.batches(cell))
            job = Job(
                subjects=(timing.subject,),
                usage_s=usage.seconds,
                usage_feeds=feeds,
                on_gpu=timing.evidence is Evidence.DEVICE,
            )
            sessions = []
            for _ in range(LOOKS[0]):
                sessions.append(run_session(job, timeout_s=LatencySpec().session_timeout_s + usage.seconds))
                timing.advance()
        found = [each.usage[0] for each in sessions]
        metrics = usage_metrics(found, batch=usage.batch)
        findings = usage_findings(found, usage, evidence=timing.evidence)
    except GateError as err:
        return None, (failure("usage", err, timing.evidence),)
    if timing.file is None:
        return metrics, findings
    place = timing.file.engine_location
    return metrics, tuple(
        msgspec.structs.replace(
            each,
            limit=msgspec.structs.replace(
                each.limit, location=place(timing.engine.name, "usage", each.check.removeprefix("usage."))
            ),
        )
        for each in findings
    )
