"""`gate seal SPEC --out DIR`: check, then seal what passed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate.cli import COMMANDS
from gate.cli.check import add_check_options, check_all
from gate.cli.key import add_key_options, signer_of
from gate.errors import ExitCode, SpecError

if TYPE_CHECKING:
    from gate.store import Release


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "seal",
        help=COMMANDS["seal"],
        description="Check each spec and seal the engines that passed, each into DIR/<model>/<engine>. With a key the "
        "verdict is signed, for the slots that are named; without one nobody can promote it.",
        allow_abbrev=False,
    )
    add_check_options(parser)
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="where the bundles go")
    signing = parser.add_argument_group("signing")
    add_key_options(signing)
    signing.add_argument(
        "--slot", action="append", default=[], metavar="SLOT", help="what it may be deployed as; may be repeated"
    )
    signing.add_argument(
        "--serial",
        type=int,
        metavar="N",
        help="higher than that of each bundle before, such as the number of the CI run (left out: the time of the check)",
    )
    signing.add_argument(
        "--valid-days", type=float, metavar="DAYS", help="how long the verdict holds (left out: 90 days)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Check and seal. A run that passed and of which nothing could be sealed is refused.

    Raises:
        SpecError: A spec is wrong, or the options; then none is checked.
        SigningError: The key cannot be used; then none is checked.
    """
    outcome = check_all(args, seal_to=args.out, release=_release(args))
    if outcome.code is ExitCode.PASSED and not outcome.sealed:
        print("REFUSED  nothing was sealed: [policy] seal_evidence asks for more than was measured", file=sys.stderr)
        return ExitCode.REFUSED
    return outcome.code


def _release(args: argparse.Namespace) -> Release:
    """What the verdicts are signed for.

    Raises:
        SpecError: The options do not go together.
        SigningError: The key cannot be used.
    """
    from gate.release.statements import is_name
    from gate.store import VALID_DAYS, Release

    if wrong := [slot for slot in args.slot if not is_name(slot)]:
        raise SpecError(f"--slot {wrong[0]!r}: takes letters, digits, '.', '_' and '-'")
    if args.serial is not None and not 0 <= args.serial < 2**53:
        raise SpecError(f"--serial {args.serial}: takes a number from 0 to 2^53 - 1")
    if args.valid_days is not None and not 0 < args.valid_days <= 36_500:
        raise SpecError(f"--valid-days {args.valid_days:g}: takes more than 0, at the most 36500")
    if args.key is None:
        for name, given in (("--slot", args.slot), ("--serial", args.serial), ("--valid-days", args.valid_days)):
            if given not in (None, []):
                raise SpecError(f"{name} is what a key signs for", hint="Give the key: --key KEY, or set GATE_KEY.")
        return Release()
    if not args.slot:
        raise SpecError(
            "--key needs --slot: a verdict is signed for something", hint="Such as --slot staging --slot production"
        )
    return Release(
        slots=tuple(args.slot),
        serial=args.serial,
        valid_days=VALID_DAYS if args.valid_days is None else args.valid_days,
        signer=signer_of(args),
    )
