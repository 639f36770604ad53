"""Ways in which a check could pass without having looked at what the spec means."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from gate.cache import Cache
from gate.steps.make import graph_digest
from tests.withstand.conftest import Project

UNRELIABLE = """

class Unreliable:
    def __init__(self, good):
        self.images, self.labels = dict(good.inputs)["input"], good.labels
        self.asked = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked += 1
        image = self.images[index]
        return (image if self.asked <= len(self) else image * 0), int(self.labels[index])


_evaluation = evaluation


def evaluation():
    return Unreliable(_evaluation())
"""


def test_data_that_differ_when_they_are_read_again_are_an_error(project: Project) -> None:
    path = project.folder / "data.py"
    path.write_text(path.read_text() + UNRELIABLE)
    outcome = project.check()
    assert outcome.code != 0
    assert "other samples or labels from 0 on" in outcome.text


def test_a_file_that_the_factory_reads_and_the_spec_does_not_name_renews_the_reference(project: Project) -> None:
    scale = project.folder / "scale.json"
    scale.write_text("1.0")
    model = (project.folder / "two.py").read_text()
    (project.folder / "two.py").write_text(
        "import json, pathlib\n"
        + model.replace("self.net = load_digits()", "self.net = load_digits()\n        self.scale = read()").replace(
            "net.head(features)", "net.head(features) * self.scale"
        )
        + '\n\ndef read():\n    return json.loads((pathlib.Path(__file__).parent / "scale.json").read_text())\n'
    )
    assert project.check().code == 0
    scale.write_text("1.5")
    outcome = project.check()
    assert outcome.code == 1
    assert "parity.rel_rmse[logits]" in outcome.failing


def test_an_output_does_not_hide_another_by_taking_its_name(project: Project) -> None:
    def add_copy(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["mine"]))
        model.graph.output.append(
            onnx.helper.make_tensor_value_info("mine", onnx.TensorProto.FLOAT, ["batch", 10]),
        )

    project.break_engine(add_copy)
    project.edit(('onnx = "engine.onnx"', 'onnx = "engine.onnx"\noutputs = { logits = "mine" }'))
    outcome = project.check()
    assert outcome.code == 1
    assert "has an output 'logits' of its own" in outcome.text


def test_a_mapped_output_that_the_engine_has_not_is_an_error(project: Project) -> None:
    project.edit(('onnx = "engine.onnx"', 'onnx = "engine.onnx"\noutputs = { logits = "scores" }'))
    outcome = project.check()
    assert outcome.code == 1
    assert "logits = 'scores'" in outcome.text


def test_a_recording_of_other_weights_is_refused(project: Project) -> None:
    assert project.gate("record", str(project.spec), "-o", "recorded", "--cache", str(project.cache)).code == 0
    assert project.check("--reference", "recorded").code == 0
    weights = project.folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    outcome = project.check("--reference", "recorded")
    assert outcome.code != 0
    assert "was recorded before weights.safetensors changed" in outcome.text


def test_a_recording_whose_scales_are_edited_is_refused(project: Project) -> None:
    assert project.gate("record", str(project.spec), "-o", "recorded", "--cache", str(project.cache)).code == 0
    path = project.folder / "recorded" / "recording.json"
    raw = json.loads(path.read_text())
    raw["meta"]["outputs"]["logits"]["rms"] = 1e9
    path.write_text(json.dumps(raw))
    outcome = project.check("--reference", "recorded")
    assert outcome.code != 0
    assert "its own digest does not hold" in outcome.text


def test_a_limit_that_is_infinite_is_refused(project: Project) -> None:
    project.edit(("[engine.parity]", "[engine.parity]\n  rel_rmse = inf"))
    outcome = project.check()
    assert outcome.code != 0
    assert "rel_rmse = inf: expected a finite number" in outcome.text


def test_labels_of_one_class_alone_are_refused(project: Project) -> None:
    path = project.folder / "data.py"
    path.write_text(
        path.read_text()
        + "\n\n_before = evaluation\n\n\ndef evaluation():\n    found = _before()\n"
        + "    return type(found)(inputs=found.inputs, labels=found.labels * 0)\n"
    )
    outcome = project.check()
    assert outcome.code != 0
    assert "all 797 labels are 0" in outcome.text


def test_a_reference_in_half_precision_is_refused(project: Project) -> None:
    path = project.folder / "two.py"
    path.write_text(path.read_text().replace("TwoOutputs().eval()", "TwoOutputs().eval().half()"))
    outcome = project.check()
    assert outcome.code != 0
    assert "the reference must be FP32" in outcome.text


def test_a_plan_of_another_precision_than_the_spec_says_fails(project: Project) -> None:
    project.edit(('onnx = "engine.onnx"', 'plan = "engine.onnx"'))
    assert project.check().code == 0
    project.edit(('precision = "fp32"', 'precision = "fp16"'))
    outcome = project.check()
    assert outcome.code == 1
    assert "build.delivered_precision" in outcome.failing


def test_a_last_batch_smaller_than_the_profile_allows_is_filled_up(project: Project) -> None:
    project.edit(("batch = { min = 1, opt = 8, max = 64 }", "batch = { min = 4, opt = 8, max = 64 }"))
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    assert outcome.report["samples"] == 797


@pytest.mark.parametrize("where", ["two.py", "data.py"])
def test_user_code_that_ends_the_program_with_status_0_is_no_pass(project: Project, where: str) -> None:
    path = project.folder / where
    path.write_text(path.read_text() + "\n\nraise SystemExit(0)\n")
    outcome = project.check()
    assert outcome.code not in (0, 70)
    assert "ended the program with sys.exit(0)" in outcome.text


@pytest.mark.parametrize("part", ["model.onnx", "model.onnx.data"])
def test_graphs_that_differ_only_in_external_weights_have_other_digests(tmp_path: Path, part: str) -> None:
    cache = Cache(tmp_path / "cache")

    def digest(changed: bytes) -> str:
        def make(folder: Path) -> None:
            for name in ("model.onnx", "model.onnx.data"):
                (folder / name).write_bytes(changed if name == part else b"same")

        return graph_digest(cache.put("export", hashlib.sha256(changed).hexdigest(), make, {}))

    assert digest(b"one") != digest(b"two")


def test_a_scalar_output_is_recorded_as_a_scalar(tmp_path: Path) -> None:
    from gate.reference import _write_batches

    meta = _write_batches(iter([(0, 2, {"mean": np.array(1.5, np.float32)})]), tmp_path, lambda: None)
    from safetensors.numpy import load_file

    assert load_file(tmp_path / meta["files"][0])["mean"].shape == ()
    assert meta["outputs"]["mean"]["batch_axis"] is False


def test_recording_does_not_replace_what_is_no_recording(project: Project) -> None:
    from gate.errors import SpecError
    from gate.pipeline import CheckOptions, Silence, record
    from gate.spec import read_spec

    kept = project.spec.read_bytes()
    for path in (project.spec, project.folder):
        with pytest.raises(SpecError, match="is no recording, so it is not replaced"):
            record(read_spec(project.spec), path, CheckOptions(cache=project.cache), Silence())
    assert project.spec.read_bytes() == kept
