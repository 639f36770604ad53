"""What the reports say of how an engine was made."""

import msgspec
import pytest

from gate.engines.interface import BuildRecord, CalibrationRecord, Layer, LoweringRecord, TensorRange
from gate.report.making import (
    RANGE_HEADINGS,
    calibrations,
    making_lines,
    nodes_by_precision,
    range_rows,
    reproduce_lines,
)
from gate.results import EngineResult

LAYERS = (
    Layer("/stem/Conv", "Conv", "int8"),
    Layer("/head/Gemm", "Gemm", "fp32"),
    Layer("/relu", "Relu", "fp32"),
)
CALIBRATION = CalibrationRecord(
    tool="onnxruntime 1.31.1",
    method="percentile",
    percentile=99.999,
    samples=200,
    sha256="0" * 64,
    ranges=(
        TensorRange(name="/stem/out", low=-1.0, high=1.0, clipped_fraction=0.0003),
        TensorRange(name="/dead", low=0.0, high=0.0, state="dead"),
        TensorRange(name="/wide", low=-9.0, high=9.0, clipped_fraction=0.02, state="outliers"),
    ),
)
LOWERING = LoweringRecord(
    precision="int8", tool="quantize_static", tool_version="1.31.1", opset=17, layers=LAYERS, calibration=CALIBRATION
)
BUILD = BuildRecord(
    backend="tensorrt",
    backend_version="8.6.0",
    precision="int8",
    options={},
    profile={},
    layers=(Layer("conv1", "CaskConvolution", "int8", tactic="sm80_i8i8"), Layer("fc", "MatrixMultiply", "fp16")),
    layers_source="inspector",
    log=("WARNING: slow",),
    seconds=12.34,
    digests={"libplug.so": "ab" * 32},
    command="trtexec --onnx=model.onnx",
    run_command="trtexec --loadEngine=model.plan",
)


def result(**changes):
    fields = {"lowering": LOWERING, "build": BUILD, "precision": "int8", **changes}
    return EngineResult(name="e", backend="tensorrt", verdict=None, **fields)


def test_lowering_names_the_compute_nodes_in_another_precision():
    first = next(iter(making_lines(result())))
    assert first == "lowered by quantize_static 1.31.1: 2 fp32, 1 int8; not int8: /head/Gemm (Gemm, fp32)"


def test_calibration_says_samples_clipping_and_what_is_odd():
    told = [*making_lines(result())][1]
    assert told == (
        "calibrated by onnxruntime 1.31.1, percentile 99.999, on 200 samples: 3 tensors, at most 2 % clipped (/wide), "
        "1 with outliers: /wide, 1 dead: /dead"
    )


def test_build_says_layers_time_log_and_what_it_was_made_with():
    told = [*making_lines(result(lowering=None))]
    assert told == [
        "layers by the inspector: 1 int8, 1 fp16; not int8: fc (MatrixMultiply, fp16)",
        "built by tensorrt 8.6.0 in 12.3 s, 1 warning or error in its log",
        f"made with libplug.so (sha256 {'ab' * 6}…)",
    ]


def test_calibration_by_the_compiler_is_told_too():
    build = msgspec.structs.replace(BUILD, calibration=CALIBRATION)
    assert next(iter(making_lines(result(lowering=None, build=build)))).startswith("calibrated by onnxruntime 1.31.1")


def test_the_graph_of_a_tf32_engine_is_an_fp32_one():
    copied = LoweringRecord(
        precision="tf32", tool="copy", tool_version="", opset=17, layers=(Layer("/c", "Conv", "fp32"),)
    )
    assert [*making_lines(result(lowering=copied, build=None, precision="tf32"))] == ["taken as it is: 1 fp32"]


def test_nodes_are_listed_by_their_precision():
    assert [*nodes_by_precision(result(build=None))] == [
        ("fp32, 2", "/head/Gemm (Gemm), /relu (Relu)"),
        ("int8, 1", "/stem/Conv (Conv)"),
    ]


def test_layers_of_the_engine_go_before_those_of_its_graph():
    assert [name for name, _ in nodes_by_precision(result())] == ["int8, 1", "fp16, 1"]


def test_long_lists_say_how_many_are_left_out():
    many = tuple(Layer(f"/n{index}", "Relu", "fp16") for index in range(250))
    ((name, text),) = nodes_by_precision(result(build=msgspec.structs.replace(BUILD, layers=many)))
    assert name == "fp16, 250"
    assert text.endswith("/n199 (Relu) and 50 more, all in report.json")


def test_commands_that_reproduce_build_and_latency_are_given():
    assert [*reproduce_lines(result())] == [
        ("build by hand", "trtexec --onnx=model.onnx"),
        ("time by hand", "trtexec --loadEngine=model.plan"),
    ]


@pytest.mark.parametrize("build", [None, msgspec.structs.replace(BUILD, command=None, run_command=None)])
def test_where_there_is_no_tool_there_is_no_command(build):
    assert [*reproduce_lines(result(build=build))] == []


def test_operators_of_pytorch_are_not_called_layers():
    build = msgspec.structs.replace(BUILD, layers_source="dispatch", layers=BUILD.layers[:1])
    assert next(iter(making_lines(result(lowering=None, build=build)))) == "operators run (dispatch): 1 int8"


def test_one_tensor_of_one_sample_is_singular():
    one = msgspec.structs.replace(CALIBRATION, ranges=CALIBRATION.ranges[1:2], samples=1)
    build = msgspec.structs.replace(BUILD, calibration=one)
    told = next(iter(making_lines(result(lowering=None, build=build))))
    assert told.endswith("on 1 sample: 1 tensor, 1 dead: /dead")


def test_ranges_have_a_row_each_with_dashes_for_what_was_not_counted():
    (record,) = calibrations(result())
    seen = msgspec.structs.replace(record.ranges[2], max_abs=90.0, p999_abs=0.5)
    found = [*range_rows(msgspec.structs.replace(record, ranges=(record.ranges[1], seen)))]
    assert found == [
        ("/dead", "0", "0", "-", "-", "-", "dead"),
        ("/wide", "-9", "9", "90", "0.500", "2 %", "outliers"),
    ]
    assert all(len(row) == len(RANGE_HEADINGS) for row in found)


def test_two_hundred_ranges_are_listed_and_the_others_counted():
    many = msgspec.structs.replace(CALIBRATION, ranges=CALIBRATION.ranges * 100)
    found = [*range_rows(many)]
    assert len(found) == 201
    assert found[-1][0] == "100 more, all in report.json"


def test_calibration_of_the_compiler_is_found_too():
    build = msgspec.structs.replace(BUILD, calibration=CALIBRATION)
    assert calibrations(result(lowering=None, build=build)) == (CALIBRATION,)
    assert calibrations(result(lowering=None)) == ()
