"""COCO ground truth: a folder of images and an instances json, checked whole before an image is decoded.

Source: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate.data.images import ImageItem, ImageSet, Problems, box_problem, file_problem, is_integer, is_number
from gate.errors import DataError
from gate.targets import Categories

_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class _Image:
    """An entry of `images` that is whole."""

    image_id: int
    path: Path
    name: str
    size: tuple[int, int]


def read_coco(annotations: Path, images: Path, *, image_ids: Sequence[int] = (), where: str | None = None) -> ImageSet:
    """The images of a COCO data set and their annotations; images without annotations are among them.

    Args:
        annotations: The instances json.
        images: The folder that `file_name` is below.
        image_ids: Only these, if any are given.
        where: For errors; left out: the json's path.

    Raises:
        DataError: The json cannot be read, or contradicts itself or the folder; all that is wrong is listed.
    """
    where = where or str(annotations)
    lists = _read(annotations, where)
    problems = Problems()
    for what in _LISTS:
        if not lists[what]:
            problems.add(f"{what} is empty: there is nothing to compare with")
    problems.require_none(where)  # at once: of an empty list each entry of the others would be a problem too
    names = _categories(lists["categories"], problems)
    found = _images(lists["images"], images, set(image_ids) if image_ids else None, problems)
    if len(set(image_ids)) != len(image_ids):
        problems.add("image_ids names an image twice")
    for image_id in sorted(set(image_ids) - found.keys()):
        problems.add(f"image_ids: there is no image {image_id}")
    checker = AnnotationChecker(problems, names, {image_id: image.size for image_id, image in found.items()})
    by_image: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in found}
    for index, each in enumerate(lists["annotations"]):
        whole = checker.checked(each, f"annotations[{index}]")
        if whole is not None:
            by_image[whole["image_id"]].append(whole)
    problems.require_none(where, hint="Nothing was run. Repair the annotations, or remove what is wrong in them.")
    wanted = set(image_ids) or found.keys()
    return ImageSet(
        items=tuple(
            ImageItem(
                place=str(image.path),
                image_id=image_id,
                name=image.name,
                annotations=tuple(by_image[image_id]),
                size=image.size,
            )
            for image_id, image in found.items()
            if image_id in wanted
        ),
        where=where,
        categories=Categories({key: names[key] for key in sorted(names)}),
        notes=checker.notes(),
    )


def _read(path: Path, where: str) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise DataError(f"there is no file {path}", where=where) from err
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"{path} is no JSON: {err}", where=where) from err
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}, expected an object with {', '.join(_LISTS)}", where=where
        )
    wrong = [key for key in _LISTS if not isinstance(content.get(key), list)]
    if wrong:
        raise DataError(
            f"{path} has no list {', '.join(map(repr, wrong))} (it has {', '.join(map(repr, content)) or 'nothing'})",
            where=where,
            hint="Expected COCO's instances json; a results json, a list of detections, is no ground truth.",
        )
    return {key: content[key] for key in _LISTS}


def _categories(entries: Sequence[Any], problems: Problems) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, each in enumerate(entries):
        key, name = (each.get("id"), each.get("name")) if isinstance(each, dict) else (None, None)
        if not is_integer(key) or not isinstance(name, str) or not name:
            problems.add(f"categories[{index}]: expected an integer id and a name, got {_shown(each)}")
        elif key in names:
            problems.add(f"categories[{index}]: id {key} is there twice, as {names[key]!r} and {name!r}")
        elif name in names.values():
            problems.add(f"categories[{index}]: the name {name!r} is there twice")
        else:
            names[key] = name
    return names


def _images(entries: Sequence[Any], folder: Path, wanted: set[int] | None, problems: Problems) -> dict[int, _Image]:
    found: dict[int, _Image] = {}
    paths: dict[Path, int] = {}
    for index, each in enumerate(entries):
        place = f"images[{index}]"
        if not isinstance(each, dict) or not is_integer(each.get("id")):
            problems.add(f"{place}: expected an integer id, got {_shown(each)}")
            continue
        key, name = each["id"], each.get("file_name")
        width, height = each.get("width"), each.get("height")
        if key in found:
            problems.add(f"{place}: image id {key} is there twice, as {found[key].name} and {name}")
            continue
        if not isinstance(name, str) or not name:
            problems.add(f"{place}: image {key} has no file_name")
            name = ""
        if not is_integer(width) or not is_integer(height) or width < 1 or height < 1:
            problems.add(f"{place}: image {key} has width {width!r} and height {height!r}, expected pixels")
            width = height = 1 << 30
        path = folder / name
        found[key] = _Image(key, path, name or f"image {key}", (width, height))
        if not name:
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.add(f"{place}: {name} lies outside the folder of images")
            continue
        if path in paths:
            problems.add(f"{place}: {name} is the file of images {paths[path]} and {key}")
        paths[path] = key
        if (wanted is None or key in wanted) and (problem := file_problem(path)):
            problems.add(f"{place}: {path}: {problem}")
    return found


class AnnotationChecker:
    """Checks COCO annotations one by one, and fills in what may be left out.

    Args:
        problems: What is wrong goes there.
        categories: Names by id.
        sizes: Width and height by image id; None where they are not known yet.
    """

    def __init__(
        self, problems: Problems, categories: Mapping[int, str], sizes: Mapping[int, tuple[int, int] | None]
    ) -> None:
        self._problems = problems
        self._categories = categories
        self._sizes = sizes
        self._ids: set[int] = set()
        self._filled = {"area": 0, "iscrowd": 0}

    def checked(self, annotation: Any, place: str) -> Mapping[str, Any] | None:
        """The annotation with `area` and `iscrowd`; None where something is wrong with it."""
        before = len(self._problems)
        if not isinstance(annotation, Mapping) or not is_integer(annotation.get("id")):
            self._problems.add(f"{place}: expected an annotation with an integer id, got {_shown(annotation)}")
            return None
        key = annotation["id"]

        def wrong(problem: str) -> None:
            self._problems.add(f"{place}: annotation {key}: {problem}")

        if key in self._ids:
            wrong("this id is there twice")
        self._ids.add(key)
        image_id = annotation.get("image_id")
        size = self._sizes.get(image_id) if is_integer(image_id) else None
        if not is_integer(image_id) or image_id not in self._sizes:
            wrong(f"there is no image {image_id!r}")
        category = annotation.get("category_id")
        if not is_integer(category) or category not in self._categories:
            wrong(f"there is no category {category!r}")
        box = annotation.get("bbox")
        problem = "has no bbox" if box is None else box_problem(box, size)
        if problem:
            wrong(problem)
        self._check_optional(annotation, wrong)
        return None if len(self._problems) > before else self._filled_in(annotation)

    def notes(self) -> tuple[str, ...]:
        """What was filled in."""
        of = {"area": "width times height of the box", "iscrowd": "0"}
        return tuple(
            f"{count} annotations had no {key}: taken as {of[key]}" for key, count in self._filled.items() if count
        )

    def _check_optional(self, annotation: Mapping[str, Any], wrong: Callable[[str], None]) -> None:
        area = annotation.get("area")
        if area is not None and not (is_number(area) and math.isfinite(area) and area >= 0):
            wrong(f"area must be a finite number of square pixels, got {area!r}")
        crowd = annotation.get("iscrowd")
        if crowd is not None and not (isinstance(crowd, int) and crowd in {0, 1}):
            wrong(f"iscrowd must be 0 or 1, got {crowd!r}")

    def _filled_in(self, annotation: Mapping[str, Any]) -> Mapping[str, Any]:
        whole = dict(annotation)
        if whole.get("area") is None:
            self._filled["area"] += 1
            whole["area"] = float(whole["bbox"][2]) * float(whole["bbox"][3])
        if whole.get("iscrowd") is None:
            self._filled["iscrowd"] += 1
            whole["iscrowd"] = 0
        whole["iscrowd"] = int(whole["iscrowd"])
        return whole


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
