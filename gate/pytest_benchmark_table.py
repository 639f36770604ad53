"""Latencies in the table and the JSON of pytest-benchmark, where it is installed.

    gate.toml::ort-fp32::latency[batch=8]

Each engine that was timed is an entry there for each batch size and shape, with the raw durations that the report's
percentiles are of, so that `--benchmark-json`, `--benchmark-autosave` and `--benchmark-compare` hold it. No verdict
comes from there: what pytest-benchmark does not take is told and left out.

pytest-benchmark has no documented way to hand it durations that were measured elsewhere. What is used here is the
least that its own fixture uses, in versions 4 and 5: the session that it registers as the plugin `pytest-benchmark`,
the session's list `benchmarks`, and `pytest_benchmark.stats.Metadata`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from gate.results import EngineResult, LatencyMetrics

GROUP = "gate"


def is_only_benchmarks(config: pytest.Config) -> bool:
    """Whether `--benchmark-only` was given: pytest-benchmark then skips what does not use its fixture."""
    return bool(config.getoption("benchmark_only", default=False))


def add_latencies(config: pytest.Config, timed: dict[str, EngineResult]) -> list[str]:
    """Add what was timed to pytest-benchmark's session, before it saves and shows its own.

    Nothing is added where it is not installed, or reports no benchmark: `--benchmark-disable`, `--benchmark-skip`,
    and runs of several processes.

    Args:
        config: Of the run.
        timed: Result of each engine by the id of its node, such as `gate.toml::ort-fp32`.

    Returns:
        What to tell: why an entry is not there; empty where all are.
    """
    session: Any = config.pluginmanager.get_plugin("pytest-benchmark")
    if not timed or (session is None and not config.pluginmanager.hasplugin("benchmark")):
        return []
    told: list[str] = []
    try:
        if session.disabled or session.skip:
            return []
        for node, result in timed.items():
            for metrics in result.latencies:
                if metrics.durations_ns:
                    session.benchmarks.append(_entry(node, result, metrics))
                else:
                    told.append(f"{_place(node, metrics)} has no raw durations: pytest-benchmark does not show it")
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as err:
        told.append(
            f"WARNING pytest-benchmark {_version()} keeps its benchmarks in another way than versions 4 and 5, so it "
            f"does not show all latencies ({type(err).__name__}: {err}); verdicts and reports do not depend on it"
        )
    return told


def _entry(node: str, result: EngineResult, metrics: LatencyMetrics) -> Any:
    """One entry of pytest-benchmark, its statistics computed by itself from our durations in seconds."""
    stats = importlib.import_module("pytest_benchmark.stats")
    entry = stats.Metadata(
        _Fixture(node, result, metrics), 1, {"timer": metrics.clock, "warmup": metrics.warm_up, "disable_gc": True}
    )
    for duration in metrics.durations_ns:
        entry.update(duration / 1e9)
    # What it will ask for when it saves: an entry that cannot answer must fail here, not there.
    entry.as_dict(include_data=True)
    return entry


class _Sizes(dict[str, int]):
    """Sizes of axes by name; `--benchmark-group-by=param:NAME` may ask for one that an engine does not have."""

    def __missing__(self, name: str) -> str:
        return ""


class _Fixture:
    """What an entry reads of the fixture `benchmark` that made it."""

    def __init__(self, node: str, result: EngineResult, metrics: LatencyMetrics) -> None:
        self.fullname = _place(node, metrics)
        self.name = "::".join(self.fullname.rsplit("::", 2)[1:])
        self.group = GROUP
        self.param = metrics.name or None
        self.params = _Sizes({"batch": metrics.batch, **metrics.axes})
        self.extra_info = extra_info(result, metrics)
        self.cprofile_stats = None
        self.has_error = False


def _place(node: str, metrics: LatencyMetrics) -> str:
    return f"{node}::latency[{metrics.name}]" if metrics.name else f"{node}::latency"


def extra_info(result: EngineResult, metrics: LatencyMetrics) -> dict[str, Any]:
    """What pytest-benchmark keeps beside its own statistics: our percentiles, how they were measured, the verdicts.

    Its median is the mean of the middle two; `p50_ms` is nearest-rank, as in every report of the gate.
    """
    verdicts = {}
    for finding in result.verdict.findings if result.verdict is not None else ():
        name, _, cell = finding.check.partition("[")
        if name.partition(".")[0] == "latency" and cell.removesuffix("]") in {"", metrics.name}:
            verdicts[finding.check] = finding.status.value
    return {
        "p50_ms": metrics.p50_ms,
        "p95_ms": metrics.p95_ms,
        "p99_ms": metrics.p99_ms,
        "timed": metrics.timed,
        "batch": metrics.batch,
        "sessions": metrics.sessions,
        "backend": result.backend,
        "precision": result.precision,
        "verdicts": verdicts,
    }


def _version() -> str:
    try:
        return str(importlib.import_module("pytest_benchmark").__version__)
    except (ImportError, AttributeError):
        return "of an unknown version"
