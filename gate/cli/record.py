"""`gate record SPEC -o DIR`: record the reference for a machine without PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.cli.check import ANOTHER, pasted, require_folder
from gate.errors import ExitCode, SpecError


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "record",
        help=COMMANDS["record"],
        description="Record the reference's outputs and its export into a folder, for gate check --reference DIR.",
        allow_abbrev=False,
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="a gate.toml")
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="where to write it")
    parser.add_argument(
        "--cache", type=Path, default=Path(".gate/cache"), metavar="DIR", help="reuse what is unchanged (.gate/cache)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Record.

    Raises:
        SpecError: What stands at `--out` is no recording, so it is not replaced.
        GateError: As `gate.pipeline.record`.
    """
    from gate import pipeline
    from gate.report.terminal import progress
    from gate.spec import read_spec

    file = read_spec(args.spec)
    require_folder(args.out, "--out")
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "recording.json").is_file():
        raise SpecError("holds other files, which a recording would replace", where=f"--out {args.out}", hint=ANOTHER)
    with progress() as observer:
        out = pipeline.record(file, args.out, pipeline.CheckOptions(cache=args.cache), observer)
    print(f"recorded {file.spec.model.id} in {out}; use it: gate check {pasted(args.spec)} --reference {pasted(out)}")
    return ExitCode.PASSED
