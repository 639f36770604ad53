"""Faults of tasks that a review found: whole runs of small projects through the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.errors import DataError, ReferenceMismatch
from gate.pipeline import CheckOptions, check
from gate.spec import SpecFile, read_spec
from gate.verdict import Status
from tests.steps import test_task
from tests.withstand.conftest import Project
from tests.withstand.detection_project import changed

pytest.importorskip("PIL")
pytest.importorskip("pycocotools")

shared, project = test_task.shared, test_task.project


def accepted(project: Project) -> None:
    from gate.cli.main import main

    assert main(["baseline", "accept", "--reason", "x", "--by", "ada", str(project.folder / "report")]) == 0


@pytest.mark.parametrize(
    "edit",
    [
        ("score_threshold = 0.9", "score_threshold = 0.02"),
        ("options = { max_detections = 99 }", "options = { max_detections = 100 }"),
    ],
)
def test_a_baseline_of_another_reading_of_the_outputs_does_not_let_a_worse_engine_pass(
    project: Project, edit: tuple[str, str]
) -> None:
    project.edit(
        ("score_threshold = 0.02", "score_threshold = 0.9"),
        ("resamples = 200", "resamples = 200\noptions = { max_detections = 99 }"),
        ("mean_ap_drop_at_most = 0.01", "mean_ap_at_least = 0.01\n  [engine.baseline]\n  task_drop_at_most = 0.001"),
    )
    project.check()
    accepted(project)
    assert "  detection: mean_ap 0.07" in project.gate("baseline", "show").text
    assert project.check().code == 0

    project.edit(edit)
    project.break_engine(changed("scores", lambda scores: scores * np.array([1, 0, 1, 1])))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "scored by other [task] options, another [postprocess] or other categories" in outcome.text


def linear_project(folder: Path, *, targets: str, stated: str, limit: str) -> SpecFile:
    """A linear model of two outputs, scored by regression."""
    weights = numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [weights],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "linear.onnx"
    )
    (folder / "linear_data.py").write_text(
        "import numpy as np\nfrom gate import Samples\nX = np.ones((20, 4), np.float32) * np.arange(20, dtype=np.float32)[:, None]\n"
        "Y = X @ np.arange(8, dtype=np.float32).reshape(4, 2)\n"
        f"def evaluation():\n    return Samples({{'x': X}}, targets={targets})\n"
    )
    path = folder / "gate.toml"
    path.write_text(
        f'schema = 1\n[model]\nid = "linear"\nonnx = "linear.onnx"\nmetrics = {{ {stated} }}\n'
        '[inputs.x]\ndtype = "float32"\nshape = ["batch", 4]\nbatch = { min = 1, opt = 8, max = 16 }\n'
        '[data]\nsource = "linear_data:evaluation"\nsamples = 20\n[task]\nkind = "regression"\nresamples = 100\n'
        '[[engine]]\nname = "e"\nbackend = "onnxruntime"\nprecision = "fp32"\nonnx = "linear.onnx"\n'
        f"  [engine.task]\n  {limit}\n"
    )
    return read_spec(path)


def test_what_training_said_of_an_error_need_not_be_a_fraction(tmp_path: Path) -> None:
    file = linear_project(tmp_path, targets="list(Y + 7)", stated="mae = 7.0", limit="mae_at_most = 8.0")
    assert check(file, CheckOptions(cache=None)).engines[0].verdict.status is Status.PASSED
    file = linear_project(tmp_path, targets="list(Y + 7)", stated="mae = 6.0", limit="mae_at_most = 8.0")
    with pytest.raises(ReferenceMismatch, match="mae 7, training said 6"):
        check(file, CheckOptions(cache=None))


def test_targets_without_a_length_are_refused(tmp_path: Path) -> None:
    file = linear_project(tmp_path, targets="(each for each in Y)", stated="mae = 0.0", limit="mae_at_most = 8.0")
    with pytest.raises(DataError, match="its targets are a generator, expected a list"):
        check(file, CheckOptions(cache=None))


BREAKS = {
    "raises in add": ("if first_sample != len(self.hits):", 'raise ValueError("boom")', "boom"),
    "raises in make": ('if set(options) - {"least"}:', 'raise ValueError("boom")\n    if 0:', "boom"),
    "gives a text": ("float(weights @ self.hits / weights.sum())", '"0.9"', "expected a number"),
    "gives no values": ("weights = np.ones", "return None\n        weights = np.ones", "AttributeError"),
    "gives no statistics": ("return Statistics(np.array(self.hits))", "return None", "AttributeError"),
    "stores objects": ('{"hits": self.hits}', '{"hits": self.hits.astype(object)}', "stores 'hits' as object"),
    "says more samples": ("return len(self.hits)\n\n    def values", "return 10**6\n\n    def values", "was given 48"),
    "has a text for a limit": ('{"fp32": 0.05}', '{"fp32": "a"}', "default_drop 'a' for fp32"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_metric_of_another_package_that_goes_wrong_is_an_error_that_names_the_package(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    old, new, words = BREAKS[name]
    assert old in test_task.OWN_METRIC
    if name == "raises in add":
        new = f"{new}\n        {old}"
    monkeypatch.setattr(test_task, "OWN_METRIC", test_task.OWN_METRIC.replace(old, new, 1))
    for _ in test_task.installed.__wrapped__(tmp_path, monkeypatch):
        test_task.counting(project)
        outcome = project.check()
    assert outcome.code in (1, 2), outcome.text
    assert words in outcome.text
    assert "counting 0.3" in outcome.text
