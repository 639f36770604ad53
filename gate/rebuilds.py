"""What several builds of one engine say together. Builds are not deterministic: kernels are chosen by timing them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from gate.engines.interface import BuildRecord
from gate.verdict import Evidence, Failure, Finding, Interval

_SPREAD = ("parity.", "task.", "build.")
"""Checks that each build is measured by."""

_NAMED = 3


def build_differences(records: Sequence[BuildRecord], digests: Sequence[str]) -> tuple[str, ...]:
    """How several builds of one engine differ, as sentences: in their bytes, and in the layers that were made.

    Args:
        records: Of each build, the sealed one first.
        digests: sha256 of each engine's file, in the same order.
    """
    told = f"built {len(records)} times: the files {'are the same' if len(set(digests)) == 1 else 'differ'}"
    first = {layer.name: layer for layer in records[0].layers}
    names = {layer.name for record in records for layer in record.layers}
    changed = sorted(
        name
        for name in names
        if any({layer.name: layer for layer in record.layers}.get(name) != first.get(name) for record in records[1:])
    )
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        told += (
            f", {len(changed)} of {len(names)} layers differ in precision, tactic or format, or are not in all of them: "
            f"{', '.join(changed[:_NAMED])}{more}"
        )
    elif names:
        told += ", its 1 layer is alike" if len(names) == 1 else f", all {len(names)} layers are alike"
    return (told,)


def with_spread(findings: list[Finding | Failure], more: list[list[Finding | Failure]]) -> list[Finding | Failure]:
    """Findings whose intervals hold those of every build; the estimate stays that of the first, which is sealed.

    A check that a further build failed to make is a Failure: what cannot be repeated is not shown.

    Args:
        findings: Of the first build.
        more: Of each further build: parity, task and delivered precision.
    """
    result: list[Finding | Failure] = []
    by_build = [{each.check: each for each in other} for other in more]
    compared = set().union(*by_build) if by_build else set()
    for finding in findings:
        if isinstance(finding, Failure) or not finding.check.startswith(_SPREAD):
            result.append(finding)
            continue
        seen = [other.get(finding.check) for other in by_build]
        same = [each for each in seen if isinstance(each, Finding)]
        if len(same) < len(seen):
            missing = next(index for index, each in enumerate(seen, 1) if not isinstance(each, Finding))
            result.append(
                Failure(
                    check=finding.check,
                    error="MeasurementError",
                    message=f"{finding.check} was measured on the first build and not on build {missing + 1}",
                    evidence=finding.evidence,
                )
            )
            continue
        bounds = [(each.interval.lower, each.interval.upper) for each in (finding, *same)]
        lower = min(low for low, _ in bounds) if not any(math.isnan(low) for low, _ in bounds) else math.nan
        upper = max(high for _, high in bounds) if not any(math.isnan(high) for _, high in bounds) else math.nan
        estimates = [each.estimate for each in (finding, *same)]
        spread = f"{len(estimates)} builds: {min(estimates):.3g} to {max(estimates):.3g}"
        result.append(
            msgspec.structs.replace(
                finding,
                interval=Interval(lower, upper),
                limit=next((each.limit for each in (finding, *same) if each.limit.location), finding.limit),
                detail=f"{finding.detail}; {spread}" if finding.detail else spread,
            )
        )
    mine = {finding.check for finding in findings}
    result.extend(_joined_failures(more, besides=mine))
    known = {each.check for each in result}
    result.extend(
        Failure(
            check=check,
            error="MeasurementError",
            message=f"{check} was measured on a further build and not on the first",
            evidence=Evidence.PREFLIGHT,
        )
        for check in sorted(compared - known)
    )
    return result


def _joined_failures(more: list[list[Finding | Failure]], *, besides: set[str]) -> Iterator[Failure]:
    """What failed in further builds, one Failure for each check, with the numbers of the builds that it failed in."""
    found: dict[str, list[tuple[int, Failure]]] = {}
    for number, other in enumerate(more, 2):
        for each in other:
            if isinstance(each, Failure) and each.check not in besides:
                found.setdefault(each.check, []).append((number, each))
    for failures in found.values():
        builds: dict[str, list[int]] = {}
        for number, each in failures:
            builds.setdefault(each.message, []).append(number)
        message = "\n".join(
            f"{'build' if len(numbers) == 1 else 'builds'} {', '.join(map(str, numbers))}: {text}"
            for text, numbers in builds.items()
        )
        yield msgspec.structs.replace(failures[0][1], message=message)
