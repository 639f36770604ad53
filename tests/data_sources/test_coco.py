import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from gate.data.coco import read_coco
from gate.data.image_spec import Preprocess
from gate.data.images import ImageSource
from gate.errors import DataError

WHOLE = {
    "images": [
        {"id": 11, "file_name": "b.png", "width": 32, "height": 24},
        {"id": 7, "file_name": "a.png", "width": 32, "height": 24},
        {"id": 9, "file_name": "empty.png", "width": 32, "height": 24},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 5], "area": 40.5, "iscrowd": 0},
        {"id": 2, "image_id": 11, "category_id": 1, "bbox": [0, 0, 32.5, 24], "area": 768, "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [4, 4, 4, 4], "keypoints": [5, 5, 2]},
    ],
    "categories": [{"id": 3, "name": "three"}, {"id": 1, "name": "one", "supercategory": "number"}],
}


@pytest.fixture
def folder(tmp_path):
    for index, each in enumerate(WHOLE["images"]):
        pixels = np.full((24, 32, 3), index * 10, np.uint8)
        Image.fromarray(pixels).save(tmp_path / each["file_name"])
    return tmp_path


def read(folder, content=WHOLE, **settings):
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path, folder, where="[data.images]", **settings)


def changed(*keys, to):
    content = copy.deepcopy(WHOLE)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return content


def test_a_whole_data_set_is_read_in_its_order_with_images_that_hold_nothing(folder):
    found = read(folder)
    assert [item.image_id for item in found.items] == [11, 7, 9]
    assert [len(item.annotations) for item in found.items] == [1, 2, 0]
    assert list(found.categories.names.items()) == [(1, "one"), (3, "three")]
    assert found.items[1].annotations[0] == WHOLE["annotations"][0]
    assert found.items[1].size == (32, 24)


def test_area_and_iscrowd_are_filled_in_and_noted(folder):
    found = read(folder)
    filled = found.items[1].annotations[1]
    assert (filled["area"], filled["iscrowd"], filled["keypoints"]) == (16.0, 0, [5, 5, 2])
    assert found.notes == (
        "1 annotations had no area: taken as width times height of the box",
        "1 annotations had no iscrowd: taken as 0",
    )


def test_targets_are_the_annotations_of_their_image(folder):
    source = ImageSource(read(folder), preprocess=Preprocess(size=(64, 64)), input_name="x", workers=0)
    batches = list(source.batches(2))
    targets = [target for batch in batches for target in batch.targets]
    assert [target.image.image_id for target in targets] == [11, 7, 9]
    assert [len(target.annotations) for target in targets] == [1, 2, 0]
    assert (targets[0].image.scale_x, targets[0].image.top) == (2.0, 8.0)
    assert targets[0].image.file_name == "b.png"
    assert batches[0].inputs["x"].shape == (2, 3, 64, 64)
    assert batches[1].inputs["x"][0, 0, 32, 32] == pytest.approx(20 / 255)


def test_a_subset_by_ids_takes_those_and_asks_for_their_files_alone(folder):
    (folder / "b.png").unlink()
    found = read(folder, image_ids=[9, 7])
    assert [item.image_id for item in found.items] == [7, 9]
    with pytest.raises(DataError, match="there is no image 8"):
        read(folder, image_ids=[7, 8])
    with pytest.raises(DataError, match="names an image twice"):
        read(folder, image_ids=[7, 7])


WRONG = [
    (("images", 1, "id"), 11, "images[1]: image id 11 is there twice, as b.png and a.png"),
    (("images", 1, "id"), "7", "images[1]: expected an integer id"),
    (("images", 1), None, "images[1]: expected an integer id, got None"),
    (("images", 1, "file_name"), "b.png", "images[1]: b.png is the file of images 11 and 7"),
    (("images", 1, "file_name"), "c.png", "c.png: there is no such file"),
    (("images", 1, "file_name"), "../a.png", "lies outside the folder of images"),
    (("images", 1, "file_name"), "/etc/hostname", "lies outside the folder of images"),
    (("images", 1, "file_name"), "", "image 7 has no file_name"),
    (("images", 1, "file_name"), "a\0.png", "there is no such file"),
    (("images", 1, "file_name"), "x" * 5000, "cannot be read: File name too long"),
    (("images", 1, "width"), 0, "has width 0 and height 24"),
    (("images", 1, "height"), None, "has width 32 and height None"),
    (("annotations", 1, "id"), 1, "annotation 1: this id is there twice"),
    (("annotations", 1, "id"), None, "annotations[1]: expected an annotation with an integer id"),
    (("annotations", 1, "image_id"), 99, "annotation 2: there is no image 99"),
    (("annotations", 1, "image_id"), [7], "annotation 2: there is no image [7]"),
    (("annotations", 1, "category_id"), 2, "annotation 2: there is no category 2"),
    (("annotations", 1, "category_id"), True, "annotation 2: there is no category True"),
    (("annotations", 1, "bbox"), None, "annotation 2: has no bbox"),
    (("annotations", 1, "bbox"), [1, 2, 3], "bbox must be four numbers"),
    (("annotations", 1, "bbox"), [1, 2, 3, "4"], "bbox must be four numbers"),
    (("annotations", 1, "bbox"), [1, 2, 3, 10**400], "bbox must be four numbers"),
    (("annotations", 1, "bbox"), [1, 2, 3, float("nan")], "annotation 2: bbox [1, 2, 3, nan] is not finite"),
    (("annotations", 1, "bbox"), [1, float("inf"), 3, 4], "annotation 2: bbox [1, inf, 3, 4] is not finite"),
    (("annotations", 1, "bbox"), [1, 2, 0, 4], "has no area: width 0, height 4"),
    (("annotations", 1, "bbox"), [1, 2, 3, -4], "has no area: width 3, height -4"),
    (("annotations", 1, "bbox"), [0, 0, 33.5, 4], "reaches 1.5 px outside the image of 32 x 24"),
    (("annotations", 1, "bbox"), [-1.5, 0, 3, 4], "reaches 1.5 px outside the image of 32 x 24"),
    (("annotations", 1, "bbox"), [10, 20, 30, 23], "reaches 19 px outside the image"),
    (("annotations", 1, "area"), float("nan"), "area must be a finite number of square pixels, got nan"),
    (("annotations", 1, "area"), -1, "area must be a finite number"),
    (("annotations", 1, "iscrowd"), 2, "iscrowd must be 0 or 1, got 2"),
    (("annotations", 1, "iscrowd"), [0], "iscrowd must be 0 or 1, got [0]"),
    (("categories", 1, "id"), 3, "categories[1]: id 3 is there twice, as 'three' and 'one'"),
    (("categories", 1, "name"), "three", "categories[1]: the name 'three' is there twice"),
    (("categories", 1, "name"), "", "categories[1]: expected an integer id and a name"),
    (("images",), [], "images is empty"),
    (("annotations",), [], "annotations is empty"),
    (("categories",), [], "categories is empty"),
]


@pytest.mark.parametrize("keys, value, said", WRONG, ids=[f"{keys}={value!r}"[:60] for keys, value, _ in WRONG])
def test_what_is_wrong_is_named(folder, keys, value, said):
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read(folder, changed(*keys, to=value))
    assert caught.value.where == "[data.images]"


def test_all_that_is_wrong_is_said_at_once_before_an_image_is_opened(folder):
    content = copy.deepcopy(WHOLE)
    content["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    content["annotations"][1]["category_id"] = 80
    content["annotations"][2]["image_id"] = 5
    content["images"][0]["file_name"] = "gone.png"
    (folder / "empty.png").write_bytes(b"")
    (folder / "a.png").write_bytes(b"would not open")
    with pytest.raises(DataError, match="5 problems") as caught:
        read(folder, content)
    for said in ("is not finite", "no category 80", "no image 5", "gone.png: there is no such file", "0 bytes"):
        assert said in str(caught.value)
    assert "a.png" not in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        (json.dumps(WHOLE)[:-30], "is no JSON"),
        ("\x80", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds a list, expected an object"),
        ("{}", "has no list 'images', 'annotations', 'categories' .it has nothing."),
        ('{"images": [], "annotations": {}}', "has no list 'annotations', 'categories'"),
    ],
)
def test_what_is_no_coco_file_is_refused(folder, text, said):
    path = folder / "instances.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=said):
        read_coco(path, folder)


def test_a_missing_json_is_named(folder):
    with pytest.raises(DataError, match="there is no file .*nowhere.json"):
        read_coco(folder / "nowhere.json", folder)


def test_an_image_of_another_size_than_annotated_is_refused(folder):
    Image.fromarray(np.zeros((24, 33, 3), np.uint8)).save(folder / "a.png")
    with pytest.raises(DataError, match="a.png: is 33 x 24 pixels, its ground truth says 32 x 24"):
        ImageSource(read(folder), preprocess=Preprocess(size=(64, 64)), input_name="x", workers=0)
