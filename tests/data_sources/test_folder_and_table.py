import re
import shutil

import numpy as np
import pytest
from PIL import Image

from gate.data.folder import read_class_folders
from gate.data.image_spec import Preprocess
from gate.data.images import ImageSource
from gate.data.table import read_table
from gate.errors import DataError


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(("dog", "cat", "10", "9")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(2):
            pixels = np.full((8, 8, 3), 20 * number + index, np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


def source_of(found):
    return ImageSource(found, preprocess=Preprocess(resize="none", scale=1.0), input_name="x", workers=0)


def test_classes_are_the_sorted_names_of_the_folders(root):
    found = read_class_folders(root)
    assert found.categories.names == {0: "10", 1: "9", 2: "cat", 3: "dog"}
    assert [(item.name, item.label) for item in found.items][2:6] == [
        ("9/0.png", 1),
        ("9/1.png", 1),
        ("cat/0.png", 2),
        ("cat/1.png", 2),
    ]
    (batch,) = source_of(found).batches(8)
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.inputs["x"][:, 0, 0, 0].tolist() == [40, 41, 60, 61, 20, 21, 0, 1]


def test_named_classes_keep_their_index_where_one_has_no_images(root):
    shutil.rmtree(root / "cat")
    found = read_class_folders(root, classes=["dog", "cat", "10", "9"])
    assert {item.name: item.label for item in found.items}["dog/0.png"] == 0
    assert {item.name: item.label for item in found.items}["9/0.png"] == 3
    assert found.notes == ("no folder for 1 classes: cat",)


def test_a_folder_that_is_no_named_class_is_refused(root):
    with pytest.raises(DataError, match="dog: is none of the classes that the spec names .cat, 10, 9."):
        read_class_folders(root, classes=["cat", "10", "9"])


def test_all_that_does_not_belong_is_listed(root):
    (root / "bird").mkdir()
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "more").mkdir()
    (root / "dog" / "zero.jpg").write_bytes(b"")
    (root / "dog" / ".DS_Store").write_bytes(b"hidden")
    (root / "stray.PNG").write_bytes(b"x")
    with pytest.raises(DataError, match="5 problems") as caught:
        read_class_folders(root)
    for said in (
        "bird: the class has no image",
        "cat/notes.txt: is no image, by its name",
        "cat/more: is a folder",
        "dog/zero.jpg: is empty: 0 bytes",
        "stray.PNG: lies in no class folder",
    ):
        assert said in str(caught.value)


def test_the_same_image_in_two_classes_is_refused_and_twice_in_one_is_not(root):
    shutil.copy(root / "cat" / "0.png", root / "cat" / "again.png")
    assert len(source_of(read_class_folders(root))) == 9
    shutil.copy(root / "cat" / "0.png", root / "dog" / "copy.png")
    with pytest.raises(DataError, match="dog/copy.png: is the same file as cat/0.png, under another label"):
        source_of(read_class_folders(root))


def test_a_root_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        read_class_folders(tmp_path / "nowhere")
    with pytest.raises(DataError, match="there is no class folder in it"):
        read_class_folders(tmp_path)


def table(root, text):
    path = root.parent / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_class_names_get_their_sorted_index(root):
    found = read_table(
        table(
            root,
            '\ufeffpath,size,label\r\nimages/dog/0.png,1,dog\r\n"images/cat/0.png",2, cat \r\nimages/dog/1.png,3,dog\r\n',
        )
    )
    assert [(item.name, item.label) for item in found.items] == [
        ("images/dog/0.png", 1),
        ("images/cat/0.png", 0),
        ("images/dog/1.png", 1),
    ]
    assert found.categories.names == {0: "cat", 1: "dog"}
    (batch,) = source_of(found).batches(4)
    assert batch.labels.tolist() == [1, 0, 1]


def test_whole_numbers_are_class_indices(root):
    found = read_table(table(root, f"label,path\n7,images/dog/0.png\n0,{root}/cat/0.png\n"))
    assert [item.label for item in found.items] == [7, 0]
    assert found.categories is None


def test_named_classes_may_be_numbers(root):
    found = read_table(table(root, "path,label\nimages/9/0.png,9\nimages/10/0.png,10\n"), classes=["10", "9"])
    assert [item.label for item in found.items] == [1, 0]
    assert found.categories.names == {0: "10", 1: "9"}


def test_all_wrong_lines_are_listed_with_their_numbers(root):
    (root / "zero.png").write_bytes(b"")
    text = (
        "path,label\nimages/dog/0.png,dog\nimages/dog/0.png,dog\nimages/gone.png,dog\nimages/cat/0.png,\n"
        ",cat\nimages/cat/1.png\nimages/zero.png,cat\nimages/../images/dog/0.png,cat\n"
    )
    with pytest.raises(DataError, match="7 problems") as caught:
        read_table(table(root, text))
    for said in (
        "line 3: images/dog/0.png is on line 2 too",
        "gone.png: there is no such file",
        "line 5: there is no label",
        "line 6: there is no path",
        "line 7: there is no label",
        "zero.png: is empty: 0 bytes",
        "line 9: images/../images/dog/0.png is on line 2 too",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "needs one column 'path' and one 'label'; its header has nothing"),
        ("images/dog/0.png,dog\n", "needs one column 'path' and one 'label'; its header has 'images/dog/0.png', 'dog'"),
        ("path,label,path\na,b,c\n", "needs one column 'path';"),
        ("path,label\n", "has a header and no rows"),
        (b"path,label\n\xff\xfe,dog\n", "cannot be read as UTF-8"),
        ('path,label\n"images/dog/0.png,dog\n', "is no CSV: unexpected end of data"),
        ("path,label\nimages/dog/0.png,1\nimages/cat/0.png,cat\n", "line 3: 'cat' is a class name, while line 2 has"),
        ("path,label\nimages/dog/0.png,-1\n", "line 2: the class index -1 is below 0"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(root, text, said):
    with pytest.raises(DataError, match=re.escape(said)):
        read_table(table(root, text))


def test_a_label_that_is_no_named_class_is_refused(root):
    with pytest.raises(DataError, match="line 2: 'dog' is none of the classes"):
        read_table(table(root, "path,label\nimages/dog/0.png,dog\n"), classes=["cat"])


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no file .*none.csv"):
        read_table(tmp_path / "none.csv")


def test_the_same_image_under_two_labels_is_refused(root):
    shutil.copy(root / "cat" / "0.png", root / "copy.png")
    found = read_table(table(root, "path,label\nimages/cat/0.png,cat\nimages/copy.png,dog\n"))
    with pytest.raises(DataError, match="images/copy.png: is the same file as images/cat/0.png"):
        source_of(found)
