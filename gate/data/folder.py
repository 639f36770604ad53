"""Class folders: `<root>/<class>/<image>`, the label of an image being its folder's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gate.data.images import ImageItem, ImageSet, Problems, file_problem
from gate.errors import DataError
from gate.targets import Categories

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def read_class_folders(root: Path, *, classes: Sequence[str] = (), where: str | None = None) -> ImageSet:
    """The images of class folders; hidden files are passed over.

    Args:
        root: Holds one folder a class.
        classes: Class names in the order of the model's outputs; left out: the folders' names, sorted by code point.
        where: For errors; left out: the root.

    Raises:
        DataError: There is no such folder or no class in it; a class is empty, or holds what is no image; all of it is
            listed.
    """
    where = where or str(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}", where=where)
    problems = Problems()
    folders: list[Path] = []
    for entry in _entries(root, where):
        if entry.is_dir():
            folders.append(entry)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            problems.add(f"{entry.name}: lies in no class folder")
    if not folders:
        problems.add("there is no class folder in it")
    names = list(classes) or [folder.name for folder in folders]
    labels = {name: index for index, name in enumerate(names)}
    items: list[ImageItem] = []
    for folder in folders:
        if folder.name not in labels:
            problems.add(f"{folder.name}: is none of the classes that the spec names ({', '.join(names)})")
            continue
        files = _entries(folder, where)
        if not files:
            problems.add(f"{folder.name}: the class has no image")
        for path in files:
            name = f"{folder.name}/{path.name}"
            if path.is_dir():
                problems.add(f"{name}: is a folder; images lie directly in their class")
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                problems.add(f"{name}: is no image, by its name")
            elif problem := file_problem(path):
                problems.add(f"{name}: {problem}")
            else:
                items.append(ImageItem(str(path), len(items), name, label=labels[folder.name]))
    problems.require_none(where, hint="Nothing was run. Move or remove what does not belong there.")
    present = {folder.name for folder in folders}
    missing = [name for name in names if name not in present]
    return ImageSet(
        items=tuple(items),
        where=where,
        categories=Categories(dict(enumerate(names))),
        notes=(f"no folder for {len(missing)} classes: {', '.join(missing)}",) if missing else (),
        labels_by_content=True,
    )


def _entries(folder: Path, where: str) -> list[Path]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as err:
        raise DataError(f"{folder} cannot be read: {err.strerror}", where=where) from err
    return [folder / name for name in names]
