"""Latency, stages, usage and memory in the words of a report."""

from __future__ import annotations

import re

import msgspec
import pytest

from gate.latency.measurement import MemoryUse
from gate.latency.ratio import RatioEstimate
from gate.latency.stages import StageSummary
from gate.report.timings import (
    LATENCY_HEADINGS,
    STAGE_HEADINGS,
    comparison_line,
    latency_line,
    region_rows,
    resource_lines,
    stage_rows,
    timing_lines,
)
from gate.results import Comparison, RegionSummary, UsageMetrics
from gate.verdict import Interval
from tests.report import conftest as runs


def latency(**values):
    (plain,) = runs.engine("ort", runs.finding()).latencies
    return msgspec.structs.replace(plain, **values)


def region(ms):
    return RegionSummary(mean_ms=ms, p50_ms=ms, p95_ms=2 * ms, p99_ms=3 * ms)


GPU = {
    "host_wall": region(0.5),
    "h2d": region(0.125),
    "enqueue": region(0.002),
    "gpu_compute": region(0.25),
    "d2h": region(0.0625),
}


def result(**values):
    return runs.engine("ort", runs.finding(), **values)


def test_a_line_says_how_it_was_measured_its_numbers_and_why_it_stopped():
    assert latency_line(latency(regions={"host_wall": region(0.5)})) == (
        "Latency (host_wall, batch 1, n = 1000, 5 sessions, 100 warm-up): p50 0.21 ms, p95 0.24 ms, p99 0.30 ms, "
        "max 1 ms, 4762 samples/s; decided after 5 sessions, 12.0 s"
    )


def test_everything_that_is_part_of_the_number_stands_beside_it():
    line = latency_line(
        latency(
            timed="latency",
            regions=GPU,
            transfers=True,
            wait="block",
            cuda_graph=True,
            streams=4,
            batch=8,
            axes={"height": 320, "width": 640},
            sessions=1,
        )
    )
    assert line.startswith(
        "Latency (latency, batch 8, height 320, width 640, with copies, block, CUDA graph, 4 streams, n = 1000, "
        "1 session, 100 warm-up): "
    )


@pytest.mark.parametrize(("transfers", "said"), [(True, "with copies"), (False, "without copies")])
def test_copies_are_spoken_of_where_there_is_a_gpu_to_copy_to_alone(transfers, said):
    assert f", {said}, spin, " in latency_line(latency(regions=GPU, transfers=transfers))
    on_cpu = latency_line(latency(regions={"host_wall": region(0.5)}, transfers=transfers))
    assert "copies" not in on_cpu
    assert "spin" not in on_cpu


def test_a_duration_below_a_tenth_of_a_microsecond_is_still_a_number():
    line = latency_line(latency(p50_ms=0.0027, p95_ms=0.00005))
    assert "p50 0.0027 ms" in line
    assert float(re.search(r"p95 (\S+) ms", line).group(1)) == 0.00005


def comparison(**values):
    plain = Comparison(
        against="baseline",
        title="ort of bundles/tiny/ort",
        sha256="ab" * 32,
        ratios={
            "p50": RatioEstimate(ratio=1.031, interval=Interval(1.02, 1.042), sessions=5, sd=0.01),
            "p95": RatioEstimate(ratio=0.95, interval=Interval(0.9, 1.003), sessions=5, sd=0.04),
        },
        sessions=5,
        seconds=3.25,
        checks=("latency.regression_p50",),
        stopped="decided after 5 sessions",
    )
    return msgspec.structs.replace(plain, **values)


def test_a_comparison_says_how_much_slower_or_faster_with_its_interval():
    assert comparison_line(comparison()) == (
        "Against ort of bundles/tiny/ort, in turn with it in 5 sessions: p50 +3.10 % (+2.00 to +4.20 %), "
        "p95 -5.00 % (-10.00 to +0.30 %); decided after 5 sessions, 3.2 s"
    )
    assert "in turn with it in 1 session: " in comparison_line(comparison(sessions=1))


def test_an_interval_without_bounds_is_no_crash_and_no_number():
    one = RatioEstimate(ratio=1.0, interval=Interval(0.0, float("inf")), sessions=1, sd=0.0)
    line = comparison_line(comparison(ratios={"p50": one}, sessions=1))
    assert "p50 +0.00 % (-100.00 to +inf %)" in line


def test_regions_have_a_row_each_where_there_are_several():
    assert list(region_rows(latency(regions={"host_wall": region(0.5)}))) == []
    rows = list(region_rows(latency(regions=GPU)))
    assert [row[0] for row in rows] == list(GPU)
    assert all(len(row) == len(LATENCY_HEADINGS) for row in rows)
    assert rows[2] == ("enqueue", "0.0020", "0.0040", "0.0060", "0.0020")


def stage(name, ms, share):
    return StageSummary(
        stage=name, n=100, mean_ms=ms, sd_ms=ms / 10, p50_ms=ms, p95_ms=1.5 * ms, p99_ms=2 * ms, share=share
    )


def test_stages_have_a_row_each_with_their_share():
    rows = list(stage_rows(result(stages=(stage("inference", 5.0, 0.25), stage("total", 20.0, 1.0)))))
    assert rows == [
        ("inference", "5", "0.50", "5", "7.50", "10", "25.0 %"),
        ("total", "20", "2", "20", "30", "40", "100.0 %"),
    ]
    assert all(len(row) == len(STAGE_HEADINGS) for row in rows)
    assert list(stage_rows(result())) == []


def test_what_the_system_does_not_say_is_left_out_and_not_called_zero():
    usage = UsageMetrics(batch=8, sessions=5, cpu_percent=99.5)
    assert list(resource_lines(result(usage=usage))) == [
        "While it runs without a pause (batch 8, 5 sessions): CPU 99.50 %"
    ]
    silent = UsageMetrics(batch=1, sessions=1)
    assert list(resource_lines(result(usage=silent))) == [
        "While it runs without a pause (batch 1, 1 session): the system does not say"
    ]
    assert list(resource_lines(result())) == []


def test_usage_says_power_energy_and_utilisation_with_their_units():
    usage = UsageMetrics(batch=8, sessions=5, energy_mj=41.5, power_w=250.0, gpu_percent=80.25, cpu_percent=12.0)
    (line,) = resource_lines(result(usage=usage))
    assert line.endswith(": power 250 W, energy per inference 41.50 mJ, GPU 80.25 %, CPU 12 %")


def test_memory_is_that_of_the_fresh_process():
    memory = MemoryUse(device_steady_mib=300.0, host_peak_mib=0.5)
    assert list(resource_lines(result(memory=memory))) == [
        "Memory in a fresh process, all engines of it together: device, steady 300.0 MiB, host, peak 512 KiB"
    ]


def test_the_terminal_has_every_measurement_then_stages_then_what_it_takes():
    first = latency(name="batch=1", regions=GPU, comparisons=(comparison(),), notes=("the clocks are not known",))
    found = list(
        timing_lines(
            result(
                latencies=(first, latency(name="batch=8", batch=8)),
                stages=(stage("inference", 5.0, 0.25), stage("total", 20.0, 1.0)),
                usage=UsageMetrics(batch=1, sessions=5, cpu_percent=99.0),
            )
        )
    )
    assert found[0].startswith("Latency (host_wall, batch 1, ")
    assert found[1].startswith("  Against ort of bundles/tiny/ort, ")
    assert found[2] == "  the clocks are not known"
    assert found[3].split() == ["region", "p50", "ms", "p95", "ms", "p99", "ms", "mean", "ms"]
    assert [line.split()[0] for line in found[4:9]] == list(GPU)
    assert found[9].startswith("Latency (host_wall, batch 8, ")
    assert found[10].split()[0] == "stage"
    assert [line.split()[0] for line in found[11:13]] == ["inference", "total"]
    assert found[13].startswith("While it runs without a pause ")
    assert len(found) == 14


def test_columns_of_a_table_end_at_the_same_place():
    lines = list(timing_lines(result(latencies=(latency(regions=GPU),))))[1:]
    assert len({len(line) for line in lines}) == 1
    assert all(line.startswith("  ") for line in lines)


def test_nothing_measured_is_nothing_said():
    assert list(timing_lines(result(latencies=()))) == []
