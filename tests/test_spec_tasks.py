"""The tables of tasks beside classification: what is read, and what is refused with file, line and key."""

from pathlib import Path

import pytest

from gate.errors import SpecError
from gate.spec import spec_from_text

DETECTOR = """schema = 1
[model]
id = "m"
factory = "a:b"
[inputs.images]
dtype = "float32"
shape = ["batch", 3, 64, 64]
batch = { min = 1, opt = 2, max = 4 }
[data]
samples = 8
[data.images]
kind = "coco"
path = "images"
annotations = "instances.json"
[preprocess]
size = [64, 64]
[postprocess]
head = "boxes"
boxes = "boxes"
scores = "scores"
category_ids = [1, 2]
format = "xyxy"
coordinates = "pixels"
activation = "none"
[task]
kind = "detection"
[[engine]]
name = "a"
backend = "onnxruntime"
precision = "fp32"
  [engine.task]
  mean_ap_drop_at_most = 0.002
"""


def read(text: str):
    return spec_from_text(text, path=Path("gate.toml"))


def test_a_detector_is_read_with_its_limits_and_tables():
    spec = read(DETECTOR).spec
    assert spec.engines[0].task is None
    assert spec.engines[0].task_limits == {"mean_ap_drop_at_most": 0.002}
    assert spec.data.images.annotations == "instances.json"
    assert spec.preprocess.size == (64, 64)
    assert spec.postprocess.category_ids == (1, 2)
    assert not spec.task.is_classification


def test_limits_of_classification_stay_where_they_are():
    text = DETECTOR.replace('kind = "detection"', 'kind = "classification"').replace(
        "mean_ap_drop_at_most = 0.002", "top1_at_least = 0.9"
    )
    assert read(text).spec.engines[0].task.top1_at_least == 0.9
    assert read(text).spec.engines[0].task_limits is None


def line(text: str, needle: str) -> int:
    return next(number for number, each in enumerate(text.splitlines(), 1) if needle in each)


@pytest.mark.parametrize(
    ("old", "new", "message", "at"),
    [
        (
            "mean_ap_drop_at_most = 0.002",
            'mean_ap_drop_at_most = "a"',
            r"\[engine.task\] mean_ap_drop_at_most: expected float, got 'a'",
            "mean_ap_drop",
        ),
        ("[data]\nsamples = 8", '[data]\nsource = "a:b"\nsamples = 8', "exactly one of source and", "[data]"),
        ("[data.images]\nkind", "[data.calibration_images]\nkind", "neither source nor images", "[data]"),
        ("[preprocess]\nsize = [64, 64]\n", "", "needs \\[preprocess\\]", "[data.images]"),
        ('format = "xyxy"\n', "", "format", "[postprocess]"),
        ('kind = "detection"', 'kind = "detection"\noutput = "y"', "output is for classification", "output"),
        ('precision = "fp32"', 'precision = "fp32"\nnms = "efficient_nms"', "a plugin of TensorRT", "nms"),
        ('precision = "fp32"', 'precision = "fp32"\nnms = "onnx"\nonnx = "a.onnx"', "has its own onnx or plan", "nms"),
        ('annotations = "instances.json"\n', "", "needs annotations", "[data.images]"),
        ("size = [64, 64]", "size = [64]", "size", "size"),
        (
            "  [engine.task]",
            "  [engine.baseline]\n  top1_drop_at_most_pp = 1\n  [engine.task]",
            "top1_drop_at_most_pp",
            "top1",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_where_it_stands(old, new, message, at):
    text = DETECTOR.replace(old, new, 1)
    assert text != DETECTOR
    with pytest.raises(SpecError, match=message) as caught:
        read(text)
    assert caught.value.where == f"gate.toml:{line(text, at)}"


def test_nms_needs_what_the_outputs_mean():
    start, end = DETECTOR.index("[postprocess]"), DETECTOR.index("[task]")
    text = (DETECTOR[:start] + DETECTOR[end:]).replace('precision = "fp32"', 'precision = "fp32"\nnms = "onnx"')
    with pytest.raises(SpecError, match="nms needs \\[postprocess\\]") as caught:
        read(text)
    assert caught.value.where == f"gate.toml:{line(text, 'nms =')}"


def test_a_quantised_detector_is_decided_by_its_answers():
    text = DETECTOR.replace('precision = "fp32"', 'precision = "int8"').replace(
        "samples = 8", 'samples = 8\ncalibration = "a:c"'
    )
    assert read(text).spec.engines[0].precision == "int8"
    with pytest.raises(SpecError, match="is decided by its answers"):
        read(text.replace("  [engine.task]\n  mean_ap_drop_at_most = 0.002", "  [engine.parity]"))


def test_images_need_one_input():
    second = '[inputs.more]\ndtype = "float32"\nshape = ["batch", 1]\nbatch = { min = 1, opt = 2, max = 4 }\n[data]'
    with pytest.raises(SpecError, match="gives one input, \\[inputs\\] has 2"):
        read(DETECTOR.replace("[data]", second, 1))
