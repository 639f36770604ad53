"""`gate explain [CHECK]`: what a check means, and what to do when it does not pass."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.errors import ExitCode, SpecError

_PACKAGED = Path(__file__).resolve().parents[1] / "findings.md"
_CHECKOUT = Path(__file__).resolve().parents[2] / "docs" / "findings.md"


def add_parser(subparsers: Any) -> None:
    """Add the sub-command and its options."""
    parser = subparsers.add_parser(
        "explain",
        help=COMMANDS["explain"],
        description="Print what a check means, and what to do when it does not pass; without one, the list of checks.",
        allow_abbrev=False,
    )
    parser.add_argument("check", nargs="?", metavar="CHECK", help="as in a report, such as parity.rel_rmse")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> ExitCode:
    """Print it.

    Raises:
        SpecError: There is no such check; names the nearest.
    """
    from gate.wording import anchor

    sections = explanations()
    if args.check is None:
        sys.stdout.write("".join(f"{name.replace('-', '.', 1)}\n" for name in sections))
        return ExitCode.PASSED
    name = anchor(args.check).partition("#")[2]
    if name not in sections:
        near = difflib.get_close_matches(name, sections, n=1)
        meant = f"; did you mean {near[0].replace('-', '.', 1)!r}?" if near else ""
        raise SpecError(f"there is no check {args.check!r}{meant}", hint="gate explain lists them")
    sys.stdout.write(f"{args.check}\n\n{sections[name]}\n")
    return ExitCode.PASSED


def explanations() -> dict[str, str]:
    """The text below each heading of the third level of docs/findings.md, by heading.

    A heading without text of its own shares that of the next.
    """
    path = _PACKAGED if _PACKAGED.is_file() else _CHECKOUT
    found: dict[str, str] = {}
    waiting: list[str] = []
    lines: list[str] = []

    def close() -> None:
        text = "\n".join(lines).strip()
        if text:
            found.update(dict.fromkeys(waiting, text))
            waiting.clear()
        lines.clear()

    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            close()
            if line.startswith("### "):
                waiting.append(line.removeprefix("### ").strip())
        elif waiting:
            lines.append(line)
    close()
    return found
