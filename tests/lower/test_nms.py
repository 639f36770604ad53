"""Decode and suppression inside the graph give what the host gives on the same tensors."""

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gate.engines import backend
from gate.errors import BuildError, LoweringError, SpecError
from gate.lower.nms import SELECTED, with_efficient_nms, with_onnx_nms
from gate.postprocess.config import Postprocess
from gate.postprocess.detections import NMS_OUTPUTS, detections_from_nms_outputs, detections_from_outputs
from gate.spec import GateSpec
from gate.targets import ImageRecord
from gate.verdict import Evidence

PLACES = 120
CLASSES = 3
ANCHORS = [[[10, 13], [16, 30]], [[30, 61], [62, 45]]]
BOXES = {
    "head": "boxes",
    "boxes": "b",
    "scores": "s",
    "format": "xyxy",
    "coordinates": "pixels",
    "activation": "none",
}
COMMON = {"category_ids": [10, 20, 30], "score_threshold": 0.2, "iou_threshold": 0.45, "max_detections": 30}


def make(**table):
    return msgspec.convert({**COMMON, **table}, Postprocess)


CASES = {
    "boxes": ({"b": (PLACES, 4), "s": (PLACES, CLASSES)}, make(**BOXES)),
    "xywh, sigmoid": (
        {"b": (PLACES, 4), "s": (PLACES, CLASSES)},
        make(**{**BOXES, "format": "xywh", "activation": "sigmoid"}),
    ),
    "best": ({"b": (PLACES, 4), "s": (PLACES, CLASSES)}, make(**BOXES, labels_per_box="best")),
    "agnostic": ({"b": (PLACES, 4), "s": (PLACES, CLASSES)}, make(**BOXES, class_agnostic=True)),
    "background first": ({"b": (PLACES, 4), "s": (PLACES, CLASSES + 1)}, make(**BOXES, background_class="first")),
    "labels": ({"b": (PLACES, 4), "s": (PLACES,), "k": (PLACES,)}, make(**BOXES, labels="k")),
    "labels, background": (
        {"b": (PLACES, 4), "s": (PLACES,), "k": (PLACES,)},
        make(**BOXES, labels="k", background_class="first", class_agnostic=True),
    ),
    "few": ({"b": (PLACES, 4), "s": (PLACES, CLASSES)}, make(**BOXES, max_detections=5)),
    "more than places": ({"b": (PLACES, 4), "s": (PLACES, CLASSES)}, make(**BOXES, max_detections=900)),
    "detr": (
        {"b": (PLACES, 4), "l": (PLACES, CLASSES + 1)},
        make(head="detr", boxes="b", logits="l"),
    ),
    "yolo": ({"o": (4 + CLASSES, PLACES)}, make(head="yolo", outputs=["o"])),
    "yolo_grid": (
        {"p3": (16, 6, 5), "p4": (2, 3, 4, 8)},
        make(head="yolo_grid", outputs=["p3", "p4"], strides=[8, 16], anchors=ANCHORS),
    ),
}


def write_graph(path, shapes, *, opset=17, kind=TensorProto.FLOAT):
    """A graph that gives each input back as an output: a detector whose raw outputs are known."""
    value, nodes, inputs, outputs = helper.make_tensor_value_info, [], [], []
    for name, shape in shapes.items():
        nodes.append(helper.make_node("Identity", [f"in_{name}"], [name], name=f"give_{name}"))
        own = TensorProto.INT64 if name == "k" else kind
        inputs.append(value(f"in_{name}", own, ["batch", *shape]))
        outputs.append(value(name, own, ["batch", *shape]))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def raw_outputs(shapes, config, n, seed):
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        if name == "b":
            centre, size = rng.uniform(20, 80, (n, PLACES, 2)), rng.uniform(5, 40, (n, PLACES, 2))
            resolved = config.resolved()
            first = centre if resolved.format == "cxcywh" else centre - size / 2
            second = centre + size / 2 if resolved.format == "xyxy" else size
            array = np.concatenate([first, second], 2) / (100 if resolved.coordinates == "normalized" else 1)
        elif name == "k":
            made[name] = rng.integers(int(config.background_class == "first"), CLASSES, (n, *shape)).astype(np.int64)
            continue
        elif name == "o":
            boxes = np.concatenate([rng.uniform(20, 80, (n, 2, PLACES)), rng.uniform(5, 40, (n, 2, PLACES))], 1)
            array = np.concatenate([boxes, rng.random((n, CLASSES, PLACES))], 1)
        elif config.resolved().activation == "none":
            array = rng.random((n, *shape))
        else:
            array = rng.normal(0, 2, (n, *shape))
        made[name] = array.astype(np.float32)
    return made


def run(path, raw):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(None, {f"in_{name}": each for name, each in raw.items()}), strict=True))


def require_equal(found, expected):
    assert sum(len(each.scores) for each in expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)


def images(n):
    return [ImageRecord(index, 300, 300, scale_x=0.5, scale_y=0.5, left=3.0, top=5.0) for index in range(n)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 3])
def test_onnx_graph_gives_what_the_host_gives(tmp_path, name, n):
    shapes, config = CASES[name]
    with_onnx_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    for seed in range(4):
        raw = raw_outputs(shapes, config, n, seed)
        given = run(tmp_path / "nms.onnx", raw)
        assert list(given) == [*shapes, *NMS_OUTPUTS]
        for each, array in raw.items():
            assert np.array_equal(given[each], array)
        size = (100, 100)
        host = detections_from_outputs(raw, images(n), config, input_size=size)
        require_equal(detections_from_nms_outputs(given, images(n), config, input_size=size), host)


@pytest.mark.parametrize("name", ["boxes", "best", "agnostic"])
def test_ties_are_broken_in_the_graph_as_on_the_host(tmp_path, name):
    shapes, config = CASES[name]
    with_onnx_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        raw = {
            "b": rng.integers(0, 40, (2, PLACES, 4)).astype(np.float32),
            "s": rng.choice(np.array([0.1, 0.25, 0.5, 0.75], np.float32), (2, PLACES, CLASSES)),
        }
        raw["b"][..., 2:] = np.maximum(raw["b"][..., 2:], raw["b"][..., :2])
        host = detections_from_outputs(raw, images(2), config)
        require_equal(detections_from_nms_outputs(run(tmp_path / "nms.onnx", raw), images(2), config), host)


def test_graph_that_finds_nothing_says_so(tmp_path):
    shapes, config = CASES["boxes"]
    with_onnx_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    raw = {"b": np.ones((2, PLACES, 4), np.float32), "s": np.zeros((2, PLACES, CLASSES), np.float32)}
    given = run(tmp_path / "nms.onnx", raw)
    assert given["num_detections"].tolist() == [[0], [0]]
    assert not given["detection_boxes"].any()
    assert [len(each.scores) for each in detections_from_nms_outputs(given, images(2), config)] == [0, 0]


def test_outputs_have_types_and_shapes_and_the_batch_stays_dynamic(tmp_path):
    shapes, config = CASES["boxes"]
    with_onnx_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    given = run(tmp_path / "nms.onnx", raw_outputs(shapes, config, 5, 0))
    found = {name: (given[name].dtype.name, given[name].shape) for name in NMS_OUTPUTS}
    assert found == {
        "num_detections": ("int32", (5, 1)),
        "detection_boxes": ("float32", (5, 30, 4)),
        "detection_scores": ("float32", (5, 30)),
        "detection_classes": ("int32", (5, 30)),
    }
    declared = {each.name: each.type.tensor_type for each in onnx.load(tmp_path / "nms.onnx").graph.output}
    assert declared["detection_boxes"].shape.dim[0].dim_param == "batch"


def test_indices_of_the_operator_are_given_where_asked(tmp_path):
    shapes, config = CASES["boxes"]
    with_onnx_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config, selected_indices=True)
    raw = raw_outputs(shapes, config, 2, 0)
    given = run(tmp_path / "nms.onnx", raw)
    sample, kind, box = given[SELECTED][0]
    score = raw["s"][sample, box, kind]
    assert score == given["detection_scores"][sample][given["detection_classes"][sample] == kind][0]


def test_outputs_in_half_precision_are_suppressed_in_single(tmp_path):
    shapes, config = CASES["boxes"]
    with_onnx_nms(write_graph(tmp_path / "a.onnx", shapes, kind=TensorProto.FLOAT16), tmp_path / "nms.onnx", config)
    raw = {name: each.astype(np.float16) for name, each in raw_outputs(shapes, config, 2, 0).items()}
    given = run(tmp_path / "nms.onnx", raw)
    assert given["b"].dtype == np.float16
    assert given["detection_boxes"].dtype == np.float32
    host = detections_from_outputs(raw, images(2), config)
    require_equal(detections_from_nms_outputs(given, images(2), config), host)


def plugin_of(tmp_path, name):
    shapes, config = CASES[name]
    with_efficient_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    model = onnx.load(tmp_path / "nms.onnx")
    (node,) = [each for each in model.graph.node if each.op_type == "EfficientNMS_TRT"]
    return model, node, {each.name: helper.get_attribute_value(each) for each in node.attribute}


def test_plugin_node_has_its_attributes(tmp_path):
    model, node, attributes = plugin_of(tmp_path, "boxes")
    assert (node.domain, len(node.input), len(node.output)) == ("TRT", 2, 4)
    assert {each.domain: each.version for each in model.opset_import} == {"": 17, "TRT": 1}
    assert attributes == {
        "plugin_version": b"1",
        "plugin_namespace": b"",
        "background_class": -1,
        "box_coding": 0,
        "iou_threshold": np.nextafter(np.float32(0.45), np.float32(1)),
        "max_output_boxes": 30,
        "score_activation": 0,
        "score_threshold": np.nextafter(np.float32(0.2), np.float32(1)),
    }
    shapes = {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in model.graph.output
    }
    assert shapes == {
        "b": ["batch", PLACES, 4],
        "s": ["batch", PLACES, CLASSES],
        "num_detections": ["batch", 1],
        "detection_boxes": ["batch", 30, 4],
        "detection_scores": ["batch", 30],
        "detection_classes": ["batch", 30],
    }


def test_plugin_is_told_to_suppress_across_classes(tmp_path):
    assert plugin_of(tmp_path, "agnostic")[2]["class_agnostic"] == 1
    assert "class_agnostic" not in plugin_of(tmp_path, "best")[2]


@pytest.mark.parametrize("name", CASES)
def test_plugin_gets_the_boxes_and_scores_that_the_host_decodes(tmp_path, name):
    from gate.postprocess.heads import decoded

    shapes, config = CASES[name]
    model, node, _ = plugin_of(tmp_path, name)
    index = list(model.graph.node).index(node)
    del model.graph.node[index:]
    del model.graph.output[:]
    for each in node.input:
        model.graph.output.append(helper.make_tensor_value_info(each, TensorProto.FLOAT, None))
    onnx.save_model(model, tmp_path / "decode.onnx")
    raw = raw_outputs(shapes, config, 2, 0)
    boxes, scores = run(tmp_path / "decode.onnx", raw).values()
    host = decoded(raw, config.resolved())
    np.testing.assert_allclose(boxes, host.boxes, rtol=1e-4, atol=1e-4)
    expected = host.scores
    if host.labels is not None:
        expected = np.where(host.labels[..., None] == np.arange(CLASSES), expected[..., None], 0)
    elif config.resolved().labels_per_box == "best" and not config.class_agnostic:
        expected = np.where(expected == expected.max(axis=2, keepdims=True), expected, 0)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)


def test_threshold_of_zero_leaves_scores_of_zero_out(tmp_path):
    path = write_graph(tmp_path / "a.onnx", CASES["boxes"][0])
    zero = msgspec.structs.replace(CASES["boxes"][1], score_threshold=0.0)
    with_efficient_nms(path, tmp_path / "nms.onnx", zero)
    (node,) = [each for each in onnx.load(tmp_path / "nms.onnx").graph.node if each.op_type == "EfficientNMS_TRT"]
    (threshold,) = [each.f for each in node.attribute if each.name == "score_threshold"]
    assert threshold == np.finfo(np.float32).tiny


@pytest.mark.parametrize("name", ["tensorrt_rtx", "onnxruntime"])
def test_backend_without_the_plugin_is_refused(tmp_path, name):
    path = write_graph(tmp_path / "a.onnx", CASES["boxes"][0])
    with pytest.raises(LoweringError, match=f"{name} has no plugin EfficientNMS_TRT.*TensorRT-RTX has no plugins"):
        with_efficient_nms(path, tmp_path / "nms.onnx", CASES["boxes"][1], backend=name)
    assert not (tmp_path / "nms.onnx").exists()


@pytest.mark.parametrize(
    "shapes, changes, message",
    [
        ({"b": (9, 4)}, {}, "no output 's'; it has 'b'"),
        ({"b": (9, 5), "s": (9, 3)}, {}, r"'b' is \[batch, 9, 5\], expected rank 3 with 4"),
        ({"b": (9, 4), "s": (9, 5)}, {}, "'s' is .* expected rank 3 with 3"),
        ({"b": (9, 4), "s": (9,)}, {}, "'s' is .* expected rank 3"),
        ({"b": (9, 4), "s": (9, 3)}, {"nms": False}, "nms = false"),
        ({"b": (9, 4), "s": (9, 3), "num_detections": (1,)}, {}, "has 'num_detections' already"),
    ],
)
def test_graph_that_does_not_fit_the_table_is_refused(tmp_path, shapes, changes, message):
    path = write_graph(tmp_path / "a.onnx", shapes)
    for surgery in (with_onnx_nms, with_efficient_nms):
        with pytest.raises(LoweringError, match=message):
            surgery(path, tmp_path / "nms.onnx", make(**BOXES, **changes))
    assert not (tmp_path / "nms.onnx").exists()


def test_maps_without_fixed_sizes_are_refused(tmp_path):
    path = write_graph(tmp_path / "a.onnx", {"p3": (16, "h", "w"), "p4": (16, 3, 4)})
    with pytest.raises(LoweringError, match="'p3' is .* with H and W fixed"):
        with_onnx_nms(path, tmp_path / "nms.onnx", CASES["yolo_grid"][1])


def test_old_opset_file_that_is_no_graph_and_contradicting_table_are_refused(tmp_path):
    path = write_graph(tmp_path / "a.onnx", CASES["boxes"][0], opset=12)
    with pytest.raises(LoweringError, match="is of opset 12, and what is added needs 13"):
        with_onnx_nms(path, tmp_path / "nms.onnx", CASES["boxes"][1])
    for content in (b"", b"\xff no graph"):
        path.write_bytes(content)
        with pytest.raises(LoweringError, match="cannot be read as ONNX|has no node"):
            with_onnx_nms(path, tmp_path / "nms.onnx", CASES["boxes"][1])
    with pytest.raises(SpecError, match="format must be declared"):
        with_onnx_nms(path, tmp_path / "nms.onnx", make(**{**BOXES, "format": None}))


def test_threshold_that_the_plugin_does_not_have_is_refused(tmp_path):
    path = write_graph(tmp_path / "a.onnx", CASES["boxes"][0])
    with pytest.raises(LoweringError, match="must be below 1"):
        with_efficient_nms(path, tmp_path / "nms.onnx", make(**{**BOXES, "iou_threshold": 1.0}))


def engine_spec(shapes, name):
    axes = {"min": 1, "opt": 2, "max": 4}
    inputs = {
        f"in_{each}": {"dtype": "float32", "shape": ["batch", *shape], "axes": {"batch": axes}}
        for each, shape in shapes.items()
    }
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": inputs,
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": name, "precision": "fp32", "parity": {}}],
        },
        GateSpec,
    )


@pytest.mark.parametrize("surgery", [with_onnx_nms, with_efficient_nms])
def test_tensorrt_rtx_refuses_suppression_in_the_graph_by_name(tmp_path, surgery):
    found, (shapes, config) = backend("tensorrt_rtx"), CASES["boxes"]
    if not found.version().startswith("1.7."):
        pytest.skip("what another version has is not known")
    surgery(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    spec = engine_spec(shapes, "tensorrt_rtx")
    with pytest.raises(BuildError) as caught:
        found.build(onnx=tmp_path / "nms.onnx", out=tmp_path / "model.plan", spec=spec, engine=spec.engines[0])
    named = "NonMaxSuppression" if surgery is with_onnx_nms else "EfficientNMS_TRT"
    assert named in str(caught.value)
    assert not (tmp_path / "model.plan").exists()


GPU_CASES = ["boxes", "xywh, sigmoid", "best", "detr", "yolo", "yolo_grid", "few"]


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.001, 0.2])
@pytest.mark.parametrize("name", GPU_CASES)
def test_engine_with_the_plugin_gives_what_the_host_gives(tmp_path, name, threshold):
    shapes, config = CASES[name]
    config = msgspec.structs.replace(config, score_threshold=threshold)
    spec = engine_spec(shapes, "tensorrt")
    found = backend("tensorrt")
    if found.runs_here(spec.engines[0]) is not Evidence.DEVICE:
        pytest.skip("tensorrt does not run on this GPU")
    with_efficient_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    found.build(onnx=tmp_path / "nms.onnx", out=tmp_path / "model.plan", spec=spec, engine=spec.engines[0])
    with found.open(tmp_path / "model.plan", spec=spec, engine=spec.engines[0]) as runner:
        for n in (1, 3):
            raw = raw_outputs(shapes, config, n, n)
            given = runner.run({f"in_{each}": array for each, array in raw.items()})
            size = (100, 100)
            host = detections_from_outputs(raw, images(n), config, input_size=size)
            require_equal(detections_from_nms_outputs(given, images(n), config, input_size=size), host)


@pytest.mark.gpu
def test_plugin_that_ignores_class_agnostic_is_refused_and_one_that_knows_it_gives_what_the_host_gives(tmp_path):
    from gate.engines.tensorrt import api

    shapes, config = CASES["agnostic"]
    spec = engine_spec(shapes, "tensorrt")
    engine = msgspec.structs.replace(spec.engines[0], nms="efficient_nms")
    spec = msgspec.structs.replace(spec, engines=(engine,), postprocess=config)
    found = backend("tensorrt")
    if found.runs_here(engine) is not Evidence.DEVICE:
        pytest.skip("tensorrt does not run on this GPU")
    trt = api.module("tensorrt")
    trt.init_libnvinfer_plugins(trt.Logger(), "")
    known = api.plugin_attributes(trt, "EfficientNMS_TRT")
    assert known is not None
    assert {"score_threshold", "iou_threshold", "box_coding"} <= known
    with_efficient_nms(write_graph(tmp_path / "a.onnx", shapes), tmp_path / "nms.onnx", config)
    plan = tmp_path / "model.plan"
    if "class_agnostic" not in known:
        with pytest.raises(BuildError, match="does not know class_agnostic"):
            found.build(onnx=tmp_path / "nms.onnx", out=plan, spec=spec, engine=engine)
        assert not plan.exists()
        return
    found.build(onnx=tmp_path / "nms.onnx", out=plan, spec=spec, engine=engine)
    with found.open(plan, spec=spec, engine=engine) as runner:
        raw = raw_outputs(shapes, config, 3, 3)
        given = runner.run({f"in_{each}": array for each, array in raw.items()})
        size = (100, 100)
        host = detections_from_outputs(raw, images(3), config, input_size=size)
        require_equal(detections_from_nms_outputs(given, images(3), config, input_size=size), host)
