"""Sets of images with their ground truth, checked whole before the first is used, as a source of samples."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np

from gate.data.batches import Batch
from gate.data.decoding import DecodePool, Decoder, Examined, FileReader, Job, Reader
from gate.data.image_spec import Preprocess
from gate.data.preprocess import Pixels, described, image_record, input_shape, pillow_image
from gate.device import usable_cores
from gate.errors import DataError
from gate.targets import Categories, ImageRecord, ImageTarget
from gate.tensors import Array

NAMED_PROBLEMS = 20
"""So many problems are named in one error, and the others counted."""

BOX_MARGIN_PX = 1.0
"""A box may reach this far outside its image: tools differ in whether a pixel is a point or an area."""

_FEW = 200
"""Below so many images, starting worker processes takes longer than they save."""

_MOST_WORKERS = 8
_AHEAD_PER_WORKER = 4
_AHEAD_BATCHES = 2


class Problems:
    """What is wrong with a data set, collected so that all of it is said at once."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, problem: str) -> None:
        """One more, in one sentence that names the file, line or id."""
        self._found.append(problem)

    def require_none(self, where: str, *, hint: str | None = None) -> None:
        """Go on only where nothing was found.

        Raises:
            DataError: Something was; names the first 20 and counts the others.
        """
        if not self._found:
            return
        count = len(self._found)
        lines = [f"{count} problem{'s' if count > 1 else ''}:", *(f"  {each}" for each in self._found[:NAMED_PROBLEMS])]
        if count > NAMED_PROBLEMS:
            lines.append(f"  and {count - NAMED_PROBLEMS} more")
        raise DataError("\n".join(lines), where=where, hint=hint)


@dataclass(frozen=True)
class ImageItem:
    """An image of a set and its ground truth: a label, or annotations.

    Args:
        place: What the set's reader reads: the path of a file.
        image_id: Unique in the set.
        name: Unique in the set: for messages, and for choosing a subset that does not depend on the order.
        label: Class index, where the set has labels.
        annotations: COCO annotations, where the set has them; None where it does not.
        size: Width and height that the ground truth says, EXIF orientation applied; None where it does not.
    """

    place: Any
    image_id: int
    name: str
    label: int | None = None
    annotations: tuple[Mapping[str, Any], ...] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images and their ground truth, as a data set names them; none was decoded yet.

    Args:
        items: In the set's order.
        where: For errors.
        categories: Their names, where there are any.
        notes: What was filled in or left out, for the record.
        reader: Where images come from.
        labels_by_content: Whether the same file under two labels is a problem.
    """

    items: tuple[ImageItem, ...]
    where: str
    categories: Categories | None = None
    notes: tuple[str, ...] = ()
    reader: Reader = field(default_factory=FileReader)
    labels_by_content: bool = False


def file_problem(path: Any) -> str | None:
    """What is wrong with a file that can be seen without opening it; None where nothing is."""
    try:
        if not path.is_file():
            return "there is no such file" if not path.exists() else "is no file"
        return None if path.stat().st_size else "is empty: 0 bytes"
    except OSError as err:
        return f"cannot be read: {err.strerror}"


def box_problem(box: Sequence[float], size: tuple[int, int] | None) -> str | None:
    """What is wrong with a box, xywh in pixels, in an image of this width and height; None where nothing is."""
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(is_number(each) for each in box):
        return f"bbox must be four numbers [x, y, width, height], got {box!r}"
    if not all(math.isfinite(each) for each in box):
        return f"bbox {list(box)} is not finite"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return f"bbox {list(box)} has no area: width {width:g}, height {height:g}"
    if size is None:
        return None
    beyond = max(-x, -y, x + width - size[0], y + height - size[1])
    if beyond > BOX_MARGIN_PX:
        return f"bbox {list(box)} (xywh) reaches {beyond:g} px outside the image of {size[0]} x {size[1]}"
    return None


def is_number(value: object) -> bool:
    """Whether it is a float, or an int of 64 bits and no bool; a NaN is a number too."""
    return isinstance(value, float) or is_integer(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int of 64 bits and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def chosen_items(image_set: ImageSet, samples: int | None, seed: int) -> tuple[ImageItem, ...]:
    """So many of a set's images, in the set's order; which ones follows from the seed and their names alone.

    Raises:
        DataError: The set has fewer, or none.
    """
    items = image_set.items
    if not items or (samples is not None and samples < 1):
        raise DataError(f"{len(items)} images, {samples} asked for: there is nothing to use", where=image_set.where)
    if samples is None or samples == len(items):
        return items
    if samples > len(items):
        raise DataError(
            f"has {len(items)} images, {samples} were asked for",
            where=image_set.where,
            hint="Fewer samples than asked for is never a pass: restore the data, or lower the number in the spec.",
        )
    ranked = sorted(range(len(items)), key=lambda index: _digest(f"{seed}:{items[index].name}"))
    return tuple(items[index] for index in sorted(ranked[:samples]))


@dataclass
class _ReadOnce:
    """One image of a reader, read the first time that it is asked for."""

    reader: Reader
    value: Any = None

    def read(self, place: Any) -> Any:
        """As `Reader.read`."""
        if self.value is None:
            self.value = self.reader.read(place)
        return self.value


@dataclass(frozen=True)
class _Given:
    """A reader that has its image already."""

    image: Any

    def read(self, place: Any) -> Any:  # noqa: ARG002 - the protocol's
        """The image."""
        return self.image


class ImageSource:
    """Images as samples: `SampleSource`, decoded ahead in worker processes. Close it, or use it in a `with` block.

    All images are decoded once when it is made, so that a broken one is known before anything runs; then once in each pass.
    An EXIF orientation is applied. Where boxes belong to the image and its size does not tell whether they are of the
    turned image, it is refused.

    Args:
        image_set: The images.
        preprocess: How each becomes the input.
        input_name: The model's input.
        dtype: Its type.
        samples: How many to use, chosen by `seed`; left out: all.
        seed: Of the choice.
        workers: Processes that decode (threads where the set's reader cannot be sent to a process); 0 for none; left out:
            one a core, at most 8, and none for fewer than 200 images.

    Attributes:
        items: The images used, in order.
        ids: Their ids.
        records: How each becomes the input.
        examined: What each file holds.

    Raises:
        DataError: Images are missing, empty, truncated, no images, or of another size than the ground truth says; all of
            them are listed. Or the set has fewer than `samples`, or Pillow is not installed.
    """

    def __init__(
        self,
        image_set: ImageSet,
        *,
        preprocess: Preprocess,
        input_name: str,
        dtype: str = "float32",
        samples: int | None = None,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        pillow_image()
        self.where = image_set.where
        self.categories = image_set.categories
        self.notes = image_set.notes
        self.preprocess = preprocess
        self.input_name = input_name
        self.seed = seed
        self.items = chosen_items(image_set, samples, seed)
        self.ids = tuple(item.image_id for item in self.items)
        self._available = len(image_set.items)
        if workers is None:
            workers = 0 if len(self.items) < _FEW else min(usable_cores(), _MOST_WORKERS)
        self._pool = DecodePool(Decoder(image_set.reader, preprocess, dtype), workers)
        try:
            self.examined = self._examine(image_set)
            self.records = self._records()
        except BaseException:
            self.close()
            raise
        self._jobs = [
            Job(item.place, item.name, found.width, found.height)
            for item, found in zip(self.items, self.examined, strict=True)
        ]
        self._shapes = [input_shape(preprocess, job.width, job.height, file_name=job.name) for job in self._jobs]

    def __len__(self) -> int:
        return len(self.items)

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Asking for batches again starts others."""
        self._pool.close()

    @property
    def workers(self) -> int:
        """Processes, or threads, that decode; 0 where none does."""
        return self._pool.workers

    @property
    def uses_processes(self) -> bool:
        """Whether the workers are processes."""
        return self._pool.are_processes

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, at most `size` at a time, fewer where the input's shape changes or at the end.

        With workers at most two batches, or four images a worker, are decoded ahead.

        Raises:
            DataError: `size` is below 1; an image cannot be read any more; or a worker ended.
        """
        if size < 1:
            raise DataError(f"a batch holds at least one sample, got {size}", where=self.where)
        spans = self._spans(size)
        if self.workers == 0:
            for first, stop in spans:
                yield self._batch(first, stop, self._pool.begin(self._jobs[first:stop], self._shapes[first]).result())
            return
        ahead = max(_AHEAD_BATCHES, -(-self.workers * _AHEAD_PER_WORKER // size))
        pending: deque[tuple[int, int, Any]] = deque()
        try:
            for first, stop in itertools.chain(spans, itertools.repeat((-1, -1), ahead)):
                if first >= 0:
                    pending.append((first, stop, self._pool.begin(self._jobs[first:stop], self._shapes[first])))
                if pending and (first < 0 or len(pending) > ahead):
                    start, end, batch = pending[0]
                    values = batch.result()
                    pending.popleft()
                    yield self._batch(start, end, values)
        finally:
            for _, _, batch in pending:
                batch.discard()

    def pixels(self, index: int) -> Pixels:
        """The pixels of one image, read again and held to what was examined: uint8 [H, W, 3], RGB, turned as EXIF says.

        It is decoded here, and kept by nobody.

        Raises:
            DataError: It cannot be read any more, or is not what it was.
        """
        from PIL import ImageOps

        job, before = self._jobs[index], self._pool.decoder
        reader = _ReadOnce(before.reader)
        found = Decoder(reader, before.preprocess, before.dtype).examine([job])[0]
        if isinstance(found, str):
            raise DataError(found, where=job.name)
        if found != self.examined[index]:
            raise DataError(
                "is not the image that it was before", where=job.name, hint="It changed while the gate ran."
            )
        # As a decoder does with what it has examined; through one, all of it would be float32 on the way.
        image = pillow_image().open(io.BytesIO(reader.value)) if isinstance(reader.value, bytes) else reader.value
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.uint8)

    def input_of(self, pixels: Array, *, name: str) -> Array:
        """A part of an image as the model's input, [1, ...], as if it were an image of its own.

        Args:
            pixels: uint8 [H, W, 3].
            name: For errors.

        Raises:
            DataError: It does not become the input.
        """
        height, width = pixels.shape[:2]
        before = self._pool.decoder
        decoder = Decoder(_Given(pillow_image().fromarray(np.ascontiguousarray(pixels))), self.preprocess, before.dtype)
        values = np.empty((1, *input_shape(self.preprocess, width, height, file_name=name)), before.dtype)
        decoder.fill(values, [Job(name, name, width, height)])
        return values

    def decoded(self, index: int) -> Pixels:
        """The pixels of one image as a batch's are decoded, here and now: uint8 [H, W] or [H, W, 3], RGB.

        Raises:
            DataError: It cannot be read any more, or is not what it was when it was examined.
        """
        return self._pool.decoder.decoded(self._jobs[index])

    def preprocessed(self, index: int, pixels: Pixels) -> Array:
        """What `decoded` gave of that image as the model's input, [1, ...], as a batch's are preprocessed.

        Raises:
            DataError: It does not become the input.
        """
        decoder = self._pool.decoder
        values = np.empty((1, *self._shapes[index]), decoder.dtype)
        decoder.preprocess_into(values[0], pixels, self._jobs[index])
        return values

    def described(self) -> dict[str, Any]:
        """Which images these are and what was done to them, for the bundle's record.

        The ids of all of them stand there as they are; names, contents and ground truth as one sha256 each.
        """
        return {
            "images": len(self.items),
            "of": self._available,
            "seed": self.seed,
            "ids": list(self.ids),
            "names_sha256": _sha256_of(item.name for item in self.items),
            "contents_sha256": _sha256_of(each.sha256 for each in self.examined),
            "turned_by_exif": sum(each.orientation != 1 for each in self.examined),
            "notes": list(self.notes),
            "preprocess": described(self.preprocess),
        }

    def _spans(self, size: int) -> Iterator[tuple[int, int]]:
        """First and last plus one of each batch."""
        first = 0
        for index in range(1, len(self.items) + 1):
            if index == len(self.items) or index - first == size or self._shapes[index] != self._shapes[first]:
                yield first, index
                first = index

    def _batch(self, first: int, stop: int, values: Any) -> Batch:
        items = self.items[first:stop]
        labels = [item.label for item in items if item.label is not None]
        targets = tuple(
            ImageTarget(record, item.annotations)
            for item, record in zip(items, self.records[first:stop], strict=True)
            if item.annotations is not None
        )
        return Batch(
            first=first,
            inputs={self.input_name: values},
            labels=np.asarray(labels, np.int64) if labels else None,
            targets=targets or None,
        )

    def _examine(self, image_set: ImageSet) -> tuple[Examined, ...]:
        problems = Problems()
        for kind, count in (
            ("label", sum(item.label is not None for item in self.items)),
            ("annotations", sum(item.annotations is not None for item in self.items)),
        ):
            if count not in {0, len(self.items)}:
                problems.add(f"{count} of {len(self.items)} images have {kind}, expected all or none")
        found: list[Examined] = []
        answers = self._pool.examine([Job(item.place, item.name) for item in self.items])
        for item, answer in zip(self.items, answers, strict=True):
            if isinstance(answer, str):
                problems.add(f"{item.name}: {answer}")
                continue
            found.append(answer)
            for problem in _misfits(item, answer):
                problems.add(f"{item.name}: {problem}")
        if image_set.labels_by_content and not len(problems):
            _add_shared_contents(problems, self.items, found)
        problems.require_none(self.where, hint="Nothing was run. Repair or remove these files and their ground truth.")
        return tuple(found)

    def _records(self) -> tuple[ImageRecord, ...]:
        problems = Problems()
        records: list[ImageRecord] = []
        for item, found in zip(self.items, self.examined, strict=True):
            try:
                records.append(
                    image_record(
                        self.preprocess, found.width, found.height, image_id=item.image_id, file_name=item.name
                    )
                )
            except DataError as err:
                problems.add(f"{item.name}: {err.message}")
        problems.require_none(self.where)
        return tuple(records)


def _misfits(item: ImageItem, found: Examined) -> Iterator[str]:
    """In what an image is not what its ground truth says."""
    size = (found.width, found.height)
    if item.size is not None and item.size != size:
        turned = " once its EXIF orientation is applied" if found.orientation != 1 else ""
        yield (f"is {size[0]} x {size[1]} pixels{turned}, its ground truth says {item.size[0]} x {item.size[1]}")
    elif item.annotations is not None and found.orientation != 1:
        swaps_sides = found.orientation >= 5
        if item.size is None or not swaps_sides or size[0] == size[1]:
            yield (
                f"has EXIF orientation {found.orientation}, and its size does not tell whether its boxes are of the turned "
                "image; save it turned, without the tag"
            )
    if item.size is None:
        for annotation in item.annotations or ():
            if problem := box_problem(annotation["bbox"], size):
                yield f"annotation {annotation['id']}: {problem}"


def _add_shared_contents(problems: Problems, items: Sequence[ImageItem], found: Sequence[Examined]) -> None:
    first: dict[str, ImageItem] = {}
    for item, each in zip(items, found, strict=True):
        other = first.setdefault(each.sha256, item)
        if other.label != item.label:
            problems.add(f"{item.name}: is the same file as {other.name}, under another label")


def _sha256_of(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_digest(text))
    return digest.hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # a file's name may be no UTF-8
