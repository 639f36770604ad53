"""Detections are checked before they are scored; boxes of reference and engine are paired; low mean AP is explained."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gate.errors import DataError, MeasurementError, SpecError
from gate.metrics.detection import KINDS, BoxComparison, box_overlaps, explain_low_map
from gate.targets import Categories, Detections, ImageRecord, ImageTarget

pytest.importorskip("pycocotools")

CATEGORIES = Categories({1: "cat", 2: "dog", 4: "fish"})
DETECTION, SEGMENTATION, KEYPOINTS = KINDS


def detections(*rows, **more):
    """Rows of x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64), **more)


def annotation(box, label=1, **more):
    return {"id": 1, "category_id": label, "bbox": list(box), "area": float(box[2] * box[3]), "iscrowd": 0, **more}


def target(*annotations, image_id=7, **more):
    return ImageTarget(ImageRecord(image_id, 100, 80, file_name="a.png", **more), annotations)


TARGET = target(annotation((10, 10, 30, 30)))
RIGHT = detections((10, 10, 40, 40, 0.9, 1))


def scored(found=(RIGHT,), targets=(TARGET,), kind=DETECTION, categories=CATEGORIES, first_sample=0, **options):
    metric = kind.make(options, categories)
    metric.add(list(found), reference=None, targets=list(targets), first_sample=first_sample)
    return metric.statistics()


def test_a_right_box_scores_one():
    values = scored().values()
    assert [values[name] for name in ("mean_ap", "mean_ar", "ap_of.cat")] == pytest.approx([1.0] * 3)
    assert math.isnan(values["ap_of.dog"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_names_what_it_measures_mean_ap_first(kind):
    values = scored(kind=kind, **good_of(kind)).values()
    assert next(iter(kind.values)) == next(iter(values)) == "mean_ap"
    assert set(values) - set(kind.values) == {"ap_of.cat", "ap_of.dog", "ap_of.fish"}
    assert set(kind.values) <= set(values)
    assert all(each.what.endswith(".") for each in kind.values.values())
    assert kind.predictions == "detections"
    assert kind.default_drop["bf16"] == 0.002


def good_of(kind):
    """An image with all that a kind needs, found as it is."""
    if kind is DETECTION:
        return {}
    x = np.arange(17.0)
    points = np.stack([10 + x, 12 + x, np.full(17, 2.0)], axis=1)
    truth = annotation((10, 10, 30, 30), segmentation=[[10, 10, 40, 10, 40, 40, 10, 40]], keypoints=points.reshape(-1))
    mask = {"size": [80, 100], "counts": [10 * 80 + 10, *[30, 50] * 29, 30, 8000 - 10 * 80 - 10 - 80 * 29 - 30]}
    found = replace(RIGHT, masks=(mask,), keypoints=points[None])
    return {"targets": (target(truth),), "found": (found,)}


@pytest.mark.parametrize("kind", KINDS)
def test_stored_arrays_give_the_same_values(kind):
    found = scored(kind=kind, **good_of(kind))
    assert found.values()["mean_ap"] == pytest.approx(1.0)
    again = kind.read(found.to_arrays())
    assert again.values() == pytest.approx(found.values(), nan_ok=True)


def test_arrays_of_another_kind_are_an_error():
    with pytest.raises(MeasurementError, match="of 'bbox', expected 'segm'"):
        SEGMENTATION.read(scored().to_arrays())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [10, 10, float("nan"), 3]}, "not finite"),
        ({"bbox": [10, 10, -5, 30]}, "negative size"),
        ({"bbox": [90, 10, 30, 30]}, r"leaves the image of 100 x 80 by 20 px\n.*x1, y1, x2, y2"),
        ({"bbox": [-20, 10, 30, 30]}, "leaves the image"),
        ({"bbox": [10, 10, 30]}, "has 3 numbers"),
        ({"bbox": "none"}, "is not numbers"),
        ({"bbox": None}, "has no 'bbox'"),
        ({"area": None}, "has no 'area'"),
        ({"area": float("inf")}, "not finite"),
        ({"category_id": 3}, "has category 3; there are 1, 2, 4"),
        ({"category_id": None}, "has no 'category_id'"),
    ],
)
def test_a_malformed_annotation_is_an_error_that_names_the_image(change, message):
    bad = target({**annotation((10, 10, 30, 30)), **change})
    with pytest.raises(DataError, match=f"(?s)image 7 \\(a.png\\), annotation 1.*{message}"):
        scored(targets=[bad])


def test_an_annotated_box_may_leave_its_image_by_a_fraction_of_a_pixel():
    assert scored(targets=[target(annotation((10, 10, 90.4, 70.2)))]).values()["mean_ap"] == 0.0


@pytest.mark.parametrize(("key", "kind"), [("segmentation", SEGMENTATION), ("keypoints", KEYPOINTS)])
def test_annotations_without_what_is_scored_are_an_error(key, kind):
    with pytest.raises(DataError, match=f"has no '{key}'"):
        scored(kind=kind)


@pytest.mark.parametrize(("points", "message"), [([1.0] * 6, "6 numbers"), ([math.nan] * 51, "NaN")])
def test_malformed_annotated_keypoints_are_an_error(points, message):
    with pytest.raises(DataError, match=message):
        scored(kind=KEYPOINTS, targets=[target(annotation((10, 10, 30, 30), keypoints=points))])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (detections((10, 10, 40, 40, math.nan, 1)), "score is NaN"),
        (detections((10, 10, 40, 40, math.inf, 1)), "score is NaN, Inf"),
        (detections((10, 10, math.nan, 40, 0.5, 1)), "box is NaN"),
        (detections((10, 10, 40, math.inf, 0.5, 1)), "box is NaN, Inf"),
        (detections((10, 10, 5, 40, 0.5, 1)), "negative size, such as .*\n.*x, y, width, height"),
        (detections((10, 10, 40, 40, 0.5, 0)), "category is 0; there are 1, 2, 4\n.*counts? its classes from 0"),
        (detections((10, 10, 40, 40, 0.5, 1), (10, 10, 40, 40, 0.5, 1)), "the same detection comes 2 times"),
        (Detections(np.zeros((2, 4)), np.zeros(1), np.ones(1, np.int64)), "do not fit each other"),
        (Detections(np.zeros((1, 4)), np.zeros(1), np.ones(2, np.int64)), "do not fit each other"),
        (Detections(np.zeros((1, 4)), np.zeros(1), np.ones(1)), "do not fit each other"),
        (Detections(np.zeros(4), np.zeros(1), np.ones(1, np.int64)), "do not fit each other"),
        (Detections(np.zeros((1, 4)), np.zeros((1, 1)), np.ones(1, np.int64)), "do not fit each other"),
        ({"boxes": []}, "its predictions are dict"),
    ],
)
def test_malformed_predictions_are_an_error_that_names_the_image(found, message):
    with pytest.raises(MeasurementError, match=f"image 7 \\(a.png\\).*{message}"):
        scored([found])


def test_equal_boxes_of_different_category_or_score_are_no_duplicates():
    rows = [(10, 10, 40, 40, 0.5, 1), (10, 10, 40, 40, 0.5, 2), (10, 10, 40, 40, 0.4, 1)]
    assert scored([detections(*rows)]).detections == 3


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, "have no masks"),
        ((), "0 masks for 1 detections"),
        (({"size": [80, 99], "counts": [80 * 99]},), "mask cannot be used: its mask is 80 x 99"),
        (({"size": [80, 100], "counts": "P"},), "mask cannot be used"),
    ],
)
def test_malformed_predicted_masks_are_an_error(masks, message):
    good = good_of(SEGMENTATION)
    with pytest.raises(MeasurementError, match=message):
        scored([replace(RIGHT, masks=masks)], good["targets"], SEGMENTATION)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (None, "have no keypoints"),
        (np.zeros((1, 5, 3)), r"are \[1, 5, 3\], expected \[1, 17, 3\]"),
        (np.zeros((2, 17, 3)), "are"),
        (np.full((1, 17, 3), np.nan), "NaN"),
    ],
)
def test_malformed_predicted_keypoints_are_an_error(points, message):
    good = good_of(KEYPOINTS)
    with pytest.raises(MeasurementError, match=message):
        scored([replace(RIGHT, keypoints=points)], good["targets"], KEYPOINTS)


def test_keypoints_of_ones_own_skeleton_are_scored():
    categories = Categories({1: "digit"}, {1: (0.1, 0.1)})
    points = np.array([[[12.0, 12, 1], [30, 30, 1]]])
    truth = target(annotation((10, 10, 30, 30), keypoints=[12, 12, 2, 30, 30, 2]))
    found = scored([replace(RIGHT, keypoints=points)], [truth], KEYPOINTS, categories)
    assert found.values()["mean_ap"] == pytest.approx(1.0)


def test_an_image_that_comes_twice_is_an_error():
    with pytest.raises(DataError, match="image id 7 is that of sample 0 too"):
        scored([RIGHT, RIGHT], [TARGET, TARGET])


def test_a_batch_that_is_left_out_is_an_error():
    with pytest.raises(MeasurementError, match="expected the batch from sample 0, got that from 4"):
        scored(first_sample=4)


def test_fewer_detections_than_images_are_an_error():
    with pytest.raises(MeasurementError, match="detections of 1 images for 2 images"):
        scored([RIGHT], [TARGET, target(image_id=8)])


def test_a_target_of_another_kind_is_an_error():
    with pytest.raises(DataError, match="its ground truth is int"):
        scored(targets=[3])


def test_no_detection_in_any_image_is_an_error():
    with pytest.raises(MeasurementError, match="no detection in any of 2 images"):
        scored([detections(), detections()], [TARGET, target(image_id=8)])


def test_an_image_without_detections_is_scored():
    found = scored([RIGHT, detections()], [TARGET, target(annotation((10, 10, 30, 30)), image_id=8)])
    assert found.values()["mean_ar"] == pytest.approx(0.5)


@pytest.mark.parametrize("annotations", [(), (annotation((10, 10, 30, 30), iscrowd=1),)])
def test_nothing_to_find_is_an_error(annotations):
    with pytest.raises(MeasurementError, match="nothing to find in 1 images"):
        scored(targets=[target(*annotations)])


def test_no_image_is_an_error():
    with pytest.raises(MeasurementError, match="no image was scored"):
        scored([], [])


def test_max_detections_cuts_what_counts():
    rows = [(60, 60, 70, 70, 0.9 - place / 100, 1) for place in range(10)] + [(10, 10, 40, 40, 0.1, 1)]
    assert scored([detections(*rows)]).values()["mean_ar"] == pytest.approx(1.0)
    assert scored([detections(*rows)], max_detections=10).values()["mean_ar"] == 0.0


@pytest.mark.parametrize(
    ("options", "categories", "message"),
    [
        ({"max_dets": 3}, CATEGORIES, "no option 'max_dets'"),
        ({"max_detections": 0}, CATEGORIES, "above 0, got 0"),
        ({"max_detections": True}, CATEGORIES, "got True"),
        ({"max_detections": "10"}, CATEGORIES, "got '10'"),
        ({}, None, "needs categories"),
        ({}, Categories({}), "needs categories"),
        ({}, Categories({1: "a", 2: "a"}), "two categories have the name 'a'"),
    ],
)
def test_options_that_it_does_not_have_are_an_error(options, categories, message):
    with pytest.raises(SpecError, match=message):
        DETECTION.make(options, categories)


def compared(theirs, ours, **options):
    comparison = BoxComparison(**options)
    for place, (left, right) in enumerate(zip(theirs, ours, strict=True)):
        comparison.add([left], [right], [ImageRecord(place, 100, 80, file_name=f"{place}.png")])
    return comparison.result()


def test_equal_boxes_agree():
    found = compared([RIGHT], [RIGHT])
    assert (found.matched, found.mean_iou, found.max_score_difference) == (1, 1.0, 0.0)
    assert found.worst == ()


def test_differences_of_boxes_are_counted():
    theirs = detections((0, 0, 10, 10, 0.9, 1), (20, 20, 30, 30, 0.8, 2), (50, 50, 60, 60, 0.7, 1))
    ours = detections((0, 0, 10, 8, 0.8, 1), (20, 20, 30, 30, 0.8, 4), (80, 50, 90, 60, 0.6, 1))
    found = compared([theirs, RIGHT], [ours, RIGHT])
    assert (found.images, found.reference, found.candidate, found.matched) == (2, 4, 4, 3)
    assert found.class_changes == found.reference_only == found.candidate_only == 1
    assert found.mean_iou == pytest.approx((0.8 + 1 + 1) / 3)
    assert found.least_iou == pytest.approx(0.8)
    assert found.max_score_difference == pytest.approx(0.1)
    assert found.mean_score_difference == pytest.approx(0.1 / 3)
    (worst,) = found.worst
    assert (worst.image_id, worst.file_name) == (0, "0.png")
    assert "1 of the reference's boxes not found" in worst.why
    assert [each.unmatched for each in worst.reference] == [False, False, True]
    assert worst.candidate[2].box == (80.0, 50.0, 90.0, 60.0)


def test_a_box_that_crosses_the_least_score_is_not_lost():
    found = compared([detections((0, 0, 10, 10, 0.26, 1))], [detections((0, 0, 10, 10, 0.24, 1))])
    assert (found.matched, found.reference_only, found.reference, found.candidate) == (1, 0, 1, 0)


def test_boxes_of_low_score_do_not_count():
    found = compared([detections((0, 0, 10, 10, 0.1, 1))], [detections()])
    assert (found.reference, found.reference_only) == (0, 0)
    assert math.isnan(found.mean_iou)
    assert math.isnan(found.max_score_difference)


def test_a_pair_of_one_category_goes_before_one_that_overlaps_more():
    theirs = detections((0, 0, 10, 10, 0.9, 1))
    ours = detections((0, 0, 10, 10, 0.9, 2), (0, 0, 10, 9, 0.9, 1))
    found = compared([theirs], [ours])
    assert found.class_changes == 0
    assert found.least_iou == pytest.approx(0.9)


def test_the_worst_images_are_named_most_differences_first():
    ours = [
        detections(*[(20 * each, 0, 20 * each + 9, 9, 0.9, 1) for each in range(number)]) for number in (1, 3, 0, 2)
    ]
    found = compared([detections()] * 4, ours, worst=2)
    assert [each.image_id for each in found.worst] == [1, 3]
    assert found.candidate_only == 6


def test_a_comparison_of_different_numbers_of_images_is_an_error():
    with pytest.raises(MeasurementError, match="engine of 0"):
        BoxComparison().add([RIGHT], [], [TARGET.image])


def test_a_comparison_of_no_image_is_an_error():
    with pytest.raises(MeasurementError, match="no image's boxes were compared"):
        BoxComparison().result()


def test_empty_boxes_overlap_nothing():
    empty = np.array([[5.0, 5, 5, 5]])
    assert box_overlaps(empty, empty).tolist() == [[0.0]]


def found_scene(seed=0, images=12):
    """Images of 200 x 120 in an input of 160 x 160, and boxes found to within a pixel."""
    rng = np.random.default_rng(seed)
    targets, found = [], []
    for image_id in range(images):
        image = ImageRecord(image_id, 200, 120, scale_x=0.8, scale_y=0.8, left=0.0, top=32.0)
        size = rng.uniform(15, 50, (4, 2))
        corner = rng.uniform(0, 1, (4, 2)) * (np.array([200, 120]) - size)
        labels = rng.choice([1, 2, 4], 4)
        boxes = [[*first, *extent] for first, extent in zip(corner.tolist(), size.tolist(), strict=True)]
        targets.append(
            ImageTarget(image, tuple(annotation(b, label) for b, label in zip(boxes, labels.tolist(), strict=True)))
        )
        exact = np.concatenate([corner, corner + size], axis=1) + rng.normal(0, 0.3, (4, 4))
        found.append(Detections(exact, rng.uniform(0.05, 0.95, 4), labels))
    return found, targets


def size_of(boxes):
    return boxes[:, 2:] - boxes[:, :2]


def center_of(boxes):
    return (boxes[:, 2:] + boxes[:, :2]) / 2


READ_WRONG = {
    "are x, y, width, height and were read as x1, y1, x2, y2": lambda b: np.hstack([b[:, :2], size_of(b)]),
    "are x1, y1, x2, y2 and were read as x, y, width, height": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
    "are center and size and were read as x1, y1, x2, y2": lambda b: np.hstack([center_of(b), size_of(b)]),
    "are center and size and were read as x, y, width, height": lambda b: np.hstack(
        [center_of(b), center_of(b) + size_of(b)]
    ),
    "are x, y, width, height and were read as center and size": lambda b: np.hstack(
        [b[:, :2] - size_of(b) / 2, b[:, :2] + size_of(b) / 2]
    ),
    "are x1, y1, x2, y2 and were read as center and size": lambda b: np.hstack(
        [b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2]
    ),
    "x and y are swapped": lambda b: b[:, [1, 0, 3, 2]],
    "fractions of the image and were read as pixels": lambda b: b / [200, 120, 200, 120],
    "pixels and were multiplied by the image's size": lambda b: b * [200, 120, 200, 120],
    "not mapped back to the image": lambda b: b * 0.8 + [0, 32, 0, 32],
    "mapped back from the model's input twice": lambda b: (b - [0, 32, 0, 32]) / 0.8,
}


@pytest.mark.parametrize("said", READ_WRONG)
def test_boxes_read_by_another_convention_are_explained(said):
    found, targets = found_scene()
    right = scored(found, targets).values()["mean_ap"]
    assert explain_low_map(found, targets, CATEGORIES, expected=right) is None
    wrong = [replace(each, boxes=READ_WRONG[said](each.boxes)) for each in found]
    explained = explain_low_map(wrong, targets, CATEGORIES, expected=right)
    assert explained is not None
    assert explained.endswith(said)
    assert f"it would be {right:.3f} if" in explained


@pytest.mark.parametrize(("shift", "said"), [(-1, "one higher"), (1, "one lower")])
def test_labels_shifted_by_one_are_explained(shift, said):
    found, targets = found_scene()
    wrong = [replace(each, labels=each.labels + shift) for each in found]
    assert said in explain_low_map(wrong, targets, CATEGORIES, expected=0.8)


def test_labels_that_are_places_are_explained():
    found, targets = found_scene()
    wrong = [replace(each, labels=np.searchsorted([1, 2, 4], each.labels)) for each in found]
    assert "places among the sorted category ids, counted from 0" in explain_low_map(wrong, targets, CATEGORIES)


def test_a_second_sigmoid_is_seen_in_the_scores():
    found, targets = found_scene()
    wrong = [replace(each, scores=1 / (1 + np.exp(-each.scores))) for each in found]
    assert "a second sigmoid" in explain_low_map(wrong, targets, CATEGORIES)


def test_a_model_that_finds_nothing_is_not_explained():
    found, targets = found_scene()
    rng = np.random.default_rng(1)
    wrong = [replace(each, boxes=np.tile(rng.uniform(0, 10, (4, 2)), 2) + np.array([0, 0, 3, 3])) for each in found]
    assert explain_low_map(wrong, targets, CATEGORIES, expected=0.8) is None


def test_an_explanation_of_other_images_is_an_error():
    found, targets = found_scene()
    with pytest.raises(MeasurementError, match="detections of 12 images for 11 images"):
        explain_low_map(found, targets[1:], CATEGORIES)
