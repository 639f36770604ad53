"""Canonical bytes, digests, strict JSON, and the names of files in a bundle. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from gate.errors import BundleError

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_JSON_DEPTH = 64

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Timestamp = Annotated[
    str, msgspec.Meta(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$", max_length=20)
]
RelativePath = Annotated[
    str,
    msgspec.Meta(
        pattern="^[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*(?!\\n)$",
        max_length=200,
        description="Path inside the bundle, with forward slashes and no part that begins with a dot.",
    ),
]


NonFinite = Literal["NaN", "Infinity", "-Infinity"]
"""Texts that stand for numbers that JSON does not have."""
Number = float | NonFinite


class FileDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file's bytes were.

    Args:
        sha256: 64 lower-case hex digits.
        size_bytes: Its length.
    """

    sha256: Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]


class Digests(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """SHA-256 of what the verdict rests on; null where there was none."""

    reference: Sha256
    data: Sha256
    spec: Sha256
    baseline: Sha256 | None
    weights: Sha256 | None
    calibration: Sha256 | None


def sha256_hex(data: bytes) -> str:
    """SHA-256 of bytes, as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(obj: object) -> bytes:
    """The one way to write `obj` as JSON, so that equal values have equal digests.

    Keys are sorted by code point, there is no white space, text is UTF-8, floats are the shortest that read back
    the same, and a newline ends it.

    Raises:
        BundleError: It holds a NaN or infinity, a key that is not text, or a value that JSON does not have.
    """
    return _dumps(obj, indent=None)


def pretty_json(obj: object) -> bytes:
    """As `canonical_json`, on one line a value, for files that people review.

    Raises:
        BundleError: As `canonical_json`.
    """
    return _dumps(obj, indent=2)


def _dumps(obj: object, *, indent: int | None) -> bytes:
    _require_plain(obj, where=None)
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        text = json.dumps(
            obj, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=separators, indent=indent
        )
        return (text + "\n").encode()
    except (TypeError, ValueError) as err:
        raise BundleError(f"cannot be written as JSON: {err}") from err


def strict_json(data: bytes, *, where: str | None = None, limit_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read JSON that has one meaning only.

    Args:
        data: The whole document, UTF-8.
        where: Names it in errors.
        limit_bytes: The most it may hold.

    Raises:
        BundleError: It is longer than the limit, not UTF-8 or not JSON, holds a key twice, a NaN, an infinity or a
            number beyond float64, nests deeper than 64, or something follows the value.
    """
    if len(data) > limit_bytes:
        raise BundleError(f"is too long: {len(data)} bytes, the limit is {limit_bytes}", where=where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise BundleError(f"is not UTF-8: byte {err.start} is 0x{data[err.start]:02x}", where=where) from err

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            names = [key for key, _ in items]
            twice = next(key for key in names if names.count(key) > 1)
            raise BundleError(f"the key {twice!r} stands twice in one object", where=where)
        return table

    def number(token: str) -> float:
        value = float(token)
        if not math.isfinite(value):
            raise BundleError(f"the number {token[:40]} is not finite", where=where)
        return value

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=number)
    except json.JSONDecodeError as err:
        raise BundleError(f"is not JSON: {err.msg} at line {err.lineno}, column {err.colno}", where=where) from err
    except RecursionError:
        raise BundleError(f"nests deeper than {MAX_JSON_DEPTH}", where=where) from None
    except ValueError as err:
        raise BundleError(f"is not JSON: {err}", where=where) from err
    _require_plain(value, where=where)
    return value


def _require_plain(value: object, *, where: str | None) -> None:
    """Depth, keys and text of a JSON value; without recursion, so that depth cannot exhaust the stack."""
    todo: list[tuple[object, int]] = [(value, 1)]
    while todo:
        each, depth = todo.pop()
        if isinstance(each, str):
            if not each.isascii():
                try:
                    each.encode()
                except UnicodeEncodeError as err:
                    raise BundleError(f"holds text that is not Unicode: {each!r:.60}", where=where) from err
        elif isinstance(each, Mapping):
            if depth > MAX_JSON_DEPTH:
                raise BundleError(f"nests deeper than {MAX_JSON_DEPTH}", where=where)
            for key, item in each.items():
                if not isinstance(key, str):
                    raise BundleError(f"has the key {key!r}, which is not text", where=where)
                todo.append((key, depth))
                todo.append((item, depth + 1))
        elif isinstance(each, (list, tuple)):
            if depth > MAX_JSON_DEPTH:
                raise BundleError(f"nests deeper than {MAX_JSON_DEPTH}", where=where)
            todo.extend((item, depth + 1) for item in each)
