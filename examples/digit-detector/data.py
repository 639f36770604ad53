"""Canvases of handwritten digits as a COCO data set: images, annotations, and both as arrays.

`python examples/digit-detector/data.py` writes the folders under build/coco; `coco_evaluation` and `coco_calibration` do
so where they are not there.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import canvases
import numpy as np
import numpy.typing as npt
from canvases import Canvas, canvas
from PIL import Image

from gate.data.coco import read_coco
from gate.data.images import ImageSet
from gate.data.samples import Samples
from gate.targets import Categories, ImageRecord, ImageTarget

ROOT = Path(__file__).with_name("build") / "coco"
SEED = 0
SIZES = {"train": 1500, "calibration": 128, "evaluation": 512}
INPUT_SIDE = 128
PADDING = 114

CATEGORIES = {digit + 1: str(digit) for digit in range(10)}
"""Ids begin at 1, as in COCO: digit 0 is category 1."""

_FIRST_IMAGE = {"train": 1, "calibration": 20001, "evaluation": 40001}
_DIGESTS = "digests.json"


def letterbox(pixels: npt.NDArray[np.uint8], *, image_id: int = 0) -> tuple[npt.NDArray[np.uint8], ImageRecord]:
    """An image scaled to fit 128 x 128 with its sides' ratio kept, in the middle of grey.

    Args:
        pixels: uint8 [height, width, 3].
        image_id: For the record.

    Returns:
        uint8 [128, 128, 3], and where the image lies in it.
    """
    height, width = pixels.shape[:2]
    scale = INPUT_SIDE / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (INPUT_SIDE - new_width) // 2, (INPUT_SIDE - new_height) // 2
    boxed = np.full((INPUT_SIDE, INPUT_SIDE, 3), PADDING, np.uint8)
    scaled = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
    boxed[top : top + new_height, left : left + new_width] = np.asarray(scaled)
    record = ImageRecord(
        image_id=image_id,
        width=width,
        height=height,
        scale_x=new_width / width,
        scale_y=new_height / height,
        left=float(left),
        top=float(top),
        file_name=_file_name(image_id),
    )
    return boxed, record


def _file_name(image_id: int) -> str:
    return f"{image_id:06d}.png"


def annotations(drawn: Canvas, *, image_id: int) -> tuple[dict[str, Any], ...]:
    """What is on a canvas, as COCO has it; ids are unique in all splits together."""
    return tuple(
        {
            "id": image_id * 10 + index,
            "image_id": image_id,
            "category_id": int(digit) + 1,
            "bbox": [float(value) for value in box],
            "area": float(area),
            "iscrowd": 0,
        }
        for index, (digit, box, area) in enumerate(zip(drawn.digits, drawn.boxes, drawn.areas, strict=True))
    )


def letterboxed(split: str, count: int, *, seed: int = SEED) -> Samples:
    """The first `count` canvases of a split, in memory."""
    images = np.empty((count, 3, INPUT_SIDE, INPUT_SIDE), np.float32)
    targets = []
    for index in range(count):
        image_id = _FIRST_IMAGE[split] + index
        drawn = canvas(split, index, seed=seed)
        boxed, record = letterbox(drawn.pixels, image_id=image_id)
        images[index] = boxed.transpose(2, 0, 1) * np.float32(1 / 255)
        targets.append(ImageTarget(record, annotations(drawn, image_id=image_id)))
    return Samples({"images": images}, targets=targets, categories=Categories(CATEGORIES))


def evaluation() -> Samples:
    """What reference and engines are compared on: 512 canvases of digits that the model has never seen."""
    return letterboxed("evaluation", SIZES["evaluation"])


def calibration() -> Samples:
    """What INT8 ranges are measured on: 128 canvases of digits that are neither trained nor evaluated on."""
    return letterboxed("calibration", SIZES["calibration"])


def coco_evaluation() -> ImageSet:
    """The same as `evaluation`, as a COCO folder that is written if it is not there."""
    return _coco("evaluation")


def coco_calibration() -> ImageSet:
    """The same as `calibration`, likewise."""
    return _coco("calibration")


def _coco(split: str) -> ImageSet:
    folder = make_coco(ROOT, split)
    return read_coco(folder / f"instances_{split}.json", folder / "images")


def make_coco(folder: Path, split: str, seed: int = SEED) -> Path:
    """Write a split as a COCO folder, unless it is there already and whole.

    Args:
        folder: Gets `<split>/images/*.png` and `<split>/instances_<split>.json`.
        split: `train`, `calibration` or `evaluation`.
        seed: Another one gives other canvases.

    Returns:
        The folder of the split; it is there whole or not at all.
    """
    final = folder / split
    recipe = _recipe(split, seed)
    if _is_whole(final, recipe):
        return final
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
    try:
        _write_split(temporary / "new", split, seed, recipe)
        if final.exists():
            final.rename(temporary / "old")
        try:
            (temporary / "new").rename(final)
        except OSError:
            if not _is_whole(final, recipe):
                raise  # and where it is whole, another process was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_split(folder: Path, split: str, seed: int, recipe: str) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for index in range(SIZES[split]):
        image_id = _FIRST_IMAGE[split] + index
        drawn = canvas(split, index, seed=seed)
        name = _file_name(image_id)
        Image.fromarray(drawn.pixels).save(folder / "images" / name, format="PNG", compress_level=6)
        height, width = drawn.pixels.shape[:2]
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        found.extend(annotations(drawn, image_id=image_id))
    categories = [{"id": key, "name": name, "supercategory": "digit"} for key, name in CATEGORIES.items()]
    instances = {
        "info": {"description": f"handwritten digits on canvases, {split}, seed {seed}"},
        "licenses": [],
        "images": images,
        "annotations": found,
        "categories": categories,
    }
    (folder / f"instances_{split}.json").write_text(json.dumps(instances) + "\n", encoding="utf-8")
    digests = {"recipe": recipe, "files": _digests(folder)}
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def _recipe(split: str, seed: int) -> str:
    """Changes when the canvases would."""
    one = hashlib.sha256(f"{split}:{seed}:{SIZES[split]}".encode())
    for path in (Path(__file__), Path(canvases.__file__)):
        one.update(path.read_bytes())
    return one.hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its path within the folder, but for the digests themselves."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _DIGESTS
    }


def _is_whole(folder: Path, recipe: str) -> bool:
    try:
        stated = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stated == {"recipe": recipe, "files": _digests(folder)})


def main() -> None:
    """Write what a spec reads."""
    for split in ("calibration", "evaluation"):
        print(os.path.relpath(make_coco(ROOT, split)))


if __name__ == "__main__":
    main()
