"""`gate approve BUNDLE`: sign that one agrees with a verdict."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.cli.key import add_key_options, signer_of
from gate.cli.verify import add_policy_options
from gate.errors import ExitCode


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "approve",
        help=COMMANDS["approve"],
        description="Sign an approval of a bundle's verdict for a slot. All but the approvals is verified first.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder made by gate seal")
    add_policy_options(parser, required=True)
    parser.add_argument("--role", help="as which, where the key has several roles that the slot asks for")
    parser.add_argument("--comment", default="", metavar="TEXT", help="why; it is signed too")
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Verify, sign, and say what was approved.

    Raises:
        VerificationError: The bundle would be refused.
        PromotionRefused: The key may not approve, or did already.
        SigningError: The key cannot be used.
    """
    from gate.cli.check import pasted
    from gate.promotion import approve
    from gate.trust import read_policy

    policy = read_policy(args.policy)
    done = approve(
        args.bundle,
        policy=policy,
        model=args.model,
        slot=args.slot,
        role=args.role,
        comment=args.comment,
        signer=signer_of(args),
    )
    if args.json:
        found = {
            "bundle": str(args.bundle),
            "approval": str(done.path),
            "key": done.key,
            "role": done.role,
            "slot": done.slot,
            "verdict": done.verdict_sha256,
            "serial": done.serial,
            "warnings": list(done.notes),
        }
        print(json.dumps(found, ensure_ascii=False))
        return ExitCode.PASSED
    notes = "".join(f"   note      {each}\n" for each in done.notes)
    print(
        f"APPROVED  {args.model} for {args.slot}: serial {done.serial}, {done.engine}, by {done.key} as {done.role}\n"
        f"   verdict   sha256 {done.verdict_sha256}\n"
        f"   written   {done.path}\n{notes}"
        f"   next      gate verify {pasted(args.bundle)} --policy {pasted(args.policy)} --model {args.model} "
        f"--slot {args.slot}"
    )
    return ExitCode.PASSED
