"""One page from what `gpu.sh` left in its folder: OUT/evidence.md.

python docs/evidence/write.py OUT
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gate.precision import compute_layers
from gate.report.json_report import read_report
from gate.results import CheckRun, EngineResult
from gate.verdict import Finding


def main(out: Path) -> None:
    """Write the page, and print it."""
    text = "\n".join(page(out)) + "\n"
    (out / "evidence.md").write_text(text, encoding="utf-8")
    print(text)


def page(out: Path) -> Iterator[str]:
    """Its lines."""
    names = ("digits-tensorrt", "digits-weak", "resnet", "torch", "wrong-scale", "resnet-rebuilt")
    runs = {name: read_report(out / name / "report.json") for name in names if (out / name / "report.json").is_file()}
    device = next(iter(runs.values())).device
    yield f"# {device.name}, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    yield from ("", "Written by `docs/evidence/gpu.sh`; everything below was measured in that run.", "")
    yield (
        f"GPU: {device.name}, compute capability {device.compute_capability}, driver {device.driver}, "
        f"CUDA {device.cuda} (the driver's)."
    )
    for name, run in runs.items():
        shown = ", ".join(f"{key} {value}" for key, value in sorted(run.device.versions.items()))
        yield f"- `{name}`: Python {run.device.python}, {shown}; reference {run.provenance.reference}"
    for name in ("digits-tensorrt", "digits-weak"):
        if name in runs:
            yield from ("", f"## examples/digits ({name}): {runs[name].samples} samples", "")
            yield from table(runs[name])
            yield from again(out, f"{name}-again")
    if (out / "digits-verify.txt").is_file():
        said = (out / "digits-verify.txt").read_text(encoding="utf-8").splitlines()
        counts = Counter(line.split()[0] for line in said if line.startswith(("INTACT", "REFUSED")))
        yield from ("", f"Sealed bundles of the digits: {counts['INTACT']} INTACT, {counts['REFUSED']} REFUSED.")
    timings: dict[str, Any] = {}
    for path in sorted(out.glob("measure-*.json")):
        timings |= measures(path)
    for name in ("resnet", "torch"):
        if name in runs:
            yield from ("", f"## examples/resnet50 ({name}): {runs[name].samples} samples", "")
            yield from table(runs[name])
    if timings:
        yield from ("", "## GPU compute time of ResNet-50, CUDA events, ms", "")
        yield from latency_table(timings)
        yield from ("", "## What comparing costs beside the runs", "")
        yield from comparing_table(timings)
    if "resnet-rebuilt" in runs:
        yield from rebuilt(runs["resnet-rebuilt"])
    if "wrong-scale" in runs:
        yield from ("", "## INT8 calibrated on images half as large", "")
        yield from table(runs["wrong-scale"])
        yield from ("", "```", (out / "wrong-scale.txt").read_text(encoding="utf-8").splitlines()[0], "```")
    if (out / "broken-plans.txt").is_file():
        yield from ("", "## Broken plans", "", "```")
        yield from (out / "broken-plans.txt").read_text(encoding="utf-8").splitlines()
        yield "```"
    for name in ("tests-tensorrt.txt", "tests-nms.txt", "tests-torch.txt"):
        if (out / name).is_file():
            lines = (out / name).read_text(encoding="utf-8").splitlines()
            yield from ("", f"`{name}`: {lines[-1] if lines else 'empty'}")


def measures(path: Path) -> dict[str, Any]:
    """Timings by engine."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


COLUMNS = (
    "engine",
    "verdict",
    "compute layers",
    "rel_rmse",
    "worst 1-cos",
    "worst centred 1-cos",
    "top-1 agreement",
    "build s",
    "file MiB",
    "p50 / p95 / p99 ms",
    "device peak MiB",
)


def table(run: CheckRun) -> Iterator[str]:
    """One row an engine."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for engine in run.engines:
        yield f"| {' | '.join(cells(engine))} |"


def cells(engine: EngineResult) -> Iterator[str]:
    """Its row."""
    yield engine.name
    if engine.status is None:
        yield f"NOT RUN: {engine.not_run}"
        yield from [""] * (len(COLUMNS) - 2)
        return
    yield engine.status.value
    layers = compute_layers(engine.build.layers) if engine.build else ()
    counts = Counter(layer.precision for layer in layers)
    yield ", ".join(f"{count} {name}" for name, count in counts.most_common())
    if engine.outputs:
        output = engine.outputs[0]
        yield number(output.rel_rmse)
        yield number(output.cosine_distance)
        yield number(output.centered_cosine_distance)
        yield "" if output.top1_agree is None else f"{output.top1_agree} of {output.topk_samples}"
    else:
        yield from [""] * 4
    yield number(engine.build.seconds if engine.build else None, ".1f")
    yield number(None if engine.size_bytes is None else engine.size_bytes / 2**20, ".2f")
    latency = engine.latency
    yield (
        ""
        if latency is None
        else f"{latency.p50_ms:.3f} / {latency.p95_ms:.3f} / {latency.p99_ms:.3f} ({latency.timed}, batch {latency.batch})"
    )
    yield number(engine.device_peak_mib, ".0f")


def again(out: Path, name: str) -> Iterator[str]:
    """What the second check in a new process said."""
    path = out / f"{name}.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        yield from ("", f"Again in a new process, engines from the cache: {lines[0]}; {lines[-1]}.")


def latency_table(timings: dict[str, Any]) -> Iterator[str]:
    """One row an engine and batch size."""
    yield "| engine | batch | n | p50 | p95 | p99 | bare loop p50 | ratio | host wall p50 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, each in timings.items():
        for size, row in each["batches"].items():
            bare = row["bare_p50_ms"]
            ratio = "" if bare is None else f"{row['p50_ms'] / bare:.4f}"
            yield (
                f"| {name} | {size} | {row['n']} | {row['p50_ms']:.4f} | {row['p95_ms']:.4f} | {row['p99_ms']:.4f} "
                f"| {number(bare, '.4f')} | {ratio} | {row['host_wall_p50_ms']:.3f} |"
            )


def comparing_table(timings: dict[str, Any]) -> Iterator[str]:
    """One row an engine: seconds over all samples at batch 32. The reference's are those of the Python with PyTorch."""
    rows = {name: each["comparing"] for name, each in timings.items()}
    reference = next((row for row in rows.values() if "reference_s" in row), None)
    yield "Seconds over all samples, batch 32, samples in memory, best of three; what the gate adds is its own loop less the"
    yield "bare calls: samples held against their digests, the recorded reference written and read, every metric."
    yield ""
    if reference is not None:
        added = reference["with_recording_s"] - reference["reference_s"]
        yield f"Reference: {reference['reference_s']:.3f} s alone. Recording it adds {added:.3f} s, once: the model's way to"
        yield "the GPU and back, the files, and the samples held."
        yield ""
    yield "| engine | samples | engine alone s | with comparing s | added s | added, of engine and reference |"
    yield "|---|---|---|---|---|---|"
    for name, row in rows.items():
        added = row["with_comparing_s"] - row["engine_s"]
        share = "" if reference is None else f"{100 * added / (row['engine_s'] + reference['reference_s']):.1f} %"
        yield (
            f"| {name} | {row['samples']:.0f} | {row['engine_s']:.3f} | {row['with_comparing_s']:.3f} | {added:.3f} | {share} |"
        )


def rebuilt(run: CheckRun) -> Iterator[str]:
    """How far several builds of one engine are apart."""
    yield from ("", "## Three builds of one engine", "")
    for engine in run.engines:
        yield from (f"- {engine.name}: {note}" for note in engine.notes if note.startswith("built "))
        for finding in engine.verdict.findings if engine.verdict else ():
            if isinstance(finding, Finding) and "builds:" in finding.detail and finding.check.startswith("parity."):
                yield f"- {finding.check}: {finding.detail}"


def number(value: float | None, form: str = ".2e") -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
