"""Faults of an engine, each put into a real ONNX file and met through the command: none may pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.withstand.conftest import Project

Surgery = Callable[[onnx.ModelProto], None]


def _constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _after(model: onnx.ModelProto, output: str, *nodes: tuple[str, list[str], dict[str, object]]) -> None:
    """Put nodes between the producer of an output and the output; `$` in their inputs stands for what comes in."""
    produced = f"{output}_before"
    for node in model.graph.node:
        node.output[:] = [produced if name == output else name for name in node.output]
        node.input[:] = [produced if name == output else name for name in node.input]
    current = produced
    for index, (kind, inputs, attributes) in enumerate(nodes):
        target = output if index == len(nodes) - 1 else f"{output}_step{index}"
        model.graph.node.append(
            helper.make_node(kind, [current if name == "$" else name for name in inputs], [target], **attributes)
        )
        current = target


def _add(model: onnx.ModelProto, value: np.ndarray) -> None:
    _after(model, "logits", ("Add", ["$", _constant(model, "fault", value.astype(np.float32))], {}))


def all_nan(model: onnx.ModelProto) -> None:
    _add(model, np.full(10, np.nan))


def one_inf(model: onnx.ModelProto) -> None:
    """Inf in one class of the first sample of each batch."""
    indices = _constant(model, "where", np.array([[0, 3]], dtype=np.int64))
    updates = _constant(model, "inf", np.array([np.inf], dtype=np.float32))
    _after(model, "logits", ("ScatterND", ["$", indices, updates], {}))


def constant(model: onnx.ModelProto) -> None:
    zero = _constant(model, "zero", np.zeros(1, dtype=np.float32))
    row = _constant(model, "row", np.linspace(-1, 1, 10).astype(np.float32))
    _after(model, "logits", ("Mul", ["$", zero], {}), ("Add", ["$", row], {}))


def all_zeros(model: onnx.ModelProto) -> None:
    _after(model, "logits", ("Mul", ["$", _constant(model, "zero", np.zeros(1, dtype=np.float32))], {}))


def permuted_classes(model: onnx.ModelProto) -> None:
    order = _constant(model, "order", np.roll(np.arange(10), 1))
    _after(model, "logits", ("Gather", ["$", order], {"axis": 1}))


def truncated_batch(model: onnx.ModelProto) -> None:
    names = [
        _constant(model, name, np.array([value], dtype=np.int64))
        for name, value in (("starts", 0), ("ends", -1), ("axes", 0))
    ]
    _after(model, "logits", ("Slice", ["$", *names], {}))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "fewer"


def transposed(model: onnx.ModelProto) -> None:
    _after(model, "logits", ("Transpose", ["$"], {"perm": [1, 0]}))
    dims = model.graph.output[0].type.tensor_type.shape.dim
    dims[0].Clear()
    dims[0].dim_value = 10
    dims[1].Clear()
    dims[1].dim_param = "batch"


def wrong_preprocessing(model: onnx.ModelProto) -> None:
    """Inputs scaled from 0..1 to 0..16 before the first layer."""
    sixteen = _constant(model, "sixteen", np.array([16], dtype=np.float32))
    for node in model.graph.node:
        node.input[:] = ["scaled" if name == "input" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Mul", ["input", sixteen], ["scaled"]))


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [each for each in model.graph.initializer if len(each.dims) >= 2]


def another_checkpoint(model: onnx.ModelProto) -> None:
    random = np.random.default_rng(5)
    for tensor in _weights(model):
        values = numpy_helper.to_array(tensor)
        other = (random.standard_normal(values.shape) * values.std()).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(other, tensor.name))


def one_weight_zeroed(model: onnx.ModelProto) -> None:
    tensor = _weights(model)[1]
    tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))


def rows_shifted(model: onnx.ModelProto) -> None:
    """Each sample gets its neighbour's answer."""
    axes = _constant(model, "ax", np.array([0], dtype=np.int64))
    big = _constant(model, "big", np.array([2**62], dtype=np.int64))
    one = _constant(model, "one", np.array([1], dtype=np.int64))
    nil = _constant(model, "nil", np.array([0], dtype=np.int64))
    before = "logits_before"
    _after(model, "logits", ("Slice", ["$", one, big, axes], {}), ("Concat", ["$", "head"], {"axis": 0}))
    head = helper.make_node("Slice", [before, nil, one, axes], ["head"])
    model.graph.node.insert(len(model.graph.node) - 1, head)


def drifts_in_one_class(model: onnx.ModelProto) -> None:
    """A small error in one class only: cosine stays high."""
    _add(model, np.eye(10)[4] * 0.2)


NUMERIC = [
    all_nan,
    one_inf,
    constant,
    all_zeros,
    permuted_classes,
    truncated_batch,
    transposed,
    wrong_preprocessing,
    another_checkpoint,
    one_weight_zeroed,
    rows_shifted,
    drifts_in_one_class,
]


def test_the_unbroken_engine_passes(project: Project) -> None:
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.failing == {}


@pytest.mark.parametrize("surgery", NUMERIC, ids=lambda each: each.__name__)
def test_a_wrong_answer_fails(project: Project, surgery: Surgery) -> None:
    project.break_engine(surgery)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    failed = [check for check, finding in outcome.failing.items() if finding["status"] == "FAILED"]
    assert any(check.startswith("parity.") for check in failed), outcome.text
    assert "candidate" in outcome.text.splitlines()[0]


def test_a_nan_is_counted_and_named(project: Project) -> None:
    project.break_engine(one_inf)
    outcome = project.check()
    finding = outcome.failing["parity.nonfinite[logits]"]
    assert finding["estimate"] == 13  # one in each batch of 64 of the 797 samples


def test_permuted_classes_are_named_as_the_cause(project: Project) -> None:
    project.break_engine(permuted_classes)
    assert "permut" in project.check().text


def test_a_renamed_output_says_which_names_there_are(project: Project) -> None:
    def rename(model: onnx.ModelProto) -> None:
        _after(model, "logits", ("Identity", ["$"], {}))
        model.graph.node[-1].output[0] = "scores"
        model.graph.output[0].name = "scores"

    project.break_engine(rename)
    outcome = project.check()
    assert outcome.code == 1
    message = outcome.failing["parity.outputs"]["message"]
    assert "has no 'logits'" in message
    assert "'scores'" in message


def test_a_renamed_output_passes_once_it_is_mapped(project: Project) -> None:
    def rename(model: onnx.ModelProto) -> None:
        _after(model, "logits", ("Identity", ["$"], {}))
        model.graph.node[-1].output[0] = "scores"
        model.graph.output[0].name = "scores"

    project.break_engine(rename)
    project.edit(('onnx = "engine.onnx"', 'onnx = "engine.onnx"\noutputs = { logits = "scores" }'))
    assert project.check().code == 0


def test_a_missing_output_fails(project: Project) -> None:
    project.break_engine(lambda model: model.graph.output.pop(1) and None)
    outcome = project.check()
    assert outcome.code == 1
    assert "has no 'features'" in outcome.failing["parity.outputs"]["message"]


def test_an_extra_output_fails(project: Project) -> None:
    def extra(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Identity", ["logits"], ["more"]))
        model.graph.output.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["batch", 10]))

    project.break_engine(extra)
    outcome = project.check()
    assert outcome.code == 1
    assert "extra 'more'" in outcome.failing["parity.outputs"]["message"]


def test_engines_swapped_between_two_specs_fail(project: Project) -> None:
    """Each of two models passes with its own engine and fails with the other's."""
    good = (project.folder / "engine.onnx").read_bytes()
    project.break_engine(another_checkpoint)
    other = (project.folder / "engine.onnx").read_bytes()
    assert project.check().code == 1
    project.edit(('factory = "two:load"\nweights = "weights.safetensors"', 'onnx = "engine.onnx"'))
    project.edit(("[engine.task]\n  top1_drop_at_most_pp = 0.5", ""), ("output_names", "# output_names"))
    assert project.check().code == 0, "the other model agrees with its own engine"
    (project.folder / "reference.onnx").write_bytes(other)
    (project.folder / "engine.onnx").write_bytes(good)
    project.edit(('id = "digits-two"\nonnx = "engine.onnx"', 'id = "digits-two"\nonnx = "reference.onnx"'))
    assert project.check().code == 1


def test_an_engine_file_that_is_cut_off_fails(project: Project) -> None:
    path = project.folder / "engine.onnx"
    path.write_bytes(path.read_bytes()[:2000])
    outcome = project.check()
    assert outcome.code != 0


def test_a_missing_engine_file_is_named(project: Project) -> None:
    (project.folder / "engine.onnx").unlink()
    outcome = project.check()
    assert outcome.code == 1
    assert "there is no" in outcome.text
    assert "engine.onnx" in outcome.text


def test_the_worst_sample_is_named_with_its_label_and_both_answers(project: Project) -> None:
    project.break_engine(permuted_classes)
    outcome = project.check()
    (engine,) = outcome.report["engines"] if outcome.report else ({},)
    worst = next(note for note in engine["notes"] if note.startswith("worst sample"))
    index = next(each for each in engine["outputs"] if each["output"] == "logits")["worst_samples"][0][0]
    assert worst.startswith(f"worst sample {index}: label ")
    assert ", engine " in worst
    assert worst in outcome.text
    assert "worst class" in outcome.failing["task.top1_drop_pp"]["detail"]
