"""`gate ledger verify | show | sign`: whether it is what was signed, what was in a slot when, and a new key for its head."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gate.cli import COMMANDS
from gate.cli.key import add_key_options, signer_of
from gate.errors import ExitCode, SpecError

if TYPE_CHECKING:
    from gate.ledger import Ledger
    from gate.release.history import Occupation
    from gate.trust import PolicyFile

HEADINGS = ("from", "until", "model", "slot", "stage", "engine", "serial", "verdict", "how")


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its own three."""
    parser = subparsers.add_parser(
        "ledger",
        help=COMMANDS["ledger"],
        description="Verify and show the ledger of promotions, or sign its head with another key.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "verify", help="verify every line: signatures, chain, order, and that none is missing", allow_abbrev=False
    )
    check.add_argument(
        "--expect",
        metavar="SHA256",
        help="a line that must be in it, as gate promote printed it: kept elsewhere, it shows a ledger that was put back "
        "to an older state",
    )
    check.set_defaults(run=_run_verify)
    table = commands.add_parser("show", help="what was in each slot when", allow_abbrev=False)
    table.add_argument("--slot", help="only this one")
    table.set_defaults(run=_run_show)
    over = commands.add_parser(
        "sign",
        help="sign its head anew, once the key that did is revoked or about to run out",
        description="Verify the ledger but for whether the key of its head was revoked, show what is signed, and sign it "
        "with a promoter's key that counts now.",
        allow_abbrev=False,
    )
    over.add_argument("--expect", metavar="SHA256", help="a line that must be in it; else nothing is signed")
    add_key_options(over)
    over.set_defaults(run=_run_sign)
    for each in (check, table, over):
        each.add_argument("--policy", type=Path, required=True, metavar="TRUST.TOML", help="the trust policy")
        each.add_argument("--json", action="store_true", help="print it as JSON")


def _run_verify(args: argparse.Namespace) -> ExitCode:
    """Verify all of it.

    Raises:
        LedgerError: It is not what was signed, or lacks the line that is expected.
        SpecError: `--expect` is no SHA-256, or the policy names no ledger.
    """
    from gate.ledger import require_digest

    expected = None if args.expect is None else require_digest(args.expect)
    ledger = _read(args.policy)
    witness = None if expected is None else ledger.require_line(expected)
    if args.json:
        found = {
            "ledger": str(ledger.path),
            "verified": True,
            "entries": len(ledger.lines),
            "sha256": ledger.lines[-1] if ledger.lines else None,
            "expected_entry": witness,
            "warnings": list(ledger.notes),
        }
        print(json.dumps(found, ensure_ascii=False))
        return ExitCode.PASSED
    count = len(ledger.lines)
    print(f"VERIFIED  {ledger.path}: {count} {'entry' if count == 1 else 'entries'}")
    if count:
        print(f"   {'witness':<9} entry {count - 1}, sha256 {ledger.head}")
    if witness is not None:
        print(f"   {'expected':<9} is entry {witness}")
    for note in ledger.notes:
        print(f"   {'note':<9} {note}")
    return ExitCode.PASSED


def _run_show(args: argparse.Namespace) -> ExitCode:
    """Print the table.

    Raises:
        LedgerError: It is not what was signed.
        SpecError: The policy names no ledger, or neither it nor the ledger has such a slot.
    """
    ledger = _read(args.policy)
    rows = ledger.history.occupations(args.slot)
    if not rows and args.slot is not None:
        _require_slot(args.policy, args.slot)
    if args.json:
        found = {
            "ledger": str(ledger.path),
            "occupations": [{**asdict(each), "by": ledger.signers[each.index]} for each in rows],
            "entries": [
                {**msgspec.to_builtins(entry), "key": key, "sha256": digest}
                for entry, key, digest in zip(ledger.history.entries, ledger.signers, ledger.lines, strict=True)
                if args.slot in (None, entry.slot) or not entry.slot
            ],
            "warnings": list(ledger.notes),
        }
        print(json.dumps(found, ensure_ascii=False))
        return ExitCode.PASSED
    if not rows:
        print(f"nothing was promoted{'' if args.slot is None else f' to {args.slot}'}: {ledger.path}")
    else:
        print("\n".join(table_lines(HEADINGS, [_cells(each, ledger) for each in rows])))
    for note in ledger.notes:
        print(f"note: {note}")
    return ExitCode.PASSED


def _run_sign(args: argparse.Namespace) -> ExitCode:
    """Show what is signed, and sign it.

    Raises:
        LedgerError: It is not what was signed, or lacks the line that is expected.
        PromotionRefused: There is no ledger yet, or the key may not sign it.
        SpecError: `--expect` is no SHA-256, or the policy names no ledger.
        SigningError: The key cannot be used.
    """
    from gate.ledger import require_digest, sign_head

    expected = None if args.expect is None else require_digest(args.expect)
    policy, path = _policy_and_path(args.policy)

    def show(ledger: Ledger) -> None:
        if expected is not None:
            ledger.require_line(expected)
        if not args.json:
            print("\n".join(_signed_lines(ledger)), flush=True)

    done = sign_head(path, policy, signer_of(args), show=show)
    if args.json:
        found = {
            "ledger": str(done.path),
            "signed": True,
            "key": done.head_signer,
            "entries": len(done.lines),
            "sha256": done.lines[-1] if done.lines else None,
            "last": msgspec.to_builtins(done.history.entries[-1]) if done.lines else None,
            "warnings": list(done.notes),
        }
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"SIGNED  {done.path} by {done.head_signer}")
    return ExitCode.PASSED


def _signed_lines(ledger: Ledger) -> list[str]:
    """What a head says, for whoever signs it."""
    count = len(ledger.lines)
    rows = [("entries", f"{count}; the head is signed by {ledger.head_signer}")]
    if count:
        last = ledger.history.entries[-1]
        place = (
            f" {last.stage} of {last.model} / {last.slot}" if last.slot else f" of {last.model or 'a model not known'}"
        )
        said = f"{last.time}, {last.action} serial {last.serial}{place}, by {ledger.signers[-1]}: {last.reason or 'no reason'}"
        rows += [("last", said), ("verdict", f"sha256 {last.verdict}")]
        rows.append(("witness", f"entry {count - 1}, sha256 {ledger.head}; compare it with the one that you kept"))
    rows += [("note", each) for each in ledger.notes]
    return [str(ledger.path), *(f"   {name:<9} {_plain(text)}" for name, text in rows)]


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, each as wide as its widest cell."""
    cells = [tuple(headings), *(tuple(map(_plain, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cells(row: Occupation, ledger: Ledger) -> tuple[str, ...]:
    how = f"{row.how} by {ledger.signers[row.index]}"
    if row.revoked is not None:
        how += f", REVOKED {row.revoked}"
    elif row.ended == "rollback":
        how += ", rolled back"
    until = row.until or "now"
    return (
        row.start,
        until,
        row.model,
        row.slot,
        row.stage,
        row.engine,
        str(row.serial),
        row.verdict[:12],
        how,
    )


def _plain(text: str) -> str:
    """Text without characters that would move the cursor."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _require_slot(path: Path, slot: str) -> None:
    from gate.trust import read_policy

    slots = read_policy(path).policy.slot
    if slot not in slots:
        raise SpecError(f"there is no slot {slot!r:.60}; it has {', '.join(slots)}", where=str(path))


def _read(path: Path) -> Ledger:
    from gate.ledger import read_ledger

    policy, found = _policy_and_path(path)
    return read_ledger(found, policy)


def _policy_and_path(path: Path) -> tuple[PolicyFile, Path]:
    """The policy and the ledger's file.

    Raises:
        SpecError: The policy names no ledger.
    """
    from gate.trust import ledger_path, read_policy

    policy = read_policy(path)
    found = ledger_path(policy)
    if found is None:
        raise SpecError("names no ledger", where=str(path), hint='add ledger = "ledger.jsonl" above its first table')
    return policy, found
