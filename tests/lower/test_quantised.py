"""int8 and fp8 by each tool and method: compiled by TensorRT-RTX, run by ONNX Runtime, reported."""

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
from gate.spec import EngineSpec, LoweringSpec
from gate.verdict import Evidence, Status
from tests.lower.conftest import IMAGES, SPEC

WAYS = [
    ("int8", LoweringSpec()),
    ("int8", LoweringSpec(tool="onnxruntime", method="entropy")),
    ("int8", LoweringSpec(method="percentile")),
    ("int8", LoweringSpec(tool="modelopt")),
    ("int8", LoweringSpec(tool="modelopt", method="max")),
    ("fp8", LoweringSpec()),
]
METHODS = ["minmax", "entropy", "percentile", "entropy", "max", "max"]
IDS = ["ort-minmax", "ort-entropy", "ort-percentile", "modelopt-entropy", "modelopt-max", "fp8"]
LIMITS = {"int8": 3e-2, "fp8": 6e-2}


def interface(path):
    graph = onnx.load(path).graph
    return [(each.name, each.type.tensor_type.elem_type) for each in (*graph.input, *graph.output)]


@pytest.mark.parametrize(("precision", "lowering"), WAYS, ids=IDS)
def test_each_way_compiles_and_answers_nearly_the_same(
    tmp_path, wide, batches, run, compile_by_rtx, precision, lowering
):
    out = tmp_path / "model.onnx"
    record = lower(wide, precision=precision, out=out, calibration=batches, lowering=lowering)
    assert interface(out) == interface(wide)
    built = compile_by_rtx(out, tmp_path / "model.plan", precision)
    found = check_delivered_precision(built, evidence=Evidence.PREFLIGHT)
    assert found.status is Status.PASSED, found
    assert found.n == 4
    want, got = run(wide, "fp32"), run(out, precision)
    error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    assert 0 < error <= LIMITS[precision]
    layers = {layer.name: layer.precision for layer in record.layers}
    assert layers["/module/two/Conv"] == layers["/module/three/Conv"] == layers["/module/head/Gemm"] == precision
    assert layers["/module/Sigmoid"] == "fp32"
    assert record.tool_version


@pytest.mark.parametrize(("way", "method"), list(zip(WAYS, METHODS, strict=True)), ids=IDS)
def test_calibration_record_says_what_was_seen(tmp_path, wide, batches, images, way, method):
    precision, lowering = way
    record = lower(wide, precision=precision, out=tmp_path / "m.onnx", calibration=batches, lowering=lowering)
    calibration = record.calibration
    assert calibration is not None
    assert (calibration.method, calibration.samples) == (method, len(images))
    assert calibration.tool == tool_version(precision, lowering)
    ranges = {each.name: each for each in calibration.ranges}
    assert {"/module/Mul_output_0", "/module/Add_output_0", "/module/ReduceMean_output_0"} <= set(ranges)
    for each in ranges.values():
        assert each.state == "ok", each
        assert each.high == -each.low > 0
        assert 0 < each.p999_abs <= each.max_abs
        assert 0 <= each.clipped_fraction < 0.05
        if method in ("minmax", "max"):
            assert each.clipped_fraction == 0
            assert each.high == pytest.approx(each.max_abs, rel=1e-5) or (
                precision == "fp8" and each.high > each.max_abs
            )
    if precision == "int8":
        assert ranges["image"].max_abs == float(np.abs(images).max())


def test_lower_percentile_clips_that_share(tmp_path, wide, batches):
    record = lower(
        wide,
        precision="int8",
        out=tmp_path / "m.onnx",
        calibration=batches,
        lowering=LoweringSpec(method="percentile", percentile=95.0),
    )
    assert record.calibration is not None
    image = next(each for each in record.calibration.ranges if each.name == "image")
    assert image.clipped_fraction == pytest.approx(0.05, abs=0.01)
    assert any("lie outside the range of" in note for note in record.calibration.notes)


@pytest.mark.parametrize(("precision", "lowering"), WAYS, ids=IDS)
def test_same_samples_give_the_same_bytes(tmp_path, wide, batches, precision, lowering):
    for name in ("a.onnx", "b.onnx"):
        lower(wide, precision=precision, out=tmp_path / name, calibration=iter(batches), lowering=lowering)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_onnx_runtime_quantises_the_same_after_model_optimizer(tmp_path, wide, batches, method):
    from onnxruntime.quantization import calibrate
    from onnxruntime.quantization.registry import QDQRegistry

    lowering = LoweringSpec(method=method)
    lower(wide, precision="int8", out=tmp_path / "a.onnx", calibration=batches, lowering=lowering)
    before = (
        dict(QDQRegistry),
        dict(vars(calibrate.HistogramCollector)),
        dict(vars(calibrate.CalibraterBase)),
        calibrate.create_calibrator,
    )
    lower(wide, precision="int8", out=tmp_path / "m", calibration=batches, lowering=LoweringSpec(tool="modelopt"))
    after = (
        dict(QDQRegistry),
        dict(vars(calibrate.HistogramCollector)),
        dict(vars(calibrate.CalibraterBase)),
        calibrate.create_calibrator,
    )
    assert before == after
    lower(wide, precision="int8", out=tmp_path / "b.onnx", calibration=batches, lowering=lowering)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize(("precision", "lowering"), WAYS, ids=IDS)
def test_excluded_nodes_and_operators_stay_in_fp32(tmp_path, wide, batches, run, precision, lowering):
    out = tmp_path / "model.onnx"
    chosen = LoweringSpec(
        tool=lowering.tool, method=lowering.method, exclude_nodes=("/module/t.o/Conv",), exclude_ops=("Gemm",)
    )
    record = lower(wide, precision=precision, out=out, calibration=batches, lowering=chosen)
    layers = {layer.name: layer.precision for layer in record.layers}
    assert layers["/module/two/Conv"] == layers["/module/head/Gemm"] == "fp32"
    assert layers["/module/three/Conv"] == precision
    assert "2 nodes excluded by the spec stay in fp32: /module/two/Conv, /module/head/Gemm" in record.notes
    assert run(out, precision).shape == (48, 16)


def test_what_model_optimizer_leaves_is_named(tmp_path, wide, batches):
    record = lower(wide, precision="fp8", out=tmp_path / "m.onnx", calibration=batches)
    assert any("1 of 4 compute nodes are not fp8" in note and "/module/one/Conv" in note for note in record.notes)
    assert record.opset >= 19
    assert any(note == f"opset raised from 17 to {record.opset}" for note in record.notes)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_everything_excluded_is_an_error(tmp_path, wide, batches, precision):
    with pytest.raises(LoweringError, match="nothing was lowered"):
        lower(
            wide,
            precision=precision,
            out=tmp_path / "m.onnx",
            calibration=batches,
            lowering=LoweringSpec(exclude_nodes=(".*",)),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "lowering", "message"),
    [
        ("int8", LoweringSpec(tool="modelopt", method="minmax"), "modelopt does not make int8 by method 'minmax'"),
        ("int8", LoweringSpec(method="max"), "onnxruntime does not make int8 by method 'max'"),
        ("fp8", LoweringSpec(tool="onnxruntime"), "onnxruntime does not make fp8"),
        ("fp8", LoweringSpec(method="entropy"), "modelopt does not make fp8 by method 'entropy'"),
    ],
)
def test_method_that_the_tool_does_not_have_is_an_error(tmp_path, wide, batches, precision, lowering, message):
    with pytest.raises(LoweringError, match=message):
        lower(wide, precision=precision, out=tmp_path / "m.onnx", calibration=batches, lowering=lowering)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantising_without_calibration_is_an_error(tmp_path, wide, precision):
    with pytest.raises(LoweringError, match=f"{precision} needs calibration samples"):
        lower(wide, precision=precision, out=tmp_path / "m.onnx")


def test_version_names_the_chosen_tool():
    assert tool_version("int8").startswith("onnxruntime ")
    assert tool_version("int8", LoweringSpec(tool="modelopt")).startswith("nvidia-modelopt ")
    assert tool_version("fp8").startswith("nvidia-modelopt ")
    assert tool_version("int8", LoweringSpec(tool="none")) == "copy"


def test_too_few_samples_are_named(tmp_path, wide, images):
    record = lower(wide, precision="int8", out=tmp_path / "m.onnx", calibration=[{"image": images[:4]}])
    assert record.calibration is not None
    assert any("calibrated on 4 samples" in note and "1 in 5" in note for note in record.calibration.notes)


def test_model_optimizer_prints_nothing_and_leaves_no_handler(tmp_path, wide, batches, capfd):
    before = list(logging.getLogger().handlers)
    for precision in ("int8", "fp8"):
        lower(
            wide,
            precision=precision,
            out=tmp_path / precision,
            calibration=batches,
            lowering=LoweringSpec(tool="modelopt"),
        )
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == before


def chain(tmp_path, weight, second=None):
    """Two matrix multiplications with a Relu between them."""
    second = np.eye(8, dtype=np.float32) if second is None else second
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["image", "w"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("MatMul", ["b", "v"], ["logits"], name="second"),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(second, "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "source.onnx"
    onnx.save_model(model, path)
    return path


def state_of(record, name):
    return next(each.state for each in record.calibration.ranges if each.name == name)


def test_dead_tensor_is_named_and_still_runs(tmp_path, images, run):
    path = chain(tmp_path, np.zeros((8, 8), np.float32))
    record = lower(path, precision="int8", out=tmp_path / "m.onnx", calibration=[{"image": images}])
    assert state_of(record, "b") == "dead"
    assert any("zeros only in 1 tensor: b" in note for note in record.calibration.notes)
    assert not np.any(run_plain(tmp_path / "m.onnx", images))


def run_plain(path, images):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": images})[0]


def test_tensor_of_outliers_is_named(tmp_path, images):
    spoiled = images.copy()
    spoiled[0, 0, 0, 0] = 500.0
    path = chain(tmp_path, np.eye(8, dtype=np.float32))
    record = lower(path, precision="int8", out=tmp_path / "m.onnx", calibration=[{"image": spoiled}])
    assert state_of(record, "image") == state_of(record, "b") == "outliers"
    assert any("a few values take most of the range of 2 tensors" in note for note in record.calibration.notes)


def test_activation_that_is_not_finite_is_an_error(tmp_path, images):
    path = chain(tmp_path, np.eye(8, dtype=np.float32) * np.float32(3e38))
    with pytest.raises(LoweringError, match="the range inf|not finite|cannot make int8"):
        lower(path, precision="int8", out=tmp_path / "m.onnx", calibration=[{"image": images}])
    assert not (tmp_path / "m.onnx").exists()


def test_slices_and_whole_batches_measure_the_same(tmp_path, wide, batches, monkeypatch):
    from gate.lower import ranges

    whole = lower(wide, precision="int8", out=tmp_path / "a.onnx", calibration=batches)
    monkeypatch.setattr(ranges, "_SLICE_BYTES", 100_000)
    parts = lower(wide, precision="int8", out=tmp_path / "b.onnx", calibration=batches)
    for one, other in zip(whole.calibration.ranges, parts.calibration.ranges, strict=True):
        assert one.max_abs == pytest.approx(other.max_abs, rel=1e-5)
        assert one.high == other.high


class Clamped(nn.Module):
    """What each quantiser follows is a ReLU, or one that is clipped."""

    def __init__(self, activation, width=32):
        super().__init__()
        self.activation = activation
        self.one = nn.Conv2d(1, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width * 64, 10)

    def forward(self, image):
        x = self.activation(self.two(self.activation(self.one(image))))
        return {"logits": self.head(x.flatten(1))}


def exported(tmp_path, module):
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    onnx_from_torch(module().eval(), spec=SPEC, out=path, feeds=[{"image": IMAGES[:4]}])
    return path


@pytest.mark.parametrize("activation", [torch.relu, nn.functional.relu6])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_network_of_relus_answers_the_same_at_each_optimisation(tmp_path, batches, precision, activation):
    source, out = exported(tmp_path, lambda: Clamped(activation)), tmp_path / "lowered.onnx"
    lower(source, precision=precision, out=out, calibration=batches)
    fields = {"name": "e", "backend": "onnxruntime", "precision": precision, "parity": {}}
    answers = {}
    for optimization in ("disabled", "basic", "extended", "all"):
        chosen = msgspec.convert({**fields, "options": {"optimization": optimization}}, EngineSpec)
        with backend("onnxruntime").open(out, spec=SPEC, engine=chosen) as runner:
            answers[optimization] = runner.run({"image": IMAGES})["logits"]
    plain = answers.pop("disabled")
    for each in answers.values():
        assert np.sqrt(np.mean((each - plain) ** 2) / np.mean(plain**2)) < 5e-3


def test_percentile_that_was_used_is_recorded(tmp_path, wide, batches):
    def method(lowering):
        record = lower(wide, precision="int8", out=tmp_path / "m.onnx", calibration=batches, lowering=lowering)
        return record.calibration.percentile, record.calibration.method_text

    assert method(LoweringSpec(method="percentile")) == (99.999, "percentile 99.999")
    assert method(LoweringSpec(method="percentile", percentile=99.9)) == (99.9, "percentile 99.9")
    assert method(LoweringSpec()) == (None, "minmax")


def refused(*arguments, **more):
    with pytest.raises(LoweringError, match="nothing was lowered: ") as caught:
        lower(*arguments, **more)
    assert str(caught.value).startswith("nothing was lowered")
    return caught.value


def test_network_too_narrow_for_fp8_names_its_channels(tmp_path, batches):
    source = exported(tmp_path, lambda: Clamped(torch.relu, width=8))
    error = refused(source, precision="fp8", out=tmp_path / "m.onnx", calibration=batches)
    assert "no convolution or matrix product is wide enough for fp8" in error.message
    assert "/module/one/Conv (1 to 8 channels), /module/two/Conv (8 to 8 channels)" in error.message
    assert "512 to 10 channels" in error.message
    assert "16 channels and fewer" in error.hint


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_excluding_everything_is_said_to_be_the_cause(tmp_path, wide, batches, precision):
    lowering = LoweringSpec(exclude_ops=("Conv", "Gemm"))
    error = refused(wide, precision=precision, out=tmp_path / "m.onnx", calibration=batches, lowering=lowering)
    assert "every convolution and matrix product is excluded by the spec" in error.message
    assert "exclude_ops" in error.hint


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_data_max_that_leaves_nothing_is_said_to_be_the_cause(tmp_path, wide, batches, precision):
    out = tmp_path / "m.onnx"
    error = refused(wide, precision=precision, out=out, calibration=batches, lowering=LoweringSpec(data_max=1e-3))
    assert "data_max = 0.001 leaves every node in FP32" in error.message
    assert error.hint == "Give a larger data_max, or leave it out."
