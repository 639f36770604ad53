"""Latency, stages, usage and memory as tables that the terminal and the Markdown report share."""

from __future__ import annotations

from collections.abc import Iterator

from gate.report.making import plural
from gate.results import Comparison, EngineResult, LatencyMetrics
from gate.wording import milliseconds, number, size_text

LATENCY_HEADINGS = ("region", "p50 ms", "p95 ms", "p99 ms", "mean ms")
STAGE_HEADINGS = ("stage", "mean ms", "sd ms", "p50 ms", "p95 ms", "p99 ms", "share")


def latency_line(latency: LatencyMetrics) -> str:
    """One measurement in a sentence: how it was made, and its percentiles."""
    how = [latency.timed, f"batch {latency.batch}", *(f"{axis} {size}" for axis, size in latency.axes.items())]
    if latency.regions.keys() != {"host_wall"}:
        how.append("with copies" if latency.transfers else "without copies")
        how.append(latency.wait)
    if latency.cuda_graph:
        how.append("CUDA graph")
    if latency.streams > 1:
        how.append(f"{latency.streams} streams")
    how.append(f"n = {latency.n}")
    how.append(plural(latency.sessions, "session", "sessions"))
    how.append(f"{latency.warm_up} warm-up")
    return (
        f"Latency ({', '.join(how)}): "
        f"p50 {milliseconds(latency.p50_ms)} ms, p95 {milliseconds(latency.p95_ms)} ms, "
        f"p99 {milliseconds(latency.p99_ms)} ms, max {milliseconds(latency.max_ms)} ms, "
        f"{latency.throughput:.0f} samples/s; {latency.stopped}, {latency.seconds:.1f} s"
    )


def comparison_line(found: Comparison) -> str:
    """An engine against another in a sentence."""
    ratios = ", ".join(
        f"{name} {100 * (each.ratio - 1):+.2f} % ({100 * (each.interval.lower - 1):+.2f} to "
        f"{100 * (each.interval.upper - 1):+.2f} %)"
        for name, each in found.ratios.items()
    )
    sessions = plural(found.sessions, "session", "sessions")
    return f"Against {found.title}, in turn with it in {sessions}: {ratios}; {found.stopped}, {found.seconds:.1f} s"


def region_rows(latency: LatencyMetrics) -> Iterator[tuple[str, ...]]:
    """Every region that was timed, where there is more than one."""
    if len(latency.regions) < 2:
        return
    for name, each in latency.regions.items():
        yield (name, *map(milliseconds, (each.p50_ms, each.p95_ms, each.p99_ms, each.mean_ms)))


def stage_rows(result: EngineResult) -> Iterator[tuple[str, ...]]:
    """The stages of the pipeline, the total last."""
    for each in result.stages:
        percentiles = map(milliseconds, (each.p50_ms, each.p95_ms, each.p99_ms))
        yield (
            each.stage,
            milliseconds(each.mean_ms),
            milliseconds(each.sd_ms),
            *percentiles,
            f"{100 * each.share:.1f} %",
        )


def resource_lines(result: EngineResult) -> Iterator[str]:
    """What an engine takes, in sentences."""
    usage = result.usage
    if usage is not None:
        known = {
            "power": (usage.power_w, "W"),
            "energy per inference": (usage.energy_mj, "mJ"),
            "GPU": (usage.gpu_percent, "%"),
            "CPU": (usage.cpu_percent, "%"),
        }
        said = ", ".join(
            f"{name} {number(value, digits=3)} {unit}" for name, (value, unit) in known.items() if value is not None
        )
        yield (
            f"While it runs without a pause (batch {usage.batch}, {plural(usage.sessions, 'session', 'sessions')}): "
            f"{said or 'the system does not say'}"
        )
    memory = result.memory
    if memory is not None:
        parts = {
            "device, steady": memory.device_steady_mib,
            "device, peak": memory.device_peak_mib,
            "host, steady": memory.host_steady_mib,
            "host, peak": memory.host_peak_mib,
        }
        said = ", ".join(
            f"{name} {size_text(int(value * 2**20))}" for name, value in parts.items() if value is not None
        )
        yield f"Memory in a fresh process, all engines of it together: {said}"


def timing_lines(result: EngineResult) -> Iterator[str]:
    """Latency, stages, usage and memory in lines for a terminal."""
    for latency in result.latencies:
        yield latency_line(latency)
        yield from (f"  {comparison_line(each)}" for each in latency.comparisons)
        yield from (f"  {each}" for each in latency.notes)
        yield from _aligned(LATENCY_HEADINGS, [*region_rows(latency)])
    yield from _aligned(STAGE_HEADINGS, [*stage_rows(result)])
    yield from resource_lines(result)


def _aligned(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for name, *numbers in (headings, *rows):
        right = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        yield "  " + "  ".join((name.ljust(widths[0]), *right))
