"""A CSV of image paths and labels."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gate.data.images import ImageItem, ImageSet, Problems, file_problem
from gate.errors import DataError
from gate.targets import Categories

_COLUMNS = ("path", "label")


@dataclass(frozen=True)
class _Row:
    line: int
    path: str
    label: str


def read_table(table: Path, *, classes: Sequence[str] = (), where: str | None = None) -> ImageSet:
    """The images that a CSV names, with the columns `path` and `label`; others are passed over.

    Labels are class indices where all of them are whole numbers and `classes` is left out, else class names.

    Args:
        table: The CSV, UTF-8, with a header. Its paths are below its folder, or absolute.
        classes: Class names in the order of the model's outputs; left out: the names found, sorted by code point.
        where: For errors; left out: the table's path.

    Raises:
        DataError: It cannot be read, has no such columns or no rows; a path or a label is missing, a file is not there, or a
            path is there twice; all of it is listed with line numbers.
    """
    where = where or str(table)
    problems = Problems()
    rows = _rows(table, where, problems)
    labels = _labels(rows, classes, problems)
    seen: dict[str, int] = {}
    items: list[ImageItem] = []
    for row in rows:
        path = table.parent / row.path
        place = os.path.realpath(path)
        if place in seen:
            problems.add(f"line {row.line}: {row.path} is on line {seen[place]} too")
        elif problem := file_problem(path):
            problems.add(f"line {row.line}: {path}: {problem}")
        elif row.label in labels:
            items.append(ImageItem(str(path), len(items), row.path, label=labels[row.label]))
        seen.setdefault(place, row.line)
    problems.require_none(where, hint="Nothing was run. Repair or remove these lines.")
    if not items:
        raise DataError("has a header and no rows: there is nothing to compare", where=where)
    is_named = bool(classes) or not any(_is_index(name) for name in labels)
    names = {index: name for name, index in labels.items()} if is_named else None
    return ImageSet(
        items=tuple(items),
        where=where,
        categories=None if names is None else Categories({key: names[key] for key in sorted(names)}),
        labels_by_content=True,
    )


def _rows(table: Path, where: str, problems: Problems) -> list[_Row]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except FileNotFoundError as err:
        raise DataError(f"there is no file {table}", where=where) from err
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"cannot be read as UTF-8: {err}", where=where) from err
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[_Row] = []
    try:
        header = list(reader.fieldnames or ())
        wrong = [name for name in _COLUMNS if header.count(name) != 1]
        if wrong:
            raise DataError(
                f"needs one column {' and one '.join(map(repr, wrong))}; its header has "
                f"{', '.join(map(repr, header)) or 'nothing'}",
                where=where,
                hint="The first line must be a header such as path,label",
            )
        for each in reader:
            path, label = ((each.get(name) or "").strip() for name in _COLUMNS)
            for name, value in zip(_COLUMNS, (path, label), strict=True):
                if not value:
                    problems.add(f"line {reader.line_num}: there is no {name}")
            if path and label:
                rows.append(_Row(reader.line_num, path, label))
    except csv.Error as err:
        raise DataError(f"line {reader.line_num}: is no CSV: {err}", where=where) from err
    return rows


def _is_index(label: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", label, re.ASCII) is not None


def _labels(rows: Sequence[_Row], classes: Sequence[str], problems: Problems) -> dict[str, int]:
    """Class index of each label that is well formed."""
    if classes:
        known = {name: index for index, name in enumerate(classes)}
        for row in rows:
            if row.label not in known:
                problems.add(f"line {row.line}: {row.label!r} is none of the classes that the spec names")
        return known
    indices = [row for row in rows if _is_index(row.label)]
    if not indices:
        return {name: index for index, name in enumerate(sorted({row.label for row in rows}))}
    if len(indices) != len(rows):
        row = next(row for row in rows if not _is_index(row.label))
        problems.add(
            f"line {row.line}: {row.label!r} is a class name, while line {indices[0].line} has a class index "
            f"({indices[0].label}); use one of them, or name the classes in the spec"
        )
    for row in indices:
        if int(row.label) < 0:
            problems.add(f"line {row.line}: the class index {row.label} is below 0")
    return {row.label: int(row.label) for row in indices}
