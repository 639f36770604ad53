"""`gate baseline accept | show | diff`: the stored measurements, which are reviewed like code."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.author import ACCEPTED_BY, author
from gate.cli import COMMANDS
from gate.cli.check import LATEST, RUNS
from gate.errors import BaselineError, ExitCode, MeasurementError, SpecError
from gate.utc import utc_now

if TYPE_CHECKING:
    from gate.baseline import Baseline, Change


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its own three."""
    parser = subparsers.add_parser(
        "baseline", help=COMMANDS["baseline"], description="Accept, show and compare baselines.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    accept = commands.add_parser("accept", help="write baselines from a run that was looked at", allow_abbrev=False)
    accept.add_argument(
        "run_path",
        nargs="?",
        type=Path,
        metavar="RUN",
        help=f"a report.json or the folder of one; left out: the newest in {RUNS}",
    )
    accept.add_argument("--reason", required=True, metavar="TEXT", help="why this is what later runs are held against")
    accept.add_argument("--by", metavar="NAME", help=f"who accepts; left out: ${ACCEPTED_BY}, git's user, or the login")
    accept.add_argument(
        "--engine", action="append", default=[], metavar="NAME", help="only this engine; may be repeated"
    )
    _add_root(accept)
    accept.set_defaults(run=_run_accept)
    show = commands.add_parser("show", help="print baselines", allow_abbrev=False)
    show.add_argument("what", nargs="?", metavar="FILE|CASE", help="a baseline's file, or a model id; left out: all")
    _add_root(show)
    show.set_defaults(run=_run_show)
    diff = commands.add_parser(
        "diff", help="compare a run, or a second baseline, with the accepted one", allow_abbrev=False
    )
    diff.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="RUN|OLD NEW",
        help=f"a report.json or its folder; or two baselines' files; left out: the newest run in {RUNS}",
    )
    diff.add_argument("--engine", action="append", default=[], metavar="NAME", help="only this engine; may be repeated")
    _add_root(diff)
    diff.set_defaults(run=_run_diff)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="accepted baselines (baselines)"
    )


def _run_accept(args: argparse.Namespace) -> ExitCode:
    """Write baselines.

    Raises:
        BaselineError: Nothing could be accepted, or no reason was given.
        MeasurementError: There is no such report.
    """
    from gate.baseline import accept
    from gate.report.json_report import read_report

    now = utc_now()
    written = 0
    refused: list[str] = []
    for path in report_paths(args.run_path):
        run = read_report(path)
        result = accept(
            run, engines=args.engine, root=args.baselines, who=args.by or author(), when=now, why=args.reason
        )
        for accepted in result.accepted:
            print(f"accepted      {accepted.engine}  {accepted.path}")
        for skipped in result.skipped:
            print(f"not accepted  {skipped.engine}  {skipped.reason}")
        written += len(result.accepted)
        refused += [skipped.engine for skipped in result.skipped if skipped.engine in args.engine]
    if refused:
        raise BaselineError(f"not accepted although asked for: {', '.join(refused)}")
    if not written:
        raise BaselineError("nothing was accepted", hint="Run gate check until it passes, apart from its baseline.")
    print("commit them, to be reviewed like code")
    return ExitCode.PASSED


def _run_show(args: argparse.Namespace) -> ExitCode:
    """Print baselines.

    Raises:
        BaselineError: There is none, or one is malformed or edited.
    """
    from gate.baseline import read_baseline

    for index, path in enumerate(_baseline_paths(args.what, args.baselines)):
        if index:
            print()
        for line in _shown(path, read_baseline(path)):
            print(line)
    return ExitCode.PASSED


def _run_diff(args: argparse.Namespace) -> ExitCode:
    """Print what differs; it judges nothing, so it returns 0.

    Raises:
        BaselineError: A baseline is missing, malformed or edited, or nothing could be compared.
        MeasurementError: There is no such report.
    """
    from gate.baseline import baseline_from_result, baseline_path, diff, read_baseline, subject_of
    from gate.report.json_report import read_report

    if len(args.paths) == 2:
        old, new = args.paths
        _print_changes(f"{old} -> {new}", diff(read_baseline(old), read_baseline(new)))
        return ExitCode.PASSED
    if len(args.paths) > 2:
        raise BaselineError(f"give one run or two baselines, not {len(args.paths)} paths")
    compared = 0
    for path in report_paths(args.paths[0] if args.paths else None):
        run = read_report(path)
        for result in run.engines:
            if (args.engine and result.name not in args.engine) or not result.outputs:
                continue
            subject = subject_of(run, result)
            stored = baseline_path(args.baselines, case=subject.case, engine=subject.engine, device=subject.device)
            new = baseline_from_result(run, result, who="this run", when=run.created, why="not accepted")
            _print_changes(f"{stored} -> {path}", diff(read_baseline(stored), new))
            compared += 1
    if not compared:
        raise BaselineError("no engine of that run was measured, so there is nothing to compare")
    return ExitCode.PASSED


def report_paths(given: Path | None) -> tuple[Path, ...]:
    """The report.json files of a run: the file itself, or those in its folder; left out: of the newest run.

    Raises:
        SpecError: What was given does not exist.
        MeasurementError: There is none.
    """
    folder = given
    hint = "Make one: gate check SPEC"
    if folder is None:
        try:
            folder = RUNS / (RUNS / LATEST).read_text(encoding="utf-8").strip()
        except OSError:
            raise MeasurementError(f"there is no run in {RUNS}", hint=hint) from None
    if not folder.exists():
        raise SpecError("there is no such report or folder of one", where=str(folder), hint=hint)
    if not folder.is_dir():
        return (folder,)
    found = tuple(sorted({*folder.glob("report.json"), *folder.glob("*/report.json")}))
    if not found:
        raise MeasurementError("holds no report.json", where=str(folder), hint=hint)
    return found


def _baseline_paths(what: str | None, root: Path) -> tuple[Path, ...]:
    if what is not None and Path(what).is_file():
        return (Path(what),)
    folder = root if what is None else root / what
    found = tuple(sorted(folder.rglob("*.json")))
    if not found:
        cases = ", ".join(sorted(each.name for each in root.glob("*") if each.is_dir()))
        hint = (
            f"There are baselines of {cases}." if cases else 'Accept one from a run: gate baseline accept --reason "…"'
        )
        raise BaselineError(f"there is no baseline in {folder}", hint=hint)
    return found


def _shown(path: Path, baseline: Baseline) -> Iterator[str]:
    from gate.wording import number

    subject = baseline.subject
    yield str(path)
    yield (
        f"  {subject.case} / {subject.engine}  {subject.backend} {baseline.backend_version} {subject.precision} "
        f"on {subject.device}, {subject.samples} samples"
    )
    yield f"  accepted by {baseline.accepted.who} on {baseline.accepted.when}: {baseline.accepted.why}"
    for output in baseline.outputs:
        yield (
            f"  output {output.output}: rel_rmse {number(output.rel_rmse)}, max |d| {number(output.max_abs)}, "
            f"{output.elements} elements"
        )
    if baseline.task is not None:
        yield f"  top-1 {100 * baseline.task.top1 / baseline.task.samples:.2f} % of {baseline.task.samples}"
    if baseline.scores is not None:
        from gate.metrics.kinds import kind_named

        first = next(iter(kind_named(baseline.scores.kind).values))
        value = baseline.scores.values.get(first)
        scored = "is not defined" if value is None else number(value)
        yield f"  {baseline.scores.kind}: {first} {scored}, {baseline.scores.samples} scored"
    if baseline.latency:
        latest = baseline.latency[-1]
        yield (
            f"  latency p50 {number(latest.p50_ms)} ms, p95 {number(latest.p95_ms)} ms, p99 {number(latest.p99_ms)} ms "
            f"(batch {latest.batch}, n = {latest.n}, {latest.timed}, {latest.device}, {latest.created})"
        )


def _print_changes(title: str, changes: tuple[Change, ...]) -> None:
    print(title)
    if not changes:
        print("  no difference")
    for change in changes:
        old, new = _value(change.old), _value(change.new)
        delta = "" if change.change is None else f"  ({change.change:+.3g})"
        print(f"  {change.metric}: {old} -> {new}{delta}")


def _value(value: float | str | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if len(value) < 64 else f"{value[:12]}…"
    return f"{value:.6g}"
