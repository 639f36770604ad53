"""`gate promote BUNDLE`: verify a bundle for a stage of a slot, and write into the ledger that it is there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gate.cli import COMMANDS
from gate.cli.key import add_key_options, signer_of
from gate.cli.verify import add_policy_options
from gate.errors import ExitCode

if TYPE_CHECKING:
    from gate.promotion import Recorded
    from gate.release.policy import StagePolicy


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "promote",
        help=COMMANDS["promote"],
        description="Verify a bundle for the next stage of a slot, and write into the ledger that it is there.",
        allow_abbrev=False,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder made by gate seal")
    add_policy_options(parser, required=True)
    parser.add_argument("--stage", help="the stage that it is to enter (left out: its next one)")
    parser.add_argument("--requests", type=count, metavar="N", help="how many it served in the stage that it leaves")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why; it is signed too")
    add_key_options(parser)
    parser.add_argument("--json", action="store_true", help="print the entry as JSON")
    parser.set_defaults(run=run)


def count(text: str) -> int:
    """A number of requests.

    Raises:
        argparse.ArgumentTypeError: It is not a whole number from 0 on.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of requests")
    return int(text)


def run(args: argparse.Namespace) -> ExitCode:
    """Verify, decide, append, and say what comes next.

    Raises:
        VerificationError: The bundle is refused.
        PromotionRefused: The policy does not allow it, or somebody else was first.
        LedgerError: The ledger is not what was signed.
        SigningError: The key cannot be used.
    """
    from gate.cli.check import pasted
    from gate.promotion import promote
    from gate.trust import read_policy

    policy = read_policy(args.policy)
    done = promote(
        args.bundle,
        policy=policy,
        model=args.model,
        slot=args.slot,
        stage=args.stage,
        requests=args.requests,
        reason=args.reason,
        signer=signer_of(args),
    )
    entry = done.entry
    stages = {each.name: each for each in policy.policy.slot[args.slot].stage}
    if done.following is None:
        following = f"gate ledger show --policy {pasted(args.policy)} --slot {args.slot}"
    else:
        following = (
            f"{done.following.name}{_after(stages[entry.stage])}: gate promote {pasted(args.bundle)} --policy "
            f"{pasted(args.policy)} --model {args.model} --slot {args.slot}"
        )
    title = f"PROMOTED  {entry.model} to {entry.slot}, {entry.stage}: serial {entry.serial}, {entry.engine}"
    print(told(done, title, following, as_json=args.json))
    return ExitCode.PASSED


def told(done: Recorded, title: str, following: str, *, as_json: bool, more: Sequence[tuple[str, str]] = ()) -> str:
    """What was written into the ledger: as JSON, or as a title with the lines below it.

    Args:
        done: The entry.
        title: Says what happened.
        following: What comes next.
        as_json: For scripts.
        more: Lines of the action's own: a name and a text.
    """
    if as_json:
        found: dict[str, Any] = {
            "entry": msgspec.to_builtins(done.entry),
            "sha256": done.sha256,
            "key": done.key,
            "ledger": str(done.path),
            "next_stage": None if done.following is None else done.following.name,
            "warnings": list(done.notes),
        }
        if done.entry.action == "revoke":
            found["slots"] = done.slots
        return json.dumps(found, ensure_ascii=False)
    rows = [
        ("verdict", f"sha256 {done.entry.verdict}"),
        *more,
        ("ledger", f"{done.path}, by {done.key}"),
        ("witness", f"entry {done.entry.index}, sha256 {done.sha256}"),
        *(("note", each) for each in done.notes),
        ("next", following),
    ]
    return "\n".join([title, *(f"   {name:<9} {text}" for name, text in rows)])


def _after(stage: StagePolicy) -> str:
    """What has to be waited for in a stage."""
    waits = []
    if stage.min_hours is not None:
        waits.append(f"{stage.min_hours:g} h")
    if stage.min_requests is not None:
        waits.append(f"{stage.min_requests} requests (--requests N)")
    return f" after {' and '.join(waits)}" if waits else ""
