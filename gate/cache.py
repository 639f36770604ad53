"""Content-addressed results: reference outputs, exports, lowered graphs, engines.

An entry is a folder `<root>/<kind>/<key>` of plain files and an `entry.json` that lists their digests and carries its
own. Every file is hashed again before an entry is used; one that does not hold is removed, reported and made anew.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from gate import atomic
from gate.errors import BundleError, GateError
from gate.manifest import (
    MAX_JSON_BYTES,
    FileDigest,
    Sha256,
    canonical_json,
    pretty_json,
    sha256_hex,
    strict_json,
)

_RECORD = "entry.json"
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,40}")
_KEY = re.compile(r"[0-9a-f]{64}")


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`entry.json`: the entry's files, what its maker said of it, and the digest of all that."""

    schema_version: Literal[1] = 1
    kind: str
    key: Sha256
    files: dict[str, FileDigest]
    meta: dict[str, Any]
    digest: Sha256


@dataclass(frozen=True)
class Entry:
    """A cache entry whose files were hashed and hold.

    Args:
        folder: Where its files lie.
        meta: What its maker said of it: JSON values.
        files: Digest of each file, by name.
    """

    folder: Path
    meta: Mapping[str, Any]
    files: Mapping[str, FileDigest]

    def path(self, name: str) -> Path:
        """Where the file of that name lies.

        Raises:
            KeyError: The entry has none; names what it has.
        """
        self._require(name)
        return self.folder / name

    def sha256(self, name: str) -> str:
        """The digest of the file of that name.

        Raises:
            KeyError: The entry has none; names what it has.
        """
        return self._require(name).sha256

    def _require(self, name: str) -> FileDigest:
        if name not in self.files:
            raise KeyError(f"{self.folder.name[:12]}… has no file {name!r}; it has {', '.join(sorted(self.files))}")
        return self.files[name]


class Cache:
    """Results by what they were made from. Several processes may use one folder at the same time.

    Args:
        root: Its folder; None: a temporary one, removed when the process ends.
        on_rebuild: Told a sentence for each entry that was found corrupt and removed.
    """

    def __init__(self, root: Path | None, *, on_rebuild: Callable[[str], None] | None = None) -> None:
        self.is_temporary = root is None
        if root is None:
            self.root = Path(tempfile.mkdtemp(prefix="gate-cache-"))
            atexit.register(_remove_own, self.root, os.getpid())
        else:
            self.root = root
        self._on_rebuild = on_rebuild

    @staticmethod
    def entry_key(**parts: object) -> str:
        """The key of what this version of the gate makes from `parts`: SHA-256 of their canonical JSON.

        Raises:
            BundleError: A part is not a JSON value, or not finite.
        """
        from gate import __version__

        return sha256_hex(canonical_json({"gate": __version__, "parts": parts}))

    def get(self, kind: str, key: str) -> Entry | None:
        """The entry, every file of it hashed again; None where there is none, or was a corrupt one."""
        path = self._folder(kind, key)
        if not os.path.lexists(path):
            return None
        try:
            return _read(path, kind=kind, key=key)
        except BundleError:
            return self._drop_corrupt(path, kind=kind, key=key)

    def put(self, kind: str, key: str, make: Callable[[Path], None], meta: Mapping[str, Any]) -> Entry:
        """Make an entry, unless it exists by now.

        Args:
            kind: `reference`, `export`, `lowered`, `nms`, `engine`.
            key: From `entry_key`.
            make: Writes the files, at least one, into the folder that it is given; no sub-folders, no links.
            meta: JSON values to keep with them.

        Raises:
            GateError: `make` wrote nothing, or something other than files, or the disk is full.
        """
        existing = self.get(kind, key)
        if existing is not None:
            return existing
        path = self._folder(kind, key)
        with atomic.folder(path, existing="keep") as temporary:
            make(temporary)
            record = _record(temporary, kind=kind, key=key, meta=meta)
            (temporary / _RECORD).write_bytes(pretty_json(msgspec.to_builtins(record)))
        entry = self.get(kind, key)
        if entry is None:
            raise GateError("the cache entry was changed by another program while it was written", where=str(path))
        return entry

    def _folder(self, kind: str, key: str) -> Path:
        if not _KIND.fullmatch(kind) or not _KEY.fullmatch(key):
            raise GateError(f"not a cache key: {kind}/{key}")
        return self.root / kind / key

    def _drop_corrupt(self, path: Path, *, kind: str, key: str) -> Entry | None:
        """Remove a corrupt entry. Under a lock it is read again, since another process may have made it anew."""
        with atomic.locked(self.root / ".lock"):
            if not os.path.lexists(path):
                return None
            try:
                return _read(path, kind=kind, key=key)
            except BundleError as err:
                atomic.discard(path)
                reason = err.message
        if self._on_rebuild is not None:
            self._on_rebuild(f"cache entry {kind}/{key[:4]}… is corrupt ({reason}); rebuilt")
        return None


def _remove_own(root: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(root, ignore_errors=True)


def _record(folder: Path, *, kind: str, key: str, meta: Mapping[str, Any]) -> _Record:
    files: dict[str, FileDigest] = {}
    for item in sorted(os.scandir(folder), key=lambda each: each.name):
        if item.name == _RECORD or not item.is_file(follow_symlinks=False):
            raise GateError(f"{item.name} is not a plain file of a cache entry", where=str(folder))
        files[item.name] = atomic.digest_of_file(Path(item.path))
    if not files:
        raise GateError(f"nothing was made for the cache entry {kind}/{key[:4]}…", where=str(folder))
    draft = _Record(kind=kind, key=key, files=files, meta=dict(meta), digest="0" * 64)
    return msgspec.structs.replace(draft, digest=_digest(draft))


def _digest(record: _Record) -> str:
    raw = msgspec.to_builtins(record)
    del raw["digest"]
    return sha256_hex(canonical_json(raw))


def _read(path: Path, *, kind: str, key: str) -> Entry:
    """The entry, if every byte of it is what was put there.

    Raises:
        BundleError: It is not; the message says what is wrong with which file.
    """
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
        names = {each.name for each in path.iterdir()} - {_RECORD} if is_folder else set()
    except OSError as err:
        raise BundleError(f"cannot be read: {err.strerror}") from err
    if not is_folder:
        raise BundleError("not a folder")
    try:
        data = atomic.read_regular(path / _RECORD, limit_bytes=MAX_JSON_BYTES)
        record = msgspec.convert(strict_json(data), _Record)
    except BundleError as err:
        raise BundleError(f"{_RECORD}: {err.message}") from err
    except msgspec.ValidationError as err:
        raise BundleError(f"{_RECORD}: {err}") from err
    if record.digest != _digest(record) or data != pretty_json(msgspec.to_builtins(record)):
        raise BundleError(f"{_RECORD}: digest differs")
    if (record.kind, record.key) != (kind, key):
        raise BundleError(f"{_RECORD}: is of {record.kind}/{record.key[:4]}…")
    if extra := sorted(names - set(record.files)):
        raise BundleError(f"{extra[0]}: not part of the entry")
    for name, expected in sorted(record.files.items()):
        try:
            got = atomic.digest_of_file(path / name)
        except BundleError as err:
            raise BundleError(f"{name}: {err.message}") from err
        if got.size_bytes != expected.size_bytes:
            raise BundleError(f"{name}: size differs, {got.size_bytes} bytes instead of {expected.size_bytes}")
        if got.sha256 != expected.sha256:
            raise BundleError(f"{name}: digest differs")
    return Entry(folder=path, meta=record.meta, files=record.files)
