"""`gate latency A [--against B]`: an engine timed in fresh processes, in turn with another, until it is decided."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.cli.check import seconds_from
from gate.errors import ExitCode, SpecError

if TYPE_CHECKING:
    from gate.latency.config import LatencySpec
    from gate.results import LatencyMetrics
    from gate.verdict import Failure, Finding

_BUDGETS = ("p50", "p90", "p95", "p99", "p99.9")


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "latency",
        help=COMMANDS["latency"],
        description=(
            "Time an engine in fresh processes, alone against budgets, or in turn with another until it is decided "
            "whether it is slower. A is an engine of a spec (gate.toml::NAME), a sealed bundle, or files that trtexec "
            "wrote with --exportTimes."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("subject", metavar="A", help="gate.toml::ENGINE, a bundle, or a file of trtexec --exportTimes")
    parser.add_argument("more", nargs="*", metavar="TIMES", help="more files of trtexec, each of another process")
    parser.add_argument(
        "--against", metavar="B", help="reference, baseline, another engine of the spec, gate.toml::ENGINE or a bundle"
    )
    for name in _BUDGETS:
        parser.add_argument(
            f"--{name}", type=float, metavar="MS", dest=_field(name), help=f"budget of the {name}, in milliseconds"
        )
    parser.add_argument("--throughput", type=float, metavar="N", help="least samples per second")
    parser.add_argument(
        "--tolerance",
        metavar="P50[,P95]",
        help="how much slower than B it may be, in percent (3,5)",
    )
    parser.add_argument("--speedup", type=float, metavar="X", help="how many times faster than B it must be, at p50")
    parser.add_argument("--batch", type=_sizes, metavar="N[,N]", help="batch sizes (1)")
    parser.add_argument(
        "--timed", choices=("host_wall", "gpu_compute", "latency"), help="what the numbers are of (host_wall)"
    )
    parser.add_argument("--streams", type=int, metavar="N", help="inferences at the same time (1)")
    parser.add_argument("--max-time", type=seconds_from, metavar="S", help="measure no longer than S seconds (120)")
    parser.add_argument("--cache", type=Path, default=Path(".gate/cache"), metavar="DIR", help="(.gate/cache)")
    parser.add_argument(
        "--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="accepted baselines (baselines)"
    )
    parser.add_argument(
        "--bundles", type=Path, default=Path("bundles"), metavar="DIR", help="bundles of accepted engines (bundles)"
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a reference made by gate record")
    parser.add_argument("--json", action="store_true", help="print the numbers and findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Measure, show each finding, and exit by the worst of them.

    Raises:
        SpecError: The options contradict each other, or A or B is nothing that can be timed.
    """
    from gate.report.screen import show
    from gate.report.terminal import progress
    from gate.steps.context import CheckOptions
    from gate.steps.time_alone import compare_latency, exported_latency

    spec = _asked(args)
    paths = [Path(args.subject), *map(Path, args.more)]
    exported = [path for path in paths if path.is_file() and path.suffix != ".toml"]
    if exported and (missing := [path for path in paths if not path.exists() and "::" not in str(path)]):
        raise SpecError("there is no such file", where=str(missing[0]))
    if all(path.is_file() and path.suffix != ".toml" for path in paths):
        if args.against is not None:
            raise SpecError(
                "files of trtexec cannot be timed in turn with an engine", hint="Give budgets, such as --p99 2.0."
            )
        found = exported_latency(paths, spec)
    else:
        if args.more:
            raise SpecError(f"there is one A, got {args.more[0]!r} beside it", hint="Name the other with --against.")
        options = CheckOptions(
            cache=args.cache,
            baselines=args.baselines,
            reference=args.reference,
            bundles=args.bundles,
            max_time_s=args.max_time,
        )
        with progress() as observer:
            found = compare_latency(args.subject, args.against, spec, options, observer)
    if args.json:
        print(json.dumps(_as_json(found.latencies, found.findings), ensure_ascii=False))
    else:
        show("".join(f"{line}\n" for line in _lines(found.latencies, found.findings)), sys.stdout)
    return _code(found.findings)


def _asked(args: argparse.Namespace) -> LatencySpec:
    """The options as a table of latency.

    Raises:
        SpecError: A value is out of its range, or nothing is asked for.
    """
    import msgspec

    from gate.latency.config import LatencySpec

    for name in (*_BUDGETS, "throughput", "speedup"):
        if (value := getattr(args, _field(name))) is not None and not math.isfinite(value):
            raise SpecError(f"--{name} is a finite number, got {value}")
    given: dict[str, Any] = {f"{_field(name)}_ms": getattr(args, _field(name)) for name in _BUDGETS}
    given |= {
        "throughput_at_least": args.throughput,
        "batch": args.batch,
        "timed": args.timed,
        "streams": args.streams,
        "max_time_s": args.max_time,
    }
    if args.against is not None:
        if args.speedup is not None:
            given["speedup"] = {"at_least": args.speedup, "against": "b"}
        if args.speedup is None or args.tolerance is not None:
            given["regression"] = {"against": "b", **_tolerances(args.tolerance)}
    elif args.tolerance is not None or args.speedup is not None:
        raise SpecError("--tolerance and --speedup compare two engines", hint="Name the other with --against.")
    try:
        spec = msgspec.convert({key: value for key, value in given.items() if value is not None}, LatencySpec)
    except msgspec.ValidationError as err:
        raise SpecError(f"an option is out of its range: {err}") from err
    return spec


def _tolerances(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    parts = [each.strip() for each in text.split(",")]
    if len(parts) > 2 or not all(parts):
        raise SpecError(f"--tolerance is one or two percentages, such as 3,5; got {text!r}")
    return dict(zip(("p50", "p95"), (each if "%" in each else f"{each} %" for each in parts), strict=False))


def _sizes(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs whole numbers, got {text!r}") from None


def _field(name: str) -> str:
    return name.replace(".", "_")


def _lines(latencies: tuple[LatencyMetrics, ...], findings: tuple[Finding | Failure, ...]) -> list[str]:
    from gate.report.timings import comparison_line, latency_line
    from gate.verdict import Finding
    from gate.wording import advice, failure_lines, finding_sentence

    lines = []
    for latency in latencies:
        lines.append(latency_line(latency))
        lines += [f"  {comparison_line(each)}" for each in latency.comparisons]
        lines += [f"  {each}" for each in latency.notes]
    for finding in findings:
        lines.append(f"{finding.status.value:<12}  {finding_sentence(finding)}")
        if not isinstance(finding, Finding) or finding.detail:
            lines += [f"{'':<12}  {line}" for line in failure_lines(finding)]
        lines += [f"{'':<12}  {line}" for line in advice(finding).splitlines()]
    if not findings:
        lines.append("nothing was asked for, so nothing was judged: give a budget (--p99 MS) or --against B")
    return lines


def _as_json(latencies: tuple[LatencyMetrics, ...], findings: tuple[Finding | Failure, ...]) -> dict[str, Any]:
    from gate.results import builtins_from
    from gate.verdict import status_of

    status = status_of([each.status for each in findings]).value if findings else None
    return {"status": status, "latencies": [_with_raw(each) for each in latencies], "findings": builtins_from(findings)}


def _with_raw(latency: LatencyMetrics) -> dict[str, Any]:
    from gate.results import builtins_from

    found: dict[str, Any] = builtins_from(latency)
    found["durations_ns"] = list(latency.durations_ns)
    for shown, each in zip(found["comparisons"], latency.comparisons, strict=True):
        shown["pairs"] = [{"a_ns": list(pair.a_ns), "b_ns": list(pair.b_ns)} for pair in each.pairs]
    return found


def _code(findings: tuple[Finding | Failure, ...]) -> ExitCode:
    """The worst finding's; measuring alone, without anything to judge, is no failure."""
    from gate.verdict import Status

    statuses = {each.status for each in findings}
    if Status.FAILED in statuses:
        return ExitCode.FAILED
    return ExitCode.INCONCLUSIVE if Status.INCONCLUSIVE in statuses else ExitCode.PASSED
