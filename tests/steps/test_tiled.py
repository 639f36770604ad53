"""Large canvases whose digits vanish when they are made small: a detector finds them in tiles."""

import json
import re
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gate import pipeline
from gate.data.image_spec import Preprocess
from gate.data.images import ImageItem, ImageSet, ImageSource
from gate.engines.fake import FakeBackend, FakeRunner
from gate.errors import DataError, MeasurementError, SpecError
from gate.factory import load_callable
from gate.metrics.kinds import kind_named
from gate.postprocess.config import Tiling
from gate.postprocess.tiling import Tile
from gate.spec import MetamorphicSpec, read_spec, spec_from_text
from gate.steps.compare import compare_outputs
from gate.steps.context import CheckOptions, Context, Silence
from gate.steps.judge import check_engine
from gate.steps.tiled import image_tiles, tiled_answers
from gate.targets import ImageRecord
from gate.verdict import Evidence, Failure, Status

pytest.importorskip("PIL")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parents[2] / "examples" / "digit-detector"
CANVASES = 16
DETECTION = kind_named("detection")
SMALL = (3, 7)
"""Canvases that are smaller than a tile."""

SPEC = f"""schema = 1
[model]
id = "digits"
onnx = "model.onnx"
[inputs.images]
dtype = "float32"
shape = ["batch", 3, 128, 128]
batch = {{ min = 4, opt = 16, max = 16 }}
[data]
samples = {CANVASES}
batch = 16
[data.images]
kind = "coco"
path = "images"
annotations = "instances.json"
[preprocess]
resize = "letterbox"
size = [128, 128]
[postprocess]
head = "boxes"
boxes = "boxes"
scores = "scores"
category_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
format = "xyxy"
coordinates = "pixels"
activation = "none"
score_threshold = 0.02
iou_threshold = 0.5
[task]
kind = "detection"
resamples = 200
[tiling]
size = 128
overlap = 0.25
[[engine]]
name = "ort"
backend = "onnxruntime"
precision = "fp32"
  [engine.task]
  tiled_mean_ap_at_least = 0.4
  tiled_mean_ap_gain_at_least = 0.1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Canvases as COCO, most of them three times the model's input, and the detector as ONNX."""
    from PIL import Image

    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("tiled")
    (root / "images").mkdir()
    canvas = load_callable("canvases:canvas", EXAMPLE, where="test")
    images, annotations = [], []
    for index in range(CANVASES):
        sides = (90, 110) if index in SMALL else (300, 420)
        drawn = canvas("evaluation", index, seed=5, sides=sides, heights=(18, 32))
        height, width = drawn.pixels.shape[:2]
        Image.fromarray(drawn.pixels).save(root / "images" / f"{index}.png")
        images.append({"id": index + 1, "width": width, "height": height, "file_name": f"{index}.png"})
        for digit, box, area in zip(drawn.digits, drawn.boxes, drawn.areas, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(digit) + 1,
                    "bbox": [float(each) for each in box],
                    "area": float(area),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    written = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(written))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter, which is the quicker one
        torch.onnx.export(
            load_callable("model:load", EXAMPLE, where="test")(),
            (torch.zeros(2, 3, 128, 128),),
            str(root / "model.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["boxes", "scores"],
            dynamic_axes={name: {0: "batch"} for name in ("images", "boxes", "scores")},
        )
    return root


def changed(text, *pairs):
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def checked(folder, *pairs, name="gate.toml"):
    path = folder / name
    path.write_text(changed(SPEC, *pairs))
    return pipeline.check(read_spec(path), CheckOptions(cache=None, baselines=folder))


@pytest.fixture(scope="module")
def result(folder):
    return checked(folder)


def test_digits_that_vanish_in_the_whole_image_are_found_in_tiles(result):
    values = result.engines[0].scores.values
    assert values["mean_ap"] < 0.3
    assert values["tiled_mean_ap"] > 0.7
    assert set(result.engines[0].scores.reference) | {f"tiled_{name}" for name in DETECTION.values} == set(values)
    tiled, gain = result["task.tiled_mean_ap"], result["task.tiled_mean_ap_gain"]
    assert tiled.estimate == values["tiled_mean_ap"]
    assert gain.estimate == pytest.approx(values["tiled_mean_ap"] - values["mean_ap"])
    assert gain.interval.lower < gain.estimate < gain.interval.upper
    assert (tiled.status, gain.status, tiled.n, gain.n) == (Status.PASSED, Status.PASSED, CANVASES, CANVASES)
    assert {"task.tiled_mean_ap", "task.tiled_mean_ap_gain"} <= set(result.engines[0].verdict.required)
    assert "whole images 0.1" in gain.detail
    assert result.seconds["tiles"] > 0


def test_limits_on_tiles_that_are_not_kept_fail(folder):
    found = checked(folder, ("ap_at_least = 0.4", "ap_at_least = 0.95"), ("gain_at_least = 0.1", "gain_at_least = 0.9"))
    assert found["task.tiled_mean_ap"].status is Status.FAILED
    assert found["task.tiled_mean_ap_gain"].status is Status.FAILED


def test_where_every_image_is_one_tile_tiles_are_whole_images_and_gain_nothing(folder):
    found = checked(folder, ("size = 128", "size = 512\nfull_image = true"))
    values = found.engines[0].scores.values
    for name in DETECTION.values:
        assert values[f"tiled_{name}"] == pytest.approx(values[name], nan_ok=True)
    gain = found["task.tiled_mean_ap_gain"]
    assert (gain.estimate, gain.status) == (pytest.approx(0), Status.FAILED)
    assert gain.interval.lower == pytest.approx(0)


def test_suppression_in_the_graph_and_several_builds_find_the_same_in_tiles(folder, result):
    found = checked(folder, ('precision = "fp32"', 'precision = "fp32"\nnms = "onnx"\nrebuilds = 2'))
    assert found["task.tiled_mean_ap"].estimate == pytest.approx(result["task.tiled_mean_ap"].estimate, abs=0.005)
    assert "2 builds" in found["task.tiled_mean_ap"].detail
    assert found.passed


class Opened:
    """A run whose reference is recorded, and what an engine gave on whole images."""

    def __init__(self, folder, text=SPEC):
        import onnxruntime

        path = folder / "opened.toml"
        path.write_text(text)
        self.run = Context(read_spec(path), CheckOptions(cache=None, baselines=folder), Silence())
        self.run.open_samples()
        self.run.open_reference()
        self.engine = self.run.spec.engines[0]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.rows = []
        findings = []
        with FakeRunner(self.answer, spec=self.run.spec) as runner:
            self.measured = compare_outputs(self.run, self.engine, runner, Evidence.HOST, findings).answers
        assert not findings
        self.rows.clear()

    def answer(self, feed):
        self.rows.append(len(feed["images"]))
        return dict(zip(("boxes", "scores"), self.session.run(["boxes", "scores"], dict(feed)), strict=True))

    def tiled(self, function=None):
        with FakeRunner(function or self.answer, spec=self.run.spec) as runner:
            return tiled_answers(self.run, self.engine, runner, self.measured, Evidence.HOST)


@pytest.fixture(scope="module")
def opened(folder):
    return Opened(folder)


def test_tiles_of_several_images_fill_the_batches_and_a_rest_is_filled_up(opened, monkeypatch):
    monkeypatch.setattr(opened, "rows", [])
    opened.tiled()
    records = opened.run.source.source.records
    tiles = sum(len(image_tiles(each, opened.run.spec.tiling)) for each in records)
    assert tiles > 10 * CANVASES
    assert opened.rows[:-1] == [16] * (tiles // 16)
    assert opened.rows[-1] == max(tiles % 16, 4)


def test_nan_in_one_tile_is_an_error_that_names_it(opened):
    calls = []

    def answer(feed):
        found = opened.answer(feed)
        calls.append(len(feed["images"]))
        if len(calls) == 2:
            found["scores"][0, 0, 0] = np.nan
        return found

    with pytest.raises(MeasurementError, match=r"'scores' holds NaN") as caught:
        opened.tiled(answer)
    assert re.search(r"\.png, tile of 128 x 128 at \d+, \d+", caught.value.where)


def test_nothing_found_in_any_tile_is_an_error(opened):
    def answer(feed):
        return {name: np.zeros_like(values) for name, values in opened.answer(feed).items()}

    with pytest.raises(MeasurementError, match="detection"):
        opened.tiled(answer)


def test_samples_that_are_no_images_are_an_error(opened, monkeypatch):
    monkeypatch.setattr(opened.run, "source", [])
    with pytest.raises(DataError, match=r"\[tiling\] needs images, and the samples are a list"):
        opened.tiled()


def test_what_fails_on_tiles_fails_the_engine_and_leaves_the_values_of_whole_images(opened):
    calls = []

    def answer(feed):
        found = opened.answer(feed)
        calls.append(len(feed["images"]))
        if len(calls) > 2:  # two batches of whole images
            found["boxes"][:] = np.nan
        return found

    off = dict.fromkeys(("batch_independence", "profile_edges", "repeatability", "fresh_context"), False)
    engine = msgspec.structs.replace(opened.engine, metamorphic=MetamorphicSpec(**off))
    result = check_engine(opened.run, engine, FakeBackend(answer))
    assert result.status is Status.FAILED
    assert [each.check for each in result.failing] == ["task.tiled"]
    assert isinstance(result.failing[0], Failure)
    assert "tile of" in result.failing[0].message
    assert result.scores.values["mean_ap"] == opened.measured.values.values["mean_ap"]
    assert "tiled_mean_ap" not in result.scores.values


def test_whole_image_is_one_more_tile_where_asked_and_not_already_there():
    tiling = Tiling(size=64, overlap=0.0)
    large, small = ImageRecord(1, 100, 60), ImageRecord(2, 64, 50)
    both = msgspec.structs.replace(tiling, full_image=True)
    assert image_tiles(large, both) == (*image_tiles(large, tiling), Tile(0, 0, 100, 60))
    assert image_tiles(small, both) == image_tiles(small, tiling) == (Tile(0, 0, 64, 50),)


def test_whole_images_go_through_with_the_tiles_where_asked(opened, monkeypatch):
    tiling = Tiling(size=128, overlap=0.25, full_image=True)
    monkeypatch.setattr(opened.run, "spec", msgspec.structs.replace(opened.run.spec, tiling=tiling))
    monkeypatch.setattr(opened, "rows", [])
    values = opened.tiled().values.values
    records = opened.run.source.source.records
    tiles = sum(len(image_tiles(each, opened.run.file.spec.tiling)) for each in records)
    assert sum(opened.rows[:-1]) < tiles + CANVASES - len(SMALL) <= sum(opened.rows)
    assert values["tiled_mean_ap"] > values["mean_ap"] + 0.2


@pytest.mark.parametrize(
    ("preprocess", "dtype"),
    [
        (Preprocess(size=(48, 64)), "float32"),
        (Preprocess(size=(48, 64), channels="gray", mean=(0.5,), std=(0.2,)), "float16"),
        (Preprocess(size=(32, 32), resize="stretch", channels="bgr", layout="nhwc", scale=1.0), "uint8"),
    ],
)
def test_pixels_read_again_become_the_same_input(tmp_path, preprocess, dtype):
    from PIL import Image

    rng = np.random.default_rng(0)
    colour, gray = rng.integers(0, 256, (40, 70, 3), np.uint8), rng.integers(0, 256, (30, 20), np.uint8)
    Image.fromarray(colour).save(tmp_path / "0.png")
    Image.fromarray(gray).save(tmp_path / "1.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colour).save(tmp_path / "2.png", exif=turned)
    Image.fromarray(colour).convert("P").convert("RGBA").save(tmp_path / "3.png")
    Image.fromarray(gray > 99).save(tmp_path / "4.png")
    items = tuple(ImageItem(str(tmp_path / f"{each}.png"), each, f"{each}.png", label=each) for each in range(5))
    images = ImageSet(items, where="test")
    with ImageSource(images, preprocess=preprocess, input_name="x", dtype=dtype, workers=0) as source:
        whole = np.concatenate([batch.inputs["x"] for batch in source.batches(2)])
        again = [source.pixels(index) for index in range(5)]
        assert np.array_equal(again[0], colour)
        assert np.array_equal(again[1], np.repeat(gray[..., None], 3, axis=2))
        assert np.array_equal(again[2], np.rot90(colour, -1))
        assert all(each.shape[2:] == (3,) and each.dtype == np.uint8 for each in again)
        made = np.concatenate([source.input_of(each, name="x") for each in again])
    assert made.dtype == whole.dtype
    assert np.array_equal(made, whole)


def test_image_that_changed_after_it_was_examined_is_not_read_again(tmp_path):
    from PIL import Image

    colour = np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8)
    path = tmp_path / "0.png"
    Image.fromarray(colour).save(path)
    images = ImageSet((ImageItem(str(path), 1, "0.png", label=0),), where="test")
    with ImageSource(images, preprocess=Preprocess(size=(32, 32)), input_name="x", workers=0) as source:
        assert np.array_equal(source.pixels(0), colour)
        colour[0, 0] ^= 1
        Image.fromarray(colour).save(path)
        with pytest.raises(DataError, match=r"0\.png: is not the image that it was before"):
            source.pixels(0)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match="cannot be decoded"):
            source.pixels(0)
        path.unlink()
        with pytest.raises(DataError, match="there is no such file"):
            source.pixels(0)


def test_limit_on_tiles_without_tiling_is_refused_where_it_stands(folder):
    without = ("[tiling]\nsize = 128\noverlap = 0.25\n", "")
    with pytest.raises(SpecError, match=r"tiled_mean_ap_at_least needs \[tiling\]") as caught:
        checked(folder, without, name="without.toml")
    line = changed(SPEC, without).splitlines().index("  tiled_mean_ap_at_least = 0.4") + 1
    assert caught.value.where.endswith(f"without.toml:{line}")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("tiled_mean_ap_drop_at_most", "mean_ap_drop_at_most"),
        ("tiled_mean_app_at_least", "tiled_mean_ap_at_least"),
        ("tiled_mean_ap_gain_at_most", "tiled_mean_ap_gain_at_least"),
    ],
)
def test_limit_that_tiles_do_not_have_is_refused(folder, key, near):
    with pytest.raises(SpecError, match=f"no key {key!r} for detection; did you mean {near!r}"):
        checked(folder, ("tiled_mean_ap_at_least", key), name="unknown.toml")


def test_limit_on_tiles_must_be_finite(folder):
    with pytest.raises(SpecError, match="finite"):
        checked(folder, ("tiled_mean_ap_at_least = 0.4", "tiled_mean_ap_at_least = nan"), name="nan.toml")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([('kind = "detection"\n', 'kind = "keypoints"\n')], r'needs \[task\] kind = "detection"'),
        ([("[postprocess]\n", "[unused]\n")], "unused"),
        ([('resize = "letterbox"', 'resize = "center_crop"')], "cuts edges off each tile"),
        ([('resize = "letterbox"', 'resize = "none"')], "takes one size alone"),
        ([("size = 128", "size = 8")], "size"),
        ([("overlap = 0.25", "overlap = 0.6")], "overlap"),
        ([("overlap = 0.25", "overlaps = 0.2")], "did you mean 'overlap'"),
        ([("size = 128\noverlap", "overlap")], r"\[tiling\] needs 'size'"),
    ],
)
def test_tiling_that_cannot_be_meant_is_refused(tmp_path, pairs, message):
    with pytest.raises(SpecError, match=message):
        spec_from_text(changed(SPEC, *pairs), path=tmp_path / "gate.toml")


@pytest.mark.parametrize("table", ["postprocess", "preprocess"])
def test_tiling_needs_the_tables_that_say_how_images_and_outputs_are_read(tmp_path, table):
    before, _, rest = SPEC.partition(f"[{table}]\n")
    text = before + rest[rest.index("\n[") + 1 :]
    if table == "preprocess":
        start = text.index("[data.images]")
        text = text[:start] + text[text.index("[postprocess]") :]
        text = changed(text, ("batch = 16\n", 'batch = 16\nsource = "data:evaluation"\n'))
    with pytest.raises(SpecError, match=rf"\[tiling\] needs \[{table}\]"):
        spec_from_text(text, path=tmp_path / "gate.toml")


def test_tiling_needs_images(tmp_path):
    start, end = SPEC.index("[data.images]"), SPEC.index("[preprocess]")
    text = changed(SPEC[:start] + SPEC[end:], ("batch = 16\n", 'batch = 16\nsource = "samples.npz"\n'))
    with pytest.raises(SpecError, match=r"\[tiling\] needs images"):
        spec_from_text(text, path=tmp_path / "gate.toml")
