"""What engine and reference scored at a task other than classification, side by side: the same texts in every report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gate.errors import GateError
from gate.metrics.interface import MetricKind, MetricValue
from gate.metrics.kinds import kind_named
from gate.report.making import plural
from gate.results import TaskValues
from gate.wording import MISSING, number, with_unit

HEADINGS = ("value", "engine", "reference", "change")
MOST_NAMED = 5
"""Of the values that there is one of for each category, so many are listed: those that changed most for the worse."""

_EQUAL = "="
_MOST_DECIMALS = 6


@dataclass(frozen=True)
class ScoreTable:
    """The values worth a line, and in words what the others are.

    Args:
        title: The kind and the number of samples.
        rows: Cells of `HEADINGS`.
        remarks: On values that have no row.
    """

    title: str
    rows: tuple[tuple[str, str, str, str], ...]
    remarks: tuple[str, ...]


def first_score_text(scores: TaskValues) -> str:
    """The first value, and its change from the reference: `mean_ap 0.777 (-0.004)`; `=` where 4 digits are the same."""
    kind = _kind(scores)
    name = next((each for each in (() if kind is None else kind.values) if each in scores.values), None)
    name = next(iter(scores.values), None) if name is None else name
    if name is None or scores.samples <= 0:
        return ""
    ours, theirs = scores.values[name], scores.reference.get(name, math.nan)
    places = _places(ours, theirs)
    shorter = max(places - 1, 0)
    unit = _described(kind, name).unit
    shown = f"{name} {with_unit(_fixed(ours, shorter), unit)}"
    if math.isnan(theirs) or math.isnan(ours):
        same = math.isnan(theirs) and math.isnan(ours)
        return f"{shown} ({_EQUAL if same else f'reference {_fixed(theirs, shorter)}'})"
    change = ours - theirs
    if _is_nought(change, places):
        return f"{shown} ({_EQUAL})"
    return f"{shown} ({_signed(change, places if _is_nought(change, shorter) else shorter)})"


def score_table(scores: TaskValues) -> ScoreTable:
    """The main values of the kind, then of each group such as `ap_of.` those that changed most for the worse."""
    kind = _kind(scores)
    title = f"{scores.kind}, {plural(scores.samples, 'sample', 'samples')}"
    defined = {
        name: (value, scores.reference.get(name, math.nan))
        for name, value in scores.values.items()
        if not (math.isnan(value) and math.isnan(scores.reference.get(name, math.nan)))
    }
    remarks: list[str] = []
    groups: dict[str, list[str]] = {}
    main: list[str] = []
    for name in defined:
        prefix = _group(name, kind)
        (main if prefix is None else groups.setdefault(prefix, [])).append(name)
    rows = [
        _row(name, *defined[name], unit=_described(kind, name).unit)
        if name in scores.reference
        else _alone(name, defined[name][0], unit=_described(kind, name).unit)
        for name in main
    ]
    for prefix, names in groups.items():
        changed = [name for name in names if defined[name][0] != defined[name][1]]
        # NaN on one side alone is the worst change there is.
        worst = sorted(changed, key=lambda name: _gain(*defined[name]))[:MOST_NAMED]
        rows += [_row(name, *defined[name], unit=_described(kind, name).unit) for name in worst]
        if not changed:
            remarks.append(f"{prefix}*: all {len(names)} are the reference's")
        elif len(worst) < len(names):
            remarks.append(
                f"{prefix}*: {len(changed)} of {len(names)} changed"
                + (f", the {len(worst)} worst are listed" if len(worst) < len(changed) else "")
            )
    absent = [name for name in scores.values if name not in defined]
    if absent:
        more = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
        remarks.append(f"not defined on these samples: {', '.join(absent[:MOST_NAMED])}{more}")
    return ScoreTable(title, tuple(rows), tuple(remarks))


def box_lines(scores: TaskValues) -> Iterator[str]:
    """How the engine's boxes lie to the reference's, in sentences; nothing where none were compared."""
    boxes = scores.boxes
    if not boxes:
        return
    counts = {
        name: int(boxes.get(name, 0.0))
        for name in ("reference", "candidate", "matched", "class_changes", "reference_only", "candidate_only")
    }
    yield (
        f"boxes that count: {counts['candidate']}, the reference's {counts['reference']}; {counts['matched']} pairs with "
        f"one or two of them, {counts['class_changes']} of another category; {counts['reference_only']} not found, "
        f"{counts['candidate_only']} new"
    )
    if counts["matched"]:
        yield (
            f"paired boxes: IoU {_of(boxes, 'mean_iou')} in the mean, {_of(boxes, 'least_iou')} the least; scores "
            f"differ by {_of(boxes, 'mean_score_difference')} in the mean, {_of(boxes, 'max_score_difference')} at most"
        )


def _of(boxes: dict[str, float], name: str) -> str:
    value = boxes.get(name, math.nan)
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else number(value)


def _row(name: str, ours: float, theirs: float, *, unit: str) -> tuple[str, str, str, str]:
    places = _places(ours, theirs)
    change = ours - theirs
    if ours == theirs:
        told = _EQUAL
    elif not math.isfinite(change):
        told = _fixed(change, places)
    else:
        told = f"{change:+.0e}" if _is_nought(change, places) else _signed(change, places)
    return with_unit(name, f"({unit})" if unit else ""), _fixed(ours, places), _fixed(theirs, places), told


def _alone(name: str, ours: float, *, unit: str) -> tuple[str, str, str, str]:
    """A value that the reference has not, such as that of tiles."""
    return with_unit(name, f"({unit})" if unit else ""), _fixed(ours, _places(ours)), MISSING, MISSING


def _gain(ours: float, theirs: float) -> float:
    """Of a value of a category, of which more is better."""
    return -math.inf if math.isnan(ours) or math.isnan(theirs) else ours - theirs


def _kind(scores: TaskValues) -> MetricKind | None:
    """The kind; None where the package that has it is not installed here."""
    try:
        return kind_named(scores.kind)
    except GateError:
        return None


def _described(kind: MetricKind | None, name: str) -> MetricValue:
    return MetricValue() if kind is None else kind.values.get(name, MetricValue())


def _group(name: str, kind: MetricKind | None) -> str | None:
    """The prefix of a value that there is one of for each category."""
    if kind is None:
        head, dot, _ = name.partition(".")
        return f"{head}." if dot else None
    return next((prefix for prefix in kind.named if name.startswith(prefix)), None)


def _places(*values: float) -> int:
    """How many decimals make four digits, five above 1."""
    size = max((abs(each) for each in values if math.isfinite(each)), default=0.0)
    if size == 0 or 0.1 <= size <= 1:
        return 4
    return max((3 if size < 1 else 4) - math.floor(math.log10(size)), 0)


def _fixed(value: float, places: int) -> str:
    if not math.isfinite(value):
        return number(value)
    if places > _MOST_DECIMALS:
        return f"{value:.2e}" if value else "0"
    return f"{value:.{places}f}"


def _signed(value: float, places: int) -> str:
    return f"{value:+.{places}f}" if places <= _MOST_DECIMALS else f"{value:+.2e}"


def _is_nought(change: float, places: int) -> bool:
    return math.isfinite(change) and round(change, places) == 0
