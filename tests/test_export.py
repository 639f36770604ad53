"""PyTorch to ONNX: every kind of input and output, and what is refused."""

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from gate.cli.main import main
from gate.engines.onnxruntime import OnnxRuntimeRunner
from gate.errors import ExportError
from gate.export import exporter_version, onnx_from_torch, verify_export
from gate.spec import GateSpec

BATCH = {"min": 1, "opt": 4, "max": 8}
IMAGE = {"dtype": "float32", "shape": ["batch", 1, 6, 6], "axes": {"batch": BATCH}}
RNG = np.random.default_rng(0)


def make_spec(inputs=None, **model):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "model:load", **model},
            "inputs": inputs or {"image": IMAGE},
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}}],
        },
        GateSpec,
    )


def image(batch):
    return {"image": RNG.standard_normal((batch, 1, 6, 6)).astype(np.float32)}


FEEDS = tuple(image(batch) for batch in (1, 4, 8))


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, image):
        x = torch.relu(self.norm(self.conv(image)))
        return {"logits": self.head(x.mean((2, 3))), "features": x}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, scale, ids):
        tokens = self.head(self.table(ids)) * scale[:, None, None]
        return tokens, tokens.argmax(-1), (tokens > 0).any(-1)


class Noisy(nn.Module):
    def forward(self, image):
        return {"steady": image, "noise": image + torch.rand_like(image)}


class BatchBakedIn(nn.Module):
    def forward(self, image):
        return image.reshape(int(image.shape[0]), -1).sum(1) / torch.tensor(float(image.shape[0]))


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 18)])
def test_both_exporters_make_what_pytorch_computes(tmp_path, exporter, opset):
    module, spec, out = seeded(Classifier), make_spec(exporter=[exporter], opset=opset), tmp_path / "model.onnx"
    record = onnx_from_torch(module, spec=spec, out=out, feeds=FEEDS)
    assert (record.exporter, record.opset, record.refused) == (exporter, opset, ())
    assert record.inputs == ("image",)
    assert record.outputs == ("logits", "features")
    assert record.torch_version == torch.__version__
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    found = verify_export(out, module, spec=spec, feeds=FEEDS)
    assert [each.output for each in found] == ["logits", "features"]
    assert all(each.rel_rmse < 1e-6 for each in found)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 18)])
def test_integer_inputs_several_outputs_and_two_dynamic_axes(tmp_path, exporter, opset):
    length = {"min": 2, "opt": 4, "max": 16}
    spec = make_spec(
        {
            "ids": {"dtype": "int64", "shape": ["batch", "length"], "axes": {"batch": BATCH, "length": length}},
            "scale": {"dtype": "float32", "shape": ["batch"], "axes": {"batch": BATCH}},
        },
        exporter=[exporter],
        opset=opset,
        output_names=["tokens", "best", "any"],
    )
    feeds = [
        {"ids": RNG.integers(0, 20, (batch, size)), "scale": RNG.standard_normal(batch).astype(np.float32)}
        for batch, size in ((1, 2), (8, 16), (3, 5))
    ]
    module, out = seeded(TwoInputs), tmp_path / "model.onnx"
    record = onnx_from_torch(module, spec=spec, out=out)
    assert record.inputs == ("ids", "scale")
    assert record.outputs == ("tokens", "best", "any")
    assert len(verify_export(out, module, spec=spec, feeds=feeds)) == 3
    with OnnxRuntimeRunner(out, spec=spec) as runner:
        assert [each.dtype for each in runner.outputs.values()] == ["float32", "int64", "bool"]


def test_next_exporter_is_tried_and_the_first_ones_cause_recorded(tmp_path):
    record = onnx_from_torch(seeded(Classifier), spec=make_spec(opset=17), out=tmp_path / "model.onnx", feeds=FEEDS)
    assert record.exporter == "torchscript"
    assert record.opset == 17
    assert "opset" in record.refused[0]
    assert record.refused[0].startswith("dynamo: ")


def test_every_cause_is_told_where_all_exporters_fail(tmp_path):
    class Complex(nn.Module):
        def forward(self, image):
            return torch.linalg.eigvals(image).real

    with pytest.raises(ExportError, match=r"(?s)no exporter could.*dynamo: .*torchscript: ") as caught:
        onnx_from_torch(seeded(Complex), spec=make_spec(), out=tmp_path / "model.onnx", feeds=FEEDS)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_export_is_the_same_bytes_each_time_and_names_no_path(tmp_path):
    for exporter, opset in (("torchscript", 17), ("dynamo", 18)):
        spec = make_spec(exporter=[exporter], opset=opset)
        for name in ("a", "b"):
            onnx_from_torch(seeded(Classifier), spec=spec, out=tmp_path / name, feeds=FEEDS)
        data = (tmp_path / "a").read_bytes()
        assert data == (tmp_path / "b").read_bytes()
        assert b".py" not in data


def test_large_weights_go_to_one_file_beside(tmp_path):
    module, spec, out = seeded(Classifier), make_spec(exporter=["torchscript"]), tmp_path / "model.onnx"
    module.head = nn.Sequential(nn.Linear(4, 1000), nn.Linear(1000, 3)).eval()
    onnx_from_torch(module, spec=spec, out=out, feeds=FEEDS, inline_limit_bytes=10_000)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    verify_export(out, module, spec=spec, feeds=FEEDS)
    onnx_from_torch(module, spec=spec, out=out, feeds=FEEDS)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_simplified_graph_computes_the_same(tmp_path):
    module, out = seeded(Classifier), tmp_path / "model.onnx"
    spec = make_spec(exporter=["torchscript"], simplify=True)
    assert onnx_from_torch(module, spec=spec, out=out, feeds=FEEDS).simplified
    verify_export(out, module, spec=spec, feeds=FEEDS)


def test_nothing_is_printed(tmp_path, capfd):
    onnx_from_torch(seeded(Classifier), spec=make_spec(opset=17), out=tmp_path / "model.onnx", feeds=FEEDS)
    assert capfd.readouterr() == ("", "")


def test_train_mode_is_refused(tmp_path):
    module = seeded(Classifier)
    module.norm.train()
    with pytest.raises(ExportError, match="in train mode: norm"):
        onnx_from_torch(module, spec=make_spec(), out=tmp_path / "model.onnx")


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"expected a torch\.nn\.Module, the factory returned a function"):
        onnx_from_torch(seeded, spec=make_spec(), out=tmp_path / "model.onnx")


def test_output_that_differs_between_two_runs_is_named(tmp_path):
    with pytest.raises(ExportError, match="two runs of the model on one input differ in output 'noise'"):
        onnx_from_torch(seeded(Noisy), spec=make_spec(), out=tmp_path / "model.onnx", feeds=FEEDS)


def test_wrong_number_of_output_names_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="output_names has 1 names"):
        onnx_from_torch(seeded(Classifier), spec=make_spec(output_names=["a"]), out=tmp_path / "m", feeds=FEEDS)


def test_name_of_both_an_input_and_an_output_is_an_error(tmp_path):
    spec = make_spec(output_names=["image", "other"])
    with pytest.raises(ExportError, match="'image' names an input and an output"):
        onnx_from_torch(seeded(Classifier), spec=spec, out=tmp_path / "m", feeds=FEEDS)


def test_input_that_the_model_does_not_use_is_an_error(tmp_path):
    class OneOfTwo(nn.Module):
        def forward(self, image, mask):
            return image * 2

    spec = make_spec({"image": IMAGE, "mask": IMAGE}, exporter=["torchscript"])
    with pytest.raises(ExportError, match=r"does not use input 'mask'"):
        onnx_from_torch(seeded(OneOfTwo), spec=spec, out=tmp_path / "m")


@pytest.fixture
def exported(tmp_path):
    module, spec, out = seeded(Classifier), make_spec(exporter=["torchscript"]), tmp_path / "model.onnx"
    onnx_from_torch(module, spec=spec, out=out, feeds=FEEDS)
    return module, spec, out


def test_other_weights_are_found_and_the_output_named(exported):
    module, spec, out = exported
    with torch.no_grad():
        module.head.weight *= 1.001
    with pytest.raises(
        ExportError, match=r"output 'logits' of shape \[1, 3\] differs from PyTorch: rel_rmse .* > 1e-05"
    ):
        verify_export(out, module, spec=spec, feeds=FEEDS)


def test_renamed_output_is_found(exported):
    module, spec, out = exported
    model = onnx.load(out)
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "scores"
    onnx.save_model(model, out)
    with pytest.raises(ExportError, match="has no 'logits'"):
        verify_export(out, module, spec=spec, feeds=FEEDS)


def test_nan_in_the_export_is_found(exported):
    module, spec, out = exported
    model = onnx.load(out)
    bias = next(each for each in model.graph.initializer if each.name.endswith("head.bias"))
    bias.CopyFrom(numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save_model(model, out)
    with pytest.raises(ExportError, match="output 'logits'.* rel_rmse nan"):
        verify_export(out, module, spec=spec, feeds=FEEDS)


def test_no_feed_is_no_proof(exported):
    module, spec, out = exported
    with pytest.raises(ExportError, match="compared on no sample"):
        verify_export(out, module, spec=spec, feeds=())


def test_truncated_file_is_an_error(exported):
    module, spec, out = exported
    out.write_bytes(out.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cannot be compared"):
        verify_export(out, module, spec=spec, feeds=FEEDS)


def test_batch_that_was_baked_in_is_found_by_another_batch(tmp_path):
    module, spec, out = seeded(BatchBakedIn), make_spec(exporter=["torchscript"]), tmp_path / "model.onnx"
    onnx_from_torch(module, spec=spec, out=out, feeds=FEEDS)
    with pytest.raises(ExportError, match=r"output 'output' has shape \[4\], the reference has \[1\]"):
        verify_export(out, module, spec=spec, feeds=FEEDS)


def test_version_for_the_cache_names_torch_and_onnx():
    assert f"torch {torch.__version__}" in exporter_version()
    assert f"onnx {onnx.__version__}" in exporter_version()


QUANTISED = """
import torch


class Quantised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)])

    def forward(self, input):
        quantised = torch.fake_quantize_per_tensor_affine
        for layer in self.layers:
            weight = quantised(layer.weight, 0.03, 0, -128, 127)
            input = torch.nn.functional.linear(quantised(input, 0.02, 0, -128, 127), weight, layer.bias)
        return input


def load():
    return Quantised().eval()
"""

QUANTISED_DATA = """
import numpy as np


def evaluation():
    return {"input": np.random.default_rng(0).standard_normal((32, 64), dtype=np.float32)}
"""

QUANTISED_SPEC = """schema = 1

[model]
id = "trained-quantised"
factory = "model:load"
exporter = ["torchscript"]

[inputs.input]
dtype = "float32"
shape = ["batch", 64]
batch = { min = 1, opt = 4, max = 16 }

[data]
source = "data:evaluation"
samples = 32

[[engine]]
name = "int8"
backend = "onnxruntime"
precision = "int8"
lowering = { tool = "none" }
  [engine.parity]
  top1_agreement_at_least = 0.5
"""


def test_a_model_of_quantisation_aware_training_passes_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("model.py", QUANTISED), ("data.py", QUANTISED_DATA), ("gate.toml", QUANTISED_SPEC)):
        (tmp_path / name).write_text(text)
    assert main(["check", "gate.toml", "--verbose"]) == 0, capsys.readouterr()
    shown = capsys.readouterr().out
    assert "PASSED        build.delivered_precision: 1" in shown
    assert "2 of 2 compute nodes are int8" in shown


class Unsupported(nn.Module):
    def forward(self, image):
        return torch.special.bessel_j0(image)


def test_what_an_exporter_prints_natively_does_not_come_out(tmp_path, capfd):
    with pytest.raises(ExportError, match="no exporter could make an ONNX file"):
        onnx_from_torch(Unsupported().eval(), spec=make_spec(exporter=["torchscript"]), out=tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
