"""The tables of latency: every batch size and shape, and what contradicts itself."""

import math
from pathlib import Path

import pytest

from gate.errors import SpecError
from gate.latency.config import (
    Cell,
    LatencySpec,
    RegressionSpec,
    SpeedupSpec,
    latency_checks,
    latency_limits,
    latency_problems,
    percent_from,
    percent_of,
    timed_tables,
)
from gate.spec import spec_from_text

HEAD = """schema = 1
[model]
id = "m"
onnx = "m.onnx"
[inputs.x]
dtype = "float32"
shape = ["batch", 3, "height"]
batch = { min = 1, opt = 4, max = 16 }
height = { min = 8, opt = 16, max = 64 }
[data]
source = "data.npz"
samples = 10
[[engine]]
name = "e"
backend = "onnxruntime"
precision = "fp32"
"""
AXES = {"batch": (1, 16), "height": (8, 64)}


def problems(latency, *, batch_axis="batch", axes=AXES):
    return list(latency_problems(latency, batch_axis=batch_axis, axes=axes))


def test_a_table_of_one_size_has_one_cell_without_a_name():
    (table,) = timed_tables(LatencySpec(p50_ms=1.0, batch=8))
    assert table.key == ("latency",)
    assert table.cells == (Cell(batch=8),)
    assert table.cells[0].check("latency.p50_ms") == "latency.p50_ms"


def test_every_batch_size_is_measured_with_every_shape():
    (table,) = timed_tables(LatencySpec(p50_ms=1.0, batch=(1, 8), axes={"height": (16, 32), "width": 4}))
    assert [(each.batch, each.axes) for each in table.cells] == [
        (1, {"height": 16, "width": 4}),
        (1, {"height": 32, "width": 4}),
        (8, {"height": 16, "width": 4}),
        (8, {"height": 32, "width": 4}),
    ]
    assert table.cells[1].name == "batch=1,height=32,width=4"
    assert table.cells[1].check("latency.p99_ms") == "latency.p99_ms[batch=1,height=32,width=4]"


def test_cells_of_several_tables_have_names_and_places():
    tables = timed_tables((LatencySpec(p50_ms=1.0), LatencySpec(p50_ms=2.0, batch=8)))
    assert [table.key for table in tables] == [("latency", 0), ("latency", 1)]
    assert [cell.name for table in tables for cell in table.cells] == ["batch=1", "batch=8"]


def test_one_table_in_a_list_of_one_has_no_name():
    (table,) = timed_tables((LatencySpec(p50_ms=1.0),))
    assert (table.key, table.cells[0].name) == (("latency", 0), "")


def test_without_a_table_there_is_nothing_to_time():
    assert timed_tables(None) == ()
    assert latency_checks(None) == ()


def test_every_check_that_is_asked_for_is_named():
    spec = LatencySpec(
        batch=(1, 8),
        p50_ms=1.0,
        p99_9_ms=1.0,
        throughput_at_least=1.0,
        regression=RegressionSpec(),
        speedup=SpeedupSpec(at_least=1.5),
    )
    names = ("p50_ms", "p99_9_ms", "throughput", "regression_p50", "regression_p95", "speedup")
    assert latency_checks(spec) == tuple(f"latency.{name}[batch={size}]" for size in (1, 8) for name in names)
    assert latency_checks(LatencySpec(regression=RegressionSpec(p95="5 %"))) == ("latency.regression_p95",)


def test_what_it_is_timed_against_is_named_once():
    spec = LatencySpec(regression=RegressionSpec(against="reference"), speedup=SpeedupSpec(at_least=2.0))
    assert spec.rivals == ("reference",)
    assert LatencySpec(regression=RegressionSpec()).rivals == ("baseline",)
    assert LatencySpec(p50_ms=1.0).rivals == ()


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, True),
        ({"timed": "latency"}, True),
        ({"timed": "gpu_compute"}, False),
        ({"timed": "gpu_compute", "transfers": True}, True),
        ({"transfers": False}, False),
    ],
)
def test_what_is_timed_says_whether_inputs_are_copied(settings, copies):
    assert LatencySpec(p50_ms=1.0, **settings).copies is copies


def test_a_regression_has_limits_of_its_own_or_the_usual_ones():
    assert RegressionSpec().limits == {"p50": 3.0, "p95": 5.0}
    assert RegressionSpec(p50="2.5 %").limits == {"p50": 2.5}
    assert RegressionSpec(p50=2, p95=" 10% ").limits == {"p50": 2.0, "p95": 10.0}


@pytest.mark.parametrize(
    ("value", "percent"), [("3 %", 3.0), ("3%", 3.0), (" 0.5 % ", 0.5), (3, 3.0), (0.25, 0.25), ("0 %", 0.0)]
)
def test_a_share_is_percent(value, percent):
    assert percent_from(value) == percent


@pytest.mark.parametrize("value", ["3", "", "%", "-3 %", "3 % more", "nan %", "inf %", "1e3 %", "3,5 %", "0x1 %"])
def test_what_is_no_share_is_an_error(value):
    with pytest.raises(SpecError, match='a share is written "3 %" or 3.0, got'):
        percent_from(value)


@pytest.mark.parametrize(("at_least", "percent"), [(1.5, 50.0), (0.8, 20.0), (1.0, 1.0), (1.001, 1.0)])
def test_the_tolerance_of_a_speedup_is_its_distance_from_one(at_least, percent):
    assert percent_of(SpeedupSpec(at_least=at_least)) == pytest.approx(percent)


def test_a_table_without_contradictions_has_no_problem():
    assert problems(LatencySpec(p50_ms=1.0, batch=(1, 16), axes={"height": (8, 64)})) == []
    assert problems(LatencySpec(p50_ms=1.0), batch_axis=1, axes={}) == []
    assert problems(LatencySpec(p50_ms=1.0, batch=4), batch_axis=4, axes={}) == []


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({}, ("latency",), "has no budget; it takes p50_ms, p90_ms, p95_ms, p99_ms, p99_9_ms, throughput_at_least"),
        ({"p50_ms": 1.0, "batch": 17}, ("latency", "batch"), r"batch = 17 is outside the profile \(1 to 16\)"),
        (
            {"p50_ms": 1.0, "axes": {"height": (8, 7)}},
            ("latency", "axes", "height"),
            r"height = 7 is outside the profile \(8 to 64\)",
        ),
        (
            {"p50_ms": 1.0, "axes": {"width": 8}},
            ("latency", "axes", "width"),
            "axes has 'width', which no input has as a dynamic axis",
        ),
        (
            {"p50_ms": 1.0, "timed": "latency", "transfers": False},
            ("latency", "transfers"),
            "transfers = false contradicts it",
        ),
        (
            {"streams": 2, "speedup": SpeedupSpec(at_least=2.0)},
            ("latency", "streams"),
            "they need streams = 1",
        ),
        (
            {"streams": 2, "p50_ms": 1.0, "timed": "gpu_compute"},
            ("latency", "streams"),
            'only timed = "host_wall" says what one took',
        ),
        ({"regression": RegressionSpec(p50="fast")}, ("latency", "regression"), "a share is written"),
        ({"regression": RegressionSpec(p95="0 %")}, ("latency", "regression", "p95"), "regression p95 is above 0 %"),
        ({"p50_ms": 1.0, "batch": (1, 1)}, ("latency",), "measures batch=1 twice"),
        ({"p50_ms": 1.0, "axes": {"batch": 8}}, ("latency", "axes", "batch"), "the first axis: its size is batch"),
        ({"p99_9_ms": math.inf}, ("latency", "p99_9_ms"), "p99_9_ms is a finite number above 0, got inf"),
        ({"throughput_at_least": math.nan}, ("latency", "throughput_at_least"), "finite number above 0, got nan"),
        (
            {"speedup": SpeedupSpec(at_least=math.inf)},
            ("latency", "speedup", "at_least"),
            "at_least is a finite number above 0, got inf",
        ),
    ],
)
def test_what_contradicts_itself_is_named_with_its_key(settings, key, message):
    with pytest.raises(SpecError, match=message):
        raise SpecError(" | ".join(text for at, text in problems(LatencySpec(**settings)) if at == key))


@pytest.mark.parametrize("batch", [1, 99, (4, 8)])
def test_another_batch_than_that_of_a_fixed_first_axis_is_a_problem(batch):
    said = problems(LatencySpec(p50_ms=1.0, batch=batch), batch_axis=4, axes={})
    wrong = 8 if batch == (4, 8) else batch
    assert said == [
        (
            ("latency", "batch"),
            f"[engine.latency] batch = {wrong}, and the first axis of the inputs is fixed: batch = 4 is what can be timed",
        )
    ]


@pytest.mark.parametrize("axis", ["n", "batch"])
def test_the_first_axis_is_no_other_axis_whatever_it_is_called(axis):
    said = problems(LatencySpec(p50_ms=1.0, axes={axis: (1, 16)}), batch_axis="n", axes={"n": (1, 16)})
    assert said == [
        (("latency", "axes", axis), f"[engine.latency] axes has {axis!r}, the first axis: its size is batch")
    ]


def test_limits_are_by_check():
    table = LatencySpec(
        batch=(1, 8),
        p99_ms=2.0,
        throughput_at_least=5.0,
        regression=RegressionSpec(p50="3 %"),
        speedup=SpeedupSpec(at_least=2.0),
    )
    found = latency_limits(table)
    assert tuple(found) == latency_checks(table)
    assert found["latency.throughput[batch=8]"] == 5.0
    assert found["latency.regression_p50[batch=1]"] == 3.0
    assert found["latency.speedup[batch=8]"] == 2.0
    assert latency_limits(None) == {}


def test_a_list_without_tables_is_a_problem():
    assert problems(()) == [(("latency",), "[[engine.latency]] has no table")]


def test_two_tables_of_one_size_are_a_problem():
    assert problems((LatencySpec(p50_ms=1.0), LatencySpec(p99_ms=1.0))) == [
        (("latency",), "[[engine.latency]] measures batch=1 twice")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine.latency]\nbatch = 2\n", r"gate\.toml:17: .*\[engine\.latency\] has no budget"),
        ("[engine.latency]\np50_ms = 1.0\nbatch = [1, 99]\n", r"gate\.toml:19: .*batch = 99 is outside the profile"),
        ("[engine.latency]\np50_ms = 1.0\naxes = { width = 1 }\n", r"gate\.toml:19: .*axes has 'width'"),
        ("[engine.latency]\np50_ms = 1.0\nsessions = 4\n", r"gate\.toml:19: .*sessions: expected int >= 5, got 4"),
        ("[engine.latency]\np50_ms = 0.0\n", r"gate\.toml:18: .*p50_ms.*> 0"),
        ("[engine.latency]\np50_ms = nan\n", r"gate\.toml:18: .*p50_ms"),
        ("[engine.latency]\np50_ms = 1.0\nbatch = []\n", r"gate\.toml:19: .*batch"),
        ("[engine.latency]\np50_ms = 1.0\nstreams = 0\n", r"gate\.toml:19: .*streams"),
        ("[engine.latency]\np42_ms = 1.0\n", r"gate\.toml:18: \[engine\.latency\] has no key 'p42_ms'"),
        ('[engine.latency]\nregression = { p50 = "3" }\n', r"gate\.toml:18: .*a share is written"),
        ("[engine.latency]\nspeedup = { at_least = 0.0 }\n", r"gate\.toml:18: .*at_least"),
        ("[engine.latency]\nspeedup = {}\n", r"gate\.toml:18: .*at_least"),
        (
            '[engine.latency]\nspeedup = { at_least = 2.0, against = "e" }\n',
            r"gate\.toml:1[78]: .*is the engine itself",
        ),
        (
            '[engine.latency]\nspeedup = { at_least = 2.0, against = "other" }\n',
            r"gate\.toml:1[78]: .*neither baseline, reference, an engine nor the path of a bundle",
        ),
        (
            "[[engine.latency]]\np50_ms = 1.0\n[[engine.latency]]\np50_ms = 1.0\nbatch = 99\n",
            r"gate\.toml:21: .*batch = 99 is outside the profile",
        ),
        ("[[engine.latency]]\np50_ms = 1.0\n[[engine.latency]]\nbatch = 2\n", r"gate\.toml:19: .*has no budget"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(text, message):
    with pytest.raises(SpecError, match=message):
        spec_from_text(HEAD + text, path=Path("gate.toml"))
