"""Samples: what reference and engine are run on, read in batches so that memory does not grow with their number.

A source is an npz or safetensors file, or a function `module:function` beside the spec that returns `Samples`, a
mapping of arrays, or a dataset with `len()` and `[i]` (as PyTorch's map-style datasets) whose items are
`(input, label)` or a mapping with the input names and, where there are labels, `label`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from gate.data.batches import Batch
from gate.device import usable_cores
from gate.errors import DataError
from gate.spec import InputSpec, SpecFile
from gate.targets import Categories
from gate.tensors import Array

LABEL_KEYS = ("label", "labels")
TARGET_KEYS = ("target", "targets")

_HASHED_ALONE_BYTES = 1 << 20
"""A batch below this is hashed by the thread that has it: handing it over would take longer."""


@dataclass(frozen=True)
class Samples:
    """Evaluation or calibration samples that are in memory or memory-mapped.

    Args:
        inputs: Per input an array [N, ...] in the dtype that the spec declares.
        labels: int [N] class indices, or None where there is no ground truth.
        targets: In place of labels, N objects of the task's ground truth: `ImageTarget` for detections, an integer array
            [H, W] for semantic segmentation, an array for regression (docs/tasks.md).
        categories: Names of the categories by id, where the task has them.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    targets: Sequence[Any] | None = None
    categories: Categories | None = None


class SampleSource(Protocol):
    """Samples that can be gone through more than once, in a fixed order."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, at most `size` at a time, fewer where the shape changes or at the end."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """`Samples` as a source."""

    samples: Samples
    count: int

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        """As `SampleSource.batches`."""
        labels, targets = self.samples.labels, self.samples.targets
        for first in range(0, self.count, size):
            yield Batch(
                first=first,
                inputs={
                    name: np.ascontiguousarray(values[first : first + size])
                    for name, values in self.samples.inputs.items()
                },
                labels=None if labels is None else np.asarray(labels[first : first + size], dtype=np.int64),
                targets=None if targets is None else tuple(targets[first : first + size]),
            )


@dataclass(frozen=True)
class DatasetSource:
    """A map-style dataset as a source; one sample at a time is asked of it."""

    dataset: Any
    names: tuple[str, ...]
    where: str
    count: int = field(default=0)

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        """As `SampleSource.batches`."""
        held: list[_Item] = []
        first = 0
        for index in range(self.count):
            item = self._item(index)
            if held and (len(held) == size or not _same_shapes(held[0].inputs, item.inputs)):
                yield self._stacked(first, held)
                first, held = index, []
            held.append(item)
        if held:
            yield self._stacked(first, held)

    def _item(self, index: int) -> _Item:
        try:
            item = self.dataset[index]
        except Exception as err:
            raise DataError(f"sample {index} cannot be read: {type(err).__name__}: {err}", where=self.where) from err
        label: object = None
        target: object = None
        if isinstance(item, Mapping):
            truth = (*LABEL_KEYS, *TARGET_KEYS)
            inputs = {str(key): value for key, value in item.items() if key in self.names or key not in truth}
            label = next((item[key] for key in LABEL_KEYS if key in item and key not in self.names), None)
            target = next((item[key] for key in TARGET_KEYS if key in item and key not in self.names), None)
        elif isinstance(item, (tuple, list)) and len(item) == len(self.names) + 1:
            inputs = dict(zip(self.names, item[:-1], strict=True))
            label = item[-1]
        elif len(self.names) == 1 and not isinstance(item, (tuple, list)):
            inputs = {self.names[0]: item}
        else:
            raise DataError(
                f"sample {index} is a {type(item).__name__}; expected (input, label) or a mapping with "
                f"{', '.join(map(repr, self.names))}",
                where=self.where,
            )
        arrays = {
            name: _as_array(value, f"input {name!r} of sample {index}", self.where) for name, value in inputs.items()
        }
        return _Item(arrays, label, target)

    def _stacked(self, first: int, held: list[_Item]) -> Batch:
        names = held[0].inputs.keys()
        for offset, item in enumerate(held):
            if item.inputs.keys() != names:
                raise DataError(f"sample {first + offset} has other inputs than sample {first}", where=self.where)
        for word in ("label", "target"):
            given = [getattr(item, word) is not None for item in held]
            if any(given) and not all(given):
                raise DataError(f"sample {first + given.index(False)} has no {word}, others have", where=self.where)
        labelled = held[0].label is not None
        return Batch(
            first=first,
            inputs={name: np.stack([item.inputs[name] for item in held]) for name in names},
            labels=np.asarray([_as_label(item.label, self.where) for item in held]) if labelled else None,
            targets=tuple(item.target for item in held) if held[0].target is not None else None,
        )


@dataclass(frozen=True)
class _Item:
    """One sample of a dataset."""

    inputs: dict[str, Array]
    label: object
    target: object


def _as_array(value: object, what: str, where: str) -> Array:
    try:
        array = np.asarray(value)
    except Exception as err:
        raise DataError(f"{what} is no array: {type(err).__name__}: {err}", where=where) from err
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} is a {type(value).__name__} and no array of numbers", where=where)
    return array


def _as_label(label: object, where: str) -> np.int64:
    value = _as_array(label, f"label {label!r}", where)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise DataError(f"a label must be one integer, got {label!r}", where=where)
    return np.int64(value.reshape(()).item())


def _same_shapes(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)


@dataclass(frozen=True)
class DataDigest:
    """What samples are, by content.

    Args:
        samples: sha256 of each sample's inputs, in order, 32 bytes each.
        inputs_sha256: Of all inputs in order.
        data_sha256: Of all inputs, labels and targets in order.
        targets: sha256 of each sample's ground truth where it is no label; empty where there is none.
        labels: int64 little-endian, one after another; empty where there are none.
        batches: 128-bit XXH3 of the inputs of each batch that was gone through, by its first sample and its size. It takes
            a twentieth of sha256's time, and tells samples that changed by chance: what this process saw once it is held
            to by this, what anyone may have touched in between by sha256.
    """

    samples: tuple[bytes, ...]
    inputs_sha256: str
    data_sha256: str
    labels: bytes = b""
    targets: tuple[bytes, ...] = ()
    batches: Mapping[tuple[int, int], bytes] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class DigestedSource:
    """A source that is held to its digest: what it gives later is what was checked first.

    Args:
        source: Gone through once already, by `digest_of`.
        digest: Of that.
        where: For errors.
    """

    source: SampleSource
    digest: DataDigest
    where: str

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int) -> Iterator[Batch]:
        """As `SampleSource.batches`.

        Each batch is held against its digest before it is given, so whoever stops early has been given nothing unheld:
        a batch that was gone through as such against its XXH3, others against sha256 of each sample.
        From the third on, a batch is read and digested while the caller works with the one before it.

        Raises:
            DataError: A sample or its label is not the one that was digested.
        """
        ahead: tuple[Batch, Callable[[], bool]] | None = None
        for index, each in enumerate(self.source.batches(size)):
            is_known = self._is_known(each)
            if index == 0:  # most take one batch alone: none is read ahead for them
                self._hold(each, is_known)
                yield each
                continue
            if ahead is not None:
                self._hold(*ahead)
                yield ahead[0]
            ahead = each, is_known
        if ahead is not None:
            self._hold(*ahead)
            yield ahead[0]

    def batches_to_the_end(self, size: int) -> Iterator[Batch]:
        """As `batches`, for a caller that goes to the end and keeps nothing if it does not get there.

        A batch is digested while the caller works with it, and held when the caller asks for the next: the engine that
        copies it at that time finds it in the processor's cache, where reading another batch ahead would push it out.

        Raises:
            DataError: A sample or its label is not the one that was digested; with the step after the one that gave it.
        """
        for each in self.source.batches(size):
            is_known = self._is_known(each)
            yield each
            self._hold(each, is_known)

    def _is_known(self, batch: Batch) -> Callable[[], bool]:
        """Begin to digest a batch; the answer waits for it."""
        if (expected := self.digest.batches.get((batch.first, batch.size))) is not None:
            if _is_small(batch):
                known = _batch_digest(batch) == expected
                return lambda: known
            found = _hashers().submit(_batch_digest, batch)
            return lambda: found.result() == expected
        digests = _row_digests(batch)
        return lambda: tuple(digests) == self.digest.samples[batch.first : batch.first + batch.size]

    def _hold(self, batch: Batch, is_known: Callable[[], bool]) -> None:
        part = slice(batch.first, batch.first + batch.size)
        labels = b"" if batch.labels is None else batch.labels.astype("<i8").tobytes()
        targets = () if batch.targets is None else tuple(target_digest(each) for each in batch.targets)
        same = labels == self.digest.labels[8 * part.start : 8 * part.stop] and targets == self.digest.targets[part]
        if not is_known() or not same:
            raise DataError(
                f"gives other samples or labels from {batch.first} on than it gave before",
                where=self.where,
                hint="Every run through the data must give the same: fix its seed, its order and its augmentation.",
            )


def undigested(source: SampleSource) -> SampleSource:
    """The source itself, where it is held to its digest."""
    return source.source if isinstance(source, DigestedSource) else source


def categories_of(source: SampleSource) -> Categories | None:
    """The categories that a source names; None where it names none."""
    inner = undigested(source)
    found = inner.samples.categories if isinstance(inner, ArraySource) else getattr(inner, "categories", None)
    return found if isinstance(found, Categories) else None


def all_batches(source: SampleSource, size: int) -> Iterator[Batch]:
    """Every batch of a source, for a caller that goes to the end: see `DigestedSource.batches_to_the_end`."""
    return source.batches_to_the_end(size) if isinstance(source, DigestedSource) else source.batches(size)


def open_source(file: SpecFile, source: str, *, needed: int, key: str) -> SampleSource:
    """The samples that a spec names.

    Args:
        file: The spec.
        source: `module:function`, or an npz or safetensors file beside the spec.
        needed: How many samples there must be.
        key: Of the spec, for errors: `source` or `calibration`.

    Raises:
        DataError: It cannot be read, has other inputs than the spec, no samples or too few, or labels of another
            number.
        SpecError: There is no such module or function.
    """
    where = f"[data] {key} = {source!r}"
    names = tuple(file.spec.inputs)
    if source.endswith((".npz", ".safetensors")):
        value: object = _read_arrays(file.folder / source, where)
    else:
        from gate.factory import load_callable

        function = load_callable(source, file.folder, where=where)
        try:
            value = _call(function, seed=file.spec.data.seed)
        except DataError:
            raise
        except Exception as err:
            raise DataError(f"failed: {type(err).__name__}: {err}", where=where) from err
    found = _image_source(value, file, needed=needed, where=where) or _as_source(value, names, where)
    if len(found) == 0:
        raise DataError(f"gives no samples, [data] asks for {needed}", where=where)
    if len(found) < needed:
        raise DataError(
            f"gives {len(found)} samples, [data] asks for {needed}",
            where=where,
            hint="Fewer samples than asked for is never a pass: restore the data, or lower the number in the spec.",
        )
    return found


def _image_source(value: object, file: SpecFile, *, needed: int, where: str) -> SampleSource | None:
    """Images that a function names, made the model's input by `[preprocess]`; None where it gave something else."""
    from gate.data.image_sources import images_from

    spec = file.spec
    images = images_from(value, where=where)
    if images is None:
        if spec.preprocess is not None and spec.data.images is None:
            raise DataError(
                f"gave a {type(value).__name__}, which is the model's input already, and there is [preprocess]",
                where=where,
                hint="Return images (gate.read_images, or a Hugging Face dataset), or take [preprocess] out.",
            )
        return None
    if spec.preprocess is None or len(spec.inputs) != 1:
        raise DataError(
            "gives images; they need [preprocess], which says how one becomes the model's only input", where=where
        )
    from gate.data.images import ImageSource

    name, given = next(iter(spec.inputs.items()))
    return ImageSource(
        images, preprocess=spec.preprocess, input_name=name, dtype=given.dtype, samples=needed, seed=spec.data.seed
    )


def _call(function: Callable[..., object], *, seed: int) -> object:
    parameters = inspect.signature(function).parameters
    return function(seed=seed) if "seed" in parameters else function()


def _read_arrays(path: Path, where: str) -> dict[str, Array]:
    if not path.is_file():
        raise DataError(f"there is no file {path}", where=where)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        from safetensors.numpy import load_file

        return cast("dict[str, Array]", load_file(path))
    except Exception as err:
        raise DataError(f"{path} cannot be read: {err}", where=where) from err


def _as_source(value: object, names: tuple[str, ...], where: str) -> SampleSource:
    if isinstance(value, Mapping):
        arrays = {str(name): _as_array(array, repr(str(name)), where) for name, array in value.items()}
        labels = next((arrays.pop(key) for key in LABEL_KEYS if key in arrays and key not in names), None)
        targets = next((arrays.pop(key) for key in TARGET_KEYS if key in arrays and key not in names), None)
        value = Samples(inputs=arrays, labels=labels, targets=None if targets is None else list(targets))
    if isinstance(value, Samples):
        if not isinstance(value.inputs, Mapping):
            raise DataError(f"its inputs are a {type(value.inputs).__name__}, expected arrays by name", where=where)
        if set(value.inputs) != set(names):
            raise DataError(
                f"has inputs {', '.join(map(repr, value.inputs)) or 'none'}, "
                f"the spec has {', '.join(map(repr, names))}",
                where=where,
            )
        inputs = {name: _as_array(array, f"input {name!r}", where) for name, array in value.inputs.items()}
        if scalars := [name for name, array in inputs.items() if array.ndim == 0]:
            raise DataError(f"input {scalars[0]!r} is a scalar, expected [N, ...]", where=where)
        lengths = {name: len(array) for name, array in inputs.items()}
        count = next(iter(lengths.values()))
        if len(set(lengths.values())) != 1:
            raise DataError(f"its inputs differ in length: {lengths}", where=where)
        if value.labels is not None:
            labels_array = _as_array(value.labels, "labels", where)
            if labels_array.ndim != 1 or labels_array.dtype.kind not in "iu":
                raise DataError(
                    f"labels must be integers [N], got {labels_array.dtype} {list(labels_array.shape)}", where=where
                )
            if len(labels_array) != count:
                raise DataError(f"has {count} samples but {len(labels_array)} labels", where=where)
        if value.targets is not None and not (
            hasattr(value.targets, "__len__") and hasattr(value.targets, "__getitem__")
        ):
            raise DataError(f"its targets are a {type(value.targets).__name__}, expected a list", where=where)
        if value.targets is not None and len(value.targets) != count:
            raise DataError(f"has {count} samples but {len(value.targets)} targets", where=where)
        return ArraySource(Samples(inputs, value.labels, value.targets, value.categories), count)
    if callable(getattr(value, "batches", None)) and hasattr(value, "__len__"):
        return cast("SampleSource", value)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        try:
            count = len(value)
        except Exception as err:
            raise DataError(f"its len() failed: {type(err).__name__}: {err}", where=where) from err
        return DatasetSource(value, names, where, count)
    raise DataError(
        f"gave a {type(value).__name__}; expected gate.Samples, a mapping of arrays, or a dataset with len() and [i]",
        where=where,
    )


def digest_of(
    source: SampleSource,
    *,
    inputs: Mapping[str, InputSpec],
    batch: int,
    where: str,
    look: Callable[[Mapping[str, Array]], None] | None = None,
) -> DataDigest:
    """Go through all samples once: check each against the spec and digest it.

    Args:
        source: The samples.
        inputs: What the spec says of them.
        batch: How many at a time.
        where: For errors.
        look: Shown the inputs of each batch after they were checked.

    Raises:
        DataError: A sample has another dtype or shape than the spec, or holds a NaN or Inf; or the source gave
            another number of samples than it said.
    """
    ids: list[bytes] = []
    batches: dict[tuple[int, int], bytes] = {}
    labels: list[bytes] = []
    targets: list[bytes] = []
    labelled = 0
    for each in source.batches(batch):
        _require_fits(each, inputs, where)
        digests = _row_digests(each)
        batches[each.first, each.size] = _batch_digest(each)
        ids.extend(digests)
        if look is not None:
            look(each.inputs)
        if each.labels is not None:
            labels.append(each.labels.astype("<i8").tobytes())
            labelled += each.size
        if each.targets is not None:
            if len(each.targets) != each.size:
                raise DataError(f"gave {len(each.targets)} targets for {each.size} samples", where=where)
            targets.extend(_target_digest(target, each.first + row, where) for row, target in enumerate(each.targets))
    if len(ids) != len(source):
        raise DataError(f"said it has {len(source)} samples and gave {len(ids)}", where=where)
    if labelled not in (0, len(ids)):
        raise DataError(f"gave labels for {labelled} of {len(ids)} samples", where=where)
    if len(targets) not in (0, len(ids)):
        raise DataError(f"gave targets for {len(targets)} of {len(ids)} samples", where=where)
    inputs_sha256 = hashlib.sha256(b"".join(ids)).hexdigest()
    all_labels = b"".join(labels)
    parts = [inputs_sha256, str(labelled), hashlib.sha256(all_labels).hexdigest()]
    if targets:
        parts.append(hashlib.sha256(b"".join(targets)).hexdigest())
    return DataDigest(
        samples=tuple(ids),
        inputs_sha256=inputs_sha256,
        data_sha256=hashlib.sha256(":".join(parts).encode()).hexdigest(),
        labels=all_labels,
        targets=tuple(targets),
        batches=batches,
    )


def _target_digest(target: object, index: int, where: str) -> bytes:
    try:
        return target_digest(target)
    except TypeError as err:
        raise DataError(f"the target of sample {index} {err}", where=where) from err


def target_digest(target: object) -> bytes:
    """sha256 of a sample's ground truth by content: numbers, texts, arrays, mappings, sequences, and dataclasses of these.

    Raises:
        TypeError: It holds something else.
    """
    one = hashlib.sha256()
    _digest_into(one, target)
    return one.digest()


def _digest_into(one: Any, value: object) -> None:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufSU":
            raise TypeError(f"holds an array of {value.dtype}, expected numbers")
        one.update(f"array:{value.dtype.str}:{value.shape}:".encode())
        one.update(np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, (bool, int, float, str, np.generic)):
        plain = value.item() if isinstance(value, np.generic) else value
        text = f"{type(plain).__name__}:{plain!r}".encode()
        one.update(f"{len(text)}:".encode() + text)
    elif isinstance(value, bytes):
        one.update(f"bytes:{len(value)}:".encode() + value)
    elif isinstance(value, Mapping):
        one.update(f"mapping:{len(value)}:".encode())
        for key in sorted(value, key=str):
            _digest_into(one, str(key))
            _digest_into(one, value[key])
    elif isinstance(value, (list, tuple)):
        one.update(f"sequence:{len(value)}:".encode())
        for each in value:
            _digest_into(one, each)
    elif is_dataclass(value) and not isinstance(value, type):
        one.update(f"{type(value).__name__}:".encode())
        for each in fields(value):
            _digest_into(one, each.name)
            _digest_into(one, getattr(value, each.name))
    else:
        raise TypeError(f"holds a {type(value).__name__}, expected numbers, texts, arrays or mappings of them")


def _row_digests(batch: Batch) -> Iterator[bytes]:
    """sha256 of each sample's inputs, begun at once; of large samples on all cores, since hashing releases the lock."""
    rows = {name: np.ascontiguousarray(batch.inputs[name]) for name in sorted(batch.inputs)}
    heads = {name: _head(name, rows[name]) for name in rows}

    def digest(row: int) -> bytes:
        one = hashlib.sha256()
        for name, values in rows.items():
            one.update(heads[name])
            one.update(_bytes_of(values[row]))
        return one.digest()

    if _is_small(batch):
        return iter([digest(row) for row in range(batch.size)])
    return _hashers().map(digest, range(batch.size))


def _batch_digest(batch: Batch) -> bytes:
    """128-bit XXH3 of a batch's inputs.

    A large array is one call without the interpreter's lock: an engine's host code that launches meanwhile is not held up.
    """
    import xxhash

    one = xxhash.xxh3_128()
    for name in sorted(batch.inputs):
        values = np.ascontiguousarray(batch.inputs[name])
        one.update(_head(name, values))
        one.update(_bytes_of(values))
    return one.digest()


def _head(name: str, values: Array) -> bytes:
    return f"{name}:{values.dtype}:{values.shape[1:]}".encode()


def _bytes_of(values: Array) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _is_small(batch: Batch) -> bool:
    return sum(values.nbytes for values in batch.inputs.values()) < _HASHED_ALONE_BYTES


@functools.cache
def _hashers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="sample-digest")


def _require_fits(batch: Batch, inputs: Mapping[str, InputSpec], where: str) -> None:
    if batch.inputs.keys() != inputs.keys():
        raise DataError(
            f"sample {batch.first} has inputs {sorted(batch.inputs)}, the spec has {sorted(inputs)}", where=where
        )
    for name, spec in inputs.items():
        values = batch.inputs[name]
        if values.dtype != np.dtype(spec.dtype):
            raise DataError(f"input {name!r} is {values.dtype}, the spec says {spec.dtype}", where=where)
        if values.ndim != len(spec.shape):
            raise DataError(
                f"input {name!r} has shape {list(values.shape)}, the spec says {list(spec.shape)}", where=where
            )
        for axis, (size, allowed) in enumerate(zip(values.shape[1:], spec.shape[1:], strict=True), start=1):
            if isinstance(allowed, int):
                fits = size == allowed
                shown = str(allowed)
            else:
                limits = spec.axes[allowed]
                fits = limits.min <= size <= limits.max
                shown = f"{allowed} from {limits.min} to {limits.max}"
            if not fits:
                raise DataError(
                    f"input {name!r} has {size} on axis {axis} at sample {batch.first}, the spec says {shown}",
                    where=where,
                )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0, 0])
            raise DataError(f"input {name!r} holds a NaN or Inf at sample {batch.first + row}", where=where)


def require_disjoint(evaluation: DataDigest, calibration: DataDigest) -> None:
    """Calibration samples must not be evaluation samples: what is tuned on them says nothing when judged on them.

    Raises:
        DataError: Some are; names the first pair.
    """
    places = {digest: index for index, digest in enumerate(evaluation.samples)}
    shared = [(index, places[digest]) for index, digest in enumerate(calibration.samples) if digest in places]
    if shared:
        mine, theirs = shared[0]
        raise DataError(
            f"{len(shared)} of {len(calibration.samples)} calibration samples are evaluation samples "
            f"(calibration {mine} is evaluation {theirs})",
            where="[data] calibration",
            hint="Calibrate on training samples.",
        )
