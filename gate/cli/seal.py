"""`gate seal SPEC --out DIR`: check, then seal what passed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.cli.check import add_check_options, check_all
from gate.errors import ExitCode


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "seal",
        help=COMMANDS["seal"],
        description="Check each spec and seal the engines that passed, each into DIR/<model>/<engine>.",
        allow_abbrev=False,
    )
    add_check_options(parser)
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="where the bundles go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Check and seal. A run that passed and of which nothing could be sealed is refused.

    Raises:
        SpecError: A spec is wrong; then none is checked.
    """
    outcome = check_all(args, seal_to=args.out)
    if outcome.code is ExitCode.PASSED and not outcome.sealed:
        print("REFUSED  nothing was sealed: [policy] seal_evidence asks for more than was measured", file=sys.stderr)
        return ExitCode.REFUSED
    return outcome.code
