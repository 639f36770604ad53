"""Canvases of handwritten digits, and for each pixel which digit's ink it is.

The canvases are those of the digit-detector example, smaller, and of another seed.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

from gate import Samples

CANVASES = Path(__file__).parents[1] / "digit-detector" / "canvases.py"
SEED = 2
SIDE = 96
SIDES = (72, SIDE)
HEIGHTS = (28, 56)
SIZES = {"train": 1500, "calibration": 128, "evaluation": 256}
CLASSES = (*map(str, range(10)), "background")
IGNORED = 255
"""In a label map: not of the canvas, and not scored."""

_PADDING = 114


def labelled(split: str, first: int, last: int, *, seed: int = SEED) -> Samples:
    """Canvases `first` up to, not including, `last` of a split, each in the upper left corner of grey."""
    canvas = _canvases().canvas
    images = np.full((last - first, 3, SIDE, SIDE), _PADDING, np.uint8)
    targets = []
    for index in range(first, last):
        drawn = canvas(split, index, seed=seed, sides=SIDES, heights=HEIGHTS)
        height, width = drawn.label_map.shape
        images[index - first, :, :height, :width] = drawn.pixels.transpose(2, 0, 1)
        label_map = np.full((SIDE, SIDE), IGNORED, np.int64)
        label_map[:height, :width] = drawn.label_map
        targets.append(label_map)
    return Samples({"images": images / np.float32(255)}, targets=targets)


def evaluation() -> Samples:
    """What reference and engines are compared on: 256 canvases of digits that the model has never seen."""
    return labelled("evaluation", 0, SIZES["evaluation"])


def calibration() -> Samples:
    """What INT8 ranges are measured on: 128 canvases of digits that are neither trained nor evaluated on."""
    return labelled("calibration", 0, SIZES["calibration"])


def _canvases() -> ModuleType:
    """The other example's module, which is in no package."""
    name = "digit_detector_canvases"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, CANVASES)
        if spec is None or spec.loader is None:
            raise ImportError(f"there is no {CANVASES}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
