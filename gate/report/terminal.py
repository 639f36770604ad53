"""The screen after a check, as text, and the progress shown while it runs.

`render` is pure. Its first line is what a hurried reader needs; nothing in it is wrapped, so that a log can be searched.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from gate.errors import ExitCode
from gate.report.making import making_lines, reproduce_lines
from gate.report.scores import HEADINGS as SCORE_HEADINGS
from gate.report.scores import box_lines, score_table
from gate.report.screen import is_terminal
from gate.report.table import HEADINGS, NOT_RUN_HERE, device_text, rows
from gate.report.timings import timing_lines
from gate.results import CheckRun, EngineResult
from gate.verdict import Failure, Finding, Status
from gate.wording import (
    advice,
    anchor,
    failure_lines,
    finding_sentence,
    interval_text,
    limit_source,
    observed_and_limit,
    status_word,
)

if TYPE_CHECKING:
    from gate.pipeline import Observer

INDENT = " " * 8
GAP = "  "
DROPPED_WHEN_NARROW = ("evidence", "size")
"""Columns that a narrow terminal does without; report.md has them all."""
MOST_OTHERS = 2
"""Findings that did not pass, beside the first, that a line each is given to."""
MOST_NAMES = 3

_SHORTER = {NOT_RUN_HERE: "not run", "PASSED (preflight only)": "PASSED (preflight)"}
_CAUSE = "likely cause: "
_OF_ANSWERS = ("parity.", "task.", "metamorphic.")


def exit_code_of(status: Status) -> ExitCode:
    """What the command returns for a run of that status."""
    return {
        Status.PASSED: ExitCode.PASSED,
        Status.FAILED: ExitCode.FAILED,
        Status.INCONCLUSIVE: ExitCode.INCONCLUSIVE,
    }[status]


def next_command(run: CheckRun, *, verbose: bool = False) -> str | None:
    """The command that mends the first engine that did not pass, or looks closer at it; None where all passed.

    Args:
        verbose: Every finding is listed already.
    """
    first = _first_failing(run)
    return None if first is None else _next_for(run, first, verbose=verbose)


def _next_for(run: CheckRun, result: EngineResult, *, verbose: bool = False) -> str:
    hints = {advice(finding) for finding in result.failing}
    if len(hints) == 1 and (hint := hints.pop()).startswith("gate ") and "\n" not in hint:
        # All that is wrong has one remedy, such as accepting a first baseline.
        return hint
    if verbose:
        return _explain(result)
    return f"gate check {_quoted(run.spec_path)} --engine {result.name} --verbose"


def _explain(result: EngineResult) -> str:
    return f"gate explain {result.failing[0].check.partition('[')[0]}"


def headline(run: CheckRun, *, verbose: bool = False) -> str:
    """The first line: the engine, the check, observed against limit, and the next command."""
    command = next_command(run, verbose=verbose)
    return f"{run.summary}   next: {command}" if command else run.summary


def render(
    run: CheckRun,
    *,
    report: str | None = None,
    verbose: bool = False,
    width: int | None = None,
    exit_line: bool = True,
) -> str:
    """The whole screen.

    Args:
        run: What was checked.
        report: Path of the report to name in the last line; None where none was written.
        verbose: List every finding with its limit and where that comes from.
        width: Columns of the terminal; None: as wide as it needs.
        exit_line: End with the report and the exit code; False where the command will end with another.
    """
    lines = [
        headline(run, verbose=verbose),
        "",
        f"{run.model_id}  {run.samples} samples  reference: {run.provenance.reference}"
        f"   device: {device_text(run.device)}",
        "",
        *_table(run, width),
    ]
    warnings = [f"WARNING  {result.name}  {warning}" for result in run.engines for warning in result.warnings]
    lines += ["", *warnings] if warnings else []
    for status in (Status.FAILED, Status.INCONCLUSIVE):
        for result in run.engines:
            if result.status is status:
                lines += ["", *_explained(run, result, verbose=verbose)]
    for result in run.engines:
        if result.status is None:
            lines += ["", f"NOT RUN  {result.name}  {result.not_run or 'no reason was given'}"]
    if verbose:
        for result in run.engines:
            lines += ["", *_all_findings(result)]
    facts = [] if verbose else [_default_limits(run), _reused(run)]
    lines += ["", *filter(None, facts)] if any(facts) else []
    if exit_line:
        code = _exit_code(run)
        last = f"exit {int(code)} ({code.name.lower()})"
        lines += ["", f"report: {report}          {last}" if report else last]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _exit_code(run: CheckRun) -> ExitCode:
    ran = any(result.status is not None for result in run.engines)
    return exit_code_of(run.status) if ran else ExitCode.INCONCLUSIVE


def _first_failing(run: CheckRun) -> EngineResult | None:
    for status in (Status.FAILED, Status.INCONCLUSIVE):
        for result in run.engines:
            if result.status is status:
                return result
    return None


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)


def _table(run: CheckRun, width: int | None) -> Iterator[str]:
    headings: tuple[str, ...] = HEADINGS
    body = [row.cells for row in rows(run)]
    table = _columns([HEADINGS, *body])
    for dropped in DROPPED_WHEN_NARROW:
        if width is None or len(table[0]) <= width:
            break
        kept = [index for index, heading in enumerate(headings) if heading != dropped]
        headings = tuple(headings[index] for index in kept)
        body = [tuple(_SHORTER.get(row[index], row[index]) for index in kept) for row in body]
        table = _columns([headings, *body])
    yield from table


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal length, with each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [GAP + GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _explained(run: CheckRun, result: EngineResult, *, verbose: bool) -> Iterator[str]:
    """Why an engine did not pass: the first finding with its likely cause, and the others."""
    first, *others = result.failing
    yield f"{first.status.value}  {result.name}  {finding_sentence(first, precision=result.precision)}"
    cause = _likely_cause(result)
    if cause is not None:
        yield f"{INDENT}likely cause: {cause.removeprefix(_CAUSE)}"
    for line in _details(first, result):
        yield f"{INDENT}{line}"
    for line in _others(others, result, verbose=verbose):
        yield f"{INDENT}{line}"
    for note in result.notes:
        if note != cause:
            yield f"{INDENT}{note}"
    command = _next_for(run, result, verbose=verbose)
    yield from (f"{INDENT}{line}" for line in advice(first).splitlines() if line != command)
    yield f"{INDENT}next: {'   ·   '.join(dict.fromkeys((command, _explain(result))))}"


def _likely_cause(result: EngineResult) -> str | None:
    """The first note that is known to name one; else, for other answers, a warning.

    A note that begins `likely cause:` does, and one on a single output, `logits: softmax is applied twice`. Others say
    how the engine was made or compared, or where to look.
    """
    diagnosed = tuple(f"{each.output}: " for each in result.outputs)
    causes = [note for note in result.notes if note.startswith(_CAUSE)]
    causes = causes or [note for note in result.notes if note.startswith(diagnosed)]
    if not causes and result.failing[0].check.startswith(_OF_ANSWERS):
        # The last one: another scale is told after outliers, and these after too few samples.
        causes = [*result.warnings[-1:]]
    return causes[0] if causes else None


def _others(others: Sequence[Finding | Failure], result: EngineResult, *, verbose: bool) -> Iterator[str]:
    """What else did not pass: a line each for two, and their names in a line where there are more."""
    if len(others) <= MOST_OTHERS:
        for other in others:
            yield f"also {other.status.value}: {finding_sentence(other, precision=result.precision)}"
            if other.status is Status.INCONCLUSIVE:
                yield from (f"    {line}" for line in failure_lines(other))
        return
    for status in (Status.FAILED, Status.INCONCLUSIVE):
        names = [other.check for other in others if other.status is status]
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            where = "" if verbose else "; --verbose lists them"
            yield f"also {status.value}: {', '.join(names[:MOST_NAMES])}{more}{where}"


def _details(finding: Finding | Failure, result: EngineResult) -> Iterator[str]:
    yield from failure_lines(finding)
    if not isinstance(finding, Finding) or not finding.check.startswith("parity.") or "sample" in finding.detail:
        return
    _, bracket, output = finding.check.rstrip("]").partition("[")
    for each in result.outputs:
        if each.worst_samples and (not bracket or each.output == output):
            worst = ", ".join(f"{index} ({error:.1e})" for index, error in each.worst_samples[:3])
            yield f"worst samples of output {each.output!r}: {worst} (relative error)"


def _all_findings(result: EngineResult) -> Iterator[str]:
    yield f"{result.name}  {result.backend} {result.precision}: {status_word(result.status, result.evidence)}"
    for finding in () if result.verdict is None else result.verdict.findings:
        if isinstance(finding, Failure):
            yield f"{GAP}{finding.status.value:<12}  {finding_sentence(finding)}"
            yield from _why(finding)
            continue
        observed, allowed = observed_and_limit(finding)
        interval = interval_text(finding)
        between = f" [{interval}]" if interval else ""
        yield (
            f"{GAP}{finding.status.value:<12}  {finding.check}: {observed}{between}, limit "
            f"{finding.limit.symbol} {allowed} "
            f"({limit_source(finding.limit, result.precision)}), n = {finding.n}, {finding.evidence.value}"
        )
        if finding.status is not Status.PASSED:
            yield from _why(finding)
    yield from (f"{GAP}{line}" for line in _scores(result))
    yield from (f"{GAP}{line}" for line in timing_lines(result))
    for note in (*making_lines(result), *result.notes):
        yield f"{GAP}{note}"
    for what, command in reproduce_lines(result):
        yield f"{GAP}{what}: {command}"
    if result.reused:
        yield f"{GAP}reused: {', '.join(result.reused)}"


def _scores(result: EngineResult) -> Iterator[str]:
    """The engine's values beside the reference's, and its boxes."""
    if result.scores is None:
        return
    table = score_table(result.scores)
    cells = [(table.title, *SCORE_HEADINGS[1:]), *((f"{GAP}{name}", *more) for name, *more in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *numbers in cells:
        right = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        yield GAP.join((name.ljust(widths[0]), *right))
    yield from (f"{GAP}{remark}" for remark in table.remarks)
    yield from box_lines(result.scores)


def _why(finding: Finding | Failure) -> Iterator[str]:
    """What else is known of a finding that did not pass, below its line in the list."""
    for line in (*failure_lines(finding), *advice(finding).splitlines(), anchor(finding.check)):
        yield f"{GAP}{'':<12}  {line}"


def _default_limits(run: CheckRun) -> str:
    names = [
        result.name
        for result in run.engines
        if result.verdict is not None
        and any(isinstance(each, Finding) and each.limit.source == "default" for each in result.verdict.findings)
    ]
    return f"default limits of the precision applied to {', '.join(names)}; --verbose lists them" if names else ""


def _reused(run: CheckRun) -> str:
    """What came from the cache or from a recording; engines that reused the same are named together."""
    engines: dict[tuple[str, ...], list[str]] = {}
    for result in run.engines:
        if result.reused:
            engines.setdefault(result.reused, []).append(result.name)
    parts = [*run.reused, *(f"{', '.join(what)} of {', '.join(names)}" for what, names in engines.items())]
    return f"reused: {'; '.join(parts)}" if parts else ""


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Observer]:
    """An observer for the time of a check: bars with an ETA on a terminal, else one plain line a stage."""
    stream = sys.stderr if stream is None else stream
    if not is_terminal(stream):
        yield PlainProgress(stream)
        return
    bars = Bars(stream)
    try:
        yield bars
    finally:
        bars.done()


class PlainProgress:
    """One line a stage, for logs: `build       ort-fp16`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:  # noqa: ARG002
        """A stage begins."""
        self._write(f"{name:<11} {engine or ''}")

    def advance(self, steps: int = 1) -> None:
        """Steps are not shown in a log."""

    def phase(self, name: str, done: float | None) -> None:
        """Phases of a compiler are not shown in a log."""

    def note(self, text: str) -> None:
        """Something a reader should know."""
        self._write(f"{'note':<11} {text}")

    def done(self) -> None:
        """The last stage ended."""

    def _write(self, line: str) -> None:
        self._stream.write(line.rstrip() + "\n")
        self._stream.flush()


_TIMED_STAGES = ("latency", "usage", "memory", "stages")
_REDRAW_S = 0.5


class Bars:
    """A bar for the current stage, with how far it is and how long it will take; gone when the check ends.

    While something is timed nothing is drawn but at a step: a bar that moves takes time of the machine that is measured.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns: Sequence[Any] = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._progress = Progress(*columns, console=Console(file=stream), transient=True)
        self._task: Any = None
        self._drawn = time.monotonic()
        self._running = False

    def stage(self, name: str, *, engine: str | None = None, total: int | None = None) -> None:
        """A stage begins: its bar takes the place of the one before."""
        moves = name not in _TIMED_STAGES
        if self._running and moves != self._progress.live.auto_refresh:
            self._progress.stop()
            self._running = False
        if self._task is not None:
            self._progress.remove_task(self._task)
        if not self._running:
            self._progress.live.auto_refresh = moves
            self._progress.start()
            self._running = True
        self._task = self._progress.add_task(f"{name:<11} {engine or ''}", total=total)
        self._drawn = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """So many steps are done."""
        if self._task is not None:
            self._progress.advance(self._task, steps)
            if not self._progress.live.auto_refresh and time.monotonic() - self._drawn >= _REDRAW_S:
                self._progress.refresh()
                self._drawn = time.monotonic()

    def phase(self, name: str, done: float | None) -> None:
        """The compiler's phase takes the place of the stage's name; its share becomes the bar's."""
        if self._task is not None:
            total = None if done is None else 1.0
            self._progress.update(self._task, description=f"{name:.40}", total=total, completed=done or 0.0)

    def note(self, text: str) -> None:
        """A line above the bar that stays."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def done(self) -> None:
        """Take the bar away."""
        if self._running:
            self._progress.stop()
            self._running = False
            self._task = None
