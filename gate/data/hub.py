"""A `datasets.Dataset` of Hugging Face as a set of images; that package itself is not needed here.

What is used of it: `len()`, `features`, `[index]` for a row and `[name]` for a column.

Source: https://huggingface.co/docs/datasets/object_detection for the columns of a detection data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gate.data.coco import AnnotationChecker
from gate.data.images import ImageItem, ImageSet, Problems, is_integer
from gate.errors import DataError
from gate.targets import Categories


@dataclass(frozen=True)
class HubReader:
    """Images of a dataset by row: decoded by it, or the bytes of a file where it leaves them undecoded."""

    dataset: Any
    column: str

    def read(self, place: int) -> Any:
        """The image of a row: an image of Pillow, or a file's bytes."""
        value = self.dataset[place][self.column]
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        return value


def read_hub(
    dataset: Any,
    *,
    image: str = "image",
    label: str = "label",
    objects: str = "objects",
    where: str = "dataset",
) -> ImageSet:
    """The images of a dataset with a column of labels, or of objects: `bbox` (xywh, pixels) and `category`.

    Ids are those of the column `image_id` where there is one, else the number of the row.

    Args:
        dataset: A map-style one, of one split.
        image, label, objects: Names of the columns; exactly one of the last two is there.
        where: For errors.

    Raises:
        DataError: It has no such columns, or labels or objects are malformed; all of it is listed.
    """
    columns = list(getattr(dataset, "features", None) or ())
    if not columns or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"a {type(dataset).__name__} is no map-style dataset with features",
            where=where,
            hint='Give one split, and no stream: load_dataset(name, split="test").',
        )
    truths = [name for name in (label, objects) if name in columns]
    if image not in columns or len(truths) != 1:
        raise DataError(
            f"needs a column {image!r} and one of {label!r} and {objects!r}; it has {', '.join(map(repr, columns))}",
            where=where,
        )
    problems = Problems()
    values = _column(dataset, truths[0], where)
    ids = _ids(dataset, columns, problems, where)
    feature = dataset.features[truths[0]]
    if truths[0] == label:
        names = _names(feature)
        items = _labelled(values, ids, problems, names)
        notes: tuple[str, ...] = ()
    else:
        rows = [_objects(each, f"row {row}", problems) for row, each in enumerate(values)]
        names = _names(_category_feature(feature)) or _used_names(rows)
        checker = AnnotationChecker(problems, names, {each: None for each in ids if is_integer(each)})
        items = _annotated(rows, ids, problems, checker)
        notes = checker.notes()
    problems.require_none(where, hint="Nothing was run.")
    return ImageSet(
        items=items,
        where=where,
        categories=Categories(names) if names else None,
        notes=notes,
        reader=HubReader(dataset, image),
        labels_by_content=truths[0] == label,
    )


def _column(dataset: Any, name: str, where: str) -> list[Any]:
    try:
        values = list(dataset[name])
        count = len(dataset)
    except Exception as err:
        raise DataError(f"column {name!r} cannot be read: {type(err).__name__}: {err}", where=where) from err
    if len(values) != count:
        raise DataError(f"column {name!r} has {len(values)} values, the dataset {count} rows", where=where)
    return values


def _ids(dataset: Any, columns: Sequence[str], problems: Problems, where: str) -> list[int]:
    if "image_id" not in columns:
        return list(range(len(dataset)))
    ids = _column(dataset, "image_id", where)
    seen: set[int] = set()
    for row, each in enumerate(ids):
        if not is_integer(each):
            problems.add(f"row {row}: image_id must be an integer, got {each!r}")
        elif each in seen:
            problems.add(f"row {row}: image_id {each} is there twice")
        else:
            seen.add(each)
    return ids


def _labelled(
    values: Sequence[Any], ids: Sequence[int], problems: Problems, names: Mapping[int, str] | None
) -> tuple[ImageItem, ...]:
    for row, each in enumerate(values):
        if not is_integer(each) or each < 0 or (names is not None and each not in names):
            problems.add(f"row {row}: the label must be a class index, got {each!r}")
    return tuple(
        ImageItem(row, image_id, f"row {row}", label=each)
        for row, (image_id, each) in enumerate(zip(ids, values, strict=True))
    )


def _annotated(
    rows: Sequence[Sequence[Mapping[str, Any]]], ids: Sequence[int], problems: Problems, checker: AnnotationChecker
) -> tuple[ImageItem, ...]:
    items: list[ImageItem] = []
    number = 0
    for row, (image_id, found) in enumerate(zip(ids, rows, strict=True)):
        whole: list[Mapping[str, Any]] = []
        for each in found:
            number += 1
            given = {**each, "id": each.get("id", number), "image_id": image_id}
            if (checked := checker.checked(given, f"row {row}")) is not None:
                whole.append(checked)
        items.append(ImageItem(row, image_id, f"row {row}", annotations=tuple(whole)))
    if not number and not len(problems):
        problems.add("no row has any object: there is nothing to compare with")
    return tuple(items)


def _used_names(rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, str]:
    """Where the dataset names no categories: the ids that are there, as names."""
    used = {each["category_id"] for row in rows for each in row if is_integer(each["category_id"])}
    return {key: str(key) for key in sorted(used)}


def _objects(value: Any, place: str, problems: Problems) -> list[dict[str, Any]]:
    """Objects of a row, each with `category_id`: from a mapping of lists, or a list of mappings."""
    if isinstance(value, Mapping):
        lengths = {name: len(each) for name, each in value.items() if isinstance(each, (list, tuple))}
        if lengths.keys() != value.keys() or len(set(lengths.values())) > 1:
            problems.add(f"{place}: the lists of its objects differ in length: {lengths}")
            return []
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, Mapping) for each in value):
        problems.add(f"{place}: expected objects with bbox and category, got {type(value).__name__}")
        return []
    renamed = [{("category_id" if name == "category" else name): one for name, one in each.items()} for each in value]
    return [{"category_id": None, **each} for each in renamed]


def _category_feature(feature: Any) -> Any:
    """The feature of `category` in that of `objects`, which is a mapping of features, or a list of one."""
    inner = feature if isinstance(feature, Mapping) else getattr(feature, "feature", None)
    category = inner.get("category") if isinstance(inner, Mapping) else None
    return getattr(category, "feature", category)


def _names(feature: Any) -> dict[int, str] | None:
    """Class names of a feature; None where it names none."""
    names = getattr(feature, "names", None)
    return None if not names else dict(enumerate(names))
