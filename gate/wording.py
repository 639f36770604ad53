"""How numbers, findings and failures read: one wording for the terminal, the Markdown report and the tests.

Pure. A number is shown with its unit, and with as many digits as it takes to see on which side of its limit it lies.
"""

from __future__ import annotations

import math

from gate.verdict import Evidence, Failure, Finding, Limit, Status

MISSING = "-"
MOST_DIGITS = 17
FINDINGS_PAGE = "docs/findings.md"
_WITH_OWN_HEADING = (
    "task.top1",
    "task.top5",
    "task.top1_drop_pp",
    "task.top5_drop_pp",
    "task.tiled",
    "baseline.task",
    "baseline.top1_drop_pp",
    "baseline.rel_rmse_ratio",
)
"""Checks of these two groups with a heading of their own; all others are of a task's values."""
_FORMS = ("drop", "rise", "ratio", "gain")


def number(value: float, *, digits: int = 2) -> str:
    """A number with so many significant digits: `9.7e-03`, `0.34`, `512`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-2 or size >= 1e6:
        return f"{value:.{digits - 1}e}"
    if float(value).is_integer():
        return f"{value:.0f}"
    if 0.5 < size < 1:
        # Near 1 it is the distance from 1 that tells two fractions apart: 0.9925, not 0.99.
        return f"{value:.{digits - 1 - math.floor(math.log10(1 - size))}f}".rstrip("0")
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:.{max(decimals, 2 if size >= 1e-1 else 0)}f}"


def limit_number(value: float) -> str:
    """A limit with the fewest digits, two to four, that are exact, so that it reads as it was set."""
    exact = (text for text in (number(value, digits=digits) for digits in (2, 3)) if _as_number(text) == value)
    return next(exact, number(value, digits=4))


def milliseconds(value: float) -> str:
    """A duration as a number of ms, without an exponent down to 0.1 µs: `0.0079`."""
    return f"{value:.4f}" if 1e-4 <= value < 1e-2 else number(value)


def with_unit(text: str, unit: str) -> str:
    """`0.12 pp`; a ratio has no unit."""
    return f"{text} {unit}" if unit else text


def observed_and_limit(finding: Finding) -> tuple[str, str]:
    """Estimate and limit with their unit, and with digits enough to see on which side of the limit the estimate lies."""
    estimate, limit = finding.estimate, finding.limit.value
    observed, allowed = number(estimate), limit_number(limit)
    if not math.isnan(estimate) and estimate != limit:
        for digits in range(3, MOST_DIGITS + 1):
            if _as_number(observed) != limit and _as_number(observed) != _as_number(allowed):
                break
            observed, allowed = number(estimate, digits=digits), number(limit, digits=max(digits, 4))
    return with_unit(observed, finding.unit), with_unit(allowed, finding.unit)


def _as_number(text: str) -> float:
    return math.nan if text == "NaN" else float(text)


def limit_source(limit: Limit, precision: str | None = None) -> str:
    """Where a limit comes from: `gate.toml:41`, `default for fp16`, `baseline`."""
    if limit.location is not None:
        return limit.location
    if limit.source == "default" and precision is not None:
        return f"default for {precision}"
    return limit.source


def interval_text(finding: Finding) -> str:
    """The interval in words, with the unit; empty where it is a single value."""
    lower, upper = finding.interval.lower, finding.interval.upper
    if lower == upper or (math.isnan(lower) and math.isnan(upper)):
        return ""
    low, high = (with_unit(number(value, digits=3), finding.unit) for value in (lower, upper))
    if math.isinf(lower) and math.isinf(upper):
        return "unbounded"
    if math.isinf(lower):
        return f"up to {high}"
    if math.isinf(upper):
        return f"at least {low}"
    return f"{number(lower, digits=3)} to {high}"


def finding_sentence(finding: Finding | Failure, *, precision: str | None = None) -> str:
    """One line: the check, observed against limit, and where the limit stands.

    `parity.rel_rmse: 9.7e-03 > 5.0e-03 (gate.toml:41)`.
    """
    if isinstance(finding, Failure):
        return f"{finding.check}: {_first_line(finding.message)}"
    limit, estimate = finding.limit, finding.estimate
    source = f"({limit_source(limit, precision)})"
    observed, allowed = observed_and_limit(finding)
    interval = interval_text(finding)
    measured = f"{observed} [{interval}]" if interval else observed
    if finding.status is Status.INCONCLUSIVE:
        return f"{finding.check}: {measured}, limit {limit.symbol} {allowed} {source}"
    if finding.n <= 0:
        return f"{finding.check}: nothing was measured, limit {limit.symbol} {allowed} {source}"
    broken = estimate > limit.value if limit.kind == "at_most" else estimate < limit.value
    if finding.status is Status.FAILED and not broken:
        return f"{finding.check}: {measured}, limit {limit.symbol} {allowed} {source}"
    symbol = {"at_most": ">", "at_least": "<"}[limit.kind] if broken else limit.symbol
    return f"{finding.check}: {measured} {symbol} {allowed} {source}"


def failure_lines(finding: Finding | Failure) -> tuple[str, ...]:
    """What is left of a failure's message after its first line, such as the compiler's log; or a finding's detail."""
    if isinstance(finding, Failure):
        return tuple(line.rstrip() for line in finding.message.splitlines()[1:] if line.strip())
    return tuple(line.rstrip() for line in finding.detail.splitlines() if line.strip())


def anchor(check: str) -> str:
    """Where docs/findings.md explains a check: `docs/findings.md#parity-rel_rmse`.

    Checks of a task's values share one heading for each form: `task.mean_ap_drop` is explained at `#task-drop`; all
    checks of latency, stages, usage or metamorphic relations share one.
    """
    name = check.partition("[")[0]
    group, _, measured = name.partition(".")
    if group in ("latency", "metamorphic", "stages", "usage"):
        return f"{FINDINGS_PAGE}#{group}"
    if group in ("task", "baseline") and measured and name not in _WITH_OWN_HEADING:
        # Of the whole check: the name of a category may hold brackets.
        form = next((each for each in _FORMS if check.endswith(f"_{each}")), "value")
        return f"{FINDINGS_PAGE}#{group}-{form}"
    return f"{FINDINGS_PAGE}#{name.replace('.', '-')}"


def advice(finding: Finding | Failure) -> str:
    """The finding's hint, unless it only says where it is documented."""
    hint = finding.hint.strip()
    return "" if hint.startswith(FINDINGS_PAGE) else hint


def status_word(status: Status | None, evidence: Evidence | None) -> str:
    """The verdict as it reads in a table: `PASSED (preflight only)`, `NOT RUN`."""
    if status is None:
        return "NOT RUN"
    return f"{status.value} (preflight only)" if evidence is Evidence.PREFLIGHT else status.value


def size_text(size_bytes: int | None) -> str:
    """A file's size: `327 KiB`, `4.2 MiB`."""
    if size_bytes is None:
        return MISSING
    if size_bytes < 1024:
        return f"{size_bytes} B"
    if size_bytes < 1024**2:
        return f"{size_bytes / 1024:.0f} KiB"
    if size_bytes < 1024**3:
        return f"{size_bytes / 1024**2:.1f} MiB"
    return f"{size_bytes / 1024**3:.2f} GiB"


def belongs(check: str, group: str) -> bool:
    """Whether a finding of `check` is part of `group`, or a failure of the whole that `group` is a part of.

    `parity.rel_rmse[boxes]` belongs to `parity`; a failure of `latency` belongs to `latency.p99_ms`. Whole parts of
    the dotted name are compared: `task.top1_drop_pp` does not belong to `task.top1`. Where the group is of one batch size
    and shape, such as `latency.p99_ms[batch=8]`, nothing of another belongs to it.
    """
    (name, _, part), (whole, _, cell) = check.partition("["), group.partition("[")
    if cell and part not in ("", cell):
        return False
    return name == whole or name.startswith(f"{whole}.") or whole.startswith(f"{name}.")


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "it failed without a message")
