import subprocess
import sys

import numpy as np
import pytest

from gate.errors import BackendUnavailable, MeasurementError
from gate.report.drawing import (
    CANDIDATE_COLOUR,
    REFERENCE_COLOUR,
    TRUTH_COLOUR,
    draw_confusion,
    draw_detections,
    draw_precision_recall,
)
from gate.targets import Detections, ImageRecord, ImageTarget

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

GREY = np.full((60, 80, 3), 128, np.uint8)


def detections(*boxes, score=0.9, label=1):
    return Detections(
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        scores=np.full(len(boxes), score),
        labels=np.full(len(boxes), label, np.int64),
    )


def target(box, width=80, height=60, **more):
    annotation = {"id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0} | more
    return ImageTarget(ImageRecord(7, width, height, file_name="seven.png"), (annotation,))


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count(pixels, colour):
    wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    return int((pixels == wanted).all(-1).sum())


def test_reference_candidate_and_ground_truth_are_drawn_each_in_its_colour(tmp_path):
    path = tmp_path / "deep" / "boxes.png"
    draw_detections(
        path,
        GREY,
        reference=detections((5, 5, 30, 40)),
        candidate=detections((40, 10, 70, 50)),
        target=target([20, 20, 30, 30]),
        names={1: "one"},
    )
    pixels = pixels_of(path)
    assert max(pixels.shape) >= 640
    for colour in (REFERENCE_COLOUR, CANDIDATE_COLOUR, TRUTH_COLOUR):
        assert count(pixels, colour) > 300, colour


def test_a_candidate_that_found_nothing_leaves_only_its_line_in_the_legend(tmp_path):
    both, alone = tmp_path / "both.png", tmp_path / "alone.png"
    reference = detections((5, 5, 30, 40))
    draw_detections(both, GREY, reference=reference, candidate=detections((40, 10, 70, 50)))
    draw_detections(alone, GREY, reference=reference, candidate=detections())
    assert count(pixels_of(alone), CANDIDATE_COLOUR) < count(pixels_of(both), CANDIDATE_COLOUR) / 5
    assert count(pixels_of(alone), REFERENCE_COLOUR) > 300


def test_lines_of_the_candidate_are_broken_and_those_of_the_reference_are_not(tmp_path):
    box = (10, 10, 70, 50)
    found = {}
    for who, other in (("reference", "candidate"), ("candidate", "reference")):
        draw_detections(tmp_path / "one.png", GREY, **{who: detections(box, score=1.0), other: detections()})
        found[who] = pixels_of(tmp_path / "one.png")
    colours = {"reference": REFERENCE_COLOUR, "candidate": CANDIDATE_COLOUR}
    # The left edge at x = 10: 8 screen pixels an image pixel.
    drawn = {who: count(pixels[:, : pixels.shape[1] // 3], colours[who]) for who, pixels in found.items()}
    assert drawn["candidate"] < 0.85 * drawn["reference"]


def test_where_both_agree_both_are_seen(tmp_path):
    found = detections((5, 5, 70, 50))
    draw_detections(tmp_path / "boxes.png", GREY, reference=found, candidate=found)
    pixels = pixels_of(tmp_path / "boxes.png")
    assert count(pixels, REFERENCE_COLOUR) > 300
    assert count(pixels, CANDIDATE_COLOUR) > 300


def test_a_detection_without_a_counterpart_is_hatched(tmp_path):
    plain, hatched = tmp_path / "plain.png", tmp_path / "hatched.png"
    candidate = detections((10, 10, 70, 50))
    draw_detections(plain, GREY, reference=detections(), candidate=candidate)
    draw_detections(hatched, GREY, reference=detections(), candidate=candidate, candidate_alone=(0,))
    inside = (slice(150, 400), slice(150, 500))
    changed = (pixels_of(plain)[inside] != pixels_of(hatched)[:, : pixels_of(plain).shape[1]][inside]).any(-1)
    assert 0.05 < changed.mean() < 0.6


def test_labels_of_boxes_on_one_spot_do_not_hide_each_other(tmp_path):
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    box = (20.0, 40.0, 50.0, 55.0)
    alike = [box, (20.0, 40.0, 50.5, 55.0), (20.0, 40.0, 50.0, 55.5)]
    high = {}
    for path, boxes in ((one, [box]), (three, alike)):
        draw_detections(path, GREY, reference=detections(*boxes), candidate=detections())
        # Grey between the picture's head and the box is where no label is.
        high[path] = (pixels_of(path)[60:350, 190:200] != 128).any((1, 2)).sum()
    assert 5 < high[one] < 20
    assert high[three] - high[one] in range(26, 34)  # two labels more, of 15 px each


def test_detections_below_the_least_score_are_not_drawn(tmp_path):
    path = tmp_path / "boxes.png"
    weak = detections((5, 5, 30, 40), score=0.1)
    draw_detections(path, GREY, reference=weak, candidate=weak)
    few = count(pixels_of(path), REFERENCE_COLOUR)
    draw_detections(path, GREY, reference=weak, candidate=weak, least_score=0.05)
    assert count(pixels_of(path), REFERENCE_COLOUR) > 5 * max(few, 1)


def test_crowds_are_not_drawn(tmp_path):
    path = tmp_path / "boxes.png"
    draw_detections(
        path, GREY, reference=detections(), candidate=detections(), target=target([20, 20, 30, 30], iscrowd=1)
    )
    crowd = count(pixels_of(path), TRUTH_COLOUR)
    draw_detections(path, GREY, reference=detections(), candidate=detections(), target=target([20, 20, 30, 30]))
    assert count(pixels_of(path), TRUTH_COLOUR) > 5 * max(crowd, 1)


def test_a_grey_image_and_a_name_that_looks_like_a_formula_are_drawn(tmp_path):
    path = tmp_path / "boxes.png"
    found = detections((5, 5, 30, 40))
    draw_detections(path, GREY[..., 0], reference=found, candidate=found, names={1: "$\\bad{ 数字"})
    assert count(pixels_of(path), REFERENCE_COLOUR) > 300


def test_a_large_image_is_drawn_smaller(tmp_path):
    path = tmp_path / "large.png"
    found = detections((100, 100, 2000, 900))
    draw_detections(path, np.zeros((1000, 4000, 3), np.uint8), reference=found, candidate=found)
    assert pixels_of(path).shape[1] <= 1650


def test_the_same_picture_is_the_same_bytes(tmp_path):
    found = detections((5, 5, 30, 40))
    for name in ("a.png", "b.png"):
        draw_detections(tmp_path / name, GREY, reference=found, candidate=found)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3), np.float32)],
    ids=["empty", "four channels", "float"],
)
def test_what_is_no_image_is_refused_and_nothing_is_written(tmp_path, image):
    with pytest.raises(MeasurementError, match="an image must be uint8"):
        draw_detections(tmp_path / "x.png", image, reference=detections(), candidate=detections())
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_another_size_than_its_ground_truth_is_refused(tmp_path):
    with pytest.raises(MeasurementError, match="the image is 80 x 60, its ground truth says 128 x 128"):
        draw_detections(
            tmp_path / "x.png",
            GREY,
            reference=detections(),
            candidate=detections(),
            target=target([1, 1, 5, 5], width=128, height=128),
        )


def test_boxes_that_are_not_finite_are_refused(tmp_path):
    bad = detections((5, 5, np.nan, 40))
    with pytest.raises(MeasurementError, match="the candidate has boxes or scores that are not finite"):
        draw_detections(tmp_path / "x.png", GREY, reference=detections(), candidate=bad)


def test_fewer_scores_than_boxes_are_refused(tmp_path):
    bad = Detections(np.zeros((2, 4)), np.zeros(1), np.zeros(1, np.int64))
    with pytest.raises(MeasurementError, match="the reference has boxes .2, 4., scores .1. and labels .1."):
        draw_detections(tmp_path / "x.png", GREY, reference=bad, candidate=detections())


def test_each_curve_of_precision_over_recall_is_drawn(tmp_path):
    path = tmp_path / "curves.png"
    recall = np.linspace(0, 1, 101)
    draw_precision_recall(
        path, {"reference": (recall, 1 - recall**4), "_candidate $": (recall, 1 - recall**2)}, title="IoU 0.50"
    )
    pixels = pixels_of(path)
    assert count(pixels, REFERENCE_COLOUR) > 300
    assert count(pixels, CANDIDATE_COLOUR) > 150


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "there is no curve"),
        ({"a": (np.array([]), np.array([]))}, "recall of 'a' must be numbers"),
        ({"a": (np.array([0.0, np.nan]), np.array([1.0, 1.0]))}, "recall of 'a' must be from 0 to 1"),
        ({"a": (np.array([0.0, 1.0]), np.array([1.0, 1.1]))}, "precision of 'a' must be from 0 to 1"),
        ({"a": (np.array([0.0, 1.0]), np.array([1.0]))}, "2 values of recall and 1 of precision"),
    ],
    ids=["none", "empty", "NaN", "above one", "two lengths"],
)
def test_curves_that_cannot_be_drawn_are_refused(tmp_path, curves, message):
    with pytest.raises(MeasurementError, match=message):
        draw_precision_recall(tmp_path / "x.png", curves)
    assert list(tmp_path.iterdir()) == []


def test_a_confusion_matrix_is_dark_on_its_diagonal(tmp_path):
    path = tmp_path / "matrix.png"
    draw_confusion(path, np.diag([900, 12_000, 3_000_000]), ["zero", "$1", "a very long name of a class indeed"])
    pixels = pixels_of(path)
    assert count(pixels, "#08306b") > 3000  # the darkest of Blues
    assert count(pixels, "#f7fbff") > 6000  # the lightest


def test_a_matrix_of_many_classes_is_drawn_without_numbers(tmp_path):
    draw_confusion(tmp_path / "matrix.png", np.eye(120, dtype=np.int64), [f"class {index}" for index in range(120)])
    assert pixels_of(tmp_path / "matrix.png").shape[0] > 1000


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        (np.zeros((2, 3), np.int64), ["a", "b"], "must be integers .C, C."),
        (np.full((2, 2), np.nan), ["a", "b"], "must be integers .C, C., got float64"),
        (np.eye(2, dtype=np.int64), ["a"], "of 2 classes has 1 names"),
        (np.zeros((2, 2), np.int64), ["a", "b"], "at least one"),
        (np.zeros((0, 0), np.int64), [], "at least one"),
        (np.array([[1, -1], [0, 1]]), ["a", "b"], "must hold counts"),
    ],
    ids=["not square", "NaN", "a name missing", "all zero", "empty", "negative"],
)
def test_matrices_that_cannot_be_drawn_are_refused(tmp_path, matrix, names, message):
    with pytest.raises(MeasurementError, match=message):
        draw_confusion(tmp_path / "x.png", matrix, names)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailable, match="pip install matplotlib"):
        draw_detections(tmp_path / "x.png", GREY, reference=detections(), candidate=detections())


def test_nothing_of_pyplot_is_loaded(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from gate.report.drawing import draw_confusion\n"
        f"draw_confusion(Path({str(tmp_path / 'm.png')!r}), np.eye(2, dtype=np.int64), ['a', 'b'])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
