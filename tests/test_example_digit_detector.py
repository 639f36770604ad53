import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gate.data.image_sources import open_images
from gate.data.image_spec import ImagesSpec, Preprocess
from gate.factory import load_callable

pytest.importorskip("PIL")

EXAMPLE = Path(__file__).parents[1] / "examples" / "digit-detector"


def call(name, *arguments, **options):
    return load_callable(name, EXAMPLE, where="test")(*arguments, **options)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    return {split: call("data:make_coco", root, split) for split in ("calibration", "evaluation")}


@pytest.fixture(scope="module")
def evaluation():
    return call("data:evaluation")


def test_splits_draw_from_different_handwriting():
    parts = {split: call("canvases:handwriting", split)[0] for split in ("train", "calibration", "evaluation")}
    assert {split: len(images) for split, images in parts.items()} == {
        "train": 1100,
        "calibration": 200,
        "evaluation": 497,
    }
    seen = {split: {image.tobytes() for image in images} for split, images in parts.items()}
    assert not seen["train"] & seen["evaluation"]
    assert not seen["train"] & seen["calibration"]
    assert not seen["calibration"] & seen["evaluation"]


def test_handwriting_is_what_scikit_learn_loads():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    known = {(image.astype(np.int64).tobytes(), int(label)) for image, label in zip(digits.data, digits.target)}  # noqa: B905
    for split in ("train", "calibration", "evaluation"):
        images, labels = call("canvases:handwriting", split)
        assert all(
            (image.tobytes(), int(label)) in known for image, label in zip(images.reshape(-1, 64), labels, strict=True)
        )


def test_a_canvas_holds_what_it_says():
    sizes = set()
    for index in range(40):
        drawn = call("canvases:canvas", "evaluation", index, seed=0)
        height, width = drawn.label_map.shape
        sizes.add((width, height))
        assert 96 <= height <= 192
        assert 96 <= width <= 192
        assert drawn.pixels.shape == (height, width, 3)
        for digit, (x, y, box_width, box_height), area in zip(drawn.digits, drawn.boxes, drawn.areas, strict=True):
            inside = drawn.label_map[y : y + box_height, x : x + box_width] == digit
            assert inside.sum() == area
            assert inside.any(0)[[0, -1]].all()  # tight: ink on each side of the box
            assert inside.any(1)[[0, -1]].all()
        assert (drawn.label_map != 10).sum() == drawn.areas.sum()
    assert len(sizes) > 30


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path, coco):
    again = call("data:make_coco", tmp_path / "again", "calibration")
    other = call("data:make_coco", tmp_path / "other", "calibration", 1)
    digests = [json.loads((folder / "digests.json").read_text())["files"] for folder in (again, other)]
    assert digests[0] == json.loads((coco["calibration"] / "digests.json").read_text())["files"]
    assert digests[0] != digests[1]


def test_the_canvases_are_those_that_the_weights_were_measured_on():
    # Made of integers alone, hence the same on every machine.
    drawn = [call("canvases:canvas", "evaluation", index, seed=0) for index in range(8)]
    found = hashlib.sha256(b"".join(each.pixels.tobytes() + each.boxes.astype("<i8").tobytes() for each in drawn))
    assert found.hexdigest() == "6cdc236e18535e57f1c8d9754cebc44cb46c40bf49013243daa147fa9df7b8d1"


def test_what_is_there_is_not_made_again(tmp_path):
    folder = call("data:make_coco", tmp_path, "calibration")
    before = (folder / "instances_calibration.json").stat().st_ino
    assert call("data:make_coco", tmp_path, "calibration") == folder
    assert (folder / "instances_calibration.json").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["calibration"]


@pytest.mark.parametrize("harm", ["truncated", "missing", "extra", "no digests"])
def test_a_folder_that_was_harmed_is_made_again(tmp_path, harm):
    folder = call("data:make_coco", tmp_path, "calibration")
    image = sorted((folder / "images").iterdir())[3]
    whole = image.read_bytes()
    if harm == "truncated":
        image.write_bytes(whole[:100])
    elif harm == "missing":
        image.unlink()
    elif harm == "extra":
        (folder / "images" / "more.png").write_bytes(whole)
    else:
        (folder / "digests.json").unlink()
    call("data:make_coco", tmp_path, "calibration")
    assert image.read_bytes() == whole
    assert len(list((folder / "images").iterdir())) == 128
    assert [path.name for path in tmp_path.iterdir()] == ["calibration"]


def test_coco_folder_and_arrays_are_the_same_samples(coco, evaluation):
    spec = ImagesSpec(kind="coco", path="images", annotations="instances_evaluation.json", workers=0)
    with open_images(spec, coco["evaluation"], preprocess=Preprocess(size=(128, 128)), input_name="images") as source:
        assert source.categories.names == {digit + 1: str(digit) for digit in range(10)}
        seen = 0
        for batch in source.batches(64):
            there = slice(batch.first, batch.first + 64)
            np.testing.assert_array_equal(batch.inputs["images"], evaluation.inputs["images"][there])
            seen += len(batch.inputs["images"])
        assert seen == len(evaluation.targets) == 512
        assert source.records == tuple(target.image for target in evaluation.targets)
        for item, target in zip(source.items, evaluation.targets, strict=True):
            assert [each["bbox"] for each in item.annotations] == [each["bbox"] for each in target.annotations]
            assert [each["category_id"] for each in item.annotations] == [
                each["category_id"] for each in target.annotations
            ]


def test_every_category_has_ground_truth_and_some_canvases_have_none(evaluation):
    counts = np.bincount([each["category_id"] for target in evaluation.targets for each in target.annotations])
    assert counts[0] == 0
    assert (counts[1:] >= 50).all()
    assert 5 <= sum(not target.annotations for target in evaluation.targets) <= 60


def test_data_is_read_without_importing_torch_or_scikit_learn():
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE)!r}); import data; data.calibration(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "torch"} & {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.slow
def test_committed_weights_reach_the_committed_metrics():
    for needed in ("torch", "pycocotools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "import json, model, train\n"
        "print(json.dumps(train.mean_ap(model.load())))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stated = json.loads((EXAMPLE / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == pytest.approx(stated, abs=2e-3)
    assert 0.6 < stated["mean_ap"] < 0.95


def test_outputs_are_named_shapes_of_boxes_and_scores():
    torch = pytest.importorskip("torch")
    model = call("model:load")
    assert not model.training
    with torch.inference_mode():
        boxes, scores = model(torch.rand(3, 3, 128, 128))
    assert (boxes.shape, scores.shape) == ((3, 256, 4), (3, 256, 10))
    assert bool((boxes[..., 2:] >= boxes[..., :2]).all())
    assert 0 <= float(scores.min()) <= float(scores.max()) <= 1


def test_weights_are_small_enough_to_commit():
    assert (EXAMPLE / "weights.safetensors").stat().st_size < 1_000_000
