"""With `datasets` where it is installed, and with a stand-in of the few things that are used of it where it is not."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gate.data.hub import read_hub
from gate.data.image_sources import open_hub_images
from gate.data.image_spec import Preprocess
from gate.errors import DataError

NONE = Preprocess(resize="none", scale=1.0)


@dataclass
class Feature:
    names: list[str] = field(default_factory=list)


@dataclass
class ListOf:
    feature: Any


@dataclass
class Columns:
    """Stands in for `datasets.Dataset`."""

    features: dict[str, Any]
    columns: dict[str, list[Any]]

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: each[key] for name, each in self.columns.items()}


def pictures(count=3):
    return [Image.fromarray(np.full((24, 32, 3), index, np.uint8)) for index in range(count)]


def labelled(labels=(1, 0, 1)):
    return Columns({"image": None, "label": Feature(["cat", "dog"])}, {"image": pictures(), "label": list(labels)})


def annotated(objects, **columns):
    category = ListOf({"bbox": None, "category": Feature(["cat", "dog"])})
    features = {"image": None, "objects": category, **dict.fromkeys(columns)}
    return Columns(features, {"image": pictures(len(objects)), "objects": objects, **columns})


@pytest.mark.parametrize("workers", [0, 1])
def test_labelled_images_come_with_their_class(workers):
    with open_hub_images(labelled(), preprocess=NONE, input_name="x", workers=workers) as source:
        assert source.categories.names == {0: "cat", 1: "dog"}
        (batch,) = source.batches(4)
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.inputs["x"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_images_that_are_left_undecoded_are_decoded():
    file = io.BytesIO()
    pictures()[2].save(file, "PNG")
    columns = Columns(
        {"image": None, "label": None}, {"image": [{"bytes": file.getvalue(), "path": None}], "label": [0]}
    )
    source = open_hub_images(columns, preprocess=NONE, input_name="x")
    (batch,) = source.batches(1)
    assert batch.inputs["x"].max() == 2
    assert source.categories is None


@pytest.mark.parametrize("is_list", [False, True])
def test_objects_become_annotations(is_list):
    objects = [
        {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [1, 0], "area": [9.0, 56.0]},
        {"bbox": [], "category": [], "area": []},
    ]
    if is_list:
        objects = [[dict(zip(row, each, strict=True)) for each in zip(*row.values(), strict=True)] for row in objects]
    source = open_hub_images(annotated(objects, image_id=[40, 30]), preprocess=NONE, input_name="x")
    (batch,) = source.batches(4)
    first, second = batch.targets
    assert (first.image.image_id, second.image.image_id) == (40, 30)
    assert [each["category_id"] for each in first.annotations] == [1, 0]
    assert [each["area"] for each in first.annotations] == [9.0, 56.0]
    assert len({each["id"] for each in first.annotations}) == 2
    assert second.annotations == ()
    assert source.categories.names == {0: "cat", 1: "dog"}


def test_boxes_outside_an_image_whose_size_only_decoding_shows_are_refused():
    found = annotated([{"bbox": [[20, 2, 30, 4]], "category": [1]}])
    with pytest.raises(DataError, match="row 0: annotation 1: bbox .* reaches 18 px outside the image of 32 x 24"):
        open_hub_images(found, preprocess=NONE, input_name="x")


@pytest.mark.parametrize(
    "found, said",
    [
        (labelled((1, 2, 0)), "row 1: the label must be a class index, got 2"),
        (labelled((1, None, 0)), "row 1: the label must be a class index, got None"),
        (labelled((1, 0)), "column 'label' has 2 values, the dataset 3 rows"),
        (Columns({"image": None}, {"image": []}), "needs a column 'image' and one of 'label' and 'objects'"),
        (annotated([{"bbox": [[1, 2, 3, 4]], "category": [7]}]), "row 0: annotation 1: there is no category 7"),
        (annotated([{"bbox": [[1, 2, 3, 4]], "category": [1, 0]}]), "differ in length"),
        (annotated([{"bbox": [[1, 2, float("nan"), 4]], "category": [1]}]), "is not finite"),
        (annotated([{"bbox": [[1, 2, 3, 4]]}]), "there is no category None"),
        (annotated([None]), "expected objects with bbox and category"),
        (annotated([{"bbox": [], "category": []}]), "no row has any object"),
        (
            annotated([{"bbox": [[1, 2, 3, 4]], "category": [1]}] * 2, image_id=[4, 4]),
            "row 1: image_id 4 is there twice",
        ),
        (annotated([{"bbox": [[1, 2, 3, 4]], "category": [1]}], image_id=["4"]), "image_id must be an integer"),
        ([1, 2], "a list is no map-style dataset with features"),
    ],
)
def test_a_malformed_dataset_is_refused(found, said):
    with pytest.raises(DataError, match=said):
        read_hub(found)


def test_a_row_that_cannot_be_read_is_named():
    found = labelled()
    found.columns["image"][1] = None
    with pytest.raises(DataError, match="row 1: is a NoneType and no image"):
        open_hub_images(found, preprocess=NONE, input_name="x")


def test_the_library_itself_gives_the_same():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    found = datasets.Dataset.from_dict({"image": pictures(), "label": [1, 0, 1]}, features=features)
    with open_hub_images(found, preprocess=NONE, input_name="x", workers=1) as source:
        assert source.uses_processes
        (batch,) = source.batches(4)
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.inputs["x"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert source.categories.names == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("is_list", [False, True])
def test_the_library_itself_gives_objects(is_list):
    datasets = pytest.importorskip("datasets")
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    one = {"bbox": box, "category": datasets.ClassLabel(names=["cat", "dog"])}
    objects = [one] if is_list else datasets.Sequence(one)
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    rows = [
        [{"bbox": [1, 2, 3, 4], "category": 1}, {"bbox": [5, 6, 7, 8], "category": 0}],
        [],
    ]
    if not is_list:
        rows = [{name: [each[name] for each in row] for name in one} for row in rows]
    found = datasets.Dataset.from_dict({"image": pictures(2), "objects": rows}, features=features)
    with open_hub_images(found, preprocess=NONE, input_name="x", workers=0) as source:
        (batch,) = source.batches(4)
    assert [each["category_id"] for each in batch.targets[0].annotations] == [1, 0]
    assert [list(each["bbox"]) for each in batch.targets[0].annotations] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.targets[1].annotations == ()
    assert source.categories.names == {0: "cat", 1: "dog"}
