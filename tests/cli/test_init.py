from __future__ import annotations

import re

import onnx
import pytest
from onnx import TensorProto, helper

from gate.latency.config import RegressionSpec, latency_checks
from gate.spec import read_spec


def test_a_factory_gives_a_spec_with_its_inputs_and_outputs(gate_command, project):
    outcome = gate_command(
        "init",
        "model:pair",
        "--input",
        "left:float32:batch,2,w",
        "--input",
        "right:float32:batch,2,w",
        "-o",
        "new.toml",
    )
    assert outcome.code == 0, outcome.err
    spec = read_spec(project / "new.toml").spec
    assert spec.model.id == "model-pair"
    assert spec.model.output_names == ("total", "difference")
    assert spec.inputs["left"].shape == ("batch", 2, "w")
    assert spec.inputs["right"].axes["w"].max == 32


def test_the_spec_that_init_writes_runs(gate_command, project):
    assert gate_command("init", "model:load", "-o", "new.toml").code == 0
    text = (project / "new.toml").read_text()
    (project / "new.toml").write_text(text.replace("samples = 1000", "samples = 32"))
    outcome = gate_command("check", "new.toml")
    assert outcome.code == 0, outcome.err + outcome.out


def _uncommented(text):
    """The spec with its engines' comments made part of it, where a comment is TOML."""
    head, begin, engines = text.partition("[[engine]]")
    return head + begin + re.sub(r"^( *)# *(?=\[|[a-z0-9_]+ = )", r"\1", engines, flags=re.MULTILINE)


def test_what_init_leaves_as_a_comment_is_valid_once_it_is_none(gate_command, project):
    assert gate_command("init", "model:load", "-o", "new.toml").code == 0
    path = project / "new.toml"
    path.write_text(_uncommented(path.read_text()))
    first, second = read_spec(path).spec.engines
    assert (first.name, second.name) == ("ort-fp32", "trt-fp16")
    assert latency_checks(first.latency) == ("latency.p99_ms", "latency.speedup")
    assert latency_checks(second.latency) == (
        "latency.p99_ms",
        "latency.regression_p50",
        "latency.regression_p95",
        "latency.speedup",
    )
    assert second.latency.regression.limits == RegressionSpec().limits
    assert second.latency.speedup.against == first.name
    assert second.lowering is not None
    assert second.baseline is not None


def test_shapes_that_are_not_known_are_asked_for_by_name(gate_command, project):
    outcome = gate_command("init", "model:pair", "-o", "new.toml")
    assert outcome.code == 2
    assert "its forward takes left, right" in outcome.err
    assert "gate init model:pair --input left:float32:batch,3,224,224 --input right:" in outcome.err
    assert not (project / "new.toml").exists()


def test_a_model_in_train_mode_is_refused(gate_command):
    outcome = gate_command("init", "model:trained", "-o", "new.toml")
    assert outcome.code == 2
    assert "train mode" in outcome.err


def test_nothing_is_overwritten(gate_command, project):
    before = (project / "gate.toml").read_bytes()
    outcome = gate_command("init", "model:load")
    assert outcome.code == 2
    assert "exists already" in outcome.err
    assert (project / "gate.toml").read_bytes() == before


def _onnx(path, *shape, name='odd "name"'):
    node = helper.make_node("Identity", [name], ["scores"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def test_an_onnx_file_gives_a_spec_with_its_dimensions(gate_command, project):
    _onnx(project / "net.onnx", "N", 3, None, "height-of image")
    outcome = gate_command("init", "net.onnx", "-o", "new.toml", "--id", "net")
    assert outcome.code == 0, outcome.err
    spec = read_spec(project / "new.toml").spec
    assert spec.model.onnx == "net.onnx"
    assert spec.inputs['odd "name"'].shape == ("N", 3, "axis_2", "height_of_image")
    assert "# outputs: scores" in (project / "new.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model:load", "--input", "input:float99:batch,4"), "expected NAME:DTYPE:SHAPE"),
        (("model:load", "--input", "input:float32:"), "expected NAME:DTYPE:SHAPE"),
        (("model:load", "--input", "input:float32:0,4"), "expected NAME:DTYPE:SHAPE"),
        (("model:laod",), "did you mean 'load'"),
        (("nothing",), "expected module:function or a .onnx file"),
        (("missing.onnx",), "there is no such file"),
        (("data.onnx",), "is not an ONNX file"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(gate_command, project, arguments, message):
    (project / "data.onnx").write_bytes(b"not a graph")
    outcome = gate_command("init", *arguments, "-o", "new.toml")
    assert outcome.code == 2
    assert message in outcome.err
    assert not (project / "new.toml").exists()


def test_a_model_that_cannot_take_its_inputs_is_a_usage_error(gate_command, project):
    outcome = gate_command("init", "model:load", "--input", "input:float32:batch,5", "-o", "new.toml")
    assert outcome.code == 2
    assert "it was tried with zeros: input float32 [8, 5]" in outcome.err
    assert not (project / "new.toml").exists()


def test_a_python_file_is_told_how_to_name_its_function(gate_command):
    outcome = gate_command("init", "model.py", "-o", "new.toml")
    assert outcome.code == 2
    assert "gate init model:load" in outcome.err
