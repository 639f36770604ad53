"""Whether the layers got the precision that was asked for."""

from pathlib import Path

import msgspec
import pytest

from gate.engines.interface import BuildRecord, Layer
from gate.precision import check_delivered_precision, compute_layers, excluded_by
from gate.spec import LoweringSpec, read_spec
from gate.steps.judge import _build_findings
from gate.steps.make import Made
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


NODES = tuple(
    Layer(name, kind, "fp16")
    for name, kind in [("/a/Conv", "Conv"), ("/a/Relu", "Relu"), ("/b/Conv", "Conv"), ("/head/Gemm", "Gemm")]
)


def check_excluding(layers, nodes=NODES, **lowering):
    built = msgspec.structs.replace(record("fp16"), layers=tuple(Layer(*each) for each in layers))
    excluded = excluded_by(LoweringSpec(**lowering), nodes)
    return check_delivered_precision(built, evidence=Evidence.PREFLIGHT, excluded=excluded)


FOUR = [("/a/Conv", "Conv", "fp16"), ("/b/Conv", "Conv", "fp16"), ("/c/Conv", "Conv", "fp16")]


@pytest.mark.parametrize("lowering", [{"exclude_nodes": ("/head/.*",)}, {"exclude_ops": ("Gemm",)}])
def test_a_node_that_the_spec_excludes_does_not_count_and_is_named(lowering):
    found = check_excluding([*FOUR, ("/head/Gemm", "Gemm", "fp32")], **lowering)
    assert (found.status, found.estimate, found.n) == (Status.PASSED, 1.0, 3)
    assert found.detail.endswith("; 1 excluded by the spec: /head/Gemm")


def test_another_node_than_the_excluded_one_still_fails():
    layers = [("/a/Conv", "Conv", "fp32"), *FOUR[1:], ("/head/Gemm", "Gemm", "fp32")]
    found = check_excluding(layers, exclude_nodes=("/head/Gemm",))
    assert found.status is Status.FAILED
    assert "not fp16: /a/Conv (Conv, fp32); 1 excluded by the spec: /head/Gemm" in found.detail


def test_a_whole_name_must_match():
    found = check_excluding([*FOUR, ("/head/Gemm", "Gemm", "fp32")], exclude_nodes=("/head", "Gemm"))
    assert found.status is Status.FAILED


def test_what_excludes_every_compute_layer_is_a_failure():
    found = check_excluding(FOUR, exclude_nodes=(".*",))
    assert isinstance(found, Failure)
    assert found.message == "the spec excludes every compute layer: /a/Conv, /b/Conv, /c/Conv"


@pytest.mark.parametrize(
    ("name", "lowering", "counts"),
    [
        ("/a/Conv + /a/Relu", {"exclude_nodes": ("/a/Conv",)}, False),
        ("/a/Conv + /a/Relu", {"exclude_ops": ("Conv",)}, False),
        ("/a/Conv + /a/Relu", {"exclude_nodes": ("/a/Relu",)}, True),
        ("/a/Conv + /b/Conv", {"exclude_nodes": ("/a/Conv",)}, True),
        ("/a/Conv + /b/Conv", {"exclude_nodes": ("/[ab]/Conv",)}, False),
        ("/other/Conv + /head/Gemm", {"exclude_ops": ("Gemm",)}, False),
    ],
)
def test_a_fused_layer_is_excluded_where_what_computes_in_it_is(name, lowering, counts):
    found = check_excluding([(name, "CaskConvolution", "fp32"), ("/c/Conv", "CaskConvolution", "fp16")], **lowering)
    assert found.n == (2 if counts else 1)


def test_a_fused_layer_of_a_graph_that_is_not_known_is_excluded_by_any_part():
    fused = [("/a/Conv + /a/Relu", "CaskConvolution", "fp32"), ("/c/Conv", "CaskConvolution", "fp16")]
    assert check_excluding(fused, nodes=(), exclude_nodes=("/a/Conv",)).n == 1


def test_a_plan_without_detailed_profiling_says_so():
    built = msgspec.structs.replace(record("fp16"), layers_source="inspector")
    found = check_delivered_precision(built, evidence=Evidence.PREFLIGHT)
    assert isinstance(found, Failure)
    assert found.message == ("the plan does not list its layers' precisions: it was built without detailed profiling")
    assert "trtexec --profilingVerbosity=detailed" in found.hint


def test_a_plan_of_the_teams_own_that_lists_no_layer_has_that_finding():
    file = read_spec(Path(__file__).parent / "data" / "sealed.toml")
    engine = msgspec.structs.replace(file.spec.engines[0], backend="tensorrt", plan="model.plan")
    built = msgspec.structs.replace(record("fp16"), layers_source="inspector")
    made = Made(Path("model.plan"), "0" * 64, built, None, None, ())
    (found,) = _build_findings(engine, made, 1, file=file)
    assert "without detailed profiling" in found.message
