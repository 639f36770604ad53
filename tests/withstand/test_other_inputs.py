"""Other ways to say what is compared: stored outputs, an engine with its own input and output types."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from tests.withstand.conftest import Project


def _half_io(model: onnx.ModelProto) -> None:
    """FP16 at the input and at both outputs, as teams export engines."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in model.graph.node:
        node.input[:] = ["input_wide" if name == "input" else name for name in node.input]
        node.output[:] = [f"{name}_wide" if name in ("logits", "features") else name for name in node.output]
        node.input[:] = [f"{name}_wide" if name in ("logits", "features") else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", ["input"], ["input_wide"], to=TensorProto.FLOAT))
    for name in ("logits", "features"):
        model.graph.node.append(helper.make_node("Cast", [f"{name}_wide"], [name], to=TensorProto.FLOAT16))


def test_another_floating_type_is_refused_and_says_what_to_set(project: Project) -> None:
    project.break_engine(_half_io)
    outcome = project.check()
    assert outcome.code == 1
    assert "float16" in outcome.text
    assert "cast_io" in outcome.text


def test_another_floating_type_is_compared_where_the_spec_allows_it(project: Project) -> None:
    project.break_engine(_half_io)
    project.edit(('onnx = "engine.onnx"', 'onnx = "engine.onnx"\ncast_io = true'))
    outcome = project.check()
    assert outcome.code == 1, "FP16 outputs do not keep FP32's limits"
    assert "parity.rel_rmse[logits]" in outcome.failing
    project.edit(('precision = "fp32"', 'precision = "fp16"'))
    outcome = project.check()
    assert outcome.failing.keys() <= {"build.delivered_precision"}, outcome.text


def _stored(project: Project) -> dict[str, np.ndarray]:
    """The reference's outputs as one file, from a recording."""
    done = project.gate(
        "record", str(project.spec), "-o", str(project.folder / "recording"), "--cache", str(project.cache)
    )
    assert done.code == 0, done.text
    parts = [load_file(path) for path in sorted((project.folder / "recording").glob("*.safetensors"))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _use(project: Project, outputs: dict[str, np.ndarray]) -> None:
    save_file(outputs, project.folder / "outputs.safetensors")
    text = project.spec.read_text()
    if "factory" in text:
        project.edit(
            ('factory = "two:load"\nweights = "weights.safetensors"\n', 'outputs = "outputs.safetensors"\n'),
            ('output_names = ["logits", "features"]\n', ""),
        )


def test_outputs_stored_as_safetensors_are_a_reference(project: Project) -> None:
    outputs = _stored(project)
    _use(project, outputs)
    assert project.check().code == 0


def test_stored_outputs_that_are_cut_off_or_in_another_order_do_not_pass(project: Project) -> None:
    outputs = _stored(project)
    _use(project, {name: values[:-1].copy() for name, values in outputs.items()})
    cut = project.check()
    assert cut.code == 2
    assert "there are 797 samples" in cut.text
    _use(project, {name: np.roll(values, 1, axis=0) for name, values in outputs.items()})
    assert project.check().code == 1
    whole = (project.folder / "outputs.safetensors").read_bytes()
    (project.folder / "outputs.safetensors").write_bytes(whole[:-100])
    assert project.check().code == 2
