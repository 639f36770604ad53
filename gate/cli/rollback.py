"""`gate rollback`: take the candidate out, or go back to the last good bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.cli.key import add_key_options, signer_of
from gate.cli.promote import told
from gate.cli.verify import add_policy_options
from gate.errors import ExitCode


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "rollback",
        help=COMMANDS["rollback"],
        description="Take the candidate out of its stage; where there is none, go back to the last good bundle, which is "
        "verified again. Where it does not verify, nothing is done. A revoked one never comes back.",
        allow_abbrev=False,
    )
    add_policy_options(parser, required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="where the bundle to go back to lies now (left out: where it was promoted from)",
    )
    which.add_argument(
        "--older",
        action="store_true",
        help="pass over bundles that do not verify, to the newest before them that does",
    )
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why; it is signed too")
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="print the entry as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Find what to go back to, append, and say what is there now.

    Raises:
        PromotionRefused: There is nothing to go back to, the last good one does not verify, or somebody else was first.
        LedgerError: The ledger is not what was signed.
        SigningError: The key cannot be used.
    """
    from gate.cli.check import pasted
    from gate.promotion import rollback
    from gate.trust import read_policy

    policy = read_policy(args.policy)
    done = rollback(
        policy=policy,
        model=args.model,
        slot=args.slot,
        bundle=args.bundle,
        older=args.older,
        reason=args.reason,
        signer=signer_of(args),
    )
    entry = done.entry
    place = f"{entry.model} in {entry.slot}"
    what = f"serial {entry.serial}, {entry.engine}"
    if entry.full:
        title = f"ROLLED BACK  {place}: {what} has all of the traffic again, from {entry.bundle}"
        following = "deploy it; gate revoke BUNDLE --reason TEXT keeps what it replaced from coming back"
    else:
        title = f"ROLLED BACK  {place}: {what} is out of {entry.stage}"
        following = f"gate ledger show --policy {pasted(args.policy)} --slot {args.slot}"
    print(told(done, title, following, as_json=args.json))
    return ExitCode.PASSED
