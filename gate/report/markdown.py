"""report.md: what a pull request shows, and the annotations of GitHub Actions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gate.errors import GateError
from gate.report.making import (
    RANGE_HEADINGS,
    calibrations,
    making_lines,
    nodes_by_precision,
    plural,
    range_rows,
    reproduce_lines,
)
from gate.report.pictures import Drawn
from gate.report.scores import HEADINGS as SCORE_HEADINGS
from gate.report.scores import box_lines, score_table
from gate.report.table import HEADINGS, device_text, rows
from gate.report.terminal import next_command
from gate.report.timings import (
    LATENCY_HEADINGS,
    STAGE_HEADINGS,
    comparison_line,
    latency_line,
    region_rows,
    resource_lines,
    stage_rows,
)
from gate.results import CheckRun, EngineResult
from gate.verdict import Failure, Finding, Status
from gate.wording import (
    MISSING,
    advice,
    anchor,
    failure_lines,
    finding_sentence,
    interval_text,
    limit_source,
    number,
    observed_and_limit,
    status_word,
)

_LOCATION = re.compile(r"(?P<file>.+):(?P<line>\d+)")


def markdown(run: CheckRun, drawn: Drawn | None = None) -> str:
    """The report of a run, in GitHub's Markdown; its first line is the verdict with the reason.

    Args:
        run: What was checked.
        drawn: The pictures that lie beside the report; None where there are none to speak of.
    """
    drawn = drawn or Drawn()
    lines = [f"**{_text(run.summary)}**", ""]
    command = next_command(run)
    if command:
        lines += [f"Next: `{command}`", ""]
    for result in run.engines:
        for warning in result.warnings:
            lines += [f"**WARNING** `{result.name}`: {_text(warning)}", ""]
    lines += [
        f"`{run.model_id}`, {run.samples} samples, reference: {_text(run.provenance.reference)}, "
        f"device: {_text(device_text(run.device))}",
        "",
        *_table(HEADINGS, [row.cells for row in rows(run)]),
    ]
    for result in run.engines:
        if result.status is None:
            lines += ["", f"**NOT RUN** `{result.name}`: {_text(result.not_run or 'no reason was given')}"]
        elif result.status is not Status.PASSED:
            lines += ["", *_explained(result)]
    for result in run.engines:
        if result.verdict is not None:
            lines += ["", *_details(result, drawn)]
    for remark in drawn.remarks:
        lines += ["", _text(remark)]
    lines += ["", *_provenance(run)]
    return "\n".join(lines) + "\n"


def github_annotations(run: CheckRun) -> tuple[str, ...]:
    """A line for each finding that did not pass, in the words of GitHub Actions: shown beside the spec's line."""
    found: list[str] = []
    for result in run.engines:
        for finding in result.failing:
            location = finding.limit.location if isinstance(finding, Finding) else None
            match = _LOCATION.fullmatch(location) if location else None
            file, line = (match["file"], match["line"]) if match else (run.spec_path, "1")
            title = f"{finding.status.value} {result.name} {finding.check}"
            message = "\n".join((finding_sentence(finding, precision=result.precision), *failure_lines(finding)))
            found.append(f"::error file={_property(file)},line={line},title={_property(title)}::{_data(message)}")
    return tuple(found)


def github_error(err: GateError, *, spec: str) -> str:
    """The same for an error that kept a spec from a verdict."""
    match = _LOCATION.fullmatch(err.where or "")
    file, line = (match["file"], match["line"]) if match else (spec, "1")
    return f"::error file={_property(file)},line={line},title={_property(f'gate: no verdict on {spec}')}::{_data(str(err))}"


def _explained(result: EngineResult) -> Iterator[str]:
    yield f"**{result.status.value if result.status else ''}** `{result.name}`"
    yield ""
    for finding in result.failing:
        sentence = _text(finding_sentence(finding, precision=result.precision))
        yield f"- {finding.status.value} {sentence} ([what it means]({anchor(finding.check)}))"
        lines = failure_lines(finding)
        if isinstance(finding, Failure) and lines:
            yield ""
            yield "  ```text"
            yield from (f"  {line.replace('```', '` ` `')}" for line in lines)
            yield "  ```"
        else:
            yield from (f"  - {_text(line)}" for line in lines)
        if advice(finding):
            yield f"  - {_text(' '.join(advice(finding).split()))}"
    for note in result.notes:
        yield f"- {_text(note)}"


def _details(result: EngineResult, drawn: Drawn) -> Iterator[str]:
    findings = () if result.verdict is None else result.verdict.findings
    count = f"{len(findings)} finding{'' if len(findings) == 1 else 's'}"
    yield f"<details><summary>{result.name}: {status_word(result.status, result.evidence)}, {count}</summary>"
    yield ""
    yield from _table(
        ("check", "status", "observed", "interval", "limit", "limit from", "n", "evidence"),
        [_finding_cells(finding, result) for finding in findings],
    )
    yield from _scores(result)
    for picture in drawn.pictures:
        if picture.engine == result.name:
            yield ""
            yield f"{_text(picture.caption)}:"
            yield ""
            yield f"![{picture.name}]({picture.path})"
    for output in result.outputs:
        worst = ", ".join(f"{index} ({error:.1e})" for index, error in output.worst_samples[:5])
        yield ""
        yield (
            f"Output `{output.output}`: {output.samples} samples, {output.elements} elements, "
            f"max \\|d\\| {number(output.max_abs)}, rel_rmse {number(output.rel_rmse)}"
            + (f"; worst samples (relative error): {worst}" if worst else "")
        )
    for latency in result.latencies:
        yield from ("", _text(latency_line(latency)))
        for comparison in latency.comparisons:
            yield from ("", _text(comparison_line(comparison)))
        if regions := [*region_rows(latency)]:
            yield ""
            yield from _table(LATENCY_HEADINGS, regions)
        for note in latency.notes:
            yield from ("", _text(note))
    if stages := [*stage_rows(result)]:
        yield ""
        yield from _table(STAGE_HEADINGS, stages)
    for line in resource_lines(result):
        yield from ("", _text(line))
    for note in (*making_lines(result), *result.notes):
        yield ""
        yield _text(note)
    if nodes := [*nodes_by_precision(result)]:
        yield from ("", "<details><summary>which nodes run in which precision</summary>", "")
        yield from _table(("precision", "nodes"), nodes)
        yield from ("", "</details>")
    for record in calibrations(result):
        if record.ranges:
            count = plural(len(record.ranges), "calibrated tensor", "calibrated tensors")
            yield from ("", f"<details><summary>ranges of {count}</summary>", "")
            yield from _table(RANGE_HEADINGS, [*range_rows(record)])
            yield from ("", "</details>")
    if commands := [*reproduce_lines(result)]:
        lines = [line for what, command in commands for line in (f"# {what}", command.replace("```", "` ` `"))]
        yield from ("", "```sh", *lines, "```")
    yield ""
    yield "</details>"


def _scores(result: EngineResult) -> Iterator[str]:
    """The engine's values beside the reference's, and its boxes."""
    if result.scores is None:
        return
    table = score_table(result.scores)
    yield ""
    yield from _table((table.title, *SCORE_HEADINGS[1:]), table.rows)
    for line in (*table.remarks, *box_lines(result.scores)):
        yield ""
        yield _text(line)


def _finding_cells(finding: Finding | Failure, result: EngineResult) -> tuple[str, ...]:
    if isinstance(finding, Failure):
        message = _text(" ".join(finding.message.split()))[:300]
        return (finding.check, finding.status.value, message, MISSING, MISSING, MISSING, "0", finding.evidence.value)
    observed, allowed = observed_and_limit(finding)
    return (
        finding.check,
        finding.status.value,
        observed,
        interval_text(finding) or "exact",
        f"{finding.limit.symbol} {allowed}",
        limit_source(finding.limit, result.precision),
        str(finding.n),
        finding.evidence.value,
    )


def _provenance(run: CheckRun) -> Iterator[str]:
    source = run.provenance
    yield "<details><summary>provenance and digests</summary>"
    yield ""
    facts = [
        ("spec", f"{run.spec_path} (sha256 {source.spec_sha256})"),
        ("git", source.git or "not a checkout"),
        ("data sha256", source.data_sha256),
        ("reference sha256", source.reference_sha256),
        ("weights sha256", source.weights_sha256 or "none: stored outputs"),
        ("seed", str(source.seed)),
        ("created", run.created),
        ("gate", run.gate_version),
        ("device", f"{device_text(run.device)}, {run.device.os}, Python {run.device.python}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(run.device.versions.items()))),
        ("time", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in run.seconds.items())),
        ("reused", ", ".join(run.reused) or "nothing"),
    ]
    for result in run.engines:
        if result.engine_sha256 is not None:
            reused = f", reused: {', '.join(result.reused)}" if result.reused else ""
            facts.append((f"engine {result.name} sha256", f"{result.engine_sha256}{reused}"))
        if result.baseline_sha256 is not None:
            facts.append((f"baseline of {result.name} sha256", result.baseline_sha256))
    yield from _table(("what", "value"), facts)
    yield ""
    yield "</details>"


def _table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in body:
        yield "| " + " | ".join(_text(cell) for cell in row) + " |"


def _text(text: str) -> str:
    """Text that Markdown and HTML read as it stands."""
    flat = " ".join(text.split())
    escaped = flat.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return re.sub(r"([|*`\[\]])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda match: f"\\{match[0]}", escaped)


def _data(text: str) -> str:
    """Source: actions/toolkit, packages/core/src/command.ts, escapeData."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Source: actions/toolkit, packages/core/src/command.ts, escapeProperty."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
