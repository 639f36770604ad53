"""Pictures of a comparison as PNG files: boxes of reference and candidate, precision over recall, a confusion matrix.

Drawn by matplotlib without its pyplot, so that nothing global changes and no window is needed. What tells two things apart
is never colour alone. The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gate import atomic
from gate.errors import BackendUnavailable, MeasurementError
from gate.targets import Detections, ImageTarget

REFERENCE_COLOUR = "#0072b2"
CANDIDATE_COLOUR = "#d55e00"
TRUTH_COLOUR = "#f0e442"

_HALO_COLOUR = "#ffffff"
_DOTTED, _DASHED = (0, (1, 1)), (0, (4, 2))

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_DPI = 100
_SMALLEST_SIDE_PX = 640
_LARGEST_SIDE_PX = 1600
_LEAST_WIDTH_PX = 560
_HEAD_PX, _FOOT_PX, _MARGIN_PX = 36, 44, 12
_LABEL_PX = 15
_LEGEND_LETTER_PX, _LEGEND_HANDLE_PX = 8, 70
_MOST_HATCHED = 8
"""With more boxes that have no counterpart hatching would hide the image."""
_MOST_STACKED = 5
"""Labels of boxes on one spot, one above the other; those of more are left out."""
_NUMBERED_CLASSES = 24
"""With more classes the counts do not fit their cells, and the colours alone are shown."""

_Place = tuple[float, float, float, float]


def draw_detections(
    path: Path,
    image: npt.NDArray[np.uint8],
    *,
    reference: Detections,
    candidate: Detections,
    target: ImageTarget | None = None,
    names: Mapping[int, str] | None = None,
    least_score: float = 0.25,
    reference_alone: Collection[int] = (),
    candidate_alone: Collection[int] = (),
) -> None:
    """Write an image with the boxes of reference (solid) and candidate (dashed), and the ground truth (dotted).

    Args:
        path: Of the PNG.
        image: uint8 [H, W], grey, or [H, W, 3], RGB: as it was before preprocessing.
        reference: What the reference found, in pixels of the image.
        candidate: What the candidate found, likewise.
        target: The ground truth, where there is one; crowds are left out.
        names: Of the categories by id; where left out, or without an id, the id is written.
        least_score: Detections below it are not drawn; the picture says how many those are.
        reference_alone: Which of the reference's detections have no counterpart, by their places: these are hatched,
            unless there are many.
        candidate_alone: Which of the candidate's, likewise.

    Raises:
        MeasurementError: The image is empty, not uint8 or not of the size that `target` says, or detections are malformed.
        BackendUnavailable: matplotlib is not installed.
        GateError: The disk is full or may not be written to.
    """
    _require_image(image, target, path)
    for who, found in (("reference", reference), ("candidate", candidate)):
        _require_detections(found, who, path)
    figure_class = _figure_class()
    from matplotlib.lines import Line2D

    height, width = image.shape[:2]
    scale = _scale_of(max(height, width))
    shown_width, shown_height = math.ceil(width * scale), math.ceil(height * scale)
    who_found = (("reference", reference, reference_alone), ("candidate", candidate, candidate_alone))
    told = [_legend_text(*each, least_score) for each in who_found]
    legend_width = sum(_LEGEND_LETTER_PX * len(each) + _LEGEND_HANDLE_PX for each in ("ground truth: 00", *told))
    full_width = max(shown_width + 2 * _MARGIN_PX, _LEAST_WIDTH_PX, legend_width)
    full_height = shown_height + _HEAD_PX + _FOOT_PX
    figure = figure_class(figsize=(full_width / _DPI, full_height / _DPI), dpi=_DPI)
    axes = figure.add_axes(
        (
            (full_width - shown_width) / 2 / full_width,
            _FOOT_PX / full_height,
            shown_width / full_width,
            shown_height / full_height,
        )
    )
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=(0, width, height, 0))
    axes.set_axis_off()
    handles = []
    if target is not None:
        truth = [each for each in target.annotations if not each.get("iscrowd")]
        for each in truth:
            x, y, box_width, box_height = (float(value) for value in each["bbox"])
            _draw_box(axes, (x, y, x + box_width, y + box_height), TRUTH_COLOUR, _DOTTED, line_width=4.0)
        handles.append(Line2D([], [], color=TRUTH_COLOUR, linestyle=_DOTTED, lw=4, label=f"ground truth: {len(truth)}"))
    looks: tuple[tuple[Detections, Collection[int], str, str, Any, bool], ...] = (
        (reference, reference_alone, told[0], REFERENCE_COLOUR, "solid", True),
        (candidate, candidate_alone, told[1], CANDIDATE_COLOUR, _DASHED, False),
    )
    taken: list[_Place] = []
    for found, alone, text_of_all, colour, style, is_above in looks:
        drawn = np.flatnonzero(found.scores >= least_score)
        for index in drawn[::-1]:  # the best last, on top
            box = tuple(found.boxes[index].tolist())
            _draw_box(axes, box, colour, style, line_width=1.8)
            if index in alone and len(alone) <= _MOST_HATCHED:
                _hatch_box(axes, box, colour)
        for index in sorted(drawn.tolist(), key=lambda index: (index not in alone, index)):
            box = tuple(found.boxes[index].tolist())
            label = int(found.labels[index])
            text = f"{(names or {}).get(label, str(label))} {found.scores[index]:.2f}"
            place = _label_place(text, box, taken, pixel=1 / scale, size=(width, height), is_above=is_above)
            if place is not None:
                _draw_label(axes, text, place, colour, is_above=is_above)
        handles.append(Line2D([], [], color=colour, linestyle=style, lw=2, label=text_of_all))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    if target is not None:
        record = target.image
        title = f"image {record.image_id}" + (f", {record.file_name}" if record.file_name else "")
        figure.text(0.5, 1 - _HEAD_PX / 2 / full_height, title, ha="center", va="center", fontsize=10, parse_math=False)
    legend = figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=9, handlelength=3)
    legend.get_frame().set_facecolor("#8c8c8c")  # on which the yellow of the ground truth is seen, as the others are
    legend.get_frame().set_alpha(0.35)
    _save(figure, path)


def draw_precision_recall(
    path: Path, curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]], *, title: str = ""
) -> None:
    """Write curves of precision over recall, each of its own colour and style.

    Args:
        path: Of the PNG.
        curves: By label recall and precision, float64 [n] each, 0 to 1.
        title: Over the picture.

    Raises:
        MeasurementError: There is no curve, or one is empty, not finite, outside 0 to 1, or of two lengths.
        BackendUnavailable: matplotlib is not installed.
        GateError: The disk is full or may not be written to.
    """
    if not curves:
        raise MeasurementError("there is no curve of precision over recall to draw", where=str(path))
    for label, (recall, precision) in curves.items():
        for what, values in (("recall", recall), ("precision", precision)):
            _require_fractions(values, f"{what} of {label!r}", path)
        if len(recall) != len(precision):
            raise MeasurementError(
                f"the curve {label!r} has {len(recall)} values of recall and {len(precision)} of precision",
                where=str(path),
            )
    figure = _figure_class()(figsize=(8.4, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for index, (label, (recall, precision)) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        # Style and colour change together, and no pair comes again before all 28 were used.
        style = _STYLES[(index + index // (len(_COLOURS) * len(_STYLES))) % len(_STYLES)]
        axes.plot(recall, precision, color=colour, linestyle=style, linewidth=1.8, label=_plain(label))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(_plain(title), fontsize=11)
    figure.legend(loc="outside right upper", fontsize=9, handlelength=3.5, frameon=False)
    _save(figure, path)


def draw_confusion(path: Path, matrix: npt.NDArray[np.integer[Any]], names: Sequence[str]) -> None:
    """Write a confusion matrix: a cell's colour is its share of its row, its number the count.

    Args:
        path: Of the PNG.
        matrix: int [C, C], rows by target, columns by prediction.
        names: Of the C classes.

    Raises:
        MeasurementError: It is not square, empty, without a count, has negative ones, or names are of another number.
        BackendUnavailable: matplotlib is not installed.
        GateError: The disk is full or may not be written to.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "iu":
        raise MeasurementError(
            f"a confusion matrix must be integers [C, C], got {matrix.dtype} {list(matrix.shape)}", where=str(path)
        )
    if len(names) != len(matrix):
        raise MeasurementError(f"a confusion matrix of {len(matrix)} classes has {len(names)} names", where=str(path))
    if matrix.size == 0 or matrix.min() < 0 or matrix.max() == 0:
        raise MeasurementError("a confusion matrix must hold counts, and at least one", where=str(path))
    counts = matrix.astype(np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(0.55 * len(names), 4.0), 13.0)
    figure = _figure_class()(figsize=(side + 2.2, side + 1.2), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the target's row", shrink=0.85)
    is_numbered = len(names) <= _NUMBERED_CLASSES
    if is_numbered:
        for row, column in np.argwhere(matrix > 0).tolist():
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = _count_text(int(matrix[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    steps = range(0, len(names), max(1, math.ceil(len(names) / 40)))
    labels = [_shortened(_plain(names[index])) for index in steps]
    is_long = max(map(len, labels)) > 3
    axes.set_xticks(list(steps), labels, rotation=90 if is_long else 0, fontsize=8)
    axes.set_yticks(list(steps), labels, fontsize=8)
    axes.set_xlabel("prediction")
    axes.set_ylabel("target")
    _save(figure, path)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise BackendUnavailable(
            f"pictures need matplotlib, which cannot be imported: {err}", hint="pip install matplotlib"
        ) from err
    return Figure


def _save(figure: Any, path: Path) -> None:
    """Through Agg, which a figure made without pyplot uses for PNG files."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks is drawn as boxes
        # Without the version, so that equal pictures are equal bytes.
        figure.savefig(data, format="png", dpi=_DPI, metadata={"Software": None})
    atomic.write_bytes(path, data.getvalue())


def _draw_box(axes: Any, box: Sequence[float], colour: str, style: Any, *, line_width: float) -> None:
    """A rectangle on a pale line that is a little wider, so that it is seen on any background."""
    from matplotlib.patches import Rectangle

    place = (box[0], box[1])
    size = (box[2] - box[0], box[3] - box[1])
    # All pale lines lie below all others: where two boxes are the same, one shows through the gaps of the other.
    lines = ((_HALO_COLOUR, "solid", line_width + 1.5, 0.55, 2), (colour, style, line_width, 1.0, 3))
    for edge, look, wide, alpha, order in lines:
        axes.add_patch(
            Rectangle(
                place,
                *size,
                fill=False,
                edgecolor=edge,
                linestyle=look,
                linewidth=wide,
                alpha=alpha,
                zorder=order,
                antialiased=False,
            )
        )


def _legend_text(who: str, found: Detections, alone: Collection[int], least_score: float) -> str:
    drawn = np.flatnonzero(found.scores >= least_score).tolist()
    lone = sum(index in alone for index in drawn)
    left_out = len(found.scores) - len(drawn)
    return (
        f"{who}: {len(drawn)}"
        + (f", {lone} alone{' (hatched)' if len(alone) <= _MOST_HATCHED else ''}" if lone else "")
        + (f", {left_out} below {least_score:g}" if left_out else "")
    )


def _hatch_box(axes: Any, box: Sequence[float], colour: str) -> None:
    """Lines across a box, so that it is found among others; the image is seen between them."""
    from matplotlib.patches import Rectangle

    size = (box[2] - box[0], box[3] - box[1])
    axes.add_patch(
        Rectangle((box[0], box[1]), *size, fill=False, edgecolor=colour, hatch="//", linewidth=0, alpha=0.8, zorder=3)
    )


def _label_place(
    text: str,
    box: Sequence[float],
    taken: list[_Place],
    *,
    pixel: float,
    size: tuple[int, int],
    is_above: bool,
) -> tuple[float, float] | None:
    """Where a label goes: outside the box, above or below, or inside where the image ends there.

    A place that is taken is left to the label that has it, and the next further out is looked at; None where the first few
    are all taken.

    Args:
        text: Of the label.
        box: xyxy, in pixels of the image.
        taken: Left, top, right and bottom of the labels so far; the place found is added.
        pixel: One pixel of the screen, in pixels of the image.
        size: Width and height of the image.
        is_above: Whether its lower edge is at the place, or its upper one.
    """
    wide, high = 7 * len(text) * pixel, _LABEL_PX * pixel
    x = min(max(box[0], 0.0), max(size[0] - wide, 0.0))
    y = box[1] - 3 * pixel if is_above else box[3] + 3 * pixel
    goes_up = is_above
    if is_above and y < high:
        y, goes_up = max(box[1], 0.0) + high + 3 * pixel, False
    if not is_above and y > size[1] - high:
        y, goes_up = min(box[3], float(size[1])) - high - 3 * pixel, True
    top = y - high if is_above else y
    for _ in range(_MOST_STACKED):
        place = (x, top, x + wide, top + high)
        if place[1] < 0 or place[3] > size[1]:
            return None
        in_the_way = [other for other in taken if _meet(place, other)]
        if not in_the_way:
            taken.append(place)
            return x, top + high if is_above else top
        top = min(other[1] for other in in_the_way) - high if goes_up else max(other[3] for other in in_the_way)
    return None


def _meet(first: _Place, second: _Place) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _draw_label(axes: Any, text: str, place: tuple[float, float], colour: str, *, is_above: bool) -> None:
    axes.text(
        *place,
        text,
        fontsize=8,
        color="white",
        va="bottom" if is_above else "top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
        clip_on=True,
        zorder=4,
        parse_math=False,
    )


def _scale_of(side: int) -> float:
    """Screen pixels per image pixel: whole numbers for small images, so that each pixel is a square."""
    if side < _SMALLEST_SIDE_PX:
        return float(math.ceil(_SMALLEST_SIDE_PX / side))
    return min(1.0, _LARGEST_SIDE_PX / side)


def _require_image(image: npt.NDArray[np.uint8], target: ImageTarget | None, path: Path) -> None:
    is_image = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
    if not is_image or image.size == 0:
        raise MeasurementError(
            f"an image must be uint8 [H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}", where=str(path)
        )
    if target is not None and image.shape[:2] != (target.image.height, target.image.width):
        raise MeasurementError(
            f"the image is {image.shape[1]} x {image.shape[0]}, its ground truth says "
            f"{target.image.width} x {target.image.height}",
            where=str(path),
            hint="Boxes are in pixels of the image before preprocessing: draw them on that one.",
        )


def _require_detections(found: Detections, who: str, path: Path) -> None:
    count = len(found.scores)
    if found.boxes.shape != (count, 4) or found.scores.shape != (count,) or found.labels.shape != (count,):
        raise MeasurementError(
            f"the {who} has boxes {list(found.boxes.shape)}, scores {list(found.scores.shape)} and labels "
            f"{list(found.labels.shape)}; expected [n, 4], [n] and [n]",
            where=str(path),
        )
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise MeasurementError(f"the {who} has boxes or scores that are not finite", where=str(path))


def _require_fractions(values: npt.NDArray[np.float64], what: str, path: Path) -> None:
    if values.ndim != 1 or values.size == 0:
        raise MeasurementError(f"{what} must be numbers [n], got {list(values.shape)}", where=str(path))
    if not ((values >= 0) & (values <= 1)).all():
        raise MeasurementError(f"{what} must be from 0 to 1", where=str(path))


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula, and no leading underscore, which hides a label."""
    return text.replace("$", r"\$").lstrip("_") or "-"


def _shortened(text: str, limit: int = 24) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _count_text(count: int) -> str:
    """At most five characters: 9999, 12k, 3.4M."""
    if count < 10_000:
        return str(count)
    if count < 1_000_000:
        return f"{count // 1000}k"
    return f"{count / 1_000_000:.1f}M" if count < 100_000_000 else f"{count // 1_000_000}M"
