"""The table `[postprocess]`: what a detector's outputs mean, and how detections are made of them.

Nothing of it is guessed from the values: the format of the boxes, whether they are pixels or fractions, and which
activation is still to be applied are declared, or fixed by the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from gate.errors import SpecError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
Coordinates = Literal["pixels", "normalized"]
Activation = Literal["none", "sigmoid", "softmax"]
Head = Literal["yolo_grid", "yolo", "detr", "boxes", "function"]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]

_DEFAULTS: dict[str, tuple[BoxFormat, Coordinates, Activation]] = {
    "yolo_grid": ("cxcywh", "pixels", "sigmoid"),
    "yolo": ("cxcywh", "pixels", "none"),
    "detr": ("cxcywh", "normalized", "softmax"),
}
"""What a head has where the spec does not say otherwise; `boxes` has no convention of its own."""


class Postprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a detector's outputs mean, and how detections are made of them.

    Args:
        head: `yolo_grid`: maps [n, A*(5+C), H, W] or [n, A, H, W, 5+C] with anchors, decoded as YOLOv5 does;
            `yolo`: one output [n, 4+C, N], boxes decoded, as YOLOv8 has it; `detr`: `logits` [n, Q, C] and `boxes`
            [n, Q, 4]; `boxes`: `boxes` [n, N, 4] with `scores` [n, N, C], or with `scores` [n, N] and `labels` [n, N].
        function: For the head `function`: `module:function` of the project, called as `function(outputs, images, state)`; it
            gives a `gate.Detections` for each image, with masks or keypoints, or a `gate.TrackedFrame`.
        outputs: Names of the maps in the order of `strides`, or the name of the one output of `yolo`.
        boxes, scores, labels, logits: Names of the outputs of the other heads.
        category_ids: The category id of each class, in the order of the classes, background left out.
        format: Of the boxes: corners, corner and size, or centre and size.
        coordinates: Pixels of the model's input, or fractions of its width and height.
        activation: What is still to be applied to the scores.
        background_class: Whether a class stands for no object: the first or the last; left out: the last for softmax.
        labels_per_box: Whether a box is a candidate for its best class alone, or for every class above the threshold;
            left out: `best` for softmax, `all` otherwise. Class-agnostic suppression takes the best.
        anchors: Per map the width and height of each anchor, in input pixels.
        strides: Per map the input pixels of a cell.
        nms: Suppress overlapping boxes; a DETR needs none.
        class_agnostic: Boxes suppress those of other classes too.
        score_threshold: A candidate's score must be above it. The default is low, since mean average precision counts
            weak detections too. Source: YOLOv5, val.py, conf_thres.
        iou_threshold: A box whose IoU with a better one is above it is dropped. Source: YOLOv5, val.py, iou_thres.
        max_detections: The best of an image that are kept; COCO counts 100.
    """

    head: Head
    category_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    function: str | None = None
    outputs: tuple[str, ...] = ()
    boxes: str | None = None
    scores: str | None = None
    labels: str | None = None
    logits: str | None = None
    format: BoxFormat | None = None
    coordinates: Coordinates | None = None
    activation: Activation | None = None
    background_class: Literal["first", "last", "none"] | None = None
    labels_per_box: Literal["best", "all"] | None = None
    anchors: tuple[tuple[tuple[_Positive, _Positive], ...], ...] = ()
    strides: tuple[_PositiveInt, ...] = ()
    nms: bool = True
    class_agnostic: bool = False
    score_threshold: _Fraction = 0.001
    iou_threshold: _Fraction = 0.6
    max_detections: _PositiveInt = 100

    def resolved(self) -> Postprocess:
        """The same with the head's defaults filled in."""
        box_format, coordinates, activation = _DEFAULTS.get(self.head, (self.format, self.coordinates, self.activation))
        activation = self.activation or activation
        softmax = activation == "softmax"
        best = softmax or self.class_agnostic
        return msgspec.structs.replace(
            self,
            format=self.format or box_format,
            coordinates=self.coordinates or coordinates,
            activation=activation,
            background_class=self.background_class or ("last" if softmax else "none"),
            labels_per_box=self.labels_per_box or ("best" if best else "all"),
        )

    @property
    def classes(self) -> int:
        """How many classes there are, background left out."""
        return len(self.category_ids)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs that it reads, in the head's order."""
        if self.head in ("yolo_grid", "yolo"):
            return self.outputs
        second = self.logits if self.head == "detr" else self.scores
        return tuple(name for name in (self.boxes, second, self.labels) if name is not None)


class Tiling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How large images are cut into tiles, each of which then goes through the model like an image of its own.

    Args:
        size: Of a tile, pixels of the image before preprocessing; an image smaller than that is one tile.
        overlap: Of neighbouring tiles at least, as a fraction of `size`. An object that is larger than it may be in no tile
            as a whole.
        full_image: Put what is found in the whole image beside what is found in its tiles: large objects.
    """

    size: Annotated[int, msgspec.Meta(ge=16)]
    overlap: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.2
    full_image: bool = False


@dataclass(frozen=True)
class Problem:
    """A key of `[postprocess]` that is wrong, and how."""

    key: str
    message: str


def problems(config: Postprocess) -> Iterator[Problem]:
    """Everything in which the table contradicts itself or leaves something to be guessed."""
    if config.head == "function":
        if config.function is None:
            yield Problem("function", 'must name what head = "function" calls, as "module:function"')
        for key in ("category_ids", "outputs", "boxes", "scores", "labels", "logits", "anchors", "strides"):
            if getattr(config, key):
                yield Problem(key, 'is not for head = "function", which does all of it')
        return
    if config.function is not None:
        yield Problem("function", f'is for head = "function", not "{config.head}"')
    if not config.category_ids:
        yield Problem("category_ids", "needs the category id of each class, in the order of the classes")
    elif len(set(config.category_ids)) != len(config.category_ids):
        yield Problem("category_ids", "names a category twice")
    yield from _name_problems(config)
    if config.head == "boxes":
        for key in ("format", "coordinates", "activation"):
            if getattr(config, key) is None:
                yield Problem(key, 'must be declared for head = "boxes", which has no convention of its own')
    if config.head == "yolo_grid":
        yield from _grid_problems(config)
    else:
        for key in ("anchors", "strides"):
            if getattr(config, key):
                yield Problem(key, f'is for head = "yolo_grid"; "{config.head}" does not use it')
    if config.head in ("yolo_grid", "yolo") and config.background_class in ("first", "last"):
        yield Problem("background_class", f'is none for head = "{config.head}", which has no such class')
    if config.class_agnostic and config.labels_per_box == "all":
        yield Problem("labels_per_box", "is best where class_agnostic is true: one box, one class")
    if config.class_agnostic and not config.nms:
        yield Problem("class_agnostic", "needs nms = true")


def _name_problems(config: Postprocess) -> Iterator[Problem]:
    head = config.head
    needed = {"detr": ("boxes", "logits"), "boxes": ("boxes", "scores")}.get(head, ("outputs",))
    optional = ("labels",) if head == "boxes" else ()
    for key in ("outputs", "boxes", "scores", "labels", "logits"):
        given = getattr(config, key)
        if key in needed and not given:
            yield Problem(key, f'must name what head = "{head}" reads')
        elif given and key not in (*needed, *optional):
            yield Problem(key, f'is not for head = "{head}", which reads {", ".join(needed)}')
    if head == "yolo" and len(config.outputs) > 1:
        yield Problem("outputs", f'is one name for head = "yolo", got {len(config.outputs)}')
    names = config.output_names
    if len(set(names)) != len(names):
        yield Problem("outputs" if config.outputs else "boxes", "an output is named twice")
    if config.labels is not None and config.activation == "softmax":
        yield Problem("activation", "softmax needs a score for each class, and with labels there is one for each box")


def _grid_problems(config: Postprocess) -> Iterator[Problem]:
    maps = len(config.outputs)
    if len(config.strides) != maps:
        yield Problem("strides", f"needs one number for each of the {maps} outputs, got {len(config.strides)}")
    if len(config.anchors) != maps:
        yield Problem("anchors", f"needs one list for each of the {maps} outputs, got {len(config.anchors)}")
    elif not all(config.anchors):
        yield Problem("anchors", "each output needs an anchor at least")
    if config.activation == "softmax":
        yield Problem("activation", 'is sigmoid or none for head = "yolo_grid"')
    if config.coordinates == "normalized":
        yield Problem("coordinates", 'is pixels for head = "yolo_grid": strides and anchors are')
    if config.format not in (None, "cxcywh"):
        yield Problem("format", 'is cxcywh for head = "yolo_grid"')


def require_consistent(config: Postprocess) -> Postprocess:
    """The table with its defaults filled in.

    Raises:
        SpecError: It contradicts itself, or leaves something to be guessed; all of it is named.
    """
    if found := list(problems(config)):
        raise SpecError(
            "; ".join(f"[postprocess] {each.key} {each.message}" for each in found),
            hint="What the outputs mean is declared, never guessed.",
        )
    return config.resolved()
