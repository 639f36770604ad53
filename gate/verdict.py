"""Findings and verdicts: the only place that decides.

A status is computed from an interval and a limit, never set. An interval that straddles its limit is
INCONCLUSIVE. Nothing measured is never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum
from typing import Literal

import msgspec

from gate.errors import MeasurementError


class Status(str, Enum):
    """What a finding, an engine or a run came to."""

    PASSED = "PASSED"
    FAILED = "FAILED"
    INCONCLUSIVE = "INCONCLUSIVE"


class Evidence(str, Enum):
    """Where a finding was made: compiled only, run on a CPU, or run on the GPU of the fingerprint."""

    PREFLIGHT = "preflight"
    HOST = "host"
    DEVICE = "device"

    @property
    def rank(self) -> int:
        """0 for preflight, 1 for host, 2 for device: a higher one is stronger evidence."""
        return ("preflight", "host", "device").index(self.value)


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A confidence interval; `lower == upper` for a value that is exact on the samples measured.

    An unbounded side is infinite. A NaN on either side is allowed here and can never pass.
    """

    lower: float
    upper: float


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is allowed.

    Args:
        kind: `at_most` or `at_least`.
        value: The limit, in the finding's unit.
        source: Who set it: the spec, a default of the precision, or the stored baseline.
        location: Where it stands, such as `gate.toml:41`; None for a default.
    """

    kind: Literal["at_most", "at_least"]
    value: float
    source: Literal["spec", "default", "baseline"] = "spec"
    location: str | None = None

    @property
    def symbol(self) -> str:
        """`<=` or `>=`."""
        return "<=" if self.kind == "at_most" else ">="


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="finding", kw_only=True):
    """One measured number against one limit.

    Args:
        check: Dotted name, `parity.rel_rmse`, `task.top1_drop_pp`, `latency.p99_ms`; unique in an engine.
        estimate: The measured value, in `unit`.
        interval: Its confidence interval.
        limit: What is allowed.
        unit: `""` for a ratio without one, else `ms`, `MiB`, `pp`, `%`, `1/s`, `dB`.
        n: How many samples the estimate rests on; 0 can never pass.
        evidence: How it was obtained.
        detail: What a reader needs to understand it: the worst sample, the reason it is inconclusive.
        hint: What to do next.
    """

    check: str
    estimate: float
    interval: Interval
    limit: Limit
    n: int
    evidence: Evidence
    unit: str = ""
    detail: str = ""
    hint: str = ""

    @property
    def status(self) -> Status:
        """PASSED if the whole interval keeps the limit, FAILED if none of it does, else INCONCLUSIVE.

        A NaN anywhere, or no sample at all, is FAILED.
        """
        lower, upper, value = self.interval.lower, self.interval.upper, self.limit.value
        if self.n <= 0 or any(math.isnan(x) for x in (self.estimate, lower, upper, value)) or lower > upper:
            return Status.FAILED
        if self.limit.kind == "at_most":
            kept, broken = upper <= value, lower > value
        else:
            kept, broken = lower >= value, upper < value
        if kept:
            return Status.PASSED
        return Status.FAILED if broken else Status.INCONCLUSIVE


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="failure", kw_only=True):
    """A check that could not be made, or that has no number: it can never pass.

    Args:
        check: As in Finding.
        error: The error's class name, such as `BuildError`.
        message: What, where, got and expected.
        hint: What to do next.
    """

    check: str
    error: str
    message: str
    evidence: Evidence
    hint: str = ""

    @property
    def status(self) -> Status:
        """Always FAILED."""
        return Status.FAILED


def status_of(statuses: list[Status]) -> Status:
    """The worst of several statuses: FAILED, then INCONCLUSIVE, then PASSED.

    Raises:
        MeasurementError: There is none: nothing compared is not a pass.
    """
    if not statuses:
        raise MeasurementError("nothing was checked, so there is nothing to pass")
    for status in (Status.FAILED, Status.INCONCLUSIVE):
        if status in statuses:
            return status
    return Status.PASSED


def is_covered(required: str, checks: Iterable[str]) -> bool:
    """Whether a required check has a finding.

    Its own, one for each output (`parity.nonfinite[boxes]`), or, for a group such as `baseline`, one below it
    (`baseline.rel_rmse_ratio`).
    """
    return any(check == required or check.startswith((f"{required}[", f"{required}.")) for check in checks)


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The findings of one engine and what follows from them.

    Args:
        findings: At least one, with distinct check names.
        required: Names of the checks that the spec asked for; each must have a finding.

    Raises:
        MeasurementError: No finding, two of the same name, or a required check without one.
    """

    findings: tuple[Finding | Failure, ...]
    required: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [finding.check for finding in self.findings]
        if not names:
            raise MeasurementError("nothing was checked, so there is nothing to pass")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise MeasurementError(f"two findings for one check: {', '.join(twice)}")
        if not any(isinstance(finding, Failure) for finding in self.findings) and (
            missing := sorted(name for name in self.required if not is_covered(name, names))
        ):
            raise MeasurementError(f"required checks have no finding: {', '.join(missing)}")

    @property
    def status(self) -> Status:
        """The worst status of its findings."""
        return status_of([finding.status for finding in self.findings])

    @property
    def evidence(self) -> Evidence:
        """The strongest level that a finding of a comparison or a run reached."""
        return max((finding.evidence for finding in self.findings), key=lambda level: level.rank)

    def require_passed(self) -> PassedVerdict:
        """The verdict as what can be sealed.

        Raises:
            MeasurementError: It did not pass.
        """
        return PassedVerdict(self)


class PassedVerdict:
    """A verdict that passed: the only thing that can be sealed. It cannot be made from another."""

    __slots__ = ("verdict",)

    def __init__(self, verdict: Verdict) -> None:
        if verdict.status is not Status.PASSED:
            names = ", ".join(f.check for f in verdict.findings if f.status is not Status.PASSED)
            raise MeasurementError(f"only what passed can be sealed; {verdict.status.value}: {names}")
        self.verdict = verdict
