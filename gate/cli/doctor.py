"""`gate doctor`: what is installed and usable here, each line with its fix."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.errors import ExitCode

if TYPE_CHECKING:
    from gate.doctor import Examination, Line

_EXIT = """exit code: 0 when everything that is needed is OK, 1 when something is not, 2 when the spec is wrong.
With --spec, needed is what its engines use that are not optional; without, at least one backend that works."""


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "doctor",
        help=COMMANDS["doctor"],
        description="Say what is installed and usable here: GPU, driver, CUDA, TensorRT, ONNX Runtime, PyTorch, and whether "
        "their versions match. Each framework is tried in a process of its own.",
        epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--spec", type=Path, metavar="SPEC", help="a gate.toml: judge what its engines need")
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="with --spec: the reference and the graphs come from gate record, so PyTorch and lowering are not needed",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Look, judge, and show; exit 1 where something needed is not usable.

    Raises:
        SpecError: The spec is wrong; then nothing is looked at.
    """
    from gate.doctor import examine, needs_of
    from gate.errors import SpecError

    if args.recorded and args.spec is None:
        raise SpecError("--recorded says what a spec does not need, so it takes --spec")
    needs = None
    if args.spec is not None:
        from gate.spec import read_spec

        needs = needs_of(read_spec(args.spec).spec, recorded=args.recorded)
    from gate.probe import PROBES, collect
    from gate.report.screen import show
    from gate.report.terminal import progress

    with progress() as observer:
        observer.stage("look", total=len(PROBES))
        facts = collect(lambda name: observer.advance())  # noqa: ARG005 - the bar counts
    found = examine(facts, needs, spec=None if args.spec is None else str(args.spec))
    if args.json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        show(render(found), sys.stdout)
    return ExitCode.PASSED if found.ok else ExitCode.FAILED


def render(found: Examination) -> str:
    """The screen: one line for each thing, its fix below it, and the verdict last."""
    names = max(len(line.name) for line in found.lines)
    versions = max(len(line.version or "-") for line in found.lines)
    lines = []
    for line in found.lines:
        lines.append(f"{line.status:<8}  {line.name:<{names}}  {line.version or '-':<{versions}}  {_detail(line)}")
        if line.fix is not None:
            lines.append(f"{'':<{8 + 2 + names + 2 + versions}}  fix: {line.fix}")
    code = ExitCode.PASSED if found.ok else ExitCode.FAILED
    last = f"{code.name}  {found.summary}          exit {int(code)} ({code.name.lower()})"
    return "\n".join(line.rstrip() for line in [*lines, "", last]) + "\n"


def _detail(line: Line) -> str:
    if not line.needed:
        return line.detail
    needed = f"needed by {', '.join(line.needed_by)}"
    return f"{line.detail}   {needed}" if line.detail else needed
