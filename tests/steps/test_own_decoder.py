"""Outputs that a function of the project makes into keypoints, masks or tracks: `[postprocess] head = "function"`."""

import re

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

from gate import CheckOptions, check, read_spec
from gate.errors import DataError, SpecError
from gate.verdict import Status

SPEC = """schema = 1
[model]
id = "m"
onnx = "model.onnx"
[inputs.x]
dtype = "float32"
shape = ["batch", 8]
batch = { min = 1, opt = 4, max = 4 }
[data]
source = "project:evaluation"
samples = 12
batch = 4
[postprocess]
head = "function"
function = "project:decode"
[task]
kind = "KIND"
[[engine]]
name = "ort"
backend = "onnxruntime"
precision = "fp32"
  [engine.task]
  LIMIT
"""

KEYPOINTS = """
import re

import numpy as np
import gate

RNG = np.random.default_rng(0)
ROWS = RNG.uniform(20, 60, (12, 8)).astype(np.float32)


def target(index):
    points = ROWS[index].reshape(4, 2)
    flat = [float(each) for x, y in points for each in (x, y, 2)]
    low, high = points.min(0), points.max(0)
    box = [*map(float, low), *map(float, high - low)]
    annotation = {"id": index + 1, "category_id": 1, "bbox": box, "area": float(np.prod(high - low)), "iscrowd": 0,
                  "keypoints": flat, "num_keypoints": 4}
    return gate.ImageTarget(gate.ImageRecord(index + 1, 100, 100), (annotation,))


def evaluation():
    names = gate.Categories({1: "hand"}, skeleton_sigmas={1: (0.05, 0.05, 0.05, 0.05)})
    return gate.Samples({"x": ROWS}, targets=[target(index) for index in range(12)], categories=names)


def decode(outputs, images, state):
    found = []
    for row, image in zip(outputs["y"], images):
        points = row.reshape(1, 4, 2).astype(np.float64) + SHIFT
        low, high = points.min(1), points.max(1)
        found.append(gate.Detections(
            boxes=np.concatenate([low, high], 1), scores=np.ones(1), labels=np.ones(1, np.int64),
            keypoints=np.concatenate([points, np.ones((1, 4, 1))], 2)))
    return found
"""

TRACKS = """
import re

import numpy as np
import gate

ROWS = np.tile(np.array([10, 10, 20, 20, 50, 50, 70, 70], np.float32), (12, 1))
ROWS += np.arange(12, dtype=np.float32)[:, None]


def evaluation():
    frames = [
        gate.TrackedFrame("a" if index < 6 else "b", index % 6, np.array([1, 2]), ROWS[index].reshape(2, 4).astype(float))
        for index in range(12)
    ]
    return gate.Samples({"x": ROWS}, targets=frames)


def decode(outputs, frames, state):
    found = []
    for row, frame in zip(outputs["y"], frames):
        if state.get("sequence") != frame.sequence:
            state["sequence"], state["next"] = frame.sequence, 100
        ids = np.array([state["next"], state["next"] + 1]) if LOSES else np.array([7, 8])
        state["next"] += 2
        found.append(gate.TrackedFrame(frame.sequence, frame.frame, ids, row.reshape(2, 4).astype(float)))
    return found
"""


def project(folder, code, *, kind, limit):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shape = ["batch", 8]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "g", [given], [out], [numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")])
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    (folder / "project.py").write_text(code)
    (folder / "gate.toml").write_text(SPEC.replace("KIND", kind).replace("LIMIT", limit))
    return read_spec(folder / "gate.toml")


def run(file):
    return check(file, CheckOptions(cache=None))


@pytest.mark.parametrize(("shift", "status"), [(0.0, Status.PASSED), (30.0, Status.FAILED)])
def test_keypoints_are_scored_against_the_ground_truth(tmp_path, shift, status):
    code = KEYPOINTS.replace("SHIFT", str(shift))
    found = run(project(tmp_path, code, kind="keypoints", limit="mean_ap_at_least = 0.9"))
    assert found["task.mean_ap"].status is status
    assert found.engines[0].scores.kind == "keypoints"


@pytest.mark.parametrize(("loses", "status"), [(False, Status.PASSED), (True, Status.FAILED)])
def test_tracks_keep_their_state_from_batch_to_batch(tmp_path, loses, status):
    code = TRACKS.replace("LOSES", str(loses))
    found = run(project(tmp_path, code, kind="tracking", limit="idf1_at_least = 0.9"))
    assert found["task.idf1"].status is status
    assert found.engines[0].scores.samples == 2
    if not loses:
        assert found.engines[0].scores.values["num_switches"] == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return found", "return found[:-1]", r"gave 3, expected 4 gate\.Detections"),
        ("return found", "return None", r"gave a NoneType, expected 4 gate\.Detections"),
        ("return found", "return [1] * len(images)", r"gave a int for sample 0, expected a gate\.Detections"),
        ('outputs["y"]', 'outputs["z"]', "decoding the outputs of the reference failed with KeyError: 'z'"),
        ("scores=np.ones(1)", "scores=np.full(1, np.nan)", "NaN"),
    ],
)
def test_a_function_that_goes_wrong_is_a_failure_with_its_cause(tmp_path, old, new, message):
    code = KEYPOINTS.replace("SHIFT", "0").replace(old, new)
    found = run(project(tmp_path, code, kind="keypoints", limit="mean_ap_at_least = 0.9"))
    assert found.status is Status.FAILED
    (failure,) = found.engines[0].failing
    assert re.search(message, failure.message)


def test_a_function_that_is_not_there_is_an_error_of_the_spec(tmp_path):
    file = project(tmp_path, KEYPOINTS.replace("SHIFT", "0"), kind="keypoints", limit="mean_ap_at_least = 0.9")
    text = file.text.replace("project:decode", "project:decoed")
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(SpecError, match="has no function 'decoed'; did you mean 'decode'"):
        run(read_spec(tmp_path / "gate.toml"))


def test_tracking_without_a_function_says_what_it_needs(tmp_path):
    file = project(tmp_path, TRACKS.replace("LOSES", "False"), kind="tracking", limit="idf1_at_least = 0.9")
    text = file.text.replace('[postprocess]\nhead = "function"\nfunction = "project:decode"\n', "")
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(DataError, match='tracking needs .postprocess. head = "function"'):
        run(read_spec(tmp_path / "gate.toml"))


def test_a_function_does_not_change_what_is_compared(tmp_path):
    code = KEYPOINTS.replace("SHIFT", "0").replace("found = []", 'found = []\n    outputs["y"] += 0.0\n')
    code = code.replace("return found", 'outputs["y"][:] = 7\n    return found')
    found = run(project(tmp_path, code, kind="keypoints", limit="mean_ap_at_least = 0.9\n  [engine.parity]"))
    assert found.status is Status.PASSED


def test_the_values_are_numbers(tmp_path):
    code = KEYPOINTS.replace("SHIFT", "0")
    found = run(project(tmp_path, code, kind="keypoints", limit="mean_ap_at_least = 0.9"))
    assert np.isclose(found.engines[0].scores.values["mean_ap"], 1.0)
