"""`gate explain [CHECK]`: what a check means, and what to do when it does not pass."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gate.cli import COMMANDS
from gate.errors import ExitCode, SpecError

_PACKAGED = Path(__file__).resolve().parents[1] / "findings.md"
_CHECKOUT = Path(__file__).resolve().parents[2] / "docs" / "findings.md"

_OF_VALUES = {
    "task-value": "task.<value>",
    "task-drop": "task.<value>_drop",
    "task-rise": "task.<value>_rise",
    "task-ratio": "task.<value>_ratio",
    "task-gain": "task.tiled_<value>_gain",
    "baseline-drop": "baseline.<value>_drop",
    "baseline-rise": "baseline.<value>_rise",
}
"""Headings that are about any value of a task, and how they are listed."""

_FORMS = ("_drop", "_rise", "_ratio", "_gain")
_TILED = "tiled_"


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
        sys.stdout.write("".join(f"{_listed(name)}\n" for name in sections))
        return ExitCode.PASSED
    check = _check_of(args.check)
    listed = {_listed(name): name for name in sections}
    name = listed.get(check, anchor(check).partition("#")[2])
    about = ""
    if name in _OF_VALUES and check not in listed:
        lines = list(_about(check.partition(".")[2]))
        if not lines:
            raise _unknown(args.check, [*listed, *_known_checks(check.partition(".")[0])])
        about = "\n".join(lines) + "\n\n"
    if name not in sections:
        raise _unknown(args.check, list(listed))
    sys.stdout.write(f"{args.check}\n\n{about}{sections[name]}\n")
    return ExitCode.PASSED


def _listed(name: str) -> str:
    """How a heading is listed: as a report names the check."""
    return _OF_VALUES.get(name, name.replace("-", ".", 1))


def _check_of(given: str) -> str:
    """The check that a limit of the spec is for: `task.mean_ap_drop` of `task.mean_ap_drop_at_most`."""
    if given.endswith("_at_most_pp"):
        return given.removesuffix("_at_most_pp") + "_pp"
    return given.removesuffix("_at_least").removesuffix("_at_most")


def _unknown(check: str, known: list[str]) -> SpecError:
    near = difflib.get_close_matches(check, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return SpecError(
        f"there is no check {check!r}{meant}",
        hint="gate explain lists them; the values of a metric of one's own are known where its package is installed",
    )


def _about(measured: str) -> Iterator[str]:
    """What a value is, a line for each kind of task that has it; none where no kind has.

    Args:
        measured: The value's name, as it is or with the form of its check: `mean_ap_drop`.
    """
    measured = measured.removeprefix(_TILED)
    bare = next((measured.removesuffix(form) for form in _FORMS if measured.endswith(form)), measured)
    for kind in _kinds():
        value = measured if measured in kind.values else bare
        prefix = next((each for each in kind.named if value.startswith(each) and value != each), None)
        if value in kind.values:
            yield f"{kind.name}: {value}: {kind.values[value].what}"
        elif prefix is not None:
            yield f"{kind.name}: {value}: one of the values whose names begin with {prefix!r}"


def _known_checks(group: str) -> list[str]:
    return [
        f"{group}.{value}{form}"
        for kind in _kinds()
        for value, measured in kind.values.items()
        for form in ("", "_ratio", "_drop" if measured.higher_is_better else "_rise")
    ]


def _kinds() -> Iterator[Any]:
    """Every kind of task that can be had here; one of another package that cannot be loaded explains nothing."""
    from gate.metrics.kinds import kind_named, names

    for name in names():
        try:
            yield kind_named(name)
        except SpecError:
            continue


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
