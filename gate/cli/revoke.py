"""`gate revoke BUNDLE|SHA256`: a verdict counts for nothing from now on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.cli.key import add_key_options, signer_of
from gate.cli.promote import told
from gate.errors import ExitCode

UNKNOWN = "not known"
"""Of a verdict that was revoked by a digest that the ledger does not have."""


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "revoke",
        help=COMMANDS["revoke"],
        description="Write into the ledger that a verdict counts for nothing from now on, in any slot, for good. Of a "
        "folder, the verdict has to be one by the gate over the files that are there.",
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="BUNDLE|SHA256", help="a bundle, or the SHA-256 of a verdict")
    parser.add_argument("--policy", type=Path, required=True, metavar="TRUST.TOML", help="the trust policy")
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why; it is signed too")
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="print the entry as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Append, and say where it still is.

    Raises:
        BundleError: It is no bundle, or its verdict is not one by the gate over its files.
        PromotionRefused: It is revoked already, or somebody else was first.
        LedgerError: The ledger is not what was signed.
        SigningError: The key cannot be used.
    """
    from gate.cli.check import pasted
    from gate.promotion import revoke
    from gate.trust import read_policy

    policy = read_policy(args.policy)
    done = revoke(args.what, policy=policy, reason=args.reason, signer=signer_of(args))
    entry = done.entry
    following = "it is in no slot; nothing is to be done"
    if not entry.engine:
        following = "gate ledger show; a verdict of that digest can come into no slot"
    if done.places:
        following = "it is still in a slot, take it out:" + "".join(
            f"\n             gate rollback --policy {pasted(args.policy)} --model {each.model} --slot {each.slot} "
            f"--reason TEXT   # {each.stage}"
            for each in done.places
        )
    serial = f"serial {entry.serial}, {entry.engine}" if entry.engine else f"serial and engine {UNKNOWN}"
    title = f"REVOKED  {entry.model or f'model {UNKNOWN}'}: {serial}"
    slots = UNKNOWN if done.slots is None else ", ".join(done.slots) or "none"
    more = (("slots", slots),)
    print(told(done, title, following, as_json=args.json, more=more))
    return ExitCode.PASSED
