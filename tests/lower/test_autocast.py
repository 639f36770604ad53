"""fp16 and bf16: what the spec keeps in FP32."""

import pytest

from gate.errors import LoweringError
from gate.lower import lower
from gate.spec import LoweringSpec


def precisions(record):
    return {layer.name: layer.precision for layer in record.layers}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_excluded_nodes_and_operators_stay_in_fp32(tmp_path, wide, compile_by_rtx, precision):
    lowering = LoweringSpec(exclude_nodes=("/module/t.*/Conv",), exclude_ops=("Gemm",))
    out = tmp_path / "m.onnx"
    record = lower(wide, precision=precision, out=out, lowering=lowering)
    layers = precisions(record)
    assert layers["/module/two/Conv"] == layers["/module/three/Conv"] == layers["/module/head/Gemm"] == "fp32"
    assert layers["/module/one/Conv"] == precision
    assert record.notes == (
        "3 nodes excluded by the spec stay in fp32: /module/two/Conv, /module/three/Conv, /module/head/Gemm",
    )
    assert compile_by_rtx(out, tmp_path / "m.plan", precision).layers


def test_pattern_matches_whole_names_only(tmp_path, wide):
    with pytest.raises(LoweringError, match=r"'/module/two' matches no node of the graph's \d+") as caught:
        lower(wide, precision="fp16", out=tmp_path / "m.onnx", lowering=LoweringSpec(exclude_nodes=("/module/two",)))
    assert "Near it: /module/two/Conv." in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_small_data_max_keeps_what_real_samples_exceed(tmp_path, wide, batches):
    record = lower(
        wide, precision="fp16", out=tmp_path / "m.onnx", calibration=batches, lowering=LoweringSpec(data_max=1.5)
    )
    layers = precisions(record)
    assert layers["/module/one/Conv"] == "fp32"
    assert layers["/module/head/Gemm"] == "fp16"
    assert any("compute nodes are not fp16, since their values or weights do not fit" in note for note in record.notes)
    assert any("/module/one/Conv (Conv, fp32)" in note for note in record.notes)


def test_data_max_without_samples_says_what_it_was_held_against(tmp_path, wide):
    record = lower(wide, precision="bf16", out=tmp_path / "m.onnx", lowering=LoweringSpec(data_max=1e4))
    assert any("data_max = 10000 was held against the values of one random input" in note for note in record.notes)
    assert precisions(record)["/module/one/Conv"] == "bf16"


def test_nothing_is_noted_where_all_is_lowered(tmp_path, wide):
    assert lower(wide, precision="fp16", out=tmp_path / "m.onnx").notes == ()
