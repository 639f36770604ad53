"""Opens the images that a spec names as a source of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gate.data.coco import read_coco
from gate.data.folder import read_class_folders
from gate.data.hub import read_hub
from gate.data.image_spec import ImagesSpec, Preprocess
from gate.data.images import ImageSet, ImageSource
from gate.data.table import read_table


def read_images(spec: ImagesSpec, folder: Path, *, where: str | None = None) -> ImageSet:
    """Images and ground truth as a spec names them, checked but for what only decoding shows.

    Args:
        spec: Where they are.
        folder: The spec's: its paths are below it.
        where: For errors; left out: the path.

    Raises:
        DataError: Something is wrong with them; all of it is listed.
    """
    path = folder / spec.path
    if spec.kind == "coco":
        return read_coco(folder / (spec.annotations or ""), path, image_ids=spec.image_ids, where=where)
    read = read_class_folders if spec.kind == "folder" else read_table
    return read(path, classes=spec.classes, where=where)


def open_images(
    spec: ImagesSpec,
    folder: Path,
    *,
    preprocess: Preprocess,
    input_name: str,
    dtype: str = "float32",
    samples: int | None = None,
    seed: int = 0,
    where: str | None = None,
) -> ImageSource:
    """The images that a spec names, every one of those used decoded once; close what is returned.

    Args:
        spec: Where they are, and how many workers decode.
        folder: The spec's.
        preprocess: How each becomes the input.
        input_name: The model's input.
        dtype: Its type.
        samples: How many, chosen by `seed`; left out: all.
        seed: Of the choice.
        where: For errors.

    Raises:
        DataError: Something is wrong with images or ground truth, or there are too few; all of it is listed.
    """
    return ImageSource(
        read_images(spec, folder, where=where),
        preprocess=preprocess,
        input_name=input_name,
        dtype=dtype,
        samples=samples,
        seed=seed,
        workers=spec.workers,
    )


def open_hub_images(
    dataset: Any,
    *,
    preprocess: Preprocess,
    input_name: str,
    dtype: str = "float32",
    samples: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    where: str = "dataset",
) -> ImageSource:
    """As `open_images`, of a `datasets.Dataset` that a factory returned.

    Raises:
        DataError: As `open_images`.
    """
    return ImageSource(
        read_hub(dataset, where=where),
        preprocess=preprocess,
        input_name=input_name,
        dtype=dtype,
        samples=samples,
        seed=seed,
        workers=workers,
    )


def images_from(value: object, *, where: str) -> ImageSet | None:
    """What a function of the spec returned as images: an `ImageSet` or a Hugging Face dataset; None for anything else.

    Raises:
        DataError: The dataset has no image column, or its ground truth is malformed.
    """
    if isinstance(value, ImageSet):
        return value
    if type(value).__module__.partition(".")[0] == "datasets" and hasattr(value, "features"):
        return read_hub(value, where=where)
    return None
