"""A batch of samples: what every source gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gate.tensors import Array


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of equal shape.

    Args:
        first: Index of the first of them in the data set.
        inputs: Per input an array [n, ...].
        labels: int64 [n], or None.
        targets: n objects of ground truth, or None.
    """

    first: int
    inputs: dict[str, Array]
    labels: npt.NDArray[np.int64] | None
    targets: tuple[Any, ...] | None = None

    @property
    def size(self) -> int:
        """How many samples it holds."""
        return int(next(iter(self.inputs.values())).shape[0])
