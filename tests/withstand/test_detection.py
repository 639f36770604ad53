"""Faults of a detector's engine and of how its answers are read, each met through the command: none may pass.

Nothing but `[engine.task]` is asked of the engine, so that the task alone has to find them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.withstand.conftest import Outcome, Project
from tests.withstand.detection_project import (
    IMAGES,
    INPUT,
    Surgery,
    break_both,
    changed,
    drawn,
    new_project,
    put_table,
    table,
)

pytest.importorskip("PIL")
pytest.importorskip("pycocotools")

Values = npt.NDArray[Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detection")


@pytest.fixture
def project(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Project:
    return new_project(tmp_path, capture=capsys, patch=monkeypatch, shared=shared)


def xywh(boxes: Values) -> Values:
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def cxcywh(boxes: Values) -> Values:
    return np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def fractions(boxes: Values) -> Values:
    return boxes / INPUT


def swapped(boxes: Values) -> Values:
    return boxes[..., [1, 0, 3, 2]]


def in_image_pixels(boxes: Values) -> Values:
    """Mapped out of the letterbox by the model itself."""
    found = boxes.copy()
    for index, image in enumerate(drawn()[0]["images"]):
        scale = min(INPUT / image["width"], INPUT / image["height"])
        inside = np.array([round(image["width"] * scale), round(image["height"] * scale)] * 2)
        sides = np.array([image["width"], image["height"]] * 2)
        found[index] = (boxes[index] - (INPUT - inside) // 2) * sides / inside
    return found


def one_class_up(scores: Values) -> Values:
    return np.roll(scores, 1, axis=2)


def one_class_down(scores: Values) -> Values:
    return np.roll(scores, -1, axis=2)


def first_class_lost(scores: Values) -> Values:
    return np.concatenate([scores[..., 1:], np.zeros_like(scores[..., :1])], axis=2)


def ten_best(scores: Values) -> Values:
    found = scores.copy()
    for row in found:
        row[np.argsort(-row.max(axis=1), kind="stable")[10:]] = 0
    return found


def without_class(scores: Values) -> Values:
    return scores * np.array([1, 0, 1, 1])


def every_second_image(scores: Values) -> Values:
    return scores * (np.arange(IMAGES) % 2)[:, None, None]


def sigmoid_of(name: str) -> Surgery:
    """One more sigmoid at an output of the graph."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if name in node.output)
        node.output[0] = f"{name}_before"
        model.graph.node.append(helper.make_node("Sigmoid", [f"{name}_before"], [name]))

    return change


def of_neighbour(model: onnx.ModelProto) -> None:
    """Each image gets the answer of the one before."""
    for name in ("boxes", "scores"):
        put_table(model, name, np.roll(table(model, name), 1, axis=0))


def reversed_order(model: onnx.ModelProto) -> None:
    for name in ("boxes", "scores"):
        put_table(model, name, table(model, name)[::-1])


def doubled(offset: float) -> Surgery:
    """The first places come again in the empty ones, moved by so many pixels."""

    def change(model: onnx.ModelProto) -> None:
        boxes, scores = table(model, "boxes"), table(model, "scores")
        half = boxes.shape[1] // 2
        boxes[:, half + 1 :], scores[:, half + 1 :] = boxes[:, : half - 1] + offset, scores[:, : half - 1]
        if offset:
            scores[:, half + 1 :] *= 0.999
        put_table(model, "boxes", boxes)
        put_table(model, "scores", scores)

    return change


def one_value(name: str, value: float) -> Surgery:
    def change(values: Values) -> Values:
        found = values.copy()
        found[5, 3, 1] = value
        return found

    return changed(name, change)


def task_finding(outcome: Outcome) -> dict[str, Any]:
    return outcome.failing["task.mean_ap_drop"]


def failure(outcome: Outcome) -> dict[str, Any]:
    """The one failure of an engine whose task could not be scored."""
    assert set(outcome.failing) == {"run"}, outcome.text
    return outcome.failing["run"]


def one_line(outcome: Outcome) -> str:
    return " ".join(outcome.text.split())


def test_the_unbroken_engine_passes_and_is_good(project: Project) -> None:
    outcome = project.check()
    assert outcome.code == 0, outcome.text
    assert outcome.report is not None
    answers = outcome.report["engines"][0]["scores"]
    assert 0.85 < answers["values"]["mean_ap"] < 0.97
    assert answers["boxes"]["reference_only"] == answers["boxes"]["candidate_only"] == 0


@pytest.mark.parametrize(
    ("surgery", "cause"),
    [
        (changed("scores", one_class_up), "category ids were one lower (the model counts from one more)"),
        (changed("scores", one_class_down), "category ids were one higher (the model counts from one less)"),
        (changed("scores", first_class_lost), "category ids were one higher (the model counts from one less)"),
        (changed("boxes", swapped), "x and y are swapped"),
        (changed("boxes", in_image_pixels), "in pixels of the image already and were mapped to it a second time"),
        (of_neighbour, "each answer is that of the image before"),
    ],
    ids=["one class up", "one class down", "first class lost", "x and y swapped", "mapped twice", "order"],
)
def test_an_engine_of_another_convention_fails_and_the_convention_is_named(
    project: Project, surgery: Surgery, cause: str
) -> None:
    project.break_engine(surgery)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    finding = task_finding(outcome)
    assert finding["status"] == "FAILED"
    assert finding["interval"]["lower"] > 0.8
    assert cause in one_line(outcome)


@pytest.mark.parametrize(
    ("surgery", "what", "cause"),
    [
        (changed("boxes", xywh), "boxes end left of or above their beginning, read as xyxy", "are xywh and were read"),
        (changed("boxes", cxcywh), "boxes end left of or above their beginning", "are cxcywh and were read as xyxy"),
        (
            changed("boxes", fractions),
            "declared as pixels of the input",
            "fractions of the input and were read as pixels",
        ),
    ],
    ids=["xywh", "cxcywh", "fractions"],
)
def test_boxes_that_cannot_be_what_is_declared_fail_and_the_hint_names_what_they_are(
    project: Project, surgery: Surgery, what: str, cause: str
) -> None:
    project.break_engine(surgery)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert failure(outcome)["message"].startswith("the engine: ")
    assert what in failure(outcome)["message"]
    assert cause in failure(outcome)["hint"]


@pytest.mark.parametrize(
    ("edits", "cause"),
    [
        ([('format = "xyxy"', 'format = "xywh"')], "the model's boxes are xyxy and were read as xywh"),
        ([('format = "xyxy"', 'format = "cxcywh"')], "the model's boxes are xyxy and were read as cxcywh"),
        (
            [('coordinates = "pixels"', 'coordinates = "normalized"')],
            "boxes are pixels of the input and were read as fractions of the input",
        ),
    ],
)
def test_a_spec_that_declares_another_convention_fails_though_engine_and_reference_agree(
    project: Project, edits: list[tuple[str, str]], cause: str
) -> None:
    project.edit(*edits)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "the reference" in failure(outcome)["message"]
    assert cause in one_line(outcome)


@pytest.mark.parametrize(
    ("surgery", "cause"),
    [
        (changed("scores", one_class_up), "category ids were one lower"),
        (changed("boxes", swapped), "x and y are swapped"),
        (changed("boxes", in_image_pixels), "mapped to it a second time"),
        (of_neighbour, "each answer is that of the image before"),
    ],
    ids=["one class up", "x and y swapped", "mapped twice", "order"],
)
def test_the_same_fault_in_the_reference_does_not_excuse_the_engine(
    project: Project, surgery: Surgery, cause: str
) -> None:
    break_both(project, surgery)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert failure(outcome)["message"].startswith("the reference's own answers are read wrongly: ")
    assert cause in failure(outcome)["message"]


def test_a_reference_that_finds_nothing_right_lets_no_engine_pass(project: Project) -> None:
    break_both(project, changed("boxes", lambda boxes: boxes / 2))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert task_finding(outcome)["status"] == "FAILED"
    assert "so no engine could fail, and none can pass" in task_finding(outcome)["detail"]


def test_categories_that_are_permuted_in_the_spec_fail(project: Project) -> None:
    project.edit(("category_ids = [1, 2, 3, 4]", "category_ids = [2, 3, 4, 1]"))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "category ids were one lower" in failure(outcome)["message"]


@pytest.mark.parametrize("ids", ["[0, 1, 2, 3]", "[2, 3, 4, 5]"])
def test_a_category_id_that_the_ground_truth_does_not_have_fails(project: Project, ids: str) -> None:
    project.edit(("category_ids = [1, 2, 3, 4]", f"category_ids = {ids}"))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "there are 1, 2, 3, 4" in failure(outcome)["message"]
    assert "count its classes from 0" in failure(outcome)["hint"]


@pytest.mark.parametrize(
    ("surgery", "least"),
    [
        (changed("scores", ten_best), 0.2),
        (changed("scores", without_class), 0.2),
        (changed("scores", every_second_image), 0.1),
        (changed("boxes", lambda boxes: boxes * INPUT), 0.8),
        (reversed_order, 0.8),
    ],
    ids=["ten detections", "a class missing", "half of the images empty", "boxes scaled again", "reversed"],
)
def test_an_engine_that_finds_less_fails(project: Project, surgery: Surgery, least: float) -> None:
    project.break_engine(surgery)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert task_finding(outcome)["status"] == "FAILED"
    assert task_finding(outcome)["interval"]["lower"] > least
    assert "boxes differ most in 0" in outcome.text


@pytest.mark.parametrize(
    "limit", ["mean_ap_at_least = 0.8", "mean_ap_ratio_at_least = 0.99", "mean_ar_10_drop_at_most = 0.01"]
)
def test_other_limits_find_a_missing_class_too(project: Project, limit: str) -> None:
    project.edit(("mean_ap_drop_at_most = 0.01", limit))
    assert project.check().code == 0
    project.break_engine(changed("scores", without_class))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert [each["status"] for each in outcome.failing.values()] == ["FAILED"]


def test_a_class_that_the_output_has_no_column_for_fails(project: Project) -> None:
    project.break_engine(changed("scores", lambda scores: scores[..., :3]))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert (
        "'scores' has shape [16, 40, 3], the reference has [16, 40, 4]" in outcome.failing["parity.outputs"]["message"]
    )


def test_fewer_columns_than_categories_in_both_fails(project: Project) -> None:
    break_both(project, changed("scores", lambda scores: scores[..., :3]))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "output 'scores' has 3 classes; category_ids has 4" in failure(outcome)["message"]


def test_scores_after_a_second_sigmoid_fail_though_they_rank_alike(project: Project) -> None:
    project.break_engine(sigmoid_of("scores"))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "the engine: all scores lie between 0.5" in failure(outcome)["message"]
    assert "as after a second sigmoid" in failure(outcome)["message"]


def test_probabilities_of_an_engine_where_logits_are_declared_fail(project: Project) -> None:
    def logits(scores: Values) -> Values:
        inside = np.clip(scores, 1e-4, 1 - 1e-4)
        return np.log(inside / (1 - inside))

    project.edit(('activation = "none"', 'activation = "sigmoid"'))
    break_both(project, changed("scores", logits))
    assert project.check().code == 0
    project.break_engine(sigmoid_of("scores"))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "are probabilities already, and a second sigmoid would flatten them" in failure(outcome)["message"]
    assert 'activation = "none"' in failure(outcome)["hint"]


def test_a_second_sigmoid_in_both_is_named(project: Project) -> None:
    break_both(project, sigmoid_of("scores"))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "as after a second sigmoid" in failure(outcome)["hint"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("output", ["scores", "boxes"])
def test_one_value_that_is_not_finite_fails_and_the_image_is_named(project: Project, output: str, value: float) -> None:
    project.break_engine(one_value(output, value))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert failure(outcome)["message"] == f"image 105 (005.png): the engine: output '{output}' holds NaN or Inf"


def test_a_reference_that_is_not_finite_is_an_error(project: Project) -> None:
    break_both(project, one_value("scores", float("nan")))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "the reference itself gives NaN or Inf in output 'scores'" in outcome.text


def test_scores_that_are_no_probabilities_fail(project: Project) -> None:
    project.break_engine(changed("scores", lambda scores: scores * 2))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "not between 0 and 1" in failure(outcome)["message"]


@pytest.mark.parametrize(
    ("breaks", "who"), [(Project.break_engine, "the engine"), (break_both, "the reference")], ids=["engine", "both"]
)
def test_no_detection_in_any_image_fails(
    project: Project, breaks: Callable[[Project, Surgery], None], who: str
) -> None:
    breaks(project, changed("scores", np.zeros_like))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert failure(outcome)["message"] == f"{who}: no detection in any of 48 images"


def test_the_same_detection_twice_fails(project: Project) -> None:
    project.edit(("iou_threshold = 0.5", "nms = false"))
    assert project.check().code == 0
    project.break_engine(doubled(0.0))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "the engine: the same detection comes 2 times: category" in failure(outcome)["message"]
    assert "non-maximum suppression left out" in failure(outcome)["hint"]


def test_duplicates_that_an_engine_left_in_fail(project: Project) -> None:
    """A graph that suppresses inside, of which the engine has another threshold."""
    project.edit(("iou_threshold = 0.5", "nms = false"))
    project.break_engine(doubled(0.05))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert task_finding(outcome)["interval"]["lower"] > 0.1
    assert "boxes that the reference does not have" in outcome.text


def test_duplicates_before_suppression_on_the_host_change_nothing(project: Project) -> None:
    project.break_engine(doubled(0.05))
    assert project.check().code == 0


def with_nms_inside(project: Project) -> Project:
    """The engine is made here, with suppression in its graph, in a cache of its own."""
    break_both(project, doubled(0.05))
    project.edit(('onnx = "engine.onnx"\n  [engine.task]', 'nms = "onnx"\n  [engine.task]'))
    return Project(project.folder, project.folder / "cache", project.capture)


def tampered(patch: pytest.MonkeyPatch, **other: Any) -> None:
    """A surgery that puts something else into the graph than the spec says."""
    from gate.lower import nms

    true = nms.with_onnx_nms
    patch.setattr(
        nms, "with_onnx_nms", lambda model, out, config: true(model, out, msgspec.structs.replace(config, **other))
    )


def test_suppression_inside_the_graph_passes(project: Project) -> None:
    outcome = with_nms_inside(project).check()
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"iou_threshold": 0.99}, "boxes of one class overlap by 0.9"),
        (
            {"category_ids": (1, 2, 3, 4, 5)},
            "output 'scores' is [batch, 40, 4], expected rank 3 with 5 as its last size",
        ),
        ({"format": "xywh"}, "task.mean_ap_drop"),
        ({"format": "cxcywh"}, "task.mean_ap_drop"),
        ({"max_detections": 10}, "task.mean_ap_drop"),
        ({"score_threshold": 0.8}, "task.mean_ap_drop"),
        ({"activation": "sigmoid"}, "as after a second sigmoid"),
    ],
    ids=["iou threshold", "classes", "xywh", "cxcywh", "ten detections", "score threshold", "second sigmoid"],
)
def test_a_graph_that_suppresses_otherwise_than_the_spec_says_fails(
    project: Project, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], what: str
) -> None:
    changed_project = with_nms_inside(project)
    tampered(monkeypatch, **other)
    outcome = changed_project.check()
    assert outcome.code == 1, outcome.text
    assert what in one_line(outcome)
    assert "INCONCLUSIVE" not in outcome.text


def test_suppression_cannot_be_put_into_a_graph_that_is_the_team_s_own(project: Project) -> None:
    project.edit(('onnx = "engine.onnx"\n  [engine.task]', 'onnx = "engine.onnx"\nnms = "onnx"\n  [engine.task]'))
    outcome = project.check()
    assert outcome.code == 2, outcome.text
    assert "nms changes the graph that is made here, and the engine has its own onnx" in one_line(outcome)


def labelled(labels: Callable[[Values], Values] = lambda labels: labels) -> Surgery:
    """The best score and its class in two outputs, the class changed."""

    def change(model: onnx.ModelProto) -> None:
        scores = table(model, "scores")
        put_table(model, "scores", scores.max(axis=2))
        found = labels(scores.argmax(axis=2)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(found, "labels_table"))
        model.graph.node.append(helper.make_node("Gather", ["labels_table", "index"], ["labels"], axis=0))
        model.graph.output.append(helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["batch", found.shape[1]]))

    return change


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (lambda labels: labels + 1, "output 'labels' has class 4, which has no category id: there are 4"),
        (lambda labels: labels * 0 + 17, "output 'labels' has class 17, which has no category id: there are 4"),
        (lambda labels: labels - 1, "output 'labels' has class -1, which has no category id: there are 4"),
        (lambda labels: labels + 0.5, "output 'labels' holds labels that are no whole numbers"),
    ],
)
def test_a_prediction_of_an_unknown_category_fails(
    project: Project, labels: Callable[[Values], Values], what: str
) -> None:
    project.edit(('scores = "scores"', 'scores = "scores"\nlabels = "labels"'))
    engine = project.folder / "engine.onnx"
    before = engine.read_bytes()
    break_both(project, labelled())
    assert project.check().code == 0
    engine.write_bytes(before)
    project.break_engine(labelled(labels))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert f"the engine: {what}" in failure(outcome)["message"]


def repeated_rows(model: onnx.ModelProto) -> None:
    for name in ("boxes", "scores"):
        node = next(node for node in model.graph.node if name in node.output)
        node.output[0] = f"{name}_once"
        model.graph.node.append(helper.make_node("Concat", [f"{name}_once"] * 2, [name], axis=0))


def half_of_the_rows(model: onnx.ModelProto) -> None:
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in (("from_row", 0), ("to_row", 1 << 60), ("of_axis", 0), ("each", 2))
    )
    for name in ("boxes", "scores"):
        node = next(node for node in model.graph.node if name in node.output)
        node.output[0] = f"{name}_all"
        model.graph.node.append(
            helper.make_node("Slice", [f"{name}_all", "from_row", "to_row", "of_axis", "each"], [name])
        )


@pytest.mark.parametrize(
    ("surgery", "rows"), [(repeated_rows, 32), (half_of_the_rows, 8)], ids=["for images not asked", "half skipped"]
)
def test_answers_for_another_number_of_images_fail(project: Project, surgery: Surgery, rows: int) -> None:
    project.break_engine(surgery)
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    message = " ".join(str(each.get("message", "")) for each in outcome.failing.values())
    assert f"[{rows}, 40, 4]" in message or f"{rows}" in message, outcome.text
