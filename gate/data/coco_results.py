"""Reads predictions in COCO's results form from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gate.errors import DataError
from gate.metrics.coco_results import detections_from_results
from gate.targets import Detections, ImageRecord


def read_results(path: Path, images: Sequence[ImageRecord]) -> tuple[Detections, ...]:
    """As `detections_from_results`, of a file.

    Raises:
        DataError: It cannot be read or is not JSON; or as `detections_from_results`.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(f"cannot be read: {err}", where=str(path)) from err
    return detections_from_results(raw, images, where=str(path))
