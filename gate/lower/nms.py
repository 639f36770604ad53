"""Graph surgery: decode and non-maximum suppression put into a detector's ONNX graph.

The raw outputs stay, under their names; beside them come `num_detections` int32 [n, 1], `detection_boxes` float32
[n, K, 4] (xyxy, as in the table: pixels of the input or fractions of it), `detection_scores` float32 [n, K] and
`detection_classes` int32 [n, K], zeros after the detections that there are. The batch stays dynamic. Both forms do what
`gate.postprocess` does on the host on the same tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gate.engines.graph import opset_of
from gate.errors import LoweringError
from gate.lower.files import read, write
from gate.postprocess.config import Postprocess, require_consistent
from gate.postprocess.detections import NMS_OUTPUTS
from gate.postprocess.heads import grid
from gate.tensors import Array

SELECTED = "selected_indices"
"""What ONNX's NonMaxSuppression itself gives: int64 [m, 3], sample, class and box of each that one class alone keeps."""

_LEAST_OPSET = 13
"""Axes of Unsqueeze and ReduceSum are inputs from here on. Source: onnx.ai, Changelog of operators."""

_PREFIX = "gate_nms/"
_PLUGIN_DOMAIN = "TRT"
_LEAST_NORMAL = float(np.finfo(np.float32).tiny)
"""A GPU may take a smaller number for 0, which every score reaches."""


def with_onnx_nms(model: Path, out: Path, config: Postprocess, *, selected_indices: bool = False) -> None:
    """Write a graph with decode and ONNX's NonMaxSuppression inside, for every backend that has the operator.

    ONNX Runtime has it. TensorRT-RTX 1.7 parses it and then refuses to compile it ("has no runners that implement it"),
    and has no plugins either: there, suppress on the host.

    Args:
        model: The detector's graph, with its raw outputs.
        out: The file to write.
        config: What the outputs mean, and the thresholds. K is `max_detections`, or fewer where there are fewer places.
        selected_indices: Give the operator's own output too. Its first axis is not the batch, so the gate does not
            compare it sample by sample.

    Raises:
        SpecError: The table contradicts itself.
        LoweringError: The graph cannot be read, is of an opset below 13, lacks an output, has one of another rank, or
            has the outputs already; or the table says nms = false.
    """
    surgery = _Surgery.of(model, config)
    boxes, scores = surgery.decode()
    _add_onnx_nms(surgery, boxes, scores, selected_indices=selected_indices)
    surgery.finish(out)


def with_efficient_nms(model: Path, out: Path, config: Postprocess, *, backend: str = "tensorrt") -> None:
    """Write a graph with decode and TensorRT's plugin EfficientNMS_TRT inside.

    The plugin takes scores and overlaps that equal a threshold as above it, so the thresholds in the graph are the
    next larger float32: scores in FP32 are then decided as the host decides them. It looks at the best 4096 candidates
    of an image, and of equal scores at any first. TensorRT 8.6.0 has no `class_agnostic`: the build is refused.
    Source: TensorRT, plugin/efficientNMSPlugin/efficientNMSInference.cu and efficientNMSParameters.h; attributes:
    strings of libnvinfer_plugin 8.6.0.

    Args:
        model: The detector's graph, with its raw outputs.
        out: The file to write.
        config: What the outputs mean, and the thresholds. K is `max_detections`.
        backend: What the graph is for.

    Raises:
        SpecError: The table contradicts itself.
        LoweringError: The backend has no plugins; or as of `with_onnx_nms`; or iou_threshold is 1.
    """
    if backend != "tensorrt":
        raise LoweringError(
            f"{backend} has no plugin EfficientNMS_TRT: it is part of TensorRT alone, and TensorRT-RTX has no plugins",
            hint="Suppress on the host, or, where the backend has ONNX's NonMaxSuppression, by that: TensorRT-RTX 1.7 has not.",
        )
    surgery = _Surgery.of(model, config)
    if surgery.config.iou_threshold >= 1.0:
        raise LoweringError("EfficientNMS_TRT drops boxes from an IoU of iou_threshold on; it must be below 1")
    boxes, scores = surgery.decode()
    if surgery.config.labels_per_box == "best" and not surgery.config.class_agnostic:
        scores = surgery.best_alone(scores)
    _add_efficient_nms(surgery, boxes, scores)
    surgery.finish(out)


@dataclass
class _Surgery:
    """A graph and what is being added to it."""

    model: Any
    config: Postprocess
    where: str
    shapes: dict[str, tuple[int | str | None, ...]]
    types: dict[str, int]
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, config: Postprocess) -> _Surgery:
        """The graph of a file, read and checked."""
        config = require_consistent(config)
        if not config.nms:
            raise LoweringError(
                "[postprocess] has nms = false, so there is nothing to put into the graph", where=str(path)
            )
        model = read(path)
        if not model.graph.node:
            raise LoweringError("the graph has no node", where=str(path))
        if opset_of(model) < _LEAST_OPSET:
            raise LoweringError(
                f"the graph is of opset {opset_of(model)}, and what is added needs {_LEAST_OPSET} or later",
                where=str(path),
                hint=f"Export the model with opset = {_LEAST_OPSET} or later.",
            )
        shapes, types = _outputs_of(model)
        for name in config.output_names:
            if name not in shapes:
                there = ", ".join(repr(each) for each in shapes) or "none"
                raise LoweringError(
                    f"the graph has no output {name!r}; it has {there}",
                    where=str(path),
                    hint="[postprocess] names the outputs that it reads.",
                )
        names = {name for node in model.graph.node for name in node.output}
        taken = [each for each in (*NMS_OUTPUTS, SELECTED) if each in names]
        if taken or any(name.startswith(_PREFIX) for name in names):
            raise LoweringError(
                f"the graph has {taken[0] if taken else _PREFIX!r} already: suppression is inside", where=str(path)
            )
        return cls(model, config, str(path), shapes, types)

    def add(
        self, kind: str, *inputs: str | Array | np.generic, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node; the name of its first output, from which the names of the others follow."""
        import onnx

        label = f"{_PREFIX}{kind}_{len(self.nodes)}"
        names = [label, *(f"{label}:{index}" for index in range(1, outputs))]
        given = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        node = onnx.helper.make_node(kind, given, names, name=label, domain=domain, **attributes)
        self.nodes.append(node)
        return label

    def constant(self, array: Array | np.generic) -> str:
        """The name of a constant."""
        name = f"{_PREFIX}constant_{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def floats(self, name: str) -> str:
        """An output of the graph in FP32."""
        import onnx

        if self.types[name] == onnx.TensorProto.FLOAT:
            return name
        return self.add("Cast", name, to=onnx.TensorProto.FLOAT)

    def part(self, values: str, first: int, last: int) -> str:
        """Entries of the last axis, from `first` up to, not including, `last`."""
        return self.add("Slice", values, _ints(first), _ints(last), _ints(-1))

    def require_rank(self, name: str, rank: int, last: int | None = None) -> None:
        """Refuse an output whose shape is known and another."""
        shape = self.shapes[name]
        size = shape[-1] if shape else None
        if len(shape) != rank or (last is not None and isinstance(size, int) and size != last):
            wanted = f"rank {rank}" + (f" with {last} as its last size" if last else "")
            raise LoweringError(
                f"output {name!r} is [{', '.join(str(each) for each in shape)}], expected {wanted}", where=self.where
            )

    def decode(self) -> tuple[str, str]:
        """Corners [n, N, 4] and scores [n, N, C], activation applied, background left out: `heads.decoded` as nodes."""
        config = self.config
        if config.head == "yolo_grid":
            return self._grid()
        if config.head == "yolo":
            (name,) = config.outputs
            self.require_rank(name, 3)
            rows = self.add("Transpose", self.floats(name), perm=[0, 2, 1])
            classes = self.part(rows, 4, 4 + config.classes)
            return self._corners(self.part(rows, 0, 4), str(config.format)), self._activated(classes)
        boxes, scores = config.output_names[:2]
        self.require_rank(boxes, 3, 4)
        corners = self._corners(self.floats(boxes), str(config.format))
        if config.labels is not None:
            return corners, self._by_label(scores, config.labels)
        columns = config.classes + (config.background_class != "none")
        self.require_rank(scores, 3, columns)
        values = self._activated(self.floats(scores))
        if config.background_class == "none":
            return corners, values
        first = int(config.background_class == "first")
        return corners, self.part(values, first, first + config.classes)

    def best_alone(self, scores: str) -> str:
        """Scores [n, N, C] with those of all classes but each box's best at 0."""
        best = f"{self.add('TopK', scores, _ints(1), axis=2, outputs=2)}:1"
        classes = np.arange(self.config.classes, dtype=np.int64)[None, None, :]
        return self.add("Where", self.add("Equal", best, classes), scores, np.float32(0))

    def _corners(self, boxes: str, box_format: str) -> str:
        if box_format == "xyxy":
            return boxes
        first, size = self.part(boxes, 0, 2), self.part(boxes, 2, 4)
        if box_format == "xywh":
            return self.add("Concat", first, self.add("Add", first, size), axis=-1)
        half = self.add("Mul", size, np.float32(0.5))
        return self.add("Concat", self.add("Sub", first, half), self.add("Add", first, half), axis=-1)

    def _activated(self, values: str) -> str:
        if self.config.activation == "none":
            return values
        if self.config.activation == "sigmoid":
            return self.add("Sigmoid", values)
        return self.add("Softmax", values, axis=-1)

    def _by_label(self, scores: str, labels: str) -> str:
        import onnx

        for name in (scores, labels):
            self.require_rank(name, 2)
        whole = labels
        if self.types[labels] in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            whole = self.add("Round", labels)
        whole = self.add("Unsqueeze", self.add("Cast", whole, to=onnx.TensorProto.INT64), _ints(2))
        first = int(self.config.background_class == "first")
        classes = np.arange(self.config.classes, dtype=np.int64)[None, None, :] + first
        values = self.add("Unsqueeze", self._activated(self.floats(scores)), _ints(2))
        return self.add("Where", self.add("Equal", whole, classes), values, np.float32(0))

    def _grid(self) -> tuple[str, str]:
        config = self.config
        each = 5 + config.classes
        rows, shapes = [], []
        for name, anchors in zip(config.outputs, config.anchors, strict=True):
            shape, count = self.shapes[name], len(anchors)
            deep = len(shape) == 5
            sizes = shape[2:4]
            fits = shape[1:2] == (count,) and shape[4:] == (each,) if deep else shape[1:2] == (count * each,)
            height, width = sizes if len(sizes) == 2 else (None, None)
            if len(shape) not in (4, 5) or not fits or not isinstance(height, int) or not isinstance(width, int):
                raise LoweringError(
                    f"output {name!r} is [{', '.join(str(size) for size in shape)}], expected [n, {count * each}, H, W] or "
                    f"[n, {count}, H, W, {each}] with H and W fixed",
                    where=self.where,
                    hint="Cells are constants of the graph: export the model with a fixed height and width.",
                )
            shapes.append((height, width))
            values = self.floats(name)
            if not deep:
                values = self.add("Reshape", values, _ints(0, count, each, height * width))
                values = self.add("Transpose", values, perm=[0, 1, 3, 2])
            rows.append(self.add("Reshape", values, _ints(0, count * height * width, each)))
        joined = rows[0] if len(rows) == 1 else self.add("Concat", *rows, axis=1)
        values = self._activated(joined)
        places = grid(shapes, config)
        double = self.add("Mul", self.part(values, 0, 4), np.float32(2))
        shifted = self.add("Sub", self.part(double, 0, 2), np.float32(0.5))
        centre = self.add("Mul", self.add("Add", shifted, places.cell[None]), places.stride[None])
        side = self.part(double, 2, 4)
        size = self.add("Mul", self.add("Mul", side, side), places.anchor[None])
        corners = self._corners(self.add("Concat", centre, size, axis=-1), "cxcywh")
        return corners, self.add("Mul", self.part(values, 4, 5), self.part(values, 5, each))

    def give(self, name: str, value: str, kind: int, shape: Sequence[int | str | None]) -> None:
        """Make a value an output of the graph, under a name."""
        import onnx

        self.nodes.append(onnx.helper.make_node("Identity", [value], [name], name=f"{_PREFIX}{name}"))
        self.outputs.append(onnx.helper.make_tensor_value_info(name, kind, list(shape)))

    @property
    def batch(self) -> int | str | None:
        """The first size of the outputs: a number, or the name of the axis."""
        return self.shapes[self.config.output_names[0]][0]

    def finish(self, out: Path) -> None:
        """Write the graph with what was added."""
        import onnx

        graph = self.model.graph
        graph.node.extend(self.nodes)
        graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items())
        graph.output.extend(self.outputs)
        with tempfile.TemporaryDirectory(prefix="gate-nms-") as folder:
            try:
                write(self.model, out, Path(folder))
            except onnx.checker.ValidationError as err:
                raise LoweringError(f"the graph with suppression inside is not valid: {err}", where=self.where) from err


def _add_onnx_nms(surgery: _Surgery, boxes: str, scores: str, *, selected_indices: bool) -> None:
    import onnx

    config, add = surgery.config, surgery.add
    best = None
    if config.class_agnostic:
        scores = add("TopK", scores, _ints(1), axis=2, outputs=2)
        best = f"{scores}:1"
    elif config.labels_per_box == "best":
        scores = surgery.best_alone(scores)
    by_class = add("Transpose", scores, perm=[0, 2, 1])
    selected = add(
        "NonMaxSuppression",
        boxes,
        by_class,
        _ints(config.max_detections),
        np.array([config.iou_threshold], np.float32),
        np.array([config.score_threshold], np.float32),
    )
    shape = add("Shape", by_class)
    nothing = add("Expand", np.float32(-1), shape)
    kept = add("ScatterND", nothing, selected, add("GatherND", by_class, selected))
    flat = add("Reshape", kept, _ints(0, -1))
    places = add("Slice", shape, _ints(2), _ints(3), _ints(0))
    size = add("Slice", add("Shape", flat), _ints(1), _ints(2), _ints(0))
    top = add("TopK", flat, add("Min", size, _ints(config.max_detections)), axis=1, outputs=2)
    chosen = f"{top}:1"
    valid = add("Greater", top, np.float32(-0.5))
    count = add("ReduceSum", add("Cast", valid, to=onnx.TensorProto.INT32), _ints(1), keepdims=1)
    classes = add("Div", chosen, places)
    box = add("Unsqueeze", add("Sub", chosen, add("Mul", classes, places)), _ints(2))
    if best is not None:
        classes = add("Squeeze", add("GatherND", best, box, batch_dims=1), _ints(2))
    corners = add("GatherND", boxes, box, batch_dims=1)
    corners = add("Where", add("Unsqueeze", valid, _ints(2)), corners, np.float32(0))
    classes = add("Cast", add("Where", valid, classes, np.int64(0)), to=onnx.TensorProto.INT32)
    found = (count, corners, add("Where", valid, top, np.float32(0)), classes)
    _give_detections(surgery, found, slots=None)
    if selected_indices:
        surgery.give(SELECTED, selected, onnx.TensorProto.INT64, (None, 3))


def _add_efficient_nms(surgery: _Surgery, boxes: str, scores: str) -> None:
    import onnx

    config = surgery.config
    agnostic = {"class_agnostic": 1} if config.class_agnostic else {}
    first = surgery.add(
        "EfficientNMS_TRT",
        boxes,
        scores,
        outputs=4,
        domain=_PLUGIN_DOMAIN,
        plugin_version="1",
        plugin_namespace="",
        background_class=-1,
        box_coding=0,
        iou_threshold=_above(config.iou_threshold),
        max_output_boxes=config.max_detections,
        score_activation=0,
        score_threshold=_above(config.score_threshold),
        **agnostic,
    )
    imported = surgery.model.opset_import
    if all(each.domain != _PLUGIN_DOMAIN for each in imported):
        imported.append(onnx.helper.make_opsetid(_PLUGIN_DOMAIN, 1))
    _give_detections(surgery, (first, *(f"{first}:{index}" for index in (1, 2, 3))), slots=config.max_detections)


def _give_detections(surgery: _Surgery, found: Sequence[str], *, slots: int | None) -> None:
    import onnx

    kinds = (onnx.TensorProto.INT32, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32)
    shapes: tuple[tuple[int | None, ...], ...] = ((1,), (slots, 4), (slots,), (slots,))
    for name, value, kind, shape in zip(NMS_OUTPUTS, found, kinds, shapes, strict=True):
        surgery.give(name, value, kind, (surgery.batch, *shape))


def _above(threshold: float) -> float:
    """The least float32 above a threshold, which `>=` takes as the host takes `>` of the threshold itself."""
    return max(float(np.nextafter(np.float32(threshold), np.float32(2))), _LEAST_NORMAL)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _outputs_of(model: Any) -> tuple[dict[str, tuple[int | str | None, ...]], dict[str, int]]:
    """Shape and element type of each output, by inference where the graph leaves a size open."""
    import onnx

    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001 - inference is a courtesy: what stays unknown is refused where it is needed
        typed = model
    shapes: dict[str, tuple[int | str | None, ...]] = {}
    types: dict[str, int] = {}
    for value in typed.graph.output:
        kind = value.type.tensor_type
        shapes[value.name] = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim
        )
        types[value.name] = kind.elem_type
    return shapes, types
