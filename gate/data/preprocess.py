"""An image becomes the model's input, and boxes find their way back: functions of arrays, Pillow for resizing alone.

Resizing is Pillow's: `bilinear` and `bicubic` widen their filter where the image shrinks (antialiasing), and `area` is its box
filter. OpenCV's `INTER_LINEAR` and PyTorch's `interpolate` do not unless asked to: a model that was trained on theirs is
judged on slightly other pixels here, reference and engine alike.

Source: Pillow, "Concepts: Filters"; Ultralytics `LetterBox` for the rounding of a letterbox; torchvision
`Resize` and `CenterCrop` for that of a crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gate.data.image_spec import Preprocess
from gate.errors import DataError
from gate.targets import Floats, ImageRecord

Pixels = npt.NDArray[np.uint8]
FILTERS = {"bilinear": "BILINEAR", "nearest": "NEAREST", "bicubic": "BICUBIC", "area": "BOX"}
"""Pillow's name of each interpolation."""


@dataclass(frozen=True)
class Geometry:
    """Where an image lies in the model's input, all in whole pixels.

    Args:
        resized: Height and width that the image is resized to.
        top, left: Of the resized image in the input; negative where it is cropped.
        size: Height and width of the input.
    """

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]


def geometry(config: Preprocess, width: int, height: int, *, file_name: str = "") -> Geometry:
    """Where an image of this size comes to lie.

    Raises:
        DataError: It has no pixels, or `resize = "none"` and it has another size than the spec says.
    """
    if width < 1 or height < 1:
        raise DataError(f"an image of {width} x {height} pixels holds nothing", where=file_name or None)
    if config.size is None:
        return Geometry((height, width), 0, 0, (height, width))
    rows, columns = config.size
    if config.resize == "none" and config.size != (height, width):
        raise DataError(
            f"is {width} x {height} pixels, [preprocess] says size = {list(config.size)} and does not resize",
            where=file_name or None,
            hint='Resize it: resize = "letterbox" or "stretch".',
        )
    if config.resize in {"none", "stretch"}:
        return Geometry(config.size, 0, 0, config.size)
    if config.resize == "letterbox":
        ratio = min(rows / height, columns / width)
        if not config.enlarge:
            ratio = min(ratio, 1.0)
        resized = (min(rows, max(1, round(height * ratio))), min(columns, max(1, round(width * ratio))))
        return Geometry(resized, (rows - resized[0]) // 2, (columns - resized[1]) // 2, config.size)
    covered = (int(rows / config.crop_fraction), int(columns / config.crop_fraction))
    if covered[0] * width >= covered[1] * height:
        resized = (covered[0], max(columns, covered[0] * width // height))
    else:
        resized = (max(rows, covered[1] * height // width), covered[1])
    top, left = round((resized[0] - rows) / 2.0), round((resized[1] - columns) / 2.0)
    return Geometry(resized, -top, -left, config.size)


def image_record(config: Preprocess, width: int, height: int, *, image_id: int, file_name: str = "") -> ImageRecord:
    """How an image of this size becomes the input: known before a pixel of it is.

    Raises:
        DataError: As `geometry`.
    """
    found = geometry(config, width, height, file_name=file_name)
    return ImageRecord(
        image_id=image_id,
        width=width,
        height=height,
        scale_x=found.resized[1] / width,
        scale_y=found.resized[0] / height,
        left=float(found.left),
        top=float(found.top),
        file_name=file_name,
    )


def input_shape(config: Preprocess, width: int, height: int, *, file_name: str = "") -> tuple[int, int, int]:
    """Shape of the input that an image of this size becomes, without the batch axis.

    Raises:
        DataError: As `geometry`.
    """
    rows, columns = geometry(config, width, height, file_name=file_name).size
    count = config.channel_count
    return (count, rows, columns) if config.layout == "nchw" else (rows, columns, count)


def preprocessed(
    image: Pixels, config: Preprocess, *, image_id: int, file_name: str = ""
) -> tuple[npt.NDArray[np.float32], ImageRecord]:
    """The model's input and how it came about.

    Args:
        image: uint8 [H, W] gray, or [H, W, 3] RGB.
        config: What to do.
        image_id: For the record.
        file_name: For the record and errors.

    Returns:
        float32 [C, H, W] or [H, W, C], and the record.

    Raises:
        DataError: It is no such array, or its size does not fit; or Pillow is needed and not installed.
    """
    _require_pixels(image, file_name)
    height, width = image.shape[:2]
    values = np.empty(input_shape(config, width, height, file_name=file_name), np.float32)
    preprocess_into(values, image, config, file_name=file_name)
    return values, image_record(config, width, height, image_id=image_id, file_name=file_name)


def preprocess_into(out: npt.NDArray[np.float32], image: Pixels, config: Preprocess, *, file_name: str = "") -> None:
    """As `preprocessed`, into an array that is there: float32 of `input_shape`.

    Raises:
        DataError: As `preprocessed`.
    """
    _require_pixels(image, file_name)
    placed = geometry(config, image.shape[1], image.shape[0], file_name=file_name)
    pixels = _resized(image, config, placed.resized)
    planes = out if config.layout == "nchw" else np.moveaxis(out, -1, 0)
    rows, source_rows = _overlap(placed.top, placed.resized[0], placed.size[0])
    columns, source_columns = _overlap(placed.left, placed.resized[1], placed.size[1])
    is_padded = placed.resized[0] < placed.size[0] or placed.resized[1] < placed.size[1]
    for channel, plane in enumerate(planes):
        mean, std = _of_channel(config.mean, channel, 0.0), _of_channel(config.std, channel, 1.0)
        if is_padded:
            pad = np.full((1, 1), config.pad, np.uint8)
            _normalise(pad, config.scale, mean, std, filled := np.empty((1, 1), np.float32))
            plane[...] = filled
        source = pixels if pixels.ndim == 2 else pixels[:, :, 2 - channel if config.channels == "bgr" else channel]
        _normalise(source[source_rows, source_columns], config.scale, mean, std, plane[rows, columns])


def _normalise(pixels: Pixels, scale: float, mean: float, std: float, out: npt.NDArray[np.float32]) -> None:
    np.multiply(pixels, np.float32(scale), out=out, dtype=np.float32)
    if mean != 0.0:
        np.subtract(out, np.float32(mean), out=out)
    if std != 1.0:
        np.divide(out, np.float32(std), out=out)


def _of_channel(values: tuple[float, ...], channel: int, default: float) -> float:
    return default if not values else values[0] if len(values) == 1 else values[channel]


def _overlap(first: int, length: int, size: int) -> tuple[slice, slice]:
    """What of an axis of the input is image, and what of the image that is."""
    start, stop = max(first, 0), min(first + length, size)
    return slice(start, stop), slice(start - first, stop - first)


def _resized(image: Pixels, config: Preprocess, size: tuple[int, int]) -> Pixels:
    is_gray = config.channels == "gray"
    if image.shape[:2] == size and is_gray == (image.ndim == 2):
        return image
    if image.shape[:2] == size and not is_gray:
        return np.broadcast_to(image[:, :, None], (*size, 3))
    pillow = pillow_image()
    made = pillow.fromarray(np.ascontiguousarray(image))
    if is_gray and image.ndim == 3:
        made = made.convert("L")
    if image.shape[:2] != size:
        made = made.resize((size[1], size[0]), pillow.Resampling[FILTERS[config.interpolation]])
    return np.asarray(made, dtype=np.uint8)


def _require_pixels(image: Pixels, file_name: str) -> None:
    shape = image.shape
    if image.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
        raise DataError(
            f"an image must be uint8 [H, W] or [H, W, 3], got {image.dtype} {list(shape)}", where=file_name or None
        )


def pillow_image() -> Any:
    """Pillow's `Image` module.

    Raises:
        DataError: It is not installed.
    """
    try:
        from PIL import Image
    except ImportError as err:
        raise DataError("images need Pillow, which is not installed", hint='pip install "trt-gate[images]"') from err
    return Image


def boxes_to_image(boxes: npt.NDArray[Any], record: ImageRecord, *, clip: bool = False) -> Floats:
    """Boxes of the model's input, in pixels of the image: `(x_input - left) / scale_x`.

    Args:
        boxes: [n, 4], xyxy, pixels of the input.
        record: How the image became the input.
        clip: Cut off what lies outside the image.

    Returns:
        float64 [n, 4], xyxy, pixels of the image.

    Raises:
        DataError: `boxes` is not [n, 4].
    """
    found = _as_boxes(boxes, record)
    found -= (record.left, record.top, record.left, record.top)
    found /= (record.scale_x, record.scale_y, record.scale_x, record.scale_y)
    return _clipped(found, record.width, record.height) if clip else found


def boxes_to_input(boxes: npt.NDArray[Any], record: ImageRecord, *, clip_to: tuple[int, int] | None = None) -> Floats:
    """Boxes of the image, in pixels of the model's input: `x_image * scale_x + left`.

    Args:
        boxes: [n, 4], xyxy, pixels of the image.
        record: How the image became the input.
        clip_to: Cut off what lies outside an input of this height and width.

    Returns:
        float64 [n, 4], xyxy, pixels of the input.

    Raises:
        DataError: `boxes` is not [n, 4].
    """
    found = _as_boxes(boxes, record)
    found *= (record.scale_x, record.scale_y, record.scale_x, record.scale_y)
    found += (record.left, record.top, record.left, record.top)
    return found if clip_to is None else _clipped(found, clip_to[1], clip_to[0])


def _as_boxes(boxes: npt.NDArray[Any], record: ImageRecord) -> Floats:
    found = np.array(boxes, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] != 4:
        raise DataError(f"boxes must be [n, 4], got {list(found.shape)}", where=record.file_name or None)
    return found


def _clipped(boxes: Floats, width: float, height: float) -> Floats:
    boxes[:, 0::2] = np.clip(boxes[:, 0::2], 0.0, width)
    boxes[:, 1::2] = np.clip(boxes[:, 1::2], 0.0, height)
    return boxes


def described(config: Preprocess) -> dict[str, Any]:
    """What is done to each image, for the record in the bundle: every key, and what the words stand for.

    Raises:
        DataError: Pillow is not installed.
    """
    pillow_image()
    import PIL

    return {
        **msgspec.json.decode(msgspec.json.encode(config)),
        "order": ["exif orientation", "channels", "resize", "place", "* scale", "- mean", "/ std"],
        "resized_by": f"Pillow {PIL.__version__} {FILTERS[config.interpolation]}",
        "antialiased": config.resize != "none" and config.interpolation != "nearest",
        "arithmetic": "float32",
    }
