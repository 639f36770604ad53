"""What a spec says of images: where they are, and how each becomes the model's input. Pure: nothing is opened here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

_PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
_CropFraction = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an image becomes the model's input; `[preprocess]` of the spec.

    In this order: channels, resize, placement, then `(value * scale - mean) / std` in float32.

    Args:
        resize: `letterbox`: as large as fits with its proportions kept, the rest padded on both sides alike, an odd pixel
            right or below. `stretch`: to `size`, proportions not kept. `center_crop`: the short side is resized, the
            centre is cropped. `none`: as it is.
        size: Height and width of the input in pixels; with `none` it may be left out, or says what every image must have.
        pad: Grey value around a letterboxed image, before `scale`.
        channels: Their order; `gray` is one channel, ITU-R 601 luma.
        scale: Multiplied first; 1/255 by default.
        mean: Subtracted after `scale`, per channel or one for all; left out: nothing.
        std: Divided by after that, likewise.
        layout: `nchw` gives [C, H, W], `nhwc` [H, W, C].
        interpolation: As Pillow resizes; all but `nearest` are antialiased where the image shrinks.
        enlarge: Whether letterbox may enlarge an image that is smaller than `size`.
        crop_fraction: With `center_crop` the crop's share of the resized image: 0.875 resizes to 256 for a crop of 224.
    """

    resize: Literal["letterbox", "stretch", "center_crop", "none"] = "letterbox"
    size: tuple[_PositiveInt, _PositiveInt] | None = None
    pad: _Byte = 114
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 0.00392156862745098
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Literal["nchw", "nhwc"] = "nchw"
    interpolation: Literal["bilinear", "nearest", "bicubic", "area"] = "bilinear"
    enlarge: bool = True
    crop_fraction: _CropFraction = 1.0

    def __post_init__(self) -> None:
        """Hold the keys against each other; msgspec makes a `ValidationError` with the path of a `ValueError`."""
        if self.size is None and self.resize != "none":
            raise ValueError(f'resize = "{self.resize}" needs size = [height, width]')
        if self.crop_fraction != 1.0 and self.resize != "center_crop":
            raise ValueError(f'crop_fraction is for resize = "center_crop", not "{self.resize}"')
        if not math.isfinite(self.scale) or self.scale == 0.0:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {0, 1, self.channel_count}:
                raise ValueError(
                    f"{name} has {len(values)} values, expected one or {self.channel_count} for {self.channels}"
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be finite, got {list(values)}")
        if any(value <= 0.0 for value in self.std):
            raise ValueError(f"std must be above 0, got {list(self.std)}")

    @property
    def channel_count(self) -> int:
        """1 for gray, else 3."""
        return 1 if self.channels == "gray" else 3


class ImagesSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where images and their ground truth are; `[data.images]` of the spec. Paths are below the spec's folder.

    Args:
        kind: `coco`: a folder of images and an instances json. `folder`: a folder for each class. `csv`: a table with the
            columns path and label.
        path: Of the images; for `csv` of the table, whose paths are below its folder.
        annotations: Of `coco`: the json.
        classes: Of `folder` and `csv`: class names in the order of the model's outputs. Left out, they are the names found,
            sorted: a class without a single image then shifts those after it.
        image_ids: Of `coco`: use these images alone.
        workers: Processes that decode; 0 decodes where the samples are asked for; left out: one a core, at most 8, and none
            for few images.
    """

    kind: Literal["coco", "folder", "csv"]
    path: str
    annotations: str | None = None
    classes: tuple[str, ...] = ()
    image_ids: tuple[int, ...] = ()
    workers: _Count | None = None

    def __post_init__(self) -> None:
        """Hold the keys against each other; msgspec makes a `ValidationError` with the path of a `ValueError`."""
        if self.kind == "coco" and self.annotations is None:
            raise ValueError('kind = "coco" needs annotations, the path of the json')
        if self.kind != "coco" and (self.annotations is not None or self.image_ids):
            raise ValueError(f'annotations and image_ids are for kind = "coco", not "{self.kind}"')
        if self.kind == "coco" and self.classes:
            raise ValueError('classes is not for kind = "coco": the json names its categories')
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes names a class twice")
