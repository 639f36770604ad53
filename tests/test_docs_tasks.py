"""docs/tasks.md: its specs are valid, its code runs, and it names every kind, value and option that there is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gate.cli.init import Model, Tensor, spec_text
from gate.cli.main import main
from gate.data.image_spec import ImagesSpec, Preprocess
from gate.data.samples import digest_of, open_source
from gate.errors import SpecError
from gate.metrics.findings import asked_limits
from gate.metrics.kinds import kind_named, names
from gate.postprocess.config import Postprocess, Tiling
from gate.spec import InputSpec, spec_from_text
from gate.targets import Categories, Detections, ImageRecord, ImageTarget

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "digit-detector" / "gate.toml"

BUILT_IN = (
    "detection",
    "instance_segmentation",
    "keypoints",
    "semantic_segmentation",
    "regression",
    "embedding",
    "tokens",
    "tracking",
)
INPUTS = {
    "detection": {"images": InputSpec(dtype="float32", shape=("batch", 3, 64, 64))},
    "semantic_segmentation": {"images": InputSpec(dtype="float32", shape=("batch", 3, 32, 32))},
    "regression": {"input": InputSpec(dtype="float32", shape=("batch", 4))},
    "embedding": {"input": InputSpec(dtype="float32", shape=("batch", 8))},
    "tokens": {"tokens": InputSpec(dtype="int64", shape=("batch", 16))},
}


def blocks(language, text=PAGE):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(title):
    """The text below a heading, up to the next heading of any level."""
    return re.split(r"^#+ ", PAGE.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def whole():
    return next(each for each in blocks("toml") if "schema = 1" in each)


def toml(value):
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def completed(fragment):
    """The whole spec of the page, with the tables of a fragment in place of its own and one engine."""
    base, given = tomllib.loads(whole()), tomllib.loads(fragment)
    engine = {"name": "one", "backend": "onnxruntime", "precision": "fp16", "task": {}}
    engine |= given.pop("engine", {})
    if "images" in given.get("data", {}):
        base["data"] = {}
    tables = {**base, **given, "engine": [engine]}
    return spec_from_text("".join(f"{key} = {toml(each)}\n" for key, each in tables.items()), path=Path("gate.toml"))


def test_the_whole_spec_is_valid_and_asks_for_what_it_says():
    file = spec_from_text(whole(), path=Path("gate.toml"))
    asked = {
        engine.name: [each.check for each in asked_limits(kind_named("detection"), engine, file)]
        for engine in file.spec.engines
    }
    assert asked == {
        "ort-fp16": ["task.mean_ap_drop"],
        "ort-int8": ["task.mean_ap", "task.mean_ap_drop"],
        "ort-fp32-nms": ["task.mean_ap_drop"],
    }


def test_the_whole_spec_is_the_examples():
    page, example = tomllib.loads(whole()), tomllib.loads(EXAMPLE.read_text())
    for table in ("inputs", "data", "preprocess", "postprocess", "task"):
        assert page[table] == example[table], table
    stated = json.loads((EXAMPLE.parent / "metrics.json").read_text())
    assert page["model"]["metrics"]["mean_ap"] == pytest.approx(stated["mean_ap"], abs=0.005)


@pytest.mark.parametrize("fragment", [each for each in blocks("toml") if "schema = 1" not in each])
def test_each_fragment_is_valid_in_a_whole_spec(fragment):
    file = completed(fragment)
    kind = kind_named(file.spec.task.kind)
    engine = file.spec.engines[0]
    if engine.task_limits or kind.default_drop:
        asked = asked_limits(kind, engine, file)
        assert len(asked) == max(len(engine.task_limits), 1)
    kind.make(file.spec.task.options, Categories({1: "cat", 2: "dog"}))


@pytest.mark.parametrize("title", INPUTS)
def test_the_code_of_each_kind_gives_samples_that_its_metric_takes(title, tmp_path):
    (tmp_path / "data.py").write_text(blocks("python", section(title))[0])
    fragment = blocks("toml", section(title))[0]
    file = completed(fragment)
    spec = msgspec.structs.replace(file.spec, inputs=INPUTS[title], preprocess=None)
    file = msgspec.structs.replace(file, spec=spec, path=tmp_path / "gate.toml")
    source = open_source(file, "data:evaluation", needed=2, key="source")
    assert digest_of(source, inputs=file.spec.inputs, batch=4, where="test").targets
    (batch,) = source.batches(64)
    categories = Categories({1: "cat", 2: "dog"})
    metric = kind_named(title).make(file.spec.task.options, categories)
    found = predictions(title, batch)
    metric.add(found, reference=found, targets=batch.targets, first_sample=0)
    values = metric.statistics().values()
    first = next(iter(kind_named(title).values))
    assert values[first] == pytest.approx({"regression": 0.0, "tokens": values.get("perplexity")}.get(title, 1.0))


def predictions(kind, batch):
    """Answers that are right, in the form that the kind takes."""
    if kind == "detection":
        return [
            Detections(
                boxes=np.array([[x, y, x + width, y + height]]),
                scores=np.array([0.9]),
                labels=np.array([target.annotations[0]["category_id"]]),
            )
            for target in batch.targets
            for x, y, width, height in [target.annotations[0]["bbox"]]
        ]
    if kind == "semantic_segmentation":
        return {"logits": np.stack([np.stack([each == 0, each == 1]) for each in batch.targets]).astype(np.float32)}
    if kind == "regression":
        return {"output": np.stack(batch.targets)}
    if kind == "tokens":
        return {"logits": np.random.default_rng(1).standard_normal((batch.size, 16, 50)).astype(np.float32)}
    return {"output": batch.inputs["input"]}


def test_the_code_that_reads_a_coco_folder_runs(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    image.new("RGB", (40, 30)).save(tmp_path / "val2017" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (tmp_path / "data.py").write_text(blocks("python", section("Where samples come from"))[0])
    file = spec_from_text(whole(), path=tmp_path / "gate.toml")
    (batch,) = open_source(file, "data:evaluation", needed=1, key="source").batches(8)
    assert batch.inputs["images"].shape == (1, 3, 128, 128)
    assert batch.targets[0].annotations[0]["bbox"] == [1, 2, 3, 4]


def test_every_kind_has_a_section_that_names_its_values_options_and_defaults():
    assert set(BUILT_IN) <= set(names())
    for name in BUILT_IN:
        kind, text = kind_named(name), section(name)
        shared = section("detection") if name == "instance_segmentation" else ""
        missing = [each for each in (*kind.values, *kind.options, *kind.named) if each not in text + shared]
        assert not missing, f"{name}: {missing}"
        if kind.default_drop:
            first = next(iter(kind.values))
            row = next(each for each in section("Limits").splitlines() if name in each and each.startswith("|"))
            numbers = [kind.default_drop[each] for each in ("fp32", "bf16", "int8")]
            assert row.split("|")[2:6] == [f" `{first}` ", *(f" {each} " for each in numbers)]
            assert len(set(kind.default_drop.values())) == 3


@pytest.mark.parametrize(
    ("title", "table"),
    [
        ("`[preprocess]`", Preprocess),
        ("`[postprocess]`", Postprocess),
        ("Images in files", ImagesSpec),
        ("Tiles of large images", Tiling),
    ],
)
def test_every_key_of_a_table_is_explained(title, table):
    text = section(title)
    assert [key for key in table.__struct_fields__ if key != "head" and not re.search(rf"\b{key}\b", text)] == []


def test_links_within_the_documents_lead_somewhere():
    for file, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", PAGE):
        assert not file or (ROOT / "docs" / file).exists(), file
        if anchor:
            page = (ROOT / "docs" / file).read_text() if file else PAGE
            headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in slugs, anchor


@pytest.fixture
def depth(tmp_path, monkeypatch):
    """The page's own metric, installed; gives its folder."""
    text = section("A metric of your own")
    (tmp_path / "depth_metric.py").write_text(blocks("python", text)[0])
    information = tmp_path / "depth_metric-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: depth-metric\nVersion: 1.0\n")
    point = tomllib.loads(blocks("text", text)[0])["project"]["entry-points"]["trt_gate.metrics"]
    lines = "".join(f"{key} = {value}\n" for key, value in point.items())
    (information / "entry_points.txt").write_text(f"[trt_gate.metrics]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("depth_metric", None)


def test_the_metric_of_ones_own_weighs_samples_as_if_they_were_repeated(depth):
    kind = kind_named("depth")
    random = np.random.default_rng(0)
    truth = random.uniform(1.0, 9.0, (5, 6, 6))
    found = {"depth": truth * random.uniform(0.7, 1.4, truth.shape)}
    metric = kind.make({}, None)
    metric.add(found, reference=found, targets=list(truth), first_sample=0)
    statistics = kind.read(metric.statistics().to_arrays())
    twice = kind.make({}, None)
    rows = [0, 0, 3]
    twice.add({"depth": found["depth"][rows]}, reference=found, targets=list(truth[rows]), first_sample=0)
    assert statistics.values(np.array([2, 0, 0, 1, 0])) == twice.statistics().values()
    assert 0.3 < statistics.values()["delta1"] < 1.0
    with pytest.raises(SpecError, match="no option 'factr'; did you mean 'factor'"):
        kind.make({"factr": 1.1}, None)


def test_the_metric_of_ones_own_decides_a_check(depth, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(depth)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    for file, factor in (("reference.onnx", 1.0), ("engine.onnx", 1.3)):
        constant = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32) * factor, "factor")
        shape = [onnx.helper.make_tensor_value_info(each, 1, ["batch", 4, 4]) for each in ("image", "depth")]
        node = onnx.helper.make_node("MatMul", ["image", "factor"], ["depth"])
        graph = onnx.helper.make_graph([node], "depth", [shape[0]], [shape[1]], [constant])
        opset = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    truth = np.random.default_rng(0).uniform(1.0, 9.0, (16, 4, 4)).astype(np.float32)
    np.savez("data.npz", image=truth, targets=truth)
    task = blocks("text", section("A metric of your own"))[1].replace("[engine.task]", "").partition("delta1")[0]
    Path("gate.toml").write_text(
        'schema = 1\n[model]\nid = "depth"\nonnx = "reference.onnx"\n'
        '[inputs.image]\ndtype = "float32"\nshape = ["batch", 4, 4]\nbatch = { min = 1, opt = 8, max = 16 }\n'
        f'[data]\nsource = "data.npz"\nsamples = 16\n{task}\n'
        '[[engine]]\nname = "same"\nbackend = "onnxruntime"\nprecision = "fp32"\n  [engine.task]\n'
        '[[engine]]\nname = "far"\nbackend = "onnxruntime"\nprecision = "fp32"\nonnx = "engine.onnx"\n'
        "  [engine.task]\n  delta1_drop_at_most = 0.001\n"
    )
    assert main(["check", "gate.toml", "--engine", "same"]) == 0
    assert main(["check", "gate.toml"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAILED +far +task\.delta1_drop: 1 > 1\.0e-03", out)
    assert main(["explain", "task.delta1_drop"]) == 0
    assert "depth: delta1: Pixels within the factor" in capsys.readouterr().out


def test_the_function_that_decodes_keypoints_gives_what_the_metric_takes():
    scope = {}
    exec(blocks("python", section("Masks, keypoints, tracks decoded by yourself"))[0], scope)
    image = ImageRecord(image_id=1, width=200, height=100, scale_x=0.5, scale_y=0.5, top=14.0)
    points = np.zeros((1, 3, 17, 3), np.float32)
    points[..., 0], points[..., 1], points[..., 2] = 20.0, 30.0, 1.0
    outputs = {
        "scores": np.array([[0.9, 0.01, 0.5]], np.float32),
        "boxes": np.tile(np.array([10, 24, 60, 44], np.float32), (1, 3, 1)),
        "keypoints": points,
    }
    (found,) = scope["decode"](outputs, [image], {})
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])
    assert found.boxes[0].tolist() == [20.0, 20.0, 120.0, 60.0]
    assert found.keypoints[0, 0].tolist() == [40.0, 32.0, 1.0]
    metric = kind_named("keypoints").make({}, Categories({1: "person"}))
    flat = [each for _ in range(17) for each in (40.0, 32.0, 2)]
    annotation = {"id": 1, "category_id": 1, "bbox": [20, 20, 100, 40], "area": 4000.0, "iscrowd": 0, "keypoints": flat}
    target = ImageTarget(image, ({**annotation, "num_keypoints": 17},))
    metric.add([found], reference=[found], targets=[target], first_sample=0)
    assert metric.statistics().values()["mean_ap"] == pytest.approx(1.0)


def test_the_template_for_a_detector_that_init_writes_is_valid_once_uncommented():
    shape = ("batch", 3, 320, 640)
    model = Model("onnx", "model.onnx", (Tensor("images", "float32", shape),), ("output0",), 17)
    text = spec_text(model, "detector")
    spec_from_text(text, path=Path("gate.toml"))
    lines = text.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("# [data.images]"))
    end = next(index for index in range(begin, len(lines)) if not lines[index])
    lines[begin:end] = [line.removeprefix("# ") for line in lines[begin:end]]
    lines = ['kind = "detection"' if each.startswith("# kind = ") else each for each in lines]
    lines = ["[task]" if each.startswith("# [task]") else each for each in lines if not each.startswith("source = ")]
    spec = spec_from_text("\n".join(lines), path=Path("gate.toml")).spec
    assert spec.task.kind == "detection"
    assert spec.preprocess.size == (320, 640)
    assert spec.postprocess.outputs == ("output0",)
