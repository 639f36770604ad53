"""Image files become arrays, in worker processes where there are several: what a worker does, and the pool of them.

A worker writes what it decoded into memory that it shares with the process that asked, so nothing is copied on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from gate.data.image_spec import Preprocess
from gate.data.preprocess import Pixels, pillow_image, preprocess_into
from gate.errors import DataError, GateError
from gate.processes import without_main
from gate.tensors import Array

_EXIF_ORIENTATION = 0x0112
"""Source: CIPA DC-008 (Exif 2.3), tag 274."""

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of more than 8 bits a channel; it clips them at 255 when it converts them."""


class Reader(Protocol):
    """Where an image comes from."""

    def read(self, place: Any) -> Any:
        """The bytes of an image file, or an image of Pillow."""
        ...


@dataclass(frozen=True)
class FileReader:
    """Image files by path."""

    def read(self, place: str) -> bytes:
        """The file's bytes."""
        return Path(place).read_bytes()


@dataclass(frozen=True)
class Examined:
    """An image that was decoded whole.

    Args:
        width, height: In pixels, its EXIF orientation applied.
        orientation: EXIF's, 1 to 8; 1 where the file says nothing.
        sha256: Of the file's bytes; of the pixels where it came from no file.
    """

    width: int
    height: int
    orientation: int
    sha256: str


@dataclass(frozen=True)
class Job:
    """One image to decode: where from, its name for errors, and the width and height it had when it was examined."""

    place: Any
    name: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Decoder:
    """All that a worker needs: the same in this process and in another."""

    reader: Reader
    preprocess: Preprocess
    dtype: str

    def examine(self, jobs: Sequence[Job]) -> list[Examined | str]:
        """Decode each image whole; what is wrong with it where that fails."""
        found: list[Examined | str] = []
        for job in jobs:
            try:
                found.append(self._examined(job))
            except GateError as err:
                found.append(err.message)
        return found

    def _examined(self, job: Job) -> Examined:
        value = self._read(job)
        digest = hashlib.sha256()
        if isinstance(value, bytes):
            digest.update(value)
            with _refused(), _opened(value) as image:
                image.verify()
        pixels, orientation = _pixels(value)
        if not isinstance(value, bytes):
            digest.update(f"{pixels.shape}:".encode())
            digest.update(np.ascontiguousarray(pixels).data)
        return Examined(pixels.shape[1], pixels.shape[0], orientation, digest.hexdigest())

    def fill(self, out: Array, jobs: Sequence[Job]) -> None:
        """Decode and preprocess images into the rows of an array.

        Raises:
            DataError: An image cannot be read, or is not what it was when it was examined.
        """
        for row, job in zip(out, jobs, strict=True):
            self.preprocess_into(row, self.decoded(job), job)

    def decoded(self, job: Job) -> Pixels:
        """The pixels of an image as `fill` decodes them: uint8 [H, W] or [H, W, 3], RGB, turned as EXIF says.

        Raises:
            DataError: As `fill`.
        """
        with _named(job):
            return self._decoded(job)

    def preprocess_into(self, row: Array, pixels: Pixels, job: Job) -> None:
        """What `fill` does with the decoded pixels of an image, into a row of its array.

        Raises:
            DataError: They do not become the input.
        """
        with _named(job):
            self._preprocess(row, pixels)

    def _decoded(self, job: Job) -> Pixels:
        pixels, _ = _pixels(self._read(job))
        if pixels.shape[:2] != (job.height, job.width):
            raise DataError(
                f"is {pixels.shape[1]} x {pixels.shape[0]} pixels and was {job.width} x {job.height} before",
                hint="A file changed while the gate ran.",
            )
        return pixels

    def _preprocess(self, row: Array, pixels: Pixels) -> None:
        if self.dtype == "float32":
            preprocess_into(cast("npt.NDArray[np.float32]", row), pixels, self.preprocess)
            return
        values = np.empty(row.shape, np.float32)
        preprocess_into(values, pixels, self.preprocess)
        with np.errstate(over="ignore", invalid="ignore"):
            row[...] = values
        if row.dtype.kind != "f" and not np.array_equal(row, values):
            raise DataError(
                f"does not become {self.dtype}: its values are no whole numbers of that type after preprocessing",
                hint="A uint8 input takes scale = 1, and neither mean nor std.",
            )

    def _read(self, job: Job) -> Any:
        try:
            value = self.reader.read(job.place)
        except FileNotFoundError as err:
            raise DataError("there is no such file") from err
        except Exception as err:
            raise DataError(f"cannot be read: {type(err).__name__}: {err}") from err
        if isinstance(value, bytes) and not value:
            raise DataError("is empty: 0 bytes")
        return value


@contextlib.contextmanager
def _named(job: Job) -> Iterator[None]:
    """An error in this block says which image it is about."""
    try:
        yield
    except DataError as err:
        raise DataError(err.message, where=job.name, hint=err.hint) from err


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Whatever an image library raises, as what is wrong with the image."""
    try:
        yield
    except GateError:
        raise
    except Exception as err:
        kind = "is no image that Pillow reads" if type(err).__name__ == "UnidentifiedImageError" else None
        raise DataError(kind or f"cannot be decoded: {type(err).__name__}: {err}") from err


def _opened(value: bytes) -> Any:
    return pillow_image().open(io.BytesIO(value))


def _pixels(value: Any) -> tuple[Pixels, int]:
    """uint8 [H, W] or [H, W, 3], RGB, EXIF orientation applied, and that orientation.

    Transparency is dropped: the colours beneath it stay as they are.
    """
    from PIL import ImageFile, ImageOps

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "Pillow was told to accept truncated images, so a broken one would not be noticed",
            hint="Set PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False; a library that was imported has set it to True.",
        )
    with _refused():
        image = _opened(value) if isinstance(value, bytes) else value
        if not hasattr(image, "getexif"):
            raise DataError(f"is a {type(image).__name__} and no image")
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise DataError(f"has {image.n_frames} frames, expected one image")
        image.load()
        if image.mode in _DEEP_MODES:
            raise DataError(f"has more than 8 bits a channel (mode {image.mode}), which would be clipped")
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode not in {"L", "RGB"}:
            image = image.convert("L" if image.mode == "1" else "RGB")
        return np.asarray(image, dtype=np.uint8), int(orientation)


_DECODERS: list[Decoder] = []
"""In a worker process: its own, put there when it starts."""


def _start_worker(decoder: Decoder) -> None:
    _DECODERS.append(decoder)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A worker waits for work for good where its parent was killed: this ends it."""
    parent.join()
    os._exit(1)


def _examine_in_worker(jobs: Sequence[Job]) -> list[Examined | str]:
    return _DECODERS[0].examine(jobs)


def _fill_in_worker(
    place: tuple[str, int] | None, offset: int, shape: tuple[int, ...], jobs: Sequence[Job]
) -> Array | None:
    """Decode into a part of shared memory, and return nothing; or return the array, where there is no room for it."""
    decoder = _DECODERS[0]
    shared = None if place is None else _shared(*place, offset, shape, decoder.dtype)
    values = np.empty(shape, decoder.dtype) if shared is None else shared
    decoder.fill(values, jobs)
    return values if shared is None else None


_MAPPED: dict[int, mmap.mmap] = {}
"""In a worker process: the shared memory that it writes to, by inode. It is kept mapped, since the first touch of a page
costs more than its use."""

_MOST_MAPPED = 40


def _shared(path: str, inode: int, offset: int, shape: tuple[int, ...], dtype: str) -> Array | None:
    """A part of shared memory as an array, reserved; None where there is not so much, or it is gone.

    Writing to shared memory that was not reserved ends the process with SIGBUS where it runs out.
    """
    count = int(np.prod(shape))
    try:
        file = os.open(path, os.O_RDWR)
        try:
            if os.fstat(file).st_ino != inode:
                return None
            os.posix_fallocate(file, offset, count * np.dtype(dtype).itemsize)
            mapped = _MAPPED.pop(inode, None) or mmap.mmap(file, 0)
        finally:
            os.close(file)
    except OSError:
        return None
    while len(_MAPPED) >= _MOST_MAPPED:
        del _MAPPED[next(iter(_MAPPED))]
    _MAPPED[inode] = mapped
    return np.frombuffer(mapped, dtype, count=count, offset=offset).reshape(shape)


class SharedMemory:
    """Memory that workers write a batch to; used again once nobody holds an array over it.

    It has no name in any file system: workers open it through this process's file descriptor, and it ends with the last
    process that has it, however that ends. Nor does it count to the 64 MiB of `/dev/shm` in a container.

    Source: memfd_create(2); proc_pid_fd(5).
    """

    def __init__(self, size: int) -> None:
        file = os.memfd_create("trt-gate-batch")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, size)
        self.path = f"/proc/{os.getpid()}/fd/{file}"
        self.inode = os.fstat(file).st_ino
        self.mapped = mmap.mmap(file, size)

    def lent(self, shape: tuple[int, ...], dtype: str, free: list[SharedMemory]) -> Array:
        """What workers wrote, as an array; when the last view of it is gone, this goes back to `free`."""
        values = np.frombuffer(self.mapped, dtype, count=int(np.prod(shape)))
        # NumPy makes one memoryview for each such array, and every view of the array has it as its base.
        base: object = values.base
        if isinstance(base, memoryview):
            weakref.finalize(base, free.append, self).atexit = False
        return values.reshape(shape)


_CHUNK = 8
"""Images that one message to a worker names at most: fewer messages, and a batch still spreads over the workers."""


class DecodePool:
    """Workers that decode, or none: then all is done where it is asked for.

    Processes are started anew (spawned), so nothing of the caller's threads or CUDA context is in them; threads take their
    place where the reader cannot be sent to another process. They start when first needed and end with `close`, with the
    pool, or with the process.
    """

    def __init__(self, decoder: Decoder, workers: int) -> None:
        self.decoder = decoder
        self.workers = workers
        self.are_processes = workers > 0 and _is_sendable(decoder)
        self._executor: Executor | None = None
        self._free: list[SharedMemory] = []

    def close(self) -> None:
        """End the workers and free what they share; the next call starts others."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None
        self._free = []  # a new list: what is still lent out goes back to the old one, and with it

    def examine(self, jobs: Sequence[Job]) -> list[Examined | str]:
        """Decode every image whole, in order; what is wrong with it where that fails.

        Raises:
            DataError: A worker ended.
        """
        if self.workers == 0:
            return self.decoder.examine(jobs)
        parts = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
        call = _examine_in_worker if self.are_processes else self.decoder.examine
        pending = [self._submit(call, part) for part in parts]
        try:
            return [each for part, one in zip(parts, pending, strict=True) for each in _result(one, part)]
        finally:
            for one in pending:
                one.cancel()

    def begin(self, jobs: Sequence[Job], shape: tuple[int, ...]) -> PendingBatch:
        """Begin to decode a batch.

        Args:
            jobs: Its images.
            shape: Of each of them, preprocessed.

        Raises:
            DataError: A worker ended.
        """
        whole = (len(jobs), *shape)
        if self.workers == 0:
            return PendingBatch(whole, self.decoder, jobs, [])
        step = max(1, min(_CHUNK, -(-len(jobs) // self.workers)))
        parts = [(start, jobs[start : start + step]) for start in range(0, len(jobs), step)]
        self._start()
        if not self.are_processes:
            values = np.empty(whole, self.decoder.dtype)
            pending = [
                Part(start, part, self._submit(self.decoder.fill, values[start : start + len(part)], part))
                for start, part in parts
            ]
            return PendingBatch(whole, self.decoder, jobs, pending, values=values)
        image_bytes = int(np.prod(shape)) * np.dtype(self.decoder.dtype).itemsize
        memory = self._shared_memory(image_bytes * len(jobs))
        place = None if memory is None else (memory.path, memory.inode)
        pending = [
            Part(start, part, self._submit(_fill_in_worker, place, start * image_bytes, (len(part), *shape), part))
            for start, part in parts
        ]
        return PendingBatch(whole, self.decoder, jobs, pending, memory=memory, free=self._free)

    def _submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self._start()
        own = type(self.decoder.reader).__module__ == "__main__"  # a script's own reader is imported from the script
        try:
            with nullcontext() if own else without_main():
                return cast("Executor", self._executor).submit(call, *arguments)
        except BrokenProcessPool as err:
            raise _ended(()) from err

    def _start(self) -> None:
        if self._executor is not None:
            return
        if not self.are_processes:
            self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
            return
        self._executor = ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.decoder,),
        )

    def _shared_memory(self, size: int) -> SharedMemory | None:
        """Memory of at least that many bytes, none of them reserved yet; None where the system has no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        while self._free:
            memory = self._free.pop()
            if len(memory.mapped) >= size:
                return memory
        return SharedMemory(size)


@dataclass(frozen=True)
class Part:
    """Some images of a batch, which one worker has: the first one's place in the batch, and what comes of them."""

    start: int
    jobs: Sequence[Job]
    done: Future[Any]


@dataclass(frozen=True)
class PendingBatch:
    """A batch that is being decoded.

    Args:
        shape: Of the whole batch.
        decoder: Decodes it here, where no worker does.
        jobs: Its images.
        parts: What workers decode of it; none where there are no workers.
        values: Where threads write to.
        memory: What processes write to.
        free: Where that goes when it is not needed any more.
    """

    shape: tuple[int, ...]
    decoder: Decoder
    jobs: Sequence[Job]
    parts: Sequence[Part]
    values: Array | None = None
    memory: SharedMemory | None = None
    free: list[SharedMemory] = field(default_factory=list)

    def result(self) -> Array:
        """The batch, as soon as it is there.

        Raises:
            DataError: An image cannot be read, or is not what it was when it was examined; or a worker ended.
        """
        if not self.parts:
            values = np.empty(self.shape, self.decoder.dtype)
            self.decoder.fill(values, self.jobs)
            return values
        try:
            returned = [_result(part.done, part.jobs) for part in self.parts]
        except BaseException:
            self.discard()
            raise
        if self.values is not None:
            return self.values
        whole = np.empty(self.shape, self.decoder.dtype) if any(each is not None for each in returned) else None
        shared = None if self.memory is None else self.memory.lent(self.shape, self.decoder.dtype, self.free)
        if whole is None:
            return cast("Array", shared)
        for part, each in zip(self.parts, returned, strict=True):
            rows = slice(part.start, part.start + len(part.jobs))
            whole[rows] = cast("Array", shared)[rows] if each is None else each
        return whole

    def discard(self) -> None:
        """Give up what was not begun; shared memory is free again when no worker writes to it any more."""
        held = None if self.memory is None else self.memory.lent(self.shape, self.decoder.dtype, self.free)
        for part in self.parts:
            if not part.done.cancel():
                part.done.add_done_callback(partial(_hold, held))


def _hold(_values: Array | None, _done: Future[Any]) -> None:
    """Does nothing: a future has it to hold an array until it is done, and gone itself."""


def _result(done: Future[Any], jobs: Sequence[Job]) -> Any:
    try:
        return done.result()
    except BrokenProcessPool as err:
        raise _ended(jobs) from err


def _ended(jobs: Sequence[Job]) -> DataError:
    names = f"; one was decoding {jobs[0].name} or an image near it" if jobs else ""
    return DataError(
        f"a worker process that decodes images ended: out of memory, killed, or it could not start{names}",
        hint="workers = 0 decodes without other processes. A script with a reader of its own must call the gate below "
        'if __name__ == "__main__":, since each worker imports it.',
    )


def _is_sendable(decoder: Decoder) -> bool:
    """Whether another process can be given this."""
    try:
        ForkingPickler.dumps(decoder)
    except Exception:  # noqa: BLE001  # an object of the user's own may raise anything here
        return False
    return True
