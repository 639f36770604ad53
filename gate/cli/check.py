"""`gate check SPEC...`: run each spec, print and write the reports, seal what passed."""

from __future__ import annotations

import argparse
import datetime as dt
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.errors import ExitCode, GateError, SpecError

if TYPE_CHECKING:
    from gate.pipeline import CheckOptions, Sealed
    from gate.report.pictures import Pictures
    from gate.results import CheckRun
    from gate.spec import SpecFile
    from gate.store import Release

RUNS = Path(".gate/runs")
LATEST = "latest"
ANOTHER = "name another folder"

_SEVERITY = (
    ExitCode.PASSED,
    ExitCode.INCONCLUSIVE,
    ExitCode.FAILED,
    ExitCode.USAGE,
    ExitCode.REFUSED,
    ExitCode.INTERNAL,
)


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "check",
        help=COMMANDS["check"],
        description="Build the engines of each spec, compare them with the reference, and give a verdict.",
        allow_abbrev=False,
    )
    add_check_options(parser)
    parser.add_argument("--seal", type=Path, metavar="DIR", help="seal what passed into DIR/<model>/<engine>")
    parser.set_defaults(run=run)


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add what `check` and `seal` share."""
    parser.add_argument("specs", nargs="+", type=Path, metavar="SPEC", help="a gate.toml")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME", help="only this engine; may be repeated"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help=f"write report.json, report.md and its pictures here, not into {RUNS}/<time>",
    )
    parser.add_argument(
        "--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="accepted baselines (baselines)"
    )
    parser.add_argument(
        "--bundles",
        type=Path,
        default=Path("bundles"),
        metavar="DIR",
        help="sealed bundles of accepted engines, <model>/<engine>, to time new ones against (bundles)",
    )
    parser.add_argument(
        "--max-time", type=seconds_from, metavar="S", help="measure each latency no longer than S seconds"
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache", type=Path, default=Path(".gate/cache"), metavar="DIR", help="reuse what is unchanged (.gate/cache)"
    )
    cache.add_argument("--no-cache", action="store_true", help="make everything anew")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a reference made by gate record")
    parser.add_argument("--verbose", action="store_true", help="list every finding with its limit and its source")
    parser.add_argument("--json", action="store_true", help="print report.json, one line a spec, instead of the screen")


def seconds_from(text: str) -> float:
    """A time above 0 in seconds, as an option's value.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"needs seconds above 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> ExitCode:
    """Check each spec; the worst exit code is the command's.

    Raises:
        SpecError: A spec is wrong; then none is checked.
    """
    return check_all(args, seal_to=args.seal).code


@dataclass(frozen=True)
class Outcome:
    """What `check_all` came to.

    Args:
        code: The worst of all specs.
        sealed: Names of the engines that were sealed.
    """

    code: ExitCode
    sealed: tuple[str, ...]


def check_all(args: argparse.Namespace, *, seal_to: Path | None, release: Release | None = None) -> Outcome:
    """Check each spec, report, and seal what passed where `seal_to` is given.

    Raises:
        SpecError: A spec is wrong; then none is checked.
    """
    from gate.pipeline import CheckOptions

    files = [_read(path, engines=args.engine) for path in args.specs]
    require_folder(args.report, "--report")
    require_folder(seal_to, "the folder for bundles")
    reports = Reports(args.report, files)
    codes: list[ExitCode] = []
    sealed: list[str] = []
    # Without a cache the engines still need a place until they are sealed.
    with TemporaryDirectory(prefix="gate-") if args.no_cache else nullcontext(args.cache) as cache:
        options = CheckOptions(
            engines=tuple(args.engine),
            cache=Path(cache),
            baselines=args.baselines,
            reference=args.reference,
            bundles=args.bundles,
            max_time_s=args.max_time,
        )
        for index, file in enumerate(files):
            if index and not args.json:
                print()
            try:
                code, names = _check_one(file, options, args, reports=reports, seal_to=seal_to, release=release)
                sealed += names
            except GateError as err:
                _tell_github_error(file.path, err)
                if len(files) == 1:
                    raise
                print(f"{file.path}: {err}" if str(file.path) not in str(err) else str(err), file=sys.stderr)
                code = err.exit_code
            codes.append(code)
    if len(files) > 1 and not args.json:
        print(f"\n{_specs_line(codes)}")
    return Outcome(worst(codes), tuple(sealed))


def _read(path: Path, *, engines: Sequence[str]) -> SpecFile:
    """A spec that has those engines; what is wrong with it is annotated.

    Raises:
        SpecError: It is wrong, or has no such engine.
    """
    from gate.spec import read_spec

    try:
        file = read_spec(path)
        for name in engines:
            file.engine(name)
    except GateError as err:
        _tell_github_error(path, err)
        raise
    return file


def _specs_line(codes: Sequence[ExitCode]) -> str:
    """`3 specs: 1 failed, 2 passed          exit 1 (failed)`."""
    counts = ((code, codes.count(code)) for code in reversed(_SEVERITY))
    found = ", ".join(
        f"{count} {'error in use or spec' if code is ExitCode.USAGE else code.name.lower()}"
        for code, count in counts
        if count
    )
    code = worst(codes)
    return f"{len(codes)} specs: {found}          exit {int(code)} ({code.name.lower()})"


def require_folder(path: Path | None, what: str) -> None:
    """Refuse a place for results that is taken, before anything is computed.

    Raises:
        SpecError: It, or what should hold it, is a file.
    """
    if path is None:
        return
    for each in (path, *path.parents):
        if each.is_symlink() or each.exists():
            if not each.is_dir():
                raise SpecError("is not a folder", where=f"{what} {each}", hint=ANOTHER)
            return


def worst(codes: Sequence[ExitCode]) -> ExitCode:
    """The most severe of several exit codes; of none, INTERNAL: nothing checked is not a pass."""
    return max(codes, key=_SEVERITY.index, default=ExitCode.INTERNAL)


def _check_one(
    file: SpecFile,
    options: CheckOptions,
    args: argparse.Namespace,
    *,
    reports: Reports,
    seal_to: Path | None,
    release: Release | None,
) -> tuple[ExitCode, list[str]]:
    from gate import pipeline
    from gate.report.json_report import json_bytes
    from gate.report.pictures import Pictures
    from gate.report.screen import show, terminal_width
    from gate.report.terminal import exit_code_of, progress, render

    pictures = Pictures()
    with progress() as observer:
        checked = pipeline.check(file, replace(options, answered=pictures.take), observer)
    path: Path | None = None
    try:
        path = reports.write(checked, pictures)
    finally:
        # The verdict is shown even where its report cannot be written.
        if args.json:
            sys.stdout.write(json_bytes(checked, pretty=False).decode())
        else:
            width = terminal_width(sys.stdout)
            written = None if path is None else str(path)
            screen = render(checked, report=written, verbose=args.verbose, width=width, exit_line=path is not None)
            show(screen, sys.stdout)
        sys.stdout.flush()
    _tell_github(checked)
    names: list[str] = []
    if seal_to is not None:
        sealed = pipeline.seal_passed(file, checked, seal_to, baselines=options.baselines, release=release)
        names = [each.engine for each in sealed if each.path is not None]
        stream = sys.stderr if args.json else sys.stdout
        for each in sealed:
            print(_sealed_line(each), file=stream)
    return exit_code_of(checked.status), names


def _sealed_line(sealed: Sealed) -> str:
    if sealed.path is None:
        return f"not sealed  {sealed.engine}  {sealed.reason}"
    return f"sealed      {sealed.engine}  {sealed.path}   verify it: gate verify {pasted(sealed.path)}"


def pasted(path: Path) -> str:
    """A path as it stands in a command that can be pasted."""
    import shlex

    return shlex.quote(str(path))


def _tell_github(checked: CheckRun) -> None:
    """In GitHub Actions: annotations in the log, and the report in the job's summary."""
    from gate.report.markdown import github_annotations, markdown

    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(checked):
            print(line, file=sys.stderr)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write(markdown(checked) + "\n")
        except OSError as err:
            print(f"GITHUB_STEP_SUMMARY {summary} cannot be written: {err.strerror}", file=sys.stderr)


def _tell_github_error(spec: Path, err: GateError) -> None:
    """In GitHub Actions: what kept a spec from a verdict, beside the line that is at fault."""
    from gate.report.markdown import github_error

    if os.environ.get("GITHUB_ACTIONS") == "true":
        print(github_error(err, spec=str(spec)), file=sys.stderr)


class Reports:
    """Where the reports of one command go: the folder that was asked for, or `.gate/runs/<time>`.

    With several specs each has a folder of its own below it, named for its model. `latest` beside the runs is a text
    file with the name of the newest.
    """

    def __init__(self, asked: Path | None, files: Sequence[SpecFile]) -> None:
        self._root = asked if asked is not None else _new_run()
        self._is_run = asked is None
        self._single = len(files) == 1
        self._taken: set[str] = set()

    def write(self, checked: CheckRun, pictures: Pictures) -> Path:
        """Write both reports, each whole or not at all, and their pictures; returns the path of report.md.

        Raises:
            GateError: The disk is full or may not be written to.
        """
        from gate.atomic import write_bytes
        from gate.report.json_report import write_report
        from gate.report.markdown import markdown

        folder = self._root if self._single else self._root / self._name(checked.model_id)
        path = folder / "report.md"
        write_report(checked, folder / "report.json")
        write_bytes(path, markdown(checked, pictures.write(checked, folder)).encode())
        if self._is_run:
            write_bytes(self._root.parent / LATEST, f"{self._root.name}\n".encode())
        return path

    def _name(self, model_id: str) -> str:
        name, count = model_id, 1
        while name in self._taken:
            count += 1
            name = f"{model_id}-{count}"
        self._taken.add(name)
        return name


def _new_run() -> Path:
    """A name for this run that no other has: the UTC time to the second."""
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    path, count = RUNS / stamp, 1
    while path.exists():
        count += 1
        path = RUNS / f"{stamp}-{count}"
    return path
