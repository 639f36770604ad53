"""Files and folders that are written whole or not at all, and files that are read without following links.

What is written goes into a temporary name beside its target, `.tmp-<pid>-<random>`, is flushed to the disk, and takes
the target's name in one rename. A process that is killed leaves at most such a temporary name; the next writer into
the same folder removes it, once that process is gone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import queue
import re
import secrets
import shutil
import stat
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from gate.errors import BundleError, GateError
from gate.manifest import FileDigest

if TYPE_CHECKING:
    from concurrent.futures import Future

_TEMPORARY = re.compile(r"\.tmp-([0-9]+)-[0-9a-f]{16}")
_CHUNK_BYTES = 256 * 1024
_FLUSH_BYTES = 16 * 1024 * 1024
"""After so many the disk is told to begin."""
_REPLACED = 100
"""How often a file may be replaced by another while it is opened."""
_BUFFERS = 8
"""Chunks that may wait to be written while the next ones are hashed."""
_DISK_ERRORS = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "ENOTDIR", "EEXIST")
)


def write_bytes(path: Path, data: bytes, *, beside: Path | None = None) -> None:
    """Write a file so that it holds either what it held before or all of `data`, whenever the process ends.

    Its permissions follow the umask. Parent folders are made.

    Args:
        path: The file.
        data: All of it.
        beside: What the temporary name lies beside, on the same file system; None: the file itself.

    Raises:
        GateError: The disk is full, read-only or failing, or the folder may not be written to.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(beside or path)
        remove_stale(temporary.parent)
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with os.fdopen(file, "wb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextmanager
def folder(path: Path, *, existing: Literal["keep", "refuse", "replace"] = "refuse") -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an exception, and goes away otherwise.

    Args:
        path: What it becomes. Parent folders are made.
        existing: What happens where `path` exists at the end: `keep` it and drop the new one, `refuse` with an
            error, or `replace` it. A replaced folder changes places with the new one in one step where the file
            system can do that (Linux `renameat2`); elsewhere there is a moment in which neither has the name.

    Raises:
        GateError: `path` exists and is to be refused, or the disk is full, read-only or failing.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        temporary = _temporary_beside(path)
        lock = -1
        try:
            temporary.mkdir()
            lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield temporary
            _fsync_tree(temporary)
            if not _rename_new(temporary, path):
                if existing == "refuse":
                    raise GateError("exists already", where=str(path))
                if existing == "replace":
                    _exchange(temporary, path)
            _fsync(path.parent)
        finally:
            if lock >= 0:
                os.close(lock)
            _remove(temporary)


def remove_stale(parent: Path) -> None:
    """Remove the temporary files and folders in `parent` whose process is gone.

    One that a live process holds a lock on stays, even where its pid is of another container and unknown here.
    """
    try:
        names = [each.name for each in parent.iterdir()]
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match is not None and not _is_alive(int(match[1])) and not _is_locked(parent / name):
            _remove(parent / name)


def discard(path: Path) -> None:
    """Remove a file or folder; nobody sees it half removed under its own name.

    Raises:
        GateError: It cannot be removed.
    """
    with _disk_errors(path):
        temporary = _temporary_beside(path)
        try:
            path.rename(temporary)
        except FileNotFoundError:
            return
        _remove(temporary)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made where it is missing and stays.

    Raises:
        GateError: The file cannot be made.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def open_regular(path: Path, *, single_link: bool = False) -> BinaryIO:
    """Open a regular file for reading; what is checked is the open file, so that it cannot be changed under the check.

    Args:
        path: Its last part is not followed where it is a symbolic link.
        single_link: Refuse a file with more than one hard link.

    Raises:
        BundleError: It is missing, a link, a folder, a pipe or a device, or has several hard links.
    """
    for _ in range(_REPLACED):
        file = _open(path)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            os.close(file)
            raise BundleError("is not a regular file", where=str(path))
        if not single_link or status.st_nlink == 1:
            return os.fdopen(file, "rb")
        os.close(file)
        # None at all: another file took its name since it was opened, as `write_bytes` does it.
        if status.st_nlink > 1:
            raise BundleError(f"has {status.st_nlink} hard links, may have 1", where=str(path))
    raise BundleError(f"was replaced {_REPLACED} times while it was opened", where=str(path))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError("is missing", where=str(path)) from None
    except OSError as err:
        what = "is a symbolic link" if err.errno == errno.ELOOP else f"cannot be opened: {err.strerror}"
        raise BundleError(what, where=str(path)) from err


def read_regular(path: Path, *, limit_bytes: int, single_link: bool = False) -> bytes:
    """All bytes of a regular file.

    Raises:
        BundleError: As `open_regular`, or it is longer than the limit.
    """
    with open_regular(path, single_link=single_link) as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise BundleError(f"is too long: the limit is {limit_bytes} bytes", where=str(path))
    return data


def digest_of_stream(stream: BinaryIO, *, copy_to: BinaryIO | None = None, most_bytes: int | None = None) -> FileDigest:
    """SHA-256 and length of what is left in a stream, or of its first `most_bytes`, written to `copy_to` on the way.

    Memory does not grow with the file. (`hashlib.file_digest` needs Python 3.11.)
    """
    digest, size_bytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    left = sys.maxsize if most_bytes is None else most_bytes
    while count := stream.readinto(buffer[: min(left, _CHUNK_BYTES)]):  # type: ignore[attr-defined]
        left -= count
        digest.update(buffer[:count])
        size_bytes += count
        if copy_to is not None:
            copy_to.write(buffer[:count])
    return FileDigest(sha256=digest.hexdigest(), size_bytes=size_bytes)


def copy_hashed(source: BinaryIO, target: BinaryIO) -> FileDigest:
    """Copy what is left in a stream into a file on disk; SHA-256 and length of what was copied.

    One thread hashes while another writes, so that the slower of the two is all that it takes. Memory does not grow with
    the file.

    Raises:
        OSError: As reading or writing.
    """
    from concurrent.futures import ThreadPoolExecutor

    digest, size_bytes = hashlib.sha256(), 0
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(_BUFFERS):
        free.put(memoryview(bytearray(_CHUNK_BYTES)))
    with ThreadPoolExecutor(1) as writer:
        written: deque[Future[None]] = deque()
        while True:
            buffer = free.get()
            count = source.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                break
            written.append(writer.submit(_write_all, target, buffer, count, free))
            digest.update(buffer[:count])
            size_bytes += count
            while written and written[0].done():
                written.popleft().result()
        for each in written:
            each.result()
    return FileDigest(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _write_all(target: BinaryIO, buffer: memoryview, count: int, free: queue.SimpleQueue[memoryview]) -> None:
    try:
        target.write(buffer[:count])
        end = target.tell()
        if end % _FLUSH_BYTES < count:
            # The disk begins with it now, and not when all is there: dirty pages stay, and are written behind.
            os.posix_fadvise(target.fileno(), max(0, end - _FLUSH_BYTES - count), _FLUSH_BYTES, os.POSIX_FADV_DONTNEED)
    finally:
        free.put(buffer)


def digest_of_file(path: Path, *, single_link: bool = False) -> FileDigest:
    """SHA-256 and length of a regular file.

    Raises:
        BundleError: As `open_regular`.
    """
    with open_regular(path, single_link=single_link) as stream:
        return digest_of_stream(stream)


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says into a GateError that names the target; other OSErrors pass."""
    try:
        yield
    except OSError as err:
        if err.errno not in _DISK_ERRORS:
            raise
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        raise GateError(
            f"cannot be written: {err.strerror or err}; nothing was left behind",
            where=str(path),
            hint="free some space on that disk and run again" if full else None,
        ) from err


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_locked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _remove(path: Path) -> None:
    """Remove a temporary file or folder as well as it goes; what stays is stale, and removed by a later writer.

    Ctrl-C in the midst of it is raised when it is done; a second one ends it.
    """
    try:
        _remove_at_once(path)
    except BaseException:
        _remove_at_once(path)
        raise


def _remove_at_once(path: Path) -> None:
    try:
        path.unlink()
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names. A file system that cannot flush a folder is left to its ways."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def _fsync_tree(root: Path) -> None:
    for parent, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                _fsync(path)
        _fsync(Path(parent))


def _rename_new(temporary: Path, path: Path) -> bool:
    """Give the folder its name, unless something else has it; an empty folder gives way."""
    try:
        temporary.rename(path)
    except OSError as err:
        if err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _exchange(temporary: Path, path: Path) -> None:
    """Let two names change places; what was `path` is then `temporary`, and removed by its owner.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and (
        renameat2(at_fdcwd, os.fsencode(temporary), at_fdcwd, os.fsencode(path), rename_exchange) == 0
    ):
        return
    old = _temporary_beside(path)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    _remove(old)
