"""Seeded images: coarse and fine grids of colours, each image with a contrast and a brightness of its own.

Only integers are drawn and only single IEEE operations applied, so that every machine makes the same bytes.
"""

import numpy as np

SIDE = 224
GRIDS = (4, 14, 56)
EVALUATED = 1024
CALIBRATED = 256
MEAN = np.float32([123.675, 116.28, 103.53]).reshape(3, 1, 1)
DEVIATION = np.float32([58.395, 57.12, 57.375]).reshape(3, 1, 1)


class Images:
    """Images made when they are asked for: float32 [3, 224, 224], ImageNet's normalisation.

    Args:
        count: How many.
        seed: Another one gives other images.
        scale: Multiplies each image; 1.0 is right, and anything else is a mistake in the preprocessing.
    """

    def __init__(self, count: int, seed: int, scale: float = 1.0) -> None:
        self.count = count
        self.seed = seed
        self.scale = np.float32(scale)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One image, by the name of the input."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.Generator(np.random.PCG64([self.seed, index]))
        pixels = np.zeros((3, SIDE, SIDE), np.int64)
        for size in GRIDS:
            grid = random.integers(0, 256, (3, size, size))
            tint = random.integers(0, 256, (3, 1, 1))
            share = int(random.integers(0, 9))
            cell = SIDE // size
            pixels += np.repeat(np.repeat((grid * share + tint * (8 - share)) // 8, cell, 1), cell, 2)
        brightness = int(random.integers(32, 224))
        contrast = int(random.integers(1, 9))
        pixels = np.clip(brightness + (pixels // len(GRIDS) - 128) * contrast // 4, 0, 255)
        return {"image": (pixels.astype(np.float32) - MEAN) / DEVIATION * self.scale}


def evaluation() -> Images:
    """The images that engines are judged on."""
    return Images(EVALUATED, seed=1)


def calibration() -> Images:
    """Other images, alike, for INT8."""
    return Images(CALIBRATED, seed=2)


def calibration_of_the_wrong_scale() -> Images:
    """As `calibration`, half as large: preprocessed differently from what is evaluated."""
    return Images(CALIBRATED, seed=2, scale=0.5)
