"""Whether the layers got the precision that was asked for."""

import pytest

from gate.engines.interface import BuildRecord, Layer
from gate.precision import check_delivered_precision, compute_layers
from gate.verdict import Evidence, Failure, Finding, Status


def record(precision, *layers):
    return BuildRecord(
        backend="fake",
        backend_version="1",
        precision=precision,
        options={},
        profile={},
        layers=tuple(Layer(f"layer{index}", kind, label) for index, (kind, label) in enumerate(layers)),
    )


def check(precision, *layers):
    return check_delivered_precision(record(precision, *layers), evidence=Evidence.PREFLIGHT)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_all_layers_in_the_precision_pass(precision):
    found = check(precision, ("Conv", precision), ("MATRIX_MULTIPLY", precision), ("Relu", "fp32"))
    assert found.status is Status.PASSED
    assert found.n == 2
    assert found.evidence is Evidence.PREFLIGHT


def test_fp16_engine_of_fp32_layers_fails_and_names_them():
    found = check("fp16", ("Conv", "fp32"), ("Gemm", "fp16"))
    assert found.status is Status.FAILED
    assert "layer0 (Conv, fp32)" in found.detail


@pytest.mark.parametrize("label", ["fp16", "tf32", "unknown"])
def test_one_other_layer_fails_fp32(label):
    assert check("fp32", *[("Conv", "fp32")] * 50, ("Conv", label)).status is Status.FAILED


def test_fp16_may_keep_one_layer_in_ten():
    assert check("fp16", *[("Conv", "fp16")] * 9, ("Conv", "fp32")).status is Status.PASSED
    assert check("fp16", *[("Conv", "fp16")] * 8, ("Conv", "fp32")).status is Status.FAILED


def test_engine_without_a_compute_layer_cannot_pass():
    found = check("fp16", ("Relu", "fp16"))
    assert isinstance(found, Failure)
    assert "has no compute layer" in found.message


def test_engine_that_lists_no_layer_cannot_pass():
    found = check("fp32")
    assert isinstance(found, Failure)
    assert "lists no layer" in found.message


def test_unknown_precision_cannot_pass():
    assert isinstance(check("fp7", ("Conv", "fp7")), Failure) or check("fp7", ("Conv", "fp7")).status is Status.FAILED
    assert isinstance(check("fp64", ("Conv", "fp64")), Failure)


def test_index_arithmetic_does_not_count():
    found = check("fp16", ("MatMul", "int64"), ("Conv", "fp16"))
    assert isinstance(found, Finding)
    assert (found.n, found.estimate) == (1, 1.0)
    assert len(compute_layers(record("fp16", ("MatMul", "int64")).layers)) == 0
