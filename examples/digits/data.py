"""Handwritten digits (UCI, as scikit-learn carries them): 1,797 images of 8 x 8 pixels, ten classes.

1,000 samples are for training, the other 797 are held out for evaluation. scikit-learn is located, not imported:
its import costs more time than everything else here.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gate import Samples

TRAINING_SAMPLES = 1000
CALIBRATION_SAMPLES = 200
SEED = 20


@dataclass(frozen=True)
class Digits:
    """Images and their labels.

    Args:
        images: float32 [N, 1, 8, 8], 0 (paper) to 1 (ink).
        labels: int64 [N], 0 to 9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def part(self, first: int, last: int) -> "Digits":
        """Samples `first` up to, not including, `last`."""
        return Digits(self.images[first:last], self.labels[first:last])


@cache
def shuffled() -> Digits:
    """All samples in the order of a seeded permutation: training samples first.

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the data, is not installed.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'trt-gate[examples]'")
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    # RandomState's stream is frozen across NumPy versions, which that of default_rng is not.
    order = np.random.RandomState(SEED).permutation(len(table))
    table = table[order]
    return Digits(table[:, :64].reshape(-1, 1, 8, 8) / np.float32(16), table[:, 64].astype(np.int64))


def training() -> Digits:
    """The 1,000 samples that the model was trained on."""
    return shuffled().part(0, TRAINING_SAMPLES)


def held_out() -> Digits:
    """The 797 samples that it has never seen."""
    return shuffled().part(TRAINING_SAMPLES, len(shuffled().labels))


def evaluation() -> Samples:
    """What reference and engines are compared on: the held-out samples."""
    digits = held_out()
    return Samples(inputs={"input": digits.images}, labels=digits.labels)


def calibration() -> Samples:
    """What INT8 ranges are measured on: 200 of the training samples, none of which is evaluated on."""
    digits = training().part(0, CALIBRATION_SAMPLES)
    return Samples(inputs={"input": digits.images}, labels=digits.labels)
