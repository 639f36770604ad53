"""Ways in which a check could pass without having looked at what the spec means."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from gate.cache import Cache
from gate.engines.fake import FakeBackend
from gate.errors import BackendUnavailable, SpecError
from gate.pipeline import not_run_reason
from gate.spec import EngineSpec, read_spec
from gate.steps.make import graph_digest
from gate.verdict import Evidence
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
    from gate.pipeline import CheckOptions, Silence, record
    from gate.spec import read_spec

    kept = project.spec.read_bytes()
    for path in (project.spec, project.folder):
        with pytest.raises(SpecError, match="is no recording, so it is not replaced"):
            record(read_spec(project.spec), path, CheckOptions(cache=project.cache), Silence())
    assert project.spec.read_bytes() == kept


def test_another_factory_of_the_same_weights_renews_the_reference(project: Project) -> None:
    path = project.folder / "two.py"
    path.write_text(
        path.read_text()
        + "\n\nclass Other(TwoOutputs):\n    def forward(self, images):\n        found = super().forward(images)\n"
        + '        return {**found, "logits": 1.5 * found["logits"]}\n\n\ndef other():\n    return Other().eval()\n'
    )
    assert project.check().code == 0
    project.edit(('"two:load"', '"two:other"'))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "parity.rel_rmse[logits]" in outcome.failing


def _quantised_from_a_recording(project: Project) -> None:
    project.edit(('precision = "fp32"\nonnx = "engine.onnx"', 'precision = "int8"'))
    project.edit(("  [engine.parity]\n", ""), ("top1_drop_at_most_pp = 0.5", "top1_drop_at_most_pp = 5.0"))
    assert project.gate("record", str(project.spec), "-o", "recorded", "--cache", str(project.cache)).code == 0
    outcome = project.check("--reference", "recorded")
    assert outcome.code == 0, outcome.text


def test_a_recording_calibrated_on_other_samples_or_exported_otherwise_is_refused(project: Project) -> None:
    _quantised_from_a_recording(project)
    project.edit(("calibration_samples = 100", "calibration_samples = 90"))
    outcome = project.check("--reference", "recorded")
    assert outcome.code != 0
    assert "the recorded graph in int8 was calibrated on other samples" in outcome.text
    assert "gate record" in outcome.text
    project.edit(
        ("calibration_samples = 90", "calibration_samples = 100"),
        ('factory = "two:load"', 'factory = "two:load"\nopset = 17'),
    )
    outcome = project.check("--reference", "recorded")
    assert outcome.code != 0
    assert "recorded with opset 18, the spec says 17" in outcome.text


EAGER = """
[[engine]]
name = "eager"
backend = "torch"
precision = "fp32"
optional = true
  [engine.parity]
"""


def test_an_engine_made_from_the_model_is_not_run_from_a_recording(project: Project) -> None:
    project.spec.write_text(project.spec.read_text() + EAGER)
    assert project.gate("record", str(project.spec), "-o", "recorded", "--cache", str(project.cache)).code == 0
    outcome = project.check("--reference", "recorded")
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    not_run = {each["name"]: each["not_run"] for each in outcome.report["engines"]}
    assert not_run["candidate"] is None
    assert "made from the model itself, and a recording has only its answers" in not_run["eager"]
    file = read_spec(project.spec)
    assert not_run_reason(file.engine("eager"), file) is None
    assert not_run_reason(file.engine("eager"), file, reference=Path("recorded")) == not_run["eager"]
    project.edit(("optional = true\n", ""))
    outcome = project.check("--reference", "recorded")
    assert outcome.code == 2, outcome.text
    assert "engine 'eager' is made from the model itself" in outcome.text
    assert outcome.report is None


def _needing_a_gpu(name: str, options: str, precision: str = "tf32") -> str:
    return (
        f'\n[[engine]]\nname = "{name}"\nbackend = "onnxruntime"\nprecision = "{precision}"\nonnx = "engine.onnx"\n'
        f"optional = true\noptions = {options}\n  [engine.parity]\n"
    )


def test_optional_engines_that_cannot_run_here_are_not_run_whatever_the_environment_says(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("gate.device.gpu", lambda: None)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    project.spec.write_text(project.spec.read_text() + _needing_a_gpu("on-gpu", '{ provider = "cuda" }'))
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    assert outcome.report["engines"][1]["not_run"] is not None


def test_where_no_engine_can_run_each_is_named_once_beside_its_reason(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gate.device.gpu", lambda: None)
    text = project.spec.read_text()
    added = [_needing_a_gpu(name, '{ provider = "cuda" }', "fp32") for name in ("one", "two")]
    project.spec.write_text(text[: text.index("[[engine]]")] + "".join(added))
    outcome = project.check()
    assert outcome.code == 3, outcome.text
    lines = outcome.text.splitlines()
    first = next(index for index, line in enumerate(lines) if "no engine can run here" in line)
    assert lines[first + 1].startswith("  one, two: asks for provider = 'cuda', and ")
    assert lines[first + 2] == f"next: gate doctor --spec {project.spec}"
    assert outcome.text.count("one, two") == outcome.text.count("one") == 1


@pytest.mark.parametrize("evidence", [None, Evidence.DEVICE])
def test_an_option_that_a_version_lacks_is_an_error_only_where_the_engine_could_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, evidence: Evidence | None
) -> None:
    class Old(FakeBackend):
        def require_supported(self, engine: EngineSpec) -> None:
            raise SpecError(f"engine {engine.name!r}: 8.6 has no such option")

    monkeypatch.setattr("gate.pipeline.backend_named", lambda _: Old(dict, evidence=evidence))
    project.edit(('backend = "onnxruntime"', 'backend = "tensorrt"\noptional = true'))
    file = read_spec(project.spec)
    if evidence is not None:
        with pytest.raises(SpecError, match="8.6 has no such option"):
            not_run_reason(file.engine("candidate"), file)
        return
    reason = not_run_reason(file.engine("candidate"), file)
    assert reason is not None
    assert "can only compile on this machine; besides, engine 'candidate': 8.6 has no such option" in reason
    project.edit(("optional = true\n", ""))
    file = read_spec(project.spec)
    with pytest.raises(BackendUnavailable, match="can only compile on this machine; besides, .*8.6 has no such option"):
        not_run_reason(file.engine("candidate"), file)
