"""`gate verify BUNDLE`: the numbered steps of a verification."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.cli.check import pasted
from gate.errors import BundleError, ExitCode

if TYPE_CHECKING:
    from gate.store import Step


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "verify",
        help=COMMANDS["verify"],
        description="Verify a sealed bundle: its tree, schema, digests, and every status computed again.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder made by gate seal")
    parser.add_argument(
        "--require-evidence",
        choices=("preflight", "host", "device"),
        help="the least evidence that the verdict may rest on",
    )
    parser.add_argument("--json", action="store_true", help="print the steps as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Verify, and show each step as it is done; exit 4 where one is refused."""
    from gate.report.terminal import show
    from gate.store import verify
    from gate.verdict import Evidence

    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if not args.json:
            show(step_line(len(steps), step), sys.stdout)

    needed = None if args.require_evidence is None else Evidence(args.require_evidence)
    refused: BundleError | None = None
    try:
        warnings = verify(args.bundle, require_evidence=needed, on_step=on_step).metadata.warnings
    except BundleError as err:
        refused, warnings = err, ()
    if args.json:
        found = {
            "bundle": str(args.bundle),
            "verified": refused is None,
            "error": None if refused is None else {"type": type(refused).__name__, "message": str(refused)},
            "warnings": list(warnings),
            "steps": [{"name": step.name, "ok": step.ok, "detail": step.detail} for step in steps],
        }
        print(json.dumps(found, ensure_ascii=False))
    elif refused is None:
        notes = "".join(f"   {'note':<11} {warning}\n" for warning in warnings)
        show(f"{notes}VERIFIED  {args.bundle}\n", sys.stdout)
    if refused is None:
        return ExitCode.PASSED
    sys.stdout.flush()
    said = str(refused)
    print(f"REFUSED  {said if said.startswith(str(args.bundle)) else f'{args.bundle}: {said}'}", file=sys.stderr)
    if below := bundles_below(args.bundle):
        print(
            "\n".join(["it holds bundles; verify each:", *(f"  gate verify {pasted(path)}" for path in below)]),
            file=sys.stderr,
        )
    return ExitCode.REFUSED


def bundles_below(folder: Path) -> tuple[Path, ...]:
    """The bundles in a folder that is none itself, such as the one that `gate seal` was given."""
    from gate.store import MANIFEST_PATH

    if (folder / MANIFEST_PATH).exists():
        return ()
    found = {*folder.glob(f"*/{MANIFEST_PATH}"), *folder.glob(f"*/*/{MANIFEST_PATH}")}
    return tuple(sorted(path.parents[1] for path in found))


def step_line(index: int, step: Step) -> str:
    """` 5 digests     6 of 6     ok`."""
    return f"{index:2} {step.name:<11} {step.detail:<56} {'ok' if step.ok else 'refused'}\n"
