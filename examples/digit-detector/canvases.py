"""Canvases: real handwritten digits (UCI, as scikit-learn carries them) enlarged, and placed on coloured backgrounds.

Only integers are drawn and only integers computed with, so that every machine makes the same pixels.
scikit-learn is located, not imported: its import costs more time than everything else here.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

SEED = 20
PARTS = {"train": (0, 1100), "calibration": (1100, 1300), "evaluation": (1300, 1797)}
"""Which of the 1,797 shuffled digits each split draws from: no handwriting of one is in another."""

INK = 96
"""A pixel belongs to a digit where at least this much of 255 is ink."""

BACKGROUND = 10
"""In a label map: no digit."""

_PIXEL = 256
"""Positions are whole multiples of 1/256 pixel."""

_ATTEMPTS = 20
_CLEARANCE_PX = 2
_MOST_DIGITS = 6
_ONE_EMPTY_IN = 20


@dataclass(frozen=True)
class Canvas:
    """An image of several digits and what is on it.

    Args:
        pixels: uint8 [height, width, 3], RGB.
        digits: int64 [n], 0 to 9.
        boxes: int64 [n, 4], xywh, pixels: around the ink, nothing more.
        areas: int64 [n], pixels of ink.
        label_map: int64 [height, width], the digit whose ink a pixel is, `BACKGROUND` elsewhere.
    """

    pixels: npt.NDArray[np.uint8]
    digits: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]
    label_map: npt.NDArray[np.int64]


@cache
def handwriting(split: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The digits that a split draws from: images int64 [n, 8, 8], 0 (paper) to 16 (ink), and labels int64 [n].

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the data, is not installed.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'trt-gate[examples]'")
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    # RandomState's stream is frozen across NumPy versions, which that of default_rng is not.
    first, last = PARTS[split]
    table = table[np.random.RandomState(SEED).permutation(len(table))[first:last]]
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def canvas(
    split: str, index: int, *, seed: int, sides: tuple[int, int] = (96, 192), heights: tuple[int, int] = (14, 96)
) -> Canvas:
    """One canvas: the same for the same arguments, whatever was made before it.

    Args:
        split: Of `PARTS`.
        index: Which one.
        seed: Another one gives other canvases.
        sides: Smallest and largest width and height, in pixels.
        heights: Smallest and largest height of a digit, in pixels.
    """
    random = np.random.RandomState([SEED, seed, list(PARTS).index(split), index])
    height, width = (int(each) for each in random.randint(sides[0], sides[1] + 1, 2))
    pixels = _background(random, height, width)
    images, labels = handwriting(split)
    taken: list[tuple[int, int, int, int]] = []
    digits, areas = [], []
    label_map = np.full((height, width), BACKGROUND, np.int64)
    for _ in range(random.randint(1, _MOST_DIGITS + 1) if random.randint(_ONE_EMPTY_IN) else 0):
        chosen = random.randint(len(images))
        ink = _enlarged(images[chosen], random, heights)
        top, left, bottom, right = _extent(ink)
        ink = ink[top:bottom, left:right]
        place = _place(random, ink.shape, (height, width), taken)
        if place is None:
            continue
        rows, columns = slice(place[1], place[1] + place[3]), slice(place[0], place[0] + place[2])
        _write(pixels[rows, columns], ink, random)
        label_map[rows, columns][ink >= INK] = labels[chosen]
        taken.append(place)
        digits.append(labels[chosen])
        areas.append((ink >= INK).sum())
    noise = random.randint(-6, 7, (height, width, 1))
    return Canvas(
        pixels=np.clip(pixels + noise, 0, 255).astype(np.uint8),
        digits=np.array(digits, np.int64),
        boxes=np.array(taken, np.int64).reshape(-1, 4),
        areas=np.array(areas, np.int64),
        label_map=label_map,
    )


def _background(random: np.random.RandomState, height: int, width: int) -> npt.NDArray[np.int64]:
    """A gradient between four corners of like colour, with soft blots: int64 [height, width, 3]."""
    corners = np.clip(random.randint(40, 216, 3) + random.randint(-40, 41, (2, 2, 3)), 0, 255)
    blots = random.randint(-24, 25, (6, 6, 1))
    return _resized(corners, height, width) + _resized(blots, height, width)


def _enlarged(
    image: npt.NDArray[np.int64], random: np.random.RandomState, heights: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """A digit, up to a third narrower or wider than it was written: int64 [height, width], 0 to 255."""
    # Most are small, a few large, as in photographs: the smaller of two draws.
    height = int(random.randint(heights[0], heights[1] + 1, 2).min())
    width = height * int(random.randint(70, 131)) // 100
    return np.clip(_resized(image[..., None], height, width)[..., 0] * 17, 0, 255)


def _extent(ink: npt.NDArray[np.int64]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what counts as ink."""
    rows, columns = np.flatnonzero((ink >= INK).any(1)), np.flatnonzero((ink >= INK).any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _place(
    random: np.random.RandomState,
    size: tuple[int, ...],
    within: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
    """A free place, xywh, for something of a height and width; None where none was found."""
    height, width = size
    if height >= within[0] or width >= within[1]:
        return None
    for _ in range(_ATTEMPTS):
        x, y = int(random.randint(within[1] - width)), int(random.randint(within[0] - height))
        if all(
            x >= other[0] + other[2] + _CLEARANCE_PX
            or other[0] >= x + width + _CLEARANCE_PX
            or y >= other[1] + other[3] + _CLEARANCE_PX
            or other[1] >= y + height + _CLEARANCE_PX
            for other in taken
        ):
            return x, y, width, height
    return None


def _write(pixels: npt.NDArray[np.int64], ink: npt.NDArray[np.int64], random: np.random.RandomState) -> None:
    """Ink of one colour, lighter or darker than what it is written on, over `pixels` in place."""
    around = int(pixels.sum()) // pixels.size
    contrast = int(random.randint(30, 121))
    sign = 1 if around < 100 else -1 if around > 156 else int(random.randint(2)) * 2 - 1
    colour = np.clip(around + sign * contrast + random.randint(-25, 26, 3), 0, 255)
    pixels[:] = (pixels * (255 - ink[..., None]) + colour * ink[..., None]) // 255


def _resized(values: npt.NDArray[np.int64], height: int, width: int) -> npt.NDArray[np.int64]:
    """Bilinear, half-pixel centres, edges held, rounded down: int64 [h, w, c] to int64 [height, width, c]."""
    low, fraction = _positions(values.shape[0], height)
    high = np.minimum(low + 1, values.shape[0] - 1)
    rows = values[low] * (_PIXEL - fraction)[:, None, None] + values[high] * fraction[:, None, None]
    low, fraction = _positions(values.shape[1], width)
    high = np.minimum(low + 1, values.shape[1] - 1)
    both = rows[:, low] * (_PIXEL - fraction)[:, None] + rows[:, high] * fraction[:, None]
    return both // _PIXEL**2


def _positions(size: int, new_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    centres = (2 * np.arange(new_size, dtype=np.int64) + 1) * size * _PIXEL // (2 * new_size) - _PIXEL // 2
    centres = np.clip(centres, 0, (size - 1) * _PIXEL)
    return centres // _PIXEL, centres % _PIXEL
