"""COCO's results form: what is written is what pycocotools scores, and what is read is what was written."""

import contextlib
import io
import json

import numpy as np
import pytest

from gate.data.coco_results import read_results
from gate.errors import DataError
from gate.metrics.coco_results import detections_from_results, results_from_detections
from gate.metrics.kinds import kind_named
from gate.targets import Categories, Detections, ImageRecord, ImageTarget

IMAGES = [ImageRecord(index, 100, 80) for index in (7, 3, 9)]


def some(count, seed):
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 60, (count, 2))
    return Detections(
        boxes=np.hstack([corners, corners + random.uniform(5, 20, (count, 2))]),
        scores=np.sort(random.uniform(0, 1, count))[::-1],
        labels=random.integers(1, 3, count),
    )


FOUND = [some(4, 0), some(0, 1), some(2, 2)]


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_from_detections(FOUND, IMAGES)))
    for wrote, read in zip(FOUND, read_results(path, IMAGES), strict=True):
        np.testing.assert_allclose(read.boxes, wrote.boxes, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(read.scores, wrote.scores)
        np.testing.assert_array_equal(read.labels, wrote.labels)


def test_masks_and_keypoints_go_along():
    mask = {"size": [80, 100], "counts": "abc"}
    points = np.arange(12.0).reshape(1, 4, 3)
    one = Detections(np.array([[0.0, 0, 5, 5]]), np.ones(1), np.ones(1, np.int64), (mask,), points)
    (found,) = detections_from_results(results_from_detections([one], IMAGES[:1]), IMAGES[:1], where="r")
    assert found.masks == (mask,)
    np.testing.assert_array_equal(found.keypoints, points)


def test_pycocotools_scores_what_is_written_as_the_metric_does():
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = {"images": [{"id": each.image_id, "width": 100, "height": 80} for each in IMAGES], "annotations": []}
    truth["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    targets = []
    for image, found in zip(IMAGES, FOUND, strict=True):
        annotations = []
        for row in range(len(found.scores)):
            left, top, right, bottom = found.boxes[row] + (row % 2) * 1.5
            box = [float(left), float(top), float(right - left), float(bottom - top)]
            entry = {"id": len(truth["annotations"]) + 1, "image_id": image.image_id, "bbox": box, "iscrowd": 0}
            annotations.append({**entry, "category_id": int(found.labels[row]), "area": box[2] * box[3]})
            truth["annotations"].append(annotations[-1])
        targets.append(ImageTarget(image, tuple(annotations)))
    metric = kind_named("detection").make({}, Categories({1: "a", 2: "b"}))
    metric.add(FOUND, reference=FOUND, targets=targets, first_sample=0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results_from_detections(FOUND, IMAGES)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert metric.statistics().values()["mean_ap"] == pytest.approx(evaluation.stats[0], abs=1e-12)


GOOD = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "image_id 8 is not in the ground truth"),
        ({"image_id": "7"}, "image_id is '7', expected a whole number"),
        ({"category_id": None}, "category_id is None"),
        ({"score": float("nan")}, "score is nan, expected a finite number"),
        ({"bbox": [0, 0, 5]}, "expected .x, y, width, height."),
        ({"bbox": [50, 50, -5, 5]}, "has a negative size; is it x1, y1, x2, y2"),
        ({"keypoints": [1, 2]}, "keypoints are not x, y and score"),
        ({"segmentation": [[1, 2, 3]]}, "segmentation is no RLE"),
    ],
)
def test_a_malformed_result_is_named_by_its_place(change, message):
    with pytest.raises(DataError, match=f"1 problem:\n  result 1: .*{message}"):
        detections_from_results([GOOD, {**GOOD, **change}], IMAGES, where="results.json")


def test_all_problems_are_listed_at_once_and_the_rest_counted():
    with pytest.raises(DataError, match="(?s)30 problems:.*result 19: .*and 10 more"):
        detections_from_results([{**GOOD, "image_id": 1}] * 30, IMAGES, where="results.json")


@pytest.mark.parametrize("text", ["", "{", "{}", "7"])
def test_what_is_no_list_of_results_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"cannot be read|expected a list of results"):
        read_results(path, IMAGES)
