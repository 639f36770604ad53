"""COCO's numbers: those of pycocotools and of faster-coco-eval, and for weights those of images that come again."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gate.errors import DataError, MeasurementError
from gate.metrics.coco import (
    IOU_THRESHOLDS,
    CocoEvaluation,
    CocoStatistics,
    _least_hits,
    rle_from_segmentation,
    summary_names,
    values_by_library,
)
from gate.targets import Detections, ImageRecord, ImageTarget

coco_mask = pytest.importorskip("pycocotools.mask")

SIZE = 320
POINTS = 17


def scene(seed, *, images=12, categories=3, truths=4.0, found=12.0, kind="bbox", ties=True, crowds=0.1):
    """Names, targets and detections: ties in score and box, crowds, all sizes, empty images, labels that are wrong."""
    rng = np.random.default_rng(seed)
    names = {3 * each + 2: f"c{each}" for each in range(categories)}
    ids = np.array(sorted(names))
    image_ids = rng.permutation(10 * images)[:images] + 1
    targets, detections = [], []
    for image_id in image_ids.tolist():
        count = int(rng.poisson(truths))
        size = np.exp(rng.uniform(np.log(8), np.log(200), (count, 2)))
        corner = rng.uniform(0, 1, (count, 2)) * (SIZE - size)
        labels = rng.choice(ids, count)
        image = ImageRecord(image_id, SIZE, SIZE)
        annotations = [
            {
                "id": place,
                "category_id": int(labels[place]),
                "bbox": [*corner[place].tolist(), *size[place].tolist()],
                "area": float(size[place].prod() * rng.uniform(0.5, 1.0)),
                "iscrowd": int(rng.random() < crowds),
            }
            for place in range(count)
        ]
        number = int(rng.poisson(found)) if rng.random() > 0.1 else 0
        if count:
            source = rng.integers(0, count, number)
            noise = rng.normal(0, 0.06, (number, 4)) * np.tile(size[source], 2)
            boxes = np.concatenate([corner[source], corner[source] + size[source]], axis=1) + noise
            guesses = np.where(rng.random(number) < 0.8, labels[source], rng.choice(ids, number))
        else:
            first = rng.uniform(0, 200, (number, 2))
            boxes, guesses = np.concatenate([first, first + 40], axis=1), rng.choice(ids, number)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        scores = rng.random(number)
        if ties:
            boxes, scores = np.round(boxes / 8) * 8, np.round(scores, 1)
        masks = points = None
        if kind == "segm":
            for place, annotation in enumerate(annotations):
                annotation["segmentation"] = segmentation(annotation["bbox"], place)
            masks = tuple(rle_of_box(box) for box in boxes)
        elif kind == "keypoints":
            for annotation in annotations:
                add_keypoints(annotation, rng)
            points = np.zeros((number, POINTS, 3))
            if count:
                truth = np.array([each["keypoints"] for each in annotations]).reshape(count, POINTS, 3)
                points = truth[source] + rng.normal(0, 4, (number, POINTS, 3))
        targets.append(ImageTarget(image, tuple(annotations)))
        detections.append(Detections(boxes, scores, guesses.astype(np.int64), masks, points))
    return names, targets, detections


def pixels_of_box(box):
    x1, y1, x2, y2 = np.clip(np.round(box), 0, SIZE).astype(int).tolist()
    pixels = np.zeros((SIZE, SIZE), np.uint8, order="F")
    pixels[y1:y2, x1:x2] = 1
    return pixels


def rle_of_box(box):
    return coco_mask.encode(pixels_of_box(box))


def segmentation(box, place):
    """A polygon, an RLE, or one without compression, in turn."""
    x, y, width, height = box
    if place % 3 == 0:
        return [[x, y, x + width, y, x + width, y + height, x, y + height]]
    rle = rle_of_box([x, y, x + width, y + height])
    if place % 3 == 1:
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = pixels_of_box([x, y, x + width, y + height]).reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": rle["size"], "counts": np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()}


def add_keypoints(annotation, rng):
    x, y, width, height = annotation["bbox"]
    points = np.zeros((POINTS, 3))
    points[:, 0], points[:, 1] = x + rng.random(POINTS) * width, y + rng.random(POINTS) * height
    points[:, 2] = rng.integers(0, 3, POINTS) * (rng.random() > 0.15)
    annotation["keypoints"] = points.reshape(-1).tolist()


def evaluated(names, targets, detections, **options):
    evaluation = CocoEvaluation(names, **options)
    evaluation.add(targets, detections)
    return evaluation.statistics()


def assert_same(ours, theirs, tolerance=1e-12):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=tolerance, rel=0, nan_ok=True), name


LIBRARIES = ("pycocotools", "faster_coco_eval")


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 15),
    categories=st.integers(1, 5),
    truths=st.sampled_from([0.3, 3.0, 10.0]),
    found=st.sampled_from([0.5, 15.0, 130.0]),
    ties=st.booleans(),
)
def test_boxes_score_as_the_library_says(library, seed, images, categories, truths, found, ties):
    if library == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval")
    data = scene(seed, images=images, categories=categories, truths=truths, found=found, ties=ties)
    names, targets, detections = data
    ours = evaluated(*data).values()
    assert_same(ours, values_by_library(library, targets, detections, category_names=names))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["segm", "keypoints"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_and_keypoints_score_as_the_library_says(library, kind, seed):
    pytest.importorskip(library)
    data = scene(seed, kind=kind, found=30.0 if seed % 2 else 8.0)
    names, targets, detections = data
    ours = evaluated(*data, iou_type=kind).values()
    assert_same(ours, values_by_library(library, targets, detections, category_names=names, iou_type=kind))


def test_keypoints_score_with_sigmas_of_ones_own():
    names, targets, detections = scene(5, kind="keypoints", categories=1)
    sigmas = tuple(np.linspace(0.02, 0.2, POINTS).tolist())
    ours = evaluated(names, targets, detections, iou_type="keypoints", sigmas={next(iter(names)): sigmas}).values()
    theirs = values_by_library(
        "pycocotools", targets, detections, category_names=names, iou_type="keypoints", sigmas=sigmas
    )
    assert_same(ours, theirs)
    assert ours != evaluated(names, targets, detections, iou_type="keypoints").values()


@pytest.mark.parametrize("most", [10, 30, 300])
def test_another_number_of_detections_scores_as_the_library_says(most):
    names, targets, detections = scene(6, categories=1, found=120.0, truths=20.0)
    ours = evaluated(names, targets, detections, max_detections=most).values()
    theirs = values_by_library("pycocotools", targets, detections, category_names=names, max_detections=most)
    assert_same(ours, theirs)


def test_the_twelve_numbers_are_those_that_pycocotools_prints(capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names, targets, detections = scene(7, images=30)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": each.image.image_id, "width": SIZE, "height": SIZE} for each in targets],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
        "annotations": [
            {**each, "image_id": target.image.image_id, "id": 1000 * target.image.image_id + each["id"] + 1}
            for target in targets
            for each in target.annotations
        ],
    }
    truth.createIndex()
    results = [
        {
            "image_id": target.image.image_id,
            "category_id": int(label),
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": float(score),
        }
        for target, found in zip(targets, detections, strict=True)
        for box, score, label in zip(found.boxes.tolist(), found.scores, found.labels, strict=True)
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    ours = evaluated(names, targets, detections).values()
    order = ("mean_ap", "mean_ap_50", "mean_ap_75", "mean_ap_small", "mean_ap_medium", "mean_ap_large")
    order += ("mean_ar_1", "mean_ar_10", "mean_ar", "mean_ar_small", "mean_ar_medium", "mean_ar_large")
    assert [ours[name] for name in order] == pytest.approx(evaluation.stats.tolist(), abs=1e-12, rel=0)
    assert set(order) == set(summary_names("bbox"))


def repeated(targets, detections, weights):
    """Images as often as weights say, each copy under an id of its own."""
    more_targets, more_detections = [], []
    for place, times in enumerate(weights.tolist()):
        for copy in range(times):
            image = ImageRecord(100 * targets[place].image.image_id + copy, SIZE, SIZE)
            more_targets.append(ImageTarget(image, targets[place].annotations))
            more_detections.append(detections[place])
    return more_targets, more_detections


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", range(5))
def test_weighted_values_are_those_of_images_that_come_again(kind, seed):
    names, targets, detections = scene(seed, kind=kind, ties=False)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(targets), np.full(len(targets), 1 / len(targets)))
    ours = evaluated(names, targets, detections, iou_type=kind).values(weights)
    theirs = values_by_library(
        "pycocotools", *repeated(targets, detections, weights), category_names=names, iou_type=kind
    )
    assert_same(ours, theirs)


def test_ones_as_weights_change_nothing():
    found = evaluated(*scene(8))
    assert_same(found.values(np.ones(found.samples, np.int64)), found.values(), tolerance=0)


def test_a_subset_of_the_names_gives_the_same_values():
    found = evaluated(*scene(9))
    whole = found.values()
    for name in found.names:
        assert found.values(names=[name]) == pytest.approx({name: whole[name]}, nan_ok=True)


def test_an_unknown_name_is_an_error():
    with pytest.raises(MeasurementError, match="no value 'map'"):
        evaluated(*scene(9)).values(names=["map"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3, np.int64), r"expected one whole number for each of 12 images"),
        (np.ones(12), r"weights are float64"),
        (np.zeros(12, np.int64), "all 0"),
        (np.array([-1] + [1] * 11), "negative"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(weights, message):
    with pytest.raises(MeasurementError, match=message):
        evaluated(*scene(1)).values(weights)


@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_arrays_give_the_same_values_back(kind):
    found = evaluated(*scene(10, kind=kind), iou_type=kind)
    again = CocoStatistics.from_arrays(found.to_arrays())
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12))
    assert_same(again.values(), found.values(), tolerance=0)
    assert_same(again.values(weights), found.values(weights), tolerance=0)
    assert again.names == found.names


def test_arrays_are_small():
    found = evaluated(*scene(10, images=100, found=40.0))
    size = sum(each.nbytes for each in found.to_arrays().values())
    assert size < 20 * found.detections + 24 * found.annotations + 1000


def damaged(name, change):
    arrays = evaluated(*scene(10)).to_arrays()
    arrays[name] = change(arrays[name])
    return arrays


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("image", lambda each: each[:-1]),
        ("image", lambda each: each + 1000),
        ("image", lambda each: each.astype(np.float64)),
        ("hit", lambda each: each[:-1]),
        ("hit", lambda each: np.full_like(each, 255)),
        ("bounds", lambda each: each[::-1]),
        ("bounds", lambda each: each[:-1]),
        ("rank", lambda each: each + 200),
        ("truth_counts", lambda each: -1 - each),
        ("truth_category", lambda each: each + 100),
        ("head", lambda each: each[:-3]),
        ("head", lambda each: each[:0]),
    ],
)
def test_damaged_arrays_are_an_error(name, change):
    with pytest.raises(MeasurementError, match="stored detections cannot be read"):
        CocoStatistics.from_arrays(damaged(name, change))


def test_a_missing_array_is_an_error():
    arrays = evaluated(*scene(10)).to_arrays()
    for name in arrays:
        with pytest.raises(MeasurementError, match="stored detections cannot be read"):
            CocoStatistics.from_arrays({key: value for key, value in arrays.items() if key != name})


def test_no_image_is_an_error():
    with pytest.raises(MeasurementError, match="no image was scored"):
        CocoEvaluation({1: "a"}).statistics()


def test_what_is_not_there_to_find_is_nan():
    image = ImageRecord(1, SIZE, SIZE)
    big = {"id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "area": 40000.0, "iscrowd": 0}
    found = Detections(np.array([[0.0, 0, 200, 200]]), np.array([0.9]), np.array([1]))
    values = evaluated({1: "a", 2: "b"}, [ImageTarget(image, (big,))], [found]).values()
    assert [values[name] for name in ("mean_ap", "ap_of.a", "mean_ap_large")] == pytest.approx([1.0] * 3)
    assert np.isnan([values["ap_of.b"], values["mean_ap_small"], values["mean_ar_medium"]]).all()


def test_annotation_id_zero_is_found_as_any_other():
    image = ImageRecord(1, SIZE, SIZE)
    first = {"id": 0, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500.0}
    found = Detections(np.array([[0.0, 0, 50, 50]]), np.array([0.9]), np.array([1]))
    assert evaluated({1: "a"}, [ImageTarget(image, (first,))], [found]).values()["mean_ap"] == pytest.approx(1.0)


def test_batches_and_order_of_the_samples_change_nothing():
    names, targets, detections = scene(11, images=30)
    whole = evaluated(names, targets, detections).values()
    evaluation = CocoEvaluation(names)
    for place in np.random.default_rng(0).permutation(30).tolist():
        evaluation.add([targets[place]], [detections[place]])
    assert_same(evaluation.statistics().values(), whole)


def test_more_images_than_are_matched_at_once_score_the_same(monkeypatch):
    data = scene(12, images=25)
    whole = evaluated(*data).values()
    monkeypatch.setattr("gate.metrics.coco._IMAGES_AT_ONCE", 4)
    monkeypatch.setattr("gate.metrics.coco._CELLS_AT_ONCE", 100)
    assert_same(evaluated(*data).values(), whole, tolerance=0)


def test_a_curve_falls_and_its_mean_is_the_average_precision():
    found = evaluated(*scene(13, images=40))
    curve = found.precision_at_recall(iou_threshold=0.5)
    assert curve.shape == (101,)
    assert (np.diff(curve) <= 0).all()
    assert curve.mean() == pytest.approx(found.values()["mean_ap_50"])
    of_one = np.mean([found.precision_at_recall("c0", iou_threshold=each) for each in IOU_THRESHOLDS])
    assert of_one == pytest.approx(found.values()["ap_of.c0"])


def test_a_curve_of_what_is_not_there_is_an_error():
    found = evaluated(*scene(13))
    with pytest.raises(MeasurementError, match="not one of COCO's IoU thresholds"):
        found.precision_at_recall(iou_threshold=0.42)
    with pytest.raises(MeasurementError, match="no category 'x'"):
        found.precision_at_recall("x")


@given(st.integers(1, 10**6))
def test_the_least_hits_reach_a_recall_and_one_less_does_not(to_find):
    thresholds = np.linspace(0, 1, 101)
    least = _least_hits(np.array([float(to_find)]))[0]
    assert (least / to_find >= thresholds).all()
    assert ((least[1:] - 1) / to_find < thresholds[1:]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
def test_compressed_masks_are_read_as_the_library_wrote_them(seed, density):
    rng = np.random.default_rng(seed)
    height, width = (int(each) for each in rng.integers(1, 400, 2))
    image = ImageRecord(1, width, height)
    rle = coco_mask.encode(np.asfortranarray((rng.random((height, width)) < density).astype(np.uint8)))
    assert rle_from_segmentation(rle, image, where="here") == rle
    text = {"size": rle["size"], "counts": rle["counts"].decode()}
    assert rle_from_segmentation(text, image, where="here") == rle


@pytest.mark.parametrize(
    ("given_mask", "message"),
    [
        ({"size": [10, 10], "counts": [50, 10]}, "runs cover 60 pixels"),
        ({"size": [10, 10], "counts": [-50, 150]}, "runs cover"),
        ({"size": [5, 10], "counts": [50]}, r"its mask is 5 x 10, the image 10 x 10"),
        ({"size": [10, 10], "counts": b""}, "no compressed RLE"),
        ({"size": [10, 10], "counts": "P"}, "no compressed RLE"),
        ({"size": [10, 10], "counts": "~~~~~~~~~~~~~~0"}, "no compressed RLE"),
        ({"size": [10, 10], "counts": "é"}, "cannot be read"),
        ({"size": [10, 10]}, "cannot be read: KeyError"),
        ([], "three points or more"),
        ([[1, 2, 3, 4]], "three points or more"),
        ([[1, 2, 3, 4, 5, float("nan")]], "NaN or Inf"),
        ([["a"] * 6], "cannot be read"),
        (7, "cannot be read"),
    ],
)
def test_a_malformed_mask_is_an_error(given_mask, message):
    with pytest.raises(DataError, match=message):
        rle_from_segmentation(given_mask, ImageRecord(1, 10, 10), where="image 1")


BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from gate.errors import BackendUnavailable
from gate.metrics.coco import require_library
try:
    require_library()
except BackendUnavailable as err:
    print(err)
else:
    print("found")
"""


@pytest.mark.parametrize(
    ("blocked", "said"),
    [
        (["pycocotools", "faster_coco_eval"], 'pip install "trt-gate[detection]"'),
        (["pycocotools"], "found"),
        (["faster_coco_eval"], "found"),
    ],
)
def test_without_either_library_the_extra_is_named(blocked, said):
    if blocked == ["pycocotools"]:
        pytest.importorskip("faster_coco_eval")
    text = BLOCKED.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert said in done.stdout


def test_a_library_that_fails_is_a_measurement_error():
    names, targets, detections = scene(1)
    with pytest.raises(MeasurementError, match="pycocotools failed"):
        values_by_library("pycocotools", targets, detections, category_names=names, iou_type="segm")
