"""A small detection project: 48 images of varying size in a COCO folder, and an ONNX detector that knows them by heart.

Each image is of one grey, from which the graph reads the image's number; its boxes and scores are rows of two tables. They
are the ground truth, letterboxed and moved a little, with some weak false boxes and some objects missed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.withstand.conftest import Project

IMAGES, PLACES, CLASSES, INPUT = 48, 40, 4, 64
GREY_STEP = 5

SPEC = """schema = 1

[model]
id = "boxes"
onnx = "reference.onnx"

[inputs.images]
dtype = "float32"
shape = ["batch", 3, 64, 64]
batch = { min = 1, opt = 8, max = 16 }

[data]
samples = 48
batch = 16

[data.images]
kind = "coco"
path = "images"
annotations = "instances.json"
workers = 0

[preprocess]
resize = "letterbox"
size = [64, 64]

[postprocess]
head = "boxes"
boxes = "boxes"
scores = "scores"
category_ids = [1, 2, 3, 4]
format = "xyxy"
coordinates = "pixels"
activation = "none"
score_threshold = 0.02
iou_threshold = 0.5

[task]
kind = "detection"
resamples = 200

[[engine]]
name = "candidate"
backend = "onnxruntime"
precision = "fp32"
onnx = "engine.onnx"
  [engine.task]
  mean_ap_drop_at_most = 0.01
"""

Floats = npt.NDArray[np.float32]
Surgery = Callable[[onnx.ModelProto], None]


def letterboxed(boxes: npt.NDArray[Any], width: int, height: int) -> npt.NDArray[Any]:
    """Boxes [n, 4], xyxy, in pixels of an image, as pixels of the input."""
    scale = min(INPUT / width, INPUT / height)
    inside = (max(round(width * scale), 1), max(round(height * scale), 1))
    shift = np.array([(INPUT - inside[0]) // 2, (INPUT - inside[1]) // 2] * 2)
    return boxes * np.array([inside[0] / width, inside[1] / height] * 2) + shift


@cache
def drawn() -> tuple[dict[str, Any], Floats, Floats]:
    """The instances json, and the detector's tables: boxes [48, 40, 4], xyxy in the input's pixels, scores [48, 40, 4]."""
    random = np.random.default_rng(7)
    images, annotations = [], []
    boxes = np.zeros((IMAGES, PLACES, 4), np.float32)
    scores = np.zeros((IMAGES, PLACES, CLASSES), np.float32)
    for index in range(IMAGES):
        width, height = int(random.integers(70, 160)), int(random.integers(50, 130))
        images.append({"id": 100 + index, "file_name": f"{index:03}.png", "width": width, "height": height})
        columns, rows = (6, 3) if index % 2 else (3, 2)
        truth, labels = [], []
        for place in range(columns * rows):
            cell = np.array([width / columns, height / rows])
            size = cell * random.uniform(0.5, 0.9, 2)
            corner = cell * [place % columns, place // columns] + (cell - size) * random.uniform(0, 1, 2)
            truth.append([*corner, *(corner + size)])
            labels.append(int(random.integers(CLASSES)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + index,
                    "category_id": labels[-1] + 1,
                    "bbox": [*corner.tolist(), *size.tolist()],
                    "area": float(size.prod()),
                    "iscrowd": 0,
                }
            )
        found = letterboxed(np.array(truth), width, height) + random.normal(0, 0.15, (len(truth), 4))
        boxes[index, : len(found)] = found
        scores[index, np.arange(len(found)), labels] = random.uniform(0.3, 0.95, len(found))
        scores[index, np.flatnonzero(random.random(len(found)) < 0.03)] = 0  # missed
        false = slice(len(found), len(found) + 3)
        corner = random.uniform(2, 40, (3, 2))
        boxes[index, false] = np.concatenate([corner, corner + random.uniform(6, 20, (3, 2))], axis=1)
        scores[index, np.arange(false.start, false.stop), random.integers(CLASSES, size=3)] = random.uniform(
            0.05, 0.4, 3
        )
    categories = [{"id": 1 + label, "name": name} for label, name in enumerate(("cat", "cow", "dog", "hen"))]
    return {"images": images, "annotations": annotations, "categories": categories}, boxes, scores


def detector(boxes: Floats, scores: Floats) -> onnx.ModelProto:
    """A graph that looks boxes and scores up by an image's grey."""
    to_number = np.array([255 / GREY_STEP, 0, 0], np.float32).reshape(1, 3, 1, 1)
    nodes = [
        helper.make_node("Conv", ["images", "to_number"], ["numbers"]),
        helper.make_node("Gather", ["numbers", "middle"], ["row"], axis=2),
        helper.make_node("Gather", ["row", "middle"], ["pixel"], axis=2),
        helper.make_node("Squeeze", ["pixel", "channel"], ["number"]),
        helper.make_node("Floor", ["number"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["boxes_table", "index"], ["boxes"], axis=0),
        helper.make_node("Gather", ["scores_table", "index"], ["scores"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, INPUT, INPUT])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", *boxes.shape[1:]]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", *scores.shape[1:]]),
        ],
        [
            numpy_helper.from_array(to_number, "to_number"),
            numpy_helper.from_array(np.array(INPUT // 2, np.int64), "middle"),
            numpy_helper.from_array(np.array([1], np.int64), "channel"),
            numpy_helper.from_array(boxes, "boxes_table"),
            numpy_helper.from_array(scores, "scores_table"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def table(model: onnx.ModelProto, name: str) -> Floats:
    """A table of the graph, `boxes` or `scores`, to be changed and put back."""
    return numpy_helper.to_array(_tensor(model, name)).copy()


def put_table(model: onnx.ModelProto, name: str, values: npt.NDArray[Any]) -> None:
    """Replace a table; its output takes the new shape."""
    _tensor(model, name).CopyFrom(numpy_helper.from_array(values.astype(np.float32), f"{name}_table"))
    place = next(index for index, each in enumerate(model.graph.output) if each.name == name)
    model.graph.output[place].CopyFrom(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *values.shape[1:]])
    )


def changed(name: str, change: Callable[[Floats], npt.NDArray[Any]]) -> Surgery:
    """A surgery that changes one table."""
    return lambda model: put_table(model, name, change(table(model, name)))


def _tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == f"{name}_table")


def edit_annotations(project: Project, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the instances json."""
    path = project.folder / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def break_reference(project: Project, surgery: Surgery) -> None:
    """Change the reference's graph."""
    path = project.folder / "reference.onnx"
    model = onnx.load(path)
    surgery(model)
    onnx.save(model, path)


def break_both(project: Project, surgery: Surgery) -> None:
    """Change the graphs of reference and engine alike."""
    break_reference(project, surgery)
    project.break_engine(surgery)


@cache
def _written(folder: Path) -> Path:
    from PIL import Image

    truth, boxes, scores = drawn()
    (folder / "images").mkdir()
    for index, image in enumerate(truth["images"]):
        grey = GREY_STEP * index + 2
        Image.new("RGB", (image["width"], image["height"]), (grey,) * 3).save(folder / "images" / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(truth))
    model = detector(boxes, scores)
    onnx.checker.check_model(model)
    for name in ("reference", "engine"):
        onnx.save(model, folder / f"{name}.onnx")
    (folder / "gate.toml").write_text(SPEC)
    return folder


def new_project(
    folder: Path, *, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, shared: Path
) -> Project:
    """The project in an empty folder, with an engine that passes; `shared` holds the template and the cache."""
    patch.chdir(folder)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        patch.delenv(name, raising=False)
    template = shared / "template"
    if not template.exists():
        template.mkdir()
        _written(template)
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return Project(folder, shared / "cache", capture)
