"""Faults of images and their ground truth, met through the command: each is an error that names the cause, before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.withstand.conftest import Outcome, Project
from tests.withstand.detection_project import edit_annotations, new_project

pytest.importorskip("PIL")
pytest.importorskip("pycocotools")

Content = dict[str, Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detection")


@pytest.fixture
def project(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Project:
    return new_project(tmp_path, capture=capsys, patch=monkeypatch, shared=shared)


def refused(outcome: Outcome, *words: str) -> None:
    """The command ended before anything ran, and says why."""
    assert outcome.code == 2, outcome.text
    assert outcome.report is None
    text = " ".join(outcome.text.split())
    for each in words:
        assert each in text


def annotation(key: str, value: Any, place: int = 7) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["annotations"][place][key] = value

    return change


def image(key: str, value: Any, place: int = 3) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["images"][place][key] = value

    return change


def emptied(key: str) -> Callable[[Content], None]:
    return lambda content: content[key].clear()


def second_half_lost(content: Content) -> None:
    del content["images"][24:]
    kept = {each["id"] for each in content["images"]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in kept]


def boxes_as_corners(content: Content) -> None:
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        each["bbox"] = [x, y, x + width, y + height]


def image_ids_moved(content: Content) -> None:
    for each in content["annotations"]:
        each["image_id"] += 100


def test_half_of_the_images_is_an_error(project: Project) -> None:
    edit_annotations(project, second_half_lost)
    refused(project.check(), "has 24 images, 48 were asked for", "Fewer samples than asked for is never a pass")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (annotation("id", 3), "annotation 3: this id is there twice"),
        (image("id", 101), "image id 101 is there twice, as 001.png and 003.png"),
        (image("file_name", "001.png"), "001.png is the file of images 101 and 103"),
        (image("file_name", "absent.png"), "absent.png: there is no such file"),
        (image("file_name", "../gate.toml"), "lies outside the folder of images"),
        (image("width", 5000), "003.png: is"),
        (image("height", 0), "expected pixels"),
        (annotation("image_id", 999), "there is no image 999"),
        (image_ids_moved, "there is no image 200"),
        (annotation("category_id", 5), "there is no category 5"),
        (annotation("category_id", 0), "there is no category 0"),
        (annotation("bbox", [1, 2, 5000, 4]), "px outside the image"),
        (annotation("bbox", [-20, 2, 30, 4]), "reaches 20 px outside the image"),
        (boxes_as_corners, "(xywh) reaches"),
        (annotation("bbox", [float("nan"), 2, 3, 4]), "bbox [nan, 2, 3, 4] is not finite"),
        (annotation("bbox", [1, 2, float("inf"), 4]), "is not finite"),
        (annotation("bbox", [1, 2, 3]), "bbox must be four numbers"),
        (annotation("bbox", None), "has no bbox"),
        (annotation("bbox", [1, 2, -3, 4]), "has no area"),
        (annotation("bbox", [1, 2, 0, 4]), "has no area"),
        (annotation("area", float("nan")), "area must be a finite number"),
        (annotation("iscrowd", 2), "iscrowd must be 0 or 1, got 2"),
        (emptied("annotations"), "annotations is empty: there is nothing to compare with"),
        (emptied("images"), "images is empty: there is nothing to compare with"),
        (emptied("categories"), "categories is empty: there is nothing to compare with"),
        (lambda content: content.pop("annotations"), "has no list 'annotations'"),
        (lambda content: content["categories"].append({"id": 1, "name": "more"}), "id 1 is there twice"),
        (lambda content: content["categories"].append({"id": 9, "name": "cat"}), "the name 'cat' is there twice"),
    ],
)
def test_ground_truth_that_contradicts_itself_or_the_images_is_an_error(
    project: Project, change: Callable[[Content], Any], words: str
) -> None:
    edit_annotations(project, change)
    refused(project.check(), words, "instances.json")


def test_every_problem_is_listed_at_once(project: Project) -> None:
    for change in (
        annotation("category_id", 9),
        annotation("bbox", [float("nan")] * 4, 8),
        annotation("image_id", 5, 9),
    ):
        edit_annotations(project, change)
    (project.folder / "images" / "004.png").unlink()
    refused(
        project.check(),
        "4 problems",
        "there is no category 9",
        "is not finite",
        "there is no image 5",
        "004.png: there is",
    )


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Path.unlink, "there is no such file"),
        (lambda path: path.write_bytes(b""), "is empty: 0 bytes"),
        (lambda path: path.write_bytes(b"not an image at all"), "010.png"),
        (cut_off, "010.png"),
    ],
    ids=["missing", "zero bytes", "no image", "cut off"],
)
def test_a_broken_image_is_an_error_that_names_the_file(
    project: Project, harm: Callable[[Path], Any], words: str
) -> None:
    harm(project.folder / "images" / "010.png")
    refused(project.check(), words, "010.png")


def test_an_image_of_another_size_than_its_ground_truth_says_is_an_error(project: Project) -> None:
    from PIL import Image

    Image.new("RGB", (33, 22), (52,) * 3).save(project.folder / "images" / "010.png")
    refused(project.check(), "010.png: is 33 x 22 pixels, its ground truth says")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ('{"images": [', "is no JSON"),
        ("[]", "holds a list, expected an object with images, annotations, categories"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]', "holds a list"),
        ("{}", "has no list 'images', 'annotations', 'categories'"),
    ],
)
def test_annotations_that_are_no_instances_json_are_an_error(project: Project, text: str, words: str) -> None:
    (project.folder / "instances.json").write_text(text)
    refused(project.check(), words)


def test_annotations_that_are_not_there_are_an_error(project: Project) -> None:
    (project.folder / "instances.json").unlink()
    refused(project.check(), "there is no file", "instances.json")


@pytest.mark.parametrize(
    ("ids", "words"),
    [("[100, 999]", "image_ids: there is no image 999"), ("[100, 100]", "image_ids names an image twice")],
)
def test_image_ids_that_the_ground_truth_does_not_have_are_an_error(project: Project, ids: str, words: str) -> None:
    project.edit(("samples = 48", "samples = 2"), ('kind = "coco"\n', f'kind = "coco"\nimage_ids = {ids}\n'))
    refused(project.check(), words)


def test_a_subset_without_an_object_is_a_failure(project: Project) -> None:
    def no_objects(content: Content) -> None:
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] > 103]

    edit_annotations(project, no_objects)
    ids = "image_ids = [100, 101, 102, 103]\n"
    project.edit(("samples = 48", "samples = 4"), ('kind = "coco"\n', f'kind = "coco"\n{ids}'))
    outcome = project.check()
    assert outcome.code == 1, outcome.text
    assert "there is nothing to find in 4 images" in outcome.text


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (('kind = "detection"', 'kind = "detecton"'), "there is no kind of task 'detecton', did you mean 'detection'?"),
        (("mean_ap_drop_at_most", "mean_ap_drop_at_mots"), "did you mean 'mean_ap_drop_at_most'?"),
        (("mean_ap_drop_at_most = 0.01", "mean_ap_drop_at_most = -0.01"), "expected 0 or more"),
        (("mean_ap_drop_at_most = 0.01", "mean_ap_drop_at_most = inf"), "expected a finite number"),
        (("category_ids = [1, 2, 3, 4]", "category_ids = [1, 2, 3, 3]"), "names a category twice"),
        (('format = "xyxy"\n', ""), "format must be declared"),
        (('activation = "none"\n', ""), "activation must be declared"),
        (('coordinates = "pixels"\n', ""), "coordinates must be declared"),
        (("resamples = 200", "resamples = 200\n[task.options]\nmax_detection = 10"), "no option 'max_detection'"),
        (('resize = "letterbox"', 'resize = "letter"'), "letterbox"),
        (("size = [64, 64]", "size = [64, 32]"), "64"),
    ],
)
def test_a_spec_of_a_task_that_cannot_be_meant_is_refused(project: Project, edit: tuple[str, str], words: str) -> None:
    project.edit(edit)
    refused(project.check(), words)


FACTORY = """
import json
from pathlib import Path

import numpy as np
from PIL import Image

from gate import Samples
from gate.data.image_spec import Preprocess
from gate.data.preprocess import preprocessed
from gate.targets import Categories, ImageRecord, ImageTarget

HERE = Path(__file__).parent


def evaluation():
    content = json.loads((HERE / "instances.json").read_text())
    inputs, targets = [], []
    for image in content["images"]:
        pixels = np.asarray(Image.open(HERE / "images" / image["file_name"]))
        values, record = preprocessed(pixels, Preprocess(size=(64, 64)), image_id=image["id"])
        inputs.append(values)
        RECORD
        annotations = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        targets.append(ImageTarget(record, tuple(annotations)))
    TARGETS
    names = Categories({each["id"]: each["name"] for each in content["categories"]})
    return Samples(inputs={"images": np.stack(inputs)}, targets=targets, categories=names)
"""
SOURCE = """[data.images]
kind = "coco"
path = "images"
annotations = "instances.json"
workers = 0
"""
PREPROCESS = """[preprocess]
resize = "letterbox"
size = [64, 64]
"""


def from_function(project: Project, *, record: str = "", targets: str = "") -> Outcome:
    """The samples come from a function of the team's own."""
    text = FACTORY.replace("RECORD", record or "pass").replace("    TARGETS\n", f"    {targets}\n" if targets else "")
    (project.folder / "data.py").write_text(text)
    project.edit((SOURCE, ""), (PREPROCESS, ""), ("samples = 48", 'source = "data:evaluation"\nsamples = 48'))
    return project.check()


def test_a_function_that_records_the_letterbox_passes(project: Project) -> None:
    outcome = from_function(project)
    assert outcome.code == 0, outcome.text


def test_a_letterbox_that_is_not_recorded_fails_and_is_named(project: Project) -> None:
    outcome = from_function(project, record='record = ImageRecord(image["id"], image["width"], image["height"])')
    assert outcome.code == 1, outcome.text
    assert "the images were letterboxed to 64 x 64 and their records said so" in " ".join(outcome.text.split())


def test_ground_truth_in_another_order_than_the_images_fails(project: Project) -> None:
    outcome = from_function(project, targets="targets = targets[1:] + targets[:1]")
    assert outcome.code == 1, outcome.text
    assert "each answer is that of the image before" in " ".join(outcome.text.split())


@pytest.mark.parametrize(
    ("targets", "code", "words"),
    [
        ("targets = targets[:24]", 2, "48 samples but 24 targets"),
        ("targets[3] = targets[2]", 2, "sample 3: image id 102 is that of sample 2 too"),
        ("targets[3] = None", 2, "the target of sample 3 is a NoneType; detections need a gate.ImageTarget"),
        ("targets = None", 2, "needs ground truth, and the samples have none"),
        ("targets = [ImageTarget(each.image) for each in targets]", 1, "there is nothing to find in 48 images"),
        ("targets[5].annotations[0]['bbox'] = [0, 0, float('nan'), 4]", 2, "its box or area is not finite"),
        ("targets[5].annotations[0]['bbox'] = [0, 0, 900, 4]", 2, "leaves the image of"),
        ("targets[5].annotations[0]['category_id'] = 8", 2, "has category 8; there are 1, 2, 3, 4"),
        ("targets[5].annotations[0].pop('area')", 2, "has no 'area'"),
    ],
)
def test_targets_of_a_function_that_are_malformed_are_refused(
    project: Project, targets: str, code: int, words: str
) -> None:
    outcome = from_function(project, targets=targets)
    assert outcome.code == code, outcome.text
    assert words in " ".join(outcome.text.split())


@pytest.mark.parametrize("rows", [24, 47, 49])
def test_recorded_answers_of_another_number_of_images_are_an_error(project: Project, rows: int) -> None:
    from tests.withstand.detection_project import drawn

    _, boxes, scores = drawn()
    places = np.arange(rows) % 48
    np.savez(project.folder / "recorded.npz", boxes=boxes[places], scores=scores[places])
    project.edit(('onnx = "reference.onnx"', 'outputs = "recorded.npz"'))
    outcome = project.check()
    assert outcome.code in (1, 2), outcome.text
    assert outcome.report is None
    assert f"{rows}" in outcome.text
    assert "48" in outcome.text
