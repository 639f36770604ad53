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
from gate.latency.bounds import equal_parts
from gate.latency.budgets import (
    LATER_SAMPLES,
    budget_findings,
    clock_of,
    doubted,
    regression_finding,
    samples_needed,
    sessions_text,
    speedup_finding,
    summarise,
)
from gate.latency.config import Cell, LatencySpec, TimedTable, UsageSpec, latency_checks, percent_of, timed_tables
from gate.latency.guards import budget_doubts, missing_readings, ratio_doubts, usage_doubts
from gate.latency.measurement import SessionTimes, SubjectTimes
from gate.latency.ratio import (
    LEAST_KEPT,
    LOOKS,
    RATIO_PERCENTILES,
    RatioEstimate,
    estimate,
    kept_needed,
    log_ratio,
    next_look,
)
from gate.latency.usage import usage_findings, usage_metrics
from gate.results import Comparison, LatencyMetrics, SessionPair, UsageMetrics
from gate.sessions.job import CellJob, Job, Subject
from gate.sessions.run import run_session, write_feeds
from gate.spec import EngineSpec, SpecFile
from gate.steps.feeds import Feeds
from gate.verdict import Evidence, Failure, Finding, Status

LEG = 8
"""Kept inferences of a leg. Source: docs/latency.md."""

LEAST_IN_TURN_S, LEAST_ALONE_S = 1.2, 0.1
"""How long the inferences of a session take at the least, of two engines in turn together, and of one alone. 200 inferences
of an engine of 20 us are over in 4 ms, within one hiccup of the machine. Source: docs/adr/0009-latency-in-sessions.md."""

MOST_KEPT = 4000
"""Inferences of each engine in a session, however short they are, unless a budget needs more: all are kept as evidence."""

_WHOLE_PARTS = 8
"""Cells, for each rival, from which on they keep fewer, so that the evidence stays below what a bundle may hold."""

_OF_A_SHARE = 0.95
"""How much of its share of the time a session is told to take, so that the last one still fits."""

_OF_A_TIMEOUT = 0.8
"""How much of its time limit a session is told to take, so that an engine that is slow is not one that hangs."""


_BY_OTHERS = {
    "usage.power_w": (Status.FAILED,),
    "usage.energy_mj": (Status.FAILED,),
    "usage.gpu_percent_at_least": (Status.PASSED,),
}
"""What another process on the GPU can bring about, since the driver's numbers are of the whole GPU: it adds to each."""


@dataclass(frozen=True)
class Rival:
    """Another engine to time in turn with.

    Args:
        against: As in the spec.
        title: For a reader.
        subject: What the session loads.
        on_gpu: Whether it runs on the GPU.
    """

    against: str
    title: str
    subject: Subject
    on_gpu: bool = False


def in_a_process(job: Job, timeout_s: float) -> SessionTimes:
    """A session in a fresh process of this machine; as `gate.sessions.run.run_session`."""
    return run_session(job, timeout_s=timeout_s)


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
        advance: Called after each session.
        max_time_s: For all tables together, instead of what each of them says; None: as they say.
        session: Measures a job, with a limit of seconds.
        clock: Seconds, monotonic: what `max_time_s` is held against.
    """

    file: SpecFile | None
    engine: EngineSpec
    subject: Subject
    evidence: Evidence
    rival: Callable[[str], Rival]
    feeds: Feeds
    advance: Callable[[], None]
    max_time_s: float | None = None
    session: Callable[[Job, float], SessionTimes] = in_a_process
    clock: Callable[[], float] = time.monotonic


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
        budgets: Whether the absolute budgets rest on it.
        failed: What ended it; None: nothing did.
    """

    rival: Rival | None
    sessions: dict[str, list[SessionTimes]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    budgets: bool = False
    failed: GateError | None = None

    def timed(self, name: str) -> list[tuple[SubjectTimes, ...]]:
        """The engines' inferences at one cell, by session."""
        return [each.cells[0].subjects for each in self.sessions.get(name, [])]


def measured_latency(timing: Timing) -> Timed:
    """Time an engine as its `[engine.latency]` asks for; what goes wrong is a Failure of each check that it touches."""
    latencies: list[LatencyMetrics] = []
    findings: list[Finding | Failure] = []
    tables = timed_tables(timing.engine.latency)
    spent = 0.0
    for index, table in enumerate(tables):
        max_time_s = table.spec.max_time_s
        if timing.max_time_s is not None:
            max_time_s = max(timing.max_time_s - spent, 0.0) / (len(tables) - index)
        measuring = _Table(timing, table, max_time_s)
        try:
            made = measuring.measured()
        except GateError as err:
            checks = latency_checks_of(table)
            findings.extend(failure(check, err, timing.evidence) for check in checks)
            continue
        finally:
            spent += measuring.spent_s
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

    def __init__(self, timing: Timing, table: TimedTable, max_time_s: float) -> None:
        self.timing = timing
        self.table = table
        self.spec = table.spec
        self.max_time_s = max_time_s
        self.spent_s = 0.0

    def measured(self) -> Timed:
        """Every cell, against every rival; budgets rest on the first series. A session that fails fails its series.

        Raises:
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
        every[0].budgets = bool(self.spec.budgets)
        with private_folder() as folder:
            jobs = [self._cell_job(index, cell, folder) for index, cell in enumerate(self.table.cells)]
            for index, series in enumerate(every):
                try:
                    self._run(series, jobs, max(self.max_time_s - self.spent_s, 0.0) / (len(every) - index))
                except GateError as err:
                    series.failed = err
        sound = [series for series in every if series.failed is None]
        latencies = []
        for cell in self.table.cells:
            for series in every:
                findings.extend(self._findings(series, cell))
            if sound:
                latencies.append(self._metrics(sound, cell))
        return Timed(latencies=tuple(latencies), findings=tuple(self._located(each) for each in findings))

    def _checks_against(self, name: str, cells: Sequence[Cell]) -> tuple[str, ...]:
        """Checks of some cells that need one rival."""
        return tuple(check for cell in cells for check in self.spec.checks_against(name, cell))

    def _budget_checks(self, cell: Cell) -> tuple[str, ...]:
        """Checks of a cell that need no rival."""
        return tuple(cell.check(f"latency.{name.removesuffix('_at_least')}") for name in self.spec.budgets)

    def _cell_job(self, index: int, cell: Cell, folder: Path) -> CellJob:
        path = folder / f"feeds-{index}.safetensors"
        write_feeds(path, self.timing.feeds.batches(cell))
        parts = len(self.table.cells) * max(len(self.spec.rivals), 1)
        most = MOST_KEPT * _WHOLE_PARTS // max(parts, _WHOLE_PARTS)
        return CellJob(cell=cell, feeds=path, kept=LEG, subjects=(0,), most=LEG * (most // LEG))

    def _run(self, series: _Series, jobs: Sequence[CellJob], max_time_s: float) -> None:
        """Sessions until every cell is decided, the last look is over, or the time is.

        Raises:
            MeasurementError: A session failed, or did not time what is judged.
        """
        subjects = (self.timing.subject,) if series.rival is None else (self.timing.subject, series.rival.subject)
        open_cells = dict(zip((cell.name for cell in self.table.cells), jobs, strict=True))
        pace = _Pace(self.spec, max_time_s)
        while open_cells:
            if (reason := pace.over(self._asked_text())) or (reason := self._hopeless(series, pace, list(open_cells))):
                self._stop(series, open_cells, reason)
                return
            kept = self._kept(series, pace.count)
            cells = [_with(each, kept, len(subjects)) for each in open_cells.values()]
            began = self.timing.clock()
            try:
                times = self._session(self._job(series, subjects, cells, pace), pace.count + 1)
            finally:
                took = self.timing.clock() - began
                self.spent_s += took
                series.seconds += took
            pace.add(times, took, kept=kept)
            self.timing.advance()
            for index, name in enumerate(open_cells):
                one = msgspec.structs.replace(times, cells=(times.cells[index],))
                series.sessions.setdefault(name, []).append(one)
            if not pace.is_look():
                continue
            for cell in [each for each in self.table.cells if each.name in open_cells]:
                found = self._findings(series, cell)
                if all(each.status is not Status.INCONCLUSIVE for each in found):
                    word = "decided" if found else "nothing to decide, measured"
                    reason = f"{word} after {sessions_text(pace.count)}"
                    self._stop(series, {cell.name: open_cells.pop(cell.name)}, reason)
            if pace.count >= pace.last:
                self._stop(series, open_cells, f"not decided after {sessions_text(pace.count)}, which are the most")
                return

    def _session(self, job: Job, number: int) -> SessionTimes:
        """One session of this table.

        Raises:
            MeasurementError: It failed, or did not time what is judged.
        """
        times = _session(self.timing, job, self.spec.session_timeout_s, number)
        for cell in times.cells:
            for subject, found in zip(job.subjects, cell.subjects, strict=True):
                if self.spec.timed not in found.regions:
                    raise MeasurementError(
                        f'timed = "{self.spec.timed}" was asked for, and {subject.name!r} gave '
                        f"{', '.join(found.regions)} alone",
                        hint='Leave timed out, which is "host_wall".',
                    )
        return times

    def _stop(self, series: _Series, cells: Mapping[str, CellJob], reason: str) -> None:
        series.stopped.update(dict.fromkeys(cells, reason))

    def _asked_text(self) -> str:
        """The limit of time as it was given."""
        asked = self.timing.max_time_s
        return f"max_time_s = {self.spec.max_time_s if asked is None else asked:g} s"

    def _hopeless(self, series: _Series, pace: _Pace, names: Sequence[str]) -> str:
        """Why the time will not do for a comparison, where nothing else is measured; empty where it may."""
        if series.rival is None or series.budgets or not 0 < pace.count < pace.first:
            return ""
        least = min(sum(len(a.regions[self.spec.timed]) for a, _ in series.timed(name)) for name in names)
        if least + (pace.first - pace.count) * pace.kept_in_share() >= LEAST_KEPT * pace.first:
            return ""
        needed = pace.seconds_for(LEAST_KEPT)
        return (
            f"{self._asked_text()} is too short, stopped after {sessions_text(pace.count)}: {pace.first} sessions with "
            f"{LEAST_KEPT} inferences of each engine take about {math.ceil(needed)} s"
        )

    def _kept(self, series: _Series, count: int) -> int:
        """Inferences of each engine in the next session: what the first look needs, later what the last one needs.

        Where sessions had to keep fewer than the comparison needs, the next ones make up for it.
        """
        least = 0
        if series.rival is not None:
            least = kept_needed(self._limits(series.rival.against))
            done = [sum(len(a.regions[self.spec.timed]) for a, _ in series.timed(name)) for name in series.sessions]
            left = self.spec.sessions - count
            if done and left > 0:
                least = max(least, math.ceil((LEAST_KEPT * self.spec.sessions - min(done)) / left))
        if series.budgets:
            first = math.ceil(samples_needed(self.spec) / self.spec.sessions)
            if count >= self.spec.sessions:
                first = max(first, math.ceil(LATER_SAMPLES / LOOKS[-1]))
            least = max(least, first)
        elif series.rival is None:
            least = math.ceil(samples_needed(self.spec) / self.spec.sessions)
        return LEG * math.ceil(max(least, 2 * LEG, 2 * self.spec.streams) / LEG)

    def _limits(self, against: str) -> dict[str, float]:
        """Tolerances in percent by percentile, of all that is asked for against one rival."""
        found: dict[str, float] = {}
        if self.spec.regression is not None and self.spec.regression.against == against:
            found.update(self.spec.regression.limits)
        if self.spec.speedup is not None and self.spec.speedup.against == against:
            found["p50"] = min(found.get("p50", math.inf), percent_of(self.spec.speedup))
        return found

    def _job(self, series: _Series, subjects: tuple[Subject, ...], cells: list[CellJob], pace: _Pace) -> Job:
        return Job(
            subjects=subjects,
            cells=tuple(cells),
            leg=LEG,
            order=1 if pace.count % 2 else 0,
            warm_up_s=self.spec.warm_up_s,
            transfers=self.spec.copies,
            wait=self.spec.wait,
            streams=self.spec.streams,
            on_gpu=self.timing.evidence is Evidence.DEVICE or (series.rival is not None and series.rival.on_gpu),
            max_s=pace.next_s(),
        )

    def _findings(self, series: _Series, cell: Cell) -> list[Finding | Failure]:
        """What the sessions so far say of a cell; where one failed, every check that rests on them has."""
        if series.failed is not None:
            checks = self._budget_checks(cell) if series.budgets else ()
            if series.rival is not None:
                checks += self._checks_against(series.rival.against, [cell])
            return [failure(check, series.failed, self.timing.evidence) for check in checks]
        sessions = series.sessions.get(cell.name, [])
        found: list[Finding | Failure] = []
        ours = [each.cells[0].subjects[0] for each in sessions]
        if series.budgets:
            doubts = budget_doubts(sessions, 0, streams=self.spec.streams)
            blocks_pass = (*self._too_few(ours), *doubts.blocks_pass)
            for finding in budget_findings(ours, cell=cell, spec=self.spec, evidence=self.timing.evidence):
                doubtful = doubted(finding, blocks_pass, blocks=(Status.PASSED,))
                found.append(doubted(doubtful, doubts.blocks_fail, blocks=(Status.FAILED,)))
        if series.rival is not None:
            found += self._ratio_findings(series.rival, sessions, cell)
        return found

    def _too_few(self, ours: Sequence[SubjectTimes]) -> tuple[str, ...]:
        """That there are fewer inferences than the spec asks for."""
        n, asked = len(equal_parts([each.regions[self.spec.timed] for each in ours])), self.spec.samples
        if asked is None or n >= asked:
            return ()
        return (f"{n} of the {asked} samples that are asked for; raise max_time_s",)

    def _ratio_findings(self, rival: Rival, sessions: list[SessionTimes], cell: Cell) -> Iterator[Finding]:
        n = sum(len(each.cells[0].subjects[0].regions[self.spec.timed]) for each in sessions)
        regression, speedup = self.spec.regression, self.spec.speedup
        both = (Status.PASSED, Status.FAILED)
        if regression is not None and regression.against == rival.against:
            for name, limit in regression.limits.items():
                found = self._ratio(sessions, name)
                finding = regression_finding(
                    found,
                    name,
                    cell=cell,
                    limit_percent=limit,
                    against=rival.title,
                    n=n,
                    evidence=self.timing.evidence,
                )
                distance = math.log(found.ratio) - math.log1p(limit / 100.0)
                yield doubted(finding, self._doubts(sessions, name, limit, distance=distance), blocks=both)
        if speedup is not None and speedup.against == rival.against:
            found = self._ratio(sessions, "p50")
            finding = speedup_finding(
                found,
                speedup,
                cell=cell,
                against=rival.title,
                n=n,
                evidence=self.timing.evidence,
            )
            distance = math.log(found.ratio) + math.log(speedup.at_least)
            doubts = self._doubts(sessions, "p50", percent_of(speedup), distance=distance)
            yield doubted(finding, doubts, blocks=both)

    def _ratio(self, sessions: Sequence[SessionTimes], name: str) -> RatioEstimate:
        p, region = RATIO_PERCENTILES[name], self.spec.timed
        pairs = (each.cells[0].subjects for each in sessions)
        return estimate([log_ratio(a.regions[region], b.regions[region], p) for a, b in pairs])

    def _doubts(
        self, sessions: Sequence[SessionTimes], name: str, tolerance_percent: float, *, distance: float
    ) -> tuple[str, ...]:
        if len(sessions) < LOOKS[0]:
            return ()
        doubts = ratio_doubts(
            sessions,
            0,
            tolerance_percent=tolerance_percent,
            p=RATIO_PERCENTILES[name],
            region=self.spec.timed,
            distance=distance,
        )
        kept = sum(len(each.cells[0].subjects[0].regions[self.spec.timed]) for each in sessions)
        if kept >= LEAST_KEPT * len(sessions):
            return doubts
        short = (
            f"{kept // len(sessions)} inferences of each engine in a session, the rule takes at least {LEAST_KEPT}; "
            "raise max_time_s"
        )
        return (short, *doubts)

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
            ratios={name: self._ratio(sessions, name) for name in RATIO_PERCENTILES},
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
    try:
        folder = Path(tempfile.mkdtemp(prefix="gate-latency-"))
    except OSError as err:
        raise MeasurementError(
            f"a folder for temporary files cannot be made: {err}",
            hint="Make room there, or set TMPDIR to a folder that can be written to.",
        ) from err
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Pace:
    """How the sessions of a series share its time.

    Until the first look each has an equal share of what is left, and keeps fewer inferences where that is too short.
    Later ones are begun where one as long as the longest so far still fits.

    Args:
        spec: How many sessions the first look takes, and how long one may take.
        max_time_s: For all of them.
    """

    def __init__(self, spec: LatencySpec, max_time_s: float) -> None:
        self.first = spec.sessions
        self.last = max(LOOKS[-1], spec.sessions)
        self.count = 0
        self._left = max_time_s
        self._timeout_s = spec.session_timeout_s
        self._longest_s = 0.0
        self._kept = 0
        self._timed_s = 0.0
        self._loading_s = 0.0

    def add(self, times: SessionTimes, took_s: float, *, kept: int) -> None:
        """A session is over."""
        self.count += 1
        self._left -= took_s
        self._longest_s = max(self._longest_s, took_s)
        legs_s = sum(max(each.span_ns for each in cell.subjects) for cell in times.cells) / 1e9
        found = min((len(each.subjects[0].regions["host_wall"]) for each in times.cells), default=kept)
        self._kept, self._timed_s, self._loading_s = found, legs_s, max(took_s - legs_s, 0.0)

    def is_look(self) -> bool:
        """Whether the rule looks at so many sessions."""
        return self.count >= self.first and (self.count in (*LOOKS, self.first) or next_look(self.count) is None)

    def over(self, asked: str) -> str:
        """Why there is no time for another session; empty where there is."""
        least = self._longest_s if self.count >= self.first else self.seconds_of_one(2 * LEG)
        if not self.count or least <= self._left:
            return ""
        return f"{asked} was over after {sessions_text(self.count)}"

    def next_s(self) -> float:
        """How long the next session aims to take, above 0."""
        share = self._left if self.count >= self.first else self._share_s()
        return max(min(_OF_A_SHARE * share, _OF_A_TIMEOUT * self._timeout_s), 1e-3)

    def kept_in_share(self) -> float:
        """Inferences of each engine in a session's share of the time, if loading took none: the first loads longest."""
        return self._kept * self.next_s() / self._timed_s if self._timed_s > 0.0 else math.inf

    def seconds_of_one(self, kept: int) -> float:
        """How long a session with so many inferences of each engine takes, as the last one went."""
        return self._loading_s + self._timed_s * kept / max(self._kept, 1)

    def seconds_for(self, kept: int) -> float:
        """How long the sessions of the first look take."""
        return self.first * self.seconds_of_one(kept) / _OF_A_SHARE

    def _share_s(self) -> float:
        return max(self._left, 0.0) / (self.first - self.count)


def _session(timing: Timing, job: Job, timeout_s: float, number: int) -> SessionTimes:
    """One session, whose failure says which it was."""
    try:
        return timing.session(job, timeout_s)
    except GateError as err:
        err.message = f"session {number}: {err.message}"
        raise


def _with(job: CellJob, kept: int, subjects: int) -> CellJob:
    least_s = LEAST_ALONE_S if subjects == 1 else LEAST_IN_TURN_S
    return msgspec.structs.replace(job, kept=kept, subjects=tuple(range(subjects)), least_s=least_s)


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
            for number in range(1, LOOKS[0] + 1):
                sessions.append(_session(timing, job, LatencySpec().session_timeout_s + usage.seconds, number))
                timing.advance()
        found = [each.usage[0] for each in sessions]
        metrics = usage_metrics(found, batch=usage.batch)
        findings = tuple(
            doubted(each, usage_doubts(sessions), blocks=_BY_OTHERS[each.check]) if each.check in _BY_OTHERS else each
            for each in usage_findings(found, usage, evidence=timing.evidence)
        )
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
