"""`gate schema KIND`: print a JSON Schema."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gate.cli import COMMANDS
from gate.errors import ExitCode


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    from gate.schemas import KINDS

    parser = subparsers.add_parser(
        "schema",
        help=COMMANDS["schema"],
        description="Print the JSON Schema (2020-12) of a spec, report.json, a bundle's metadata.json or a baseline.",
        allow_abbrev=False,
    )
    parser.add_argument("kind", choices=KINDS, help="which file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Print it."""
    from gate.schemas import schema, schema_bytes

    sys.stdout.write(schema_bytes(schema(args.kind)).decode())
    return ExitCode.PASSED
