"""Lowering: each precision, made for real, compiled by TensorRT-RTX and run by ONNX Runtime where that can."""

import logging

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from gate.engines import backend
from gate.errors import LoweringError
from gate.export import onnx_from_torch
from gate.lower import lower, tool_version
from gate.precision import check_delivered_precision
from gate.spec import EngineSpec, GateSpec
from gate.verdict import Evidence, Status

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((48, 1, 8, 8)).astype(np.float32)
CALIBRATION = tuple({"image": IMAGES[start : start + 16]} for start in (0, 16, 32))
SPEC = msgspec.convert(
    {
        "schema": 1,
        "model": {"id": "m", "factory": "model:load", "exporter": ["torchscript"]},
        "inputs": {
            "image": {
                "dtype": "float32",
                "shape": ["batch", 1, 8, 8],
                "axes": {"batch": {"min": 1, "opt": 4, "max": 16}},
            }
        },
        "data": {"source": "a:b", "samples": 1},
        "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}}],
    },
    GateSpec,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = nn.functional.silu(self.norm(self.one(image)))
        x = torch.relu(self.two(x)) + x[:, :, 1:-1, 1:-1]
        return {"logits": self.head(x.mean((2, 3))), "best": x.mean((2, 3)).argmax(1)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("export") / "model.onnx"
    onnx_from_torch(Net().eval(), spec=SPEC, out=out, feeds=[{"image": IMAGES[:4]}])
    return out


def engine(name, precision):
    return msgspec.convert({"name": "e", "backend": name, "precision": precision, "parity": {}}, EngineSpec)


def run(path, precision="fp32"):
    with backend("onnxruntime").open(path, spec=SPEC, engine=engine("onnxruntime", precision)) as runner:
        return runner.run({"image": IMAGES[:16]})


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_tensorrt_rtx_compiles_each_precision_and_its_layers_have_it(tmp_path, exported, precision):
    lowered, plan = tmp_path / "model.onnx", tmp_path / "model.plan"
    record = lower(exported, precision=precision, out=lowered, calibration=CALIBRATION)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    rtx = backend("tensorrt_rtx")
    built = rtx.build(onnx=lowered, out=plan, spec=SPEC, engine=engine("tensorrt_rtx", precision))
    found = check_delivered_precision(built, evidence=Evidence.PREFLIGHT)
    assert found.status is Status.PASSED, found
    assert found.n == 3
    assert built.layers_source == "network"
    assert plan.stat().st_size > 10_000
    assert record.precision == precision
    assert record.opset == (22 if precision == "bf16" else SPEC.model.opset)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 0.0), ("fp16", 2e-3), ("int8", 5e-2)])
def test_lowered_graph_computes_nearly_the_same_on_onnx_runtime(tmp_path, exported, precision, limit):
    lowered = tmp_path / "model.onnx"
    lower(exported, precision=precision, out=lowered, calibration=CALIBRATION)
    want, got = run(exported)["logits"], run(lowered, precision)["logits"]
    assert got.dtype == np.float32
    error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    assert error <= limit
    assert (error > 0) == (precision != "fp32")
    built = backend("onnxruntime").build(
        onnx=lowered, out=tmp_path / "b" / "model.onnx", spec=SPEC, engine=engine("onnxruntime", precision)
    )
    assert check_delivered_precision(built, evidence=Evidence.HOST).status is Status.PASSED


def test_record_of_int8_has_ranges_that_cover_what_was_seen(tmp_path, exported):
    record = lower(exported, precision="int8", out=tmp_path / "model.onnx", calibration=CALIBRATION)
    calibration = record.calibration
    assert calibration is not None
    assert (calibration.method, calibration.samples) == ("minmax", 48)
    seen = {each.name: each for each in calibration.ranges}
    assert seen["image"].high == pytest.approx(float(np.abs(IMAGES).max()), rel=1e-6)
    assert seen["image"].low == -seen["image"].high
    assert record.counts["int8"] >= 3
    assert record.tool_version


def test_int8_weights_are_per_channel_and_no_bias_is_quantised(tmp_path, exported):
    lower(exported, precision="int8", out=tmp_path / "model.onnx", calibration=CALIBRATION)
    model = onnx.load(tmp_path / "model.onnx")
    values = {each.name: each for each in model.graph.initializer}
    dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert dequantized
    for node in dequantized:
        if node.input[0] in values:
            assert values[node.input[0]].data_type == TensorProto.INT8
            assert len(values[node.input[1]].dims) == 1
        assert not np.any(numpy_helper.to_array(values[node.input[2]]))


def test_same_calibration_in_other_batches_gives_the_same_graph_and_digest(tmp_path, exported):
    first = lower(exported, precision="int8", out=tmp_path / "a.onnx", calibration=CALIBRATION)
    again = lower(exported, precision="int8", out=tmp_path / "b.onnx", calibration=[{"image": IMAGES}])
    assert first.calibration is not None
    assert again.calibration is not None
    assert first.calibration.sha256 == again.calibration.sha256
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_value_that_float16_cannot_hold_stays_in_fp32_where_samples_show_it(tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["image", "w"], ["big"], name="big"),
            helper.make_node("MatMul", ["big", "v"], ["small"], name="small"),
            helper.make_node("MatMul", ["small", "w"], ["back"], name="back"),
            helper.make_node("MatMul", ["image", "u"], ["usual"], name="usual"),
            helper.make_node("Add", ["back", "usual"], ["logits"], name="sum"),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [
            numpy_helper.from_array(np.eye(8, dtype=np.float32) * 5e4, "w"),
            numpy_helper.from_array(np.eye(8, dtype=np.float32) * 2e-5, "v"),
            numpy_helper.from_array(np.eye(8, dtype=np.float32), "u"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "source.onnx")
    record = lower(tmp_path / "source.onnx", precision="fp16", out=tmp_path / "out.onnx", calibration=CALIBRATION)
    by_name = {layer.name: layer.precision for layer in record.layers}
    assert by_name["big"] == "fp32"
    assert by_name["usual"] == "fp16"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "int8 needs calibration samples"),
        ([], "the calibration has no samples"),
        ([{"image": IMAGES[:0]}], "the calibration has no samples"),
        ([{"image": np.full((4, 1, 8, 8), np.nan, np.float32)}], "256 values that are not finite"),
        (
            [{"image": IMAGES[:4]}, {"image": IMAGES[:4] * np.float32(np.inf)}],
            "not finite, in the batch that begins with sample 4",
        ),
        ([{"image": np.full((4, 1, 8, 8), 0.5, np.float32)}], "every calibration value of input 'image' is 0.5"),
        ([{"picture": IMAGES[:4]}], "have the inputs picture, the graph takes image"),
        ([{"image": IMAGES[:4, :, :4]}], r"has the shape \[4, 1, 4, 8\], the graph takes \[batch, 1, 8, 8\]"),
        ([{"image": IMAGES[:4].astype(np.float64)}], "is float64, the graph takes float32"),
    ],
)
def test_degenerate_calibration_is_an_error(tmp_path, exported, batches, message):
    with pytest.raises(LoweringError, match=message):
        lower(exported, precision="int8", out=tmp_path / "model.onnx", calibration=batches)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_graph_in_which_nothing_can_be_lowered_is_an_error(tmp_path, precision):
    graph = helper.make_graph(
        [helper.make_node("Cast", ["image"], ["logits"], to=TensorProto.INT64)],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", 1, 8, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "source.onnx")
    with pytest.raises(LoweringError, match=r"nothing was lowered|cannot make"):
        lower(tmp_path / "source.onnx", precision=precision, out=tmp_path / "out.onnx", calibration=CALIBRATION)
    assert not (tmp_path / "out.onnx").exists()


def test_file_that_is_no_onnx_is_an_error(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff\x00")
    with pytest.raises(LoweringError, match="cannot be read as ONNX"):
        lower(tmp_path / "a.onnx", precision="fp16", out=tmp_path / "b.onnx")


def test_missing_tool_says_what_to_install(monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(LoweringError, match=r'pip install "trt-gate\[lower\]"'):
        tool_version("bf16")
    assert tool_version("fp32") == "copy"


def test_unknown_precision_is_an_error(tmp_path, exported):
    with pytest.raises(LoweringError, match="no tool makes 'fp4'"):
        lower(exported, precision="fp4", out=tmp_path / "model.onnx")


def test_nothing_is_printed_and_no_handler_is_left(tmp_path, exported, capfd):
    before = list(logging.getLogger().handlers)
    for precision in ("fp16", "bf16", "int8"):
        lower(exported, precision=precision, out=tmp_path / precision, calibration=CALIBRATION)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == before


def test_folder_of_the_source_is_left_as_it_was(tmp_path, exported):
    before = sorted(each.name for each in exported.parent.iterdir())
    for precision in ("fp16", "int8"):
        lower(exported, precision=precision, out=tmp_path / "model.onnx", calibration=CALIBRATION)
    assert sorted(each.name for each in exported.parent.iterdir()) == before
